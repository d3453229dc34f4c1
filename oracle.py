"""Stage 2: the oracle. For each token, find the route with the lowest loss, at every budget (paper, section 3.2).

    python oracle.py                                              the preset's plan for the last run
    python oracle.py --search=dp --context=frozen --budgets=4,6   one search only

search.py has the searches (exhaustive, dp, greedy) for one position; here they go along the text. A token's loss
depends on the routes of earlier tokens, through their keys and values:
    sequential   left to right; each token keeps the keys and values of its chosen route (what generation would do)
    frozen       earlier tokens are all-BIG; one tree serves every budget
On a GPU the search runs in bfloat16; its best 32 routes per budget are scored again in float32, and the best one wins.

--budgets, comma separated: `any`; `4`, exactly 4 BIG; `/6`, exactly 6 SKIP; `4/3`, both; `6-2`, a ramp from 6 BIG at
the first position to 2 at the last; `all`, any and 0..L.

The oracle knows the label, so part of its gain is hindsight. --criterion is what the route is chosen by; the loss that
is reported is always the one on the true label:
    label        -log p(y), the oracle
    expected     CE(p_ref, p_route), p_ref from --reference, a model trained apart: what could be foreseen
    split        -log p(y'), y' drawn from p_ref: an oracle for another label; what survives on y is learnable
    foresight(k) = fixed - expected;  hindsight(k) = expected - label;  their sum is the oracle's gain over fixed.

Files: out_dir/oracle/<choices>_<context>_<search>.npz (with _expected or _split, and with the budgets where not all):
    idx, targets [S, T]; domain [S], an index into `domains`; labels [K], the budgets as given; budgets [K] int (any:
    -1, a ramp: -2); routes [K, S, T, L] uint8; losses [K, S, T] float32, nats; usage [K, D, T, L, 3], shares of
    the choices; context, choices, search, criterion; checkpoint and signature (hashes); notes, JSON: how it was made.
out_dir/oracle/patterns_<context>.npz, the baselines: patterns [P, L]; means [P, S], a pattern's loss on a sequence,
    where all tokens take it (sequential) or one does after all-BIG ones (frozen); idx [S, T]; domain [S]; chosen
    [D, L + 1], the best on training text for k = 0..L; fixed [L + 1, S, T], its losses; hundred [L + 1, 100], random
    ones (-1: fewer exist); per_token [L + 1, S], the mean of each token's best of the hundred; curve [L + 1, S, N] and
    curve_n [N]: the selection curve, the mean over tokens of the least loss of N random patterns.
out_dir/oracle.json: tables, baselines, controls, findings, quality of the searches, timings (made by claims.py).
"""
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import claims
import data
from common import (
    UserError,
    arg,
    derive_seed,
    find_device,
    generator,
    load_run,
    open_out_dir,
    parse_config,
    run,
    write_atomic,
)
from model import BIG, SKIP, SMALL, KVCache
from search import Exhaustive, Patterns, Search, allowed, dp, greedy, make_tree, settle

LETTERS = {"x": SKIP, "s": SMALL, "b": BIG}
BASELINE_WORK, QUALITY_WORK = 3, 20  # for the ETA, per token: multiples of a search over 2^L routes (see work)
RESCORED = 32  # candidates per budget that are scored again in float32, where the search ran in bfloat16


@dataclass
class OracleConfig:
    out_dir: str = arg("out", "folder of the run; its ckpt.pt is read, oracle/ and oracle.json are written")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    seed: int = arg(1, "seeds the random patterns and the labels of --criterion=split")
    preset: str = arg("auto", "the plan that runs when no search is asked for: cpu, gpu or debug")
    search: str = arg("", "one search only: exhaustive, dp or greedy")
    choices: str = arg("", "of that search: letters of x (SKIP), s (SMALL), b (BIG); sb if not given")
    context: str = arg("", "of that search: sequential (if not given) or frozen")
    budgets: str = arg("", "of that search: all (if not given), any, 4, /6, 4/3, 6-2; comma separated")
    criterion: str = arg("", "of that search: label (if not given), expected or split")
    tokens: int = arg(0, "validation tokens per domain, rounded up to whole sequences; 0: as planned. Of a plan: "
                      "of its longest searches, and of the others as much less as planned")
    domain: str = arg("all", "all, or one of the corpus")
    reference: str = arg("", "a run trained apart (train.py --train_route=big) that gives p_ref for the controls")
    width: int = arg(8, "dp: partial routes kept per cell")
    completion: str = arg("early", "dp: how partial routes are judged: early, small or big")
    batch_size: int = arg(0, "sequences in flight; 0: by free memory. Lower it when memory runs out")
    data_dir: str = arg("data", "where prepared corpora are kept")


@dataclass(frozen=True)
class Job:
    """One search over part of the validation text."""
    tokens: int  # per domain
    context: str = "sequential"
    choices: str = "sb"
    budgets: str = "all"
    search: str = "exhaustive"
    criterion: str = "label"

    @property
    def name(self):
        """Of the npz file. A search for a few budgets has them in its name: it must not replace the whole one."""
        parts = [self.choices, self.context, self.search]
        parts += [self.criterion] * (self.criterion != "label")
        parts += [self.budgets.replace("/", "s").replace(",", "+")] * ("all" not in self.budgets.split(","))
        return "_".join(parts)


# What `python oracle.py` does: baselines (context, tokens per domain of validation and of training text), the searches,
# and tokens for the quality of the searches. A corpus that holds less is searched whole.
PLANS = {
    "gpu": ([("sequential", 32768, 32768), ("frozen", 32768, 16384)], [
        Job(32768, budgets="all,6-2,2-6"), Job(32768, budgets="2,4,6,8,10", criterion="expected"),
        Job(32768, budgets="2,4,6,8,10", criterion="split"), Job(32768, "frozen"),
        Job(32768, "frozen", criterion="expected"), Job(32768, "frozen", criterion="split"),
        Job(32768, choices="xb", budgets="6"), Job(4096, "frozen", choices="xsb", budgets="any,/6,4,6,4/4")], 2048),
    "cpu": ([("frozen", 1000, 1000)], [
        Job(1000, "frozen"), Job(500, budgets="4,6-2,2-6"), Job(1000, "frozen", criterion="expected"),
        Job(1000, "frozen", criterion="split"), Job(500, choices="xb", budgets="6")], 64),
    "debug": ([("sequential", 64, 64), ("frozen", 64, 64)], [Job(64, budgets="any,1"), Job(64, "frozen")], 32),
}
PRESETS = {name: {} for name in PLANS}  # no flag's default depends on the preset


# ---------------------------------------------------------------------------------------------------------------------
# budgets

def parse_budgets(text, n_layer, choices):
    """--budgets -> {label: function of the position's share of the sequence, 0..1, that gives (n_big, n_skip)}"""
    lanes = {}
    for label in text.split(","):
        labels = ["any", *map(str, range(n_layer + 1))] if label == "all" else [label]
        for name in labels:
            if not re.fullmatch(r"any|\d+(-\d+)?(/\d+)?|/\d+", name):
                raise UserError(f"--budgets={text}: {name!r} is none of any, all, a number of BIG (say 4), of SKIP "
                                "(/6), of both (4/3), a ramp (6-2); give some of these, comma separated")
            big, _, skip = ("", "", "") if name == "any" else name.partition("/")
            first, _, last = big.partition("-")
            ends = [int(first), int(last or first)] if first else [None, None]
            n_skip = int(skip) if skip else None

            def budget(share, ends=ends, n_skip=n_skip):
                return (None if ends[0] is None else round(ends[0] + (ends[1] - ends[0]) * share)), n_skip

            root = np.zeros((1, 0), np.uint8)
            for n_big, n_skip in {budget(0.0), budget(1.0)}:
                if not allowed(root, n_layer, [LETTERS[c] for c in choices], [(n_big, n_skip)]).any():
                    raise UserError(f"--budgets={name}: no route of {n_layer} layers over --choices={choices} has "
                                    f"{'any number of' if n_big is None else n_big} BIG and "
                                    f"{'any number of' if n_skip is None else n_skip} SKIP choices")
            lanes[name] = budget
    return lanes


def budget_number(label):
    """-> the `budgets` entry of a label"""
    big = label.partition("/")[0]
    return int(big) if big.isdigit() else -2 if "-" in big else -1


# ---------------------------------------------------------------------------------------------------------------------
# along the text, in one context or the other

class Run:
    """The checkpoint, its text, and what the searches share."""

    def __init__(self, config):
        self.config = config
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
        here = config.device
        if self.world > 1 and here in ("auto", "cuda") and torch.cuda.is_available():
            here = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = find_device(here)
        self.exact, self.shape, self.rest = load_run(config.out_dir, self.device)
        self.folder = open_out_dir(config.out_dir) / "oracle"
        self.exact.requires_grad_(False)
        self.fast, dtype = self.exact, self.exact.compute_dtype
        self.exact.compute_dtype = torch.float32
        if dtype != torch.float32:
            self.fast = self.exact.copy_in(dtype)
        self.keep = 1 if self.fast is self.exact else RESCORED
        self.parts = []  # files that are of no more use when all is done
        self.checkpoint = file_hash(Path(config.out_dir) / "ckpt.pt")
        trained = self.rest["train_config"]
        self.corpus = data.load(data.prepare(trained["corpus"], trained["tokenizer"], trained["vocab_size"],
                                             trained["corpus_mb"], config.data_dir))
        if self.corpus.fingerprint != self.rest["fingerprint"]:
            raise UserError(f"{config.out_dir}/ckpt.pt: was trained on corpus {self.rest['fingerprint']}, but "
                            f"{self.corpus.folder} holds {self.corpus.fingerprint}; give the --data_dir of the run")
        if config.domain not in ("all", *self.corpus.domains):
            raise UserError(f"--domain={config.domain}: choose from all, {', '.join(self.corpus.domains)}")
        self.domains = self.corpus.domains if config.domain == "all" else [config.domain]
        self.reference = None
        if config.reference:
            self.reference, shape, other = load_run(config.reference, self.device)
            if shape.block_size < self.shape.block_size:
                raise UserError(f"--reference={config.reference}: its context of {shape.block_size} tokens is shorter "
                                f"than this run's; train one with --block_size={self.shape.block_size}")
            if file_hash(Path(config.reference) / "ckpt.pt") == self.checkpoint:
                raise UserError(f"--reference={config.reference}: is the run itself; give one trained apart, "
                                "python train.py --train_route=big --seed=11 --out_dir=out/reference")
            if other["fingerprint"] != self.rest["fingerprint"]:
                raise UserError(f"--reference={config.reference}: was trained on corpus {other['fingerprint']}, this "
                                f"run on {self.rest['fingerprint']}; train it on the same text")
            self.reference.requires_grad_(False)

    def holds(self):
        """-> tokens in whole sequences that the smallest validation set holds"""
        T = self.shape.block_size
        return min((len(self.corpus.val[domain]) - 1) // T * T for domain in self.domains)

    def windows(self, tokens):
        """-> idx, targets [S, T], domain [S] (cpu): the same validation windows for every search of that many tokens"""
        T = self.shape.block_size
        n = -(-tokens // T)
        if n * T > self.holds():
            raise UserError(f"--tokens={tokens}: the smallest validation set holds {self.holds()} in whole sequences; "
                            "ask for fewer")
        pairs = [data.eval_windows(self.corpus, domain, n, T) for domain in self.domains]
        return (*(torch.cat(part) for part in zip(*pairs, strict=True)), np.arange(len(self.domains)).repeat(n))

    def rows(self):
        """How many states a step of a search may hold at once: what fits into 40% of the free memory of a GPU; on a CPU
        what its caches like."""
        if self.device.type != "cuda":
            return 4096
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        one = (3 * self.shape.big_width + 12 * self.shape.n_embd) * 2  # bytes of one state on its way through a layer
        return int(0.4 * free / one)

    def sequences(self, n_leaves, n_together):
        """How many sequences to search at once: their caches and losses take up to 30% of a GPU's memory (of all of it,
        so that every process, and a resumed run, cuts the text alike)."""
        if self.config.batch_size:
            return self.config.batch_size
        if self.device.type != "cuda":
            return 16
        L, d, T = self.shape.n_layer, self.shape.n_embd, self.shape.block_size
        candidates = RESCORED * n_together
        one = L * 2 * T * d * 6 + 24 * n_leaves + 4 * candidates * (2 * L * d + 3 * self.shape.big_width)
        fits = int(0.3 * torch.cuda.get_device_properties(self.device).total_memory / one)
        return max(1, min(1024, fits // 16 * 16))

    def directions(self, idx, targets, criterion, first):
        """What final states are read along (see Search) -> float32 [S, T, 1 or 2, d]: the criterion's direction, then
        the label's. first: the number of the first sequence, which seeds the drawn labels."""
        table = self.exact.embedding.weight
        if criterion == "label":
            return table[targets].unsqueeze(2)
        found = []
        for i in range(len(idx)):
            p = self.reference(idx[i:i + 1], BIG)[0][0].softmax(-1)  # [T, V]
            if criterion == "split":
                g = generator(self.device, self.config.seed, "split", first + i)
                chosen = table[torch.multinomial(p, 1, generator=g)[:, 0]]
            else:
                chosen = p @ table
            found.append(torch.stack((chosen, table[targets[i]]), 1))
        return torch.stack(found)


def run_sequential(r, find, idx, targets, directions, budget, progress):
    """One budget, left to right -> routes [S, T, L], losses [S, T] on the label, and what was noted on the way.
    progress: called with the number of tokens done."""
    (S, T), L, H = idx.shape, r.shape.n_layer, r.shape.n_head
    cache = torch.zeros(2, L, S, H, T, r.shape.n_embd // H, device=r.device)
    fast_cache = cache if r.fast is r.exact else cache.to(r.fast.compute_dtype)
    routes = torch.empty(S, T, L, dtype=torch.uint8, device=r.device)
    losses, notes = torch.empty(S, T, device=r.device), {"flops": 0, "agreed": 0, "compared": 0}
    for t in range(T):
        now = budget(t / max(1, T - 1))
        exact = Search(r.exact, idx[:, t], cache[..., :t, :], directions[:, t])
        search = exact if r.fast is r.exact else Search(r.fast, idx[:, t], fast_cache[..., :t, :], directions[:, t])
        chosen, k, v = settle(exact, find(search, [now], r.keep), keep_keys=True)
        routes[:, t], losses[:, t] = chosen[now][0], chosen[now][1][:, -1]
        cache[0, ..., t:t + 1, :], cache[1, ..., t:t + 1, :] = k, v
        if search is not exact:
            fast_cache[..., t:t + 1, :] = cache[..., t:t + 1, :]
            notes["flops"] += search.flops
            agreement(r, find, idx[:, t], cache[..., :t, :], directions[:, t], {now: chosen[now][0]}, t, notes)
        notes["flops"] += exact.flops
        progress(S)
    plain = torch.cat([r.exact(x, route, y, reduction="none")[1]
                       for x, route, y in zip(idx.split(32), routes.split(32), targets.split(32), strict=True)])
    notes["largest_difference_from_forward"] = (plain - losses).abs().max().item()
    return routes, losses, notes


def agreement(r, find, idx, past, directions, chosen, t, notes):
    """Compare with a search that is float32 throughout: 16 sequences at every 16th position."""
    if t % 16:
        return
    n = slice(0, 16)
    whole = Search(r.exact, idx[n], past[:, :, n], directions[n])
    for budget, (route, _) in settle(whole, find(whole, list(chosen), 1)).items():
        notes["agreed"] += (route == chosen[budget][n]).all(-1).sum().item()
        notes["compared"] += len(route)


def all_big_past(r, idx):
    """-> keys and values of all-BIG tokens, float32 [2, L, S, H, T, D]"""
    cache = KVCache(r.shape, len(idx), r.device, torch.float32)
    r.exact(idx, BIG, cache=cache)
    return torch.stack((cache.k, cache.v))


def run_frozen(r, find, idx, directions, budgets, progress):
    """All budgets at once, every earlier token all-BIG -> routes [K, S, T, L], losses [K, S, T], and what was noted."""
    (S, T), L = idx.shape, r.shape.n_layer
    past = all_big_past(r, idx)
    fast_past = past if r.fast is r.exact else past.to(r.fast.compute_dtype)
    routes = torch.empty(len(budgets), S, T, L, dtype=torch.uint8, device=r.device)
    losses, notes = torch.empty(len(budgets), S, T, device=r.device), {"flops": 0, "agreed": 0, "compared": 0}
    for t in range(T):
        exact = Search(r.exact, idx[:, t], past[..., :t, :], directions[:, t])
        search = exact if r.fast is r.exact else Search(r.fast, idx[:, t], fast_past[..., :t, :], directions[:, t])
        chosen = settle(exact, find(search, budgets, r.keep))
        for i, budget in enumerate(budgets):
            routes[i, :, t], losses[i, :, t] = chosen[budget][0], chosen[budget][1][:, -1]
        notes["flops"] += exact.flops + (search.flops if search is not exact else 0)
        if search is not exact:
            agreement(r, find, idx[:, t], past[..., :t, :], directions[:, t], {b: c[0] for b, c in chosen.items()}, t,
                      notes)
        progress(S)
    return routes, losses, notes


def kept(path, compute):
    """compute() -> {name: array}, once: the result is kept in `path`, so that an interrupted run goes on from there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, compute())
    with np.load(path) as file:
        return dict(file)


def write_npz(path, arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getbuffer())


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def signature(*parts):
    """A short name for all that a result depends on, so that only what belongs together is resumed or merged."""
    return hashlib.sha256(json.dumps(list(map(str, parts))).encode()).hexdigest()[:12]


def is_there(path, r, signature):
    """Has this very result been made? (A file of the same name may hold another one: fewer tokens, another seed.)"""
    arrays = claims.load(path, r.checkpoint)
    return bool(arrays) and str(arrays["signature"]) == signature


def work(r, job):
    """How long a token takes for one budget (sequential) or for all (frozen), as a multiple of 2^L routes: for the ETA,
    roughly. A frozen search shares its tree; where it was rough, each budget's best routes are scored again."""
    L = r.shape.n_layer
    routes = (len(job.choices) / 2) ** L if job.search == "exhaustive" else 1
    again = len(parse_budgets(job.budgets, L, job.choices)) / 3 if r.keep > 1 and job.context == "frozen" else 0
    return routes + again


def keep_larger(path, r, n):
    """Raise UserError where this checkpoint's file of that name is about more than n sequences."""
    if path.exists():
        with np.load(path) as file:
            found = len(file["domain"]) if str(file["checkpoint"]) == r.checkpoint else 0
        if found > n:
            raise UserError(f"{path}: holds {found} sequences and would be replaced by {n}; ask for as many, or move "
                            "it away first")


def run_job(r, job, bar):
    """Search a job's text batch by batch, and write its npz file. Under torchrun each process takes its share of the
    batches; the first one waits for the others and merges."""
    config, L, T = r.config, r.shape.n_layer, r.shape.block_size
    idx, targets, _ = r.windows(job.tokens)
    choices = tuple(sorted(LETTERS[letter] for letter in job.choices))
    budgets = parse_budgets(job.budgets, L, job.choices)
    frozen, weight = job.context == "frozen", work(r, job)
    sign = signature(r.checkpoint, r.domains, job, (config.width, config.completion) if job.search == "dp" else "",
                     (file_hash(Path(config.reference) / "ckpt.pt"), config.seed) if job.criterion != "label" else "")
    if is_there(r.folder / f"{job.name}.npz", r, sign):
        r.parts += (r.folder / "parts").glob(f"{sign}-*")  # left where an earlier run broke off
        bar.update(len(idx) * T * weight * (1 if frozen else len(budgets)))
        return
    size = r.sequences(len(choices) ** L if job.search == "exhaustive" else 4096, len(budgets) if frozen else 1)
    find = {"exhaustive": lambda: Exhaustive(r.fast, choices, max(1, r.rows() // size)),
            "dp": lambda: partial(dp, choices=choices, width=config.width, completion=config.completion),
            "greedy": lambda: partial(greedy, choices=choices)}[job.search]()
    # A unit of work is a batch and, in the sequential context, one budget.
    units = [(labels, first) for first in range(0, len(idx), size)
             for labels in ([list(budgets)] if frozen else [[label] for label in budgets])]
    paths, progress = [], lambda n: bar.update(n * weight)
    bar.set_description(job.name, refresh=False)
    for number, (labels, first) in enumerate(units):
        which = "all" if frozen else labels[0].replace("/", "s")
        paths.append(r.folder / "parts" / f"{sign}-{size}-{first}-{which}.npz")
        if number % r.world != r.rank:
            continue

        def compute(first=first, labels=labels):
            start, rows = time.time(), slice(first, first + size)
            x, y = idx[rows].to(r.device), targets[rows].to(r.device)
            directions = r.directions(x, y, job.criterion, first)
            if frozen:
                together = [budget(0.0) for budget in budgets.values()]
                routes, losses, notes = run_frozen(r, find, x, directions, together, progress)
            else:
                routes, losses, notes = run_sequential(r, find, x, y, directions, budgets[labels[0]], progress)
                routes, losses = routes[None], losses[None]
            notes |= {"seconds": time.time() - start, "flops": float(notes["flops"])}
            return {"routes": routes.cpu().numpy(), "losses": losses.cpu().numpy(), "notes": json.dumps(notes)}
        done = bar.n
        kept(paths[-1], compute)
        bar.update(done + min(size, len(idx) - first) * T * weight - bar.n)  # where it was there already
    if r.rank == 0:
        while not all(path.exists() for path in paths):  # the other processes' share
            time.sleep(1)
        parts = [(labels, kept(path, None)) for (labels, _), path in zip(units, paths, strict=True)]
        merge(r, job, sign, size, list(budgets), parts)
        r.parts += paths


def merge(r, job, sign, size, labels, parts):
    """parts: [(which budgets, arrays of a batch)] -> the job's npz file"""
    if job.context == "frozen":
        routes, losses = (np.concatenate([part[key] for _, part in parts], 1) for key in ("routes", "losses"))
    else:
        routes, losses = (np.concatenate([np.concatenate([part[key] for which, part in parts if which == [label]], 1)
                                          for label in labels]) for key in ("routes", "losses"))
    idx, targets, domain = r.windows(job.tokens)
    usage = np.stack([np.stack([np.stack([(lane[domain == d] == c).mean(0, dtype=np.float32)
                                          for c in (SKIP, SMALL, BIG)], -1)  # [T, L, 3]
                                for d in range(len(r.domains))]) for lane in routes])
    notes = [json.loads(str(part["notes"])) for _, part in parts]
    compared, cuda = sum(note["compared"] for note in notes), r.device.type == "cuda"
    differences = [n["largest_difference_from_forward"] for n in notes if "largest_difference_from_forward" in n]
    made = {"command": "python oracle.py " + " ".join(sys.argv[1:]), "job": dataclasses.asdict(job),
            "seed": r.config.seed, "width": r.config.width, "completion": r.config.completion,
            "reference": r.config.reference, "device": torch.cuda.get_device_name(r.device) if cuda else "cpu",
            "torch": torch.__version__, "processes": r.world, "sequences_at_once": size,
            "seconds": sum(note["seconds"] for note in notes),  # of all processes
            "flops_per_token": sum(note["flops"] for note in notes) / idx.numel(),
            "agreement_with_float32": sum(note["agreed"] for note in notes) / compared if compared else None,
            "largest_difference_from_forward": max(differences, default=None),
            "peak_memory_gb": torch.cuda.max_memory_allocated(r.device) / 1e9 if cuda else None}
    write_npz(r.folder / f"{job.name}.npz", {
        "idx": idx.numpy(), "targets": targets.numpy(), "domain": domain, "domains": np.array(r.domains),
        "labels": np.array(labels), "budgets": np.array([budget_number(label) for label in labels]), "routes": routes,
        "losses": losses, "usage": usage, "context": job.context, "choices": job.choices, "search": job.search,
        "criterion": job.criterion, "checkpoint": r.checkpoint, "signature": sign, "notes": json.dumps(made)})


# ---------------------------------------------------------------------------------------------------------------------
# baselines, and what the cheaper searches cost and miss

def pattern_losses(r, context, tree, x, y):
    """Losses of all patterns [P, B, T] on x, y [B, T]: where all tokens take the pattern (sequential), or where one
    does after all-BIG ones (frozen)."""
    if context == "sequential":
        return Patterns(r.fast, x, y).leaf_losses(tree)[..., 0].unflatten(1, x.shape)
    past, directions = all_big_past(r, x).to(r.fast.compute_dtype), r.directions(x, y, "label", 0)
    return torch.stack([Search(r.fast, x[:, t], past[..., :t, :], directions[:, t]).leaf_losses(tree)[..., 0]
                        for t in range(x.shape[1])], -1)


def fixed_losses(r, context, patterns, x, y):
    """The same for a few patterns [K, L], each by itself and in float32 -> [K, B, T]"""
    if context == "sequential":
        return torch.stack([r.exact(x, pattern, y, reduction="none")[1] for pattern in patterns])
    past, directions = all_big_past(r, x), r.directions(x, y, "label", 0)
    routes = patterns[:, None].expand(-1, len(x), -1).to(x.device)
    return torch.stack([Search(r.exact, x[:, t], past[..., :t, :], directions[:, t]).score(routes)[..., 0]
                        for t in range(x.shape[1])], -1)


def run_baselines(r, context, tokens, train_tokens, bar):
    """Every pattern of SMALL and BIG on validation text and, to choose the best fixed ones, on training text; a tree
    shares their work too. -> patterns_<context>.npz"""
    L, T = r.shape.n_layer, r.shape.block_size
    path, sign = r.folder / f"patterns_{context}.npz", signature(
        r.checkpoint, r.domains, r.config.seed, "patterns", context, tokens, train_tokens)
    idx, targets, domain = r.windows(tokens)
    n = -(-train_tokens // T)
    if is_there(path, r, sign):
        r.parts += (r.folder / "parts").glob(f"{sign}-*")
        bar.update((len(idx) + n * len(r.domains)) * T * BASELINE_WORK)
        return
    while r.rank:  # the first process makes them, the others need them
        time.sleep(1)
        if is_there(path, r, sign):
            return
    size = 4 if context == "sequential" else 16  # sequences at once; a pattern's states are all T positions of each
    limit = max(1, r.rows() // (size * T if context == "sequential" else size))
    tree = make_tree(r.fast, (SMALL, BIG), (None, None), limit)
    k_of = (tree.routes == BIG).sum(1).cpu().numpy()
    rng = np.random.default_rng(derive_seed(r.config.seed, "hundred"))
    hundred = [rng.permutation((k_of == k).nonzero()[0])[:100] for k in range(L + 1)]
    curve_n = [2 ** i for i in range(math.ceil(math.log2(max(np.bincount(k_of)))) + 1)]
    weights = [least_of(int((k_of == k).sum()), curve_n).float().to(r.device) for k in range(L + 1)]

    def batches(name, x, y, compute):
        """compute(x, y) -> arrays with the sequences along axis 1, for all of x, y [n, T] -> the same, joined"""
        pieces = []
        for first in range(0, len(x), size):
            part = [t[first:first + size].to(r.device) for t in (x, y)]
            r.parts.append(r.folder / "parts" / f"{sign}-{name}-{first}.npz")
            pieces.append(kept(r.parts[-1], lambda: compute(*part)))
            bar.update(part[0].numel() * BASELINE_WORK)
        return {key: np.concatenate([piece[key] for piece in pieces], 1) for key in pieces[0]}

    chosen, found = [], []
    for d, name in enumerate(r.domains):
        bar.set_description(f"baselines, {context}, {name}", refresh=False)
        text = r.corpus.train[name]
        x, y = data.to_tensors([text[i:i + T + 1] for i in np.arange(n) * (len(text) - 1 - T) // n])
        means = batches(f"train{d}", x, y, lambda x, y: {
            "means": pattern_losses(r, context, tree, x, y).mean(-1).cpu().numpy()})["means"].mean(1)
        chosen.append([ids[means[ids].argmin()] for ids in ((k_of == k).nonzero()[0] for k in range(L + 1))])
        patterns = tree.routes[chosen[-1]]

        def compute(x, y, patterns=patterns):
            losses = pattern_losses(r, context, tree, x, y)  # [P, B, T]
            best = [losses[torch.from_numpy(ids).to(r.device)].min(0).values.mean(-1) for ids in hundred]
            curve = []
            for k in range(L + 1):
                ordered = losses[torch.from_numpy(k_of == k).to(r.device)].sort(0).values  # [C, B, T]
                curve.append(torch.einsum("nc,cbt->bn", weights[k], ordered) / T)
            arrays = {"means": losses.mean(-1), "per_token": torch.stack(best), "curve": torch.stack(curve),
                      "fixed": fixed_losses(r, context, patterns, x, y)}
            return {key: value.cpu().numpy() for key, value in arrays.items()}
        found.append(batches(f"val{d}", idx[domain == d], targets[domain == d], compute))
    write_npz(path, {key: np.concatenate([part[key] for part in found], 1) for key in found[0]} | {
        "patterns": tree.routes.cpu().numpy(), "chosen": np.array(chosen), "idx": idx.numpy(), "domain": domain,
        "domains": np.array(r.domains), "curve_n": np.array(curve_n), "checkpoint": r.checkpoint, "signature": sign,
        "train_sequences": np.array(n),
        "hundred": np.array([np.pad(ids, (0, 100 - len(ids)), constant_values=-1) for ids in hundred])})


def least_of(C, sizes):
    """-> [N, C]: the chance that the i-th smallest of C values is the least of n drawn without replacement,
    choose(C - i, n - 1) / choose(C, n). Draws of more than C are draws of all."""
    i = torch.arange(C, dtype=torch.float64)
    rows = []
    for n in (min(n, C) for n in sizes):
        def log_choose(a, b):
            return torch.lgamma(a + 1) - math.lgamma(b + 1) - torch.lgamma(a - b + 1)
        enough = C - 1 - i >= n - 1  # at least n - 1 larger ones
        log_p = log_choose((C - 1 - i).clamp_min(n - 1), n - 1) - log_choose(torch.tensor(float(C)).double(), n)
        rows.append(torch.where(enough, log_p.exp(), 0))
    return torch.stack(rows)


def run_quality(r, tokens, bar):
    """DP and greedy against exhaustive search, in float32, frozen context, at every 8th position -> list of rows:
    search, k, gap in nats with its interval, share of exhaustive's work. Where there are too many routes for that (2^L
    above 2^14), the widest DP stands in for it."""
    L, T = r.shape.n_layer, r.shape.block_size
    idx, targets, _ = r.windows(8 * tokens)
    choices, budgets = (SMALL, BIG), [(k, None) for k in range(L + 1)]
    variants = {"greedy": partial(greedy, choices=choices)}
    for completion, widths in (("early", (1, 2, 4, 8, 16, 32)), ("small", (1, 4, 16)), ("big", (1, 4, 16))):
        variants |= {f"dp, {completion}, width {w}": partial(dp, choices=choices, width=w, completion=completion)
                     for w in widths}
    if L <= 14:
        variants["exhaustive"] = Exhaustive(r.exact, choices, max(1, r.rows() // 2 // 16))
    best, positions = ("exhaustive" if L <= 14 else "dp, early, width 32"), range(4, T, 8)
    size = 16 if r.device.type == "cpu" else 128  # sequences at once; a GPU wants many
    losses, flops = {name: np.zeros((len(idx), L + 1)) for name in variants}, dict.fromkeys(variants, 0.0)
    sign = signature(r.checkpoint, r.domains, "quality", tokens, size, list(variants))
    bar.set_description("quality of the searches", refresh=False)
    for first in range(0, len(idx), size):
        rows = slice(first, first + size)
        x, y = idx[rows].to(r.device), targets[rows].to(r.device)
        past, directions = all_big_past(r, x), r.directions(x, y, "label", first)
        for t in positions:
            def compute(t=t, x=x, past=past, directions=directions):
                """-> losses [variants, L + 1, B], flops [variants]"""
                scored, spent = [], []
                for find in variants.values():
                    search = Search(r.exact, x[:, t], past[..., :t, :], directions[:, t])
                    found = find(search, budgets, 1)
                    spent.append(float(search.flops))
                    scored.append(search.score(torch.cat([found[budget] for budget in budgets]))[..., -1].cpu().numpy())
                return {"losses": np.array(scored), "flops": np.array(spent)}
            r.parts.append(r.folder / "parts" / f"{sign}-{first}-{t}.npz")
            part = kept(r.parts[-1], compute)
            for name, loss, spent in zip(variants, part["losses"], part["flops"], strict=True):
                losses[name][rows] += loss.T / len(positions)
                flops[name] += spent
            bar.update(len(x) * QUALITY_WORK)
    return [{"search": name, "k": k, "gap": claims.interval(losses[name][:, k] - losses[best][:, k]),
             "work": flops[name] / flops[best], "loss": losses[name][:, k].mean(), "against": best,
             "tokens": len(idx) * len(positions), "asked": tokens, "domains": r.domains}
            for name in variants if name != best for k in range(L + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# command

def check(config):
    """Raise UserError for values that cannot work -> the Job that the flags ask for, or None for the preset's plan."""
    asked = {key: getattr(config, key) for key in ("search", "choices", "context", "budgets", "criterion")
             if getattr(config, key)}
    for name, options in (("search", ("exhaustive", "dp", "greedy")), ("context", ("sequential", "frozen")),
                          ("criterion", ("label", "expected", "split"))):
        if asked.get(name, options[0]) not in options:
            raise UserError(f"--{name}={asked[name]}: choose from {', '.join(options)}")
    if config.completion not in ("early", "small", "big"):
        raise UserError(f"--completion={config.completion}: choose from early, small, big")
    for name, least in (("tokens", 0), ("batch_size", 0), ("width", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name}={getattr(config, name)}: must be {least} or more")
    defaults = OracleConfig.width, OracleConfig.completion
    if asked.get("search") != "dp" and (config.width, config.completion) != defaults:
        raise UserError(f"--search={asked.get('search', 'exhaustive')}: --width and --completion are of --search=dp; "
                        "leave them out, or ask for that")
    job = Job(config.tokens or PLANS[config.preset][1][0].tokens, **asked) if asked else None
    if job:
        if len(set(job.choices)) != len(job.choices) or len(job.choices) < 2 or set(job.choices) - set(LETTERS):
            raise UserError(f"--choices={job.choices}: give two or three of x (SKIP), s (SMALL) and b (BIG), each once")
        if job.search == "greedy" and (len(job.choices) != 2 or "b" not in job.choices):
            raise UserError(f"--choices={job.choices}: greedy promotes one choice to BIG; give sb or xb")
        if job.context == "frozen" and "-" in job.budgets:
            raise UserError(f"--budgets={job.budgets}: a ramp changes along the sequence; use --context=sequential")
        if job.criterion != "label" and not config.reference:
            raise UserError(f"--criterion={job.criterion}: needs --reference, a run trained apart: "
                            "python train.py --train_route=big --seed=11 --out_dir=out/reference")
    return job


@torch.no_grad()
def main(argv=None):
    config = parse_config(OracleConfig, argv, PRESETS)
    job = check(config)
    r = Run(config)
    L, T = r.shape.n_layer, r.shape.block_size
    baselines, jobs, quality_tokens = ([], [job], 0) if job else PLANS[config.preset]
    if not job:  # the plan takes what there is; a --tokens that does not fit is refused by r.windows
        longest = max((j.tokens for j in jobs), default=0)

        def tokens_of(j):  # a search that is planned on a part of the text keeps to that part
            return math.ceil(config.tokens * j.tokens / longest) if config.tokens else min(j.tokens, r.holds())
        jobs = [dataclasses.replace(j, tokens=tokens_of(j)) for j in jobs
                if (j.criterion == "label" or r.reference) and (j.search != "exhaustive" or L <= 14)]
        baselines = [(context, config.tokens or min(tokens, r.holds()), train_tokens)
                     for context, tokens, train_tokens in baselines if L <= 14]
        quality_tokens = min(quality_tokens, r.holds() // 8)
        last = claims.last_report(config.out_dir, r.checkpoint).get("quality", [])
        if last and (last[0]["asked"], last[0].get("domains")) == (quality_tokens, r.domains):
            quality_tokens = 0
    total = 0  # what the bar counts: tokens times budgets, in units of 2^L routes (see work)
    for j in jobs:
        if j.search == "exhaustive" and len(j.choices) ** L > 2 ** 20:
            raise UserError(f"--search=exhaustive: {len(j.choices)}^{L} routes are too many; use --search=dp or greedy")
        n_budgets = len(parse_budgets(j.budgets, L, j.choices))
        n = len(r.windows(j.tokens)[0])
        keep_larger(r.folder / f"{j.name}.npz", r, n)
        total += n * T * work(r, j) * (1 if j.context == "frozen" else n_budgets)
    for context, tokens, train_tokens in baselines:
        keep_larger(r.folder / f"patterns_{context}.npz", r, len(r.windows(tokens)[0]))
        total += (len(r.windows(tokens)[0]) + -(-train_tokens // T) * len(r.domains)) * T * BASELINE_WORK
    if quality_tokens:
        total += len(r.windows(8 * quality_tokens)[0]) * len(range(4, T, 8)) * QUALITY_WORK
    print(f"{config.out_dir}: {L} layers, width {r.shape.n_embd}, checkpoint {r.checkpoint}, corpus "
          f"{r.corpus.fingerprint}; {r.device}, search in {r.fast.compute_dtype}")
    if not job and not r.reference:
        print("no --reference: foresight and hindsight are left out. Make one with `python train.py --train_route=big "
              "--seed=11 --out_dir=out/reference`")
    quality, about = [], {"fingerprint": r.corpus.fingerprint, "seed": r.rest["train_config"]["seed"]}
    try:
        with tqdm(total=total, unit="work", unit_scale=True, dynamic_ncols=True, disable=r.rank > 0, smoothing=0.1,
                  mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
            for baseline in baselines:
                run_baselines(r, *baseline, bar)
            for j in jobs:
                run_job(r, j, bar)
            if quality_tokens and r.rank == 0:
                claims.report(config.out_dir, r.checkpoint, [], about)  # all that is known so far
                quality = run_quality(r, quality_tokens, bar)
    except torch.OutOfMemoryError:
        raise UserError("out of GPU memory: lower --batch_size (sequences in flight)") from None
    except KeyboardInterrupt:
        print("interrupted: finished batches are kept; the same command goes on from there", file=sys.stderr)
        raise
    if r.rank == 0:
        report = claims.report(config.out_dir, r.checkpoint, quality, about)
        for path in r.parts:  # all of them are in their files now
            path.unlink(missing_ok=True)
        if job:  # not once more what the run's other searches have told
            report |= {"quality": [], "findings": []} | ({"controls": {}} if job.criterion == "label" else {})
            print(f"{config.out_dir}/oracle.json has the run's other searches and its findings, too; of this one:")
        print(claims.summary(report, [j.name for j in jobs]))
        print(f"done: {config.out_dir}/oracle.json and {r.folder}/*.npz")


if __name__ == "__main__":
    run(main)
