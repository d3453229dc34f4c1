from model import SKIP, SMALL


def route_flops(config, route, n_keys):
    d = config.n_embd
    total = 2 * d * config.vocab_size  # the read-out: one product with the (tied) embedding matrix
    for choice in route:
        total += 2 * 2 * d * d  # K and V: written even by a token that skips, because later tokens may read them
        if choice == SKIP:
            continue
        total += 2 * 2 * d * d + 2 * 2 * n_keys * d  # Q and the output projection; scores and weighted sum
        total += 2 * 3 * d * (config.small_width if choice == SMALL else config.big_width)  # gate, up, down
    return total
