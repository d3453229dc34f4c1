"""A run's story in five sentences, for the top of the report: what the oracle gains, how much of that is hindsight,
what a router reaches, what joint training reaches, and what time was really saved. Every number is computed, and the
words follow it; what was not measured is said, with the command that does it.
"""
import numpy as np
import torch

import claims
import figures
from model import BIG, SMALL


def router_gains(run):
    """-> [(name, budget, (gain, low, high))]: what each router gains over the best fixed pattern of equal spending,
    nats per token, paired on the windows of those patterns. [] without routers, or patterns in their context."""
    fixed, rows = run["base"].get("fixed", (None, []))
    if run["contexts"].get("fixed") != "sequential":  # as routers are run
        return []
    return [(name, k, claims.interval(np.column_stack((losses, spent, fixed)),
                                      lambda m: claims.at_budget(m[..., 1], m[..., 2:]) - m[..., 0]))
            for name, k, spent, losses in figures.router_points(run, rows)]


def shown(part):
    value, *ends = (claims.number(value) for value in part)
    return (f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f}) nats" if np.isfinite(ends).all() else
            f"{value:.3f} nats, of too few sequences for an interval")


def side(part, other):
    """(difference, low, high) of losses -> in words: below, above, level where the interval holds 0, or not known"""
    if not np.isfinite([claims.number(end) for end in part]).all():
        return f"not known to be below or above {other}: {shown(part)}"
    if part[1] <= 0 <= part[2]:
        return f"level with {other} ({part[0]:+.3f} nats, {part[1]:.3f} to {part[2]:.3f})"
    if part[0] > 0:
        return f"{shown(part)} above {other}"
    return f"{shown((-part[0], -part[2], -part[1]))} below {other}"


def oracle(run, findings):
    """Two sentences: the oracle's gain, and what it is made of."""
    if run["controls"]:
        row = max(run["controls"], key=lambda row: row["gain"][0])
        sure = claims.number(row["foresight"][1]) > 0
        foreseen = (f"At least {shown(row['foresight'])} of that could be foreseen" if sure else
                    f"None of that could be foreseen for sure (foresight {shown(row['foresight'])})")
        return [f"The oracle, which knows the next token, gains {shown(row['gain'])} over the best fixed pattern at "
                f"k = {row['k']}.", f"{foreseen}, at most {shown(row['hindsight'])} is hindsight."]
    best = next((line for line in findings if line["id"] == "F3" and line["effect"] is not None), None)
    over = [claims.number(value) for value in (best["effect"], *best["ci"])] if best else None
    return [f"At k = 6 the oracle, which knows the next token, is {side((-over[0], -over[2], -over[1]), 'all-big')}."
            if best else f"The oracle was not searched (`{run['commands']['oracle']}`).",
            f"How much of that is hindsight was not measured (`{run['commands']['oracle']} --reference=...`)."]


def router(run):
    gains = router_gains(run)
    if not gains:
        return (f"Routers and fixed patterns of their context were not both measured (`{run['commands']['oracle']}`, "
                f"then `{run['commands']['router']}`).")
    name, k, part = max(gains, key=lambda each: each[2][0])
    foreseen = next((row["foresight"][0] for row in run["controls"] if row["k"] == k), 0)
    same = run["controls_context"] == "sequential"  # as routers are run: else the two cannot be divided
    share = (f", {part[0] / foreseen:.0%} of what could be foreseen there" if same and min(part[0], foreseen) > 0
             else "")
    kinds = ", ".join(dict.fromkeys(name for name, *_ in gains))
    of = f"Of {len(gains)} routers ({kinds}; one for each budget) the best here" if len(gains) > 1 else "The router"
    beside = side((-part[0], -part[2], -part[1]), "the best fixed pattern of equal spending")
    return f"{of}, {name} at k = {k:g}, is {beside}{share}."


def joint(run, study):
    """study: a *_joint_k4.json of results/joint_study.py, or {}"""
    if not study:
        return ("Router and base trained together: a study of its own (`python results/joint_study.py`), told here by "
                f"`python analyze.py --out_dir={run['folder']} --joint=out/joint_study/FILE`.")
    over = study["mean_over_seeds"]["all"]
    return (f"In a study of its own ({study['preset']} preset, {study['device']}, {study['sequences']} sequences, "
            f"mean of {len(study['seeds'])} seeds) a model trained with its router from the first step, "
            f"k = {study['k']}, is {side(over['joint - equal'], 'the dense model of equal FLOPs')} and "
            f"{side(over['joint - full'], 'the full dense model')}.")


def time_saved(run):
    """The policy nearest to half of the layers BIG: first a router, then one pattern for all tokens."""
    times, model = run["times"], run["model"]
    if not any(name.startswith("fixed") for name in times) or model is None:
        return f"No times were measured (`python analyze.py --out_dir={run['folder']}`, where the checkpoint is)."
    L, parts = model.config.n_layer, []
    routers = [name for name in times if name.rpartition(" ")[0] in figures.NAMES]
    for what, names in (("under the {} router", routers), ("under one pattern", [n for n in times if "fixed" in n])):
        if names:
            name = min(names, key=lambda name: abs(float(name.split()[-1]) - L / 2))
            k = float(name.split()[-1])
            flops_saved = (1 - k / L) * (1 - model.flops(SMALL) / model.flops(BIG))
            middle, low, high = times[name]  # of all-big's time: the median, and the middle half of the rounds
            long = ("about as long as all-big" if low <= 1 <= high else
                    f"{abs(1 - middle):.0%} {'less' if middle < 1 else 'more'} time than all-big")
            parts.append(f"{what.format(name.split()[0])} at k = {k:g} a forward takes {long} ({low:.2f} to {high:.2f} "
                         f"of its time) for {flops_saved:.0%} fewer FLOPs")
    told = "; ".join(parts)
    return (f"{told[0].upper()}{told[1:]} (width {model.config.n_embd}, {run['times_on']['device']}, not compiled; "
            "in brackets the middle half of repeated measurements; the router's own FLOPs left out).")


@torch.no_grad()
def tell(run, findings, study):
    """-> the five sentences"""
    return [*oracle(run, findings), router(run), joint(run, study), time_saved(run)]
