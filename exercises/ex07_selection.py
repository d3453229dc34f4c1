"""Exercise 7: how much of a gain is selection?

Task. Whoever takes the best of N routes gains even where all routes are equally good and only luck differs: the least
of N noisy numbers lies below their mean. Fill in expected_minimum (the least of n standard normal numbers, in the
mean), predicted_curve (what the best of n routes reaches if each token's losses are Gaussian) and selection_share
(which part of a gain is gone when other luck decides).

Why. The oracle gains half a nat by choosing among 924 routes. Before you ask how a router could get that, ask how much
of it would be there if no route were better than another.

Read first: least_of in oracle.py, and `curve` in its first docstring: the same curve without assuming a Gaussian.

Hint: the least of n lies above x if all n do, so its density is n phi(x) (1 - Phi(x))^(n - 1). For its mean a sum over
a fine grid is good enough; math.erfc gives Phi.
"""
import numpy as np
import torch

from model import BIG, SMALL, DuoConfig, DuoGPT
from oracle import least_of
from search import Patterns, make_tree


def expected_minimum(n):
    """The mean of the least of n independent standard normal numbers -> a number <= 0.

    By hand: n = 1: 0. n = 2: the least of a and b is (a + b - |a - b|) / 2, so its mean is -1 / sqrt(pi) = -0.564.
    """
    raise NotImplementedError("exercise 7: fill in expected_minimum")


def predicted_curve(losses, sizes):
    """losses [P, N]: of each of P routes for each of N tokens; sizes: a list of n -> list of numbers: the mean over
    tokens of the least loss of n routes, if each token's losses were Gaussian, with that token's mean and spread.

    By hand: two tokens, three routes, losses 1, 2, 3 and 11, 12, 13; their spread is 1 each (not 5.5: that the second
    token is harder is no luck of a route). sizes [1, 2]: 7 and 7 - 0.564.
    """
    raise NotImplementedError("exercise 7: fill in predicted_curve")


def selection_share(chooser, judge):
    """chooser, judge [P, N]: the same routes and tokens measured twice, with independent noise. For each token the
    route is chosen by `chooser`. Gains are over the mean route, in the mean over tokens -> (the gain as the chooser
    sees it, the gain of the same choices as the judge sees it, the share of the first that is selection).

    By hand: one token, chooser 1, 3 and judge 5, 5: route 0 is chosen, gains 1 and 0, share 1.
    """
    raise NotImplementedError("exercise 7: fill in selection_share")


# ---------------------------------------------------------------------------------------------------------------------
# the check

def exact_curve(losses, sizes):
    """What oracle.py computes: the mean over all ways to draw n of the P routes."""
    ordered = torch.as_tensor(np.array(losses)).double().sort(0).values  # [P, N]
    return (least_of(len(ordered), sizes) @ ordered).mean(1).tolist()


def noise(seed, P=495, N=400):
    """Losses [P, N] of routes that differ by luck alone (0.3 nats), for tokens of very different difficulty."""
    rng = np.random.default_rng(seed)
    return np.random.default_rng(0).gamma(2, 2, N) + 0.3 * rng.standard_normal((P, N))


def test_the_least_of_n():
    rng = np.random.default_rng(1)
    for n, times in ((1, 200_000), (2, 200_000), (3, 200_000), (10, 100_000), (4096, 4000)):  # 12 layers: 4096 routes
        got = float(expected_minimum(n))
        seen = rng.standard_normal((times, n), np.float32).min(1).mean()
        assert abs(got - seen) < 0.015, (
            f"n={n}: you say {got:.3f}; drawn {times} times, the least of {n} is {seen:.3f} in the mean. "
            "(-sqrt(2 log n) is where it tends to, very slowly.)")


def test_the_curve_is_predicted():
    sizes, losses = [1, 4, 32, 256], noise(1)
    for n, got, exact in zip(sizes, predicted_curve(losses, sizes), exact_curve(losses, sizes), strict=True):
        pooled = losses.mean() + losses.std() * float(expected_minimum(n))
        hint = ("; a spread over tokens and routes together mixes in how hard tokens are: take each token's own"
                if n > 1 and abs(got - pooled) < 0.05 else "")
        assert abs(got - exact) < 0.02, f"pure luck, best of {n}: you predict {got:.3f}, it is {exact:.3f}{hint}"
    # And on a model: few routes, no Gaussian, so only the first steps of the curve can be met, and only roughly.
    model = DuoGPT(DuoConfig(n_layer=8, n_head=2, n_embd=16, block_size=12, vocab_size=40))
    model.init_weights(torch.Generator().manual_seed(1)).requires_grad_(False)
    for block in model.blocks:
        block.big.down.weight.mul_(10)  # so that choices matter
    text = torch.randint(40, (16, 13), generator=torch.Generator().manual_seed(2))
    losses = Patterns(model, text[:, :-1], text[:, 1:]).leaf_losses(make_tree(model, (SMALL, BIG), (4, None), 64))
    losses = losses[..., 0].double().numpy()  # [70, 16 * 12], the routes with 4 BIG of 8
    (first, *_), gains = exact_curve(losses, [1]), []
    for n in (2, 8):
        gains.append([first - value[0] for value in (predicted_curve(losses, [n]), exact_curve(losses, [n]))])
        assert 0.85 < gains[-1][0] / gains[-1][1] < 1.2, (
            f"a model's routes, best of {n}: you predict a gain of {gains[-1][0]:.4f}, it is {gains[-1][1]:.4f}")


def test_the_share_of_selection():
    quality = 0.4 * np.random.default_rng(3).standard_normal((495, 400))  # routes that really differ, token by token
    lucks = [x - x.mean(0) for x in (noise(1), noise(2))]  # two measurements, independent of each other
    for real, luck, share in ((0, 1, 1.0), (1, 0, 0.0), (1, 1, 0.3 ** 2 / (0.3 ** 2 + 0.4 ** 2))):
        chooser, judge = (3 + real * quality + luck * x for x in lucks)
        seen, kept, got = map(float, selection_share(chooser, judge))
        best = chooser.mean(0) - chooser.min(0)
        assert abs(seen - best.mean()) < 1e-6, (
            f"the chooser sees mean - min of each token, {best.mean():.3f} in the mean; you say {seen:.3f}")
        choice = chooser.argmin(0)
        judged = judge.mean() - np.mean([judge[route, token] for token, route in enumerate(choice)])
        assert abs(kept - judged) < 1e-6, (
            f"judged anew, the chosen routes gain {judged:.3f}; you say {kept:.3f}"
            + ("; that is the judge's own best route, chosen by the luck that judges it"
               if abs(kept - (judge.mean(0) - judge.min(0)).mean()) < 1e-6 else ""))
        assert abs(got - share) < 0.05, f"quality {real}, luck {luck}: the share is {share:.2f}, you say {got:.2f}"
