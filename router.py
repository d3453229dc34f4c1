"""Stage 3: routers. Learn, on the frozen stage-1 model, which choice each token should make in each layer (paper, 3.3).

    python router.py                                     the preset's set for the last run: train, calibrate, evaluate
    python router.py --name=mlp --budget=4,6             one kind of router, two budgets
    python router.py --choices=xsb --budget=6/2.4        6 BIG and 2.4 SKIP of 12 layers (the paper: 50%, 20%)
    python router.py --joint --budget=4                  router and base together, a run of its own (or --budget=any)
    python sample.py --router=out/routers/mlp_k4_s1.pt   text, routed by it

A router reads h, the residual that enters a layer, and gives three logits; the choice is their argmax. An example by
hand: choices sb, h gives BIG 0.3 and SMALL 0.1, calibration has shifted BIG by -0.5, so the token takes SMALL.

    name       network                   learns by
    linear     a linear layer per layer  the layer's output is sum_c P_c H_c, P = softmax(logits / tau): the paper's
    gumbel     the same                  one choice, drawn with Gumbel noise; gradients as if it were soft
    mlp        a small MLP per layer     the same
    distilled  the same MLP              oracle labels: how much of the weight exp(-loss / temperature) of random
                                         routes goes through each choice
    advantage  the same MLP              predicts how much lower the token's loss is with BIG than with SMALL in this
                                         layer alone; chooses by that minus a price per FLOP

The first three minimize  CE + alpha (mean over layers P_big - k/L)^2, and the same for SKIP where its share is set; as
typeset, the paper's tau cancels, so here it divides the logits and goes down. Deviations: (1) h is RMS-normalized, as
every other input in this model is; (2) biases start at the budget; (3) few steps, small models. Labels come from
training text: the oracle's own files are about validation text, and a router trained on them would be tested on what
it has seen. They stand beside random routes, not the oracle's, whose earlier choices would tell the router the label.

--joint trains linear, gumbel or mlp and the base from the first step, in train.py's loop, with its flags and its text;
alpha's schedule is the same, but tau stays where it is: a router that explores to the end. The budget starts at all
layers and falls to k: a BIG that from the start sees a third of the tokens learns less. (NOTES.md has figures; how long
it falls depends on the preset.) With --budget=any, k is drawn for each sequence, uniform over 1..L, and the router is
told: the log odds of k/L, times a learned weight, are added to its logits. Its file for k has k in a buffer.

Calibration shifts the logit of BIG (and of SKIP, where set) until hard choices meet the budget on training text that
no router on a frozen base trained on. (The base has seen it, and so has a router that learned with it; but only a
scalar is fitted there.) On validation text the achieved budget is what it is; baselines are interpolated there.

A router's tokens see the keys and values of its own earlier choices: oracle.py's sequential context. The best fixed
patterns, all-small and all-big are measured in it, too. Random patterns and the oracle come from oracle.py's files, of
the sequential context where it has been searched whole, else of the frozen one; the output says of which (`contexts`).

Files: out_dir/routers/<name>_k<k>_s<seed>.pt, a router and all that resuming needs; the same .npz, its evaluation: idx,
targets, losses [S, T]; routes [S, T, L] uint8; domain [S]. out_dir/routers.json: one object for each router, budget and
domain; out_dir/router_findings.json: the paper's claims about routers (both made by claims.py).
"""
import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import claims
import data
import train
import zoo
from common import (
    UserError,
    arg,
    catch_signals,
    derive_seed,
    find_device,
    generator,
    load_checkpoint,
    parse_config,
    run,
    save_checkpoint,
)
from gates import GAIN_UNIT, Router, compiles, gumbel_noise, mixed_loss, schedule, shares
from model import BIG, SKIP, SMALL
from oracle import OracleConfig, Run, write_npz

NAMES = claims.ROUTERS
JOINT_NAMES = NAMES[:3]


@dataclass
class Learning:
    """What routers are asked for and learn by, on a frozen base or with it."""
    name: str = arg("", f"which routers, comma separated, or all: {', '.join((*NAMES, *zoo.KINDS))}; --joint: linear, "
                        "gumbel or mlp")
    budget: str = arg("", "BIG per token, comma separated, say 4,6; with a SKIP share 6/2.4; --joint: one, or any")
    choices: str = arg("sb", "sb, xsb or xb: letters of x (SKIP), s (SMALL), b (BIG)")
    tau_start: float = arg(1.0, "temperature of P at the first step")
    tau_end: float = arg(0.1, "and at the last; exponential in between")
    alpha_start: float = arg(3.0, "weight of the budget loss at the first step")
    alpha_end: float = arg(30.0, "and at the last; exponential in between")
    per_token: bool = arg(False, "the budget loss is taken per token, not per sequence (the paper's)")
    hidden: int = arg(64, "width of the MLPs")
    # calibration and evaluation
    calibration_tokens: int = arg(32768, "per domain, of training text (of which no router on a frozen base sees any)")
    tokens: int = arg(0, "validation tokens per domain, rounded up to whole sequences; 0: as planned. With a multiple "
                      "of oracle.py's number its windows are among these, and comparisons are paired")
    joint: bool = arg(False, "train a router and its base together; takes train.py's flags (--joint --help)")


@dataclass
class RouterConfig(Learning):
    out_dir: str = arg("out", "folder of the run; its ckpt.pt is read, routers/ and routers.json are written")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    seed: int = arg(1, "seeds init, data order, Gumbel noise and random routes, each a stream of its own")
    preset: str = arg("auto", "the set that is trained when no --name or --budget is given: cpu, gpu or debug")
    data_dir: str = arg("data", "where prepared corpora are kept")
    # training
    steps: int = arg(1500, "optimizer steps of each router")
    batch_size: int = arg(64, "sequences per step")
    learning_rate: float = arg(1e-2, "peak; linear warm-up, then a cosine down to 0")
    warmup_steps: int = arg(20, "linear warm-up")
    weight_decay: float = arg(0.01, "on the routers' matrices")
    label_positions: int = arg(4, "distilled, advantage: positions of each sequence that are labelled per step")
    label_routes: int = arg(64, "distilled: random routes tried per label")
    label_temperature: float = arg(1.0, "distilled: nats; the lower, the more the best of the routes tried counts")
    save_interval: int = arg(100, "steps between checkpoints")
    compile: str = arg("auto", "on, off, or auto: on for CUDA; of the soft mix and of Gumbel gates")


@dataclass
class JointConfig(Learning, train.TrainConfig):
    """train.py's flags, with --train_route left out of use: the router routes."""
    tau_start: float = arg(2.0, "temperature of the gradient's P at the first step")
    tau_end: float = arg(2.0, "and at the last: as at the first, so the router goes on exploring")
    anneal: float = arg(0.15, "share of the steps in which the budget falls from all layers to --budget, linearly")


PRESETS = {
    "gpu": {},
    "cpu": {"steps": 200, "batch_size": 8, "calibration_tokens": 1024, "label_positions": 8, "warmup_steps": 5,
            "hidden": 32, "save_interval": 50},
    "debug": {"steps": 4, "batch_size": 4, "calibration_tokens": 128, "label_positions": 2, "label_routes": 8,
              "warmup_steps": 1, "hidden": 8, "save_interval": 2},
}
LONG_FALL = {"tau_start": 1.0, "tau_end": 1.0, "anneal": 0.5}  # of a training whose first 15% are few steps
JOINT_PRESETS = {name: values | {key: PRESETS[name][key] for key in ("hidden", "calibration_tokens")
                                 if key in PRESETS[name]} | (LONG_FALL if name != "gpu" else {})
                 for name, values in train.PRESETS.items()}
SETS = {  # what `python router.py` trains: {name: budgets}
    "gpu": dict.fromkeys(NAMES, "2,4,6,8,10"),
    "cpu": {"linear": "4,6,8", "advantage": "4,6"},
    "debug": dict.fromkeys(NAMES, "1"),
}
SHARES = {  # and, where no flag asks for something else, with which choices and budgets: the paper's Fig. 7
    "gpu": [("linear", "sb", "3.6"), ("linear", "xb", "6"), ("linear", "xsb", "6/2.4")], "cpu": [], "debug": [],
}
TOKENS = {"gpu": 131072, "cpu": 8192, "debug": 64}  # --tokens, as planned; a corpus that holds less is taken whole
FREE = {"out_dir", "device", "preset", "name", "budget", "data_dir", "save_interval", "tokens",
        "compile"}  # may change on resume


# ---------------------------------------------------------------------------------------------------------------------
# text: what is trained on, and what is kept for calibration

def calibration_starts(corpus, tokens, T, seed):
    """-> {domain: starts}: evenly spaced windows of training text, from a place that the seed draws."""
    starts = {}
    for domain in corpus.domains:
        length = len(corpus.train[domain]) - T - 1
        n = max(1, min(-(-tokens // T), length // (4 * T)))  # at most a quarter of the text
        offset = derive_seed(seed, "calibration", domain) % max(1, length // n)
        starts[domain] = np.arange(n) * (length // n) + offset
    return starts


def training_batch(corpus, batch_size, T, reserved, seed):
    """-> x, y [B, T], domain [B]: windows drawn as train.py draws them, but none that touches a reserved one."""
    windows, domains, attempt = [], [], 0
    while len(windows) < batch_size:
        for d, start in zip(*data.window_starts(corpus, batch_size, T, derive_seed(seed, attempt)), strict=True):
            domain = corpus.domains[d]
            if np.abs(reserved[domain] - start).min() > T and len(windows) < batch_size:
                windows.append(corpus.train[domain][start:start + T + 1])
                domains.append(int(d))
        attempt += 1
    return *data.to_tensors(windows), torch.tensor(domains)


def training_text(r, config):
    """-> batch: step -> x, y [B, T], domain [B] on the device, of training text that is not kept for calibration"""
    T = r.shape.block_size
    reserved = calibration_starts(r.corpus, config.calibration_tokens, T, config.seed)

    def batch(step):
        seed = derive_seed(config.seed, "router", "data", step)
        return [t.to(r.device) for t in training_batch(r.corpus, config.batch_size, T, reserved, seed)]
    return batch


def calibration_text(r, config):
    """-> {domain: idx [n, T]}, on the device"""
    T, starts = r.shape.block_size, calibration_starts(r.corpus, config.calibration_tokens, r.shape.block_size,
                                                       config.seed)
    return {domain: data.to_tensors([r.corpus.train[domain][i:i + T + 1] for i in starts[domain]])[0].to(r.device)
            for domain in starts}


# ---------------------------------------------------------------------------------------------------------------------
# training

def learning_rate(config, step):
    """Linear warm-up, then a cosine down to 0."""
    rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / max(1, config.steps - 1)))
    return rate * min(1, (step + 1) / max(1, config.warmup_steps))


def stem(name, budget, choices, seed):
    """The file name of a router, without its ending: mlp_k4_s1, mlp_k6_x2.4_s1_xsb"""
    n_big, n_skip = budget
    skip = "" if n_skip is None else f"_x{n_skip:g}"
    return f"{name}_k{n_big:g}{skip}_s{seed}{'' if choices == 'sb' else f'_{choices}'}"


def new_router(shape, config, name, budget):
    """budget: (n_big, n_skip); n_big None: a router for any, told which."""
    n_big, n_skip = budget
    share = shares(shape.n_layer, config.choices, shape.n_layer / 2 if n_big is None else n_big, n_skip)
    rng = generator("cpu", config.seed, "router", "init")
    if name in zoo.KINDS:
        return zoo.KINDS[name](shape, config, share, rng)
    hidden = 0 if name in ("linear", "gumbel") else config.hidden
    return Router(shape, hidden, config.choices, share, rng, n_big is None, "gumbel" if name == "mlp" else name)


def read_router(path, checkpoint, device):
    """-> the file's dict. Raises UserError for a file that is no router, or one of another checkpoint (a hash)."""
    if not Path(path).exists():
        raise UserError(f"{path}: no router here; make one with `python router.py --name=mlp --budget=4`, or see the "
                        "folder routers/ of the run")
    if Path(path).suffix != ".pt":
        raise UserError(f"{path}: is no router; give a .pt file of the folder routers/")
    saved = load_checkpoint(path, device)
    if "router" not in saved:
        raise UserError(f"{path}: is no router file; give one of the folder routers/ of the run")
    if saved["checkpoint"] != checkpoint:
        raise UserError(f"{path}: was trained on checkpoint {saved['checkpoint']}, but this run's ckpt.pt is "
                        f"{checkpoint}; train it again (move the file away first), or give the run it belongs to")
    return saved


def load_router(path, checkpoint, shape, device):
    """A routers/*.pt file -> the Router, ready to choose (eval mode, no gradients), and the rest of the file."""
    saved = read_router(path, checkpoint, device)
    if "calibration" not in saved:
        raise UserError(f"{path}: is not finished, step {saved['step']} of {saved['config']['steps']}, not calibrated; "
                        "the router.py command that began it goes on")
    for_any = "asked" in saved["router"]
    router = new_router(shape, SimpleNamespace(**saved["config"]), saved["name"],
                        (None, None) if for_any else saved["budget"])
    router.load_state_dict(saved["router"])
    return router.to(device).eval().requires_grad_(False), saved


def prove_compiled(model, router, config, budget, texts, step):
    """One step for nothing: where torch.compile fails, config.compile is off from here on, after one clear line."""
    try:
        with router.attached(model):
            router.step_loss(model, config, budget, *texts, step)[0].backward()
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # a missing C++ compiler, an unsupported GPU, ...: training must still run
        tqdm.write(f"torch.compile failed ({f'{type(error).__name__}: {error}'.splitlines()[0][:100]}); training goes "
                   "on without it, more slowly (--compile=off hides this line)")
        config.compile = "off"
    router.zero_grad(set_to_none=True)


def train_router(model, config, name, budget, batch, path, checkpoint, bar=None, watch=None):
    """Train one router, from its file where there is one -> the Router, or None where it was interrupted (and saved).

    batch: step -> x, y [B, T], domain [B]; below 0 it is text to prepare a router on. checkpoint: the hash of the
    base's file. watch: called as watch(step, router) after each step. The base stays as it is.
    """
    device = model.cos.device
    model.requires_grad_(False)
    router = new_router(model.config, config, name, budget).to(device)
    optimizer = torch.optim.AdamW(router.groups(config.weight_decay), lr=config.learning_rate)
    step, mine = 0, {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    if path.exists():
        saved = read_router(path, checkpoint, device)
        for key, value in mine.items():
            if saved["config"].get(key) != value:
                raise UserError(f"{path}: was trained with --{key}={saved['config'].get(key)}, not {value}; give the "
                                "same value, or move the file away to train anew")
        router.load_state_dict(saved["router"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    else:
        router.prepare(model, batch, config, budget)

    def save():
        save_checkpoint(path, {"router": router.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                               "name": name, "budget": budget, "config": dataclasses.asdict(config),
                               "checkpoint": checkpoint, "command": command(config)})
    stop, restore_signals = catch_signals()
    if bar is not None:
        bar.update(step)
    try:
        if step < config.steps and compiles(config, device) and router.learns in ("linear", "gumbel"):
            prove_compiled(model, router, config, budget, batch(step), step)
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            with router.attached(model):
                loss, parts = router.step_loss(model, config, budget, *batch(step), step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if watch is not None:
                watch(step, router)
            if bar is not None:
                bar.update()
            saving = step % config.save_interval == 0 or step == config.steps or bool(stop)
            if step % 10 == 0 or saving:
                values = {key: value.item() for key, value in parts.items()}  # waits for the device
                if not math.isfinite(values["loss"]):
                    raise UserError(f"{path.stem}: loss is {values['loss']} at step {step}: lower --learning_rate "
                                    f"(now {config.learning_rate})")
                if bar is not None:
                    bar.set_postfix_str(f"{path.stem} " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()),
                                        refresh=False)
            if saving:
                save()
            if stop:
                break
    finally:
        restore_signals()
    return None if stop else router.eval()


# ---------------------------------------------------------------------------------------------------------------------
# router and base together, from the first step

class Joint(nn.Module):
    """A model and its router, as train.train wants them: called as the model is, with Gumbel noise for a route.

    Text, optimizer and schedule are train.py's; the choices, drawn by the router, take the place of random ones.
    """
    figures = ("cross_entropy", "big")  # what forward reports behind the loss

    def __init__(self, model, config, budget):
        super().__init__()
        self.model, self.config, self.budget = model, config, budget
        self.router = new_router(model.config, config, config.name, budget).to(model.cos.device)

    def batches(self, config, corpus, device, step, rank, world):
        """train.micro_batches, its route replaced by noise [b, T, L, 3] and its counts by tau, alpha and the share of
        BIG asked for [b]. As there, the whole batch is drawn and then cut."""
        B, T, L = config.batch_size, config.block_size, config.n_layer
        rng, n_big = generator(device, config.seed, "route", step), self.budget[0]
        noise = None if config.name == "linear" else gumbel_noise(B, T, L, rng)
        k = torch.full((B,), n_big or 0, device=device)
        if n_big is None:
            k.random_(1, L + 1, generator=rng)
        done = step / max(1, config.max_steps - 1)
        k = L + (k - L) * min(1, done / config.anneal if config.anneal else 1)
        values = [torch.full((), value, device=device) for value in schedule(config, done)]
        first = rank * (B // world)
        for x, y, _, _ in train.micro_batches(config, corpus, device, step, rank, world):
            rows = slice(first, first + len(x))
            first += len(x)
            yield x, y, None if noise is None else noise[rows], (*values, k[rows] / L)

    def forward(self, idx, noise, targets, counts, return_logits=False):
        """-> None, the loss, and the figures."""
        (tau, alpha, asked), n_skip = counts, self.budget[1]
        wanted = {BIG: asked.unsqueeze(1)} | ({SKIP: n_skip / len(self.model.blocks)} if n_skip is not None else {})
        return None, *mixed_loss(self.model, self.router, self.config.per_token, idx, targets, noise, tau, alpha,
                                 wanted, {"asked": asked})


# ---------------------------------------------------------------------------------------------------------------------
# calibration and evaluation: hard choices

@torch.no_grad()
def choose(model, router, idx, targets=None):
    """Hard choices over whole sequences -> route [S, T, L] uint8 and losses [S, T] (None without targets)"""
    routes, losses = [], []
    with router.attached(model) if isinstance(router, Router) else contextlib.nullcontext():
        for i in range(0, len(idx), 32):
            rows = slice(i, i + 32)
            _, loss, stats = model(idx[rows], router, None if targets is None else targets[rows], reduction="none",
                                   return_stats=True)
            routes.append(stats["route"])
            losses.append(loss)
    return torch.cat(routes), None if targets is None else torch.cat(losses)


def calibrate(model, router, idx, budget, tolerance=0.02):
    """Shift the logit of BIG, and of SKIP where its share is set, until hard choices on idx [S, T] meet the budget, by
    bisection -> {"big", "skip"}: what is achieved there, per token."""
    n_big, n_skip = budget
    wanted = {BIG: n_big} | ({SKIP: n_skip} if n_skip is not None and router.choices == "xsb" else {})

    def achieved(choice):
        return (choose(model, router, idx)[0] == choice).sum(-1).float().mean().item()

    def bisect(choice, target):
        def gap(shift):
            router.shift[choice] = shift
            return achieved(choice) - target
        middle, width = router.shift[choice].item(), 1.0
        miss = gap(middle)
        # A bracket: growing steps towards the target, until one passes it (or none could).
        low = high = middle
        while abs(miss) > tolerance and width < 1e5:
            step = -width if miss > 0 else width
            before, miss_before, middle = middle, miss, middle + step
            low, high, miss = min(before, middle), max(before, middle), gap(middle)
            if (miss > 0) != (miss_before > 0):
                break
            width *= 2
        for _ in range(40):
            if abs(miss) <= tolerance:
                return
            middle = (low + high) / 2
            miss = gap(middle)
            low, high = (low, middle) if miss > 0 else (middle, high)

    for _ in range(8 if len(wanted) > 1 else 1):  # each shift moves the other's share too
        for choice, target in wanted.items():
            bisect(choice, target)
        if len(wanted) > 1 and abs(achieved(BIG) - n_big) <= tolerance:
            break
    return {"big": achieved(BIG), "skip": achieved(SKIP)}


def load_patterns(r):
    """-> oracle.py's baselines, sequential where there are any, else frozen, and their context; {}, None without"""
    for context in ("sequential", "frozen"):
        patterns = claims.load(r.folder / f"patterns_{context}.npz", r.checkpoint)
        if patterns:
            return patterns, context
    return {}, None


@torch.no_grad()
def baselines(r, windows, patterns, context):
    """What routers are compared with -> {policy: (losses per sequence [n, L + 1], which n of the windows)}, and
    {policy: context}. Those of the patterns file are on its own windows and in its context; the best fixed patterns
    (chosen on training text in that context), all-small and all-big are on all windows and sequential."""
    (idx, targets, domain), L = windows, r.shape.n_layer
    where = claims.shared(patterns, {"idx": idx.numpy()}) if patterns else None
    found = {} if where is None else {policy: (losses.T, where) for policy, losses in
                                      claims.baseline_losses(patterns).items()}
    contexts = dict.fromkeys(found, context) | dict.fromkeys(("fixed", "all_small", "all_big"), "sequential")
    if patterns and where is None:
        print(f"oracle/patterns_{context}.npz: holds other validation sequences than these {len(idx)}, so its random "
              f"patterns are left out; a multiple of its {len(patterns['idx']) // len(r.domains) * r.shape.block_size} "
              "as --tokens has them")
    if where is None or len(where) < len(idx) or context == "frozen":
        fixed = np.full((len(idx), L + 1), np.nan)
        for d in range(len(r.domains)):
            for rows in torch.from_numpy((domain == d).nonzero()[0]).split(32):
                x, y = idx[rows].to(r.device), targets[rows].to(r.device)
                for k in range(L + 1) if patterns else (0, L):  # all-small and all-big need no file
                    pattern = [SMALL, BIG][k == L] if k in (0, L) else torch.from_numpy(
                        patterns["patterns"][patterns["chosen"][d, k]])
                    fixed[rows, k] = r.exact(x, pattern, y, reduction="none")[1].mean(-1).double().cpu().numpy()
        found["fixed"] = fixed, np.arange(len(idx))
    fixed, rows = found["fixed"]
    ends = {"all_small": fixed[:, :1], "all_big": fixed[:, -1:]}
    return found | {policy: (losses.repeat(L + 1, 1), rows) for policy, losses in ends.items()}, contexts


# ---------------------------------------------------------------------------------------------------------------------
# command

def parse_budgets(text, n_layer, choices):
    """--budget -> list of (n_big, n_skip), n_skip None where it is free. Raises UserError."""
    budgets = []
    for part in text.split(","):
        big, slash, skip = part.partition("/")
        try:
            n_big, n_skip = float(big), float(skip) if slash else None
        except ValueError:
            raise UserError(f"--budget={part}: give BIG choices per token, say 4, or 6/2.4 with a SKIP share; comma "
                            "separated") from None
        if not (0 <= n_big <= n_layer and 0 <= (n_skip or 0) <= n_layer - n_big):
            raise UserError(f"--budget={part}: must lie in 0..{n_layer}, the layers of this run")
        if n_skip is not None and "x" not in choices:
            raise UserError(f"--budget={part}: a SKIP share needs --choices=xsb")
        if choices == "xb" and n_skip not in (None, n_layer - n_big):
            raise UserError(f"--budget={part}: with --choices=xb all that is not BIG is SKIP; leave out /{skip}")
        budgets.append((n_big, None if choices == "xb" else n_skip))
    return budgets


def command(config):
    """-> the command line that gives this config."""
    usual = type(config)(**(JOINT_PRESETS if config.joint else PRESETS).get(config.preset, {}))
    return " ".join(["python router.py", *(f"--{key}={value}" for key, value in vars(config).items()
                                           if value != getattr(usual, key))])


def check(config):
    """Raise UserError for values that cannot work, before anything is loaded -> the names asked for."""
    for name in ("steps", "batch_size", "learning_rate", "tau_start", "tau_end", "alpha_start", "alpha_end", "hidden",
                 "label_positions", "label_routes", "label_temperature", "save_interval", "calibration_tokens"):
        if not 0 < getattr(config, name, 1) < math.inf:  # a joint run has fewer; train.py checks its own
            raise UserError(f"--{name}={getattr(config, name)}: must be above 0, and finite")
    for name in ("warmup_steps", "weight_decay", "tokens"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name}={getattr(config, name)}: must be 0 or above, and finite")
    if config.compile not in ("auto", "on", "off"):
        raise UserError(f"--compile={config.compile}: choose from auto, on, off")
    if config.choices not in ("sb", "xsb", "xb"):
        raise UserError(f"--choices={config.choices}: choose from sb, xsb, xb: x is SKIP, s SMALL, b BIG")
    known = (*NAMES, *zoo.KINDS)
    names = config.name.split(",") if config.name else ["mlp"] if config.joint else list(SETS[config.preset])
    names = list(known) if names == ["all"] else names
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise UserError(f"--name={name}: no such router; {hint}")
    if config.joint and (len(names) > 1 or names[0] not in JOINT_NAMES):
        raise UserError(f"--name={config.name}: --joint trains one router, of {', '.join(JOINT_NAMES)}")
    return names


def start(config):
    """-> the Run, its folder routers/, and the validation windows."""
    r = Run(OracleConfig(out_dir=config.out_dir, device=config.device, seed=config.seed, preset=config.preset,
                         data_dir=config.data_dir))
    (Path(config.out_dir) / "routers").mkdir(exist_ok=True)
    return r, Path(config.out_dir) / "routers", r.windows(config.tokens or min(TOKENS[config.preset], r.holds()))


def calibrate_and_evaluate(r, config, router, path, saved, windows):
    """Shift the router of a file to its budget, once, and measure it: the file, and its npz, are written."""
    n_big, n_skip = saved["budget"]
    if "calibration" not in saved:
        text = torch.cat(list(calibration_text(r, config).values()))
        saved["calibration"] = calibrate(r.exact, router, text, saved["budget"])
        saved["router"] = router.state_dict()
        save_checkpoint(path, saved)
    off = abs(saved["calibration"]["big"] - n_big)
    if off > 0.05:
        tqdm.write(f"{path.stem}: calibration ended {off:.2f} layers off its budget; its choices are too alike")
    notes = {"name": saved["name"], "budget": n_big, "skip_budget": n_skip, "choices": config.choices,
             "seed": config.seed, "steps": saved["step"], "calibration": saved["calibration"],
             "shift": router.shift.tolist(), "config": saved["config"], "command": saved["command"]}
    if saved["name"] == "advantage":  # the shift is the price: nats that a FLOP has to gain
        flops = r.exact.flops(BIG) - r.exact.flops(SMALL if "s" in config.choices else SKIP)
        notes["price_nats_per_mflop"] = -router.shift[BIG].item() * GAIN_UNIT / (flops / r.shape.n_layer / 1e6)
    evaluate(r, router, path.with_suffix(".npz"), notes, windows)


def evaluate(r, router, path, notes, windows):
    """Hard choices on validation text -> the npz file; notes: what routers.json says about the router."""
    idx, targets, domain = windows
    routes, losses = choose(r.exact, router, idx.to(r.device), targets.to(r.device))
    notes |= {"checkpoint": r.checkpoint, "router_flops": router.flops() if hasattr(router, "flops") else 0,
              "torch": torch.__version__,
              "device": torch.cuda.get_device_name(r.device) if r.device.type == "cuda" else "cpu"}
    if notes["budget"] is None:
        notes["budget"] = round((routes == BIG).sum(-1).float().mean().item(), 2)
    write_npz(path, {
        "idx": idx.numpy(), "targets": targets.numpy(), "domain": domain, "domains": np.array(r.domains),
        "routes": routes.cpu().numpy(), "losses": losses.cpu().numpy(), "checkpoint": r.checkpoint,
        "flops": r.exact.flops(routes, r.shape.block_size).cpu().numpy(),
        "bytes": r.corpus.token_bytes[targets.numpy()].sum(-1), "notes": json.dumps(notes)})


def report(r, windows):
    """All routers of this checkpoint against the baselines -> rows; routers.json is written, the table printed."""
    rows, found = claims.router_report(r.config.out_dir, r.checkpoint, windows[0].numpy(),
                                       *baselines(r, windows, *load_patterns(r)),
                                       (r.exact.flops(SMALL), r.exact.flops(BIG)), r.rest["train_config"]["seed"])
    print(claims.router_summary(rows, found))
    print(f"done: {r.config.out_dir}/routers.json, router_findings.json and routers/")
    return rows


def measure(router, name, **flags):
    """Put a router of your own on the same chart -> its objects of routers.json, one for each domain.

    router: called as model.forward calls one; taken as it is, its budget is what it spends. name: of its row and file,
    an own one; flags: out_dir, device, preset, tokens, as for the command. README has an example.
    """
    if name in (*NAMES, *zoo.KINDS):
        raise UserError(f"{name}: is the name of a router of this project; give yours another")
    config = RouterConfig(**flags)
    if config.preset == "auto":
        config.preset = "gpu" if find_device(config.device).type == "cuda" else "cpu"
    r, folder, windows = start(config)
    evaluate(r, router, folder / f"{name}.npz", {
        "name": name, "budget": None, "skip_budget": None, "choices": config.choices, "seed": config.seed, "steps": 0,
        "calibration": None, "shift": None, "config": {}, "command": "router.measure"}, windows)
    return [row for row in report(r, windows) if row["name"] == name]


def train_jointly(config):
    """python router.py --joint: a run of its own, whose base has learned with its router."""
    (config.name,) = check(config)
    L = config.n_layer
    config.budget = config.budget or "4"
    budgets = [(None, None)] if config.budget == "any" else parse_budgets(config.budget, L, config.choices)
    if len(budgets) > 1:
        raise UserError(f"--budget={config.budget}: --joint trains for one budget, or for any")
    if not 0 <= config.anneal <= 1:
        raise UserError(f"--anneal={config.anneal}: must lie in 0..1, a share of the steps")
    if config.train_route != "random":
        raise UserError(f"--train_route={config.train_route}: with --joint the router routes; leave it out")
    how = command(config)
    result = train.train(config, lambda model: Joint(model, config, budgets[0]))
    train.leave()
    if result is None:
        return 130
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    r, folder, windows = start(config)
    n_big, n_skip = budgets[0]
    for k in [n_big] if n_big is not None else range(2, L, 2):
        router = new_router(r.shape, config, config.name, budgets[0]).to(r.device).eval().requires_grad_(False)
        router.load_state_dict(r.rest["router"])
        if router.told:
            router.asked.fill_(k / L)
        saved = {"router": router.state_dict(), "step": r.rest["step"], "name": config.name, "budget": (k, n_skip),
                 "config": dataclasses.asdict(config), "checkpoint": r.checkpoint, "command": how}
        path = folder / f"{stem(config.name, (k, n_skip), config.choices, config.seed)}.pt"
        calibrate_and_evaluate(r, config, router, path, saved, windows)
    report(r, windows)
    return 0


def can_learn(r, config, name, budget, left_out):
    """Whether this router can be made here. left_out: say why not in a line, in place of raising UserError."""
    try:
        if len(r.domains) < new_router(r.shape, config, name, budget).n_domains:
            raise UserError(f"--name={name}: learns on one of the corpus's domains, and this corpus has only one; "
                            "leave it out")
    except UserError as error:
        if not left_out:
            raise
        print(f"{name}: left out. {error}")
        return False
    return True


def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if any(flag.startswith("--joint") for flag in flags):
        config = parse_config(JointConfig, argv, JOINT_PRESETS)
        if config.joint:
            return train_jointly(config)
    config = parse_config(RouterConfig, argv, PRESETS)
    names = check(config)
    r, folder, windows = start(config)
    L, T = r.shape.n_layer, r.shape.block_size
    sets = SETS[config.preset]
    jobs = [(config, name, budget) for name in names
            for budget in parse_budgets(config.budget or sets.get(name, sets["linear"]), L, config.choices)]
    if not config.name and not config.budget and config.choices == "sb":
        for name, choices, text in SHARES[config.preset]:
            own = dataclasses.replace(config, name=name, choices=choices, budget=text)
            jobs += [(own, name, budget) for budget in parse_budgets(text, L, choices)]
    jobs = [job for job in jobs if can_learn(r, *job, left_out=config.name == "all")]
    print(f"{config.out_dir}: {L} layers, width {r.shape.n_embd}, checkpoint {r.checkpoint}, corpus "
          f"{r.corpus.fingerprint}; {r.device}, trains in {r.fast.compute_dtype}; {len(windows[0])} validation "
          f"sequences of {T}")
    if not load_patterns(r)[0]:
        how = "`python oracle.py` makes them" if L <= 14 else "oracle.py makes them for up to 14 layers"
        print(f"no oracle/patterns_*.npz: random and fixed baselines are left out; {how}")

    batch, learned = training_text(r, config), {}
    with tqdm(total=len(jobs) * config.steps, unit="step", dynamic_ncols=True, smoothing=0.1,
              mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
        for own, name, budget in jobs:
            path = folder / f"{stem(name, budget, own.choices, own.seed)}.pt"
            if (own.choices, own.seed, name) in learned and not path.exists():  # only its calibration is to be done
                save_checkpoint(path, learned[own.choices, own.seed, name] | {"budget": budget})
            try:
                router = train_router(r.fast, own, name, budget, batch, path, r.checkpoint, bar)
            except torch.OutOfMemoryError:
                raise UserError("out of GPU memory: lower --batch_size (sequences per step)") from None
            if router is None:
                bar.close()
                print(f"interrupted: {path} is saved; the same command goes on")
                return 130
            saved = load_checkpoint(path, r.device)
            if router.serves_all_budgets:
                learned[own.choices, own.seed, name] = {key: saved[key] for key in saved if key != "calibration"} | {
                    "router": saved["router"] | {"shift": torch.zeros(3)}}
            calibrate_and_evaluate(r, own, router, path, saved, windows)
    report(r, windows)


if __name__ == "__main__":
    run(main)
