"""From a run's files to every figure, a verdict on each of the paper's claims, and one page to explore: report.html.

    python analyze.py                                  figures/*.png, findings.json and report.html of the last run
    python analyze.py --slides                         slides/, to teach from: PNG files in 16:9, and slides.html
    python analyze.py --check                          do the raw files still say what findings.json says? (else exit 1)
    python analyze.py --dense=out/dense --freeze=out/frozen   F12 and figure 8: two runs trained apart, same tokens

Reads metrics.jsonl, oracle/*.npz, oracle.json, routers/*.npz, zoo.json, tokenizer.json and ckpt.pt of --out_dir; what
is not there is not drawn, and the report names the command that makes it. figures.py and zoo_figures.py draw, claims.py
judges (of zoo.py's systems effects.py did); here the files are read, and the page is put together from
report_template.html.

Files: out_dir/findings.json, a list of {id, claim, effect, ci, seeds, sequences, verdict, command, ...}: F1..F12, those
about routers once for each kind (`router`). verdict is holds, fails, undecided or not tested (then `missing` says
what is); sequences: how many the interval is over, the fewest where parts differ.
out_dir/figures/<name>.png. out_dir/report.html, one file, no network. out_dir/times.json: {checkpoint, device, batch,
times {policy: [median, quartiles] of its time / all-big's}}. out_dir/comparisons.npz: losses per sequence [S] of dense
and all_big, of freeze and joint, the hashes of those runs' checkpoints, and the command.
"""
import contextlib
import html
import io
import json
import math
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import claims
import data
import figures
import router
import slides
import story
import zoo_figures
from common import (
    UserError,
    arg,
    find_device,
    generator,
    load_run,
    open_out_dir,
    parse_config,
    read_jsonl,
    run,
    write_atomic,
)
from gates import Router
from model import BIG, SMALL
from oracle import file_hash, write_npz

TEMPLATE = Path(__file__).parent / "report_template.html"


@dataclass
class AnalyzeConfig:
    out_dir: str = arg("out", "folder of the run; its files are read, figures/, findings.json, report.html are written")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N; where times are measured")
    seed: int = arg(1, "seeds the random routes of --freeze")
    preset: str = arg("auto", "cpu, gpu or debug: how much text the explorer holds")
    check: bool = arg(False, "compare findings.json with the raw files, write nothing, exit 1 where they differ")
    slides: bool = arg(False, "draw the slides alone: slides/light/*.png, slides/dark/*.png and slides/slides.html")
    joint: str = arg("", "a *_joint_k4.json of results/joint_study.py, for the report's story")
    dense: str = arg("", "a run of train.py --train_route=big of the same size, for F12 and figure 8")
    freeze: str = arg("", "a run of train.py --train_route=big_then_small of the same size, for the same")
    sequences: int = arg(2, "validation sequences per domain in the token explorer")
    rounds: int = arg(7, "rounds of timing, all policies in turn in each; 0: do not measure")


PRESETS = {"gpu": {}, "cpu": {"sequences": 3}, "debug": {"sequences": 1, "rounds": 1}}
CLAIMS = {  # id: what it says, as claims.py says it, and which command makes its files
    "F1": ("the oracle is far below best-of-100 random", "oracle"),
    "F2": ("one BIG layer, well placed, beats all-big", "oracle"),
    "F3": ("the oracle is best near k=6 and beats all-big", "oracle"),
    "F4": ("fixed and router improve with k, the oracle turns", "router"),
    "F5": ("the router is nearer to best-of-100 than to the oracle", "router"),
    "F6": ("the oracle: late layers at k=4, even at k=6, early at k=8", "oracle"),
    "F7": ("the router: late layers at every budget", "router"),
    "F8": ("early positions use more BIG (the router)", "router"),
    "F8 (oracle)": ("early positions use more BIG (the unconstrained oracle)", "oracle"),
    "F9": ("a constant 4 beats ramps", "ramps"),
    "F10": ("skipping is not early exit, and skips attract skips", "skip"),
    "F11": ("difficulty is not loss", "oracle"),
    "F12": ("Duo at all-big is near dense; joint training beats freeze-then-small", "dense"),
}


# ---------------------------------------------------------------------------------------------------------------------
# reading

def commands(out_dir, preset):
    """-> {what is missing: the command that makes it}"""
    where, train = f"--out_dir={shlex.quote(str(out_dir))}", f"python train.py --preset={preset}"
    oracle, routers = f"python oracle.py {where}", f"python router.py {where}"
    return {"train": f"{train} {where}", "oracle": oracle, "routers": routers, "effects": f"python effects.py {where}",
            "router": f"{routers} --name=linear --budget=4,6,8",
            "ramps": f"{oracle} --budgets=4,6-2,2-6", "skip": f"{oracle} --choices=xb --budgets=6",
            "reference": f"{train} --train_route=big --seed=11 --out_dir=out/reference && "
                         f"{oracle} --reference=out/reference",
            "dense": f"{train} --train_route=big --out_dir=out/dense && "
                     f"{train} --train_route=big_then_small --out_dir=out/frozen && "
                     f"python analyze.py {where} --dense=out/dense --freeze=out/frozen"}


def load_model(folder, device):
    """-> model in float32, the rest of the checkpoint; None, {} where there is no checkpoint."""
    if not (folder / "ckpt.pt").exists():
        return None, {}
    model, _, rest = load_run(folder, device)
    model.compute_dtype = torch.float32
    return model.requires_grad_(False), rest


def search_file(files, choices, criterion, *labels):
    """The file of those choices and criterion that has all these budgets: sequential before frozen, then the one with
    most tokens -> arrays, {} where there is none"""
    fitting = [arrays for arrays in files.values() if figures.has(arrays, *labels)
               and str(arrays["choices"]) == choices and str(arrays["criterion"]) == criterion
               and str(arrays["search"]) == "exhaustive"]
    return max(fitting, key=lambda arrays: (str(arrays["context"]) == "sequential", arrays["idx"].size), default={})


def read(config):
    """-> the material that figures.py describes, and: checkpoint, model (or None), files, seed, facts, evaluated."""
    folder, device = Path(config.out_dir), find_device(config.device)
    if not folder.is_dir():
        raise UserError(f"--out_dir={config.out_dir}: no such folder; make a run with `python train.py "
                        f"--out_dir={config.out_dir}`")
    model, rest = load_model(folder, device)
    report = read_json(folder / "oracle.json", "python oracle.py")
    checkpoint = file_hash(folder / "ckpt.pt") if model else report.get("checkpoint", "")
    report = report if report.get("checkpoint") == checkpoint else {}
    metrics, found = read_jsonl(folder / "metrics.jsonl"), {}
    for file in sorted((folder / "oracle").glob("*.npz")) + sorted((folder / "routers").glob("*.npz")):
        found[f"{file.parent.name}/{file.stem}"] = claims.load(file, checkpoint)
    stale = [name for name, arrays in found.items() if not arrays]
    patterns = {context: found.pop(f"oracle/patterns_{context}", {}) for context in ("sequential", "frozen")}
    files = {name: arrays for name, arrays in found.items() if arrays and name.startswith("oracle/")}
    routers = {name.partition("/")[2]: arrays for name, arrays in found.items()
               if arrays and name.startswith("routers/")}
    most = max(routers.values(), key=lambda arrays: arrays["idx"].size, default={})  # all of the same windows
    routers = {name: arrays for name, arrays in routers.items() if np.array_equal(arrays["idx"], most["idx"])}
    L = next((arrays["routes"].shape[-1] for arrays in [*files.values(), *routers.values()]), 12)
    ks = [str(k) for k in range(L + 1)]
    label = search_file(files, "sb", "label", *ks) or search_file(files, "sb", "label")
    context = str(label["context"]) if label else "sequential"
    baseline = patterns[context] or next((arrays for arrays in patterns.values() if arrays), {})
    controls = report.get("controls", {}).get(context, [])
    controls = [row for row in controls if row["domain"] == "all"] or controls  # a corpus of one domain has no such row
    windows = most or max([*files.values(), {"idx": np.zeros(0)}], key=lambda arrays: arrays["idx"].size)
    start = next((line for line in metrics if line["kind"] == "start"), {"config": {}})
    trained = rest.get("train_config") or start["config"]
    made = {"folder": folder, "device": device, "model": model, "checkpoint": checkpoint, "metrics": metrics,
            "seed": trained.get("seed", report.get("seed")), "stale": stale, "files": files, "routers": routers,
            "all_patterns": patterns, "label": label, "skip": search_file(files, "xb", "label", "6"),
            "ramps": search_file(files, "sb", "label", "4", "6-2", "2-6"), "patterns": baseline,
            "expected": search_file({name: arrays for name, arrays in files.items()
                                     if str(arrays["context"]) == context}, "sb", "expected"),
            "patterns_context": next((name for name in patterns if patterns[name] is baseline), ""),
            "quality": report.get("quality", []), "controls_context": context,
            "controls": controls, "comparisons": {}, "times": {},
            "zoo": {line["system"]: line for line in read_json(folder / "zoo.json", "python effects.py")
                    if line["checkpoint"] == checkpoint},
            "windows": {key: windows[key] for key in ("idx", "targets", "domain", "domains")} if "domain" in windows
            else {"idx": np.zeros((0, 0), int), "domains": np.array([])},
            "commands": commands(config.out_dir, trained.get("preset", "auto")), "words": read_words(folder),
            "facts": {"layers": trained.get("n_layer", L), "width": trained.get("n_embd"),
                      "base seed": trained.get("seed"), "trained on": trained.get("corpus"),
                      "corpus fingerprint": rest.get("fingerprint", report.get("fingerprint")),
                      "checkpoint": checkpoint or None}}
    made["base"], made["contexts"] = baselines(made)
    return made


def read_json(path, command):
    """-> the file's content, {} where there is none. Raises UserError for a damaged one."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path}: is damaged; delete it, and make it again with `{command}`") from None


def read_joint(path):
    """--joint -> what results/joint_study.py wrote, {} where it was not given. Raises UserError for another file."""
    if not path:
        return {}
    try:
        study = json.loads(Path(path).read_text())
        story.joint({}, study)  # it has all that is told of it
        return study
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--joint={path}: is no file of results/joint_study.py; `python results/joint_study.py` makes "
                        "out/joint_study/<preset>_joint_k4.json") from None


def read_words(folder):
    """-> text of each token id; bytes that are no whole characters show as such. Ids where there is no vocabulary."""
    try:
        encoding = data.read_tokenizer((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return NoWords()
    return NoWords({i: encoding.decode_single_token_bytes(i).decode("utf-8", "replace")
                    for i in range(encoding.n_vocab)})


class NoWords(dict):
    """A vocabulary that knows no words: a token's number stands for it."""
    def __missing__(self, token):
        return f"<{token}>"


def baselines(made):
    """What routers are compared with, as router.py measures it (its cached file is used) -> base, contexts; the oracle
    and the expected-loss oracle beside them, of the same context."""
    windows, model, patterns = made["windows"], made["model"], made["patterns"]
    if not len(windows["idx"]):
        return {}, {}
    where = claims.shared(patterns, windows) if patterns else None
    if model:
        source = SimpleNamespace(  # what router.py asks of its Run
            exact=model, shape=model.config, device=made["device"], folder=made["folder"] / "oracle",
            checkpoint=made["checkpoint"], domains=[str(name) for name in windows["domains"]])
        tensors = (torch.from_numpy(windows["idx"]), torch.from_numpy(windows["targets"]), windows["domain"])
        base, contexts = router.baselines(source, tensors, *router.load_patterns(source))
    elif where is not None:
        base = {name: (losses.T, where) for name, losses in claims.baseline_losses(patterns).items()}
        base["all_big"] = (base["fixed"][0][:, -1:].repeat(base["fixed"][0].shape[1], 1), where)
        contexts = dict.fromkeys(base, made["patterns_context"])
    else:
        base, contexts = {}, {}
    oracle, context = claims.oracle_losses(made["folder"] / "oracle", made["checkpoint"], windows["idx"])
    base, contexts = base | oracle, contexts | dict.fromkeys(oracle, context)
    expected = made["expected"]
    rows = claims.shared(expected, windows) if expected else None
    if rows is not None:
        losses = np.full((len(rows), expected["routes"].shape[-1] + 1), np.nan)  # nan: a k that was not searched
        for k in range(losses.shape[1]):
            if figures.has(expected, str(k)):
                losses[:, k] = figures.lane(expected, str(k))[1].mean(-1)
        base["expected"], contexts["expected"] = (losses, rows), str(expected["context"])
    return base, contexts


# ---------------------------------------------------------------------------------------------------------------------
# measuring: time, and runs trained apart

def batch_losses(model, idx, targets, route, size=32):
    """-> losses per sequence [S], float64. route: an int, or [S, T, L]"""
    losses = []
    for i in range(0, len(idx), size):
        rows = slice(i, i + size)
        now = route if isinstance(route, int) else route[rows]
        device = model.cos.device
        loss = model(idx[rows].to(device), now if isinstance(now, int) else now.to(device), targets[rows].to(device),
                     reduction="none")[1]
        losses.append(loss.double().mean(-1).cpu())
    return torch.cat(losses).numpy()


def compare(made, config):
    """Losses of --dense and --freeze beside this run's on the same windows -> comparisons.npz's arrays. What was
    measured before for this checkpoint stays."""
    path = made["folder"] / "comparisons.npz"
    found = claims.load(path, made["checkpoint"])
    for flag, mine, route_of_k in (("dense", "all_big", False), ("freeze", "joint", True)):
        other_dir = getattr(config, flag)
        if not other_dir:
            continue
        model, idx = made["model"], torch.from_numpy(made["windows"]["idx"])
        if model is None or not len(idx):
            raise UserError(f"--{flag}={other_dir}: needs this run's checkpoint and evaluated text to compare with; "
                            f"make them with `{made['commands']['train']}` and `{made['commands']['oracle']}`")
        other, rest = load_model(Path(other_dir), made["device"])
        if other is None:
            raise UserError(f"--{flag}={other_dir}: no checkpoint here; make one with `{made['commands']['dense']}`")
        if other.config != model.config:
            raise UserError(f"--{flag}={other_dir}: has another shape than {config.out_dir}; train it with its flags")
        if rest["fingerprint"] != made["facts"]["corpus fingerprint"]:
            raise UserError(f"--{flag}={other_dir}: was trained on another corpus; train it on that of "
                            f"{config.out_dir}")
        schedule = {"dense": "big", "freeze": "big_then_small"}[flag]
        if rest["train_config"]["train_route"] != schedule:
            raise UserError(f"--{flag}={other_dir}: was trained with --train_route="
                            f"{rest['train_config']['train_route']}; give a run of --train_route={schedule}")
        targets, route, L = torch.from_numpy(made["windows"]["targets"]), BIG, model.config.n_layer
        if route_of_k:  # L / 2 BIG for each token, in random layers
            order = torch.rand(*idx.shape, L, generator=generator("cpu", config.seed, "analyze", "route"))
            route = torch.where(order.argsort(-1).argsort(-1) < L // 2, BIG, SMALL).to(torch.uint8)
        found |= {flag: batch_losses(other, idx, targets, route), mine: batch_losses(model, idx, targets, route),
                  f"{flag}_run": file_hash(Path(other_dir) / "ckpt.pt"), f"{flag}_seed": rest["train_config"]["seed"]}
        found |= {"checkpoint": made["checkpoint"], "command": "python analyze.py " + " ".join(sys.argv[1:])}
        write_npz(path, found)
    return found


def policies(made):
    """-> {name: route or router}, what is timed, on the label search's windows"""
    model, label, L = made["model"], made["label"], made["model"].config.n_layer
    chosen = made["patterns"]["patterns"][made["patterns"]["chosen"][0]] if made["patterns"] else None
    variants = {f"fixed {k}": [SMALL, BIG][k == L] if k in (0, L) else torch.from_numpy(chosen[k])
                for k in range(0, L + 1) if k in (0, L) or (k % 2 == 0 and chosen is not None)}
    variants |= {f"oracle {k}": torch.from_numpy(figures.lane(label, str(k))[0]) for k in range(2, L, 2)
                 if figures.has(label, str(k))}
    for name, group in figures.all_kinds(made).items():
        for budget, arrays in group.items() if name != "rewire" else ():  # it learns at test time: minutes
            notes = figures.notes_of(arrays)
            stem = router.stem(name, (budget, notes["skip_budget"]), notes["choices"], notes["seed"])
            path = made["folder"] / "routers" / f"{stem}.pt"
            if path.exists():
                variants[f"{name} {budget:g}"] = router.load_router(path, made["checkpoint"], model.config,
                                                                    made["device"])[0]
    return variants


@torch.no_grad()
def time_policies(made, rounds):
    """Forwards of the same batch under each policy, in turns -> what times.json holds. Measured once for a checkpoint
    and a set of policies; delete the file to measure again."""
    path, model, label = made["folder"] / "times.json", made["model"], made["label"]
    old = read_json(path, "python analyze.py")
    if old.get("checkpoint") != made["checkpoint"]:
        old = {}
    if not model or not label or not rounds:
        return old
    variants, L = policies(made), model.config.n_layer
    if set(old.get("times", {})) == set(variants):
        return old
    idx = torch.from_numpy(label["idx"][:64]).to(made["device"])
    cuda = made["device"].type == "cuda"
    routes = {name: route if isinstance(route, int) or callable(route) else
              (route if route.dim() == 1 else route[:64]).to(made["device"]) for name, route in variants.items()}
    seconds = {name: [] for name in variants}
    for turn in tqdm(range(rounds + 1), "timing", leave=False, disable=None):  # the first one warms up
        for name, route in routes.items():
            with route.attached(model) if isinstance(route, Router) else contextlib.nullcontext():
                start = time.perf_counter()
                model(idx, route)
                if cuda:
                    torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = {name: np.array(times) / np.array(seconds[f"fixed {L}"]) for name, times in seconds.items()}
    result = {"checkpoint": made["checkpoint"], "batch": "{} sequences of {} tokens".format(*idx.shape),
              "device": torch.cuda.get_device_name(made["device"]) if cuda else
              f"a CPU (threads: {torch.get_num_threads()})", "rounds": rounds,
              "times": {name: np.quantile(r, (0.5, 0.25, 0.75)).tolist() for name, r in ratios.items()}}
    write_atomic(path, json.dumps(result, indent=1).encode())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# findings

def find(made):
    """Every claim, from the raw files -> the lines of findings.json, in the order of CLAIMS."""
    found = {}

    def add(lines, text):
        for line in lines:
            found.setdefault((line["id"], line.get("router")), line | {"sequences": len(text)})
    searches = [arrays for arrays in made["files"].values() if str(arrays["choices"]) == "sb"
                and str(arrays["criterion"]) == "label" and str(arrays["search"]) == "exhaustive"]
    searches.sort(key=lambda arrays: (str(arrays["context"]) == "frozen", -arrays["idx"].size))
    for label in [made["label"]] * bool(made["label"]) + searches:  # a claim is taken from the first file that has it
        add(claims.find_claims(label, made["all_patterns"][str(label["context"])], {}), label["idx"])
        if figures.has(label, "0", "any"):
            small, free = (figures.lane(label, name)[1].astype(float) for name in ("0", "any"))
            add([claims.f11(small, free) | {"context": str(label["context"]),
                                            "command": figures.notes_of(label)["command"]}]
                if ("F11", None) not in found else [], label["idx"])
    add(claims.find_claims({}, {}, made["skip"]), made["skip"].get("idx", ()))
    if made["routers"]:
        # Without the checkpoint the fixed patterns' losses are known only where, and as, oracle.py measured them.
        whole = "fixed" in made["base"] and len(made["base"]["fixed"][1]) == len(made["windows"]["idx"])
        same = made["model"] or (whole and made["contexts"]["fixed"] == "sequential")
        base = {key: value for key, value in made["base"].items() if same and key != "expected"}
        for line in claims.router_findings(list(made["routers"].values()), base, made["contexts"], made["seed"]):
            known = [made["base"][policy][1] for policy in claims.COMPARED[line["id"]]]
            add([line], min([made["windows"]["idx"], *known], key=len))
    pairs = made["comparisons"]
    if pairs:
        line = claims.f12(*(pairs.get(key) for key in ("all_big", "dense", "joint", "freeze")))
        add([line | {"context": "sequential", "command": str(pairs["command"]),
                     "other_seeds": {key: int(pairs[key]) for key in pairs if key.endswith("_seed")}}],
            next(pairs[key] for key in ("all_big", "joint") if key in pairs))
    lines = []
    for id, (claim, what) in CLAIMS.items():
        mine = sorted((line for (other, _), line in found.items() if other == id),
                      key=lambda line: (line.get("router") != "linear", line.get("router")))
        lines += [line | {"seeds": [made["seed"]]} for line in mine] or [
            {"id": id, "claim": claim, "effect": None, "ci": [None, None], "seeds": [], "sequences": 0,
             "verdict": "not tested",
             "command": made["commands"][what], "missing": missing(made, id), "detail": None}]
    return json.loads(json.dumps(claims.without_nan(json.loads(json.dumps(lines, default=float)))))


def missing(made, id):
    """Why a claim could not be tested -> text"""
    label, L = made["label"], made["facts"]["layers"]
    if id in ("F1", "F2", "F3") and label and L <= 10:
        return f"the claim is about budgets up to 10; this model has {L} layers"
    if id in ("F4", "F5", "F7", "F8") and made["routers"]:
        if made["model"] is None and id in ("F4", "F5"):
            return "the checkpoint, which measures fixed patterns on the routers' text"
        return "routers of the budgets 4, 6 and 8, or an oracle of all budgets to compare with"
    return {"F9": "a search of the budgets 4, 6-2 and 2-6", "F10": "a search of {SKIP, BIG} routes with 6 skips",
            "F12": "a dense model and a freeze-then-small run of the same size"}.get(
        id, "routers" if CLAIMS[id][1] == "router" else "searches of all budgets, with baselines of the same context")


def differences(stored, fresh, path=""):
    """-> list of texts: where two JSON values differ; numbers may by rounding."""
    if isinstance(stored, dict) and isinstance(fresh, dict):
        return [text for key in sorted(stored.keys() | fresh.keys())
                for text in differences(stored.get(key, "nothing"), fresh.get(key, "nothing"),
                                        f"{path}.{key}" if path else key)]
    if isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        return [text for i, pair in enumerate(zip(stored, fresh)) for text in differences(*pair, f"{path}[{i}]")]
    both = [type(value) in (int, float) for value in (stored, fresh)]
    same = math.isclose(stored, fresh, rel_tol=1e-5, abs_tol=1e-6) if all(both) else stored == fresh
    return [] if same else [f"{path}: stored {stored!r}, recomputed {fresh!r}"]


def check(made, path):
    """-> exit code: 0 where findings.json says what the raw files say, else 1"""
    if not path.exists():
        raise UserError(f"{path}: nothing to check; make it with `python analyze.py --out_dir={path.parent}`")

    def by_name(lines):
        return {line["id"] + (f", {line['router']}" if "router" in line else ""): line for line in lines}
    stored = by_name(read_json(path, "python analyze.py"))
    found = differences(stored, by_name(find(made)))
    print("\n".join(found + [f"{path}: " + (f"{len(found)} differences" if found else "agrees with the raw files")]))
    return 1 if found else 0


def in_words(line):
    """A finding -> one sentence, computed: what the caption says about the paper"""
    who = line["id"] + (f", router {line['router']}" if "router" in line else "")
    if line["verdict"] == "not tested":
        return f"{who}: not tested here; missing: {line['missing']}."
    word = {"holds": "our run agrees", "fails": "our run disagrees", "undecided": "our run cannot tell"}
    return (f"{who}, “{line['claim']}”: {word[line['verdict']]} ({shown(line)}; {line['sequences']} sequences, "
            f"{line['context']} context, {seeds_of([line])}).")


def shown(line):
    if line["effect"] is None:
        return ""
    known = None not in line["ci"]
    return f"{line['effect']:+.3f} (" + ("{:+.3f} to {:+.3f}".format(*line["ci"]) if known else "no interval") + ")"


def seeds_of(lines):
    n = len({seed for line in lines for seed in line["seeds"]})
    return "one base seed" if n == 1 else f"{n} base seeds"


# ---------------------------------------------------------------------------------------------------------------------
# the page

def draw(made, findings):
    """Every figure that the files allow: PNG into figures/ -> [(name, title, caption, svg)], [(title, what is missing)]
    """
    drawn, lacking, folder = [], [], made["folder"] / "figures"
    folder.mkdir(exist_ok=True)
    for name, (title, function, ids) in tqdm((figures.FIGURES | zoo_figures.FIGURES).items(), "figures", leave=False,
                                              disable=None):
        try:
            figure, caption = function(made)
        except figures.Missing as error:
            lacking.append((title, str(error)))
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier state of the run
            continue
        caption = " ".join([caption, *(in_words(line) for line in findings if line["id"] in ids
                                       and line.get("router", "linear") in router.NAMES)])  # as in the figures
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=110)
        figure.savefig(svg, format="svg", dpi=110, transparent=True, metadata={"Date": None})
        figures.plt.close(figure)
        write_atomic(folder / f"{name}.png", png.getbuffer())
        drawn.append((name, title, caption, inline(svg.getvalue(), name, title)))
    return drawn, lacking


def inline(svg, name, title):
    """matplotlib's SVG file -> an element for the page: ids of its own, text in the page's colour, no metadata."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{name}-\2"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r"(?<![\d.])([1-9]\d*\.\d{2})\d+", r"\1", svg)  # hundredths of a point are enough (scales are < 1)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    style = f"min-width:{min(width, 620):.0f}px;max-width:{width * 1.3:.0f}px"
    return svg.replace(figures.INK, "currentColor").replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(title)}" style="{style}"', 1)


def router_order(item):
    """Of (file stem, arrays): the paper's router first, then the project's own, then zoo.py's; budgets by number."""
    stem, notes = item[0], figures.notes_of(item[1])
    return notes["name"] != "linear", notes["name"] not in figures.NAMES, notes["name"], notes["budget"], stem


def explorer(made, n):
    """The explorer's data: n sequences of each domain -> dict for JSON. Losses in thousandths of a nat; a route is one
    digit a layer, a sequence's routes stand in one string."""
    label, windows = made["label"], made["windows"]
    if not label or all("-" in str(name) for name in label["labels"]):  # ramps alone
        return {"sequences": []}
    where = claims.shared(label, windows)
    at_expected = claims.shared(label, made["expected"]) if made["expected"] else None
    rows = [row for d in range(len(label["domains"])) for row in np.flatnonzero(label["domain"] == d)[:n]]

    def lane(losses, routes):
        return {"loss": (1000 * losses.astype(float)).round().astype(int).tolist(),
                "route": "".join(map(str, routes.ravel()))}

    def lanes(arrays, row):
        return {str(name): lane(arrays["losses"][i][row], arrays["routes"][i][row])
                for i, name in enumerate(arrays["labels"]) if "-" not in str(name)}
    sequences = []
    for row in rows:
        routers = sorted([(stem, arrays) for stem, arrays in made["routers"].items() if where is not None
                          and not figures.is_control(figures.notes_of(arrays)["name"])], key=router_order)
        sequences.append({
            "domain": str(label["domains"][label["domain"][row]]), "start": made["words"][int(label["idx"][row, 0])],
            "tokens": [made["words"][int(i)] for i in label["targets"][row]], "oracle": lanes(label, row),
            "foresight": lanes(made["expected"], at_expected[row]) if at_expected is not None else {},
            "routers": {stem: lane(arrays["losses"][where[row]], arrays["routes"][where[row]])
                        for stem, arrays in routers}})
    return {"layers": int(label["routes"].shape[-1]), "context": str(label["context"]), "sequences": sequences,
            "router_context": "sequential"}


def contexts(line):
    """A finding's context, and that of what it is compared with where that is another"""
    own = line.get("context", "none")
    others = [f"{policy} {context}" for policy, context in line.get("baseline_contexts", {}).items() if context != own]
    return "; ".join([own, *others]).replace("best100_data_set", "best of 100")


def table(findings):
    """-> the findings as an HTML table, which a narrow screen shows as cards"""
    rows = []
    for line in findings:
        name = line["id"] + (f"<br><small>{html.escape(line['router'])}</small>" if "router" in line else "")
        more = html.escape(line["missing"] if line["verdict"] == "not tested" else
                           json.dumps(line["detail"], default=float))
        seeds = ", ".join(map(str, line["seeds"])) or "none"
        rows.append(
            f'<tr><th scope="row">{name}</th><td data-label="claim">{html.escape(line["claim"])}</td>'
            f'<td data-label="verdict"><span class="verdict {line["verdict"].replace(" ", "-")}">{line["verdict"]}'
            f'</span></td><td data-label="effect">{html.escape(shown(line)) or "none"}</td>'
            f'<td data-label="context">{html.escape(contexts(line))}</td>'
            f'<td data-label="sequences">{line["sequences"]}</td>'
            f'<td data-label="base seeds">{seeds}</td><td data-label="made by"><details><summary>command</summary>'
            f'<code>{html.escape(line["command"])}</code><p class="detail">{more}</p></details></td></tr>')
    return "\n".join(rows)


def zoo_table(lines):
    """-> the findings on zoo.py's systems as rows of an HTML table, in zoo_figures.py's order"""
    rows = []
    for system in [name for name in zoo_figures.SYSTEMS if name in lines]:
        line = lines[system]
        effect = f"{zoo_figures.shown(line)}, {line['unit']}; above 0 is better"
        rows.append(
            f'<tr><th scope="row">{system}</th><td data-label="claim">{html.escape(line["claim"])}</td>'
            f'<td data-label="verdict"><span class="verdict {line["verdict"]}">{line["verdict"]}</span></td>'
            f'<td data-label="effect">{html.escape(effect)}</td><td data-label="sequences">{line["sequences"]}</td>'
            f'<td data-label="routers">{zoo_figures.how_many_seeds(line)}</td>'
            f'<td data-label="the paper">{html.escape(line["paper"])}</td>'
            f'<td data-label="made by"><details><summary>command</summary><code>{html.escape(line["command"])}</code>'
            '</details></td></tr>')
    return "\n".join(rows) or '<tr><td colspan="8">None was measured in this run.</td></tr>'


def report(made, findings, drawn, lacking, data_of_explorer):
    """-> the page"""
    counts = {verdict: sum(line["verdict"] == verdict for line in findings)
              for verdict in ("holds", "fails", "undecided", "not tested")}
    tested = [line for line in findings if line["seeds"]]
    facts = [f"<div><dt>{key}</dt><dd>{html.escape(str(value))}</dd></div>" for key, value in made["facts"].items()
             if value is not None]
    verdicts = (f"Verdicts on the paper's twelve claims, those about routers once for each kind: {counts['holds']} "
                f"hold, {counts['fails']} fail, {counts['undecided']} undecided, {counts['not tested']} not tested. "
                + (f"All from {seeds_of(tested)}: intervals tell what other text would change, not what "
                   "another training would." if tested else ""))
    of_figures = {name: (
        f'<figure id="{name}"><h3>{html.escape(title)}</h3><div class="scroll" tabindex="0" role="group" '
        f'aria-label="{html.escape(title)}, scrolls sideways on a narrow screen">{svg}</div>'
        f"<figcaption>{code(caption)}</figcaption></figure>") for name, title, caption, svg in drawn}
    gaps = "\n".join(f"<li><b>{html.escape(title)}</b>: {code(text)}</li>" for title, text in lacking)
    told = "".join(f"<li>{code(sentence)}</li>" for sentence in story.tell(made, findings, made["joint"]))
    page = {"facts": "".join(facts), "story": told, "verdicts": html.escape(verdicts), "findings": table(findings),
            "figures": "\n".join(text for name, text in of_figures.items() if name not in zoo_figures.FIGURES),
            "zoo": zoo_table(made["zoo"]),
            "zoo_figures": "\n".join(text for name, text in of_figures.items() if name in zoo_figures.FIGURES),
            "missing": f"<ul>{gaps}</ul>" if lacking else "<p>Nothing: every figure is drawn.</p>",
            # "<" never stands in the data, so no token can end the script element
            "data": json.dumps(data_of_explorer, separators=(",", ":")).replace("<", "\\u003c")}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: page[match[1]], TEMPLATE.read_text())


def code(text):
    """Plain text with `commands` -> HTML"""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def draw_slides(made, config):
    """--slides: the pictures, and a line for each that is not there"""
    if not made["files"]:
        raise UserError(f"--slides: {config.out_dir} has no searches of its checkpoint to show; make them with "
                        f"`{made['commands']['oracle']}`")
    before = read_json(made["folder"] / "times.json", "python analyze.py")
    made["times_on"] = time_policies(made, config.rounds)
    made["times"] = made["times_on"].get("times", {})
    if before and made["times_on"] != before:
        print("times were measured anew, with today's routers; `python analyze.py` takes them into the report")
    drawn, lacking = slides.write(made, f"python analyze.py --slides --out_dir={shlex.quote(config.out_dir)}")
    for file, message in drawn:
        print(f"{file}: {message}")
    for name, text in lacking:
        print(f"not drawn: {name}: {text}")
    print(f"done: {len(drawn)} slides, light and dark; show them with\n{made['folder'] / 'slides' / 'slides.html'}")


@torch.no_grad()
def main(argv=None):
    config = parse_config(AnalyzeConfig, argv, PRESETS)
    for name, least in (("sequences", 1), ("rounds", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name}={getattr(config, name)}: must be {least} or more")
    if config.check and (config.dense or config.freeze or config.joint):
        raise UserError("--check: compares what is stored and measures nothing; leave out --dense, --freeze, --joint")
    if config.slides and (config.check or config.dense or config.freeze or config.joint):
        raise UserError("--slides: draws what is measured; leave out --check, --dense, --freeze and --joint")
    made = read(config)
    made["joint"] = read_joint(config.joint)
    folder = made["folder"]
    if config.slides:
        return draw_slides(made, config)
    made["comparisons"] = compare(made, config)
    if config.check:
        return check(made, folder / "findings.json")
    open_out_dir(folder)
    if made["stale"]:
        print(f"not of this checkpoint, left out: {', '.join(made['stale'])}")
    found = find(made)
    write_atomic(folder / "findings.json", json.dumps(found, indent=1).encode())
    made["times_on"] = time_policies(made, config.rounds)
    made["times"] = made["times_on"].get("times", {})
    drawn, lacking = draw(made, found)
    page = report(made, found, drawn, lacking, explorer(made, config.sequences))
    write_atomic(folder / "report.html", page.encode())
    for line in found:
        who = line["id"] + (f" ({line['router']})" if "router" in line else "")
        print(f"{who}: {line['verdict']}. {line['claim']}" + (f": {shown(line)}" if line["effect"] is not None else ""))
    for title, text in lacking:
        print(f"not drawn: {title}: {text}")
    print(f"done: {folder}/findings.json, {len(drawn)} figures in {folder}/figures/, and the report "
          f"({len(page.encode()) / 1e6:.1f} MB):\n{folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
