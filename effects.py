"""What each of zoo.py's systems claims, measured on the last run: one number, its interval, a verdict.

    python router.py --name=all --budget=4,8     trains what is compared here
    python effects.py                            measures, and writes zoo.json
    python effects.py --name=rmoe,glider         these only

Each function below reads the routers of the run (and says which are missing), measures, and returns one finding: the
claim of the system's paper, our effect with its 95% bootstrap interval over sequences, a verdict by claims.verdict, and
in `detail` all that its figure draws. Files: out_dir/zoo.json, a list of findings.
"""
import contextlib
import copy
import dataclasses
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import claims
import data
import diagnosis
import gates
import router
import zoo
from common import UserError, arg, generator, parse_config, run, write_atomic
from gates import GAIN_UNIT
from model import BIG, SMALL, KVCache
from zoo import LORAS, top2


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


def rounded(value):
    """For JSON: arrays to lists, numbers to 4 significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float | np.floating) else value


def finding(claim, paper, part, unit, seeds, sequences, detail, parts=None):
    """-> what an effect returns. part: (estimate, low, high), above 0 where the claim holds; parts: if several must."""
    return {"claim": claim, "paper": paper, "effect": part[0], "ci": list(part[1:]), "unit": unit,
            "verdict": claims.verdict(parts or [part]), "seeds": sorted(set(seeds)), "sequences": sequences,
            "detail": rounded(detail)}


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
    idx, T = windows[0], r.shape.block_size
    tokens = data.extra_domain("cpp", r.corpus)[1]
    n = min(len(idx), (len(tokens) - 1) // T)
    cpp, _ = data.to_tensors([tokens[i:i + T + 1] for i in np.arange(n) * (len(tokens) - 1) // n])
    some = torch.linspace(0, len(idx) - 1, n).long()  # as many, of all domains
    lost = {"in": 0, "out": 0}
    for seed in seeds:
        path = Path(r.config.out_dir) / "routers" / f"{router.stem('capacity', (k, None), 'sb', seed)}.pt"
        made, _ = router.load_router(path, r.checkpoint, r.shape, r.device)
        for where, text in (("in", idx[some]), ("out", cpp)):
            lost[where] = lost[where] + without_place(r, made, text) / len(seeds)
    cost = np.mean([diagnosis.by_position(files["capacity"][k, seed]["losses"] - files["linear"][k, seed]["losses"])
                    for seed in seeds], 0)  # [S, 8]
    return {"places": made.places, "sequences": n,
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
# Tryage, Arch-Router, GLIDER: what they share

def routers_of(r, name):
    """-> {(budget, seed): Router}: the run's {SMALL, BIG} routers of that name. UserError where there is none."""
    folder, found = Path(r.config.out_dir) / "routers", {}
    for path in sorted(folder.glob(f"{name}_k*.npz")):  # written last: a router that still learns has none
        if match := re.fullmatch(rf"{name}_k([\d.]+)_s(\d+)", path.stem):
            file = path.with_suffix(".pt")
            found[float(match[1]), int(match[2])] = router.load_router(file, r.checkpoint, r.shape, r.device)[0]
    if not found:
        raise UserError(f"{folder}: no {name} router here; make one with `python router.py --name={name} --budget=4 "
                        f"--out_dir={r.config.out_dir}`")
    return found


def one_per_seed(found):
    """-> {(budget, seed): Router}, of each seed the one with the least budget"""
    return {(k, seed): made for (k, seed), made in found.items() if k == min(b for b, s in found if s == seed)}


def evenly(r, tokens, n):
    """-> x, y [n, T] on the device: n windows, evenly spaced over the tokens, or as many as there are"""
    n = min(n, (len(tokens) - 1) // r.shape.block_size)
    corpus = dataclasses.replace(r.corpus, val={"these": tokens})
    return [t.to(r.device) for t in data.eval_windows(corpus, "these", n, r.shape.block_size)]


def losses_of(r, made, x, y):
    """-> loss of each sequence [S] with the router's hard choices, numpy"""
    return router.choose(r.exact, made, x, y)[1].mean(-1).double().cpu().numpy()


@torch.no_grad()
def meet(r, made, x, k):
    """Shift a zoo.Planned router until it spends k BIG per token on x [S, T]. The token embeddings are all that it
    reads, so that no layer need be run."""
    e, low, high = r.exact.embedding(x), -100.0, 100.0
    for _ in range(40):
        made.shift[BIG] = (low + high) / 2
        spent = (made.plan(e, {}) > 0).sum(-1).float().mean().item()
        low, high = (low, made.shift[BIG].item()) if spent > k else (made.shift[BIG].item(), high)


# ---------------------------------------------------------------------------------------------------------------------
# Tryage

@torch.no_grad()
def tryage(r, windows, config):
    """One head, swept over prices, against a linear router trained for each budget, both at the linear one's spending
    on these windows. And what the head knows: how often it picks the pattern that is best for the token, and R^2 (over
    what each pattern's own mean explains) of advantages and, for the control, of raw losses."""
    x, y, L = windows[0].to(r.device), windows[1].to(r.device), r.shape.n_layer
    heads = {seed: made for (_, seed), made in one_per_seed(routers_of(r, "tryage")).items()}
    lines = {key: made for key, made in routers_of(r, "linear").items() if key[1] in heads}
    if not lines:
        raise UserError(f"{config.out_dir}/routers: no linear router with a seed of the tryage ones; make one with "
                        f"`python router.py --name=linear --budget=4 --seed={min(heads)} --out_dir={config.out_dir}`")
    rows, gains, curves, known = [], [], [], []
    for (k, seed), line in lines.items():
        route, losses = router.choose(r.exact, line, x, y)
        achieved = (route == BIG).sum(-1).float().mean().item()
        meet(r, heads[seed], x, achieved)
        linear, mine = losses.mean(-1).double().cpu().numpy(), losses_of(r, heads[seed], x, y)
        gains.append(linear - mine)
        rows.append({"k": k, "seed": seed, "achieved": achieved, "linear": linear.mean(), "tryage": mine.mean(),
                     "linear_minus_tryage": claims.interval(gains[-1])})
    for made in heads.values():
        curves.append([])
        for k in range(0, L + 1, max(1, L // 6)):
            meet(r, made, x, k)
            curves[-1].append([made.shift[BIG].item() * -GAIN_UNIT, k, losses_of(r, made, x, y).mean()])
        losses = torch.cat([made.pattern_losses(r.exact, made.library, *rows_) for rows_ in
                            zip(x.split(32), y.split(32), strict=True)])  # [S, T, P]
        e = r.exact.embedding(x)
        guess, raw, advantage = made.predict(e, {}), made.predict(e, {}, head=1), losses.mean(-1, keepdim=True) - losses
        best = losses.argmin(-1)

        def r2(predicted, true):
            spread = (true - true.mean((0, 1))).square().sum()
            return 1 - ((predicted - true).square().sum() / spread).item()

        def hits(choice):
            return (choice == best).float().mean().item()
        known.append({"accuracy": hits(guess.argmax(-1)), "accuracy_of_control": hits(raw.argmin(-1)),
                      "majority": best.flatten().bincount().max().item() / best.numel(),
                      "chance": 1 / len(made.library),
                      "r2_advantage": r2(guess * GAIN_UNIT, advantage), "r2_raw": r2(raw, losses),
                      "r2_advantage_of_control": r2(raw.mean(-1, keepdim=True) - raw, advantage),
                      "loss_chosen": losses.gather(-1, guess.argmax(-1, keepdim=True)).mean().item(),
                      "loss_best_pattern": losses.mean((0, 1)).min().item(),
                      "loss_oracle_in_library": losses.amin(-1).mean().item()})
    gain = claims.interval(np.mean(gains, 0))
    return finding("one head swept over prices beats a linear router trained for each budget",
                   "Tryage: its router picks the best model 50.9% of the time, two language models as routers 23.6% "
                   "and 10.8%; sweeping lambda draws the Pareto front", gain, "nats, linear minus tryage", heads,
                   len(x), {
                       "budgets": rows, "curve_price_budget_loss": np.mean(curves, 0),
                       "known": {key: np.mean([one[key] for one in known]) for key in known[0]},
                       "library": next(iter(heads.values())).library.int()})


# ---------------------------------------------------------------------------------------------------------------------
# Arch-Router

def softmax_head(z, label):
    """The classifier that Arch-Router replaces: logistic regression on summaries z [n, d], label [n] -> mean, W, b. It
    knows the classes that it was trained on, and no others."""
    n_classes, mean, scale = int(label.max()) + 1, z.mean(0), z.std(0) + 1e-6
    z = (z - mean) / scale
    weight = torch.zeros(z.shape[1], n_classes, device=z.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight + bias, label) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    return mean, scale, weight.detach(), bias.detach()


def head_choices(head, z):
    """-> which class [...], z [..., d]"""
    mean, scale, weight, bias = head
    return ((z - mean) / scale @ weight + bias).argmax(-1)


def arch(r, windows, config):
    """Add cpp, which neither base nor matcher has seen, by its descriptor and a row of the table. Accuracy: over tokens
    after the first look at the prompt. Controls: a softmax head on the same summaries, which has no place for cpp; the
    same trained again with it; the matcher before training (whitening alone, no "other")."""
    cpp, held_out, fingerprint = data.extra_domain("cpp", r.corpus)
    per_domain, names = int((windows[2] == 0).sum()), [*r.domains, "cpp"]
    x_new, y_new = evenly(r, held_out, per_domain)
    texts = [windows[0][torch.from_numpy(windows[2] == d)].to(r.device) for d in range(len(r.domains))] + [x_new]
    train = [evenly(r, tokens, 128) for tokens in (*(r.corpus.train[d] for d in r.domains), cpp)]
    found, parts, gains = [], [], []
    made_by_seed = one_per_seed(routers_of(r, "arch"))
    for (k, _), made in made_by_seed.items():
        def looks(x, made=made):
            return zoo.summary(r.exact.embedding(x), {}, made.every)[0][:, made.every - 1:]  # [S, T', d]

        def right(choose):
            """-> of each domain, for each sequence the share of tokens that are given to it"""
            return [(choose(looks(x)) == d).float().mean(-1).double().cpu().numpy() for d, x in enumerate(texts)]

        def by_policy(made):
            return lambda z: made.match(z, made.policy[1:]).masked_fill(~made.used, -torch.inf).argmax(-1) - 1

        def by_head(n):
            label = torch.arange(n, device=r.device).repeat_interleave(len(train[0][0]))
            z = [looks(x)[:, ::made.every] for x, _ in train[:n]]
            head = softmax_head(torch.cat(z).flatten(0, 1), label.repeat_interleave(z[0].shape[1]))
            return lambda z: head_choices(head, z)

        def on_new():
            meet(r, made, x_new, k)
            return losses_of(r, made, x_new, y_new)
        with torch.no_grad():
            before, loss_before = right(by_policy(made)), on_new()
            to_other = (by_policy(made)(looks(x_new)) == -1).float().mean().item()
            rank, _ = zoo.greedy_ranks(r.fast, *(t[:32] for t in train[-1]), made.cheap)
            made.add_policy(r.exact, train[-1][0][:32], rank, k)
            after, loss_after = right(by_policy(made)), on_new()
            untrained = copy.deepcopy(made)
            untrained.change.zero_()
            untrained.other.fill_(-1e9)
            plain = right(by_policy(untrained))
            made.policy[1:], made.rank[0] = made.policy[0], rank  # all default, and that is cpp's own pattern
            made.used[1:] = False
            loss_own = on_new()
        fixed, again = right(by_head(len(r.domains))), right(by_head(len(names)))
        parts.append(after[-1] - 1 / len(names))
        gains.append(loss_before - loss_after)
        accuracy = {"before": before, "after": after, "untrained": plain, "softmax": fixed, "softmax_retrained": again}
        found.append({key: [one.mean() for one in value] for key, value in accuracy.items()} | {
            "new_to_other_before": to_other, "loss_before": loss_before.mean(), "loss_after": loss_after.mean(),
            "loss_own_pattern": loss_own.mean()})
    accuracy, gain = claims.interval(np.mean(parts, 0)), claims.interval(np.mean(gains, 0))
    detail = {"domains": names, "chance": 1 / len(names), "extra_fingerprint": fingerprint,
              "loss_before_minus_after": gain} | {key: np.mean([one[key] for one in found], 0) for key in found[0]}
    return finding("a domain added by its descriptor alone is recognized, without training",
                   "Arch-Router: 93.17% of routes right overall; new policies need no retraining", accuracy,
                   "accuracy on the new domain, minus chance", [seed for _, seed in made_by_seed], len(x_new), detail)


# ---------------------------------------------------------------------------------------------------------------------
# GLIDER

@torch.no_grad()
def glider(r, windows, config):
    """Sweep s, each calibrated anew on the very windows, held-in (the run's domains) or held-out (cpp), so that all
    compare at one budget. s for the headline is chosen on training text. The mix: all three domains, weighed alike."""
    _, held_out, fingerprint = data.extra_domain("cpp", r.corpus)
    per_domain, grid = min(int((windows[2] == 0).sum()), 256 if r.device.type == "cuda" else 32), (0, 0.25, 1, 4, 16)
    groups = {"train": [evenly(r, r.corpus.train[d], per_domain) for d in r.domains],
              "held_in": [evenly(r, r.corpus.val[d], per_domain) for d in r.domains],
              "held_out": [evenly(r, held_out, per_domain)]}
    groups = {key: [torch.cat(part) for part in zip(*texts, strict=True)] for key, texts in groups.items()}
    made_by_seed, losses, cosines = one_per_seed(routers_of(r, "glider")), {key: [] for key in groups}, []
    for (k, _), made in made_by_seed.items():
        for key, (x, y) in groups.items():
            losses[key].append([])
            for s in grid:
                made.s.fill_(s)
                router.calibrate(r.exact, made, x, (k, None))
                losses[key][-1].append(losses_of(r, made, x, y))
        n = len(r.domains)

        def by_text(centre, made=made):
            """-> mean cosine with each prototype, of each domain's text and of the held-out one"""
            made.centre.copy_(centre)
            z = made.cosines(r.exact.embedding(torch.cat([groups[key][0] for key in ("held_in", "held_out")])), {})
            return torch.stack([part.mean((0, 1)) for part in z[:, made.every - 1:, :n].split(per_domain)])
        centre = made.centre.clone()
        cosines.append([by_text(centre), by_text(torch.zeros_like(centre))])
    losses = {key: np.mean(values, 0) for key, values in losses.items()}  # [len(grid), S]
    chosen = 1 + losses["train"][1:].mean(1).argmin()
    gains = {key: losses[key][0] - losses[key][chosen] for key in ("held_in", "held_out")}
    held_in, out = (claims.interval(gain) for gain in gains.values())
    mix = (losses["held_in"].mean(1) * len(r.domains) + losses["held_out"].mean(1)) / (len(r.domains) + 1)
    detail = {
        "s": list(grid), "chosen_s": grid[chosen], "best_s_on_mix": grid[int(mix.argmin())], "mix": mix,
        "held_in": losses["held_in"].mean(1), "held_out": losses["held_out"].mean(1), "gain_held_out": out,
        "budgets": [k for k, _ in made_by_seed], "extra_fingerprint": fingerprint,
        "gains_held_in": [claims.interval(losses["held_in"][0] - row) for row in losses["held_in"][1:]],
        "gains_held_out": [claims.interval(losses["held_out"][0] - row) for row in losses["held_out"][1:]],
        "domains": [*r.domains, "cpp"], "cosines": cosines[0][0], "cosines_uncentered": cosines[0][1],
        "profiles": next(iter(made_by_seed.values())).profile[:n]}
    return finding("a global score added to a trained local router lowers the loss on the domains it knows",
                   "GLIDER: held-in +6.6%, held-out at most +0.88", held_in,
                   "nats, local alone minus local and global", [seed for _, seed in made_by_seed],
                   len(gains["held_in"]), detail)


# ---------------------------------------------------------------------------------------------------------------------
# what Rewiring and LoRA-Mixer share

def at_one_budget(r, names, budget=None):
    """-> k, {name: {seed: Router}}: at the smallest budget that all names have. Raises UserError where one is missing.
    """
    found = {name: routers_of(r, name) for name in names}
    common = set.intersection(*({k for k, _ in of_name} for of_name in found.values()))
    common &= {budget} if budget is not None else common
    if not common:
        raise UserError(f"{r.config.out_dir}/routers: this needs {' and '.join(names)} at one budget; make them with "
                        f"`python router.py --name={','.join(names)} --budget={4 if budget is None else budget:g} "
                        f"--out_dir={r.config.out_dir}`")
    least = min(common)
    return least, {name: {seed: made for (k, seed), made in found[name].items() if k == least} for name in names}


def first_of_each(windows, n):
    """-> idx, targets, domain of the first n windows of each domain"""
    rows = np.concatenate([np.flatnonzero(windows[2] == d)[:n] for d in np.unique(windows[2])])
    return *(part[rows] for part in windows),


def at_budget(r, made, idx, targets, big):
    """Losses [S, T] and BIG per token [S, T], numpy, with `big` BIG per token on these very tokens: the shift is fitted
    on them (no loss is seen), so that what is compared spends the same."""
    before = made.shift.clone()
    router.calibrate(r.exact, made, idx, (big, None), tolerance=0.005)
    route, losses = router.choose(r.exact, made, idx, targets)
    made.shift.copy_(before)
    return losses.cpu().numpy(), (route == BIG).sum(-1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Rewiring

@torch.no_grad()
def own_deltas(made, idx):
    """-> delta [S, L, 3] of each m tokens, each learned from the tokens before them; call within attached()"""
    deltas = [torch.zeros(len(idx), *made.b_out.shape, device=idx.device)]
    for t in range(made.every, idx.shape[1], made.every):
        deltas.append(made.adapt(idx[:, :t], deltas[-1]))
    return deltas


@torch.no_grad()
def control_deltas(made, idx, own, rng):
    """-> {control: deltas}, of other documents, random of equal norm, and fitted on the very tokens that are scored"""
    m, found = made.every, {"own": own} | dict.fromkeys(("other", "random", "future"), own[:1])
    for i, delta in enumerate(own[1:], 1):
        noise = torch.randn(delta.shape, generator=rng, device=delta.device)
        noise *= delta.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
        read = idx[:, :i * m]
        found["other"] = [*found["other"], made.recentred(read, delta.roll(1, 0))]
        found["random"] = [*found["random"], made.recentred(read, noise)]
        found["future"] = [*found["future"], made.adapt(idx[:, :(i + 1) * m], delta, since=i * m)]
    return found


@torch.no_grad()
def with_deltas(r, made, idx, targets, deltas):
    """-> losses, BIG per token [S, T], numpy. The deltas lie where the router looks for those it already has."""
    cache = KVCache(r.shape, len(idx), r.device, torch.float32)
    cache.seq["delta"] = deltas
    _, losses, stats = r.exact(idx, made, targets, cache=cache, reduction="none", return_stats=True)
    return losses.cpu().numpy(), (stats["route"] == BIG).sum(-1).cpu().numpy()


RATES = (0.05, 0.5, 8.0)  # the paper's, and what lies around ours


def rewire(r, windows, config):
    """Routers trained on prose: what delta buys on code (a shift) and on prose, at equal BIG on the same tokens."""
    k, routers = at_one_budget(r, ["rewire_prose"])
    windows = first_of_each(windows, 64 if r.device.type == "cuda" else 24)
    rng = generator(r.device, config.seed, "rewire")
    m, detail, headline = next(iter(routers["rewire_prose"].values())).every, {"budget": k}, []
    for d, name in enumerate(r.domains):
        idx, targets = (part[windows[2] == d].to(r.device) for part in windows[:2])
        gains, rates, drift = {}, {}, []
        for made in routers["rewire_prose"].values():
            def gain(deltas, made=made, idx=idx, targets=targets):
                """-> loss minus that of the same router without delta, at the same BIG [S, T]; BIG [S, T] minus its"""
                losses, big = with_deltas(r, made, idx, targets, deltas)
                made.train()  # as in training: no adaptation
                plain, plain_big = at_budget(r, made, idx, targets, big.mean())
                made.eval()
                return losses - plain, big - plain_big
            with made.attached(r.exact):
                own = own_deltas(made, idx)
                for control, deltas in control_deltas(made, idx, own, rng).items():
                    difference, more = gain(deltas)
                    gains.setdefault(control, []).append(difference)
                    drift += [more] if control == "own" else []
                ours = made.rate
                for made.rate in RATES if d == 0 else ():
                    rates.setdefault(made.rate, []).append(gain(own_deltas(made, idx))[0])
                made.rate = ours
            rates.setdefault(ours, []).append(gains["own"][-1])
        gains = {control: np.mean(parts, 0) for control, parts in gains.items()}  # over seeds: [S, T]
        detail[name] = {
            "gain": {control: claims.interval(part.mean(1)) for control, part in gains.items()},
            "by_chunk": {control: part.reshape(len(part), -1, m).mean((0, 2)) for control, part in gains.items()},
            "more_big_by_chunk": np.mean(drift, 0).reshape(len(idx), -1, m).mean((0, 2)),
            "rates": {str(rate): claims.interval(np.mean(parts, 0).mean(1)) for rate, parts in sorted(rates.items())}}
        if d == 0:  # code
            headline = gains["own"].mean(1)
    made = next(iter(routers["rewire_prose"].values()))
    detail |= {"every": m, "rate": made.rate, "flops": made.flops(), "flops_without": gates.Router.flops(made),
               "flops_all_big": r.exact.flops(BIG)}
    return finding("a delta learned on the document so far lowers the loss on a domain the router has not seen",
                   "HumanEval +5.5% on OLMoE, about twice the time (arXiv 2510.14853)", claims.interval(-headline),
                   "nats gained", routers["rewire_prose"], len(headline), detail)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA-Mixer

def entropy(p):
    """p [.., n], of any sum -> the entropy of p / sum, over the largest there is: 0..1"""
    p = p / p.sum(-1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-30))).sum(-1) / np.log(p.shape[-1])


@torch.no_grad()
def specialization(r, made, idx, domain):
    """-> {what: mean over projections} of the weights that the experts get at inference. information: of expert and
    domain, over the domain's entropy, 1 where an expert serves one domain; load: entropy of the experts' use; token:
    mean entropy of p. Entropies are shares of the largest one."""
    made.seen = []
    with made.attached(r.exact):
        for rows in idx.split(32):
            r.exact(rows, made)
    n, made.seen, seen = 2 * r.shape.n_layer, None, made.seen
    p = np.stack([torch.cat(seen[i::n]).cpu().numpy() for i in range(n)])  # [2 L, S, T, E]
    alpha = top2(torch.from_numpy(p)).numpy().sum(2)  # [2 L, S, E]
    joint = np.stack([alpha[:, domain == d].sum(1) for d in np.unique(domain)], 1)  # [2 L, domains, E]
    joint /= joint.sum((1, 2), keepdims=True)
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    information = (joint * np.log(np.maximum(joint, 1e-30) / np.maximum(apart, 1e-30))).sum((1, 2))
    share = joint.sum(2)
    information /= np.maximum(-(share * np.log(share)).sum(1), 1e-30)
    return {"information": information.mean(), "load": entropy(joint.sum(1)).mean(), "token": entropy(p).mean()}


def lora_mixer(r, windows, config):
    """Routed LoRAs against one of the same total rank, few against many sequences, four losses; all at one budget."""
    k, routers = at_one_budget(r, ["lora_mixer", "lora_single"])
    for name in ("linear", *LORAS, *(f"{name}_few" for name in LORAS)):  # the others where there are any
        if name not in routers:
            with contextlib.suppress(UserError):
                routers |= at_one_budget(r, [name], k)[1]
    idx, targets, domain = first_of_each(windows, 128 if r.device.type == "cuda" else 32)
    idx, targets = idx.to(r.device), targets.to(r.device)
    losses, table = {}, {}
    for name, by_seed in routers.items():
        seeds = list(by_seed.values())
        runs = [at_budget(r, made, idx, targets, k) for made in seeds]
        losses[name] = np.mean([loss for loss, _ in runs], 0).mean(1)  # [S]
        row = {"loss": claims.interval(losses[name]), "BIG": np.mean([big for _, big in runs]), "seeds": len(seeds),
               "loss_by_domain": [losses[name][domain == d].mean() for d in range(len(r.domains))],
               "flops": seeds[0].flops()}
        if getattr(seeds[0], "experts", 1) > 1:
            parts = [specialization(r, made, idx, domain) for made in seeds]
            row |= {key: np.mean([part[key] for part in parts]) for key in parts[0]}
        table[name] = row
    for name in table:
        single = "lora_single_few" if name.endswith("_few") else "lora_single"
        if single in losses:
            table[name]["minus_single"] = claims.interval(losses[name] - losses[single])
    return finding("LoRAs that are routed beat one LoRA of the same total rank",
                   "+3.8 points on GSM8K over other LoRA mixtures with 48% of their parameters (arXiv 2507.00029)",
                   claims.interval(losses["lora_single"] - losses["lora_mixer"]), "nats gained",
                   routers["lora_mixer"], len(idx), {"budget": k, "routers": table})


# ---------------------------------------------------------------------------------------------------------------------
# command

EFFECTS = {"rmoe": rmoe, "openmoe": openmoe, "tryage": tryage, "arch": arch, "glider": glider, "rewire": rewire,
           "lora_mixer": lora_mixer}  # {system: function(r, windows, config) -> finding}


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
