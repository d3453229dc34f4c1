"""The reference study: what README and the report say of the gpu preset, made again by one command.

    python reference.py --list             the steps, their commands and expected minutes; nothing is run
    python reference.py                    all of them, in order; what is finished is skipped, what was cut goes on
    python reference.py --only=seed2       those whose name begins so: on several GPUs, or machines, one seed each
    python reference.py --only=collect     from the runs to findings.json (over base seeds) and ablations.json

It is a plain list of this project's own commands. A step that trains needs only the steps of its own name's first
part (scale also those of seed1, seed2 and seed3), so seed1, seed2, seed3, joint, dense and skip may run side by
side. A step that is cut off goes on by the
same command, for each of these scripts resumes; its output is in <out_dir>/logs/<step>.log.

Files under --out_dir: steps.json, {step: {command, minutes, device, commit, torch}}; findings.json, each claim with its
effect on every base seed; ablations.json: Duo at p(BIG) against dense models of equal FLOPs (paper, Fig. 8), and the
oracle's gain against size. Minutes are those of one H100 with nothing else on it.
"""
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import analyze
import claims
import data
import train
from common import UserError, arg, find_device, generator, load_run, parse_config, run, write_atomic
from model import BIG, DuoGPT, random_route

SEEDS = (1, 2, 3)
SHARES = (0.0, 0.25, 0.5, 0.75)  # of BIG, of which Fig. 8 compares Duo with a dense model; at 1 it is the full one
SIZES = {  # of the scale ablation: {name: flags}; the preset's own is seed1
    "width256": {"n_embd": 256, "n_head": 4}, "width512": {"n_embd": 512, "n_head": 8},
    "layers6": {"n_layer": 6}, "layers24": {"n_layer": 24},
}


@dataclass
class ReferenceConfig:
    out_dir: str = arg("out/reference_study", "folder of all its runs")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; handed on to each step")
    seed: int = arg(1, "seeds the routes of the ablations' evaluation; the base seeds are 1, 2 and 3")
    preset: str = arg("gpu", "gpu, or another to try the study at its size")
    only: str = arg("", "the steps whose name begins so")
    list: bool = arg(False, "print the steps and their minutes, run nothing")


PRESETS = {name: {} for name in train.PRESETS}


def train_config(preset, **changes):
    return dataclasses.replace(train.TrainConfig(**train.PRESETS[preset]), **changes)


def n_parameters(config):
    """Of the blocks, without embeddings; on the meta device nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in DuoGPT(train.model_shape(config, 64)).blocks.parameters())


def dense_width(config, share):
    """-> the inner width whose FLOPs are those of Duo with a share of BIG: FLOPs are linear in it."""
    shape = train.model_shape(config, 64)
    return round(shape.small_width + share * (shape.big_width - shape.small_width))


def steps(config):
    """-> [(name, expected minutes, command)]: the study."""
    out, preset, found = Path(config.out_dir), config.preset, []

    def add(step, minutes, script, out_dir, **flags):
        flags = {"out_dir": out / out_dir, "preset": preset, "device": config.device} | flags
        resume = ["--resume"] if script == "train.py" or "joint" in flags else []
        found.append((step, minutes, [script, *(f"--{key}={value}" for key, value in flags.items()), *resume]))
    for seed in SEEDS:
        base, mine = f"seed{seed}", {"seed": seed}
        add(f"{base}/train", 2, "train.py", base, **mine)
        add(f"{base}/reference", 2, "train.py", f"{base}_reference", train_route="big", seed=seed + 100)
        add(f"{base}/oracle", 10, "oracle.py", base, reference=out / f"{base}_reference")
        add(f"{base}/routers", 15, "router.py", base, **mine)
        add(f"{base}/zoo", 15, "router.py", base, name="all", budget="2,4,6,8", **mine)
        add(f"{base}/effects", 3, "effects.py", base)
        add(f"{base}/dense", 2, "train.py", f"{base}_dense", train_route="big", **mine)
        add(f"{base}/freeze", 2, "train.py", f"{base}_freeze", train_route="big_then_small", **mine)
        add(f"{base}/analyze", 2, "analyze.py", base, dense=out / f"{base}_dense", freeze=out / f"{base}_freeze")
    for share in SHARES:
        width = dense_width(train_config(preset), share)
        for seed in SEEDS:
            add(f"dense/{share:g}_seed{seed}", 1.5, "train.py", f"dense{share:g}_seed{seed}", train_route="big",
                big_width=width, seed=seed)
    for k in (4, 2, 6):
        found.append((f"joint/k{k}", 18, ["results/joint_study.py", preset, str(k)]))
    for seed in SEEDS:
        add(f"skip/none_seed{seed}", 2, "train.py", f"noskip_seed{seed}", skip_every=0, seed=seed)
    whole = n_parameters(train_config(preset))
    for name, flags in SIZES.items():
        own = train_config(preset, **flags)
        n_steps = round(own.max_steps * n_parameters(own) / whole)  # fixed tokens per parameter
        minutes = 2 * (n_parameters(own) / whole) ** 2
        for seed in SEEDS:
            add(f"scale/{name}_seed{seed}", minutes, "train.py", f"{name}_seed{seed}", max_steps=n_steps, seed=seed,
                **flags)
            # 24 layers have too many routes for exhaustive search; the same search for all sizes, so that they compare
            for criterion in ("label", "expected"):
                add(f"scale/{name}_{criterion}_seed{seed}", 2, "oracle.py", f"{name}_seed{seed}", search="dp",
                    context="frozen", criterion=criterion, reference=out / f"seed{seed}_reference")
    for seed in SEEDS:
        for criterion in ("label", "expected"):
            add(f"scale/base_{criterion}_seed{seed}", 2, "oracle.py", f"seed{seed}", search="dp", context="frozen",
                criterion=criterion, reference=out / f"seed{seed}_reference")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# from the runs to the study's own files

@torch.no_grad()
def losses_at(folder, shares, device, seed):
    """-> {share: losses per sequence [S]} of a run on its validation windows: random routes with that share of BIG,
    exact in each sequence and layer, as in training; None: all tokens BIG."""
    model, shape, rest = load_run(folder, device)
    corpus = data.load(Path(rest["corpus"]))
    own, result = train.TrainConfig(**rest["train_config"]), {}
    parts = [train.validation_windows(corpus, own, domain) for domain in corpus.domains]
    x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    for share in shares:
        route = BIG
        if share is not None:
            route = random_route(len(x), shape.block_size, shape.n_layer, 0.0, share,
                                 generator("cpu", seed, "reference", "route"))
        result[share] = analyze.batch_losses(model, x, y, route)
    return result


def fig8(config, device):
    """Duo at each share of BIG minus the dense model of as many FLOPs: mean over base seeds, paired on their text."""
    out, found = Path(config.out_dir), []
    duo = [losses_at(out / f"seed{seed}", (*SHARES, 1.0), device, config.seed) for seed in SEEDS]
    skips = [losses_at(out / f"noskip_seed{seed}", (*SHARES, 1.0), device, config.seed) for seed in SEEDS]
    for share in (*SHARES, 1.0):
        runs = [out / (f"dense{share:g}_seed{seed}" if share < 1 else f"seed{seed}_dense") for seed in SEEDS]
        dense = [losses_at(folder, (None,), device, config.seed)[None] for folder in runs]
        gaps = [mine[share] - other for mine, other in zip(duo, dense, strict=True)]
        without = [mine[share] - other[share] for mine, other in zip(duo, skips, strict=True)]
        found.append({"p_big": share, "duo": [float(mine[share].mean()) for mine in duo],
                      "dense": [float(other.mean()) for other in dense],
                      "duo - dense": claims.interval(sum(gaps) / len(SEEDS)),
                      "deviation over seeds": statistics.stdev(float(gap.mean()) for gap in gaps),
                      "duo - trained without skip": claims.interval(sum(without) / len(SEEDS))})
    return found


def scale(config):
    """The gain over all-BIG, nats, of the oracle and of the expected-loss oracle (what could be foreseen), for each
    size: dp, frozen context, at a sixth, a third and half of the layers BIG."""
    found = []
    for name in ("seed", *(f"{size}_seed" for size in SIZES)):
        for seed in SEEDS:
            folder = Path(config.out_dir) / f"{name}{seed}"
            with open(folder / "oracle.json") as file:
                report = json.load(file)
            shape = json.loads((folder / "config.json").read_text())
            L, gain = shape["n_layer"], {}
            for oracle, search in (("label", "sb_frozen_dp"), ("expected", "sb_frozen_dp_expected")):
                by_k = {row["budget"]: row["loss"] for row in report["searches"][search]["rows"]
                        if row["domain"] == "all"}
                gain[oracle] = {share: by_k[str(L)] - by_k[str(L // part)]
                                for share, part in (("1/6", 6), ("1/3", 3), ("1/2", 2))}
            found.append({"n_layer": L, "n_embd": shape["n_embd"], "seed": seed, "gain": gain})
    return found


def findings(config):
    """Each claim over the base seeds: effects, their spread, and one verdict (that of all seeds, or undecided)."""
    lines = [json.loads((Path(config.out_dir) / f"seed{seed}" / "findings.json").read_text()) for seed in SEEDS]
    found = []
    for line in lines[0]:
        same = [other for of_seed in lines for other in of_seed
                if (other["id"], other.get("router")) == (line["id"], line.get("router"))]
        tested = [other for other in same if other["verdict"] != "not tested"]
        effects, verdicts = [other["effect"] for other in tested], {other["verdict"] for other in same}
        found.append({key: line.get(key) for key in ("id", "claim", "router", "unit", "command")} | {
            "base_seeds": list(SEEDS), "effects": effects, "cis": [other["ci"] for other in tested],
            "effect": statistics.mean(effects) if effects else None,
            "deviation": statistics.stdev(effects) if len(effects) > 1 else None,
            "verdict": verdicts.pop() if len(verdicts) == 1 else "undecided"})
    return found


def collect(config):
    out, device = Path(config.out_dir), find_device(config.device)
    write_atomic(out / "findings.json", json.dumps(findings(config), indent=1).encode())
    ablations = {"fig8": fig8(config, device), "scale": scale(config), "seeds": SEEDS, "torch": torch.__version__,
                 "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    write_atomic(out / "ablations.json", json.dumps(claims.without_nan(ablations), indent=1).encode())
    print(f"done: {out}/findings.json and {out}/ablations.json")


def commit():
    """-> the commit that is checked out, with + where files differ from it; empty outside git."""
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(argv=None):
    config = parse_config(ReferenceConfig, argv, PRESETS)
    out = Path(config.out_dir)
    done_path = out / "steps.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    chosen = [step for step in steps(config) if step[0].startswith(config.only)]
    collecting = "collect".startswith(config.only) or config.only == "collect"
    if not chosen and not collecting:
        raise UserError(f"--only={config.only}: no step begins so; see `python reference.py --list`")
    for name, minutes, command in chosen:
        state = f"done in {done[name]['minutes']:.1f}" if name in done else f"{minutes:.1f}"
        print(f"{name:<32}{state:>14} min   python {' '.join(command)}")
    left = sum(minutes for name, minutes, _ in chosen if name not in done)
    print(f"about {left:.0f} minutes are left on an H100 ({len(chosen)} steps)")
    if config.list:
        return 0
    (out / "logs").mkdir(parents=True, exist_ok=True)
    device = find_device(config.device)
    about = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "commit": commit(),
             "torch": torch.__version__}
    for name, _, command in chosen:
        if name in done:
            continue
        print(name, flush=True)
        start, log = time.time(), out / "logs" / f"{name.replace('/', '_')}.log"
        with open(log, "ab") as file:
            code = subprocess.run([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            print(f"{name}: exit code {code}, see {log}; the same command goes on from here", file=sys.stderr)
            return 130 if code in (130, -2) else 1
        done = json.loads(done_path.read_text()) if done_path.exists() else {}  # another process may have added some
        done[name] = {"command": "python " + " ".join(command), "minutes": (time.time() - start) / 60} | about
        write_atomic(done_path, json.dumps(done, indent=1).encode())
    if collecting and all(name in done for name, *_ in steps(config)):
        collect(config)
    return 0


if __name__ == "__main__":
    run(main)
