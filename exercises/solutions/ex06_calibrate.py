from model import BIG
from router import choose


def big_per_token(model, router, idx, shift):
    router.shift[BIG] = shift
    routes, _ = choose(model, router, idx)  # hard choices [S, T, L]; the model runs, since choices depend on choices
    return (routes == BIG).sum(-1).float().mean().item()


def calibrate(model, router, idx, n_big, tolerance=0.02):
    # A bracket: low spends too little, high too much. Steps double, for nobody knows how large the logits are.
    low, high = -1.0, 1.0
    while big_per_token(model, router, idx, low) > n_big:
        low *= 2
    while big_per_token(model, router, idx, high) < n_big:
        high *= 2
    while True:
        middle = (low + high) / 2
        spent = big_per_token(model, router, idx, middle)  # also leaves the router with this shift
        if abs(spent - n_big) <= tolerance:
            return middle
        low, high = (low, middle) if spent > n_big else (middle, high)
