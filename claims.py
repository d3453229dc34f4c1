"""From the files of oracle.py and router.py to their tables: intervals by bootstrap over sequences, and the paper's
claims (F1..F12).

Everything is paired: policies are compared on the same tokens, and a resample draws the same sequences for all of them.
An estimate is a function of means over sequences; the function gets an array [..., q] of q means, and is applied to the
sample's means and to those of each resample.
"""
import functools
import json
import math
from pathlib import Path

import numpy as np

from common import write_atomic
from model import BIG, SKIP, SMALL

RESAMPLES = 2000
FEW = 8  # sequences: below that a bootstrap is much too sure (of normal data, its 95% interval holds 81% with 4)


@functools.lru_cache(maxsize=8)  # drawing takes longer than all that is made of it, and S is nearly always the same
def draws(S, seed):
    """-> how often each of S sequences is drawn in each resample [RESAMPLES, S]"""
    return np.random.default_rng(seed).multinomial(S, [1 / S] * S, size=RESAMPLES).astype(np.float64)


def bootstrap_means(values, seed=0):
    """values [S, q], one row a sequence -> means of RESAMPLES resamples of the sequences [RESAMPLES, q]"""
    return draws(len(values), seed) @ values / len(values)


def interval(values, estimate=lambda m: m[..., 0]):
    """values [S] or [S, q] -> (estimate, low, high): a 95% bootstrap interval over sequences. With fewer than FEW of
    them there is no interval: low and high are nan, and a claim is undecided."""
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    point = float(estimate(values.mean(0)))
    if len(values) < FEW:
        return point, float("nan"), float("nan")
    low, high = np.percentile(estimate(bootstrap_means(values)), [2.5, 97.5])
    return point, float(low), float(high)


def verdict(parts):
    """parts: [(estimate, low, high), ...], each to be above 0 -> "holds" when all intervals are above 0, "fails" when
    one is below 0, else "undecided"."""
    if all(low > 0 for _, low, _ in parts):
        return "holds"
    return "fails" if any(high < 0 for _, _, high in parts) else "undecided"


def above(part, bound):
    """(estimate, low, high) of x -> that of x - bound, which a claim wants above 0"""
    return tuple(value - bound for value in part)


def below(part, bound):
    estimate, low, high = part
    return bound - estimate, bound - high, bound - low


def finding(id, claim, parts, detail, effect=None, unit="nats"):
    """-> a line of oracle.json's findings. parts: what must be above 0, as in verdict(); the weakest one is shown,
    unless `effect` (estimate, low, high) says it better. detail: what a reader may want to know besides."""
    shown = effect or min(parts, key=lambda part: part[1] if part[1] == part[1] else part[0])
    return {"id": id, "claim": claim, "effect": shown[0], "ci": list(shown[1:]), "unit": unit,
            "verdict": verdict(parts), "detail": detail}


def centre_of_mass(big):
    """BIG choices [..., L] -> where in depth they lie, 0 the first layer, 1 the last. A ratio of means."""
    L = big.shape[-1]
    return (big * np.arange(L)).sum(-1) / ((L - 1) * big.sum(-1))


def f1(random, best100, oracle):
    """[S, K] losses per sequence, for k = 2..10."""
    K = oracle.shape[1]
    both = np.concatenate((random, best100, oracle), 1)
    parts, detail = [], []
    for i in range(K):
        lower = interval(both, lambda m, i=i: m[..., K + i] - m[..., 2 * K + i])
        triple = interval(both, lambda m, i=i: m[..., i] - m[..., 2 * K + i] - 3 * (m[..., i] - m[..., K + i]))
        parts += [lower, triple]
        detail.append({"k": i + 2, "best100_minus_oracle": lower, "gain_minus_3_best100_gains": triple})
    return finding("F1", "the oracle is far below best-of-100 random", parts, detail)


def f2(all_big, oracle1):
    part = interval(all_big - oracle1)
    return finding("F2", "one BIG layer, well placed, beats all-big", [part], "all-big - oracle(k=1), nats")


def f3(all_big, oracle):
    """oracle [S, L + 1]: losses per sequence at k = 0..L."""
    gain = interval(all_big - oracle[:, 6])
    best = bootstrap_means(oracle).argmin(1)
    share = float(np.isin(best, (5, 6, 7)).mean())
    k = int(oracle.mean(0).argmin())
    # The share of resamples as a part: above 0 when at least 97.5% lie in 5..7, below 0 when at most 2.5% do.
    # Few sequences have no resamples that could tell.
    enough = len(oracle) >= FEW
    inside = (share - 0.5, 1.0 if share >= 0.975 and enough else -1.0, -1.0 if share <= 0.025 and enough else 1.0)
    return finding("F3", "the oracle is best near k=6 and beats all-big", [gain, inside],
                   {"best_k": k, "share_of_resamples_in_5_to_7": share,
                    "best_k_resampled": np.bincount(best).tolist()}, gain)


def f4(router, fixed, oracle):
    """router, fixed [S, n]: losses per sequence at n rising budgets; oracle [S', 2] at k = 6 and L."""
    steps = range(router.shape[1] - 1)
    parts = [interval(losses[:, i] - losses[:, i + 1]) for losses in (router, fixed) for i in steps]
    turns = interval(oracle[:, 1] - oracle[:, 0])
    return finding("F4", "fixed and router improve with k, the oracle turns", [*parts, turns],
                   {"gain_per_step_router_then_fixed": parts, "oracle(L) - oracle(6)": turns})


def f5(router, best100, oracle):
    """{k: losses per sequence [S]} for k = 4, 6, 8, the baselines at the router's achieved budget."""
    parts = {k: interval(np.stack((router[k], best100[k], oracle[k]), 1),
                         lambda m: (m[..., 0] - m[..., 2]) - np.abs(m[..., 0] - m[..., 1])) for k in router}
    return finding("F5", "the router is nearer to best-of-100 than to the oracle", list(parts.values()),
                   {f"k{k}": part for k, part in parts.items()})


def f6(big):
    """big {k: BIG choices per sequence [S, L]} for k = 4, 6, 8."""
    centre = {k: interval(b, centre_of_mass) for k, b in big.items()}
    parts = [above(centre[4], 0.5), above(centre[6], 0.48), below(centre[6], 0.52), below(centre[8], 0.5)]
    return finding("F6", "the oracle: late layers at k=4, even at k=6, early at k=8", parts,
                   {f"centre_of_mass_k{k}": c for k, c in centre.items()}, unit="depth, 0 to 1")


def f7(big):
    """big {k: BIG choices per sequence [S, L]} for k = 4, 6, 8."""
    centre = {k: interval(b, centre_of_mass) for k, b in big.items()}
    return finding("F7", "the router: late layers at every budget", [above(c, 0.5) for c in centre.values()],
                   {f"centre_of_mass_k{k}": c for k, c in centre.items()}, unit="depth, 0 to 1")


def f8_router(first, last):
    """{k: mean BIG per token and sequence [S]} in the first and the last quarter of positions, for k = 4, 6."""
    parts = {k: interval(first[k] - last[k]) for k in first}
    return finding("F8", "early positions use more BIG (the router)", list(parts.values()),
                   {f"k{k}": part for k, part in parts.items()}, unit="BIG per token")


def f8(first, last):
    """Mean BIG per token and sequence [S] in the first and the last quarter of positions."""
    return finding("F8 (oracle)", "early positions use more BIG (the unconstrained oracle)", [interval(first - last)],
                   "mean BIG in the first quarter of positions - in the last", unit="BIG per token")


def f9(constant, down, up):
    parts = [interval(down - constant), interval(up - constant)]
    return finding("F9", "a constant 4 beats ramps", parts, {"oracle(6->2) - oracle(4)": parts[0],
                                                             "oracle(2->6) - oracle(4)": parts[1]})


def together(skip):
    """skip [S, N, M] bool -> per sequence [S, 4], sums over its N chains of M members: adjacent pairs that both skip;
    skips with a neighbour after them; and what these two would be, in the mean, were each chain permuted."""
    skip = skip.astype(np.float64)
    M, n = skip.shape[-1], skip.sum(-1)
    pairs = (skip[..., 1:] * skip[..., :-1]).sum((1, 2))
    followed = skip[..., :-1].sum((1, 2))
    permuted = (n * (n - 1) / M).sum(1)  # (M - 1) neighbouring places, each with n (n - 1) / (M (M - 1))
    expected_followed = (n * (M - 1) / M).sum(1)
    return np.stack((pairs, followed, permuted, expected_followed), 1)


def f10(skip):
    """skip [S, T, L] bool, six of twelve. Over depth: a chain of L layers per token; over positions: of T tokens per
    layer."""
    L = skip.shape[-1]
    n = skip.sum(-1)
    suffix = (np.flip(skip, -1).cumprod(-1).sum(-1) == n) & (n > 0)  # the last n layers, and no other
    share = interval(suffix.mean(1))

    def excess(m):
        return m[..., 0] / m[..., 1] - m[..., 2] / m[..., 3]
    depth = interval(together(skip), excess)
    positions = interval(together(skip.transpose(0, 2, 1)), excess)
    parts = [below(share, 0.05), depth, positions]
    return finding("F10", "skipping is not early exit, and skips attract skips", parts,
                   {"share_that_skip_a_suffix": share, "over_depth": depth, "over_positions": positions,
                    "never_skipped_to_always": skip.mean((0, 1)).round(3).tolist(), "layers": L}, unit="probability")


def midranks(inverse, weight):
    """inverse: for each value the place of its kind among the sorted distinct ones (np.unique); weight: how often each
    value is there -> the share of values below it, ties counted half: 0..1"""
    of_kind = np.bincount(inverse, weight)
    return ((of_kind.cumsum() - of_kind / 2) / weight.sum())[inverse]


def f11(small, oracle, resamples=RESAMPLES):
    """small, oracle [S, T]: losses per token, all-SMALL and of the unconstrained oracle. Ranks are not means, so each
    resample is ranked anew: a token counts as often as its sequence was drawn."""
    S, T = small.shape
    inverse = [np.unique(x, return_inverse=True)[1].ravel() for x in (small, small - oracle)]

    def statistics(counts):
        """counts [S] -> Spearman's correlation of loss and gap; of the top tenth by loss, the lower half by gap"""
        weight = np.repeat(counts.astype(float), T)
        u, v = (midranks(x, weight) for x in inverse)
        # Spearman: the correlation of the ranks, whose mean is 1/2
        covariance, *variances = (np.sum(weight * (a - 0.5) * (b - 0.5)) for a, b in ((u, v), (u, u), (v, v)))
        top = weight * (u > 0.9)
        with np.errstate(invalid="ignore"):  # all alike: no correlation
            return covariance / np.sqrt(variances[0] * variances[1]), (top * (v < 0.5)).sum() / top.sum()
    point, drawn = statistics(np.ones(S)), [(float("nan"),) * 2] * 2
    if S > 1:
        counts = np.random.default_rng(0).multinomial(S, [1 / S] * S, size=resamples)
        drawn = np.percentile([statistics(row) for row in counts], [2.5, 97.5], axis=0)
    rank, share = ((float(point[i]), float(drawn[0][i]), float(drawn[1][i])) for i in (0, 1))
    return finding("F11", "difficulty is not loss", [below(rank, 0.9), above(share, 0.1)],
                   {"rank_correlation_of_loss_and_gap": rank, "lower_half_by_gap_among_top_tenth_by_loss": share})


def f12(all_big=None, dense=None, joint=None, freeze=None):
    """Losses per sequence [S]: this run at all-big and a dense model of its size; at random k = L / 2 this run and one
    whose SMALL FFNs were trained beside frozen BIG ones. With one half only the claim cannot hold."""
    parts, detail = [], {}
    if dense is not None:
        parts.append(below(interval(all_big - dense), 0.05))
        detail["all_big_minus_dense"] = interval(all_big - dense)
    if freeze is not None:
        parts.append(interval(freeze - joint))
        detail["freeze_then_small_minus_joint"] = parts[-1]
    line = finding("F12", "Duo at all-big is near dense; joint training beats freeze-then-small", parts, detail)
    return line | {"verdict": "undecided"} if len(parts) < 2 and line["verdict"] == "holds" else line


# ---------------------------------------------------------------------------------------------------------------------
# tables and findings, from the files alone

def load(path, checkpoint):
    """-> the file's arrays as a dict, {} where there is none of this checkpoint."""
    if not path.exists():
        return {}
    with np.load(path) as file:
        arrays = dict(file)
    return arrays if str(arrays["checkpoint"]) == checkpoint else {}


def by_domain(arrays):
    """-> [(name, which sequences)]: each domain, and all together where there are several"""
    parts = [(str(name), arrays["domain"] == d) for d, name in enumerate(arrays["domains"])]
    return parts + [("all", arrays["domain"] >= 0)] * (len(parts) > 1)


def shared(small, large):
    """Which rows of `large` hold the sequences of `small`? Windows are evenly spaced, so a search of fewer tokens may
    see a part of the same ones. -> rows [S], or None where `large` lacks some."""
    where = {row.tobytes(): i for i, row in enumerate(large["idx"])}
    rows = [where.get(row.tobytes()) for row in small["idx"]]
    return None if None in rows else np.array(rows)


def baseline_losses(patterns):
    """patterns.npz -> {name: losses per sequence [L + 1, S]}: the mean pattern of each k; the best of 100 per data set
    (domain), per sequence, per token; the best fixed one, chosen on training text."""
    means, k_of = patterns["means"], (patterns["patterns"] == BIG).sum(1)
    L = patterns["patterns"].shape[1]
    result = {name: np.zeros((L + 1, means.shape[1])) for name in ("random", "best100_data_set", "best100_sequence")}
    for k in range(L + 1):
        ids = patterns["hundred"][k][patterns["hundred"][k] >= 0]
        result["random"][k] = means[k_of == k].mean(0)
        result["best100_sequence"][k] = means[ids].min(0)
        for d in range(len(patterns["domains"])):
            here = patterns["domain"] == d
            result["best100_data_set"][k, here] = means[ids[means[ids][:, here].mean(1).argmin()]][here]
    return result | {"best100_token": patterns["per_token"], "fixed": patterns["fixed"].mean(-1)}


def job_table(arrays):
    """One npz file -> rows: domain, budget, loss with its interval, perplexity, choices per token"""
    rows = []
    for i, label in enumerate(arrays["labels"]):
        per_sequence = arrays["losses"][i].mean(-1)
        for name, here in by_domain(arrays):
            loss, low, high = interval(per_sequence[here])
            rows.append({"domain": name, "budget": str(label), "loss": loss, "ci": [low, high],
                         "perplexity": math.exp(loss), "sequences": int(here.sum()),
                         "big": float((arrays["routes"][i][here] == BIG).sum(-1).mean()),
                         "skip": float((arrays["routes"][i][here] == SKIP).sum(-1).mean())})
    return rows


def control_table(label, expected, split, patterns):
    """-> rows: for each domain and k the oracle's gain over the best fixed pattern = foresight + hindsight. Paired, on
    the sequences that all of them searched."""
    rows, places = [], [shared(expected, arrays) for arrays in (patterns, label, split) if arrays]
    if any(place is None for place in places):
        return rows
    for label_of_k in (str(name) for name in expected["labels"] if str(name).isdigit() and name in label["labels"]):
        k, S = int(label_of_k), len(expected["domain"])

        def of(arrays, where, name=label_of_k):
            return arrays["losses"][list(arrays["labels"]).index(name)].mean(-1)[where]
        with_split = split and label_of_k in split["labels"]
        columns = np.stack((patterns["fixed"][k].mean(-1)[places[0]], of(expected, np.arange(S)), of(label, places[1]),
                            of(split, places[2]) if with_split else np.full(S, np.nan)), 1)
        for name, here in by_domain(expected):
            def gap(i, j, here=here, columns=columns):
                return interval(columns[here], lambda m: m[..., i] - m[..., j])
            rows.append({"domain": name, "k": k, "sequences": int(here.sum()),
                         **dict(zip(("fixed", "expected", "label", "split"), columns[here].mean(0), strict=True)),
                         "gain": gap(0, 2), "foresight": gap(0, 1), "hindsight": gap(1, 2), "learnable": gap(0, 3)})
    return rows


def last_report(out_dir, checkpoint):
    """-> oracle.json as it stands, {} where there is none of this checkpoint"""
    path = Path(out_dir) / "oracle.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    return old if old.get("checkpoint") == checkpoint else {}


def find_claims(label, patterns, skip):
    """The paper's claims about the oracle, on all domains together -> findings. label, patterns: searches and baselines
    of one context; skip: a search over {big, skip}. {} for what there is not."""
    def made_by(arrays, findings):
        notes = json.loads(str(arrays["notes"]))
        return [line | {"context": str(arrays["context"]), "sequences": len(arrays["domain"]),
                        "command": notes["command"]} for line in findings]

    found = []
    if label:
        of = {str(name): label["losses"][i].mean(-1) for i, name in enumerate(label["labels"])}
        big = {str(name): label["routes"][i] == BIG for i, name in enumerate(label["labels"])}
        L, lines = label["routes"].shape[-1], []
        ks = [str(k) for k in range(L + 1)]
        where = shared(label, patterns) if patterns else None
        if where is not None and L > 10 and set(ks) <= set(of):
            base = {name: losses[:, where] for name, losses in baseline_losses(patterns).items()}
            oracle = np.stack([of[k] for k in ks], 1)  # [S, L + 1]
            lines += [f1(base["random"][2:11].T, base["best100_data_set"][2:11].T, oracle[:, 2:11]),
                      f2(of[str(L)], oracle[:, 1]), f3(of[str(L)], oracle)]
        if {"4", "6", "8"} <= set(of):
            lines.append(f6({k: big[str(k)].mean(1) for k in (4, 6, 8)}))
        if "any" in of:
            quarter, per_token = big["any"].shape[1] // 4, big["any"].sum(-1)
            lines.append(f8(per_token[:, :quarter].mean(1), per_token[:, -quarter:].mean(1)))
        if {"4", "6-2", "2-6"} <= set(of):
            lines.append(f9(of["4"], of["6-2"], of["2-6"]))
        found += made_by(label, lines)
    if skip and "6" in skip["labels"]:
        found += made_by(skip, [f10(skip["routes"][list(skip["labels"]).index("6")] == SKIP)])
    return found


def report(out_dir, checkpoint, quality, about):
    """Read what lies in out_dir/oracle of this checkpoint (its hash), and write oracle.json -> the same as a dict.
    quality: rows of oracle.run_quality, [] to keep those that are there; about: {"fingerprint", "seed"} of the run."""
    files = {file.stem: load(file, checkpoint) for file in sorted((Path(out_dir) / "oracle").glob("*.npz"))}
    files = {name: arrays for name, arrays in files.items() if arrays}
    patterns = {context: files.pop(f"patterns_{context}", {}) for context in ("sequential", "frozen")}
    result = {"checkpoint": checkpoint, **about,
              "searches": {name: json.loads(str(arrays["notes"])) | {"rows": job_table(arrays)}
                           for name, arrays in files.items()},
              "baselines": {}, "controls": {}, "curves": {},
              "quality": quality or last_report(out_dir, checkpoint).get("quality", [])}
    for context, arrays in patterns.items():
        if not arrays:
            continue
        losses = baseline_losses(arrays)
        result["baselines"][context] = [
            {"domain": name, "k": k, "sequences": int(here.sum()),
             **{policy: interval(values[k, here]) for policy, values in losses.items()}}
            for k in range(len(losses["fixed"])) for name, here in by_domain(arrays)]
        result["curves"][context] = {k: dict(zip(map(int, arrays["curve_n"]), curve.mean(0).tolist(), strict=True))
                                     for k, curve in enumerate(arrays["curve"])}
        label = files.get(f"sb_{context}_exhaustive", {})
        expected, split = (max((arrays for name, arrays in files.items()  # of several files that with most budgets
                                if name.startswith(f"sb_{context}_exhaustive_{kind}")),
                               key=lambda arrays: len(arrays["labels"]), default={}) for kind in ("expected", "split"))
        if label and expected:
            result["controls"][context] = control_table(label, expected, split, arrays)
    # Sequential, what generation does, where all budgets were searched in that context; else frozen.
    contexts = [context for context in ("sequential", "frozen") if f"sb_{context}_exhaustive" in files]
    skip = files.get("xb_sequential_exhaustive_6") or files.get("xb_frozen_exhaustive_6", {})
    result["findings"] = find_claims(files[f"sb_{contexts[0]}_exhaustive"] if contexts else {},
                                     patterns[contexts[0]] if contexts else {}, skip)
    for line in result["findings"]:
        line["seeds"] = [about["seed"]]
    result = without_nan(json.loads(json.dumps(result, default=float)))
    write_atomic(Path(out_dir) / "oracle.json", json.dumps(result, indent=1).encode())
    return result


def number(value):
    """None, which stands for nan in JSON -> nan"""
    return math.nan if value is None else value


def summary(result, names):
    """-> text: of the searches `names` losses by budget, beside the baselines where these are about as many sequences
    (a search of the plan sees the same ones); then controls, searches compared, findings"""
    lines = []
    base = {(context, row["domain"], str(row["k"]), row["sequences"]): row
            for context, rows in result["baselines"].items() for row in rows}
    for name in names:
        found = result["searches"][name]
        lines.append(f"{name}: {found['seconds']:.0f} s, {found['flops_per_token'] / 1e9:.3g} GFLOP a token")
        for what in ("agreement_with_float32", "largest_difference_from_forward", "peak_memory_gb"):
            if found[what] is not None:
                lines.append(f"  {what.replace('_', ' ')}: {found[what]:.4g}")
        lines.append(f"  {'domain':<8}{'budget':>7}{'BIG':>7}{'SKIP':>7}{'oracle':>9}{'95% interval':>17}{'random':>9}"
                     f"{'best 100':>10}{'fixed':>8}")
        for row in found["rows"]:
            other = base.get((found["job"]["context"], row["domain"], row["budget"], row["sequences"]))
            beside = (f"{other['random'][0]:>9.4f}{other['best100_data_set'][0]:>10.4f}{other['fixed'][0]:>8.4f}"
                      if other and found["job"]["choices"] == "sb" else "")
            low, high = map(number, row["ci"])
            lines.append(f"  {row['domain']:<8}{row['budget']:>7}{row['big']:>7.2f}{row['skip']:>7.2f}"
                         f"{row['loss']:>9.4f}{f'{low:.4f}..{high:.4f}':>17}{beside}")
    for context, rows in result["controls"].items():
        lines.append(f"gain over the best fixed pattern, {context}, nats: oracle = foresight + hindsight; learnable")
        for row in rows:
            gain, foresight, hindsight, learnable = (
                "{:.4f} ({:.4f}..{:.4f})".format(*map(number, row[key]))
                for key in ("gain", "foresight", "hindsight", "learnable"))
            lines.append(f"  {row['domain']:<6} k={row['k']:<3} {gain} = {foresight} + {hindsight}; {learnable}")
    for name in dict.fromkeys(row["search"] for row in result["quality"]):
        rows = [row for row in result["quality"] if row["search"] == name]
        gaps = [row["gap"][0] for row in rows]
        lines.append(f"  {name}: {rows[0]['work']:.1%} of the work of {rows[0]['against']}, mean gap "
                     f"{np.mean(gaps):.4f} nats, largest {max(gaps):.4f}")
    for line in result["findings"]:
        effect, low, high = map(number, (line["effect"], *line["ci"]))
        lines.append(f"{line['id']}: {line['verdict']}. {line['claim']}: {effect:.4f} ({low:.4f}..{high:.4f}) "
                     f"{line['unit']}, {line['sequences']} sequences")
    if any(row["sequences"] < FEW for name in names for row in result["searches"][name]["rows"]):
        lines.append(f"nan..nan: no interval from fewer than {FEW} sequences; a larger --tokens has more")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# routers

def at_budget(k, base):
    """Interpolate base [..., L + 1], the values at k = 0..L, at k [...]: what mixing the two neighbours would give; nan
    below 0 (cheaper than all-small, by SKIPs)."""
    L = base.shape[-1] - 1
    k, cheaper = np.clip(k, 0, L), np.asarray(k) < -1e-6
    low = np.minimum(k.astype(int), L - 1)
    a, b = (np.take_along_axis(base, (low + i)[..., None], -1)[..., 0] for i in (0, 1))
    # not a + share * (b - a): where k is whole, a neighbour that is missing (nan) must not matter
    share = k - low
    return np.where(cheaper, np.nan, np.where(share == 1, b, np.where(share == 0, a, a + share * (b - a))))


def against(loss, spent, base):
    """loss, spent [S], base [S, L + 1] -> (baseline at the achieved budget), (router - baseline), each with its
    interval. A resample draws loss, spending and baseline together."""
    columns = np.column_stack((loss, spent, base))
    return (interval(columns, lambda m: at_budget(m[..., 1], m[..., 2:])),
            interval(columns, lambda m: m[..., 0] - at_budget(m[..., 1], m[..., 2:])))


def oracle_losses(folder, checkpoint, idx):
    """-> {"oracle": (losses per sequence [n, L + 1], which of the sequences idx [S, T] they are about)}, its context:
    the label oracle at every k, sequential where it was searched at all of them. {}, None where there is no such file.
    """
    for context in ("sequential", "frozen"):
        arrays = load(folder / f"sb_{context}_exhaustive.npz", checkpoint)
        labels = [str(label) for label in arrays["labels"]] if arrays else []
        ks = [str(k) for k in range(arrays["routes"].shape[-1] + 1)] if arrays else ["none"]
        rows = shared(arrays, {"idx": idx}) if set(ks) <= set(labels) else None
        if rows is not None:
            return {"oracle": (np.stack([arrays["losses"][labels.index(k)].mean(-1) for k in ks], 1), rows)}, context
    return {}, None


def spending(arrays, flops):
    """What the choices of a router's npz file cost -> [S], as a number of BIG per token: (flops - all-small's) / a
    BIG's surplus. Without SKIP that is the number of BIG. flops: of all-SMALL and of all-BIG per token."""
    return (arrays["flops"].mean(-1) - flops[0]) / ((flops[1] - flops[0]) / arrays["routes"].shape[-1])


def router_rows(arrays, base, contexts, controls, flops):
    """One router's npz file -> its objects of routers.json, one for each domain and for all together.

    base: {name: (losses per sequence [n, L + 1], which n of the file's sequences they are about)}; contexts {name: its
    context}; controls: those of oracle.json. Each baseline is compared on its sequences, at the FLOPs that the router's
    choices spent (the router's own are in `flops`, not in this)."""
    notes = json.loads(str(arrays["notes"]))
    routes, losses = arrays["routes"], arrays["losses"].mean(-1).astype(np.float64)  # [S, T, L], [S]
    L, rows, spent = routes.shape[-1], [], spending(arrays, flops)
    big, skip = (routes == BIG).sum(-1), (routes == SKIP).sum(-1)  # [S, T]
    for name, here in by_domain(arrays):
        loss, low, high = interval(losses[here])
        row = {key: notes[key] for key in ("name", "budget", "skip_budget", "choices", "seed", "checkpoint")}
        row |= {"domain": name, "achieved": float(big[here].mean()), "achieved_skip": float(skip[here].mean()),
                "equivalent_big": float(spent[here].mean()), "loss": loss, "loss_ci": [low, high],
                "perplexity": math.exp(loss), "sequences": int(here.sum()),
                "bits_per_byte": float(arrays["losses"][here].sum() / math.log(2) / arrays["bytes"][here].sum()),
                "flops": float(arrays["flops"][here].mean()) + notes["router_flops"],
                "router_flops": notes["router_flops"]}
        row["versus"], row["compared_on"], row["contexts"] = {}, {}, {}
        for policy, (values, which) in base.items():
            if policy == "oracle" and notes["choices"] != "sb":
                continue  # the oracle over other choices
            mine = which[here[which]]
            row[policy], row["versus"][policy] = against(losses[mine], spent[mine], values[here[which]])
            row["compared_on"][policy], row["contexts"][policy] = len(mine), contexts[policy]
        row |= {"recovered": None, "foresight": None}
        if "oracle" in base and notes["choices"] == "sb":
            (values, which), (fixed, rows_of_fixed) = base["oracle"], base["fixed"]
            mine = which[here[which]]
            of = {sequence: i for i, sequence in enumerate(rows_of_fixed)}
            columns = np.column_stack((losses[mine], spent[mine], fixed[[of[i] for i in mine]], values[here[which]]))

            def recovered(m):  # (fixed - router) / (fixed - oracle)
                at_fixed = at_budget(m[..., 1], m[..., 2:L + 3])
                return (at_fixed - m[..., 0]) / (at_fixed - at_budget(m[..., 1], m[..., L + 3:]))
            row["recovered"] = interval(columns, recovered)
            row["foresight"] = next((control["foresight"] for control in controls.get(contexts["oracle"], [])
                                     if control["domain"] == name and control["k"] == notes["budget"]), None)
        quarters = np.array_split(routes[here] == BIG, 4, axis=1)  # 4 times [S, T / 4, L]
        row |= {"big_per_token": np.bincount(big[here].ravel(), minlength=L + 1).tolist(),
                "usage": [[float((routes[here][..., layer] == c).mean()) for c in (SKIP, SMALL, BIG)]
                          for layer in range(L)],
                "big_by_quarter": [quarter.mean((0, 1)).tolist() for quarter in quarters]}
        row |= {key: notes[key] for key in ("calibration", "shift", "steps", "config", "command", "device", "torch")}
        rows.append(row | {key: notes[key] for key in ("price_nats_per_mflop",) if key in notes})
    return rows


ROUTERS = ("linear", "gumbel", "mlp", "distilled", "advantage")  # those that the paper's claims are asked of
COMPARED = {"F4": ("fixed", "oracle"), "F5": ("best100_data_set", "oracle"), "F7": (), "F8": ()}  # with what


def router_claims(name, files, base, flops):
    """The paper's claims about one kind of router, {SMALL, BIG}, all domains together. files: {(budget, seed): arrays};
    base: see router_rows -> findings, each from the seeds that have all its budgets, averaged sequence by sequence."""
    def mean_of(ks, value):
        """-> {k: mean over those seeds of value(arrays)}, the seeds"""
        seeds = sorted(seed for seed in {seed for _, seed in files} if all((k, seed) in files for k in ks))
        return {k: np.mean([value(files[k, seed]) for seed in seeds], 0) for k in ks if seeds}, seeds

    def loss(arrays):
        return arrays["losses"].mean(-1).astype(np.float64)  # [S]
    found, by_seed = [], {}
    for k, seed in files:
        by_seed[seed] = [*by_seed.get(seed, []), k]
    budgets, L = sorted(max(by_seed.values(), key=len)), next(iter(files.values()))["routes"].shape[-1]
    losses, seeds = mean_of(budgets, loss)
    if len(budgets) > 1 and "oracle" in base and L > 6:
        fixed, which = base["fixed"]
        fixed = np.stack([at_budget(np.full(len(fixed), k), fixed) for k in budgets], 1)
        found.append((seeds, f4(np.stack([losses[k][which] for k in budgets], 1), fixed, base["oracle"][0][:, [6, L]])))
    losses, seeds = mean_of((4, 6, 8), loss)
    if losses and "oracle" in base and "best100_data_set" in base:
        (best100, rows), (oracle, others) = base["best100_data_set"], base["oracle"]
        common, (spent, _) = np.intersect1d(rows, others), mean_of((4, 6, 8), lambda arrays: spending(arrays, flops))

        def at(values, which):  # per sequence, at the router's mean spending there; k -> [n]
            values = values[np.searchsorted(which, common)]
            return {k: at_budget(np.full(len(common), spent[k][common].mean()), values) for k in (4, 6, 8)}
        found.append((seeds, f5({k: losses[k][common] for k in (4, 6, 8)}, at(best100, rows), at(oracle, others))))
    big, seeds = mean_of((4, 6, 8), lambda arrays: (arrays["routes"] == BIG).mean(1))  # [S, L]
    if big:
        found.append((seeds, f7(big)))
    per_token, seeds = mean_of((4, 6), lambda arrays: (arrays["routes"] == BIG).sum(-1))  # [S, T]
    if per_token:
        quarter = per_token[4].shape[1] // 4
        found.append((seeds, f8_router({k: n[:, :quarter].mean(1) for k, n in per_token.items()},
                                       {k: n[:, -quarter:].mean(1) for k, n in per_token.items()})))
    return [line | {"router": name, "router_seeds": seeds} for seeds, line in found]


def without_nan(value):
    """JSON has no nan: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def ends(arrays):
    """A router's npz file without SKIPs -> FLOPs of all-SMALL and of all-BIG per token: they rise evenly with BIG."""
    big, flops = (arrays["routes"] == BIG).sum(-1).ravel(), arrays["flops"].ravel().astype(np.float64)
    few, many = big.argmin(), big.argmax()
    step = (flops[many] - flops[few]) / max(1, big[many] - big[few])
    small = flops[few] - step * big[few]
    return small, small + step * arrays["routes"].shape[-1]


def router_findings(evaluated, base, contexts, base_seed):
    """The claims about each kind of {SMALL, BIG} router -> findings. evaluated: the arrays of routers/*.npz, of the
    same windows; base, contexts, the oracle's included: see router_rows."""
    kinds, commands, found = {}, {}, []
    for arrays in evaluated:
        notes = json.loads(str(arrays["notes"]))
        if notes["choices"] == "sb" and notes["name"] in ROUTERS:
            kinds.setdefault(notes["name"], {})[notes["budget"], notes["seed"]] = arrays
            commands.setdefault(notes["name"], {})[notes["command"]] = None  # a dict keeps their order, each once
    for name, files in kinds.items():
        # The router whose tokens differ most tells the costs; one that gives all tokens equally many BIG cannot.
        widest = max(files.values(), key=lambda arrays: np.ptp((arrays["routes"] == BIG).sum(-1)))
        found += router_claims(name, files, base, ends(widest))
    return without_nan([line | {"context": "sequential", "seeds": [base_seed],
                                "command": "; ".join(commands[line["router"]]),
                                "baseline_contexts": {policy: contexts[policy] for policy in COMPARED[line["id"]]}}
                        for line in found])


def router_report(out_dir, checkpoint, idx, base, contexts, flops, base_seed):
    """Read out_dir/routers/*.npz of this checkpoint and of the windows idx, and write routers.json and
    router_findings.json -> rows, findings. Rows about other checkpoints, or whose file holds other windows, stay.
    base, contexts: as in router_rows, but for the oracle; flops: as in spending."""
    folder, path = Path(out_dir), Path(out_dir) / "routers.json"
    oracle, context = oracle_losses(folder / "oracle", checkpoint, idx)
    base, contexts = base | oracle, contexts | dict.fromkeys(oracle, context)
    controls = last_report(folder, checkpoint).get("controls", {})
    rows, evaluated = [], []
    for file in sorted((folder / "routers").glob("*.npz")):
        arrays = load(file, checkpoint)
        if arrays and np.array_equal(arrays["idx"], idx):
            rows += router_rows(arrays, base, contexts, controls, flops)
            evaluated.append(arrays)
    rows = without_nan(rows)

    def key(row):
        return tuple(row[part] for part in ("name", "budget", "skip_budget", "choices", "seed", "checkpoint", "domain"))
    old = json.loads(path.read_text()) if path.exists() else []
    new = {key(row) for row in rows}
    write_atomic(path, json.dumps([row for row in old if key(row) not in new] + rows, indent=1).encode())
    found = router_findings(evaluated, base, contexts, base_seed)
    write_atomic(folder / "router_findings.json", json.dumps(found, indent=1).encode())
    return rows, found


def router_summary(rows, found):
    """-> text: the Pareto table, a line for each router, budget and domain, and the findings. Baselines stand as
    differences: some are known on fewer sequences than the router, and only paired ones can be compared."""
    def shown(value, form="{:+.4f} ({:+.4f}..{:+.4f})"):
        return "" if not value or value[0] is None else form.format(*(math.nan if v is None else v for v in value))
    lines = [f"{'':<67}router minus",
             f"{'router':<10}{'budget':>7}{'domain':>7}{'seed':>5}{'BIG':>6}{'SKIP':>6}{'loss':>8}{'bits/B':>7}"
             f"{'MFLOP':>8}   {'random':<9}{'small':<9}{'oracle':<9}{'best of 100':<28}{'fixed':<28}{'all-big':<28}"
             "recovered"]
    for row in sorted(rows, key=lambda row: (row["domain"], row["choices"], row["budget"], row["name"], row["seed"])):
        other = row["versus"]
        budget = f"{row['budget']:g}" + ("" if row["skip_budget"] is None else f"/{row['skip_budget']:g}")
        lines.append(f"{row['name']:<10}{budget:>7}{row['domain']:>7}{row['seed']:>5}{row['achieved']:>6.2f}"
                     f"{row['achieved_skip']:>6.2f}{row['loss']:>8.4f}{row['bits_per_byte']:>7.3f}"
                     f"{row['flops'] / 1e6:>8.2f}   "
                     + "".join(f"{shown(other.get(key), '{:+.4f}'):<9}" for key in ("random", "all_small", "oracle"))
                     + "".join(f"{shown(other.get(key)):<28}" for key in ("best100_data_set", "fixed", "all_big"))
                     + shown(row["recovered"], "{:.1%} ({:.1%}..{:.1%})"))
    counts = max((row["compared_on"] for row in rows), key=lambda on: (len(on), on["fixed"]), default={})
    fixed = ", fixed" if any(shown(row["versus"]["fixed"]) for row in rows) else ""  # none above 14 layers
    groups = {"fixed": f"for small{fixed} and all-big", "random": "for random and best of 100", "oracle": "for oracle"}
    lines.append("sequences: " + ", ".join(f"{counts[key]} {what}" for key, what in groups.items() if key in counts))
    frozen = sorted({policy for row in rows for policy, context in row["contexts"].items() if context == "frozen"})
    if frozen:
        lines.append(f"of the frozen context (earlier tokens all-BIG), not the routers': {', '.join(frozen)}"
                     + "; `recovered` takes its oracle from there, the rest is sequential" * ("oracle" in frozen))
    for line in found:
        effect, low, high = (math.nan if v is None else v for v in (line["effect"], *line["ci"]))
        lines.append(f"{line['id']} ({line['router']}): {line['verdict']}. {line['claim']}: {effect:.4f} "
                     f"({low:.4f}..{high:.4f})")
    return "\n".join(lines)
