"""Exercise 1: count a route's FLOPs.

Task. Fill in route_flops: the forward FLOPs of one token on its route through the model, 2 for each multiply-add.
Write the products of each choice down on paper first.

Why. All comparisons of this project are made at equal FLOPs. Who miscounts them compares unequal things, and finds
gains that are not there.

Read first: the docstring of model.py, then Block and SwiGLU there. (DuoGPT.flops is the answer: look at it last.)

Hint: a matrix [n, m] times a vector is n * m multiply-adds. Go through Block line by line and ask of each matrix
product whether a token that took SKIP needs it. Norms, rotations and sums are not counted.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT, KVCache


def route_flops(config, route, n_keys):
    """FLOPs of one token.

    config: a DuoConfig; route: a list of n_layer choices, say [0, 1, 2, 1]; n_keys: how many tokens attention reads,
    itself included -> int: the sum over the layers, and the read-out over the vocabulary.

    By hand: width d = 2, vocabulary 3, one layer. Route [0] writes a key and a value, 2 matrices of 2 x 2: 2 * 8 = 16
    FLOPs, and reads out 3 x 2: 2 * 6 = 12. In all 28.
    """
    raise NotImplementedError("exercise 1: fill in route_flops")


# ---------------------------------------------------------------------------------------------------------------------
# the check

CONFIG = DuoConfig(n_layer=3, n_head=2, n_embd=20, block_size=7, vocab_size=33, big_width=50, small_width=6)


def per_layer(choice, n_keys=7):
    return route_flops(CONFIG, [choice] * 3, n_keys) / 3


def test_each_choice():
    d = CONFIG.n_embd
    by_hand = route_flops(DuoConfig(1, 1, 2, 4, 3), [SKIP], 4)
    assert by_hand == 28, (f"the example by hand has {by_hand} FLOPs; it should be 28: a key and a value, which a "
                           "token that skips still writes, are 8 multiply-adds, the read-out 6, and each counts 2")
    assert per_layer(BIG) != per_layer(SMALL), "BIG costs as much as SMALL: a token runs one FFN, the one it chose"
    ffn = (per_layer(BIG) - per_layer(SMALL)) / (CONFIG.big_width - CONFIG.small_width)  # per unit of inner width
    assert ffn == 6 * d, (f"a FFN costs {ffn / d:g} d FLOPs per unit of its inner width. SwiGLU has three products "
                          "(gate, up, down) of d multiply-adds per unit, 2 FLOPs each: 6 d")
    key = per_layer(SMALL, 7) - per_layer(SMALL, 6)
    assert key == 4 * d, (f"one more key costs {key / d:g} d FLOPs; it takes part in a score q . k and in the weighted "
                          "sum of the values, over all heads d multiply-adds each: 4 d")
    assert per_layer(SKIP, 7) == per_layer(SKIP, 6), "a token that skips asks no query, so it reads no keys"
    attend = per_layer(SMALL) - per_layer(SKIP) - 6 * d * CONFIG.small_width - 4 * d * 7
    assert attend == 4 * d * d, (f"the products of SMALL that SKIP saves, FFN and keys aside, are {attend / d / d:g} "
                                 "d^2 FLOPs; they are the query and the output projection, 2 d^2 each")
    model = DuoGPT(CONFIG)
    for route in ([SKIP] * 3, [SMALL] * 3, [BIG] * 3, [SKIP, SMALL, BIG]):
        mine, right = route_flops(CONFIG, route, 7), model.flops(torch.tensor(route), 7)
        assert mine == right, f"route {route}: {mine} FLOPs, model.flops counts {right}"


def test_what_torch_counts():
    """The model reads five tokens one by one, as in decoding, and torch counts its matrix products."""
    model = DuoGPT(CONFIG).init_weights(torch.Generator().manual_seed(1))
    cache, idx = KVCache(CONFIG, 1, "cpu", torch.float32), torch.tensor([[3, 1, 4, 1, 5]])
    routes = [[BIG, SMALL, BIG], [SKIP, BIG, SMALL], [SKIP] * 3, [SMALL] * 3, [BIG, SKIP, SMALL]]
    for t, route in enumerate(routes):
        # The counter sees the products of the plain attention, not those inside the fused one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(idx[:, t:t + 1], torch.tensor(route), cache=cache)
        mine, counted = route_flops(CONFIG, route, t + 1), counter.get_total_flops()
        assert mine == counted, f"token {t} with route {route} reads {t + 1} keys: {mine} FLOPs, torch counts {counted}"
