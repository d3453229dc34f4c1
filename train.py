"""Stage 1: train a Duo GPT under random routing (paper, section 3.1). `python train.py` is enough.

Deviations from the paper: (1) in every skip_every-th sequence tokens also skip layers, so that routes with skips are in
distribution for the oracle and the routers; (2) each sequence and layer has an exact number of BIG and SKIP tokens, a
random set of them (see model.random_route); (3) small models, and real Python text in place of web text.

Logged to out_dir/metrics.jsonl, one object a line:
    kind "start"  config, versions, device, corpus fingerprint; one for each start or resume
    kind "train"  step, loss (mean over the steps since the last line, nats), learning_rate, grad_norm, tokens (so far);
                  with a router (router.py --joint) also cross_entropy, and big, the BIG choices per token
    kind "eval"   step, and for each domain and route: loss (nats per token), bits_per_byte; big for a router's
    kind "end"    step, the last evaluation, and the interpolated bigram's loss on the same validation tokens
"""
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import retrofit
from common import (
    UserError,
    append_jsonl,
    arg,
    catch_signals,
    compute_dtype,
    derive_seed,
    find_device,
    generator,
    load_checkpoint,
    open_out_dir,
    parse_config,
    read_jsonl,
    run,
    save_checkpoint,
    write_atomic,
)
from model import BIG, SMALL, DuoConfig, DuoGPT, random_route, route_counts


@dataclass
class TrainConfig:
    out_dir: str = arg("out", "folder of the run: ckpt.pt, config.json, metrics.jsonl, tokenizer.json")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = arg(1, "seeds init, data order, routing and evaluation, each a stream of its own")
    preset: str = arg("auto", "cpu, gpu or debug; auto takes gpu where there is one. Flags given beside it win")
    resume: bool = arg(False, "go on from out_dir/ckpt.pt")
    init_from: str = arg("", "folder of a pretrained Llama (Hugging Face's files): it is BIG and frozen, SMALL learns")
    # data
    corpus: str = arg("python", "python (installed source), tinyshakespeare, tinystories, or a path to text")
    corpus_mb: int = arg(0, "keep only so many MB of the python corpus, 0 for all")
    tokenizer: str = arg("bpe", "bpe (trained on the corpus) or gpt2")
    vocab_size: int = arg(4096, "entries of the bpe vocabulary")
    data_dir: str = arg("data", "where prepared corpora are kept")
    # model
    n_layer: int = arg(12, "layers")
    n_head: int = arg(6, "attention heads")
    n_embd: int = arg(384, "width")
    block_size: int = arg(256, "context, in tokens")
    big_width: int = arg(0, "inner width of the BIG FFN; 0: 4 * n_embd")
    small_width: int = arg(0, "inner width of the SMALL FFN; 0: a sixteenth of BIG")
    # routing
    train_route: str = arg("random", "random, big (a dense baseline), or big_then_small (half the steps each, Fig. 8)")
    p_big: float = arg(0.5, "share of BIG among the layers that a token does not skip")
    p_skip: float = arg(0.333, "share of SKIP in the sequences where tokens may skip layers")
    skip_every: int = arg(8, "the first of every so many sequences in a batch is one of these; 0: none")
    # optimization
    max_steps: int = arg(3000, "optimizer steps")
    batch_size: int = arg(128, "sequences per step, over all processes")
    micro_batch: int = arg(0, "sequences per forward and process, 0 for all; lower it when memory runs out")
    learning_rate: float = arg(2e-3, "peak")
    warmup_steps: int = arg(100, "linear warm-up")
    final_lr: float = arg(0.05, "the cosine ends at this share of the peak")
    weight_decay: float = arg(0.1, "on matrices only")
    grad_clip: float = arg(1.0, "largest gradient norm")
    # bookkeeping
    eval_interval: int = arg(500, "steps between evaluations")
    eval_sequences: int = arg(256, "validation sequences per domain")
    save_interval: int = arg(500, "steps between checkpoints")
    compile: str = arg("auto", "on, off, or auto: on for CUDA")


PRESETS = {
    "gpu": {},  # the defaults
    "cpu": {"corpus_mb": 20, "vocab_size": 1024, "n_embd": 64, "n_head": 2, "block_size": 128, "batch_size": 8,
            "max_steps": 1700, "learning_rate": 4e-3, "eval_interval": 425, "save_interval": 425, "eval_sequences": 64},
    "debug": {"corpus_mb": 1, "vocab_size": 512, "n_embd": 32, "n_head": 2, "block_size": 32, "batch_size": 4,
              "max_steps": 20, "warmup_steps": 5, "eval_interval": 10, "save_interval": 10, "eval_sequences": 8},
}
# Fields that a resumed run may change. (Another device draws other routes: each kind has its own random generator.)
FREE = {"out_dir", "device", "resume", "preset", "data_dir", "micro_batch", "eval_interval", "save_interval", "compile",
        "tokens"}  # the last: of router.py --joint, evaluation only
LOG_INTERVAL = 10  # steps between log lines, and between checks for NaN (each check waits for the device)


def check(config, world):
    """Raise UserError for values that cannot work, before anything is computed."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "max_steps", "batch_size", "eval_interval",
                 "eval_sequences", "save_interval", "learning_rate", "grad_clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name}={getattr(config, name)}: must be above 0, and finite")
    for name in ("big_width", "small_width", "skip_every", "micro_batch", "warmup_steps", "final_lr", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"--{name}={getattr(config, name)}: must be 0 or above, and finite")
    for name in ("p_big", "p_skip"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"--{name}={getattr(config, name)}: must lie in 0..1")
    for name, allowed in (("train_route", ("random", "big", "big_then_small")), ("compile", ("auto", "on", "off"))):
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name}={getattr(config, name)}: choose from {', '.join(allowed)}")
    if config.init_from and config.train_route != "random":
        raise UserError(f"--train_route={config.train_route}: with --init_from BIG is frozen and SMALL learns beside "
                        "it, under random routing; leave it out")
    model_shape(config, 64)  # before the corpus is prepared, which takes a while
    if config.batch_size % world:
        raise UserError(f"--batch_size={config.batch_size}: must be a multiple of the {world} processes")
    config.micro_batch = config.micro_batch or config.batch_size // world
    if config.batch_size // world % config.micro_batch:
        raise UserError(f"--micro_batch={config.micro_batch}: must divide the {config.batch_size // world} sequences "
                        "that each process has per step")


def model_shape(config, vocab_size):
    """-> DuoConfig. Raises UserError for widths that do not fit together."""
    try:
        return DuoConfig(config.n_layer, config.n_head, config.n_embd, config.block_size, vocab_size, config.big_width,
                         config.small_width)
    except ValueError as error:
        raise UserError(str(error)) from None


def phase(config, step):
    """-> what routes the tokens at this step ("random", "big" or "router"), the step within the phase, its length."""
    if config.train_route != "big_then_small":
        return config.train_route, step, config.max_steps
    half = config.max_steps // 2
    return ("big", step, half) if step < half else ("random", step - half, config.max_steps - half)


def learning_rate(config, step):
    """Linear warm-up, then a cosine down to final_lr * peak; anew in each phase."""
    _, step, steps = phase(config, step)
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def freeze(model, config, step):
    """While all tokens are routed to BIG, the SMALL FFNs stay as they are; in the second phase of big_then_small they
    alone learn (paper, section 3.1, the ablation of Fig. 8), and so they do beside a pretrained model (appendix A)."""
    kind = phase(config, step)[0]
    small_learns = kind != "big"
    rest_learns = kind == "big" or config.train_route != "big_then_small" and not config.init_from
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(small_learns if ".small." in name else rest_learns)


def skipping(config, first, n):
    """-> which of the sequences first..first+n of a batch may skip, as a slice of them."""
    return slice(-first % config.skip_every, n, config.skip_every) if config.skip_every else slice(0, 0)


def stage1_route(config, B, generator):
    """Random routing of a whole batch -> [B, T, L]. Two ways (SMALL, BIG) as in the paper, but three ways in every
    skip_every-th sequence. (RESULTS.md has what skips in training cost and what they buy.)"""
    T, L = config.block_size, config.n_layer
    route = random_route(B, T, L, 0.0, config.p_big, generator)
    three_way = route[skipping(config, 0, B)]
    if len(three_way):
        three_way[:] = random_route(len(three_way), T, L, config.p_skip, config.p_big * (1 - config.p_skip), generator)
    return route


def stage1_counts(config, first, n):
    """-> the counts (model.route_counts) of sequences first..first+n of a stage1_route."""
    T, L = config.block_size, config.n_layer
    n_three = len(range(n)[skipping(config, first, n)])
    two_way = route_counts(n - n_three, T, L, 0.0, config.p_big)
    three_way = route_counts(n_three, T, L, config.p_skip, config.p_big * (1 - config.p_skip))
    return [tuple(map(sum, zip(*pair, strict=True))) for pair in zip(two_way, three_way, strict=True)]


def micro_batches(config, corpus, device, step, rank, world):
    """Yield x, y [b, T], route, counts: this process's part of the step's batch.

    The whole batch, data and routes, is drawn from the step's own seed and then cut up: one process and many, with any
    micro_batch, train on the same tokens and routes.
    """
    B = config.batch_size
    x, y = data.sample_batch(corpus, B, config.block_size, derive_seed(config.seed, "data", step))
    kind = phase(config, step)[0]
    if kind == "random":
        routes = stage1_route(config, B, generator(device, config.seed, "route", step))
    per_process = B // world
    for first in range(rank * per_process, (rank + 1) * per_process, config.micro_batch):
        rows = slice(first, first + config.micro_batch)
        xy = [t[rows].pin_memory() if device.type == "cuda" else t[rows] for t in (x, y)]
        route, counts = BIG, None
        if kind == "random":
            route, counts = routes[rows], stage1_counts(config, first, config.micro_batch)
        yield *(t.to(device, non_blocking=True) for t in xy), route, counts


@torch.no_grad()
def evaluate(model, corpus, config, device, router=None):
    """-> {domain: {route: {"loss": nats per token, "bits_per_byte"}}}, at all-small, random (two ways) and all-big.

    A model trained at all-big only (train_route=big) is evaluated there; one trained with a router under its hard
    choices, with "big", the BIG choices per token. Uses its own random stream; changes nothing.
    """
    model.eval()
    result = {}
    token_bytes = torch.from_numpy(corpus.token_bytes)
    for domain in corpus.domains:
        x, y = validation_windows(corpus, config, domain)
        n, n_bytes = len(x), token_bytes[y].sum().item()
        routes = {"big": BIG} if router is None else {"router": router}
        if config.train_route not in ("big", "router"):
            g = generator(device, config.seed, "eval", domain)
            random = random_route(n, config.block_size, config.n_layer, 0.0, config.p_big, g)
            routes = {"small": SMALL, "random": random, "big": BIG}
        result[domain] = {}
        for name, route in routes.items():
            total, big = 0.0, 0
            for i in range(0, n, 32):
                rows = route[i:i + 32] if isinstance(route, torch.Tensor) else route
                _, loss, stats = model(x[i:i + 32].to(device), rows, y[i:i + 32].to(device), reduction="none",
                                       return_stats=True)
                total += loss.cpu().double().sum().item()
                big += (stats["route"] == BIG).sum().item()
            result[domain][name] = {"loss": total / y.numel(), "bits_per_byte": total / math.log(2) / max(n_bytes, 1)}
            if router is not None:
                result[domain][name]["big"] = big / y.numel()
    model.train()
    return result


def validation_windows(corpus, config, domain):
    """-> x, y [n, T]: the first choice of eval_sequences, fewer where the validation set is smaller."""
    n = min(config.eval_sequences, (len(corpus.val[domain]) - 1) // config.block_size)
    return data.eval_windows(corpus, domain, max(n, 1), config.block_size)


def bigram(corpus, config):
    """The bar to pass: an interpolated bigram, fitted on the tokens that the run was trained on -> {domain: nats}."""
    seen = {domain: np.zeros(len(tokens), dtype=bool) for domain, tokens in corpus.train.items()}
    for step in range(config.max_steps):
        seed = derive_seed(config.seed, "data", step)
        for d, start in zip(*data.window_starts(corpus, config.batch_size, config.block_size, seed), strict=True):
            seen[corpus.domains[d]][start:start + config.block_size + 1] = True
    windows = {domain: validation_windows(corpus, config, domain) for domain in corpus.domains}
    return data.bigram_loss(corpus, seen, windows)


def table(result, baseline=None):
    """-> text: the evaluation as a table, for the terminal."""
    lines = [f"  {'domain':<8}{'route':<8}{'nats/token':>11}{'perplexity':>12}{'bits/byte':>11}"]
    for domain, routes in result.items():
        for route, m in routes.items():
            nats, bits = m["loss"], m["bits_per_byte"]
            big = f"   {m['big']:.2f} BIG per token" if "big" in m else ""
            lines.append(f"  {domain:<8}{route:<8}{nats:>11.4f}{math.exp(nats):>12.2f}{bits:>11.4f}{big}")
        if baseline:
            lines.append(f"  {domain:<8}{'bigram':<8}{baseline[domain]:>11.4f}{math.exp(baseline[domain]):>12.2f}")
    return "\n".join(lines)


def average_gradients(model, world):
    """Sum of all processes' gradients / world, in one all-reduce. An FFN that no token here chose counts as zero."""
    learning = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in learning])
    dist.all_reduce(flat)
    flat /= world
    for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
        parameter.grad = part.view_as(parameter)


def compiled(model, batches, config, corpus, device, step, rank, world):
    """torch.compile(model), proven on a real batch; the model itself, after one clear line, where that fails."""
    if config.compile == "off" or config.compile == "auto" and device.type != "cuda":
        return model
    start = time.time()
    # reduce-overhead captures CUDA graphs: at width 384 launching kernels one by one costs more than running them. A
    # graph's gradients live in buffers that its next replay overwrites, so accumulation does without.
    one_forward = config.micro_batch * world == config.batch_size
    mode = "reduce-overhead" if device.type == "cuda" and one_forward else None
    try:
        fast = torch.compile(model, dynamic=False, mode=mode)
        x, y, route, counts = next(batches(config, corpus, device, step, rank, world))
        for _ in range(3):  # warm up, capture, replay
            fast(x, route, y, counts=counts, return_logits=False)[1].backward()
            model.zero_grad(set_to_none=True)
        if rank == 0:
            print(f"compiled in {time.time() - start:.0f} s")
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing C++ compiler, an unsupported GPU, ...: training must still run
        model.zero_grad(set_to_none=True)
        if rank == 0:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            print(f"torch.compile failed ({reason}); "
                  "training goes on without it, more slowly (--compile=off hides this line)")
        return model


def start_or_resume(config, model, optimizer, corpus, device, first=True, router=None):
    """-> the step to start from. Raises UserError rather than overwrite a run, or resume one with another config."""
    path, step = Path(config.out_dir) / "ckpt.pt", 0
    if path.exists():
        if not config.resume:
            raise UserError(f"{path}: a run is here already; go on with it by --resume, or choose another --out_dir")
        checkpoint = load_checkpoint(path, device)
        now, then = dataclasses.asdict(config), {"init_from": ""} | checkpoint["train_config"]  # older runs lack it
        for name in now:
            if name not in FREE and now[name] != then.get(name):
                raise UserError(f"{path}: was trained with --{name}={then.get(name)}, not {now[name]}; give the same "
                                "value, or choose another --out_dir")
        if checkpoint["fingerprint"] != corpus.fingerprint:
            raise UserError(f"{path}: was trained on corpus {checkpoint['fingerprint']}, but {corpus.folder} holds "
                            f"{corpus.fingerprint}; give the same --corpus, or choose another --out_dir")
        model.load_state_dict(checkpoint["model"])
        if router is not None:
            router.load_state_dict(checkpoint["router"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    # What was logged after the checkpoint will be logged again. (Without one, that is all but the start lines.)
    log = Path(config.out_dir) / "metrics.jsonl"
    if first and log.exists():
        kept = [line for line in read_jsonl(log) if line["step"] <= step]
        write_atomic(log, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return step


def join_processes(config):
    """-> rank, world. torchrun sets RANK; without it there is one process."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if torch.cuda.is_available() and config.device != "cpu" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def train(config, joint=None):
    """Train as `config` says -> the last evaluation ({} but in the first process), or None where it was interrupted (by
    SIGINT or SIGTERM, and saved).

    joint: model -> a router.Joint, which then routes, and whose router learns along (router.py --joint)."""
    rank, world = join_processes(config)
    if config.init_from:
        if joint:
            raise UserError(f"--init_from={config.init_from}: not with --joint, which trains the base too; make the "
                            "run with train.py, then train routers on it without --joint")
        pretrained, taken = retrofit.adopt(config)
    check(config, world)
    config.train_route = "router" if joint else config.train_route
    device = find_device(f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and config.device in ("auto", "cuda")
                         and torch.cuda.is_available() else config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # where NCCL and CUDA graphs look
    folder, first = open_out_dir(config.out_dir), rank == 0
    say = print if first else lambda *_, **__: None
    if world > 1 and not first:
        dist.barrier()  # the first process prepares the corpus, the others then find it
    corpus = data.load(data.prepare(config.corpus, config.tokenizer, config.vocab_size, config.corpus_mb,
                                    config.data_dir))
    if world > 1 and first:
        dist.barrier()
    for domain, tokens in [*corpus.train.items(), *corpus.val.items()]:
        if len(tokens) <= config.block_size:
            raise UserError(f"--corpus={config.corpus}: a part ({domain}) holds {len(tokens)} tokens, fewer than one "
                            f"context; give more text, or a --block_size below {len(tokens)}")

    # A vocabulary of a multiple of 64 keeps the read-out's matrix shapes fast; the entries added are never targets.
    model_config = pretrained if config.init_from else model_shape(config, -(-corpus.vocab_size // 64) * 64)
    model = DuoGPT(model_config).init_weights(generator("cpu", config.seed, "init"))
    if config.init_from and not (folder / "ckpt.pt").exists():  # else the weights come from there
        retrofit.load_weights(model, config.init_from)
    model = model.to(device)
    model.compute_dtype, why = compute_dtype(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    # What learns, what feeds it, and the router within: without --joint the model, micro_batches, none.
    learner, batches, router = model, micro_batches, None
    if joint:
        learner = joint(model)
        batches, router = learner.batches, learner.router
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": gains, "weight_decay": 0.0},
                                   *(router.groups(config.weight_decay) if joint else [])],
                                  lr=config.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    step = start_or_resume(config, model, optimizer, corpus, device, first, router)

    say(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items()))
    say(*([taken] if config.init_from else []), model.parameter_table(), sep="\n")
    say(f"device {device}, processes {world}, activations {model.compute_dtype} ({why})")
    say(f"corpus {corpus.name}, fingerprint {corpus.fingerprint}")
    if step >= config.max_steps:
        say(f"{config.out_dir}/ckpt.pt: finished already, {step} of {config.max_steps} steps; nothing to do")
        return {}
    log = folder / "metrics.jsonl"
    if first:
        write_atomic(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
        write_atomic(folder / "tokenizer.json", (corpus.folder / "tokenizer.json").read_bytes())  # for sample.py
        append_jsonl(log, {"kind": "start", "step": step, "config": dataclasses.asdict(config),
                           "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
                           "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                           "processes": world, "fingerprint": corpus.fingerprint})

    def save():
        if first:
            save_checkpoint(folder / "ckpt.pt", {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "model_config": dataclasses.asdict(model_config), "train_config": dataclasses.asdict(config),
                "fingerprint": corpus.fingerprint, "corpus": str(corpus.folder),
                **({"router": router.state_dict()} if joint else {})})

    freeze(model, config, step)
    # The same parameters; evaluate and save use `model`.
    fast = compiled(learner, batches, config, corpus, device, step, rank, world)
    stop, restore_signals = catch_signals()
    bar = tqdm(total=config.max_steps, initial=step, disable=not first, unit="step", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 15,
               bar_format="step {n}/{total} {percentage:3.0f}% |{bar}|{postfix} [{elapsed}<{remaining}]")
    losses, smoothed, timed, timed_steps, result, baseline = [], None, 0.0, 0, {}, None
    tokens_per_step = config.batch_size * config.block_size
    tick, warm_until = time.time(), step + 10  # the first steps are left out of tok/s
    try:
        while step < config.max_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            if step == config.max_steps // 2:
                freeze(model, config, step)
            n_micro = config.batch_size // world // config.micro_batch
            figures = 0  # the loss, and what a router has to report
            for x, y, route, counts in batches(config, corpus, device, step, rank, world):
                _, loss, *more = fast(x, route, y, counts=counts, return_logits=False)
                (loss / n_micro).backward()
                figures = figures + torch.stack([loss, *more]).detach() / n_micro
            if world > 1:
                average_gradients(learner, world)
            norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(torch.where(norm.isfinite(), figures, norm))  # such a gradient has spoilt the weights too
            step += 1
            bar.update()

            evaluating = step % config.eval_interval == 0 or step == config.max_steps
            saving = step % config.save_interval == 0 or step == config.max_steps
            leaving = bool(stop) and world == 1
            if step % LOG_INTERVAL == 0 or evaluating or saving or leaving:
                values = torch.stack(losses)  # [steps, figures]
                if world > 1:  # the mean loss, and whether any process was told to stop
                    flag = torch.cat((values.flatten() / world, torch.tensor([float(bool(stop))], device=device)))
                    dist.all_reduce(flag)
                    values, leaving = flag[:-1].view_as(values), flag[-1].item() > 0  # all leave at the same step
                (values, *more), losses = values.T.tolist(), []
                bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
                if bad is not None:
                    raise UserError(f"loss is {values[bad]} at step {step - len(values) + bad + 1}: lower "
                                    f"--learning_rate (now {config.learning_rate}) or --grad_clip; the last checkpoint "
                                    f"in {config.out_dir} is whole")
                mean = sum(values) / len(values)
                smoothed = mean if smoothed is None else 0.7 * smoothed + 0.3 * mean
                if step > warm_until:
                    timed, timed_steps = timed + time.time() - tick, timed_steps + len(values)
                tick = time.time()
                speed = f", {timed_steps * tokens_per_step / timed:,.0f} tok/s" if timed_steps else ""
                bar.set_postfix_str(f"loss {smoothed:.4f}{speed}", refresh=False)
                if first:
                    append_jsonl(log, {"kind": "train", "step": step, "loss": mean,
                                       "learning_rate": learning_rate(config, step - 1),
                                       "grad_norm": norm.item(), "tokens": step * tokens_per_step,
                                       **{name: sum(v) / len(v) for name, v in
                                          zip(learner.figures if joint else (), more, strict=True)}})
            if evaluating and first:
                result = evaluate(model, corpus, config, device, router)
                append_jsonl(log, {"kind": "eval", "step": step, "domains": result})
                if step < config.max_steps:  # the last one is printed at the end, beside the bigram's
                    bar.write(f"step {step}, validation\n{table(result)}")
            if step == config.max_steps and first:  # before the checkpoint: where that is complete, the log is too
                baseline = bigram(corpus, config)
                append_jsonl(log, {"kind": "end", "step": step, "domains": result, "bigram": baseline,
                                   "tokens_per_second": timed_steps * tokens_per_step / timed if timed_steps else None})
            if saving or leaving:
                save()
            tick = time.time() if evaluating or saving else tick
            if leaving:
                break
    finally:
        bar.close()
        restore_signals()
    if step < config.max_steps:
        say(f"interrupted: {config.out_dir}/ckpt.pt holds step {step} of {config.max_steps}; the same command with "
            "--resume goes on (bash run.sh does so by itself)")
        return None
    say(f"done: {config.out_dir}/ckpt.pt. The bigram is interpolated, fitted on the same training tokens.\n"
        f"{table(result, baseline)}\nnext: python sample.py --out_dir={config.out_dir}")
    return result


def leave():
    """End the process group, where there is one."""
    if dist.is_initialized():
        dist.barrier()  # one that leaves while the first still works may abort, which torchrun calls a failure
        dist.destroy_process_group()


def main(argv=None):
    result = train(parse_config(TrainConfig, argv, PRESETS))
    leave()
    return 130 if result is None else 0


if __name__ == "__main__":
    run(main)
