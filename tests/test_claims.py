"""claims.py: intervals, verdicts and each of the paper's claims on numbers whose answer is known; the tables on small
files written here."""
import itertools
import json
import math

import numpy as np
import pytest

import claims
from model import BIG, SKIP, SMALL

NAN = float("nan")


def rng(*seed):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------------------------------------------------------
# intervals

def test_interval_covers_the_mean():
    """95% of the intervals hold the true mean; a little fewer at 30 sequences."""
    inside = 0
    for i in range(200):
        estimate, low, high = claims.interval(rng(i).normal(3, 2, 30))
        inside += low < 3 < high
        assert low < estimate < high
    assert 0.9 <= inside / 200 <= 0.98


def test_interval_is_as_wide_as_theory_says():
    values = rng(1).normal(3, 2, 400)
    estimate, low, high = claims.interval(values)
    half = 1.96 * values.std() / 20
    assert estimate == pytest.approx(values.mean())
    assert (estimate - low, high - estimate) == pytest.approx((half, half), rel=0.1)
    assert claims.interval(values) == claims.interval(values)  # the same resamples each time


def test_one_sequence_has_no_interval():
    estimate, low, high = claims.interval([2.5])
    assert estimate == 2.5 and math.isnan(low) and math.isnan(high)


def test_few_sequences_decide_nothing(monkeypatch):
    monkeypatch.setattr(claims, "FEW", 8)
    gain = np.linspace(1, 2, 8)
    assert claims.interval(gain)[1] > 1 and math.isnan(claims.interval(gain[:7])[1])
    for n, found in ((8, "holds"), (7, "undecided")):
        oracle = np.tile(np.abs(np.arange(13) - 6.0), (n, 1))  # best at k = 6
        assert claims.f2(gain[:n], np.zeros(n))["verdict"] == found
        assert claims.f3(oracle[:, 12], oracle)["verdict"] == found
        assert claims.f3(-oracle[:, 0], oracle[:, ::-1] * 0)["verdict"] == ("fails" if n == 8 else "undecided")
    assert claims.verdict([claims.interval([2.5])]) == "undecided"


def test_differences_are_paired():
    """Sequences differ by 5 nats, the policies by 0.1: a resample draws the same sequences for both."""
    a = rng(1).normal(0, 5, 50)
    both = np.stack((a + rng(2).normal(0.1, 0.01, 50), a), 1)
    estimate, low, high = claims.interval(both, lambda m: m[..., 0] - m[..., 1])
    assert 0.09 < low < estimate < high < 0.11
    assert (estimate, low, high) == pytest.approx(claims.interval(both[:, 0] - both[:, 1]), abs=1e-12)
    _, low, high = claims.interval(both[:, 0])
    assert high - low > 1


def test_ratio_of_means():
    """sum(x) / sum(y), and not the mean of x / y, with the width of the linear approximation"""
    y = rng(1).uniform(1, 9, 300)
    x = 0.5 * y + rng(2).normal(0, 0.5, 300)
    estimate, low, high = claims.interval(np.stack((x, y), 1), lambda m: m[..., 0] / m[..., 1])
    assert estimate == pytest.approx(x.sum() / y.sum())
    assert abs(estimate - (x / y).mean()) > 1e-4
    half = 1.96 * (x - estimate * y).std() / y.mean() / math.sqrt(300)
    assert (estimate - low, high - estimate) == pytest.approx((half, half), rel=0.1)


def test_bootstrap_means_are_those_of_resamples():
    values = rng(1).normal(size=(3, 2))
    means = claims.bootstrap_means(values)
    assert means.shape == (claims.RESAMPLES, 2)
    possible = {tuple(np.round(values[list(rows)].mean(0), 9)) for rows in itertools.product(range(3), repeat=3)}
    assert {tuple(row) for row in np.round(means, 9)} == possible  # all ten of them, and nothing else
    assert means.mean(0) == pytest.approx(values.mean(0), abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# verdicts

@pytest.mark.parametrize("parts, expected", [
    ([(1, 0.5, 2)], "holds"), ([(-1, -2, -0.5)], "fails"), ([(1, -0.5, 2)], "undecided"),
    ([(-1, -2, 0.5)], "undecided"),
    ([(1, 0.5, 2), (3, 1, 4)], "holds"), ([(1, 0.5, 2), (1, -1, 4)], "undecided"),
    ([(1, 0.5, 2), (-3, -4, -1)], "fails"), ([(1, -1, 2), (-3, -4, -1)], "fails"),
    ([(1, NAN, NAN)], "undecided"), ([(1, 0.5, 2), (1, NAN, NAN)], "undecided"), ([(1, 0.0, 2)], "undecided"),
])
def test_verdict(parts, expected):
    assert claims.verdict(parts) == expected


def test_above_and_below():
    assert claims.above((3, 1, 5), 2) == (1, -1, 3)
    assert claims.below((3, 1, 5), 2) == (-1, -3, 1)  # 2 - x: its low end comes from x's high one
    assert claims.below((0.25, 0.125, 0.5), 0.75) == (0.5, 0.25, 0.625)


def test_finding_shows_its_weakest_part():
    line = claims.finding("F0", "a claim", [(3, 2, 4), (1, 0.5, 2), (5, 1, 9)], "why")
    assert line == {"id": "F0", "claim": "a claim", "effect": 1, "ci": [0.5, 2], "unit": "nats", "verdict": "holds",
                    "detail": "why"}
    line = claims.finding("F0", "a claim", [(3, 2, 4), (1, 0.5, 2)], "why", (7, 6, 8))
    assert line["effect"] == 7 and line["ci"] == [6, 8]  # what says it better
    line = claims.finding("F0", "a claim", [(3, 2, 4), (-1, -2, -0.5)], "why", (7, 6, 8))
    assert line["verdict"] == "fails"  # the parts decide, whatever is shown
    assert claims.finding("F0", "a claim", [(3, NAN, NAN), (1, NAN, NAN)], "")["effect"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# the claims, each on data where it holds, fails, and cannot be told

def noisy(mean, S=40, std=0.05, seed=1):
    """Losses per sequence around `mean` (a number, or one per budget), with a part that all policies share"""
    mean = np.asarray(mean, float)
    shared = rng(99).normal(0, 1, (S, *[1] * mean.ndim))
    return mean + shared + rng(seed).normal(0, std, (S, *mean.shape))


@pytest.mark.parametrize("best100, oracle, expected", [
    (2.9, 2.0, "holds"),  # gains over random (3.0): 0.1, and ten times that
    (2.9, 2.95, "fails"),  # not even below the best of 100
    (2.5, 2.0, "fails"),  # below it, but 1.0 is less than three times 0.5
    (3.1, 3.2, "fails"),  # more than three times (what is lost), but not below
    (2.667, 2.0, "undecided"),  # three times, just about
])
def test_f1(best100, oracle, expected):
    ks = 9
    line = claims.f1(noisy([3.0] * ks, seed=1), noisy([best100] * ks, seed=2), noisy([oracle] * ks, seed=3))
    assert line["verdict"] == expected and line["id"] == "F1"
    weakest = min(best100 - oracle, 3 - oracle - 3 * (3 - best100))
    assert line["effect"] == pytest.approx(weakest, abs=0.15) and line["ci"][0] < line["effect"] < line["ci"][1]
    assert [row["k"] for row in line["detail"]] == list(range(2, 11))
    for row in line["detail"]:
        assert row["best100_minus_oracle"][0] == pytest.approx(best100 - oracle, abs=0.05)
        assert row["gain_minus_3_best100_gains"][0] == pytest.approx(3 - oracle - 3 * (3 - best100), abs=0.15)


def test_f1_needs_every_k():
    random, best100 = noisy([3.0] * 9, seed=1), noisy([2.9] * 9, seed=2)
    line = claims.f1(random, best100, noisy([2.0] * 8 + [2.95], seed=3))
    assert line["verdict"] == "fails"
    assert line["effect"] == pytest.approx(0.05 - 3 * 0.1, abs=0.1)  # that k is the one shown


@pytest.mark.parametrize("oracle1, expected", [(2.8, "holds"), (3.2, "fails"), (3.0, "undecided")])
def test_f2(oracle1, expected):
    line = claims.f2(noisy(3.0, seed=5), noisy(oracle1, seed=4))
    assert line["verdict"] == expected
    assert line["effect"] == pytest.approx(3 - oracle1, abs=0.03)
    assert line["ci"][0] < line["effect"] < line["ci"][1]


CURVE = [3 + 0.03 * (k - 6) ** 2 for k in range(13)]  # least at k = 6


@pytest.mark.parametrize("all_big, oracle, expected, best_k", [
    (3.5, CURVE, "holds", 6),
    (2.5, CURVE, "fails", 6),  # all-big is better
    (3.5, [3 + 0.03 * (k - 2) ** 2 for k in range(13)], "fails", 2),  # turns elsewhere
    (3.9, [3 + 0.03 * (k - 4.5) ** 2 for k in range(13)], "undecided", None),  # at 4, or at 5
    (3.0, CURVE, "undecided", 6),
])
def test_f3(all_big, oracle, expected, best_k):
    line = claims.f3(noisy(all_big, seed=3), noisy(oracle, seed=2))
    assert line["verdict"] == expected
    assert line["effect"] == pytest.approx(all_big - oracle[6], abs=0.05)
    detail = line["detail"]
    assert detail["best_k"] in ([best_k] if best_k else [4, 5])
    counts = np.array(detail["best_k_resampled"])
    assert counts.sum() == claims.RESAMPLES
    assert detail["share_of_resamples_in_5_to_7"] == pytest.approx(counts[5:8].sum() / claims.RESAMPLES)


def f3_of_one_sequence(best_k):
    return claims.f3(np.array([9.0]), np.array([[abs(k - best_k) / 10 for k in range(13)]]))["verdict"]


def test_f3_of_one_sequence_does_not_hold():
    assert f3_of_one_sequence(6) == "undecided"


def test_f3_of_one_sequence_does_not_fail():
    assert f3_of_one_sequence(2) == "undecided"


def choices(share, T=24, S=30, L=12, seed=1):
    """BIG with probability share[l] in layer l -> per sequence [S, L], as find_claims averages them"""
    return (rng(seed).random((S, T, L)) < np.asarray(share)).mean(1)


LATE, EVEN, EARLY = np.linspace(0.1, 0.6, 12), np.full(12, 0.5), np.linspace(0.8, 0.5, 12)


@pytest.mark.parametrize("four, six, eight, expected", [
    (LATE, EVEN, EARLY, "holds"), (LATE[::-1], EVEN, EARLY, "fails"), (LATE, EVEN, EARLY[::-1], "fails"),
    (LATE, LATE, EARLY, "fails"), (LATE, EARLY, EARLY, "fails"), (EVEN, EVEN, EARLY, "undecided"),
    (LATE, EVEN, EVEN, "undecided"), (LATE, np.linspace(0.45, 0.55, 12), EARLY, "undecided"),  # on the bound, 0.52
])
def test_f6(four, six, eight, expected):
    line = claims.f6({4: choices(four), 6: choices(six, T=200, seed=2), 8: choices(eight, seed=3)})
    assert line["verdict"] == expected
    assert set(line["detail"]) == {"centre_of_mass_k4", "centre_of_mass_k6", "centre_of_mass_k8"}
    true = {k: (share * np.arange(12)).sum() / 11 / share.sum() for k, share in ((4, four), (6, six), (8, eight))}
    for k, centre in true.items():
        assert line["detail"][f"centre_of_mass_k{k}"][0] == pytest.approx(centre, abs=0.02)
    weakest = min(true[4] - 0.5, true[6] - 0.48, 0.52 - true[6], 0.5 - true[8])
    assert line["effect"] == pytest.approx(weakest, abs=0.02)  # it is one of the four conditions that is shown
    assert line["ci"][0] < line["effect"] < line["ci"][1]


def test_centre_of_mass_by_hand():
    assert claims.centre_of_mass(np.array([1, 0, 0, 0])) == 0
    assert claims.centre_of_mass(np.array([0, 0, 0, 1])) == 1
    assert claims.centre_of_mass(np.array([1, 1, 1, 1])) == 0.5
    assert claims.centre_of_mass(np.array([[0, 1, 0, 1], [1, 1, 0, 0]])).tolist() == pytest.approx([4 / 6, 1 / 6])
    # A ratio of means, weighed by the number of BIG: not the mean of the two above.
    both = np.array([[0, 0, 0, 1], [1, 1, 1, 0]])
    assert claims.centre_of_mass(both.mean(0)) == pytest.approx((3 + 0 + 1 + 2) / (3 * 4))


@pytest.mark.parametrize("last, expected", [(5.5, "holds"), (6.5, "fails"), (6.0, "undecided")])
def test_f8(last, expected):
    line = claims.f8(noisy(6.0, seed=3), noisy(last, seed=2))
    assert line["verdict"] == expected and line["id"].startswith("F8")
    assert line["effect"] == pytest.approx(6 - last, abs=0.05)


@pytest.mark.parametrize("down, up, expected", [
    (2.2, 2.3, "holds"), (1.8, 2.3, "fails"), (2.2, 1.8, "fails"), (2.0, 2.3, "undecided"), (2.2, 2.0, "undecided")])
def test_f9(down, up, expected):
    line = claims.f9(noisy(2.0, seed=8), noisy(down, seed=2), noisy(up, seed=5))
    assert line["verdict"] == expected
    assert line["detail"]["oracle(6->2) - oracle(4)"][0] == pytest.approx(down - 2, abs=0.05)
    assert line["detail"]["oracle(2->6) - oracle(4)"][0] == pytest.approx(up - 2, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# F10: runs of skips

def test_together_by_hand():
    skip = np.array([[[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]], bool)  # one sequence, two chains of six
    pairs, followed, permuted, expected_followed = claims.together(skip)[0]
    assert pairs == 3 and followed == 4
    assert permuted == pytest.approx(5 * (5 * 4) / (6 * 5)) and expected_followed == pytest.approx(5 / 6 * 6)


def test_together_equals_permuting():
    """The last two columns are the means of the first two over permutations of each chain."""
    skip = rng(1).random((3, 4, 7)) < rng(2).random((3, 4, 1))
    found, generator = claims.together(skip), rng(3)
    permuted = np.mean([claims.together(generator.permuted(skip, axis=2))[:, :2] for _ in range(4000)], 0)
    np.testing.assert_allclose(found[:, 2:], permuted, atol=0.12)  # standard deviation 0.02
    for row, chains in zip(found, skip, strict=True):  # and the first two, one by one
        pairs = sum(bool(c[i] and c[i + 1]) for c in chains for i in range(6))
        assert row[:2].tolist() == [pairs, sum(bool(c[i]) for c in chains for i in range(6))]


def independent(S=30, T=20, L=12, n=6, seed=1):
    """Six skips of twelve, any six -> [S, T, L]"""
    return rng(seed).random((S, T, L)).argsort(-1) < n


def runs(start_of, S=30, T=20, L=12, n=6, seed=1):
    """Six skips in a row, from start_of(S, T) on, which wrap around"""
    start = start_of(rng(seed), (S, T))
    return (np.arange(L) - start[..., None]) % L < n


def sticky(skip):
    """Every other position copies the one before it: over positions, skips attract skips."""
    return np.repeat(skip, 2, axis=1)


@pytest.mark.parametrize("skip, expected", [
    (sticky(runs(lambda g, size: g.integers(0, 6, size))), "holds"),  # in a row, never the last six
    (sticky(runs(lambda g, size: np.full(size, 6))), "fails"),  # the last six: early exit
    (sticky(runs(lambda g, size: g.integers(0, 7, size))), "fails"),  # one in seven of them
    (sticky(independent()), "undecided"),  # over depth it makes no difference
    (runs(lambda g, size: g.integers(0, 6, size)), "undecided"),  # nor over positions
    (sticky(np.tile(np.arange(12) % 2 == 0, (30, 20, 1)) ^ (rng(5).random((30, 20, 1)) < 0.5)), "fails"),  # they repel
])
def test_f10(skip, expected):
    assert (skip.sum(-1) == 6).all()
    line = claims.f10(skip)
    assert line["verdict"] == expected
    assert line["detail"]["never_skipped_to_always"] == skip.mean((0, 1)).round(3).tolist()


def test_suffix_share_by_hand():
    rows = ["000111", "001011", "111000", "000000", "111111", "000001", "100001", "010011"]  # 1: SKIP
    skip = np.array([[[c == "1" for c in row] for row in rows]] * 2)  # two sequences alike
    share, low, high = claims.f10(skip)["detail"]["share_that_skip_a_suffix"]
    assert share == low == high == 3 / 8  # 000111, 111111, 000001; no skip is no exit


def slow_f11(small, oracle):
    """Ranks by counting pairs, no weights -> Spearman's correlation, share"""
    loss, gap = small.ravel(), (small - oracle).ravel()
    u, v = ([((x < a).sum() + (x == a).sum() / 2) / len(x) for a in x] for x in (loss, gap))
    top = [b for a, b in zip(u, v, strict=True) if a > 0.9]
    return np.corrcoef(u, v)[0, 1], sum(b < 0.5 for b in top) / len(top)


def test_f11_against_the_slow_way():
    """Also the intervals: a resample's ranks are those of a text in which its sequences stand as often as drawn."""
    small = rng(1).integers(0, 40, (6, 20)) / 2  # ties
    oracle = small - rng(2).integers(0, 5, small.shape) / 2
    line = claims.f11(small, oracle, resamples=50)
    detail = line["detail"]
    assert list(detail) == ["rank_correlation_of_loss_and_gap", "lower_half_by_gap_among_top_tenth_by_loss"]
    assert [part[0] for part in detail.values()] == pytest.approx(slow_f11(small, oracle))
    drawn = []
    for counts in np.random.default_rng(0).multinomial(6, [1 / 6] * 6, size=50):
        rows = np.repeat(np.arange(6), counts)
        drawn.append(slow_f11(small[rows], oracle[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    for i, key in enumerate(detail):
        assert detail[key][1:] == pytest.approx((low[i], high[i]))


@pytest.mark.parametrize("gap, expected", [
    (lambda small, g: g.uniform(0, 1, small.shape), "holds"),  # independent: half of the hard ones lie low
    (lambda small, g: small * 0.3, "fails"),  # the same order
    (lambda small, g: np.where(small > 5.4, 0, small), "holds"),  # what is hardest stays hard
    (lambda small, g: small * (1 + g.normal(0, 1e-3, small.shape)), "fails"),
    # of 100 positions the first ten are the hardest: one of them lies low, 10%, which is the bound
    (lambda small, g: np.where((np.arange(100) == 0) | (g.random(small.shape) < 0.003), 0, g.uniform(0.6, 1, (40, 100)))
     * np.where(np.arange(100) < 10, 1, 0.5), "undecided"),
])
def test_f11(gap, expected):
    small = rng(1).uniform(0, 6, (40, 100))
    small[:, :10] = rng(3).uniform(6, 7, (40, 10))
    line = claims.f11(small, small - gap(small, rng(2)), resamples=200)
    assert line["id"] == "F11" and line["verdict"] == expected


def test_f11_of_one_sequence_is_undecided():
    small = rng(1).uniform(0, 6, (1, 100))
    line = claims.f11(small, small - rng(2).uniform(0, 1, small.shape))
    assert line["verdict"] == "undecided" and math.isnan(line["ci"][0])


@pytest.mark.parametrize("dense, freeze, expected", [
    (0.0, 0.2, "holds"), (-0.03, 0.2, "holds"),  # all-big is 0.03 worse
    (-0.2, 0.2, "fails"), (0.0, -0.2, "fails"), (-0.05, 0.2, "undecided"), (0.0, 0.0, "undecided"),
    (0.0, None, "undecided"), (-0.2, None, "fails"), (None, 0.2, "undecided"), (None, -0.2, "fails"),
])
def test_f12(dense, freeze, expected):
    base, g = rng(1).normal(3, 1, 50), rng(2)
    line = claims.f12(base + g.normal(0, 0.01, 50), None if dense is None else base + dense, base + 0.1,
                      None if freeze is None else base + 0.1 + freeze + g.normal(0, 0.01, 50))
    assert line["verdict"] == expected and line["id"] == "F12"
    assert ("all_big_minus_dense" in line["detail"]) == (dense is not None)
    if dense is not None:
        assert line["detail"]["all_big_minus_dense"][0] == pytest.approx(-dense, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# which sequences

def test_shared():
    large = {"idx": np.arange(40).reshape(10, 4)}
    assert claims.shared({"idx": large["idx"][[7, 0, 3]]}, large).tolist() == [7, 0, 3]
    assert claims.shared(large, large).tolist() == list(range(10))
    assert claims.shared({"idx": np.concatenate((large["idx"][:2], [[1, 2, 3, 5]]))}, large) is None


def test_by_domain():
    arrays = {"domain": np.array([0, 0, 1]), "domains": np.array(["code", "prose"])}
    parts = claims.by_domain(arrays)
    assert [(name, here.tolist()) for name, here in parts] == [
        ("code", [True, True, False]), ("prose", [False, False, True]), ("all", [True, True, True])]
    one = {"domain": np.zeros(2, int), "domains": np.array(["text"])}
    assert [name for name, _ in claims.by_domain(one)] == ["text"]


# ---------------------------------------------------------------------------------------------------------------------
# small files

L, T = 4, 8
PATTERNS = np.array(list(itertools.product((SMALL, BIG), repeat=L)), np.uint8)
K_OF = (PATTERNS == BIG).sum(1)


def patterns_file(S=6, seed=1, hundred=3):
    """As oracle.py's patterns.npz; `hundred` are at most three here."""
    g = rng(seed)
    drawn = [g.permutation((k == K_OF).nonzero()[0])[:hundred] for k in range(L + 1)]
    return {"patterns": PATTERNS, "means": g.normal(3, 1, (len(PATTERNS), S)).astype(np.float32),
            "idx": g.integers(0, 1000, (S, T)), "domain": np.repeat([0, 1], [S // 2, S - S // 2]),
            "domains": np.array(["code", "prose"]), "chosen": np.zeros((2, L + 1), int),
            "fixed": g.normal(3, 1, (L + 1, S, T)).astype(np.float32), "per_token": g.normal(2, 1, (L + 1, S)),
            "hundred": np.array([np.pad(ids, (0, hundred - len(ids)), constant_values=-1) for ids in drawn]),
            "curve": g.normal(2, 1, (L + 1, S, 3)), "curve_n": np.array([1, 2, 4]), "checkpoint": "now"}


def test_baseline_losses():
    for seed in range(5):
        p = patterns_file(seed=seed)
        found, S = claims.baseline_losses(p), len(p["idx"])
        assert set(found) == {"random", "best100_data_set", "best100_sequence", "best100_token", "fixed"}
        for k in range(L + 1):
            ids = [i for i in p["hundred"][k] if i >= 0]
            for s in range(S):
                every = [p["means"][i][s] for i in range(len(PATTERNS)) if list(PATTERNS[i]).count(BIG) == k]
                assert found["random"][k, s] == pytest.approx(sum(every) / len(every))
                assert found["best100_sequence"][k, s] == min(p["means"][i][s] for i in ids)
                # One pattern for the sequence's domain: the least sum over its sequences.
                mates = [j for j in range(S) if p["domain"][j] == p["domain"][s]]
                _, best = min((sum(float(p["means"][i][j]) for j in mates), i) for i in ids)
                assert found["best100_data_set"][k, s] == p["means"][best][s]
                assert found["best100_token"][k, s] == p["per_token"][k][s]
                assert found["fixed"][k, s] == pytest.approx(p["fixed"][k][s].mean())


def search_file(labels, patterns, rows=None, seed=1, mean=2.0, choices="sb", context="sequential", **changes):
    """As oracle.py's npz of one search, on some of the sequences of patterns_file()"""
    g, rows = rng(seed), np.arange(len(patterns["idx"])) if rows is None else np.array(rows)
    letters = {"x": SKIP, "s": SMALL, "b": BIG}
    routes = g.choice([letters[c] for c in choices], (len(labels), len(rows), T, L)).astype(np.uint8)
    arrays = {"idx": patterns["idx"][rows], "domain": patterns["domain"][rows], "domains": patterns["domains"],
              "labels": np.array(labels), "budgets": np.array([int(k) if k.isdigit() else -1 for k in labels]),
              "routes": routes, "losses": g.normal(mean, 0.5, (len(labels), len(rows), T)).astype(np.float32),
              "context": context, "choices": choices, "checkpoint": "now"}
    arrays["notes"] = json.dumps({
        "job": {"choices": choices, "context": context}, "command": f"python oracle.py --context={context}",
        "seconds": 1.0, "flops_per_token": 1e6, "agreement_with_float32": 0.99,
        "largest_difference_from_forward": 1e-6, "peak_memory_gb": None})
    return arrays | changes


def test_job_table():
    p = patterns_file()
    arrays = search_file(["any", "/1", "2"], p, choices="xsb")
    rows = claims.job_table(arrays)
    assert [(row["budget"], row["domain"]) for row in rows] == list(
        itertools.product(("any", "/1", "2"), ("code", "prose", "all")))
    for row in rows:
        i = ["any", "/1", "2"].index(row["budget"])
        here = {"code": p["domain"] == 0, "prose": p["domain"] == 1, "all": p["domain"] >= 0}[row["domain"]]
        losses, routes = arrays["losses"][i][here].astype(float), arrays["routes"][i][here].tolist()
        assert row["loss"] == pytest.approx(losses.mean())
        assert row["perplexity"] == pytest.approx(math.exp(losses.mean()))
        assert (row["loss"], *row["ci"]) == pytest.approx(claims.interval(losses.mean(-1)))
        assert row["sequences"] == len(losses)
        for name, choice in (("big", BIG), ("skip", SKIP)):
            counts = [token.count(choice) for sequence in routes for token in sequence]
            assert row[name] == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize("has_split", [True, False])
def test_control_table(has_split):
    p = patterns_file(S=8)
    label, seen = search_file(["any", "1", "2", "3"], p, [1, 5, 2, 0, 6], mean=1.5), [6, 1, 2, 5]  # the controls saw
    expected, split = (search_file(["3", "1"], p, seen, seed) for seed in (2, 3))  # fewer sequences, in another order
    rows = claims.control_table(label, expected, split if has_split else {}, p)
    assert {(row["k"], row["domain"]) for row in rows} == set(itertools.product((1, 3), ("all", "code", "prose")))
    assert len(rows) == 6
    for row in rows:
        k, here = row["k"], [i for i in range(4) if row["domain"] in ("all", ("code", "prose")[p["domain"][seen[i]]])]
        means = {"fixed": p["fixed"][k][[seen[i] for i in here]].mean(),
                 "label": label["losses"][k][[[1, 5, 2, 0, 6].index(seen[i]) for i in here]].mean(),
                 "expected": expected["losses"][int(k == 1)][here].mean(),
                 "split": split["losses"][int(k == 1)][here].mean() if has_split else NAN}
        assert {name: row[name] for name in means} == pytest.approx(means, rel=1e-5, nan_ok=True)
        assert row["sequences"] == len(here)
        for name, a, b in (("gain", "fixed", "label"), ("foresight", "fixed", "expected"),
                           ("hindsight", "expected", "label"), ("learnable", "fixed", "split")):
            assert row[name][0] == pytest.approx(means[a] - means[b], abs=1e-5, nan_ok=True)
            assert row[name][1] <= row[name][0] <= row[name][2] or name == "learnable" and not has_split
        assert row["gain"][0] == pytest.approx(row["foresight"][0] + row["hindsight"][0], abs=1e-12)


def test_control_table_needs_the_same_sequences():
    p, other = patterns_file(), patterns_file(seed=9)
    label, expected, split = (search_file(["1"], p, seed=seed) for seed in (1, 2, 3))
    assert len(claims.control_table(label, expected, split, p)) == 3
    assert claims.control_table(label, search_file(["1"], other), split, p) == []
    assert claims.control_table(label, expected, split, other) == []
    assert claims.control_table(search_file(["1"], p, [0, 1, 2]), expected, split, p) == []


def test_split_may_be_in_another_order():
    p = patterns_file()
    label, expected, split = (search_file(["1"], p, seed=seed) for seed in (1, 2, 3))
    backwards = split | {name: split[name][::-1] for name in ("idx", "domain")} | {"losses": split["losses"][:, ::-1]}
    assert claims.control_table(label, expected, split, p) == claims.control_table(label, expected, backwards, p)


def test_split_of_other_budgets_says_nothing_of_these():
    p = patterns_file()
    label, expected, split = (search_file(labels, p, seed=seed)
                              for seed, labels in enumerate((["1", "2"], ["1", "2"], ["2"])))
    one, two = (row for row in claims.control_table(label, expected, split, p) if row["domain"] == "all")
    assert math.isnan(one["learnable"][0]) and not math.isnan(one["foresight"][0])
    assert two["learnable"][0] == pytest.approx(two["fixed"] - two["split"], abs=1e-5)


def test_control_table_leaves_out_what_is_no_plain_k():
    p = patterns_file()
    label = search_file(["any", "1", "2", "3-1", "2/1"], p)
    for name in ("3-1", "2/1", "any", "3"):
        assert {row["k"] for row in claims.control_table(label, search_file(["1", name], p), {}, p)} == {1}


# ---------------------------------------------------------------------------------------------------------------------
# findings

def deep_files(S=40, L=12, seed=1):
    """-> patterns.npz, a search's npz in which F1, F2, F3, F6, F8, F9 all hold, one over {big, skip} where F10 does"""
    g = rng(seed)
    patterns = np.array([[SMALL + (i >> b & 1) for b in range(L)] for i in range(2 ** L)], np.uint8)
    k_of = (patterns == BIG).sum(1)
    shared = g.normal(0, 0.3, S)
    p = {"patterns": patterns, "means": 3.0 + 0.02 * k_of[:, None] + shared + g.normal(0, 0.02, (len(patterns), S)),
         "idx": g.integers(0, 1000, (S, T)), "domain": np.zeros(S, int), "domains": np.array(["text"]),
         "hundred": np.array([np.pad((k_of == k).nonzero()[0][:100], (0, max(0, 100 - math.comb(L, k))),
                                     constant_values=-1) for k in range(L + 1)]),
         "fixed": 2.9 + shared[:, None] + g.normal(0, 0.02, (L + 1, S, T)), "per_token": np.full((L + 1, S), 2.5),
         "curve": np.zeros((L + 1, S, 1)), "curve_n": np.array([1]), "checkpoint": "now"}
    labels = ["any", *map(str, range(L + 1)), "6-2", "2-6"]
    means = [1.5, *[2 + 0.03 * (k - 6) ** 2 for k in range(L + 1)], 2.4, 2.4]
    means[2], means[13] = 2.6, 2.8  # k = 1 and k = 12, all-big
    shares = {"any": EVEN, "4": LATE, "6": EVEN, "8": EARLY}
    routes = np.stack([SMALL + (g.random((S, T, L)) < shares.get(name, EVEN)) for name in labels]).astype(np.uint8)
    routes[0, :, :T // 4] = BIG  # `any`: early positions take more
    losses = np.array(means)[:, None, None] + shared[:, None] + g.normal(0, 0.02, (len(labels), S, T))
    label = search_file(labels, p, routes=routes, losses=losses)
    skips = sticky(runs(lambda g, size: g.integers(0, 6, size), S=S, T=T // 2))
    skip = search_file(["6"], p, choices="xb", routes=np.where(skips, SKIP, BIG)[None].astype(np.uint8))
    return p, label, skip


def test_find_claims():
    p, label, skip = deep_files()
    found = {line["id"]: line for line in claims.find_claims(label, p, skip)}
    assert {name: line["verdict"] for name, line in found.items()} == dict.fromkeys(
        ("F1", "F2", "F3", "F6", "F8 (oracle)", "F9", "F10"), "holds")
    of = dict(zip(label["labels"].tolist(), label["losses"].mean((1, 2)), strict=True))
    base = {name: losses.mean(1) for name, losses in claims.baseline_losses(p).items()}
    for row in found["F1"]["detail"]:
        best100, oracle = base["best100_data_set"][row["k"]], of[str(row["k"])]
        assert row["best100_minus_oracle"][0] == pytest.approx(best100 - oracle)
        expected = 3 * best100 - oracle - 2 * base["random"][row["k"]]
        assert row["gain_minus_3_best100_gains"][0] == pytest.approx(expected)
    assert found["F2"]["effect"] == pytest.approx(of["12"] - of["1"])  # twelve of twelve: all-big
    assert found["F3"]["effect"] == pytest.approx(of["12"] - of["6"])
    assert {name: line["context"] for name, line in found.items()} == dict.fromkeys(found, "sequential")
    assert {line["command"] for line in found.values()} == {"python oracle.py --context=sequential"}
    assert found["F9"]["effect"] == pytest.approx(min(of["6-2"], of["2-6"]) - of["4"], abs=0.01)
    last = (label["routes"][0][:, -2:] == BIG).sum(-1).mean()
    assert found["F8 (oracle)"]["effect"] == pytest.approx(12 - last)  # in the first two of 8 all are BIG


def test_claims_that_lack_their_budgets_are_left_out():
    p, label, skip = deep_files(S=8)

    def ids(label, p, skip):
        return [line["id"] for line in claims.find_claims(label, p, skip)]

    def only(*labels):
        where = [list(label["labels"]).index(name) for name in labels]
        return label | {name: label[name][where] for name in ("labels", "budgets", "routes", "losses")}

    assert ids({}, {}, {}) == []
    assert ids(label, {}, {}) == ["F6", "F8 (oracle)", "F9"]  # no baselines
    assert ids(only("4", "6", "8"), p, {}) == ["F6"]
    assert ids(only("any", "4", "6-2"), p, {}) == ["F8 (oracle)"]
    assert ids(only(*map(str, range(13))), p, {}) == ["F1", "F2", "F3", "F6"]
    assert ids({}, p, skip) == ["F10"]
    assert ids({}, p, skip | {"labels": np.array(["4"])}) == []
    other = p | {"idx": p["idx"] + 1}  # the baselines saw other text
    assert ids(label, other, {}) == ["F6", "F8 (oracle)", "F9"]


# ---------------------------------------------------------------------------------------------------------------------
# oracle.json

ABOUT = {"fingerprint": "abc", "seed": 7}
QUALITY = [{"search": "greedy", "k": k, "gap": (0.1 * k, 0.0, 0.5), "work": 0.05, "loss": 2.0, "against": "exhaustive"}
           for k in (1, 2)]


def write(folder, **files):
    (folder / "oracle").mkdir(exist_ok=True)
    for name, arrays in files.items():
        np.savez(folder / "oracle" / f"{name}.npz", **arrays)


def test_load(tmp_path):
    write(tmp_path, some={"a": np.arange(3), "checkpoint": "now"})
    path = tmp_path / "oracle" / "some.npz"
    assert claims.load(path, "now")["a"].tolist() == [0, 1, 2]
    assert claims.load(path, "then") == {}
    assert claims.load(tmp_path / "none.npz", "now") == {}


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_report(context, tmp_path, monkeypatch):
    p, prefix = patterns_file(), f"sb_{context}_exhaustive"
    label = search_file(["any", "1", "2"], p, context=context)
    expected, split = (search_file(["1"], p, [0, 4, 5], seed, context=context) for seed in (2, 3))
    write(tmp_path, **{f"patterns_{context}": p, prefix: label, f"{prefix}_expected_1": expected,
                       f"{prefix}_split_1": split,
                       "xb_sequential_greedy": search_file(["1"], p, checkpoint="another", choices="xb")})
    result = claims.report(tmp_path, "now", QUALITY, ABOUT)
    saved = json.loads((tmp_path / "oracle.json").read_text())
    assert str(saved) == str(json.loads(json.dumps(result, default=float)))  # what is returned is what is written
    assert saved["checkpoint"] == "now" and saved["fingerprint"] == "abc" and saved["seed"] == 7
    # A file of another checkpoint is left out.
    assert set(saved["searches"]) == {prefix, f"{prefix}_expected_1", f"{prefix}_split_1"}
    assert saved["searches"][prefix]["rows"] == claims.without_nan(json.loads(json.dumps(claims.job_table(label))))
    assert saved["searches"][prefix]["flops_per_token"] == 1e6  # the notes are there
    losses = claims.baseline_losses(p)
    assert set(saved["baselines"]) == {context}
    assert [(row["k"], row["domain"]) for row in saved["baselines"][context]] == list(
        itertools.product(range(L + 1), ("code", "prose", "all")))
    for row in saved["baselines"][context]:
        here = {"code": p["domain"] == 0, "prose": p["domain"] == 1, "all": p["domain"] >= 0}[row["domain"]]
        assert row["sequences"] == here.sum()
        for policy, values in losses.items():
            assert row[policy] == pytest.approx(claims.interval(values[row["k"], here]))
    assert saved["curves"] == {context: {str(k): {
        str(n): pytest.approx(p["curve"][k, :, j].mean()) for j, n in enumerate((1, 2, 4))} for k in range(L + 1)}}
    assert set(saved["controls"]) == {context}
    table = json.loads(json.dumps(claims.control_table(label, expected, split, p), default=float))
    assert result["controls"][context] == claims.without_nan(table)
    assert {(row["k"], row["domain"], row["sequences"]) for row in saved["controls"][context]} == {
        (1, "code", 1), (1, "prose", 2), (1, "all", 3)}
    (line,) = saved["findings"]
    assert line["id"] == "F8 (oracle)" and line["context"] == context and line["seeds"] == [7]
    assert line["command"] == f"python oracle.py --context={context}"
    assert saved["quality"] == json.loads(json.dumps(QUALITY))

    text = claims.summary(result, list(result["searches"]))
    for name in result["searches"]:
        assert f"{name}: " in text
    for row in saved["searches"][prefix]["rows"]:
        (line,) = (line for line in text.split(f"{prefix}_expected")[0].splitlines()
                   if line.split()[:2] == [row["domain"], row["budget"]])
        assert f"{row['loss']:.4f}" in line and f"{row['ci'][0]:.4f}..{row['ci'][1]:.4f}" in line
        base = [b for b in saved["baselines"][context] if (b["domain"], str(b["k"])) == (row["domain"], row["budget"])]
        assert len(base) == (row["budget"] != "any")
        for policy in ("random", "best100_data_set", "fixed") if base else ():
            assert f"{base[0][policy][0]:.4f}" in line
    for row in saved["controls"][context]:
        assert f"k=1   {row['gain'][0]:.4f} (" in text and f"= {row['foresight'][0]:.4f} (" in text
    assert "greedy: 5.0% of the work of exhaustive, mean gap 0.1500 nats, largest 0.2000" in text
    assert f"F8 (oracle): {saved['findings'][0]['verdict']}. early positions" in text
    assert "agreement with float32: 0.99" in text and "peak memory" not in text  # None: not measured
    monkeypatch.setattr(claims, "FEW", 1)
    assert "no interval from fewer" not in claims.summary(result, list(result["searches"]))
    monkeypatch.setattr(claims, "FEW", 4)  # there are 3 sequences, so intervals would be nan
    text = claims.summary(result, list(result["searches"]))
    assert text.endswith("nan..nan: no interval from fewer than 4 sequences; a larger --tokens has more")


def test_contexts_are_not_mixed(tmp_path):
    """Each context has its own baselines, controls and losses beside the oracle's."""
    p = {context: patterns_file() | {"fixed": patterns_file(seed=seed)["fixed"]}
         for context, seed in (("sequential", 1), ("frozen", 7))}
    for seed, context in enumerate(p):
        write(tmp_path, **{
            f"patterns_{context}": p[context],
            f"sb_{context}_exhaustive": search_file(["1"], p[context], seed=seed, context=context),
            f"sb_{context}_exhaustive_expected": search_file(["1"], p[context], seed=seed + 5, context=context)})
    result = claims.report(tmp_path, "now", [], ABOUT)
    for context in p:
        (row,) = (row for row in result["controls"][context] if row["domain"] == "all")
        assert row["fixed"] == pytest.approx(p[context]["fixed"][1].mean(), rel=1e-6)
        (base,) = (row for row in result["baselines"][context] if (row["k"], row["domain"]) == (1, "all"))
        assert base["fixed"][0] == pytest.approx(row["fixed"], rel=1e-6)
        text = claims.summary(result, list(result["searches"]))
        block = text.split(f"sb_{context}_exhaustive: ")[1].split("GFLOP")[1]
        assert f"{row['fixed']:.4f}" in block


def test_controls_of_all_budgets_come_first(tmp_path):
    """A later search for a few budgets is listed, but the table stays whole."""
    p = patterns_file()
    files = {"patterns_frozen": p, "sb_frozen_exhaustive": search_file(["1", "2"], p, context="frozen"),
             "sb_frozen_exhaustive_expected": search_file(["1", "2"], p, seed=2, context="frozen"),
             "sb_frozen_exhaustive_expected_2": search_file(["2"], p, [0, 4], 3, context="frozen")}
    write(tmp_path, **files)
    result = claims.report(tmp_path, "now", [], ABOUT)
    assert {(row["k"], row["sequences"]) for row in result["controls"]["frozen"]} == {(1, 3), (1, 6), (2, 3), (2, 6)}
    assert set(result["searches"]) == set(files) - {"patterns_frozen"}


def test_controls_of_several_budgets_come_before_one(tmp_path):
    """The gpu plan has five budgets in the sequential context. One more search must not displace these."""
    p = patterns_file()
    write(tmp_path, patterns_sequential=p, sb_sequential_exhaustive=search_file(["1", "2", "3"], p), **{
        "sb_sequential_exhaustive_expected_1+2+3": search_file(["1", "2", "3"], p, seed=2),
        "sb_sequential_exhaustive_expected_2": search_file(["2"], p, [0, 4], 3)})
    rows = claims.report(tmp_path, "now", [], ABOUT)["controls"]["sequential"]
    assert {row["k"] for row in rows} == {1, 2, 3}


def test_quality_is_kept_when_not_remade(tmp_path):
    write(tmp_path)
    claims.report(tmp_path, "now", QUALITY, ABOUT)
    assert claims.report(tmp_path, "now", [], ABOUT)["quality"] == json.loads(json.dumps(QUALITY))
    assert claims.report(tmp_path, "now", QUALITY[:1], ABOUT)["quality"] == json.loads(json.dumps(QUALITY[:1]))
    assert claims.report(tmp_path, "another", [], ABOUT)["quality"] == []  # another checkpoint's says nothing here


def test_controls_need_label_expected_and_baselines(tmp_path):
    p = patterns_file()
    for missing in ("patterns_sequential", "sb_sequential_exhaustive", "sb_sequential_exhaustive_expected"):
        files = {"patterns_sequential": p, "sb_sequential_exhaustive": search_file(["1"], p),
                 "sb_sequential_exhaustive_expected": search_file(["1"], p, seed=2)}
        del files[missing]
        folder = tmp_path / missing
        folder.mkdir()
        write(folder, **files)
        result = claims.report(folder, "now", [], ABOUT)
        assert result["controls"] == {} and set(result["searches"]) == set(files) - {"patterns_sequential"}
        claims.summary(result, list(result["searches"]))
    # The split-label oracle may be missing.
    write(folder, sb_sequential_exhaustive_expected=search_file(["1"], p, seed=2))
    result = claims.report(folder, "now", [], ABOUT)
    assert [row["learnable"][0] is None for row in result["controls"]["sequential"]] == [True] * 3
    assert "nan" in claims.summary(result, list(result["searches"]))


def in_frozen(arrays):
    """The same search as a file of the frozen context"""
    return arrays | {"context": "frozen", "notes": str(arrays["notes"]).replace("sequential", "frozen")}


def test_findings_come_from_the_sequential_context_if_they_can(tmp_path):
    p, label, skip = deep_files(S=8)
    write(tmp_path, patterns_frozen=p, sb_frozen_exhaustive=in_frozen(label), xb_sequential_exhaustive_6=skip)
    for context in ("frozen", "sequential"):
        findings = {line["id"]: line for line in claims.report(tmp_path, "now", [], ABOUT)["findings"]}
        f10 = findings.pop("F10")  # from the search over {big, skip}, whatever the others come from
        assert f10["context"] == "sequential" and f10["command"] == "python oracle.py --context=sequential"
        assert len(findings) == 6
        for line in findings.values():
            assert line["context"] == context and line["command"] == f"python oracle.py --context={context}"
        write(tmp_path, patterns_sequential=p, sb_sequential_exhaustive=label)
    (tmp_path / "oracle" / "xb_sequential_exhaustive_6.npz").unlink()
    write(tmp_path, xb_frozen_exhaustive_6=in_frozen(skip))
    (f10,) = (line for line in claims.report(tmp_path, "now", [], ABOUT)["findings"] if line["id"] == "F10")
    assert f10["context"] == "frozen"


def test_nothing_yet(tmp_path):
    """A folder without a file of this checkpoint gives empty tables, and an empty summary."""
    write(tmp_path, patterns_frozen=patterns_file() | {"checkpoint": "another"})
    result = claims.report(tmp_path, "now", [], ABOUT)
    assert result["searches"] == result["baselines"] == result["controls"] == {} and result["findings"] == []
    assert claims.summary(result, list(result["searches"])) == ""


@pytest.mark.parametrize(("fixed", "said"), [([0.1, 0.0, 0.2], "8 for small, fixed and all-big"),
                                             ([None, None, None], "8 for small and all-big")])
def test_router_summary_names_what_it_compared(fixed, said):
    """Of a deep model no fixed pattern was chosen, so none is named."""
    row = {"name": "mlp", "budget": 2.0, "skip_budget": None, "domain": "all", "choices": "sb", "seed": 1, "loss": 3.0,
           "achieved": 2.0, "achieved_skip": 0.0, "bits_per_byte": 1.0, "flops": 1e6, "recovered": None,
           "versus": {"fixed": fixed, "all_big": [0.1, 0.0, 0.2]}, "contexts": {"fixed": "sequential"},
           "compared_on": {"fixed": 8, "all_big": 8}}
    assert f"sequences: {said}" in claims.router_summary([row], [])
