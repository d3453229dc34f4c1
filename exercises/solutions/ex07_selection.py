import math

import numpy as np


def expected_minimum(n):
    x = np.linspace(-10, 10, 20001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    above = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in x])  # 1 - Phi(x)
    return float((x * n * density * above ** (n - 1)).sum() * (x[1] - x[0]))


def predicted_curve(losses, sizes):
    # Mean and spread of each token over its routes. The minimum is linear in both, so their means over tokens will do.
    mean, spread = losses.mean(0).mean(), losses.std(0, ddof=1).mean()
    return [mean + spread * expected_minimum(n) for n in sizes]


def selection_share(chooser, judge):
    choice = chooser.argmin(0)
    tokens = np.arange(chooser.shape[1])
    # One choice, judged twice: by the luck that made it, and by luck that had no part in it.
    seen, kept = (float((x.mean(0) - x[choice, tokens]).mean()) for x in (chooser, judge))
    return seen, kept, 1 - kept / seen
