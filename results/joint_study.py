"""The runs behind *_joint.json: python results/joint_study.py [preset] [k] writes out/joint_study/<preset>_joint.json,
or, for another k than 4, <preset>_joint_k<k>.json. With --seed=2 it makes that seed's runs and no file: one process
per seed, say, and then the plain command, which finds them all finished.

For each seed, on equal training text: router and base trained together at k; a dense model with as many FLOPs per
token as that one spends on validation text (its router's included); the full dense model. At k = 4, for the first seed
also one base for any budget. Losses are paired: the same validation tokens for all. A run that is finished leaves its
losses.json (results/losses.py) and is not trained again; that file is all that the comparison reads, so runs may be
made on several machines and only these files brought together.
"""
import json
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import router
import train
from claims import interval
from common import Parser, UserError, find_device, write_atomic
from common import run as run_script
from results import losses

SEEDS = (1, 2, 3)


def parser():
    flags = Parser(description=__doc__)
    flags.add_argument("preset", nargs="?", default="auto")
    flags.add_argument("k", nargs="?", type=int, default=4)
    flags.add_argument("--out_dir", default="out/joint_study")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--seed", type=int, default=0, help="of the runs to make; 0: all seeds, and the comparison")
    return flags


def made(main, out_dir, device, *flags):
    """Train into out_dir, or go on there, and measure; what is finished stays -> its losses.json. The script ends
    where it is interrupted."""
    path = out_dir / "losses.json"
    if not path.exists():
        if main([*flags, "--resume", f"--out_dir={out_dir}", f"--device={device}"]):
            sys.exit(130)
        losses.main([str(out_dir), f"--device={device}"])
    return json.loads(path.read_text())


def equal_width(preset, flops, flops_full):
    """-> the inner width with which every token BIG costs `flops`: they are linear in it."""
    config = train.TrainConfig(**train.PRESETS[preset])
    shape = train.model_shape(config, 64)
    return round(shape.big_width + (flops - flops_full) / (6 * shape.n_embd * shape.n_layer))


def compare(domain, names, losses):
    """domain [S], names; {name: [S]}, the first one against each other -> {domain: {name: [mean, low, high]}},
    differences included"""
    first, *others = losses
    pairs = {f"{first} - {other}": losses[first] - losses[other] for other in others}
    rows = {"all": np.full(len(domain), True)} | {name: domain == i for i, name in enumerate(names)}
    values = losses | pairs
    return {of: {name: interval(values[name][here]) for name in values} for of, here in rows.items()}


def main(argv=None):
    config = parser().parse_args(argv)
    device, K = find_device(config.device), config.k
    preset = config.preset if config.preset != "auto" else "gpu" if device.type == "cuda" else "cpu"
    of_k = "" if K == 4 else f"_k{K}"
    out, seeds, paired = Path(config.out_dir), [], []
    for seed in [config.seed] if config.seed else SEEDS:
        flags = [config.device, f"--preset={preset}", f"--seed={seed}"]
        joint = made(router.main, out / f"{preset}_joint{of_k}_s{seed}", *flags, "--joint", f"--budget={K}")
        full = made(train.main, out / f"{preset}_full_s{seed}", *flags, "--train_route=big")
        key = f"k{K}"
        width = equal_width(preset, joint["flops"][key], full["flops"]["big"])
        equal = made(train.main, out / f"{preset}_width{width}_s{seed}", *flags, "--train_route=big",
                     f"--big_width={width}")
        if len({run["windows"] for run in (joint, full, equal)}) > 1:
            raise UserError(f"{out}: the runs of seed {seed} were measured on different text; make them on one corpus")
        runs = {"joint": (joint, key), "equal": (equal, "big"), "full": (full, "big")}
        paired.append({name: np.array(run["losses"][of]) for name, (run, of) in runs.items()})
        domain, names = np.array(full["domain"]), full["domains"]
        seeds.append({"seed": seed, "big_per_token": joint["big_per_token"][key],
                      "big_by_layer": joint["big_by_layer"][key], "big_width_equal": width,
                      "flops": {name: run["flops"][of] for name, (run, of) in runs.items()},
                      "loss": compare(domain, names, paired[-1])})
        print(seed, seeds[-1]["loss"]["all"])
    if K == 4 and config.seed in (0, SEEDS[0]):
        many = made(router.main, out / f"{preset}_any_s{SEEDS[0]}", config.device, f"--preset={preset}",
                    f"--seed={SEEDS[0]}", "--joint", "--budget=any")
    if config.seed:
        return
    over = {name: np.mean([each[name] for each in paired], 0) for name in paired[0]}
    spread = {f"joint - {name}": statistics.stdev((each["joint"] - each[name]).mean() for each in paired)
              for name in ("equal", "full")}
    result = {"command": " ".join(["python results/joint_study.py", preset, str(K)]), "preset": preset,
              **{key: full[key] for key in ("torch", "device", "commit")}, "k": K, "sequences": len(domain),
              "seeds": seeds, "mean_over_seeds": compare(domain, names, over), "standard_deviation_over_seeds": spread}
    if K == 4:
        result["any"] = [{"k": int(key[1:]), "big_per_token": many["big_per_token"][key], "flops": many["flops"][key],
                          "loss": compare(domain, names, {"any": np.array(many["losses"][key]), **{
                              name: paired[0][of] for name, of in (("full", "full"), ("equal at k=4", "equal"))}})}
                         for key in many["losses"]]
    write_atomic(out / f"{preset}_joint{of_k}.json", json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    run_script(main)
