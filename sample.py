"""Write text with a trained run, each token under a route of its own, and show what it cost.

    python sample.py                                # every layer BIG for every token
    python sample.py --route=random                 # BIG or SMALL as in training; the colour shows what each token cost
    python sample.py --route=012121212121           # one pattern for all, a digit per layer: 0 skip, 1 small, 2 big
    python sample.py --compare --prompt="import"    # all-big and all-small side by side
    python sample.py --router=out/routers/linear_k4_s1.pt   # a trained router decides, token by token

Text goes to stdout as it comes; the last line, with the cost and the speed, goes to stderr.
"""
import codecs
import contextlib
import itertools
import os
import re
import shutil
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import data
from common import UserError, arg, find_device, generator, load_run, parse_config, run
from gates import Router
from model import BIG, SMALL, KVCache
from oracle import file_hash
from router import load_router


@dataclass
class SampleConfig:
    out_dir: str = arg("out", "folder of the run")
    device: str = arg("auto", "auto, cpu, cuda, cuda:N or mps")
    seed: int = arg(1, "seeds the text and the routing, each a stream of its own")
    preset: str = arg("auto", "accepted as everywhere; the run itself knows its sizes")
    prompt: str = arg(None, "how the text starts; empty: a new document; left out: words that suit the corpus")
    tokens: int = arg(200, "tokens to write; more than the context holds is fine")
    route: str = arg("big", "big, small, random (with the run's p_big), or a digit per layer: 0 skip, 1 small, 2 big")
    router: str = arg("", "a file of out_dir/routers/, made by router.py; it decides in place of --route")
    temperature: float = arg(0.8, "below 1 sharpens the distribution, 0 always takes the likeliest token")
    top_k: int = arg(0, "draw among the k likeliest tokens only, 0 for all")
    compare: bool = arg(False, "all-big and all-small side by side, as one batch")


PRESETS = {"cpu": {}, "gpu": {}, "debug": {}}
# A space belongs to the word behind it (data.PATTERN): after a prompt that ends in one, that word's usual token is out.
PROMPTS = {"python": "def", "tinyshakespeare": "ROMEO:", "tinystories": "Once upon a time"}
# Pale yellow to dark blue, safe for colour-blind readers: (background, text) among a terminal's 256 colours.
SCALE = [(229, 16), (186, 16), (144, 16), (102, 16), (60, 231), (17, 231)]


# ---------------------------------------------------------------------------------------------------------------------
# generation

@torch.inference_mode()
def generate(model, idx, n, route, pick):
    """Yield n times: token [B] int64, and the route [B, L] uint8 that the model took to predict it.

    idx [B, T]: the prompt, at least one token. route: an int, a pattern [L], one pattern per sequence [B, 1, L] (or
    [B, 1, 1]), or a router. pick: logits [B, V] -> token [B]. The text may outgrow block_size: see below.
    """
    with route.attached(model) if isinstance(route, Router) else contextlib.nullcontext():
        yield from generate_attached(model, idx, n, route, pick)


def generate_attached(model, idx, n, route, pick):
    """generate, where the model is already what the router routes."""
    block_size, L = model.config.block_size, model.config.n_layer
    cache = KVCache(model.config, len(idx), idx.device, model.compute_dtype)
    new = idx[:, -block_size:]
    per_sequence = isinstance(route, torch.Tensor) and route.dim() == 3
    tokens, routes = new[:, :0], torch.empty(len(idx), 0, L, dtype=torch.uint8, device=idx.device)  # those in the cache
    for _ in range(n):
        if cache.length + new.size(1) > block_size:
            # The context is full: read its last half again, at positions 0, 1, ..., each token on the route it had.
            # cache.seq stays, so that a router, which has seen each token once, loses nothing that it counts.
            half = slice(cache.length - block_size // 2, None)
            tokens, routes, cache.length = tokens[:, half], routes[:, half], 0
            model(tokens, routes, cache=cache)
        now = route.expand(-1, new.size(1), L) if per_sequence else route
        logits, _, stats = model(new, now, cache=cache, return_stats=True)
        tokens, routes = torch.cat((tokens, new), 1), torch.cat((routes, stats["route"]), 1)
        token = pick(logits[:, -1])
        yield token, routes[:, -1]
        new = token[:, None]


def sampler(vocab_size, temperature, top_k, rng):
    """-> pick: logits [B, V] -> token [B]. Entries from vocab_size on only pad the matrix (train.py): never drawn."""
    def pick(logits):
        if temperature == 0:
            return logits[:, :vocab_size].argmax(-1)
        # On the CPU, where a seed means the same draws on every machine; float64 bears the smallest temperature.
        top, ids = logits[:, :vocab_size].cpu().double().topk(min(top_k or vocab_size, vocab_size))  # [B, k], falling
        p = ((top - top[:, :1]) / temperature).softmax(-1)
        return ids.gather(1, torch.multinomial(p, 1, generator=rng)).squeeze(1).to(logits.device)
    return pick


def random_router(p_big, rng):
    """Random routing in the form of a router: L independent draws per token, BIG with probability p_big, else SMALL."""
    def router(layer, h, state, seq):
        is_big = torch.rand(h.shape[:2], generator=rng) < p_big  # [B, T]
        return F.one_hot(torch.where(is_big, BIG, SMALL), 3).float().to(h.device), state
    return router


def parse_route(text, n_layer, p_big, rng):
    """--route -> an int, a pattern [L] or a router. Raises UserError."""
    if text == "random":
        return random_router(p_big, rng)
    if text in ("big", "small"):
        return BIG if text == "big" else SMALL
    if len(text) != n_layer or set(text) - set("012"):
        raise UserError(f"--route={text}: give big, small, random, or {n_layer} digits, one per layer of this run: "
                        "0 skip, 1 small, 2 big")
    return torch.tensor([int(digit) for digit in text])


def load_vocabulary(out_dir, vocab_size):
    """-> tiktoken.Encoding of the run, from the tokenizer.json that train.py left in it. Raises UserError."""
    path = Path(out_dir) / "tokenizer.json"
    try:
        encoding = data.read_tokenizer(path.read_bytes())
        if 0 <= vocab_size - encoding.n_vocab < 64:  # train.py pads the matrix, a pretrained model need not
            return encoding
        what = f"has {encoding.n_vocab} entries, which is another vocabulary than the model's"
    except (ValueError, KeyError, TypeError):
        what = "is damaged"
    except OSError:
        what = "is missing"
    raise UserError(f"{path}: {what}; copy tokenizer.json from the run's prepared corpus (in --data_dir)")


# ---------------------------------------------------------------------------------------------------------------------
# what the reader sees

def visible(text):
    r"""Show control characters, except \n and \t, as \x1b and the like: a model can write any, terminals obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def in_colour(out):
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text, level):
    """Escape codes around each line of the text, so that no colour runs on to the right edge."""
    background, foreground = SCALE[level]
    return re.sub("[^\n]+", lambda line: f"\x1b[48;5;{background};38;5;{foreground}m{line[0]}\x1b[0m", text)


def write_stream(model, prompt, steps, encoding, out):
    """Write the prompt, then each token of `steps` (see generate, B = 1) as it comes, coloured by its compute.

    -> mean BIG choices per token, mean FLOPs per token
    """
    small, big, colour = model.flops(SMALL), model.flops(BIG), in_colour(out)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds a character back until all its bytes are there
    n_big, total, n = 0, 0, 0
    out.write(visible(prompt))
    for token, route in steps:
        flops = model.flops(route).item()
        n_big, total, n = n_big + (route == BIG).sum().item(), total + flops, n + 1
        text = visible(decoder.decode(encoding.decode_single_token_bytes(token.item())))
        if colour and token.item() == encoding.eot_token:
            text = f"\x1b[2m{text}\x1b[0m"  # dimmed: a mark, not text
        elif colour:
            share = (flops - small) / max(1, big - small)  # 0 all-small, 1 all-big; below 0 where layers are skipped
            text = paint(text, round(min(max(share, 0), 1) * (len(SCALE) - 1)))
        out.write(text)
        out.flush()
    out.write(decoder.decode(b"", final=True) + "\n")
    if colour:
        legend = "".join(paint("  ", level) for level in range(len(SCALE)))
        out.write(f"FLOPs per token: all-small {small / 1e6:.2f}M {legend} {big / 1e6:.2f}M all-big\n")
    return n_big / n, total / n


def wrap(text, width):
    """-> list of lines of exactly `width` terminal cells (East Asian characters take two, combining ones none)."""
    lines, used = [""], 0
    for character in visible(text).expandtabs(4):
        cells = 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        if character == "\n" or used + cells > width:
            lines[-1] += " " * (width - used)
            lines.append("")
            used = 0
        if character != "\n":
            lines[-1] += character
            used += cells
    return lines[:-1] + [lines[-1] + " " * (width - used)]


def columns(texts, headers, width):
    """Two texts as two columns within `width` cells -> str"""
    width = max(10, (width - 3) // 2)
    left, right = ([*wrap(header, width), "-" * width, *wrap(text, width)]
                   for header, text in zip(headers, texts, strict=True))
    return "\n".join(f"{a} | {b}".rstrip() for a, b in itertools.zip_longest(left, right, fillvalue=" " * width))


def main(argv=None):
    config = parse_config(SampleConfig, argv, PRESETS)
    for name, least in (("tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(config, name) >= least:  # also true of nan
            raise UserError(f"--{name}={getattr(config, name)}: must be {least} or more")
    if config.compare and config.route != "big":
        raise UserError(f"--route={config.route}: --compare shows big and small; leave out one of the two flags")
    if config.router and (config.compare or config.route != "big"):
        raise UserError(f"--router={config.router}: decides by itself; leave out --route and --compare")
    device = find_device(config.device)
    model, model_config, checkpoint = load_run(config.out_dir, device)
    trained = checkpoint["train_config"]
    encoding = load_vocabulary(config.out_dir, model_config.vocab_size)
    route_rng, text_rng = (generator("cpu", config.seed, "sample", purpose) for purpose in ("route", "text"))
    route = parse_route(config.route, model_config.n_layer, trained["p_big"], route_rng)
    if config.router:
        route, _ = load_router(config.router, file_hash(Path(config.out_dir) / "ckpt.pt"), model_config, device)
    pick = sampler(encoding.n_vocab, config.temperature, config.top_k, text_rng)
    prompt = PROMPTS.get(trained["corpus"], "") if config.prompt is None else config.prompt
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    if trained["train_route"] == "big" and (config.compare or config.route != "big"):
        print("note: this run was trained with --train_route=big, so its SMALL FFNs never learned", file=sys.stderr)
    if trained["train_route"] == "router" and not config.router:
        print(f"note: this base was trained with its router; give --router={config.out_dir}/routers/*.pt, one of those "
              "files", file=sys.stderr)
    start = time.time()
    if config.compare:  # one batch of two sequences, each with its route: every forward runs both FFNs, on a row each
        route = torch.tensor([BIG, SMALL], device=device).view(2, 1, 1)
        steps = generate(model, torch.tensor([ids, ids], device=device), config.tokens, route, pick)
        tokens = torch.stack([token for token, _ in steps], 1).tolist()  # [2, n]
        seconds = time.time() - start
        headers = [f"all-{name}, {model.flops(choice) / 1e6:.2f}M FLOPs per token"
                   for name, choice in (("big", BIG), ("small", SMALL))]
        print(columns([prompt + encoding.decode(row) for row in tokens], headers, shutil.get_terminal_size().columns))
        line = f"2 x {config.tokens} tokens in one batch, {2 * config.tokens / seconds:.0f} tokens/s"
    else:
        steps = generate(model, torch.tensor([ids], device=device), config.tokens, route, pick)
        n_big, flops = write_stream(model, prompt, steps, encoding, sys.stdout)
        flops += route.flops() if config.router else 0  # what deciding cost, and LoRAs or adapting
        line = (f"{config.tokens} tokens, {n_big:.2f} BIG per token, {flops / model.flops(BIG):.2f} of all-big's FLOPs"
                f", {config.tokens / (time.time() - start):.0f} tokens/s")
    sys.stdout.flush()  # so that the line comes last where both streams go to one file
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? in its place
    run(main)
