"""router.py: causal choices, right gradients, budgets that are met, a planted problem that is solved."""
import copy
import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE, user_error
from test_train import differences, write_texts
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import claims
import gates
import oracle
import router
import sample
import train
from common import load_checkpoint, load_run, save_checkpoint
from gates import Router, budget_loss, mixed_forward, soft_gate
from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT, KVCache, random_route
from router import NAMES, RouterConfig

L, T, B = SHAPE.n_layer, SHAPE.block_size, 4
DEBUG = RouterConfig(**router.PRESETS["debug"])
DOMAIN = torch.zeros(B, dtype=torch.int64)


@pytest.fixture
def text():
    ids = torch.randint(SHAPE.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def random_router(choices="sb", hidden=0, seed=3):
    """A router whose choices depend on h: weights that are not zero."""
    rng = torch.Generator().manual_seed(seed)
    made = Router(SHAPE, hidden, choices, gates.shares(L, choices, 1.5, None), rng)
    made.w_out.data = torch.randn(made.w_out.shape, generator=rng)
    return made


def stats_of(model, made, idx, **more):
    return model(idx, made, return_stats=True, **more)[2]["route"]


every_kind = pytest.mark.parametrize("choices, hidden", [("sb", 0), ("sb", 8), ("xsb", 0), ("xsb", 8), ("xb", 8)])


# ---------------------------------------------------------------------------------------------------------------------
# choices

@every_kind
def test_only_the_choices_that_are_given(model, text, choices, hidden):
    route = stats_of(model, random_router(choices, hidden), text[0])
    assert {"xsb"[c] for c in route.unique().tolist()} == set(choices)


@every_kind
def test_choices_are_causal(model, text, choices, hidden):
    made, (idx, _) = random_router(choices, hidden), text
    route = stats_of(model, made, idx)
    changed = 0
    for t in range(1, T):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 7) % SHAPE.vocab_size
        got = stats_of(model, made, other)
        assert got[:, :t].equal(route[:, :t])
        changed += (got[:, t:] != route[:, t:]).sum().item()
    assert changed > 0  # so the router does look at the text


@every_kind
def test_token_by_token_equals_whole_sequence(model, text, choices, hidden):
    made, (idx, _) = random_router(choices, hidden), text
    logits, _, whole = model(idx, made, return_stats=True)
    for cut in ([1] * T, [5, 1, 1, T - 7]):
        cache, routes, parts = KVCache(SHAPE, B, idx.device, torch.float32), [], []
        for piece in idx.split(cut, 1):
            out, _, stats = model(piece, made, cache=cache, return_stats=True)
            routes.append(stats["route"])
            parts.append(out)
        assert torch.cat(routes, 1).equal(whole["route"])
        torch.testing.assert_close(torch.cat(parts, 1), logits)


def test_flops_of_a_router():
    for hidden in (0, 8):
        made = random_router(hidden=hidden)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for layer in range(L):
                made(layer, torch.randn(B, T, SHAPE.n_embd))
        assert made.flops() * B * T == counter.get_total_flops() > 0


# ---------------------------------------------------------------------------------------------------------------------
# the mixed forward

@pytest.mark.parametrize("p_skip", [0.0, 0.3])
def test_one_hot_mix_equals_the_route(model, text, p_skip):
    idx, targets = text
    route = random_route(B, T, L, p_skip, 0.4, torch.Generator().manual_seed(4))

    def gate(layer, logits):
        p = F.one_hot(route[..., layer].long(), 3).float()
        return p, p
    h, share = mixed_forward(model, random_router("xsb"), idx, gate)
    torch.testing.assert_close(h @ model.embedding.weight.T, model(idx, route)[0])
    assert share.equal(F.one_hot(route.long(), 3).float())


def test_soft_mix_by_hand(model, text):
    """One layer, one position at a time, in plain words: softmax, three outputs, weighted sum."""
    idx, targets = text
    made, tau = random_router("xsb"), 0.7
    x = model.embedding(idx)
    for layer, block in enumerate(model.blocks):
        z = made(layer, x)[0] / tau
        p = [z[..., c].exp() / z.exp().sum(-1) for c in (SKIP, SMALL, BIG)]
        sin_cos = model.cos[:, :T], model.sin[:, :T]
        outputs = [block.forward_dense(x, torch.full((B, T), c), *sin_cos) for c in (SKIP, SMALL, BIG)]
        x = sum(weight.unsqueeze(-1) * out for weight, out in zip(p, outputs, strict=True))
    h, share = mixed_forward(model, made, idx, lambda layer, z: soft_gate(z, tau))
    torch.testing.assert_close(h, model.final_norm(x))
    torch.testing.assert_close(share[:, :, -1], torch.stack(p, -1))
    log_p = (model.final_norm(x) @ model.embedding.weight.T).log_softmax(-1)
    expected = -log_p.gather(-1, targets.unsqueeze(-1)).mean()
    loss, cross_entropy, big = gates.mixed_loss(model, made, False, idx, targets, None, tau, 2.0, {BIG: 0.3})
    torch.testing.assert_close(cross_entropy, expected)
    torch.testing.assert_close(loss, expected + 2 * budget_loss(share, {BIG: 0.3}))
    torch.testing.assert_close(big, share[..., BIG].sum(-1).mean())


def test_gumbel_gate():
    """Forward one hot and drawn with softmax(logits); backward the gradient of the soft choice."""
    logits = torch.tensor([0.5, -math.inf, 1.5]).repeat(200, 100, 1).requires_grad_()
    noise = gates.gumbel_noise(200, 100, 1, torch.Generator().manual_seed(1))[:, :, 0]
    p, share = gates.gumbel_gate(logits, 0.5, noise)
    torch.testing.assert_close(p.detach().sort(-1).values, torch.tensor([0.0, 0, 1]).expand(200, 100, 3))
    expected = torch.tensor([0.5, -math.inf, 1.5]).softmax(-1)
    assert (p.mean((0, 1)) - expected).abs().max() < 0.02
    torch.testing.assert_close(share[0, 0], expected)
    p[..., BIG].sum().backward()
    grad, logits.grad = logits.grad, None
    ((logits + noise) / 0.5).softmax(-1)[..., BIG].sum().backward()
    torch.testing.assert_close(grad, logits.grad)
    assert grad.max() > 0.4


@pytest.mark.parametrize("choices", ["sb", "xsb", "xb"])
@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_of_the_budget_loss(model, text, choices, per_token):
    """Of the whole way, through the frozen layers, against finite differences in float64."""
    model, made = copy.deepcopy(model).double(), random_router(choices).double()
    model.compute_dtype = torch.float64
    idx, targets = text
    wanted = {BIG: 0.3} | ({SKIP: 0.2} if choices == "xsb" else {})

    def loss():  # float64 all the way, but for rms_norm's input, which the router takes in float32
        share = mixed_forward(model, made, idx, lambda layer, z: soft_gate(z, 0.7))[1]
        return budget_loss(share, wanted, per_token)
    loss().backward()
    rng = torch.Generator().manual_seed(5)
    for weight in (made.w_out, made.b_out):
        direction = torch.randn(weight.shape, generator=rng).double()
        direction /= direction.norm()
        slope, values = (weight.grad * direction).sum(), []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-3 * direction
                values.append(loss())
                weight -= sign * 1e-3 * direction
        assert slope.abs() > 1e-5
        assert slope.item() == pytest.approx(((values[0] - values[1]) / 2e-3).item(), rel=2e-2)


def test_budget_loss_by_hand():
    share = torch.zeros(1, 2, 2, 3)  # one sequence, two tokens, two layers
    share[0, 0, :, BIG], share[0, 1, :, BIG] = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0])
    assert budget_loss(share, {BIG: 0.25}).item() == pytest.approx(0.25 ** 2)
    assert budget_loss(share, {BIG: 0.25}, per_token=True).item() == pytest.approx(0.5 ** 2 / 2)
    assert budget_loss(share, {BIG: 0.5, SKIP: 0.5}).item() == pytest.approx(0.25)
    both, asked = share.repeat(2, 1, 1, 1), torch.tensor([[0.5], [0.25]])  # each sequence has its own budget
    assert budget_loss(both, {BIG: asked}).item() == pytest.approx(0.25 ** 2 / 2)
    assert budget_loss(both, {BIG: asked}, per_token=True).item() == pytest.approx((2 * 0.25 ** 2 + 0.5 ** 2) / 4)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_router_gets_a_gradient(model, text, name):
    before = copy.deepcopy(model.state_dict())
    made = router.new_router(SHAPE, DEBUG, name, (1, None))
    loss, _ = made.step_loss(model, DEBUG, (1, None), *text, DOMAIN, 0)
    loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad.abs().max() > 0 for key, weight in made.named_parameters() if key.endswith("_out"))
    assert not differences(before, model.state_dict())


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_step_has_its_own_noise(model, text, name):
    config = dataclasses.replace(DEBUG, steps=1000, tau_end=DEBUG.tau_start, alpha_end=DEBUG.alpha_start)
    made = router.new_router(SHAPE, config, name, (1, None))
    first, again, other = (made.step_loss(model, config, (1, None), *text, DOMAIN, step)[0].item()
                           for step in (3, 3, 4))
    assert first == again != other


# ---------------------------------------------------------------------------------------------------------------------
# labels

def test_gains_against_plain_forwards(model, text):
    """advantage: flip one layer of one token's route, forward the whole sequence, read the token's loss."""
    idx, targets = text
    seen = []

    class Record(gates.Search):
        def score(self, routes, keep_keys=False):
            seen.append((self.n_keys - 1, routes))
            return super().score(routes, keep_keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "Search", Record)
        rng = torch.Generator().manual_seed(1)
        h, gain = gates.labels(model, idx, targets, (0.2, 0.4, 0.4), "xsb", T, 0, 0.1, rng)
    base = torch.empty(B, T, L, dtype=torch.long)
    for t, routes in seen:  # routes [L C, B, L]: that of layer l, choice c has c in layer l, else the base
        flipped = routes.view(L, 3, B, L)
        for layer in range(L):
            base[:, t, layer] = flipped[(layer + 1) % L, 0, :, layer]
    assert gain.shape == (B, T, L, 3)
    assert (gain[..., SKIP] == 0).all()
    for t in (0, 4, T - 1):
        for layer in range(L):
            losses = []
            for choice in (SKIP, SMALL, BIG):
                route = base.clone()
                route[:, t, layer] = choice
                losses.append(model(idx, route, targets, reduction="none")[1][:, t])
            expected = torch.stack([losses[0] - loss for loss in losses], -1)
            torch.testing.assert_close(gain[:, t, layer], expected, atol=2e-5, rtol=1e-4)
    entering = []  # and h is what enters each layer along the base route

    def follow(layer, x, state, seq):
        entering.append(x)
        return F.one_hot(base[..., layer], 3).float(), state
    model(idx, follow)
    for a, b in zip(h, entering, strict=True):
        torch.testing.assert_close(a, b)


def test_oracle_weights_by_hand(model, text):
    """distilled: of the weight exp(-loss / temperature) of the routes tried, the share through each choice."""
    idx, targets = text
    tried = []

    class Record(gates.Search):
        def score(self, routes, keep_keys=False):
            losses = super().score(routes, keep_keys)
            tried.append((routes, losses[..., -1]))
            return losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "Search", Record)
        rng = torch.Generator().manual_seed(1)
        _, weight = gates.labels(model, idx, targets, (0.0, 0.5, 0.5), "sb", 2, 6, 0.3, rng)
    for n, (routes, losses) in enumerate(tried):
        assert len(routes) == 6
        for b in range(B):
            boltzmann = [math.exp(-loss / 0.3) for loss in losses[:, b].tolist()]
            for layer in range(L):
                big = sum(w for w, route in zip(boltzmann, routes[:, b], strict=True) if route[layer] == BIG)
                assert weight[b, n, layer, BIG].item() == pytest.approx(big / sum(boltzmann), abs=1e-4)
    torch.testing.assert_close(weight.sum(-1), torch.ones(B, 2, L))


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_one_graph_for_all_budgets_steps_and_seeds(model, text, monkeypatch, name):
    """What --compile=on runs on a GPU: values and gradients as without, and nothing is compiled anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    fast = torch.compile(gates.mixed_loss, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(gates, "compiled_mixed_loss", lambda: fast)
    for seed, budget, step in ((1, 1, 0), (2, 2, 1), (2, 1, 3)):
        grads = []
        for compiled in ("off", "on"):
            config = dataclasses.replace(DEBUG, seed=seed, compile=compiled)
            made = router.new_router(SHAPE, config, name, (budget, None))
            loss, parts = made.step_loss(model, config, (budget, None), *text, DOMAIN, step)
            loss.backward()
            grads.append([loss.detach(), *parts.values(), *(p.grad for p in made.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_training_goes_on_where_compiling_fails(model, text, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler here")
    monkeypatch.setattr(gates, "compiled_mixed_loss", lambda: broken)
    config = dataclasses.replace(DEBUG, compile="on")
    made = router.new_router(SHAPE, config, "linear", (1, None))
    router.prove_compiled(model, made, config, (1, None), (*text, DOMAIN), 0)
    assert "no compiler here" in capsys.readouterr().out and config.compile == "off"
    made.step_loss(model, config, (1, None), *text, DOMAIN, 0)


# ---------------------------------------------------------------------------------------------------------------------
# a planted problem

FLAGGED = 0.375  # of the tokens of each sequence


def planted_model(n_layer=3):
    """Tokens 2..21 carry no flag and are followed by token 0; tokens 22..41 carry one and are followed by token 1. In
    every layer SMALL writes the direction of token 0 and BIG that of token 1, whatever they read: so a flagged token
    needs BIG everywhere, and BIG costs any other."""
    shape = DuoConfig(n_layer=n_layer, n_head=2, n_embd=16, block_size=16, vocab_size=42, big_width=4, small_width=4)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        table = 0.3 * torch.randn(42, 16, generator=torch.Generator().manual_seed(2))
        table[:, :4] = 0
        table[:, 0] = 1  # constant: what both FFNs read
        table[22:, 1] = 1  # the flag
        table[0, 2], table[1, 3] = 2, 2
        model.embedding.weight.copy_(table)
        for block in model.blocks:
            block.out.weight.zero_()
            for ffn, direction in ((block.small, 2), (block.big, 3)):
                ffn.gate_up.weight.zero_()
                ffn.gate_up.weight[:, 0] = 1
                ffn.down.weight.zero_()
                ffn.down.weight[direction] = 0.012  # about 0.3 is written, by each layer alike
    return model.eval().requires_grad_(False)


def planted_batch(step, n=16, T=16):
    rng = torch.Generator().manual_seed(step)
    flag = torch.rand(n, T, generator=rng).argsort(1) < FLAGGED * T
    return torch.randint(2, 22, (n, T), generator=rng) + 20 * flag, flag.long(), torch.zeros(n, dtype=torch.int64)


def test_the_planted_problem_is_one():
    model, (idx, targets) = planted_model(), planted_batch(0)[:2]
    losses = [model(idx, choice, targets, reduction="none")[1] for choice in (SMALL, BIG)]
    assert (losses[1] < losses[0]).equal(targets == 1)
    perfect = torch.where(targets == 1, BIG, SMALL).unsqueeze(-1).expand(-1, -1, 3)
    assert model(idx, perfect, targets)[1] < min(loss.mean() for loss in losses) - 0.3


@pytest.mark.parametrize("name", NAMES)
def test_the_planted_problem_is_learned(name, tmp_path):
    model, budget = planted_model(), (3 * FLAGGED, None)
    config = dataclasses.replace(DEBUG, steps=60, label_positions=4, label_routes=16, hidden=16, learning_rate=0.03,
                                 save_interval=60)
    made = router.train_router(model, config, name, budget, planted_batch, tmp_path / "x.pt", "hash")
    router.calibrate(model, made, planted_batch(10 ** 6, n=64)[0], budget)
    idx, targets, _ = planted_batch(10 ** 6 + 1, n=64)
    route, losses = router.choose(model, made, idx, targets)
    right = (route == torch.where(targets == 1, BIG, SMALL).unsqueeze(-1)).float().mean().item()
    assert right > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# calibration

@pytest.mark.parametrize("choices, budget", [("sb", (0.0, None)), ("sb", (0.7, None)), ("sb", (3.0, None)),
                                             ("xb", (1.5, None)), ("xsb", (1.0, 1.2)), ("xsb", (1.5, None))])
def test_calibration_meets_the_budget(model, choices, budget):
    made = random_router(choices, hidden=8)
    rng = torch.Generator().manual_seed(9)
    fitted, held_out = torch.randint(SHAPE.vocab_size, (2, 256, T), generator=rng)
    got = router.calibrate(model, made, fitted, budget)
    route = stats_of(model, made, fitted)
    for choice, key, wanted in ((BIG, "big", budget[0]), (SKIP, "skip", budget[1])):
        mean = (route == choice).sum(-1).float().mean().item()
        assert got[key] == pytest.approx(mean)
        if wanted is not None:
            assert abs(mean - wanted) <= 0.05
            there = (stats_of(model, made, held_out) == choice).sum(-1).float().mean().item()
            assert abs(there - wanted) <= 0.1  # other text of the same kind: sampling adds its share


# ---------------------------------------------------------------------------------------------------------------------
# the command, on a run of its own

TINY = {"preset": "debug", "device": "cpu", "vocab_size": 300, "n_layer": 3, "n_embd": 16, "block_size": 16,
        "max_steps": 10, "eval_sequences": 2}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """-> a folder: run/ trained for ten steps, with the oracle's files; data/ its corpus"""
    folder = tmp_path_factory.mktemp("router")
    write_texts(folder / "texts", n=200)
    train.main([f"--{key}={value}" for key, value in TINY.items()] + [
        f"--corpus={folder / 'texts'}", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"])
    flags = ["--preset=debug", "--device=cpu", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"]
    oracle.main(flags)
    return folder


@pytest.fixture
def go(here, tmp_path):
    """-> a function: options -> the exit code of router.py on a copy of the run, in tmp_path/<name>"""
    def go(folder="run", **options):
        out = tmp_path / folder
        if not out.exists():
            (out / "oracle").mkdir(parents=True)
            for file in ("ckpt.pt", "config.json", "oracle.json", "tokenizer.json", *[
                    f"oracle/{path.name}" for path in (here / "run" / "oracle").glob("*.npz")]):
                os.link(here / "run" / file, out / file)
        options = {"preset": "debug", "device": "cpu", "data_dir": here / "data", "out_dir": out} | options
        return router.main([f"--{key}={value}" for key, value in options.items()])
    return go


def test_default_set_and_routers_json(go, tmp_path, here):
    assert go() is None
    rows = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert {(row["name"], row["budget"]) for row in rows} == {(name, 1.0) for name in NAMES}
    model, _, rest = load_run(here / "run", "cpu")
    with np.load(here / "run" / "oracle" / "patterns_sequential.npz") as file:
        patterns = dict(file)
    for row in rows:
        file = dict(np.load(tmp_path / "run" / "routers" / f"{row['name']}_k1_s1.npz"))
        made, saved = router.load_router(tmp_path / "run" / "routers" / f"{row['name']}_k1_s1.pt", row["checkpoint"],
                                         model.config, "cpu")
        route, losses = router.choose(model, made, *(torch.from_numpy(file[key]) for key in ("idx", "targets")))
        assert route.numpy().tolist() == file["routes"].tolist()  # the file's router, calibrated, is what was measured
        assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
        assert row["achieved"] == pytest.approx((route == BIG).sum(-1).float().mean().item())
        assert row["flops"] == pytest.approx(model.flops(route).float().mean().item() + made.flops())
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["loss_ci"][0] <= row["loss"] <= row["loss_ci"][1]
        assert sum(row["big_per_token"]) == route.numel() // 3
        assert sum(k * n for k, n in enumerate(row["big_per_token"])) == (route == BIG).sum().item()
        np.testing.assert_allclose(np.array(row["usage"])[:, BIG], (route == BIG).float().mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(np.sum(row["usage"], 1), 1)
        assert np.mean(row["big_by_quarter"]) * 3 == pytest.approx(row["achieved"])
        # baselines: interpolated by hand at the achieved budget, on the same tokens
        fixed = patterns["fixed"].mean((1, 2))
        k, low = row["achieved"], int(min(row["achieved"], 2))
        at = fixed[low] + (k - low) * (fixed[low + 1] - fixed[low])
        assert row["fixed"][0] == pytest.approx(at, abs=1e-5)
        assert row["versus"]["fixed"][0] == pytest.approx(row["loss"] - at, abs=1e-5)
        assert row["all_big"][0] == pytest.approx(fixed[3], abs=1e-5)
        assert row["all_small"][0] == pytest.approx(fixed[0], abs=1e-5)
        oracle_loss = claims.oracle_losses(tmp_path / "run" / "oracle", row["checkpoint"], file["idx"])[0]["oracle"][0]
        oracle_at = claims.at_budget(np.array(k), oracle_loss.mean(0))
        assert row["oracle"][0] == pytest.approx(oracle_at, abs=1e-5)
        assert row["recovered"][0] == pytest.approx((at - row["loss"]) / (at - oracle_at), rel=1e-3, abs=1e-3)
        assert {"random", "best100_data_set", "best100_sequence", "best100_token"} <= set(row)
        assert {"command", "device", "torch", "steps", "seed", "checkpoint", "shift"} <= set(row)
        # the debug plan searches all budgets in the frozen context only; its baselines are there in both
        assert row["contexts"] == dict.fromkeys(row["compared_on"], "sequential") | {"oracle": "frozen"}
    # Another run adds its rows, and replaces its own.
    assert go(name="linear", budget=2) is None
    assert go(name="linear", budget=2) is None
    assert len(json.loads((tmp_path / "run" / "routers.json").read_text())) == len(rows) + 1


def test_shares_of_the_set(go, tmp_path, monkeypatch):
    """The routers of the paper's Fig. 7, each as if its own command had been given."""
    monkeypatch.setitem(router.SETS, "debug", {"linear": "1"})
    monkeypatch.setitem(router.SHARES, "debug", [("linear", "xb", "2"), ("linear", "xsb", "1/1")])
    assert go(steps=2) is None
    rows = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert {(row["choices"], row["budget"], row["skip_budget"]) for row in rows} == {
        ("sb", 1, None), ("xb", 2, None), ("xsb", 1, 1)}
    assert all("--choices=xsb --budget=1/1" in row["command"] or "--budget=1/1 --choices=xsb" in row["command"]
               for row in rows if row["choices"] == "xsb")
    assert all(row["achieved_skip"] == pytest.approx(3 - row["achieved"]) for row in rows if row["choices"] == "xb")
    assert go(folder="one", steps=2, name="linear") is None  # who asks for something gets that alone
    assert {row["choices"] for row in json.loads((tmp_path / "one" / "routers.json").read_text())} == {"sb"}


def test_more_windows_than_the_oracle_has(go, tmp_path):
    assert go(name="linear", budget="1", tokens=128) is None
    (row,) = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert row["sequences"] == row["compared_on"]["fixed"] == 8
    assert row["compared_on"]["random"] == row["compared_on"]["oracle"] == 4


def test_other_windows_than_the_oracle_has(go, tmp_path, capsys):
    assert go(name="linear", budget="1", tokens=48) is None
    assert "patterns_sequential.npz: holds other" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert "random" not in row
    assert row["compared_on"]["fixed"] == 3  # those are forwarded
    assert row["command"].startswith("python router.py ")
    assert {"--name=linear", "--tokens=48", "--preset=debug"} <= set(row["command"].split())
    assert not (tmp_path / "run" / "oracle" / "parts").exists()


def test_frozen_baselines_where_there_are_no_others(go, tmp_path, here, capsys):
    go(name="linear", steps=1)
    (tmp_path / "run" / "oracle" / "patterns_sequential.npz").unlink()
    assert go(name="linear", steps=1) is None
    (row,) = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert {policy for policy, context in row["contexts"].items() if context == "sequential"} == {
        "fixed", "all_small", "all_big"}
    assert "frozen context" in capsys.readouterr().out
    # The random ones are the frozen file's; the fixed ones, its choice, are forwarded as routers are.
    patterns = dict(np.load(here / "run" / "oracle" / "patterns_frozen.npz"))
    random = claims.baseline_losses(patterns)["random"].mean(-1)
    assert row["random"][0] == pytest.approx(claims.at_budget(np.array(row["achieved"]), random), abs=1e-5)
    model = load_run(here / "run", "cpu")[0]
    file = np.load(tmp_path / "run" / "routers" / "linear_k1_s1.npz")
    idx, targets = (torch.from_numpy(file[key]) for key in ("idx", "targets"))
    losses = np.zeros(L + 1)
    for k in range(L + 1):
        for d in range(len(patterns["domains"])):
            rows, pattern = patterns["domain"] == d, torch.from_numpy(patterns["patterns"][patterns["chosen"][d, k]])
            losses[k] += model(idx[rows], pattern, targets[rows])[1].item() * rows.mean()
    assert row["fixed"][0] == pytest.approx(claims.at_budget(np.array(row["achieved"]), losses), abs=1e-5)


def test_without_the_oracle(go, tmp_path, capsys):
    go(name="linear", steps=1)
    for file in (tmp_path / "run" / "oracle").glob("*.npz"):
        file.unlink()
    assert go(name="linear", steps=1) is None
    assert "python oracle.py" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert "random" not in row
    assert row["fixed"] == [None] * 3
    assert row["all_big"][0] > 0


def test_skip_budget(go, tmp_path):
    assert go(name="mlp", choices="xsb", budget="1/1,1") is None
    assert go(name="mlp", choices="xb", budget="1.5") is None
    rows = json.loads((tmp_path / "run" / "routers.json").read_text())
    assert {(row["budget"], row["skip_budget"], row["choices"]) for row in rows} == {
        (1.0, 1.0, "xsb"), (1.0, None, "xsb"), (1.5, None, "xb")}
    flops = load_run(tmp_path / "run", "cpu")[0].flops
    for row in rows:
        usage = np.array(row["usage"]).sum(0)
        assert row["achieved_skip"] == pytest.approx(usage[SKIP])
        assert (usage[SMALL] == 0) == (row["choices"] == "xb")
        assert "oracle" not in row  # that one has no SKIP
        # Fixed patterns are taken at equal FLOPs: a SKIP saves more than a SMALL.
        expected = (row["flops"] - row["router_flops"] - flops(SMALL)) / ((flops(BIG) - flops(SMALL)) / 3)
        assert row["equivalent_big"] == pytest.approx(expected)
        assert row["equivalent_big"] < row["achieved"] or row["achieved_skip"] == 0
        assert (row["fixed"][0] is None) == (row["equivalent_big"] < 0)


# ---------------------------------------------------------------------------------------------------------------------
# one seed, one result

def saved(folder, name="mlp_k1_s1"):
    return load_checkpoint(folder / "routers" / f"{name}.pt")


@pytest.mark.parametrize("name", ["linear", "mlp", "distilled"])
def test_interrupted_and_resumed_is_bitwise_the_same(go, tmp_path, monkeypatch, name):
    go("straight", name=name, steps=6)
    go("again", name=name, steps=6)
    batch = router.training_batch

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(*args)
    calls = []
    monkeypatch.setattr(router, "training_batch", interrupt)
    assert go("cut", name=name, steps=6, save_interval=100) == 130
    assert saved(tmp_path / "cut", f"{name}_k1_s1")["step"] == 3
    user_error(lambda: sample.main([f"--out_dir={tmp_path / 'cut'}", "--device=cpu",
                                    f"--router={tmp_path / 'cut' / 'routers' / f'{name}_k1_s1.pt'}"]), "step 3 of 6")
    monkeypatch.setattr(router, "training_batch", batch)
    assert go("cut", name=name, steps=6) is None
    straight, again, cut = (saved(tmp_path / folder, f"{name}_k1_s1") for folder in ("straight", "again", "cut"))
    for key in ("router", "optimizer", "step", "calibration"):
        assert not differences(straight[key], again[key])
        assert not differences(straight[key], cut[key])
    go("other", name=name, steps=6, seed=2)
    assert differences(straight["router"], saved(tmp_path / "other", f"{name}_k1_s2")["router"])


def test_calibration_text_is_never_trained_on(here):
    r = oracle.Run(oracle.OracleConfig(out_dir=str(here / "run"), device="cpu", data_dir=str(here / "data")))
    reserved = router.calibration_starts(r.corpus, 256, 16, 1)
    assert sum(map(len, reserved.values())) >= 8
    touched = {domain: np.zeros(len(tokens), bool) for domain, tokens in r.corpus.train.items()}
    for domain, starts in reserved.items():
        for start in starts:
            assert not touched[domain][start:start + 17].any()  # nor do they overlap each other
            touched[domain][start:start + 17] = True
    texts = {domain: np.asarray(tokens) for domain, tokens in r.corpus.train.items()}
    marked = {domain: np.where(touched[domain], 65535, texts[domain]) for domain in texts}
    corpus = dataclasses.replace(r.corpus, train=marked)
    x, y, domain = router.training_batch(corpus, 500, 16, reserved, 7)
    assert domain.unique().tolist() == list(range(len(corpus.domains)))
    assert x.shape == (500, 16)
    assert x[:, 1:].equal(y[:, :-1])
    assert x.max() < 300 > y.max()


# ---------------------------------------------------------------------------------------------------------------------
# router and base together

@pytest.fixture
def together(here, tmp_path):
    """-> a function: out_dir, options -> the exit code of router.py --joint"""
    def together(folder="joint", **options):
        options = TINY | {"corpus": here / "texts", "data_dir": here / "data", "out_dir": tmp_path / folder,
                          "budget": 1, "max_steps": 6, "eval_interval": 6, "tokens": 64} | options
        return router.main(["--joint", *(f"--{key}={value}" for key, value in options.items())])
    return together


def test_joint_training_learns_and_meets_its_budget(together, tmp_path, capsys, monkeypatch):
    assert together(max_steps=120, learning_rate=0.02, eval_interval=120, skip_every=0) == 0
    log = train.read_jsonl(tmp_path / "joint" / "metrics.jsonl")
    first, *_, last = [line for line in log if line["kind"] == "train"]
    assert last["cross_entropy"] < first["cross_entropy"] - 1
    assert last["big"] == pytest.approx(1, abs=0.15)
    assert last["loss"] >= last["cross_entropy"]
    (evaluation,) = [line for line in log if line["kind"] == "eval"]
    assert all(0 <= routes["router"]["big"] <= 3 for routes in evaluation["domains"].values())
    rows = json.loads((tmp_path / "joint" / "routers.json").read_text())
    (row,) = rows  # one domain
    assert (row["name"], row["budget"], row["steps"]) == ("mlp", 1, 120)
    assert row["calibration"]["big"] == pytest.approx(1, abs=0.05)
    # The base is a run as any other, the router a file as any other.
    model, shape, rest = load_run(tmp_path / "joint", "cpu")
    made, _ = router.load_router(tmp_path / "joint" / "routers" / "mlp_k1_s1.pt", row["checkpoint"], shape, "cpu")
    file = dict(np.load(tmp_path / "joint" / "routers" / "mlp_k1_s1.npz"))
    idx, targets = (torch.from_numpy(file[key]) for key in ("idx", "targets"))
    route, losses = router.choose(model, made, idx, targets)
    assert losses.mean().item() == pytest.approx(row["loss"], abs=1e-5)
    assert rest["train_config"]["train_route"] == "router"
    flags = [f"--out_dir={tmp_path / 'joint'}", "--device=cpu", "--tokens=5"]
    sample.main(flags)
    assert "trained with its router" in capsys.readouterr().err
    path = tmp_path / "joint" / "routers" / "mlp_k1_s1.pt"
    sample.main([*flags, f"--router={path}"])
    assert "BIG per token" in (written := capsys.readouterr().err)
    assert "note" not in written
    # bench.py times it on its own validation text.
    monkeypatch.setattr(bench, "measure", lambda variants, device: {key: f() and 1.0 for key, f in variants.items()})
    timed = bench.bench_router(bench.BenchConfig(preset="debug", out_dir=str(tmp_path / "joint"), router=str(path)),
                               torch.device("cpu"))
    assert all(0 < row["big"] < 3 for row in timed)


@pytest.mark.parametrize("options", [{}, {"name": "linear", "micro_batch": 2}, {"budget": "any"},
                                     {"name": "gumbel", "choices": "xsb", "budget": "1/1"}])
def test_joint_interrupted_and_resumed_is_bitwise_the_same(together, tmp_path, monkeypatch, options):
    assert together("straight", **options) == 0

    class Crash(Exception):
        pass

    def crash(config, corpus, device, step, rank, world):
        if step == 3:
            raise Crash
        return batches(config, corpus, device, step, rank, world)
    batches = train.micro_batches
    monkeypatch.setattr(train, "micro_batches", crash)
    with pytest.raises(Crash):
        together("cut", save_interval=2, **options)
    monkeypatch.setattr(train, "micro_batches", batches)
    assert together("cut", resume=True, **options) == 0
    straight, cut = (load_checkpoint(tmp_path / folder / "ckpt.pt") for folder in ("straight", "cut"))
    for key in ("model", "router", "optimizer", "step"):
        assert not differences(straight[key], cut[key])
    files = sorted(path.name for path in (tmp_path / "straight" / "routers").glob("*.pt"))
    for name in files:
        straight, cut = (load_checkpoint(tmp_path / folder / "routers" / name) for folder in ("straight", "cut"))
        assert not differences(straight["router"], cut["router"])
    assert files == [{"linear": "linear_k1_s1.pt", "gumbel": "gumbel_k1_x1_s1_xsb.pt"}.get(
        options.get("name"), "mlp_k2_s1.pt" if options else "mlp_k1_s1.pt")]  # any: 2, 4, .. below L


def test_joint_batches_are_cut_as_train_cuts_them(here, model):
    """One process and two, whole and in micro-batches: the same text, noise and budgets."""
    corpus = oracle.Run(oracle.OracleConfig(out_dir=str(here / "run"), device="cpu",
                                            data_dir=str(here / "data"))).corpus
    config = router.JointConfig(batch_size=4, micro_batch=4, block_size=T, n_layer=L, name="mlp", budget="any",
                                anneal=0.5)
    joint = router.Joint(model, config, (None, None))

    def rows(rank=0, world=1, micro_batch=4):
        cut = dataclasses.replace(config, micro_batch=micro_batch)
        parts = list(joint.batches(cut, corpus, torch.device("cpu"), 5, rank, world))
        return [torch.cat(part) for part in zip(*[(x, y, noise, asked) for x, y, noise, (_, _, asked) in parts],
                                                strict=True)]
    def asked(step, **flags):
        changed = dataclasses.replace(config, max_steps=11, **flags)
        return next(router.Joint(model, changed, (1.0, None)).batches(changed, corpus, torch.device("cpu"), step, 0,
                                                                      1))[3][2] * L
    for step, k in ((0, 3), (2, 2.2), (5, 1), (10, 1)):  # the budget falls from L = 3 to 1 in half of the steps
        torch.testing.assert_close(asked(step), torch.full((4,), float(k)))
    torch.testing.assert_close(asked(0, anneal=0.0), torch.ones(4))
    config.anneal = 0.0
    whole = rows()
    assert whole[2].shape == (4, T, L, 3)
    assert set((whole[3] * L).round().tolist()) <= {1, 2, 3}
    for cut in (rows(micro_batch=1), [torch.cat(pair) for pair in zip(rows(0, 2, 2), rows(1, 2, 2), strict=True)]):
        assert all(a.equal(b) for a, b in zip(whole, cut, strict=True))


def test_joint_compiles_without_breaks(model, text):
    """One graph, and none anew when tau, alpha or k change; values and gradients as without (the GPU's path)."""
    config = router.JointConfig(name="mlp", hidden=8)
    joint = router.Joint(copy.deepcopy(model).requires_grad_(True), config, (None, None))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    fast = torch.compile(joint, backend=backend, fullgraph=True, dynamic=False)
    noise = gates.gumbel_noise(B, T, L, torch.Generator().manual_seed(1))
    for value in (1.0, 0.3):
        counts = (torch.tensor(value), torch.tensor(3 * value), torch.full((B,), value / 2))
        for learner in (joint, fast):
            joint.zero_grad(set_to_none=True)
            _, loss, *_ = learner(text[0], noise, text[1], counts=counts)
            loss.backward()
            grads = [p.grad for p in joint.parameters() if p.grad is not None]
            if learner is joint:
                expected = loss.item(), [g.clone() for g in grads]
        assert loss.item() == pytest.approx(expected[0])
        for a, b in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


def test_a_router_for_any_budget_is_told_which(model):
    """At the start its probability of BIG is the share asked for; each k is then met by calibration."""
    config = dataclasses.replace(DEBUG, hidden=8)
    made = router.new_router(SHAPE, config, "mlp", (None, None))
    h = torch.randn(2, T, SHAPE.n_embd)
    p = made(0, h, None, {"asked": torch.tensor([0.25, 0.75])})[0].softmax(-1)[..., BIG]
    torch.testing.assert_close(p[:, 0], torch.tensor([0.25, 0.75]))
    made.w_out.data = torch.randn(made.w_out.shape, generator=torch.Generator().manual_seed(3))
    idx = torch.randint(SHAPE.vocab_size, (64, T), generator=torch.Generator().manual_seed(4))
    free = []
    for k in (1, 2):
        made.asked.fill_(k / L)
        made.shift.zero_()
        free.append((stats_of(model, made, idx) == BIG).sum(-1).float().mean().item())
        assert router.calibrate(model, made, idx, (k, None))["big"] == pytest.approx(k, abs=0.05)
    assert free[1] > free[0] + 0.5  # what it is told matters, before any calibration
    whole, cache = stats_of(model, made, idx[:2]), KVCache(SHAPE, 2, idx.device, torch.float32)
    routes = [stats_of(model, made, token, cache=cache) for token in idx[:2].split(1, 1)]
    assert torch.cat(routes, 1).equal(whole)


@pytest.mark.parametrize("options, parts", [
    ({"name": "distilled"}, ["--name=distilled", "linear, gumbel, mlp"]),
    ({"name": "linear,mlp"}, ["--name=linear,mlp", "one router"]),
    ({"name": "mpl"}, ["--name=mpl", "did you mean mlp?"]),
    ({"budget": "1,2"}, ["--budget=1,2", "any"]),
    ({"budget": 4}, ["--budget=4", "0..3"]),
    ({"tau_end": 0}, ["--tau_end=0", "above 0"]),
    ({"max_steps": 0}, ["--max_steps=0", "above 0"]),
    ({"anneal": 2}, ["--anneal=2", "0..1"]),
    ({"train_route": "big"}, ["--train_route=big", "--joint"]),
    ({"steps": 5}, ["--steps", "--"]),
])
def test_joint_bad_values(together, tmp_path, options, parts):
    user_error(lambda: together(**options), *parts)
    assert not (tmp_path / "joint").exists()


def test_joint_does_not_overwrite(together, tmp_path, here):
    together()
    user_error(together, "ckpt.pt", "--resume")
    user_error(lambda: together(resume=True, alpha_end=5.0), "--alpha_end=30.0", "not 5.0")
    user_error(lambda: train.main([f"--{key}={value}" for key, value in (TINY | {
        "corpus": here / "texts", "data_dir": here / "data", "max_steps": 6, "out_dir": tmp_path / "joint",
        "resume": True}).items()]), "ckpt.pt", "--train_route=router")
    user_error(lambda: train.main(["--train_route=router"]), "--train_route=router", "big_then_small")
    assert together(resume=True) == 0  # finished: calibrated and measured again, nothing trained


# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("options, parts", [
    ({"name": "linaer"}, ["--name=linaer", "did you mean linear?"]),
    ({"name": "zzz"}, ["--name=zzz", "linear, gumbel, mlp"]),
    ({"budget": 4}, ["--budget=4", "0..3"]),
    ({"budget": -1}, ["--budget=-1", "0..3"]),
    ({"budget": "nan"}, ["--budget=nan", "0..3"]),
    ({"budget": "two"}, ["--budget=two"]),
    ({"budget": "1/1"}, ["--budget=1/1", "--choices=xsb"]),
    ({"budget": "2/2", "choices": "xsb"}, ["--budget=2/2", "0..3"]),
    ({"choices": "xs"}, ["--choices=xs", "sb, xsb, xb"]),
    ({"steps": 0}, ["--steps=0", "above 0"]),
    ({"learning_rate": "inf"}, ["--learning_rate=inf"]),
    ({"tokens": 10 ** 9}, ["--tokens=1000000000", "fewer"]),
    ({"device": "tpu"}, ["--device=tpu"]),
    ({"preset": "huge"}, ["--preset=huge", "cpu"]),
])
def test_bad_values(go, options, parts):
    user_error(lambda: go(**options), *parts)


def test_router_of_another_checkpoint(go, tmp_path):
    go(name="linear")
    path = tmp_path / "run" / "routers" / "linear_k1_s1.pt"
    before = saved(tmp_path / "run", "linear_k1_s1")
    save_checkpoint(path, before | {"checkpoint": "0123456789abcdef"})
    user_error(lambda: go(name="linear"), path, "0123456789abcdef", before["checkpoint"])
    flags = [f"--out_dir={tmp_path / 'run'}", "--device=cpu", f"--router={path}"]
    user_error(lambda: sample.main(flags), path, "0123456789abcdef")


def test_other_settings_do_not_overwrite(go, tmp_path):
    go(name="linear")
    path = tmp_path / "run" / "routers" / "linear_k1_s1.pt"
    user_error(lambda: go(name="linear", steps=5), path, "--steps=4", "not 5")


def test_damaged_router_file(go, tmp_path):
    go(name="linear")
    path = tmp_path / "run" / "routers" / "linear_k1_s1.pt"
    path.write_bytes(path.read_bytes()[:500])
    user_error(lambda: go(name="linear"), path, "damaged")


# ---------------------------------------------------------------------------------------------------------------------
# sample.py --router

def test_sampling_by_a_router(go, tmp_path, capsys):
    go(name="mlp", steps=20, learning_rate=0.5)
    out, path = tmp_path / "run", tmp_path / "run" / "routers" / "mlp_k1_s1.pt"
    model, shape, _ = load_run(out, "cpu")
    made, _ = router.load_router(path, oracle.file_hash(out / "ckpt.pt"), shape, "cpu")
    # Text that fits into the context: the routes of decoding are those of the whole sequence.
    prompt = torch.tensor([[5, 6, 7]])
    pick = sample.sampler(300, 0, 0, None)
    steps = list(sample.generate(model, prompt, 10, made, pick))
    tokens, routes = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    whole = stats_of(model, made, torch.cat((prompt, tokens[:, :-1]), 1))
    assert whole[:, 2:].equal(routes)
    capsys.readouterr()
    sample.main([f"--out_dir={out}", "--device=cpu", f"--router={path}", "--tokens=30", "--prompt=alpha"])
    assert "BIG per token" in capsys.readouterr().err
    user_error(lambda: sample.main([f"--out_dir={out}", f"--router={path}", "--route=small"]), "--router", "--route")
    user_error(lambda: sample.main([f"--out_dir={out}", f"--router={out / 'no.pt'}"]), "no.pt", "python router.py")
    user_error(lambda: sample.main([f"--out_dir={out}", f"--router={out / 'ckpt.pt'}"]), "ckpt.pt", "no router file")


def test_the_router_in_the_readme(go, here, tmp_path, monkeypatch, text):
    """A router of one's own: the snippet, run as it stands on another run, gets a row of its own and can decode."""
    readme = (Path(router.__file__).parent / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line.strip() and "import" not in line]) <= 20
    go("out", name="linear", steps=1)
    (tmp_path / "data").symlink_to(here / "data")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    rows = json.loads((tmp_path / "out/routers.json").read_text())
    assert {row["name"] for row in rows} == {"linear", "new_tokens"}
    assert names["rows"] == [row for row in rows if row["name"] == "new_tokens"]
    assert 0 < names["rows"][0]["achieved"] < 1
    model, own, (idx, _) = load_run("out", "cpu")[0], names["NewTokens"](), text
    whole, cache = stats_of(model, own, idx), KVCache(model.config, B, idx.device, torch.float32)
    for b in range(B):
        new = [token not in idx[b, :t] for t, token in enumerate(idx[b])]
        assert (whole[b, :, 2] == BIG).tolist() == new
    routes = [stats_of(model, own, piece, cache=cache) for piece in idx.split([5, 1, 1, T - 7], 1)]
    assert torch.cat(routes, 1).equal(whole)
    user_error(lambda: router.measure(own, "mlp", out_dir="out"), "mlp", "another")


# ---------------------------------------------------------------------------------------------------------------------
# claims

def spread(values, S=40):
    """Sequences around the given means, all moving together: paired differences are exact but for 0.001."""
    rng = np.random.default_rng(0)
    return np.add.outer(rng.normal(size=S), np.zeros(len(values))) + values + 0.001 * rng.normal(size=(S, len(values)))


def test_f4():
    falling, turning = [4.0, 3.9, 3.85], [3.0, 3.2]
    assert claims.f4(spread(falling), spread(falling), spread(turning))["verdict"] == "holds"
    assert claims.f4(spread([4.0, 3.9, 3.95]), spread(falling), spread(turning))["verdict"] == "fails"
    assert claims.f4(spread(falling), spread(falling[::-1]), spread(turning))["verdict"] == "fails"
    assert claims.f4(spread(falling), spread(falling), spread(turning[::-1]))["verdict"] == "fails"
    flat = spread([4.0, 4.0, 3.9])
    assert claims.f4(flat, spread(falling), spread(turning))["verdict"] == "undecided"


def test_f5():
    def of(router, best100, oracle):
        columns = spread([router, best100, oracle])
        return claims.f5(*(dict.fromkeys((4, 6, 8), columns[:, i]) for i in range(3)))
    found = of(4.0, 3.95, 3.5)
    assert found["verdict"] == "holds"
    assert found["effect"] == pytest.approx(0.45, abs=0.002)
    assert of(3.6, 3.95, 3.5)["verdict"] == "fails"


def test_f7():
    late, early = np.zeros((20, 12)), np.zeros((20, 12))
    late[:, 7:], early[:, :5] = 0.9, 0.9
    late += 0.001 * np.arange(20)[:, None]
    early += 0.001 * np.arange(20)[:, None]
    assert claims.f7(dict.fromkeys((4, 6, 8), late))["verdict"] == "holds"
    assert claims.f7({4: late, 6: late, 8: early})["verdict"] == "fails"


def test_f8():
    some = 4 + 0.01 * np.arange(20)
    assert claims.f8_router({4: some + 1, 6: some + 1}, {4: some, 6: some})["verdict"] == "holds"
    assert claims.f8_router({4: some + 1, 6: some}, {4: some, 6: some + 1})["verdict"] == "fails"


def test_findings_from_the_files():
    """Routes that are late in depth and early in position; two seeds, of which one lacks a budget."""
    S, T, L, rng = 12, 8, 12, np.random.default_rng(1)
    flops, files = (100, 220), {}  # all-small, all-big: 10 a BIG
    for seed in (1, 2):
        for k in (2, 4, 6, 8):
            routes = np.full((S, T, L), SMALL, np.uint8)
            routes[:, :4, L - k - 1:] = BIG  # k + 1 in the first half of positions, k - 1 in the second
            routes[:, 4:, L - k + 1:] = BIG
            losses = np.repeat(5 - 0.1 * k + 0.001 * rng.normal(size=(S, 1)), T, 1)
            files[k, seed] = {"routes": routes, "losses": losses, "flops": 100 + 10 * (routes == BIG).sum(-1)}
    del files[2, 2]
    rows = np.arange(S)

    def base(values, rows=rows):
        return np.tile(np.array(values), (len(rows), 1)) + 0.001 * rng.normal(size=(len(rows), L + 1)), rows
    k = np.arange(L + 1)
    given = {"fixed": base(5.01 - 0.1 * k), "best100_data_set": base(5.02 - 0.1 * k),
             "oracle": base(3 + 0.02 * (k - 6) ** 2, rows[::2])}
    found = {line["id"]: line for line in claims.router_claims("linear", files, given, flops)}
    assert {id: line["verdict"] for id, line in found.items()} == dict.fromkeys(("F4", "F5", "F7", "F8"), "holds")
    assert found["F8"]["effect"] == pytest.approx(2)
    assert found["F5"]["effect"] == pytest.approx((5 - 0.8) - 3.08 - 0.02, abs=0.005)  # the weakest is k = 8
    assert {id: line["router_seeds"] for id, line in found.items()} == {"F4": [1], "F5": [1, 2], "F7": [1, 2],
                                                                        "F8": [1, 2]}
    assert len(found["F4"]["detail"]["gain_per_step_router_then_fixed"]) == 6  # seed 1 has k = 2, 4, 6, 8
    del files[6, 1], files[8, 2]
    found = {line["id"]: line["router_seeds"] for line in claims.router_claims("linear", files, given, flops)}
    assert found == {"F4": [1], "F8": [2]}


def test_at_budget():
    base = np.array([5.0, 4.0, 3.5, 3.4])
    for k, expected in ((0, 5), (0.25, 4.75), (1, 4), (2.5, 3.45), (3, 3.4)):
        assert claims.at_budget(np.array(float(k)), base) == pytest.approx(expected)
    assert np.isnan(claims.at_budget(np.array(-0.1), base))  # cheaper than all-small: no pattern to compare with
    missing = np.array([5.0, np.nan, 3.5, 3.4])
    assert claims.at_budget(np.array(2.0), missing) == 3.5
    assert np.isnan(claims.at_budget(np.array(0.5), missing))


# ---------------------------------------------------------------------------------------------------------------------
# on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("choices", ["sb", "xsb"])
def test_cuda_counts_that_travel_late(choices):
    """A routed forward, whose counts arrive while attention is queued, and the same choices given as a route."""
    shape = dataclasses.replace(SHAPE, n_embd=64, block_size=64)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1)).cuda().eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(3)
    made = Router(shape, 8, choices, gates.shares(L, choices, 1.5, None), rng)
    made.w_out.data = torch.randn(made.w_out.shape, generator=rng)
    made.cuda()
    for i in range(5):
        idx = torch.randint(SHAPE.vocab_size, (8, 64), generator=torch.Generator().manual_seed(i)).cuda()
        logits, _, stats = model(idx, made, return_stats=True)
        assert len(stats["route"].unique()) == len(choices)
        torch.testing.assert_close(model(idx, stats["route"])[0], logits, atol=1e-4, rtol=1e-4)


@needs_cuda
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_cuda_compiled_step_equals_the_plain_one(name):
    """The graph that --compile=auto runs on a GPU: loss and gradients as without, for two budgets."""
    shape = dataclasses.replace(SHAPE, n_embd=64, block_size=64)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1)).cuda().eval().requires_grad_(False)
    idx = torch.randint(SHAPE.vocab_size, (8, 65), generator=torch.Generator().manual_seed(2)).cuda()
    for budget in (1, 2):
        grads = []
        for compiled in ("off", "on"):
            config = dataclasses.replace(DEBUG, compile=compiled)
            made = router.new_router(shape, config, name, (budget, None)).cuda()
            loss, _ = made.step_loss(model, config, (budget, None), idx[:, :-1], idx[:, 1:], DOMAIN, 1)
            loss.backward()
            grads.append([loss.detach(), *(p.grad for p in made.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
