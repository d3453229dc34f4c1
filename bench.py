"""Speed, side by side: FLOPs saved (counted) and time saved (measured) are two columns, because they differ.

    python bench.py                                   execution, inference, oracle and router
    python bench.py --part=train --against=PATH       stage-1 training at nanoGPT's 124M shape, against PATH's own model
    python bench.py --part=router --router=out/routers/mlp_k4_s1.pt     a trained router, on its run's validation text

Parts: `train` (GPU only), `execution` (sparse against dense, at four shares of BIG), `inference` (does time follow
FLOPs?), `oracle` (the prefix tree against naive enumeration), `router` (choices made on the way, against all-big).
Variants that are compared are timed in turns, round by round; the figures are medians and their ratios. Compilation and
warm-up are left out. Tokens and weights are random: time does not depend on them (but for --router, which are real).
"""
import copy
import importlib.util
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from common import UserError, arg, compute_dtype, find_device, generator, load_run, parse_config, run, write_atomic
from gates import Router, shares
from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT, KVCache, random_route, route_counts
from oracle import file_hash
from router import calibrate, load_router
from search import Search, make_tree

ROUNDS = 7


@dataclass
class BenchConfig:
    part: str = arg("all", "train, execution, inference, oracle, router or all")
    against: str = arg("", "a checkout of nanoGPT (yours; none of its code is here), for --part=train")
    profile: bool = arg(False, "also print the kernels that take the most time")
    save: str = arg("", "write the figures to this JSON file")
    router: str = arg("", "a file of out_dir/routers/ for --part=router; without it a random one, shifted to k = L / 3")
    out_dir: str = arg("out", "folder of the router's run; without --router nothing trained is needed")
    device: str = arg("auto", "auto, cpu or cuda")
    seed: int = arg(1, "seeds weights, tokens and routes")
    preset: str = arg("auto", "gpu (full shapes), cpu (shapes for a laptop) or debug (tiny, for tests)")


PRESETS = {"gpu": {}, "cpu": {}, "debug": {}}
SHAPES = {  # preset: layers, (sequences, context), widths for inference
    "gpu": (12, (8, 1024), (384, 1024)),
    "cpu": (12, (4, 128), (256, 512)),
    "debug": (2, (2, 32), (64, 128)),
}
ROUTER_SHAPES = {  # preset: width, prefills (sequences, tokens), decoding (sequences)
    "gpu": (1024, ((32, 256), (8, 1024)), (1, 64)),
    "cpu": (512, ((8, 128), (4, 256)), (1, 16)),
    "debug": (64, ((2, 16),), (2,)),
}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(variants, device):
    """variants: {name: function} -> {name: median milliseconds of ROUNDS rounds}, the variants taking turns."""
    calls = {}
    for name, function in variants.items():
        for _ in range(3):  # compile, capture, warm up
            function()
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        calls[name] = max(1, round(0.2 / (time.perf_counter() - start)))  # a round of a variant takes about 0.2 s
    times = {name: [] for name in variants}
    for _ in tqdm(range(ROUNDS), f"timing {', '.join(variants)}", leave=False, disable=None):
        for name, function in variants.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            synchronize(device)
            times[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return {name: sorted(t)[ROUNDS // 2] for name, t in times.items()}


def kernels(function, rows=12):
    """-> the kernels that take the most device time in one call: [(milliseconds, count, name)]"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda e: -e.device_time_total)
    return [(e.device_time_total / 1e3, e.count, e.key[:90]) for e in events[:rows]]


def matmul_rate(device, dtype):
    """The card's own rate on an 8192^3 product of random matrices, FLOP/s: the ceiling to compare with."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / measure({"matmul": lambda: a @ b}, device)["matmul"] * 1e3


def make_model(config, device, seed):
    model = DuoGPT(config).to(device).init_weights(generator(device, seed, "init"))
    model.compute_dtype, _ = compute_dtype(device)
    return model


def training_step(forward, model, optimizer):
    """-> a function that makes one optimizer step. forward() -> loss."""
    def step():
        forward().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def duo_step(config, B, device, seed, p_big):
    """One stage-1 training step as train.py makes it, compiled; p_big=None routes everything to BIG (a dense model)."""
    model, T, L = make_model(config, device, seed), config.block_size, config.n_layer
    fast = torch.compile(model, dynamic=False, mode="reduce-overhead")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x, y = torch.randint(config.vocab_size, (2, B, T), device=device)
    g = generator(device, seed, "route")

    def forward():
        torch.compiler.cudagraph_mark_step_begin()  # the variants' CUDA graphs share memory, and take turns
        if p_big is None:
            return fast(x, BIG, y, return_logits=False)[1]
        route, counts = random_route(B, T, L, 0.0, p_big, g), route_counts(B, T, L, 0.0, p_big)
        return fast(x, route, y, counts=counts, return_logits=False)[1]
    return training_step(forward, model, optimizer)


def nanogpt_step(path, B, T, device):
    """One training step of nanoGPT's own model and optimizer at its 124M shape, as its train.py makes it."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(path) / "model.py")
    nanogpt = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=T, vocab_size=50304, n_layer=12, n_head=12, n_embd=768,
                                          dropout=0.0, bias=False)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    fast = torch.compile(model)
    x, y = torch.randint(50304, (2, B, T), device=device)

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return fast(x, y)[1]
    return training_step(forward, model, optimizer)


def bench_train(bench, device):
    """Stage-1 training at nanoGPT's 124M shape; BIG, a SwiGLU of inner width 2,048, is as large as its FFN."""
    B, T = 32, 1024
    shape = DuoConfig(12, 12, 768, T, 50304, big_width=2048)
    variants = {"nanoGPT": nanogpt_step(bench.against, B, T, device)} if bench.against else {}
    variants |= {"ours, dense (all BIG)": duo_step(shape, B, device, bench.seed, None),
                 "ours, p(big) = 0.5": duo_step(shape, B, device, bench.seed, 0.5)}
    times = measure(variants, device)
    model = DuoGPT(shape)
    dense, half = model.flops(BIG), (model.flops(BIG) + model.flops(SMALL)) / 2
    flops = dict.fromkeys(variants, half) | {"ours, dense (all BIG)": dense, "nanoGPT": dense}
    rows = [{"variant": name, "tokens_per_second": B * T / ms * 1e3, "gflop_per_token": 3 * flops[name] / 1e9,
             "flops_saved": 1 - flops[name] / dense, "time_saved": 1 - ms / times["ours, dense (all BIG)"],
             "speed_against_nanogpt": times["nanoGPT"] / ms if bench.against else None,
             "kernels": kernels(variants[name]) if bench.profile else None} for name, ms in times.items()]
    return rows


def captured(function, device):
    """On a GPU: the same work as a CUDA graph. Launched one by one, short kernels would wait for Python, which serves
    both ways of execution alike and would hide what the GPU saves."""
    if device.type != "cuda":
        return function
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):  # warm up, on a side stream as capturing asks
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def bench_execution(bench, device):
    """Sparse against dense execution, uncompiled, forward and forward + backward, at four shares of BIG."""
    L, (B, T), widths = SHAPES[bench.preset]
    width, rows = widths[-1], []
    model = make_model(DuoConfig(L, width // 64, width, T, 4096), device, bench.seed)
    x, y = torch.randint(4096, (2, B, T), device=device)

    @torch.no_grad()
    def inference(execution, route, counts):
        model.execution = execution
        model(x, route, counts=counts)

    def training(execution, route, counts):
        model.execution = execution
        model(x, route, y, counts=counts, return_logits=False)[1].backward()
        model.zero_grad(set_to_none=True)

    for p_big in (0.1, 0.3, 0.5, 0.9):
        route = random_route(B, T, L, 0.0, p_big, generator(device, bench.seed, "route", p_big))
        counts = route_counts(B, T, L, 0.0, p_big)
        saved = 1 - model.flops(route, T).double().mean().item() / (model.flops(BIG, T) + L * 6 * width * (width // 4))
        for what, function in (("forward", inference), ("forward + backward", training)):
            ms = measure({e: captured(lambda e=e: function(e, route, counts), device) for e in ("dense", "sparse")},
                         device)
            rows.append({"p_big": p_big, "pass": what, "flops_saved": saved,
                         "time_saved": 1 - ms["sparse"] / ms["dense"], "speedup": ms["dense"] / ms["sparse"]})
    return rows


@torch.no_grad()
def bench_inference(bench, device):
    """All-small, half-big and all-big forwards: time over all-big's time, beside FLOPs over all-big's FLOPs."""
    L, (B, T), widths = SHAPES[bench.preset]
    rows = []
    for width in widths:
        model = make_model(DuoConfig(L, width // 64, width, T, 4096), device, bench.seed).eval()
        fast = torch.compile(model, dynamic=False, mode="reduce-overhead") if device.type == "cuda" else model
        x = torch.randint(4096, (B, T), device=device)
        half = random_route(B, T, L, 0.0, 0.5, generator(device, bench.seed, "route"))
        counts = route_counts(B, T, L, 0.0, 0.5)

        def forward(route, counts=None):
            torch.compiler.cudagraph_mark_step_begin()
            fast(x, route, counts=counts)

        variants = {"all-small": lambda: forward(SMALL), "half-big": lambda: forward(half, counts),
                    "all-big": lambda: forward(BIG)}
        times = measure(variants, device)
        big = model.flops(BIG, T)
        flops = {"all-small": model.flops(SMALL, T), "half-big": (model.flops(SMALL, T) + big) / 2, "all-big": big}
        rows += [{"width": width, "route": name, "flops": flops[name] / big, "time": ms / times["all-big"],
                  "flops_saved": 1 - flops[name] / big, "time_saved": 1 - ms / times["all-big"],
                  "tflop_per_second": flops[name] * B * T / ms / 1e9,
                  "kernels": kernels(variants[name]) if bench.profile else None} for name, ms in times.items()]
    return rows


@torch.no_grad()
def bench_oracle(bench, device):
    """Exhaustive search of one token in S sequences: the prefix tree against naive enumeration, where each route is a
    pass of its own with the same keys, kernels and read-out (timed on 64 routes drawn at random)."""
    L, S, d, V, t = {"gpu": (12, 4096, 384, 4096, 128), "cpu": (12, 128, 64, 1024, 64), "debug": (4, 4, 32, 64, 5)}[
        bench.preset]
    model = make_model(DuoConfig(L, max(1, d // 64), d, 2 * t, V), device, bench.seed)
    dtype = model.compute_dtype
    model = model.to(dtype)
    g = generator(device, bench.seed, "tokens")
    rows = []
    for choices, n in (((SMALL, BIG), S), ((SKIP, SMALL, BIG), max(1, S // 256))):
        if len(choices) == 3 and bench.preset == "cpu":
            continue  # half a minute a round
        routes = f"{len(choices)}^{L}"
        shape = (2, L, n, model.config.n_head, t - 1, d // model.config.n_head)
        past = torch.randn(shape, generator=g, device=device, dtype=dtype)
        idx = torch.randint(V, (n,), generator=g, device=device)
        directions = model.embedding.weight[idx].float().unsqueeze(1)
        search = Search(model, idx, past, directions)
        limit = max(1, (500_000 if device.type == "cuda" else 4096) // n)
        tree = make_tree(model, choices, (None, None), limit)
        picked = tree.routes[torch.randperm(len(tree.routes), generator=torch.Generator().manual_seed(1))[:64]].tolist()

        def naive(search=search, picked=picked):
            for route in picked:
                x = search.start
                for layer, choice in enumerate(route):
                    x = search.expand(layer, x, [(choice, None)])
                search.read_out(x)

        variants, counted = {"tree": lambda: search.leaf_losses(tree)}, {}
        if len(choices) == 2:  # with three, so few sequences go on at once that single routes would starve a GPU
            variants["naive"] = naive
        for name, function in variants.items():
            search.flops = 0
            function()
            counted[name] = search.flops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = measure({name: captured(f, device) if name == "naive" else f for name, f in variants.items()}, device)
        scale = len(tree.routes) / len(picked)
        rows.append({"routes": routes, "gflop_per_token": counted["tree"] / n / 1e9,
                     "tokens_per_second": n / ms["tree"] * 1e3,
                     "tflop_per_second": counted["tree"] / ms["tree"] / 1e9,
                     "counted_ratio": counted["naive"] * scale / counted["tree"] if "naive" in ms else None,
                     "measured_ratio": ms["naive"] * scale / ms["tree"] if "naive" in ms else None,
                     "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
                     "kernels": kernels(variants["tree"]) if bench.profile else None})
    return rows


def routed_model(bench, device):
    """-> model, router, text [S, T]: those of --router on validation text, or random ones at k = L / 3."""
    if bench.router:
        model, shape, rest = load_run(bench.out_dir, device)
        router, _ = load_router(bench.router, file_hash(Path(bench.out_dir) / "ckpt.pt"), shape, device)
        corpus = data.load(Path(rest["corpus"]))
        n = min(32, *((len(corpus.val[domain]) - 1) // shape.block_size for domain in corpus.domains))
        return model, router, torch.cat([data.eval_windows(corpus, domain, n, shape.block_size)[0]
                                         for domain in corpus.domains]).to(device)
    (L, _, _), (width, prefills, _) = SHAPES[bench.preset], ROUTER_SHAPES[bench.preset]
    model = make_model(DuoConfig(L, width // 64, width, max(T for _, T in prefills), 4096), device, bench.seed).eval()
    rng = generator("cpu", bench.seed, "router")
    router = Router(model.config, 64, "sb", shares(L, "sb", L / 3, None), rng)
    router.w_out.data = torch.randn(router.w_out.shape, generator=rng) / 8
    text = torch.randint(4096, (max(B for B, _ in prefills), model.config.block_size), generator=rng).to(device)
    router = router.to(device).eval().requires_grad_(False)
    calibrate(model, router, text, (L / 3, None))
    return model, router, text


def counts_of(route):
    """-> of each layer of a route [B, T, L] the numbers of (SKIP, SMALL, BIG) tokens, as model(counts=) wants them."""
    return [tuple((layer == c).sum().item() for c in (SKIP, SMALL, BIG)) for layer in route.unbind(-1)]


@torch.no_grad()
def bench_router(bench, device):
    """Routed sparse execution against all-big: whole sequences (prefill), and token by token with a KV cache (decode,
    16 tokens behind a prompt of 16). `known`: the same choices given as a route with its counts; the difference is what
    deciding costs. FLOPs include the router's. On a GPU prefill is timed compiled, too, as CUDA graphs, and time_saved
    is of these."""
    model, router, text = routed_model(bench, device)
    if device.type == "cuda":
        model = model.copy_in(model.compute_dtype)
    # Not compiled: what adds LoRAs or reads the model while it runs.
    plain = type(router).attached is Router.attached
    fast = torch.compile(model, dynamic=False, mode="reduce-overhead") if device.type == "cuda" and plain else None
    _, prefills, batches = ROUTER_SHAPES[bench.preset]
    rows, longest = [], text.shape[1]

    def routed(function):
        """-> the function, called where the model is what the router routes (which may add LoRAs, or read it)"""
        def call():
            with router.attached(model):
                return function()
        return call

    def row(what, n_tokens, variants, route, context):
        ms = measure(variants, device)
        flops = model.flops(route, context).double().mean().item() + router.flops()
        saved = {how: {name: 1 - ms[name + how] / ms["all-big" + how] for name in ("routed", "known")}
                 for how in ("", ", compiled") if "all-big" + how in ms}
        flops_saved, best = 1 - flops / model.flops(BIG, context), list(saved.values())[-1]
        rows.append({"what": what, "big": (route == BIG).sum(-1).double().mean().item(), "flops_saved": flops_saved,
                     "time_saved": best["routed"], "time_saved / flops_saved": best["routed"] / flops_saved,
                     "time_saved, known": best["known"],
                     **({"time_saved, not compiled": saved[""]["routed"]} if len(saved) > 1 else {}),
                     **{f"us/token, {name}": t / n_tokens * 1e3 for name, t in ms.items()},
                     "kernels": kernels(variants["routed" + list(saved)[-1]]) if bench.profile else None})

    for B, T in prefills:
        x = text.repeat(-(-B // len(text)), 1)[:B, :T].contiguous()
        if not bench.router:  # a small batch of random text is not yet at k
            calibrate(model, router, x, (model.config.n_layer / 3, None))
        route = routed(lambda: model(x, router, return_stats=True)[2]["route"])()
        counts = counts_of(route)
        variants = {"all-big": lambda: model(x, BIG), "routed": routed(lambda: model(x, router)),
                    "known": routed(lambda: model(x, route, counts=counts))}
        if fast is not None:
            variants |= {"all-big, compiled": lambda: fast(x, BIG), "routed, compiled": routed(lambda: fast(x, router)),
                         "known, compiled": routed(lambda: fast(x, route, counts=counts))}
        row(f"prefill {B} x {x.shape[1]}", x.numel(), variants, route, x.shape[1])

    n = min(16, longest // 2)
    for B in batches:
        x = text.repeat(-(-B // len(text)), 1)[:B, :2 * n]
        cache = KVCache(model.config, B, device, model.compute_dtype)
        routed(lambda x=x, cache=cache: model(x[:, :n], router, cache=cache))()
        known = copy.deepcopy(cache.seq)  # what the router keeps of the prompt

        def decode(step):
            """step: i, token [B, 1] -> what the model gives"""
            cache.length, cache.seq = n, copy.deepcopy(known)
            return [step(i, x[:, n + i:n + i + 1]) for i in range(n)]
        routes = [stats["route"] for _, _, stats in
                  routed(lambda: decode(lambda _, new: model(new, router, cache=cache, return_stats=True)))()]
        counts = [counts_of(route) for route in routes]
        row(f"decode, batch {B}", B * n, {
            "all-big": lambda: decode(lambda _, new: model(new, BIG, cache=cache)),
            "routed": routed(lambda: decode(lambda _, new: model(new, router, cache=cache))),
            "known": routed(lambda: decode(lambda i, new: model(new, routes[i], cache=cache, counts=counts[i])))},
            torch.cat(routes, 1), n + n // 2)
    return rows


def show(part, rows):
    """Print the rows as a table, and the kernels where they were recorded."""
    print(f"\n{part}")
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "kernels"]
    lines = [keys]
    for row in rows:
        values = [row.get(key, "") for key in keys]  # a variant may be there for some rows only
        lines.append([(f"{v:,.0f}" if v >= 1000 else f"{v:.3g}") if isinstance(v, float) else str(v) for v in values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
    for line in lines:
        print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))
    for row in rows:
        for ms, count, name in row.get("kernels") or []:
            title = next(row[key] for key in ("variant", "route", "routes", "what") if key in row)
            print(f"  {title}: {ms:8.3f} ms {count:5d} x {name}")


def main(argv=None):
    bench = parse_config(BenchConfig, argv, PRESETS)
    device = find_device(bench.device)
    parts = {"train": bench_train, "execution": bench_execution, "inference": bench_inference, "oracle": bench_oracle,
             "router": bench_router}
    if bench.part not in (*parts, "all"):
        raise UserError(f"--part={bench.part}: choose from {', '.join(parts)}, all")
    if bench.against and not (Path(bench.against) / "model.py").exists():
        raise UserError(f"--against={bench.against}: no model.py there; give the folder of a nanoGPT checkout")
    if (bench.part == "train" or bench.against) and device.type != "cuda":
        raise UserError("--part=train and --against: need a GPU; the other parts run anywhere")
    if bench.profile and device.type != "cuda":
        raise UserError("--profile: needs a GPU, where it names the kernels")
    chosen = [bench.part] if bench.part != "all" else [p for p in parts if p != "train" or bench.against]
    if bench.save:
        Path(bench.save).parent.mkdir(parents=True, exist_ok=True)
    dtype, _ = compute_dtype(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    result = {"command": "python bench.py " + " ".join(argv if argv is not None else sys.argv[1:]), "device": name,
              "torch": torch.__version__, "rounds": ROUNDS, "matmul_tflops": matmul_rate(device, dtype) / 1e12}
    print(f"{name}, torch {torch.__version__}, {dtype} matmul {result['matmul_tflops']:.3g} TFLOP/s")
    for part in chosen:
        torch.compiler.reset()
        result[part] = parts[part](bench, device)
        if bench.save:  # before anything is shown: what was measured is not lost
            write_atomic(bench.save, json.dumps(result, indent=1).encode())
        show(part, result[part])


if __name__ == "__main__":
    run(main)
