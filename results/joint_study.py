"""The runs behind *_joint*.json: python results/joint_study.py [preset] [k] writes
out/joint_study/<preset>_joint_k<k>.json. With --seed=2 it makes that seed's runs and no file: one process per seed,
say, and then the plain command, which finds them all finished.

For each seed, on equal training text: router and base trained together at k; a dense model with as many FLOPs per
token as that one spends on validation text (its router's included); the full dense model. With "any" for k, one base
for any budget, of the first seed, against the full dense model. Losses are paired: the same validation tokens for all.

A run that is finished leaves its losses.json (results/losses.py) and is not trained again; that file is all that the
comparison reads. So runs may be made on several machines and only these files be brought together, as in results/h100:
python results/joint_study.py gpu --out_dir=results/h100/joint
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
    flags.add_argument("k", nargs="?", default="4")
    flags.add_argument("--out_dir", default="out/joint_study")
    flags.add_argument("--device", default="auto")
    flags.add_argument("--seed", type=int, default=0, help="of the runs to make; 0: all seeds, and the comparison")
    return flags


def made(main, out_dir, device, *flags):
    """Train into out_dir, or go on there, and measure; what is finished stays -> its losses.json. The script ends
    where it is interrupted. main=None: nothing is trained, and a run that is missing is a UserError."""
    path = out_dir / "losses.json"
    if not path.exists():
        if main is None:
            raise UserError(f"{path}: is missing; `python results/joint_study.py` makes it")
        if main([*flags, "--resume", f"--out_dir={out_dir}", f"--device={device}"]):
            sys.exit(130)
        losses.main([str(out_dir), f"--device={device}"])
    return json.loads(path.read_text())


def equal_run(out, preset, seed, flops, flops_full):
    """-> the folder of a dense run that costs `flops` per token: one that is there already and costs at most 0.5% more,
    else one of the inner width with which every token BIG costs that (FLOPs are linear in it)."""
    config = train.TrainConfig(**train.PRESETS[preset])
    shape = train.model_shape(config, 64)
    unit = 6 * shape.n_embd * shape.n_layer  # FLOPs of a unit of width
    width = round(shape.big_width + (flops - flops_full) / unit)
    for there in sorted(out.glob(f"{preset}_width*_s{seed}")):
        more = unit * (int(there.name.split("_")[1].removeprefix("width")) - width)
        if 0 <= more <= 0.005 * flops:
            return there
    return out / f"{preset}_width{width}_s{seed}"


def compare(run, losses):
    """run: says of which domain each sequence is; {name: [S]}, the first one against each other
    -> {domain: {name: [mean, low, high]}}, differences included"""
    first, *others = losses
    pairs = {f"{first} - {other}": losses[first] - losses[other] for other in others}
    domain = np.array(run["domain"])
    rows = {"all": np.full(len(domain), True)} | {name: domain == i for i, name in enumerate(run["domains"])}
    values = losses | pairs
    return {of: {name: interval(values[name][here]) for name in values} for of, here in rows.items()}


def study(config, preset, out, train_main=train.main, joint_main=router.main):
    """-> what the file says of k; None where only one seed's runs were asked for. train_main, joint_main: see made."""
    K, seeds, paired, made_of = int(config.k), [], [], []
    for seed in [config.seed] if config.seed else SEEDS:
        flags = [config.device, f"--preset={preset}", f"--seed={seed}"]
        joint = made(joint_main, out / f"{preset}_joint_k{K}_s{seed}", *flags, "--joint", f"--budget={K}")
        full = made(train_main, out / f"{preset}_full_s{seed}", *flags, "--train_route=big")
        folder = equal_run(out, preset, seed, joint["flops"][f"k{K}"], full["flops"]["big"])
        width = folder.name.split("_")[1].removeprefix("width")
        equal = made(train_main, folder, *flags, "--train_route=big", f"--big_width={width}")
        if len({(run["windows"], run["fingerprint"]) for run in (joint, full, equal)}) > 1:
            raise UserError(f"{out}: the runs of seed {seed} are about different text; make them on one corpus")
        made_of += [full, joint, equal]
        runs = {"joint": (joint, f"k{K}"), "equal": (equal, "big"), "full": (full, "big")}
        paired.append({name: np.array(run["losses"][of]) for name, (run, of) in runs.items()})
        seeds.append({"seed": seed, "big_per_token": joint["big_per_token"][f"k{K}"],
                      "big_by_layer": joint["big_by_layer"][f"k{K}"], "big_width_equal": int(width),
                      "flops": {name: run["flops"][of] for name, (run, of) in runs.items()},
                      "loss": compare(full, paired[-1])})
    if config.seed:
        return None
    over = {name: np.mean([each[name] for each in paired], 0) for name in paired[0]}
    spread = {f"joint - {name}": statistics.stdev((each["joint"] - each[name]).mean() for each in paired)
              for name in ("equal", "full")}
    return about(*made_of) | {"k": K, "seeds": seeds, "mean_over_seeds": compare(full, over),
                              "standard_deviation_over_seeds": spread}


def study_of_any(config, preset, out):
    """-> what the file says of one base for any budget."""
    flags = [config.device, f"--preset={preset}", f"--seed={SEEDS[0]}"]
    many = made(router.main, out / f"{preset}_any_s{SEEDS[0]}", *flags, "--joint", "--budget=any")
    full = made(train.main, out / f"{preset}_full_s{SEEDS[0]}", *flags, "--train_route=big")
    return about(full, many) | {"any": [
        {"k": int(key[1:]), "big_per_token": many["big_per_token"][key], "flops": many["flops"][key],
         "loss": compare(full, {"any": np.array(losses), "full": np.array(full["losses"]["big"])})}
        for key, losses in sorted(many["losses"].items(), key=lambda item: int(item[0][1:]))]}


def about(*runs):
    """How these runs, on the same text, were made."""
    made = {key: ", ".join(sorted({run[key] for run in runs})) for key in ("device", "torch", "commit")}
    return made | {"sequences": len(runs[0]["domain"])}


def main(argv=None):
    config = parser().parse_args(argv)
    if config.k != "any" and not config.k.isdigit():
        raise UserError(f"{config.k}: give BIG per token as a whole number, say 4, or any")
    if config.seed not in (0, *SEEDS) or config.seed and config.k == "any":
        raise UserError(f"--seed={config.seed}: choose from {', '.join(map(str, SEEDS))}; with any leave it out")
    preset = config.preset
    if preset == "auto":
        preset = "gpu" if find_device(config.device).type == "cuda" else "cpu"
    out = Path(config.out_dir)
    write(config.k, preset, out, (study_of_any if config.k == "any" else study)(config, preset, out))


def write(k, preset, out, result):
    if result is not None:
        for seed in result.get("seeds", ()):
            print(f"seed {seed['seed']}: " + ", ".join(f"{name} {part[0]:.4f}" for name, part in
                                                       seed["loss"]["all"].items()))
        for name, part in result.get("mean_over_seeds", {}).get("all", {}).items():
            print(f"mean over seeds, {name}: " + "{:.4f} ({:.4f} to {:.4f})".format(*part))
        name = "any" if k == "any" else f"k{k}"
        result = {"command": f"python results/joint_study.py {preset} {k}", "preset": preset} | result
        write_atomic(out / f"{preset}_joint_{name}.json", json.dumps(result, indent=1).encode())
        print(f"done: {out}/{preset}_joint_{name}.json")


def collect(k, preset, out):
    """The file for k from what is there; nothing is trained. Raises UserError for the first run that is missing."""
    write(k, preset, out, study(parser().parse_args([preset, str(k)]), preset, out, None, None))


if __name__ == "__main__":
    run_script(main)
