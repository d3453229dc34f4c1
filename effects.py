"""What each of zoo.py's systems claims, measured on the last run: one number, its interval, a verdict.

    python router.py --name=all --budget=4,8     trains what is compared here
    python effects.py                            measures, and writes zoo.json
    python effects.py --name=rmoe,glider         these only

Each system has one function: here (RMoE, a state over depth; OpenMoE, what choices depend on), in effects_prompt.py
(Tryage, Arch-Router, GLIDER, which decide from the prompt) or in effects_adapt.py (Rewiring, LoRA-Mixer, which change
logits or weights). The function reads the routers of the run (and says which are missing), measures, and returns one
finding: the claim of the system's paper, our effect with its 95% bootstrap interval over sequences, a verdict by
claims.verdict, and in `detail` all that its figure draws. Files: out_dir/zoo.json, a list of findings.
"""
import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import claims
import data
import diagnosis
import effects_adapt
import effects_prompt
import router
from common import UserError, arg, parse_config, run, write_atomic
from effects_prompt import evenly, finding
from model import BIG, SMALL


@dataclass
class EffectsConfig:
    name: str = arg("", "which systems, comma separated; all where left out")
    out_dir: str = arg("out", "folder of the run; its ckpt.pt and routers/ are read")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    seed: int = arg(1, "seeds what is drawn here")
    preset: str = arg("auto", "sizes: cpu, gpu or debug")
    data_dir: str = arg("data", "where prepared corpora are kept")
    tokens: int = arg(0, "validation tokens per domain; 0: as planned")


PRESETS = {"gpu": {}, "cpu": {}, "debug": {}}


# ---------------------------------------------------------------------------------------------------------------------
# the run's routers

def evaluated(r, windows):
    """-> {name: {(budget, seed): arrays}}: routers/*.npz of this checkpoint and these windows, choices {SMALL, BIG}"""
    found = {}
    for file in sorted((Path(r.config.out_dir) / "routers").glob("*.npz")):
        arrays = claims.load(file, r.checkpoint)
        notes = json.loads(str(arrays["notes"])) if arrays else {}
        if notes.get("choices") == "sb" and np.array_equal(arrays["idx"], windows[0].numpy()):
            found.setdefault(notes["name"], {})[notes["budget"], notes["seed"]] = arrays
    return found


def common_keys(r, files, *names):
    """-> [(budget, seed), ...] at which all these routers are there. Raises UserError where there is none."""
    keys = set.intersection(*(set(files.get(name, {})) for name in names))
    if not keys:
        raise UserError(f"{r.config.out_dir}/routers: has no budget and seed with all of {', '.join(names)} on these "
                        f"windows; `python router.py --name={','.join(names)} --budget=4 --out_dir={r.config.out_dir}` "
                        "makes them")
    return sorted(keys)


def typical(r, budgets):
    """-> the one nearest to a third of the layers, where routes differ most: for what is drawn at one budget only"""
    return min(budgets, key=lambda k: abs(k - r.shape.n_layer / 3))


def fixed_losses(r, windows):
    """-> losses per sequence [S, L + 1] of the best fixed pattern of each k. Raises UserError without oracle.py's."""
    patterns, context = router.load_patterns(r)
    if not patterns:
        raise UserError(f"{r.folder}: has no patterns_*.npz, the fixed patterns that routers are compared with; "
                        f"`python oracle.py --out_dir={r.config.out_dir}` makes them")
    losses, rows = router.baselines(r, windows, patterns, context)[0]["fixed"]
    if len(rows) < len(windows[0]):
        raise UserError(f"--tokens: {r.folder} has the best fixed patterns for {len(rows)} of these {len(windows[0])} "
                        "sequences; leave it out, or run oracle.py with as many")
    return losses


def minus_fixed(arrays, fixed, ends):
    """-> columns [S, 2 + L + 1] per sequence, and the function of their means that is (loss - best fixed at the budget
    that was spent)."""
    columns = np.column_stack((arrays["losses"].mean(-1), claims.spending(arrays, ends), fixed))
    return columns, lambda m: m[..., 0] - claims.at_budget(m[..., 1], m[..., 2:])


def mean_of(parts):
    """[(columns, function), ...] -> (columns side by side, the mean of the functions, each of its own columns)"""
    edges = np.cumsum([0] + [columns.shape[1] for columns, _ in parts])

    def mean(m):
        return sum(f(m[..., a:b]) for (_, f), a, b in zip(parts, edges, edges[1:], strict=False)) / len(parts)
    return np.concatenate([columns for columns, _ in parts], 1), mean


def difference(first, second):
    """Two such pairs, of the same sequences -> the first minus the second, with its paired interval"""
    n = first[0].shape[1]
    return claims.interval(np.concatenate((first[0], second[0]), 1),
                           lambda m: first[1](m[..., :n]) - second[1](m[..., n:]))


# ---------------------------------------------------------------------------------------------------------------------
# RMoE

def rmoe(r, windows, config):
    """Does a state over depth help? rmoe against rmoe_np, the same network without it."""
    files = evaluated(r, windows)
    keys, fixed = common_keys(r, files, "rmoe", "rmoe_np"), fixed_losses(r, windows)
    budgets, ends = sorted({k for k, _ in keys}), (r.exact.flops(SMALL), r.exact.flops(BIG))
    kinds = [name for name in ("linear", "mlp", "rmoe_np", "rmoe_detach", "rmoe")
             if set(keys) <= set(files.get(name, {}))]
    versus = {(name, key): minus_fixed(files[name][key], fixed, ends) for name in kinds for key in keys}
    pairs = {(name, key): diagnosis.pairs(files[name][key]["routes"]) for name in kinds for key in keys}

    def over(table, name, budget=None, function=None, seed=None):
        """The mean over those seeds and budgets that are not given."""
        chosen = [table[name, key] for key in keys if budget in (None, key[0]) and seed in (None, key[1])]
        return mean_of([(part, function) for part in chosen] if function else chosen)

    def wider(m):
        mixed, independent = diagnosis.spread(m)
        return mixed / np.maximum(independent, 1e-9)
    gain = difference(over(versus, "rmoe_np"), over(versus, "rmoe"))
    # Two routers of different init differ by as much as this effect, and the interval is over sequences only: so the
    # claim holds where it holds for each seed by itself.
    by_seed = {seed: difference(over(versus, "rmoe_np", seed=seed), over(versus, "rmoe", seed=seed))
               for seed in sorted({seed for _, seed in keys})}
    detail = {"by_seed": by_seed, "kinds": kinds, "budgets": budgets,
              "parameters": {name: sum(w.numel() for w in router.new_router(
                  r.shape, saved_config(r, name, keys[0]), name, (keys[0][0], None)).parameters()) for name in kinds},
              "minus_fixed": {name: [claims.interval(*over(versus, name, k)) for k in budgets] for name in kinds},
              "rmoe_minus": {name: difference(over(versus, "rmoe"), over(versus, name))
                             for name in kinds if name != "rmoe"}}
    mutual = diagnosis.mean_cross_layer
    detail |= {"mutual_information": {name: [claims.interval(*over(pairs, name, k, mutual)) for k in budgets]
                                      for name in kinds},
               "rmoe_minus_np_mutual_information": difference(over(pairs, "rmoe", None, mutual),
                                                              over(pairs, "rmoe_np", None, mutual)),
               "spread": {name: [claims.interval(*over(pairs, name, k, lambda m: diagnosis.spread(m)[0]))
                                 for k in budgets] for name in kinds},
               "spread_over_independent": {name: [claims.interval(*over(pairs, name, k, wider)) for k in budgets]
                                           for name in kinds},
               "matrix_budget": typical(r, budgets), "matrix": {}, "big_per_token": {}}
    for name in kinds:
        here = [key for key in keys if key[0] == detail["matrix_budget"]]
        detail["matrix"][name] = np.mean([diagnosis.cross_layer(pairs[name, key].mean(0)) for key in here], 0)
        detail["big_per_token"][name] = np.mean([np.bincount(  # share of tokens with 0..L BIG
            (files[name][key]["routes"] == BIG).sum(-1).ravel(), minlength=r.shape.n_layer + 1) for key in here], 0
        ) / windows[0].numel()
    return finding("a router with a state over depth (RMoE) beats the same router without it", "enwik8, test bits per "
                   "byte: 1.116, against 1.123 with the state not passed, 1.133 with its gradient cut, 1.128 for a "
                   "linear router and 1.137 for an MLP of equal size", gain, "nats", list(by_seed),
                   len(fixed), detail, list(by_seed.values()))


# ---------------------------------------------------------------------------------------------------------------------
# OpenMoE

MOMENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of router training at which choices are compared
WATCHED = 32  # validation sequences on which they are


def openmoe(r, windows, config):
    """Its three findings: choices follow the token id, are settled early, and fail late tokens where places are few."""
    files = evaluated(r, windows)
    keys = common_keys(r, files, "linear", "token_id", "capacity")
    idx, _, domain = windows
    k = typical(r, [budget for budget, _ in keys])
    seeds = [seed for budget, seed in keys if budget == k]
    told = {}
    for name, of_kind in files.items():
        parts = [diagnosis.dependence(arrays["routes"], arrays["idx"], domain, r.shape.vocab_size, config.seed)
                 for (budget, _), arrays in of_kind.items() if budget == k]
        if parts:
            told[name] = average(parts)
    oracle = oracle_routes(r, k)
    if oracle:
        told["oracle"] = average([diagnosis.dependence(*oracle, r.shape.vocab_size, config.seed)])
    # The headline: of the linear router's uncertainty, what the token id tells, minus what the better of the two tells.
    # Not in layer 0, which reads the embedding alone: see diagnosis.share.
    saved = {x: values["saved"][:, 1:].sum(1) for x, values in told["linear"].items()}
    columns = np.stack((saved["token id"], saved["domain"], saved["position"],
                        told["linear"]["token id"]["needed"][:, 1:].sum(1)), 1)
    effect = claims.interval(columns, lambda m: (m[..., 0] - m[..., 1:3].max(-1)) / m[..., 3])
    detail = {"budget": k, "choices_told_by": {}}
    for name, variables in told.items():
        detail["choices_told_by"][name] = {}
        for x, values in variables.items():
            whole, layers = diagnosis.share(values["saved"], values["needed"])
            detail["choices_told_by"][name][x] = {"told": whole, "layers": layers} | {
                key: values[key] for key in ("information", "shuffled")}
    detail["table"] = gain_of_the_table(r, files, windows, k)
    detail["early"] = early_learning(r, windows, config, k, seeds[0])
    detail["drop"] = drop_towards_the_end(r, files, windows, k, seeds)
    return finding("choices follow the token id more than domain or position", "context-independent specialization, "
                   "early routing learning, drop towards the end (figures, no single number)", effect,
                   "share of the choices' entropy", seeds, len(idx), detail)


def average(parts):
    """Several diagnosis.dependence, of one kind's seeds -> their mean"""
    return {x: {key: np.mean([part[x][key] for part in parts], 0) for key in parts[0][x]} for x in parts[0]}


def oracle_routes(r, k):
    """-> routes [S, T, L], idx, domain of the label oracle at k, sequential where that was searched; None without"""
    for file in [*sorted(r.folder.glob("sb_sequential_exhaustive*.npz")), r.folder / "sb_frozen_exhaustive.npz"]:
        arrays = claims.load(file, r.checkpoint)
        if arrays and str(arrays["criterion"]) == "label" and f"{k:g}" in arrays["labels"]:
            return arrays["routes"][list(arrays["labels"]).index(f"{k:g}")], arrays["idx"], arrays["domain"]
    return None


def gain_of_the_table(r, files, windows, k):
    """What routers gain over the best fixed pattern of their budget, token_id among them; and its share of theirs."""
    fixed, ends, gains = fixed_losses(r, windows), (r.exact.flops(SMALL), r.exact.flops(BIG)), {}
    for name, of_kind in files.items():
        parts = [minus_fixed(arrays, fixed, ends) for (budget, _), arrays in of_kind.items() if budget == k]
        if parts:
            columns, mean = mean_of(parts)
            gains[name] = columns, lambda m, mean=mean: -mean(m)
    table, n = gains["token_id"], gains["token_id"][0].shape[1]
    found = {}
    for name, (columns, gain) in gains.items():
        found[name] = {"gain": claims.interval(columns, gain)}
        if found[name]["gain"][1] > 0 and name != "token_id":  # a share of what may be nothing is no number
            found[name]["kept_by_table"] = claims.interval(
                np.concatenate((table[0], columns), 1), lambda m: table[1](m[..., :n]) / gain(m[..., n:]))
    return found


def saved_config(r, name, key):
    """-> the RouterConfig that a router of the run was trained with"""
    path = Path(r.config.out_dir) / "routers" / f"{router.stem(name, (key[0], None), 'sb', key[1])}.pt"
    return router.RouterConfig(**router.read_router(path, r.checkpoint, "cpu")["config"])


def early_learning(r, windows, config, k, seed):
    """Train the run's linear router once more, and look at MOMENTS what it would choose, calibrated to k each time: how
    many of the choices are the final ones already? Beside it what chance gives."""
    own = saved_config(r, "linear", (k, seed))
    text = torch.cat(list(router.calibration_text(r, own).values()))[:WATCHED]
    some = torch.linspace(0, len(windows[0]) - 1, min(WATCHED, len(windows[0]))).long()  # of all domains
    steps, seen = {max(1, round(share * own.steps)): share for share in MOMENTS}, {}

    def watch(step, made):
        if step in steps:
            now = copy.deepcopy(made).requires_grad_(False)  # training goes on with a shift of 0
            router.calibrate(r.exact, now, text, (k, None))
            seen[steps[step]] = router.choose(r.exact, now, windows[0][some].to(r.device))[0].cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        made = router.train_router(r.fast, own, "linear", (k, None), router.training_text(r, own),
                                   Path(folder) / "linear.pt", r.checkpoint, watch=watch)
    if made is None:
        raise KeyboardInterrupt
    agreed = {share: diagnosis.agreement(routes, seen[1.0]) for share, routes in seen.items()}
    return {"share_of_training": list(agreed), "steps": [round(share * own.steps) for share in agreed],
            "agreement": [a for a, _ in agreed.values()], "by_chance": [b for _, b in agreed.values()],
            "of_the_way": [(a - b) / (1 - b) if b < 1 else float("nan") for a, b in agreed.values()],
            "sequences": len(some)}


@torch.no_grad()
def drop_towards_the_end(r, files, windows, k, seeds):
    """The capacity router: how many tokens that want BIG find no place, by position, on validation text and on text of
    a kind that nothing here was trained on (C++)? And what that costs against the linear router, by position."""
    idx = windows[0]
    cpp, _ = evenly(r, data.extra_domain("cpp", r.corpus)[1], len(idx))
    some = torch.linspace(0, len(idx) - 1, len(cpp)).long()  # as many, of all domains
    lost = {"in": 0, "out": 0}
    for seed in seeds:
        path = Path(r.config.out_dir) / "routers" / f"{router.stem('capacity', (k, None), 'sb', seed)}.pt"
        made, _ = router.load_router(path, r.checkpoint, r.shape, r.device)
        for where, text in (("in", idx[some]), ("out", cpp)):
            lost[where] = lost[where] + without_place(r, made, text) / len(seeds)
    cost = np.mean([diagnosis.by_position(files["capacity"][k, seed]["losses"] - files["linear"][k, seed]["losses"])
                    for seed in seeds], 0)  # [S, 8]
    return {"places": made.places, "sequences": len(cpp),
            "overflow": {where: [claims.interval(part) for part in values.T] for where, values in lost.items()},
            "overflow_last_minus_first": {where: claims.interval(values[:, -1] - values[:, 0])
                                          for where, values in lost.items()},
            "overflow_out_minus_in": claims.interval(lost["out"].mean(1) - lost["in"].mean(1)),
            "loss_minus_linear": [claims.interval(part) for part in cost.T],
            "loss_last_minus_first": claims.interval(cost[:, -1] - cost[:, 0])}


def without_place(r, made, idx):
    """-> of the choices in each eighth of the sequence, the share that wants BIG and gets none [S, 8]"""
    wanted, got = [], []

    def watched(layer, h, state, seq):
        logits, state = made(layer, h, state, seq)
        wanted.append(made.wants(layer, h, state, seq).argmax(-1) == BIG)
        got.append(logits.argmax(-1) == BIG)
        return logits, state
    found = []
    for part in idx.split(32):
        wanted.clear(), got.clear()
        r.exact(part.to(r.device), watched, return_logits=False)
        lost = (torch.stack(wanted) & ~torch.stack(got)).float().mean(0)  # [B, T], of all layers
        found.append(diagnosis.by_position(lost.cpu().numpy()))
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------------------------------
# command

EFFECTS = {"rmoe": rmoe, "openmoe": openmoe,  # {system: function(r, windows, config) -> finding}
           "tryage": effects_prompt.tryage, "arch": effects_prompt.arch, "glider": effects_prompt.glider,
           "rewire": effects_adapt.rewire, "lora_mixer": effects_adapt.lora_mixer}
COMPARED = {  # {system: the routers that its effect needs, at least}
    "rmoe": ("rmoe", "rmoe_np"), "openmoe": ("linear", "token_id", "capacity"), "tryage": ("tryage", "linear"),
    "arch": ("arch",), "glider": ("glider",), "rewire": ("rewire_prose",), "lora_mixer": ("lora_mixer", "lora_single"),
}


def read(path):
    """-> the findings of zoo.json, [] where it is not there"""
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except json.JSONDecodeError:
        raise UserError(f"{path}: is damaged or cut short; delete it, and `python effects.py` makes it anew") from None


def main(argv=None):
    config = parse_config(EffectsConfig, argv, PRESETS)
    names = [name.strip() for name in config.name.split(",")] if config.name else list(EFFECTS)
    if config.tokens < 0:
        raise UserError(f"--tokens={config.tokens}: must be 0 or above")
    for name in names:
        if name not in EFFECTS:
            raise UserError(f"--name={name}: no such system; choose from {', '.join(EFFECTS)}")
    r, _, windows = router.start(config)
    path, measured = Path(config.out_dir) / "zoo.json", []
    read(path)  # damaged? Better said now
    for name in names:
        try:
            line = EFFECTS[name](r, windows, config)
        except UserError as error:  # its routers are missing
            if config.name:
                raise
            print(f"{name}: left out. {error}")
            continue
        line |= {"system": name, "command": f"python effects.py --name={name}", "checkpoint": r.checkpoint,
                 "torch": torch.__version__,
                 "device": torch.cuda.get_device_name(r.device) if r.device.type == "cuda" else "cpu"}
        # Read late: effects of other systems may be measured at the same time.
        measured.append(name)
        found = [other for other in read(path) if other["system"] != name] + [claims.without_nan(line)]
        print(f"{name}: {line['verdict']}. {line['claim']}: {line['effect']:.4f} "
              f"({line['ci'][0]:.4f}..{line['ci'][1]:.4f}) {line['unit']}")
        write_atomic(path, json.dumps(found, indent=1).encode())
    if not measured:
        raise UserError(f"{config.out_dir}/routers: no system could be measured; the lines above say what each needs")


if __name__ == "__main__":
    run(main)
