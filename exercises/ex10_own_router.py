"""Exercise 10: a router of your own on the Pareto chart.

Task. Invent a router, and beat the mean random pattern at equal FLOPs. Fill in make_router: it gets a small trained
model and training text, may measure and learn on them what it likes, and returns a router. The check trains such a
model in a few seconds (on the source of this project), makes your router on it, and measures it as all routers are
measured, with router.measure: on validation text, in the sequential context, beside the baselines.

Why. The mean random pattern is what spending k BIG per token gives without any thought. A method that does not beat it
at equal FLOPs has found nothing, however good its loss looks by itself. (The harder goal, which no check asks for: the
best fixed pattern of equal FLOPs. Beat it, and it is the tokens, not the layers, that your router has understood.)

Read first: "A router of your own" in README.md, then TokenId in zoo.py.

Hint: first find out what matters. Under random routes (model.random_route) some tokens got BIG in layer l and others
SMALL: is the difference of their losses the same in all layers? After all tokens? A difference of two means is noisy
where there are few tokens, so draw it towards the mean of its layer. Then spend where it is largest.
"""
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import data
import oracle
import train
from common import load_run
from model import BIG, DuoConfig, DuoGPT, KVCache
from router import measure


def make_router(model, batch):
    """model: a DuoGPT, trained under random routing; batch: step -> x, y [64, T], training text -> a router, that is a
    function (layer, h [B, T, d], state, seq) -> logits [B, T, 3] of SKIP, SMALL and BIG, and the state for the next
    layer. seq["idx"] holds the tokens so far; the last T of them are those that h is about.

    By hand: a router that returns the logits (0, 1, 0) for all tokens of layer 0 and (0, 0, 1) for all others is a
    fixed pattern, SMALL BIG BIG ..; for this exercise at least one layer must treat tokens differently.
    """
    raise NotImplementedError("exercise 10: fill in make_router")


# ---------------------------------------------------------------------------------------------------------------------
# the check

TOKENS = 2048  # of validation text


def routes_of(router, model, idx):
    with torch.no_grad():
        return model(idx, router, return_stats=True)[2]["route"]  # [B, T, L]


def test_it_is_a_router():
    """On a model of another size, that has learned nothing: choices do not look ahead, and decoding makes the same."""
    model = DuoGPT(DuoConfig(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=50))
    model.init_weights(torch.Generator().manual_seed(1)).eval().requires_grad_(False)

    def batch(step):
        text = torch.randint(50, (64, 13), generator=torch.Generator().manual_seed(step))
        return text[:, :-1], text[:, 1:]
    router, (idx, _) = make_router(model, batch), batch(10 ** 6)
    routes = routes_of(router, model, idx)
    for t in range(1, 12):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 7) % 50
        assert routes_of(router, model, other)[:, :t].equal(routes[:, :t]), (
            f"the choices of tokens before {t} changed with the text from {t} on: a router must not look ahead")
    cache = KVCache(model.config, 64, idx.device, torch.float32)  # decoding: one new token, seq["idx"] holds all
    one_by_one = torch.cat([model(token, router, cache=cache, return_stats=True)[2]["route"]
                            for token in idx.split(1, 1)], 1)
    assert one_by_one.equal(routes), ("token by token, with a cache, it chooses otherwise than over the whole text: h "
                                      "is about the last h.shape[1] tokens of seq['idx']")


def test_it_beats_the_mean_random_pattern():
    test_it_is_a_router()  # else there is nothing to measure
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "text").mkdir()
        for path in Path(train.__file__).parent.glob("*.py"):
            shutil.copy(path, folder / "text")
        flags = {"preset": "debug", "device": "cpu", "corpus": folder / "text", "n_layer": 4, "batch_size": 16,
                 "max_steps": 100, "eval_interval": 100, "save_interval": 100, "learning_rate": 0.005}
        where = {"data_dir": str(folder / "data"), "out_dir": str(folder / "run")}
        train.main([f"--{name}={value}" for name, value in (flags | where).items()])
        run = oracle.Run(oracle.OracleConfig(device="cpu", preset="debug", **where))
        with torch.no_grad():
            oracle.run_baselines(run, "sequential", TOKENS, TOKENS, tqdm(disable=True))
        model, shape, _ = load_run(folder / "run", "cpu")
        router = make_router(model.requires_grad_(False), lambda step: data.sample_batch(
            run.corpus, 64, shape.block_size, step))
        routes = routes_of(router, model, run.windows(TOKENS)[0])
        (row,) = measure(router, "mine", device="cpu", preset="debug", tokens=TOKENS, **where)
    big = (routes == BIG).float().mean((0, 1))  # [L]
    assert ((big > 0.02) & (big < 0.98)).any(), (
        f"the shares of BIG by layer are {[round(x, 2) for x in big.tolist()]}: that is a fixed pattern; let a layer "
        "choose by what it sees of a token")
    assert 0.5 < row["equivalent_big"] < shape.n_layer - 0.5, (
        f"it spends {row['equivalent_big']:.2f} BIG per token (by FLOPs); near 0 or {shape.n_layer} there is hardly a "
        "choice left")
    difference, low, high = row["versus"]["random"]
    assert high < -0.01, (
        f"your router minus the mean random pattern at its FLOPs: {difference:+.4f} nats ({low:+.4f} to {high:+.4f}), "
        f"spending {row['achieved']:.2f} BIG per token. Below -0.01 is asked for, with the whole interval (the best "
        f"fixed pattern: {row['fixed'][0] - row['random'][0]:+.4f})")
