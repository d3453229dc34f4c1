"""The rows behind the tables of routers: python results/router_table.py --out_dir=out writes out/router_table.json.

Each kind of router at each budget, averaged over its seeds sequence by sequence, then compared with the baselines as
claims.router_rows compares a single one: paired, at the FLOPs that it spent, with bootstrap intervals over sequences.
At the budget nearest to a third of the layers also what of all-big's time a forward saves, its router included: sparse
execution, not compiled, 32 sequences, the kinds in turns (bench.measure). Nothing else should run meanwhile.
"""
import contextlib
import functools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench
import claims
import router
from common import parse_config, write_atomic
from model import BIG, SMALL

KEPT = ("name", "budget", "skip_budget", "choices", "domain", "equivalent_big", "loss", "loss_ci", "bits_per_byte",
        "flops", "router_flops", "versus", "recovered", "sequences", "compared_on", "steps", "command", "device",
        "torch")


def averaged(files):
    """npz files of one kind and budget, a seed each -> one like them, with the means of what router_rows reads."""
    mean = dict(files[0])
    for key in ("losses", "flops"):
        mean[key] = np.mean([arrays[key] for arrays in files], 0, dtype=np.float64)
    return mean


@torch.no_grad()
def time_saved(r, folder, notes, windows):
    """notes: of the routers to be timed -> {name: 1 - milliseconds / those of all-big}"""
    x = windows[0][:32].to(r.device)

    def forward(route, attached=contextlib.nullcontext):
        def call():
            with attached():
                r.fast(x, route)
        return call
    variants = {"all-big": forward(BIG)}
    for each in notes:
        stem = router.stem(each["name"], (each["budget"], each["skip_budget"]), each["choices"], each["seed"])
        path = folder / f"{stem}.pt"
        if path.exists():  # a router of one's own has none
            of_file = router.load_router(path, r.checkpoint, r.shape, r.device)[0]
            variants[each["name"]] = forward(of_file, functools.partial(of_file.attached, r.fast))
    ms = bench.measure(variants, r.device)
    return {name: 1 - ms[name] / ms["all-big"] for name in variants}


def main():
    config = parse_config(router.RouterConfig, None, router.PRESETS)
    r, folder, _ = router.start(config)
    files = [arrays for path in sorted(folder.glob("*.npz")) if (arrays := claims.load(path, r.checkpoint))]
    # All on the same windows: those that most of the files are about.
    n = statistics.mode(len(arrays["idx"]) for arrays in files)
    files = [arrays for arrays in files if len(arrays["idx"]) == n]
    windows = r.windows(n // len(r.domains) * r.shape.block_size)
    base, contexts = router.baselines(r, windows, *router.load_patterns(r))
    oracle, context = claims.oracle_losses(r.folder, r.checkpoint, windows[0].numpy())
    base, contexts = base | oracle, contexts | dict.fromkeys(oracle, context)
    flops = r.exact.flops(SMALL), r.exact.flops(BIG)
    kinds, report = {}, []
    for arrays in files:
        notes = json.loads(str(arrays["notes"]))
        kinds.setdefault(tuple(notes[key] for key in ("name", "budget", "skip_budget", "choices")), []).append(arrays)
    timed = min((k for _, k, *_ in kinds), key=lambda k: abs(k - r.shape.n_layer / 3)), None, "sb"
    saved = time_saved(r, folder, [json.loads(str(of[0]["notes"])) for kind, of in kinds.items() if kind[1:] == timed],
                       windows)
    for kind, of_seeds in kinds.items():
        seeds = [json.loads(str(arrays["notes"]))["seed"] for arrays in of_seeds]
        for row in claims.router_rows(averaged(of_seeds), base, contexts, {}, flops):
            here = dict(claims.by_domain(of_seeds[0]))[row["domain"]]
            losses = [float(arrays["losses"][here].mean(dtype=np.float64)) for arrays in of_seeds]
            big = [float((arrays["routes"][here] == BIG).sum(-1).mean()) for arrays in of_seeds]
            report.append({key: row[key] for key in KEPT} | {
                "time_saved": saved.get(kind[0]) if kind[1:] == timed else None,
                "seeds": seeds, "achieved": statistics.mean(big), "loss_of_seeds": losses, "big_of_seeds": big})
    write_atomic(Path(config.out_dir) / "router_table.json", json.dumps(claims.without_nan(report), indent=1).encode())
    print(f"{len(report)} rows: {config.out_dir}/router_table.json")


if __name__ == "__main__":
    main()
