"""zoo.py: each system on a planted problem that its idea solves; causal, exact while decoding, on budget."""
import copy
import dataclasses
import json

import pytest
import torch
from conftest import user_error
from test_router import DEBUG, FLAGGED, TINY, planted_batch, planted_model
from test_train import write_texts

import data
import effects
import effects_prompt
import gates
import router
import train
import zoo
from common import UserError
from gates import GAIN_UNIT
from model import BIG, SMALL, DuoConfig, DuoGPT, KVCache

# ---------------------------------------------------------------------------------------------------------------------
# Tryage, Arch-Router, GLIDER: what decides from a summary of the prompt

PROMPT = ("tryage", "arch", "glider")
LEARN = dataclasses.replace(DEBUG, steps=60, hidden=16, learning_rate=0.03, save_interval=60)


def prompt_model():
    """Three domains of text, in each the next token is the domain's own, 0, 1 or 2. Every layer's BIG writes the
    direction of one of those tokens, layer 0 that of 0 and so on, whatever it reads; SMALL writes nothing. So what is
    to be BIG is the domain's layer, for all its tokens; but half the tokens are the same in all domains."""
    shape = DuoConfig(n_layer=3, n_head=2, n_embd=16, block_size=32, vocab_size=43, big_width=4, small_width=4)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        table = 0.3 * torch.randn(43, 16, generator=torch.Generator().manual_seed(2))
        table[:, :4] = 0
        table[:, 0] = 1
        table[:3, 1:4] = 2 * torch.eye(3)
        model.embedding.weight.copy_(table)
        for layer, block in enumerate(model.blocks):
            block.out.weight.zero_()
            for ffn, size in ((block.small, 0), (block.big, 0.04)):
                ffn.gate_up.weight.zero_()
                ffn.gate_up.weight[:, 0] = 1
                ffn.down.weight.zero_()
                ffn.down.weight[1 + layer] = size
    return model.eval().requires_grad_(False)


def prompt_batch(step, domains=(0, 1), n=16, T=32):
    """Tokens 3..12, 13..22, 23..32: the domains' own; 33..42: anyone's."""
    rng = torch.Generator().manual_seed(step % 2 ** 31)
    domain = torch.tensor(domains)[torch.randint(len(domains), (n,), generator=rng)]
    own = torch.randint(3, 13, (n, T), generator=rng) + 10 * domain.unsqueeze(1)
    anyone = torch.randint(33, 43, (n, T), generator=rng)
    x = torch.where(torch.rand(n, T, generator=rng) < 0.5, own, anyone)
    return x, domain.unsqueeze(1).expand(n, T).contiguous(), domain


def learned(name, model, batch, budget, tmp_path, **options):
    config = dataclasses.replace(LEARN, **options)
    made = router.train_router(model, config, name, (budget, None), batch, tmp_path / f"{name}.pt", "hash")
    router.calibrate(model, made, batch(10 ** 6, n=64)[0], (budget, None))
    return made


def on_the_domains_layer(model, made, domains, tokens=slice(8, None), common=False):
    """-> the share of tokens whose only BIG is in their domain's layer; common: of those that are in all domains"""
    x, _, domain = prompt_batch(10 ** 6 + 1, domains, n=64)
    route, _ = router.choose(model, made, x)
    right = ((route == BIG) == (torch.arange(3) == domain.view(-1, 1, 1))).all(-1)[:, tokens]
    return right[(x[:, tokens] >= 33) | (not common)].float().mean().item()


@pytest.fixture(scope="module", params=PROMPT)
def prompt_router(request, tmp_path_factory):
    """-> a model with random weights that matter, and a router with random weights, fitted to its text"""
    shape = DuoConfig(n_layer=3, n_head=2, n_embd=16, block_size=16, vocab_size=40)
    model = DuoGPT(shape).init_weights(torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.data *= 1 if "norm" in name else 3
    made = router.new_router(shape, DEBUG, request.param, (1.5, None))

    def batch(step, n=4):
        rng = torch.Generator().manual_seed(step + 1000)
        domain = torch.arange(n) % 2
        ids = torch.randint(25, (n, 17), generator=rng) + 15 * domain.unsqueeze(1)
        return ids[:, :-1], ids[:, 1:], domain
    made.prepare(model, batch, DEBUG, (1.5, None))
    for weight in made.parameters():
        weight.data += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return model, made.eval().requires_grad_(False), batch


def test_prompt_choices_are_causal(prompt_router):
    model, made, batch = prompt_router
    idx, changed = batch(1)[0], 0
    router.calibrate(model, made, idx, (1.5, None))
    route = router.choose(model, made, idx)[0]
    for t in range(1, 16):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 7) % 40
        got = router.choose(model, made, other)[0]
        assert got[:, :t].equal(route[:, :t])
        changed += (got[:, t:] != route[:, t:]).sum().item()
    assert changed > 0


def test_prompt_routers_decode_as_they_read(prompt_router):
    model, made, batch = prompt_router
    idx = batch(2)[0]
    router.calibrate(model, made, idx, (1.5, None))
    logits, _, whole = model(idx, made, return_stats=True)
    for cut in ([1] * 16, [5, 1, 3, 7]):
        cache, routes, parts = KVCache(model.config, 4, idx.device, torch.float32), [], []
        for piece in idx.split(cut, 1):
            out, _, stats = model(piece, made, cache=cache, return_stats=True)
            routes.append(stats["route"])
            parts.append(out)
        assert torch.cat(routes, 1).equal(whole["route"])
        torch.testing.assert_close(torch.cat(parts, 1), logits)


@pytest.mark.parametrize("budget", [0.4, 1.5, 2.3])
def test_prompt_routers_meet_the_budget(prompt_router, budget):
    model, made, batch = prompt_router
    idx = batch(3, n=64)[0]
    got = router.calibrate(model, made, idx, (budget, None))
    assert abs(got["big"] - budget) <= 0.05
    spent = []
    for shift in torch.linspace(-20, 20, 21):  # and BIG rises with the shift, from none to all
        made.shift[BIG] = shift
        spent.append((router.choose(model, made, idx)[0] == BIG).sum(-1).float().mean().item())
    assert spent == sorted(spent) and spent[0] < 0.5 and spent[-1] > 2.5


def test_prompt_routers_of_skip_and_big():
    shape, config = DuoConfig(n_layer=3, n_head=2, n_embd=16), dataclasses.replace(DEBUG, choices="xb")
    for name in PROMPT:
        made = router.new_router(shape, config, name, (1, None))
        assert made.missing.tolist() == [False, True, False]
    for name in ("tryage", "arch"):
        with pytest.raises(UserError, match="xsb"):
            router.new_router(shape, dataclasses.replace(DEBUG, choices="xsb"), name, (1, None))


def test_prompt_routers_are_saved_whole(prompt_router):
    """A fresh one with the saved state decides alike: all that prepare() fits is in buffers."""
    model, made, batch = prompt_router
    idx = batch(4)[0]
    name = type(made).__name__.lower()
    other = router.new_router(model.config, DEBUG, name, (1.5, None)).eval()
    other.load_state_dict(made.state_dict())
    assert router.choose(model, other, idx)[0].equal(router.choose(model, made, idx)[0])


def test_summary_by_hand():
    h = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(1))
    z, known = zoo.summary(h, {}, 3)
    assert known.tolist() == [False, False, True, True, True, True, True]
    assert (z[:, :2] == 0).all()
    for t, n in ((2, 3), (4, 3), (5, 6), (6, 6)):
        torch.testing.assert_close(z[:, t], h[:, :n].mean(1))


def test_greedy_ranks_by_hand():
    model = prompt_model()
    x, y, _ = prompt_batch(5, (1,))
    rank, losses = zoo.greedy_ranks(model, x, y, SMALL)
    assert rank[1] == 0  # the domain's layer first; the others only cost
    assert losses[0] > losses[1] < losses[2] < losses[3]
    for k in (0, 1, 3):
        pattern = torch.where(rank < k, BIG, SMALL)
        assert losses[k] == pytest.approx(model(x, pattern, y)[1].item(), abs=1e-5)


# Tryage: the best pattern for one budget is no part of the best one for another

def coupled_model():
    """planted_model, but BIG in layer 1 helps only with BIG in layer 0, whose output it reads, and together they make
    BIG in layer 2 useless. So a flagged token wants layer 2 if it may have one BIG, layers 0 and 1 if two."""
    model = planted_model()
    with torch.no_grad():
        model.embedding.weight[:, 4:7] = 0
        # layer, inputs {direction: weight}, outputs {direction: weight}; 0 is constant, 1 the flag, 3 the answer
        for layer, reads, writes in ((0, {1: 1}, {4: 0.1}), (1, {4: 1}, {3: 0.1, 5: 0.1}),
                                     (2, {1: 1, 5: -1}, {3: 0.035})):
            block = model.blocks[layer]
            block.small.down.weight.zero_()
            block.big.gate_up.weight[4:] = 0
            block.big.down.weight.zero_()
            for direction, weight in reads.items():
                block.big.gate_up.weight[4:, direction] = weight
            for direction, weight in writes.items():
                block.big.down.weight[direction] = weight
    return model


def test_tryage_one_head_serves_two_budgets(tmp_path):
    """A price on whole patterns exchanges {2} for {0, 1}. A shift of each layer's logit can only add layers to those
    that are BIG, so the plain router is right at one of the two budgets at most, whichever it was trained for."""
    model, right = coupled_model(), {}
    for name in ("tryage", "linear"):
        made = learned(name, model, planted_batch, FLAGGED, tmp_path)
        for k in (1, 2):
            router.calibrate(model, made, planted_batch(10 ** 6, n=64)[0], (k * FLAGGED, None))
            idx, flag, _ = planted_batch(10 ** 6 + 1, n=64)
            best = torch.tensor([[0, 0, 1], [1, 1, 0]][k - 1]) * flag.unsqueeze(-1)
            right[name, k] = ((router.choose(model, made, idx)[0] == BIG) == best).all(-1).float().mean().item()
    assert right["tryage", 1] > 0.95 and right["tryage", 2] > 0.95, right
    assert min(right["linear", 1], right["linear", 2]) < 0.75, right  # unflagged tokens are 0.625 of all


def test_tryage_predicts_advantages_and_losses(tmp_path):
    """The library is scored by whole forwards; the head learns its mean advantages, the control the losses."""
    model = planted_model()
    made = learned("tryage", model, planted_batch, FLAGGED, tmp_path, steps=100)
    assert made.library.sum(-1).tolist()[:4] == [0, 1, 2, 3]
    idx, targets, _ = planted_batch(10 ** 6 + 1, n=64)
    losses = made.pattern_losses(model, made.library, idx, targets)
    torch.testing.assert_close(losses[..., 3], model(idx, BIG, targets, reduction="none")[1])
    advantage = losses.mean(-1, keepdim=True) - losses
    with torch.no_grad():
        predicted = made.predict(model.embedding(idx), {}) * GAIN_UNIT
        control = made.predict(model.embedding(idx), {}, head=1)
    assert (predicted - advantage).abs().mean() < 0.2 * advantage.abs().mean()
    assert (control - losses).abs().mean() < 0.2 * losses.mean()
    assert made.flops() == 2 * (32 * 16 + 16 * 7)


# Arch-Router: a new domain by a new row, without training

@pytest.fixture(scope="module")
def prompt_arch(tmp_path_factory):
    model = prompt_model()
    return model, learned("arch", model, prompt_batch, 1.0, tmp_path_factory.mktemp("arch"))


def test_arch_routes_a_new_domain_by_its_row(prompt_arch):
    model, made = prompt_arch[0], copy.deepcopy(prompt_arch[1])
    assert made.k[1:3].tolist() == [1, 1] and made.rank[1:3].argmin(1).tolist() == [0, 1]  # the table, from prepare()
    assert on_the_domains_layer(model, made, (0, 1)) > 0.95
    assert on_the_domains_layer(model, made, (0, 1), common=True) > 0.95
    assert on_the_domains_layer(model, made, (2,)) < 0.05
    x, _, domain = prompt_batch(11, (0, 1, 2))
    with torch.no_grad():
        z = zoo.summary(model.embedding(x), {}, made.every)[0]
        before = made.match(z, made.policy[1:])[..., :3]
        row = made.add_policy(model, prompt_batch(99, (2,))[0], torch.tensor([1.0, 2.0, 0.0]), 1.0)
        assert row == 3 and made.match(z, made.policy[1:])[..., :3].equal(before)  # the old scores are what they were
        chosen = made.which(model.embedding(x), {})[:, 8:]
    assert (chosen == domain.unsqueeze(1) + 1).float().mean() > 0.9
    assert on_the_domains_layer(model, made, (2,)) > 0.85
    assert on_the_domains_layer(model, made, (0, 1)) > 0.9
    # A softmax head over the two domains it knows gives the third one to them, and so a wrong layer.
    head = effects_prompt.softmax_head(z[domain < 2, -1], domain[domain < 2])
    assert effects_prompt.head_choices(head, z[domain < 2, -1]).equal(domain[domain < 2])
    assert (effects_prompt.head_choices(head, z[domain == 2, -1]) < 2).all()


def test_arch_says_other(prompt_arch):
    """Text of a domain whose policy is not among the candidates goes to the default row."""
    model, made = prompt_arch
    x, _, domain = prompt_batch(12, (0, 1), n=64)
    without = copy.deepcopy(made)
    without.used[1] = False
    with torch.no_grad():
        chosen = without.which(model.embedding(x), {})
    assert (chosen[:, :made.every - 1] == 0).all()  # before the first look
    assert (chosen[domain == 0, 8:] == 0).float().mean() > 0.8
    assert (chosen[domain == 1, 8:] == 2).float().mean() > 0.8


def test_arch_spreads_a_fraction_over_positions(prompt_arch):
    model, made = prompt_arch[0], copy.deepcopy(prompt_arch[1])
    made.k[:], made.shift[BIG] = 1, 0.25
    route = router.choose(model, made, prompt_batch(13)[0])[0]
    assert (route == BIG).sum(-1).float().mean(1).tolist() == pytest.approx([1.25] * 16, abs=0.04)
    assert set((route == BIG).sum(-1).flatten().tolist()) == {1, 2}


def test_arch_has_room_for_so_many(prompt_arch):
    model, made = prompt_arch[0], copy.deepcopy(prompt_arch[1])
    for _ in range(zoo.MOST - 3):
        made.add_policy(model, prompt_batch(1)[0], torch.arange(3.0), 1.0)
    with pytest.raises(UserError, match="no room"):
        made.add_policy(model, prompt_batch(1)[0], torch.arange(3.0), 1.0)


# GLIDER: the domain is in the prompt, not in the token

def test_glider_needs_both_scores(tmp_path):
    model = prompt_model()
    made = learned("glider", model, prompt_batch, 1.0, tmp_path)
    assert made.profile[:2].tolist() == [[1, -1, -1], [-1, 1, -1]]
    right = {}
    for s in (0.0, 5.0):
        made.s.fill_(s)
        router.calibrate(model, made, prompt_batch(10 ** 6, n=64)[0], (1.0, None))
        right[s] = on_the_domains_layer(model, made, (0, 1), common=True)
    assert right[5.0] > 0.9 and right[0.0] < 0.6, right
    # s = 0 is the linear router, trained on the same text from the same start
    made.s.fill_(0)
    linear = learned("linear", model, prompt_batch, 1.0, tmp_path)
    for key, value in linear.state_dict().items():
        if key != "shift":
            torch.testing.assert_close(made.state_dict()[key], value)
    # and without its centre the cosines say little
    x, _, domain = prompt_batch(10 ** 6, n=64)

    def spread():
        cosines = made.cosines(model.embedding(x), {})[:, -1, :2]
        return (cosines[:, 0] - cosines[:, 1]).abs().mean()
    centered = spread()
    made.centre.zero_()
    assert centered > 3 * spread()


def test_glider_compiles_as_the_linear_router_does():
    model, made = prompt_model(), router.new_router(prompt_model().config, LEARN, "glider", (1, None))
    x, y, _ = prompt_batch(1)
    tau, alpha = torch.tensor(1.0), torch.tensor(3.0)
    fast = torch.compile(gates.mixed_loss, backend=lambda graph, inputs: graph.forward, fullgraph=True, dynamic=False)
    losses = [mixed(model, made, False, x, y, None, tau, alpha, {BIG: torch.tensor(0.3)})[0]
              for mixed in (gates.mixed_loss, fast)]
    torch.testing.assert_close(*losses)


# What effects_prompt.py measures of the three, on a run of its own: a folder of texts is one domain

@pytest.fixture(scope="module")
def prompt_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects")
    write_texts(folder / "texts", n=200)
    train.main([f"--{key}={value}" for key, value in TINY.items()] + [
        f"--corpus={folder / 'texts'}", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"])
    flags = ["--preset=debug", "--device=cpu", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "EXTRA_MB", 0.3)
        user_error(lambda: effects.main([*flags, "--name=glider"]), "no glider router", "router.py --name=glider")
        router.main([*flags, "--name=linear,tryage,arch,glider", "--budget=1,2"])
        routers = folder / "run" / "routers"
        (routers / "glider_k2_s9.pt").write_bytes(b"one that still learns: no .npz, and no concern of effects.py")
        effects.main([*flags, "--name=tryage,arch,glider"])
    return {line["system"]: line for line in json.loads((folder / "run" / "zoo.json").read_text())}


def test_effects_of_prompt_routers(prompt_run):
    for name in PROMPT:
        line = prompt_run[name]
        assert line["ci"][0] <= line["effect"] <= line["ci"][1] and line["verdict"] in ("holds", "fails", "undecided")
        assert line["seeds"] == [1] and line["sequences"] > 1
    tryage, arch, glider = (prompt_run[name]["detail"] for name in PROMPT)
    assert [row["k"] for row in tryage["budgets"]] == [1, 2]
    assert prompt_run["tryage"]["effect"] == pytest.approx(
        sum(row["linear"] - row["tryage"] for row in tryage["budgets"]) / 2, abs=2e-3)
    losses = [tryage["known"][key] for key in ("loss_oracle_in_library", "loss_best_pattern")]
    assert losses[0] <= losses[1]
    price = [row[0] for row in tryage["curve_price_budget_loss"]]
    assert price == sorted(price, reverse=True)  # the dearer, the fewer BIG
    assert arch["domains"] == ["text", "cpp"] and arch["chance"] == 0.5
    assert arch["before"][1] == arch["softmax"][1] == 0  # neither knows cpp
    assert prompt_run["arch"]["effect"] == pytest.approx(arch["after"][1] - 0.5, abs=1e-3)
    assert len(glider["held_in"]) == len(glider["held_out"]) == len(glider["s"])
    assert glider["cosines"][0] == [0]  # of one domain: it is its own centre
    assert glider["gains_held_in"][0][0] == pytest.approx(glider["held_in"][0] - glider["held_in"][1], abs=5e-3)
