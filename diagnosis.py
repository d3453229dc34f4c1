"""What do a router's choices depend on? OpenMoE's questions (arXiv 2402.01739, section 4), in numpy, for any routes.

Asked of a router's file or the oracle's: how much of each layer's choices does the token id tell, the domain, the
position (mutual information)? How much do layers know of each other? How many BIG does a token get, and is that more
uneven than chance? All entropies are in nats.

An example by hand. A layer gives BIG to the token "the" always, to others never, and one token in four is "the". Its
entropy is H = 0.562; the id tells all of it, I = H, so I / H is 1. Of the domain it may tell nothing: I / H = 0.
"""
import numpy as np

import claims
from model import BIG, SKIP

SMOOTHING = (1, 10, 100)  # tokens' worth of "as the layer does on average" that each value's counts start from
PARTS = 8  # of the sequence, where something is shown against position


# ---------------------------------------------------------------------------------------------------------------------
# what choices depend on

def entropy(p):
    """p [..., n] -> -sum p log p [...], with 0 log 0 = 0"""
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def count(choices, x, n_values):
    """choices, x: integers of one shape -> how often each pair occurs [n_values, 3]"""
    return np.bincount(x.ravel().astype(np.int64) * 3 + choices.ravel(), minlength=3 * n_values).reshape(-1, 3)


def mutual_information(counts):
    """counts [..., n, 3] of pairs -> I = H(choice) - H(choice | x), and H(choice). As counted: where x has many values
    I is too high, by about (n - 1)(choices - 1) / 2N with N tokens, so that of shuffled x belongs beside it."""
    p = counts / counts.sum((-2, -1), keepdims=True)
    h = entropy(p.sum(-2))
    return h + entropy(p.sum(-1)) - entropy(p.reshape(*p.shape[:-2], -1)), h


def foretold(choices, x, n_values):
    """How many nats does knowing x save when a choice is predicted from other sequences' counts? Sequences are halved
    (even, odd); each half is predicted from the other's counts.

        saved(token) = log p(c | x) - log p(c),   p(c | x) = (n_xc + m p(c)) / (n_x + m),  the best m of SMOOTHING

    Its mean over tokens is I but for what too few counts cost: what cannot be told in advance is not counted, so this
    is not too high, needs no correction, and, being a mean over sequences, has a bootstrap interval.
    choices [S, T], x [S, T] -> saved [S], -log p(c) [S], both means over each sequence's tokens
    """
    saved, needed = np.zeros((len(SMOOTHING), len(choices))), np.zeros(len(choices))
    for half in (0, 1):
        others = count(choices[1 - half::2], x[1 - half::2], n_values)
        p = (others.sum(0) + 1 / 3) / (others.sum() + 1)  # a choice that the other half never made is not impossible
        c, value = choices[half::2], x[half::2]
        needed[half::2] = -np.log(p)[c].mean(-1)
        for i, m in enumerate(SMOOTHING):
            given = (others + m * p) / (others.sum(1, keepdims=True) + m)  # [n_values, 3]
            saved[i, half::2] = np.log(given)[value, c].mean(-1) + needed[half::2]
    return saved[saved.mean(1).argmax()], needed


def share(saved, needed):
    """saved, needed [S, L] -> the share of uncertainty that is saved: of all layers but the first, with its interval;
    [L] per layer. The first reads the embedding alone, so there the id tells all, by construction. A layer that chooses
    alike for all tokens has nothing to tell: nan there, and no weight in the whole."""
    columns = np.stack((saved[:, 1:].sum(1), needed[:, 1:].sum(1)), 1)
    layers = np.where(needed.mean(0) > 1e-3, saved.mean(0) / np.maximum(needed.mean(0), 1e-3), np.nan)
    return claims.interval(columns, lambda m: m[..., 0] / np.maximum(m[..., 1], 1e-9)), layers


def dependence(routes, idx, domain, vocab_size, seed=0):
    """routes [S, T, L], idx [S, T], domain [S] -> {variable: {"saved", "needed" [S, L]: see foretold; "information"
    [L]: I / H as counted; "shuffled" [L]: the same where x is shuffled over all tokens}} for variable in token id,
    domain, position."""
    (S, T, L), rng, found = routes.shape, np.random.default_rng(seed), {}
    variables = {"token id": (idx, vocab_size), "domain": (np.repeat(domain[:, None], T, 1), domain.max() + 1),
                 "position": (np.broadcast_to(np.arange(T), (S, T)), T)}
    for variable, (x, n) in variables.items():
        shuffled = rng.permutation(x.ravel()).reshape(x.shape)
        told = np.stack([foretold(routes[..., layer], x, n) for layer in range(L)], -1)  # [2, S, L]
        normal = []
        for values in (x, shuffled):
            information, h = mutual_information(np.stack([count(routes[..., layer], values, n) for layer in range(L)]))
            normal.append(np.where(h > 1e-3, information / np.maximum(h, 1e-3), np.nan))
        found[variable] = {"saved": told[0], "needed": told[1], "information": normal[0], "shuffled": normal[1]}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# layers with each other, and the number of BIG per token: functions of P(BIG in layers l and m), a mean over sequences

def pairs(routes):
    """routes [S, T, L] -> per sequence the share of tokens with BIG in both layers l and m [S, L * L] (l = m: in l)"""
    big = (routes == BIG).astype(np.float32)
    return (big.transpose(0, 2, 1) @ big / routes.shape[1]).reshape(len(big), -1).astype(np.float64)


def cross_layer(p):
    """p [..., L * L], see pairs -> mutual information of each two layers' choices of BIG [..., L, L], nats"""
    L = round(p.shape[-1] ** 0.5)
    both = p.reshape(*p.shape[:-1], L, L)
    one = np.diagonal(both, axis1=-2, axis2=-1)
    a, b = np.broadcast_arrays(one[..., :, None], one[..., None, :])
    joint = np.stack((both, a - both, b - both, 1 - a - b + both), -1).clip(0)
    return (entropy(np.stack((a, 1 - a), -1)) + entropy(np.stack((b, 1 - b), -1)) - entropy(joint)).clip(0)


def mean_cross_layer(p):
    """-> the mean of that over all pairs of different layers [...], nats"""
    L = round(p.shape[-1] ** 0.5)
    return cross_layer(p)[..., *np.triu_indices(L, 1)].mean(-1)


def spread(p):
    """p [..., L * L] -> standard deviation over tokens of the number of BIG [...], and what it would be were the
    layers' choices independent. Above 1, their ratio says that some tokens get more in many layers."""
    L = round(p.shape[-1] ** 0.5)
    both = p.reshape(*p.shape[:-1], L, L)
    one = np.diagonal(both, axis1=-2, axis2=-1)
    variance = both.sum((-2, -1)) - one.sum(-1) ** 2  # sum over l, m of P(l and m) - P(l) P(m)
    return np.sqrt(variance.clip(0)), np.sqrt((one * (1 - one)).sum(-1))


# ---------------------------------------------------------------------------------------------------------------------
# early learning, and drop towards the end

def agreement(routes, final):
    """-> share of choices that are the final ones already; and what two routers would agree by chance that use each
    choice in each layer as often as these two do. routes, final [S, T, L]"""
    def usage(which):
        return np.stack([(which == c).mean((0, 1)) for c in range(SKIP, BIG + 1)])  # [3, L]
    return float((routes == final).mean()), float((usage(routes) * usage(final)).sum(0).mean())


def by_position(values):
    """values [S, T] -> means over eighths of the sequence [S, 8]"""
    return np.stack([part.mean(1) for part in np.array_split(values, PARTS, axis=1)], 1)
