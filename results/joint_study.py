"""The runs behind *_joint.json: python results/joint_study.py [preset] [k] writes out/joint_study/<preset>_joint.json,
or, for another k than 4, <preset>_joint_k<k>.json. With --seed=2 it makes that seed's runs and no file: one process
per seed, say, and then the plain command, which finds them all finished.

For each seed, on equal training text: router and base trained together at k; a dense model with as many FLOPs per
token as that one spends on validation text (its router's included); the full dense model. At k = 4, for the first seed
also one base for any budget. What is finished is not trained again, so an interrupted study goes on, and the commands
below may be started by hand, two at a time. Losses are paired: the same validation tokens for all.
"""
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import router
import train
from claims import by_domain, interval
from common import Parser, find_device, load_run, write_atomic
from common import run as run_script
from model import BIG

SEEDS = (1, 2, 3)


def parser():
    flags = Parser(description=__doc__)
    flags.add_argument("preset", nargs="?", default="auto")
    flags.add_argument("k", nargs="?", type=int, default=4)
    flags.add_argument("--out_dir", default="out/joint_study")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--seed", type=int, default=0, help="of the runs to make; 0: all seeds, and the comparison")
    return flags


def run(main, out_dir, *flags):
    """Train into out_dir, or go on there; a finished run stays. The script ends where it is interrupted."""
    # router.py writes this file last. Measured once more, say on another device, its FLOPs and so the dense model's
    # width could come out a little different, and that would be one more training.
    if (out_dir / "routers.json").exists():
        return
    if main([*flags, "--resume", f"--out_dir={out_dir}"]):
        sys.exit(130)


@torch.no_grad()
def dense_losses(out_dir, file, device):
    """-> losses per sequence [S] of a dense run on the file's windows, and its FLOPs per token."""
    model = load_run(out_dir, device)[0]
    model.compute_dtype = torch.float32  # as routers are evaluated
    idx, targets = (torch.from_numpy(file[key]).to(device) for key in ("idx", "targets"))
    parts = [model(idx[i:i + 32], BIG, targets[i:i + 32], reduction="none")[1].double().mean(-1).cpu()
             for i in range(0, len(idx), 32)]
    return torch.cat(parts).numpy(), model.flops(BIG)


def routed(out_dir, k, seed):
    """-> what router.py measured: the npz file, losses per sequence [S], FLOPs per token, BIG per token."""
    with np.load(out_dir / "routers" / f"mlp_k{k}_s{seed}.npz") as file:
        file = dict(file)
    notes = json.loads(str(file["notes"]))
    return (file, file["losses"].mean(-1, dtype=np.float64), float(file["flops"].mean()) + notes["router_flops"],
            float((file["routes"] == BIG).sum(-1).mean()))


def equal_width(out_dir, flops):
    """-> the inner width with which every token BIG costs `flops`."""
    model, config, _ = load_run(out_dir, "cpu")
    rest = model.flops(BIG) - config.n_layer * 6 * config.n_embd * config.big_width
    return round((flops - rest) / (config.n_layer * 6 * config.n_embd))


def compare(file, losses):
    """{name: [S]}, the first one against each other -> {domain: {name: [mean, low, high]}}, differences included"""
    first, *others = losses
    pairs = {f"{first} - {other}": losses[first] - losses[other] for other in others}
    return {domain: {name: interval(values[here]) for name, values in (losses | pairs).items()}
            for domain, here in by_domain(file)}


def main(argv=None):
    config = parser().parse_args(argv)
    device, K = find_device(config.device), config.k
    preset = config.preset if config.preset != "auto" else "gpu" if device.type == "cuda" else "cpu"
    of_k = "" if K == 4 else f"_k{K}"
    out, seeds, losses = Path(config.out_dir), [], []
    for seed in [config.seed] if config.seed else SEEDS:
        joint, full = out / f"{preset}_joint{of_k}_s{seed}", out / f"{preset}_full_s{seed}"
        flags = [f"--preset={preset}", f"--seed={seed}", f"--device={config.device}"]
        run(router.main, joint, "--joint", f"--budget={K}", *flags)
        run(train.main, full, "--train_route=big", *flags)
        file, of_joint, flops, big = routed(joint, K, seed)
        width = equal_width(full, flops)
        equal = out / f"{preset}_width{width}_s{seed}"
        run(train.main, equal, "--train_route=big", f"--big_width={width}", *flags)
        (of_equal, flops_equal), (of_full, flops_full) = (dense_losses(folder, file, device)
                                                         for folder in (equal, full))
        losses.append({"joint": of_joint, "equal": of_equal, "full": of_full})
        by_layer = (file["routes"] == BIG).mean((0, 1)).round(3).tolist()
        seeds.append({"seed": seed, "big_per_token": big, "big_by_layer": by_layer, "big_width_equal": width,
                      "flops": {"joint": flops, "equal": flops_equal, "full": flops_full},
                      "loss": compare(file, losses[-1])})
        print(seed, seeds[-1]["loss"]["all"])
    many = out / f"{preset}_any_s{SEEDS[0]}"
    if K == 4 and config.seed in (0, SEEDS[0]):
        run(router.main, many, "--joint", "--budget=any", f"--preset={preset}", f"--seed={SEEDS[0]}",
            f"--device={config.device}")
    if config.seed:
        return
    over = {name: np.mean([each[name] for each in losses], 0) for name in losses[0]}
    spread = {f"joint - {name}": statistics.stdev((each["joint"] - each[name]).mean() for each in losses)
              for name in ("equal", "full")}
    result = {"command": " ".join(["python results/joint_study.py", preset, str(K)]), "preset": preset,
              "torch": torch.__version__,
              "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
              "k": K, "sequences": len(file["idx"]), "seeds": seeds, "mean_over_seeds": compare(file, over),
              "standard_deviation_over_seeds": spread}

    path = out / f"{preset}_joint{of_k}.json"
    write_atomic(path, json.dumps(result, indent=1).encode())
    if K != 4:
        return
    result["any"] = []
    for k in range(2, load_run(many, "cpu")[1].n_layer, 2):
        file, of_any, flops, big = routed(many, k, SEEDS[0])
        compared = compare(file, {"any": of_any, "full": losses[0]["full"], "equal at k=4": losses[0]["equal"]})
        result["any"].append({"k": k, "big_per_token": big, "flops": flops, "loss": compared})
    write_atomic(path, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run_script(main)
