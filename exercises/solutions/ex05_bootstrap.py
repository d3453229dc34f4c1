import numpy as np

RESAMPLES = 2000


def perplexity(losses):
    return float(np.exp(losses.mean()))  # the mean first: perplexity is the inverse probability's geometric mean


def bits_per_byte(losses, n_bytes):
    return float(losses.sum() / np.log(2) / n_bytes.sum())


def paired_interval(a, b, rng):
    S = len(a)
    draws = rng.integers(S, size=(RESAMPLES, S))  # for both alike, so that the sequences' difficulty cancels
    a, b = a.mean(1), b.mean(1)  # [S]: a sequence is drawn with all its tokens, which are not independent
    means = (a[draws] - b[draws]).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def unpaired_interval(a, b, rng):
    S = len(a)
    a, b = a.mean(1), b.mean(1)
    means = a[rng.integers(S, size=(RESAMPLES, S))].mean(1) - b[rng.integers(S, size=(RESAMPLES, S))].mean(1)
    return tuple(np.percentile(means, [2.5, 97.5]))
