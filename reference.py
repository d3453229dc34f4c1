"""The reference study: what RESULTS.md and the report say of the gpu preset, made again by one command.

    python reference.py --list             the steps, their expected minutes and commands; nothing is run
    python reference.py                    all of them, in order; what is finished is skipped, what was cut goes on
    python reference.py --only=seed2       those whose name begins so: on several GPUs, or machines, one seed each
    python reference.py --only=seed1/deep  that step alone, where it is the whole name of one
    python reference.py --only=collect     only the study's own files, from the steps that are finished

It is a plain list of this project's own commands. A step may need earlier ones of its seed, none of another seed, so
seed1, seed2 and seed3 may run side by side (but no step twice at once). A step that is cut off goes on by the same
command, for each of these scripts resumes. Of one seed, in order:
    train .. analyze    the base and its dense reference, oracle (3 ways on a sample), routers, zoo, F1..F12
    dense.., noskip     Fig. 8: dense models with the FLOPs of Duo at a share of BIG; Duo that never skipped
    joint_k..           router and base together against dense models (results/joint_study.py)
    narrow, wide, ..    widths 256, 512 and 6, 24 layers, at fixed tokens per parameter, their oracles by dp; 6 and 24
                        layers at equal steps, too (shallow_long, deep_short)

Files under --out_dir: steps/<step>.log, its output; steps/<step>.json, where it is finished: {command, preset, minutes,
device, commit, torch}; of each training losses.json (results/losses.py), of each oracle by dp gains_<criterion>.json:
all that comparisons need. Made at the end from what the runs left, of the base seeds that have it: findings.json and
zoo.json, each claim with its effect on every base seed; oracle.json and routers.json, gains over fixed patterns on
every base seed; joint/*_joint_*.json; ablations.json: Duo against dense models
(paper, Fig. 8), without skips and freeze-then-small, and the oracle's gain against size (the default corpus holds 45 M
tokens: the larger a model, the more often it sees them). Minutes are estimates for one H100, the gpu preset, with
nothing else on it, guessed from runs that shared H100s and H200s (results/h100/log.json).
"""
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import claims
import train
from common import UserError, arg, commit, find_device, open_out_dir, parse_config, run, write_atomic
from model import DuoGPT
from results import joint_study, losses

ROOT = Path(__file__).parent
SEEDS = (1, 2, 3)
SHARES = (0.0, 0.25, 0.5, 0.75)  # of BIG, where Fig. 8 compares Duo with a dense model; at 1 that is the full one
BUDGETS = (4, 2, 6)  # of joint training
SIZES = {"base": (1, 1), "narrow": (2 / 3, 1), "wide": (4 / 3, 1), "shallow": (1, 1 / 2), "deep": (1, 2),
         "shallow_long": (1, 1 / 2), "deep_short": (1, 2)}  # of the scale ablation: the preset's width and layers times
SAME_STEPS = ("shallow_long", "deep_short")  # as many as the base, not as many tokens per parameter: is it the depth?


@dataclass
class ReferenceConfig:
    out_dir: str = arg("out/reference_study", "folder of all its runs")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; handed on to each step")
    seed: int = arg(1, "seeds the routes that the ablations are evaluated on; the base seeds are 1, 2 and 3")
    preset: str = arg("gpu", "gpu, or another to try the study at its size")
    only: str = arg("", "the step of that name, else all whose name begins so")
    list: bool = arg(False, "print the steps and their minutes, run nothing")


PRESETS = {name: {} for name in train.PRESETS}


# ---------------------------------------------------------------------------------------------------------------------
# the steps

def sized(preset, size):
    """-> TrainConfig of a size of the scale ablation: as wide as its heads, of the preset's head width."""
    base = train.TrainConfig(**train.PRESETS[preset])
    width, depth = SIZES[size]
    n_head = round(base.n_head * width)
    return replace(base, n_head=n_head, n_embd=n_head * base.n_embd // base.n_head, n_layer=round(base.n_layer * depth))


def n_parameters(config):
    """Of the blocks, without embeddings; on the meta device nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in DuoGPT(train.model_shape(config, 64)).blocks.parameters())


def times_base(preset, size):
    """-> how often a size has the parameters of the preset's own"""
    return n_parameters(sized(preset, size)) / n_parameters(sized(preset, "base"))


def steps_of(preset, size):
    """-> training steps: of fixed tokens per parameter, but where depth alone is to differ."""
    return round(sized(preset, "base").max_steps * (1 if size in SAME_STEPS else times_base(preset, size)))


def dense_width(config, share):
    """-> the inner width at which all-BIG costs the FLOPs of Duo with that share of BIG: FLOPs are linear in it."""
    shape = train.model_shape(config, 64)
    return round(shape.small_width + share * (shape.big_width - shape.small_width))


def steps(preset):
    """-> [(name, expected minutes, command)]: the study. {out} in a command stands for --out_dir."""
    found, base = [], sized(preset, "base")

    def add(step, minutes, script, folder, **flags):
        flags = {"out_dir": f"{{out}}/{folder}", "preset": preset} | flags
        found.append((step, minutes, [script, *(f"--{key}={value}" for key, value in flags.items()),
                                      *["--resume"] * (script == "train.py")]))

    # The scripts' own plans would take hours a seed. The oracle's sequences are a part of the routers': paired.
    gpu = preset == "gpu"
    few, of_oracle, of_routers = ({"steps": 300}, {"tokens": 16384}, {"tokens": 32768}) if gpu else ({}, {}, {})
    times = {size: times_base(preset, size) for size in SIZES}

    def shape(size):
        config = sized(preset, size)
        return {"n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer,
                "max_steps": steps_of(preset, size)}

    for seed in SEEDS:
        me, mine = f"seed{seed}", {"seed": seed}
        reference = {"reference": f"{{out}}/{me}_reference"}
        add(f"{me}/train", 2, "train.py", me, **mine)
        # The stronger the reference, the more of what could be foreseen it sees: it has the wide size and its tokens.
        add(f"{me}/reference", 3, "train.py", f"{me}_reference", train_route="big", seed=seed + 100, **shape("wide"))
        add(f"{me}/oracle", 5, "oracle.py", me, **reference, **of_oracle)
        add(f"{me}/routers", 5, "router.py", me, **mine, **few, **of_routers)
        add(f"{me}/zoo", 7, "router.py", me, name="all", budget="4", **mine, **few, **of_routers)
        add(f"{me}/zoo_budgets", 4, "router.py", me, name="rmoe,rmoe_np,tryage,token_id,glider,lora_mixer,lora_single",
            budget="2,8", **mine, **few, **of_routers)
        add(f"{me}/effects", 2, "effects.py", me, **of_routers)
        add(f"{me}/dense", 2, "train.py", f"{me}_dense", train_route="big", **mine)
        add(f"{me}/freeze", 2, "train.py", f"{me}_freeze", train_route="big_then_small", **mine)
        add(f"{me}/analyze", 1, "analyze.py", me, dense=f"{{out}}/{me}_dense", freeze=f"{{out}}/{me}_freeze")

        for share in SHARES:
            add(f"{me}/dense{share:g}", 1, "train.py", f"{me}_dense{share:g}", train_route="big",
                big_width=dense_width(base, share), **mine)
        add(f"{me}/noskip", 2, "train.py", f"{me}_noskip", skip_every=0, **mine)
        for k in BUDGETS:
            found.append((f"{me}/joint_k{k}", 3, ["results/joint_study.py", preset, str(k), "--out_dir={out}/joint",
                                                  f"--seed={seed}"]))
        for size in SIZES:
            folder = me if size == "base" else f"{me}_{size}"
            if size != "base":
                minutes = 1 + times[size] * steps_of(preset, size) / base.max_steps
                add(f"{me}/{size}", minutes, "train.py", folder, **shape(size), **mine)
            for criterion in ("label", "expected"):  # 24 layers have too many routes to try all, so dp for every size
                add(f"{me}/{size}_{criterion}", 0.5 + times[size] / 2, "oracle.py", folder, search="dp",
                    context="frozen", criterion=criterion, **reference, **of_oracle)
    return found


def record(out, name, suffix="json"):
    """A file for each step: processes that work side by side have none in common."""
    return out / "steps" / f"{name.replace('/', '_')}.{suffix}"


def finished(out, planned):
    """-> {name: its record} of those steps. Raises UserError where one was made by another command than today's."""
    found = {}
    for name, _, command in planned:
        path = record(out, name)
        if path.exists():
            found[name] = json.loads(path.read_text())
            if found[name]["command"] != command:
                raise UserError(f"{path}: was made by `python {shlex.join(found[name]['command'])}`, which is not this "
                                "study's command; choose another --out_dir, or delete this file and what it made")
    return found


def execute(command, log):
    """Run a command, its output to the end of `log` -> its exit code, and whether we were told to stop meanwhile. The
    step then saves and leaves by itself, and we wait for that. (Ctrl-C reaches it, too; SIGTERM is handed on.)"""
    stopped = []
    with open(log, "ab") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def stop(number, _):
        stopped.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)
    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait(), bool(stopped)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def last_line(log):
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output").split("\r")[-1]


# ---------------------------------------------------------------------------------------------------------------------
# from the runs to the study's own files

def finished_seeds(config, *files):
    """-> the base seeds that have all these files, each given as what follows the seed's number in its path."""
    return [seed for seed in SEEDS if all((Path(config.out_dir) / f"seed{seed}{file}").exists() for file in files)]


def of_one_text(config, seeds, file, base):
    """-> the content of `file` of each seed's run. Raises UserError where one is about other text than `base` of the
    first seed: all are paired with that one, sequence by sequence."""
    paths = [Path(config.out_dir) / f"seed{seed}{file}" for seed in seeds]
    found = [json.loads(path.read_text()) for path in paths]
    if seeds:
        first = Path(config.out_dir) / f"seed{seeds[0]}{base}"
        windows = json.loads(first.read_text())["windows"]
    for path, content in zip(paths, found, strict=True):
        if content["windows"] != windows:
            raise UserError(f"{path}: is about other text than {first}; make both on one corpus, or move it away")
    return found


def losses_of(config, seeds, ending=""):
    """-> for each seed {routes: losses per sequence [S]}, of its run whose folder ends so (results/losses.py)"""
    return [{routes: np.array(values) for routes, values in content["losses"].items()}
            for content in of_one_text(config, seeds, f"{ending}/losses.json", "/losses.json")]


def over_seeds(seeds, first, second):
    """Two lists of losses [S], one array a base seed -> their means, and that of the difference: with its interval over
    sequences (paired, their mean over seeds), and its deviation over seeds."""
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    return {"seeds": seeds, "sequences": len(gaps[0]),
            "losses": [[float(each.mean()) for each in side] for side in (first, second)],
            "difference": claims.interval(np.mean(gaps, 0)),
            "deviation_over_seeds": statistics.stdev(float(gap.mean()) for gap in gaps) if len(seeds) > 1 else None}


def fig8(config):
    """Duo at each share of BIG against the dense model of as many FLOPs."""
    found = []
    for share in (*SHARES, 1.0):
        ending = f"_dense{share:g}" if share < 1 else "_dense"
        seeds = finished_seeds(config, "/losses.json", f"{ending}/losses.json")
        if seeds:
            first = json.loads((Path(config.out_dir) / f"seed{seeds[0]}" / "losses.json").read_text())
            found.append({"p_big": share, "flops": first["flops"][f"0/{share:g}"], "duo - dense": over_seeds(
                seeds, [each[f"0/{share:g}"] for each in losses_of(config, seeds)],
                [each["big"] for each in losses_of(config, seeds, ending)])})
    return found


def against(config, ending):
    """Duo against the same training with one change, on all routes: of two choices, of three, of BIG and SKIP."""
    seeds = finished_seeds(config, "/losses.json", f"{ending}/losses.json")
    duo, other = losses_of(config, seeds), losses_of(config, seeds, ending)
    return [{"p_skip": float(routes.split("/")[0]), "p_big_of_the_rest": float(routes.split("/")[1]),
             "duo - other": over_seeds(seeds, [each[routes] for each in duo], [each[routes] for each in other])}
            for routes in (duo[0] if seeds else [])]


def keep_gains(path):
    """Of a dp oracle's file, what `scale` compares, beside its run, small enough to keep: gains_<criterion>.json,
    {losses: {budget: losses per sequence [S]} at any number of BIG, a sixth, a third, half and all; domain [S];
    windows, a hash of the text; the model's shape and checkpoint; how it was made}."""
    run = path.parent.parent
    with np.load(path) as file:
        L, labels, notes = file["routes"].shape[-1], file["labels"].tolist(), json.loads(str(file["notes"]))
        rows = {key: labels.index(key) for key in ("any", *map(str, (L // 6, L // 3, L // 2, L)))}
        kept = {"losses": {key: file["losses"][row].mean(-1, dtype=np.float64).round(7).tolist()
                           for key, row in rows.items()}, "domain": file["domain"].tolist(), "n_layer": L,
                "n_embd": json.loads((run / "config.json").read_text())["n_embd"],
                "windows": losses.text_hash(file["idx"]),
                "checkpoint": str(file["checkpoint"])} | {key: notes[key] for key in ("command", "device", "torch")}
        write_atomic(run / f"gains_{file['criterion']}.json", json.dumps(kept).encode())


def scale(config):
    """The oracle's gain over all-BIG for each size, nats, and what of it could be foreseen (the expected-loss
    oracle's): dp, frozen context, at any number of BIG and at a sixth, a third and half of the layers."""
    found = []
    for size in SIZES:
        shape, ending = sized(config.preset, size), "" if size == "base" else f"_{size}"
        L, row = shape.n_layer, {}
        for criterion, name in (("label", "oracle"), ("expected", "expected-loss oracle")):
            file = f"{ending}/gains_{criterion}.json"
            seeds, runs = finished_seeds(config, file), []
            for kept in of_one_text(config, seeds, file, file):
                if (kept["n_layer"], kept["n_embd"]) != (L, shape.n_embd):
                    raise UserError(f"{config.out_dir}/seed*{file}: of {kept['n_layer']} layers of width "
                                    f"{kept['n_embd']}, not the {config.preset} preset's; give --preset")
                runs.append({budget: np.array(values) for budget, values in kept["losses"].items()})
            row[f"all-BIG - {name}"] = {
                share: over_seeds(seeds, [each[str(L)] for each in runs], [each[k] for each in runs])
                for share, k in (("any", "any"), ("1/6", str(L // 6)), ("1/3", str(L // 3)), ("1/2", str(L // 2)))
                } if seeds else None
        if any(row.values()):
            found.append({"size": size, "n_layer": L, "n_embd": shape.n_embd, "parameters": n_parameters(shape),
                          "steps": steps_of(config.preset, size)} | row)
    return found


def f12(config, seed):
    """-> the claim about stage 1 as that seed's losses.json have it; None where they lack one."""
    if seed not in finished_seeds(config, *(f"{ending}/losses.json" for ending in ("", "_dense", "_freeze"))):
        return None
    duo, dense, freeze = (losses_of(config, [seed], ending)[0] for ending in ("", "_dense", "_freeze"))
    return claims.f12(duo["0/1"], dense["big"], duo["0/0.5"], freeze["0/0.5"]) | {
        "sequences": len(dense["big"]), "command": "python reference.py --only=collect"}


def by_keys(config, name, rows_of, keys):
    """rows_of(content, seed): the rows that count of that base seed's file of that name -> {their values of `keys`: the
    rows that share them, each with its base seed as `seed`}"""
    groups = {}
    for seed in finished_seeds(config, f"/{name}"):
        content = json.loads((Path(config.out_dir) / f"seed{seed}" / name).read_text())
        for row in rows_of(content, seed):
            groups.setdefault(tuple(row.get(key) for key in keys), []).append(row | {"seed": seed})
    return groups


def findings(config, name, keys=("id", "router")):
    """Each line of the base seeds' files of that name -> its effects, their spread, and one verdict: that of all seeds
    on which it was tested, where there are at least two; else undecided."""
    def lines(content, seed):
        own = f12(config, seed) if "id" in keys else None
        return content if own is None else [line for line in content if line["id"] != "F12"] + [own]

    found = []
    for same in by_keys(config, name, lines, keys).values():
        tested = [line for line in same if line["effect"] is not None]
        effects, verdicts = [line["effect"] for line in tested], {line["verdict"] for line in tested}
        agreed = len(verdicts) == 1 and len(tested) > 1
        found.append({key: same[0].get(key) for key in (*keys, "claim", "unit", "command")} | {
            "base_seeds": [line["seed"] for line in tested], "effects": effects, "cis": [line["ci"] for line in tested],
            "sequences": [line.get("sequences") for line in tested],
            "effect": statistics.mean(effects) if effects else None,
            "deviation": statistics.stdev(effects) if len(effects) > 1 else None,
            "verdicts": [line["verdict"] for line in tested],
            "verdict": verdicts.pop() if agreed else "undecided" if tested else "not tested"})
    return found


def over_bases(config, name, rows_of, keys, values, averaged=()):
    """As by_keys, but one row for each `keys`. Of each of `values`, (estimate, low, high) in a row: those of the seeds,
    their mean, and the widest range that the seeds' intervals span; of `averaged`, a number in a row, the mean."""
    found = []
    for key, rows in by_keys(config, name, rows_of, keys).items():
        line = dict(zip(keys, key, strict=True)) | {"base_seeds": [row["seed"] for row in rows],
                                                    "sequences": [row["sequences"] for row in rows]}
        line |= {value: statistics.mean(row[value] for row in rows) for value in averaged}
        for value in values:
            parts = [[claims.number(end) for end in row[value]] for row in rows if row.get(value)]
            if len(parts) == len(rows):  # of every seed, in the order of base_seeds
                line[value] = {"mean": statistics.mean(part[0] for part in parts), "of_seeds": parts,
                               "range": [min(part[1] for part in parts), max(part[2] for part in parts)]}
        found.append(line)
    return found


def oracle_rows(content, _):
    """Of an oracle.json, at each k: what the oracle gains over the best fixed pattern, and what that is made of."""
    return [row for row in content["controls"].get("sequential", []) if row["domain"] == "all"]


def router_rows(content, seed):
    """Of a routers.json, routers of the study's own seed: their loss minus baselines of equal spending."""
    return [row | row["versus"] for row in content  # not the losses of these baselines, which a row has, too
            if (row["domain"], row["choices"], row["seed"]) == ("all", "sb", seed)]


def collect(config):
    """Write what the finished runs are enough for, from the files that they leave; what there is of some seeds only
    says of which. Runs may have been made on several machines: of each its findings.json, zoo.json, losses.json or
    gains_*.json is enough (the last is made here, of oracle/*.npz), and nothing is run here."""
    out = Path(config.out_dir)
    for name in ("sb_frozen_dp.npz", "sb_frozen_dp_expected.npz"):  # those that the study's steps make
        for path in sorted(out.glob(f"seed*/oracle/{name}")):
            keep_gains(path)

    def write(path, result, *without):
        if not result:
            print(f"{path.name}: left out, for no seed has {', '.join(without)}")
            return
        write_atomic(path, json.dumps(claims.without_nan(json.loads(json.dumps(result))), indent=1).encode())
        print(f"done: {path}")

    write(out / "findings.json", findings(config, "findings.json"), "findings.json (python analyze.py)")
    write(out / "zoo.json", findings(config, "zoo.json", ("system",)), "zoo.json (python effects.py)")
    gains = over_bases(config, "oracle.json", oracle_rows, ("k",), ("gain", "foresight", "hindsight", "learnable"))
    write(out / "oracle.json", gains, "controls in oracle.json (python oracle.py --reference=...)")
    routed = over_bases(config, "routers.json", router_rows, ("name", "budget"), (
        "fixed", "best100_data_set", "all_big", "recovered"), ("flops",))
    write(out / "routers.json", routed, "routers.json (python router.py)")
    for k in BUDGETS:
        try:
            joint_study.collect(k, config.preset, out / "joint")
        except UserError as error:
            print(f"joint training at k = {k}: left out. {error}")
    ablations = {"fig8": fig8(config), "without_skips": against(config, "_noskip"),
                 "freeze_then_small": against(config, "_freeze"), "scale": scale(config)}
    for name in [name for name, part in ablations.items() if not part]:
        print(f"ablations.json: {name} left out, for no seed has all of its runs")
        del ablations[name]
    if ablations:
        ablations["runs"] = {path.parent.name: {key: value for key, value in json.loads(path.read_text()).items()
                                                if key in ("device", "torch", "commit")}
                             for path in sorted(out.glob("seed*/losses.json"))}
    write(out / "ablations.json", ablations, "losses.json beside those of the same training with a change")


# ---------------------------------------------------------------------------------------------------------------------
# command

def about(config):
    device = find_device(config.device)
    return {"preset": config.preset, "commit": commit(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}


def main(argv=None):
    config = parse_config(ReferenceConfig, argv, PRESETS)
    out, planned, here = Path(config.out_dir), steps(config.preset), about(config)
    done = finished(out, planned)
    chosen = ([step for step in planned if step[0] == config.only] or
              [step for step in planned if step[0].startswith(config.only)])
    collecting = "collect".startswith(config.only)
    if not chosen and not collecting:
        raise UserError(f"--only={config.only}: no step begins so; see `python reference.py --list`")
    commands = {name: [part.replace("{out}", str(out)) for part in command] for name, _, command in chosen}
    for name, minutes, _ in chosen:
        state = f"took {done[name]['minutes']:.1f}" if name in done else f"{minutes:.0f}"
        print(f"{name:<28}{state:>10} min   python {shlex.join(commands[name])}")
    left = [minutes for name, minutes, _ in chosen if name not in done]
    if chosen:
        print(f"{len(left)} of {len(chosen)} steps are left: about {sum(left):.0f} minutes on one H100, the gpu "
              f"preset. Here: {here['device']}, the {config.preset} preset")
    if config.list:
        return 0
    open_out_dir(out)
    if chosen:
        (out / "steps").mkdir(exist_ok=True)
    for number, (name, _, command) in enumerate(chosen, 1):
        if record(out, name).exists():
            continue
        print(f"{time.strftime('%H:%M')} {name} ({number} of {len(chosen)})", flush=True)
        start, log = time.time(), record(out, name, "log")
        script, *flags = commands[name]
        code, stopped = execute([sys.executable, str(ROOT / script), *flags, f"--device={config.device}"], log)
        if code == 0 and script == "train.py" and not stopped:  # all that a comparison of trainings needs
            folder = next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--out_dir="))
            code, stopped = execute([sys.executable, str(ROOT / "results/losses.py"), folder,
                                     f"--device={config.device}"], log)
        if code == 0:
            minutes = round((time.time() - start) / 60, 2)  # of this call: where it was cut, not all of it
            write_atomic(record(out, name), json.dumps({"command": command, "minutes": minutes} | here).encode())
        if stopped or code == 130:
            print(f"interrupted in {name}; the same command goes on from there", file=sys.stderr)
            return 130
        if code:
            raise UserError(f"{name}: ended with exit code {code}: {last_line(log)} (all of it: {log}); with that "
                            "mended, the same command goes on from there")
    if collecting:
        collect(config)
    return 0


if __name__ == "__main__":
    run(main)
