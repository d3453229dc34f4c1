"""zoo.py: each system's idea helps where it must, and every system keeps the contract of routers."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE, user_error
from test_router import B, L, T, planted_model, stats_of
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import effects
import effects_adapt
import gates
import router
import sample
import zoo
from common import save_checkpoint
from model import BIG, SMALL, DuoConfig, DuoGPT, KVCache
from oracle import file_hash

DEBUG = router.RouterConfig(**router.PRESETS["debug"])


@pytest.fixture
def text():
    ids = torch.randint(SHAPE.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Rewiring and LoRA-Mixer

OURS = ("rewire", "lora_mixer", "lora_single")


def awake(name, model, shape=SHAPE, seed=3):
    """A system with random weights, ready to choose: its choices depend on the text in all the ways it has."""
    rng = torch.Generator().manual_seed(seed)
    made = router.new_router(shape, DEBUG, name, (1.5, None))
    for key, weight in made.named_parameters():
        if key != "b_out":
            weight.data = torch.randn(weight.shape, generator=rng) * (5 if "gate" in key else 1)
    if name.startswith("rewire"):
        made.rate = 100.0  # so random a model hardly cares, but delta must matter here
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("name", OURS)
def test_causal_and_the_same_token_by_token(model, text, name):
    made, (idx, _) = awake(name, model), text
    with made.attached(model):
        logits, _, stats = model(idx, made, return_stats=True)
        route, changed = stats["route"], 0
        for t in range(1, T):
            other = idx.clone()
            other[:, t:] = (other[:, t:] + 7) % SHAPE.vocab_size
            got = stats_of(model, made, other)
            assert got[:, :t].equal(route[:, :t])
            changed += (got[:, t:] != route[:, t:]).sum().item()
        assert changed > 0
        for cut in ([1] * T, [5, 1, 1, T - 7]):
            cache = KVCache(SHAPE, B, idx.device, torch.float32)
            parts = [model(piece, made, cache=cache, return_stats=True) for piece in idx.split(cut, 1)]
            assert torch.cat([part[2]["route"] for part in parts], 1).equal(route)
            torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), logits, rtol=1e-4, atol=1e-4)
    plain = model(idx, route)[0]  # outside, the base is the base
    assert torch.allclose(plain, logits, atol=1e-3) == (name == "rewire")


@pytest.mark.parametrize("name", OURS)
def test_budgets_are_met(model, name):
    idx = torch.randint(SHAPE.vocab_size, (64, T), generator=torch.Generator().manual_seed(5))
    made = awake(name, model)
    made.rate = 1.0
    assert abs(router.calibrate(model, made, idx, (1.2, None))["big"] - 1.2) < 0.05


def test_each_document_has_a_delta_of_its_own(model, text):
    """Alone or in a batch; and without one, or in training, it is the plain linear router."""
    made, (idx, _) = awake("rewire", model), text
    with made.attached(model):
        deltas = [made.adapt(part[:, :6], torch.zeros(len(part), L, 3)) for part in (idx, idx[1:2])]
        torch.testing.assert_close(deltas[0][1:2], deltas[1], rtol=1e-3, atol=1e-3)
        adapted = stats_of(model, made, idx)
        made.train()
        plain = stats_of(model, made, idx)
    same = router.new_router(SHAPE, DEBUG, "linear", (1.5, None))
    same.load_state_dict(made.state_dict())
    assert plain.equal(stats_of(model, same, idx))
    assert plain[:, :made.every].equal(adapted[:, :made.every]) and not plain.equal(adapted)


def test_delta_is_the_gradient_step_and_keeps_the_number_of_big(model, text):
    """Against finite differences, and against a count."""
    made, idx = awake("rewire", model), text[0][:1]
    made.tau, delta = 1.0, 0.3 * torch.randn(1, L, 3, generator=torch.Generator().manual_seed(1))
    with made.attached(model):
        with torch.enable_grad():
            slope = torch.autograd.grad(made.soft_mix(idx, delta.requires_grad_(), 4)[0], delta)[0]
        for entry in ((0, 0, BIG), (0, 1, SMALL)):
            values = []
            for sign in (1, -1):
                moved = delta.detach().clone()
                moved[entry] += sign * 0.01
                with torch.no_grad():
                    h, _ = gates.mixed_forward(model, lambda *a: gates.Router.forward(made, *a), idx,
                                               lambda layer, z, d=moved: gates.soft_gate(z + d[:, layer, None], 1.0))
                    logits = h[:, 4:-1] @ model.embedding.weight.T
                    values.append(F.cross_entropy(logits.flatten(0, 1), idx[:, 5:].flatten()))
            assert slope[entry].item() == pytest.approx(((values[0] - values[1]) / 0.02).item(), rel=0.05, abs=1e-4)
        centred = made.recentred(idx, delta.detach())
        _, plain = made.soft_mix(idx, delta.detach())
    assert (centred - delta)[..., :BIG].abs().max() == 0  # only BIG's entries, all by one number
    assert (centred - delta)[..., BIG].std() < 1e-6
    counts = [(plain + d.unsqueeze(1)).argmax(-1).eq(BIG).sum().item() for d in (centred, delta * 0)]
    assert abs(counts[0] - counts[1]) <= 1


def test_flops_of_rewiring():
    """The formula against what torch counts: layer 0's attention needs no backward, other attention is recomputed."""
    shape = DuoConfig(n_layer=8, n_head=2, n_embd=64, block_size=16, vocab_size=40)
    model, T = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1)).eval().requires_grad_(False), 16
    made, idx = awake("rewire", model, shape), torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, made.attached(model):
        deltas = torch.zeros(1, 8, 3)
        for t in range(made.every, T, made.every):
            deltas = made.adapt(idx[:, :t], deltas)
    extra = (made.flops() - gates.Router.flops(made)) * T
    assert extra == pytest.approx(counter.get_total_flops(), rel=0.15) and extra > 10 * T * gates.Router.flops(made)


def shift_model():
    """Layer 0's BIG writes the direction of token 0, layer 1's that of token 1; SMALL writes nothing."""
    model = planted_model(n_layer=2)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.small.down.weight.zero_()
            block.big.down.weight.zero_()
            block.big.down.weight[2 + layer] = 0.02
    return model


def shift_batch(kind, n=32, T=16, seed=0):
    """Documents: any of tokens 2..41, then token `kind` (0 or 1), and so on: nothing at the former tells the kind."""
    idx = torch.randint(2, 42, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    idx[:, 1::2] = kind
    return idx[:, :-1], idx[:, 1:], torch.full((n,), kind)


def test_a_shift_is_recovered_after_the_first_chunk(tmp_path):
    """Trained where BIG belongs into layer 0 and tested where it belongs into layer 1, one BIG in two layers: without
    delta all is wrong, with it from the second chunk on all is right."""
    model, budget = shift_model(), (1, None)
    config = dataclasses.replace(DEBUG, steps=40, learning_rate=0.003, save_interval=40)
    made = router.train_router(model, config, "rewire", budget, lambda step: shift_batch(0, seed=step),
                               tmp_path / "x.pt", "hash")
    router.calibrate(model, made, shift_batch(0, seed=10 ** 6)[0], budget)
    losses, spent = {}, {}
    for kind in (0, 1):
        for rate in (0.0, made.rate):
            made.rate = rate
            idx, targets, _ = shift_batch(kind, seed=10 ** 6 + 1)
            route, loss = router.choose(model, made, idx, targets)
            losses[kind, rate > 0] = loss[:, ::2].view(len(idx), -1, made.every // 2).mean((0, 2))  # by chunk
            spent[kind, rate > 0] = (route == BIG).float().sum(-1).mean().item()
    for kind in (0, 1):
        assert spent[kind, True] == pytest.approx(spent[kind, False], abs=0.15)
    best, worst = losses[0, False].max(), losses[1, False].min()
    assert worst > best + 0.5
    assert losses[1, True][0] > worst - 0.01 and losses[1, True][1:].max() < best + 0.1
    assert losses[0, True].max() < best + 0.1  # at home it loses nothing


def test_rewire_prose_sees_only_the_second_domain(model, text):
    made, (x, y) = router.new_router(SHAPE, DEBUG, "rewire_prose", (1, None)), text
    run = SimpleNamespace(shape=SHAPE, domains=["text"])
    user_error(lambda: router.can_learn(run, DEBUG, "rewire_prose", (1, None), left_out=False), "only one")
    assert not router.can_learn(run, DEBUG, "rewire_prose", (1, None), left_out=True)
    run.domains.append("more")
    assert router.can_learn(run, DEBUG, "rewire_prose", (1, None), left_out=False)
    domain = torch.tensor([0, 1, 0, 1])
    plain = router.new_router(SHAPE, DEBUG, "linear", (1, None))
    expected = plain.step_loss(model, DEBUG, (1, None), x[1::2], y[1::2], domain, 0)[0]
    torch.testing.assert_close(made.step_loss(model, DEBUG, (1, None), x, y, domain, 0)[0], expected)
    assert made.step_loss(model, DEBUG, (1, None), x, y, torch.zeros(B), 0)[0] == 0


def opposite_model():
    """Tokens 2..41 in four groups of ten, by domain f and content c, both +-1. A sequence stays in its group and is
    followed by token 0 where f c = 1, else by token 1. The FFNs write nothing; attention carries the content along."""
    shape = DuoConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=42, big_width=4, small_width=4)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        table = 0.1 * torch.randn(42, 16, generator=torch.Generator().manual_seed(2))
        table[:, :5] = 0
        table[:, 0] = 1
        table[2:, 1] = torch.tensor([1.0, -1.0]).repeat_interleave(20)  # f
        table[2:, 4] = torch.tensor([1.0, -1.0]).repeat_interleave(10).repeat(2)  # c
        table[0, 2], table[1, 3] = 2, 2
        model.embedding.weight.copy_(table)
        for block in model.blocks:
            block.qkv.weight.zero_()
            block.qkv.weight[32:].copy_(torch.eye(16))  # values are what is read; all positions count alike
            for weight in (block.out.weight, block.small.down.weight, block.big.down.weight):
                weight.zero_()
    return model.eval().requires_grad_(False)


def opposite_batch(step, n=16, T=12):
    rng = torch.Generator().manual_seed(step + 1000)
    group = torch.arange(n) % 4
    idx = 2 + 10 * group.unsqueeze(1) + torch.randint(10, (n, T), generator=rng)
    domain, content = group // 2, group % 2
    return idx, (domain != content).long().unsqueeze(1).expand(-1, T).contiguous(), domain


def test_domains_that_need_opposite_corrections(tmp_path):
    """The product of domain and content is nothing that one linear correction can give, of whatever rank: an expert
    per domain can. Nor can routing the FFNs help, here."""
    model, losses = opposite_model(), {}
    config = dataclasses.replace(DEBUG, steps=80, batch_size=16, learning_rate=0.05, save_interval=80)
    for name in ("linear", "lora_single", "lora_mixer", "lora_mixer_few"):
        made = router.train_router(model, config, name, (0.5, None), opposite_batch, tmp_path / f"{name}.pt", "hash")
        idx, targets, domain = opposite_batch(10 ** 6)
        losses[name] = router.choose(model, made, idx, targets)[1].mean().item()
    sizes = [sum(p.numel() for key, p in router.new_router(SHAPE, config, name, (1, None)).named_parameters()
                 if key != "gate") for name in ("lora_single", "lora_mixer")]
    assert sizes[0] == sizes[1]
    assert min(losses["lora_single"], losses["linear"]) > 0.5  # log 2 = 0.69 is a coin's; RMSNorm helps a little
    assert max(losses["lora_mixer"], losses["lora_mixer_few"]) < 0.2


def test_lora_by_hand(model, text):
    """One projection's correction, as the equation says: inference keeps two of four experts."""
    made, x = awake("lora_mixer", model), torch.randn(B, T, SHAPE.n_embd)
    block = model.blocks[1]
    with made.attached(model), made.attached(model):  # nested: still once
        got = block.out(x)
    p = (F.rms_norm(x, (SHAPE.n_embd,), eps=1e-5) @ made.gate[1, 1]).softmax(-1)
    expected, keep = block.out(x), p >= p.topk(2).values[..., 1:]
    for e in range(4):
        rows = slice(4 * e, 4 * e + 4)
        alpha = p[..., e] * keep[..., e] / (p * keep).sum(-1)
        expected = expected + made.scale * alpha[..., None] * (x @ made.a[1, 1][:, rows] @ made.b_proj[1, rows])
    torch.testing.assert_close(got, expected)
    assert not block.out._forward_hooks


def test_flops_of_loras(model, text):
    made = awake("lora_mixer", model)
    totals = []
    for context in (made.attached(model), gates.Router.attached(made, model)):
        with FlopCounterMode(display=False) as counter, context, torch.no_grad():
            model(text[0], BIG)
        totals.append(counter.get_total_flops())
    assert made.flops() == (totals[0] - totals[1]) / B / T + gates.Router.flops(made)


def test_phases_and_losses_of_lora_mixer(model, text):
    """First the experts that own the domain learn, and no gate; then the gates. The losses differ as they should."""
    config, (x, y) = dataclasses.replace(DEBUG, steps=10), text
    made = awake("lora_mixer", model).train().requires_grad_(True)
    made.prepare(model, lambda step: (x, y, torch.tensor([0, 1, 0, 1])), config, (1, None))
    for step, domain in ((0, 0), (9, 0)):
        made.zero_grad(set_to_none=True)
        with made.attached(model):
            made.step_loss(model, config, (1, None), x, y, torch.full((B,), domain), step)[0].backward()
        grads = made.b_proj.grad.view(L, 4, -1).abs().sum((0, 2))  # by expert: 0 and 2 are domain 0's
        assert (grads > 0).tolist() == ([True, False, True, False] if step == 0 else [True] * 4)
        assert (made.gate.grad is None) == (step == 0)
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3 + [[0.1, 0.7, 0.1, 0.1]])
    balance = 0.01 * 4 * (0.55 * 0.75 + 0.25 * 0.25)
    entropy = -0.7 * torch.tensor(0.7).log() - 0.3 * torch.tensor(0.1).log()
    for name, expected in (("lora_budget", 0), ("lora_balance", balance), ("lora_mixer", balance - 0.01 * entropy),
                           ("lora_sharp", balance + 0.01 * entropy)):
        made = router.new_router(SHAPE, DEBUG, name, (1, None))
        assert made.balance_loss(p).item() == pytest.approx(float(expected), abs=1e-6)
    user_error(lambda: router.new_router(SHAPE, dataclasses.replace(DEBUG, choices="xsb"), "lora_mixer", (1, None)),
               "--choices=xsb", "sb")


@pytest.mark.parametrize("name", OURS)
def test_sample_and_bench_run_it(model, tmp_path, name, monkeypatch):
    """From its file; and a text that outgrows the context."""
    save_checkpoint(tmp_path / "ckpt.pt", {"model": model.state_dict(), "model_config": dataclasses.asdict(SHAPE)})
    saved, checkpoint = awake(name, model), file_hash(tmp_path / "ckpt.pt")
    save_checkpoint(tmp_path / "x.pt", {"router": saved.state_dict(), "step": 1, "name": name, "budget": (1.5, None),
                                        "config": dataclasses.asdict(DEBUG), "checkpoint": checkpoint,
                                        "calibration": {"big": 1.5}})
    made, _ = router.load_router(tmp_path / "x.pt", checkpoint, SHAPE, torch.device("cpu"))
    steps = list(sample.generate(model, torch.tensor([[1, 2, 3]]), 3 * T, made, lambda z: z[:, :40].argmax(-1)))
    assert len(steps) == 3 * T and {SMALL, BIG} >= set(torch.cat([route for _, route in steps]).unique().tolist())
    assert not any(block.qkv._forward_hooks for block in model.blocks)
    monkeypatch.setattr(bench, "measure", lambda variants, device: {key: f() and 1.0 for key, f in variants.items()})
    idx = torch.randint(40, (4, T), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(bench, "routed_model", lambda config, device: (model, made, idx))
    rows = bench.bench_router(bench.BenchConfig(preset="debug", router="x.pt"), torch.device("cpu"))
    assert [row["what"] for row in rows] == [f"prefill 2 x {T}", "decode, batch 2"]


def test_rewire_learns_compiled_in_one_graph(model, text, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    fast = torch.compile(gates.mixed_loss, backend=backend, fullgraph=True, dynamic=False)
    monkeypatch.setattr(gates, "compiled_mixed_loss", lambda: fast)
    made, domain = router.new_router(SHAPE, DEBUG, "rewire_prose", (1, None)), torch.tensor([0, 1, 1, 1])
    with made.attached(model):
        values = [made.step_loss(model, dataclasses.replace(DEBUG, compile=flag), (1, None), *text, domain, step)[0]
                  for step in (0, 1) for flag in ("off", "on")]
    assert values[0] == values[1] and values[2] == values[3] and len(graphs) == 1


# ---------------------------------------------------------------------------------------------------------------------
# effects_adapt.py: what is measured of the two, on untrained routers of a random model

@pytest.fixture
def measured_on(model):
    """-> what effects_adapt.py needs of a run, its windows (two domains), and a way to say which routers it has"""
    idx = torch.randint(SHAPE.vocab_size, (6, T + 1), generator=torch.Generator().manual_seed(4))
    r = SimpleNamespace(exact=model, device=torch.device("cpu"), shape=SHAPE, domains=["code", "prose"],
                        config=SimpleNamespace(out_dir="out"))
    return r, (idx[:, :-1], idx[:, 1:], np.array([0, 0, 0, 1, 1, 1])), SimpleNamespace(seed=1)


def test_rewiring_needs_a_domain_that_the_router_has_not_seen(measured_on):
    r, windows, config = measured_on
    r.domains = ["notes"]
    user_error(lambda: effects_adapt.rewire(r, windows, config), "out: its corpus has one domain")


def test_what_effects_need_is_known():
    assert set(effects.COMPARED) == set(effects.EFFECTS)
    assert {name for names in effects.COMPARED.values() for name in names} <= {*zoo.KINDS, *router.NAMES}


def test_the_effect_of_rewiring(measured_on, monkeypatch):
    r, windows, config = measured_on
    made = awake("rewire_prose", r.exact)
    rate, shift = made.rate, made.shift.clone()
    monkeypatch.setattr(effects_adapt, "routers_of", lambda *_: {(1.0, 1): made})
    found = effects_adapt.rewire(r, windows, config)
    code, prose = found["detail"]["code"], found["detail"]["prose"]
    assert made.rate == rate and made.shift.equal(shift)  # measuring leaves the router as it was
    assert found["effect"] == pytest.approx(-code["gain"]["own"][0], rel=1e-3) and found["sequences"] == 3
    assert set(code["gain"]) == {"own", "other", "random", "future"}
    assert len(set(map(tuple, code["gain"].values()))) == 4  # four controls, four results
    assert set(code["rates"]) == {str(x) for x in (*effects_adapt.RATES, rate)} and set(prose["rates"]) == {str(rate)}
    np.testing.assert_allclose(np.mean(code["by_chunk"]["own"]), code["gain"]["own"][0], rtol=1e-2)
    with made.attached(r.exact), torch.no_grad():  # without delta nothing changes but the shift that meets the budget
        own = effects_adapt.own_deltas(made, windows[0])
        none = [torch.zeros_like(own[0])] * len(own)
        losses, big = effects_adapt.with_deltas(r, made, *windows[:2], none)
        made.train()
        plain, plain_big = effects_adapt.at_budget(r, made, *windows[:2], big.mean())
    assert own[0].abs().max() == 0 < own[-1].abs().max()
    assert abs(plain_big.mean() - big.mean()) < 0.02
    assert losses == pytest.approx(plain, abs=0.05)


def test_the_effect_of_lora_mixer(measured_on, monkeypatch):
    r, windows, config = measured_on
    routers = {name: awake(name, r.exact, seed=i) for i, name in enumerate(("lora_mixer", "lora_single"))}
    monkeypatch.setattr(effects_adapt, "routers_of",
                        lambda _, name: {(1.0, 1): routers[name]} if name in routers else {})
    found = effects_adapt.lora_mixer(r, windows, config)
    table = found["detail"]["routers"]
    assert set(table) == set(routers) and table["lora_single"]["minus_single"] == [0, 0, 0]
    assert found["effect"] == pytest.approx(-table["lora_mixer"]["minus_single"][0], rel=1e-3)
    for name, made in routers.items():
        losses, big = effects_adapt.at_budget(r, made, *windows[:2], 1.0)
        assert table[name]["loss"][0] == pytest.approx(losses.mean(), rel=1e-3)
        assert big.mean() == pytest.approx(1, abs=0.05)
    assert all(0 <= table["lora_mixer"][key] <= 1.001 for key in ("information", "load", "token"))
    assert "information" not in table["lora_single"]
