"""zoo.py: each system solves the problem its idea is for; causal choices; decodes as it reads; meets its budget."""
import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHAPE, user_error
from test_router import DEBUG, TINY, planted_model
from test_train import write_texts
from torch.utils.flop_counter import FlopCounterMode

import diagnosis
import effects
import gates
import oracle
import router
import train
import zoo
from model import BIG, SMALL, DuoConfig, KVCache

L, T, B = SHAPE.n_layer, SHAPE.block_size, 4


@pytest.fixture
def idx():
    return torch.randint(SHAPE.vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


def random_system(name, choices="sb", budget=1.5):
    """A system whose choices depend on what it reads: weights that are not zero."""
    made = router.new_router(SHAPE, dataclasses.replace(DEBUG, choices=choices), name, (budget, None))
    made.w_out.data = torch.randn(made.w_out.shape, generator=torch.Generator().manual_seed(3))
    return made


def route_of(model, made, idx):
    return model(idx, made, return_stats=True)[2]["route"]


def learn(model, name, batch, budget, folder, **flags):
    """Train and calibrate on a planted problem -> route, loss on other text of it, its targets."""
    config = dataclasses.replace(DEBUG, **{"steps": 80, "hidden": 16, "learning_rate": 0.03,
                                           "save_interval": 1000} | flags)
    made = router.train_router(model, config, name, budget, batch, folder / f"{name}.pt", "hash")
    router.calibrate(model, made, batch(10 ** 6, n=64)[0], budget)
    idx, targets, _ = batch(10 ** 6 + 1, n=64)
    route, losses = router.choose(model, made, idx, targets)
    return route, losses.mean().item(), targets


every_kind = pytest.mark.parametrize("name", ["rmoe", "rmoe_np", "rmoe_detach", "token_id", "capacity"])


# ---------------------------------------------------------------------------------------------------------------------
# all systems: causal, the same while decoding, within budget

@every_kind
def test_choices_are_causal(model, idx, name):
    made = random_system(name, "xsb")
    route, changed = route_of(model, made, idx), 0
    for t in range(1, T):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 7) % SHAPE.vocab_size
        got = route_of(model, made, other)
        assert got[:, :t].equal(route[:, :t])
        changed += (got[:, t:] != route[:, t:]).sum().item()
    assert changed > 0


@every_kind
def test_token_by_token_equals_whole_sequence(model, idx, name):
    made = random_system(name, budget=0.8)  # few enough for the capacity router's places to run out
    logits, _, whole = model(idx, made, return_stats=True)
    for cut in ([1] * T, [5, 1, 1, T - 7]):
        cache, routes, parts = KVCache(SHAPE, B, idx.device, torch.float32), [], []
        for piece in idx.split(cut, 1):
            out, _, stats = model(piece, made, cache=cache, return_stats=True)
            routes.append(stats["route"])
            parts.append(out)
        assert torch.cat(routes, 1).equal(whole["route"])
        torch.testing.assert_close(torch.cat(parts, 1), logits)


@every_kind
@pytest.mark.parametrize("choices, budget", [("sb", 0.7), ("sb", 2.0), ("xb", 1.5), ("xsb", 1.0)])
def test_calibration_meets_the_budget(model, name, choices, budget):
    made = random_system(name, choices, budget)
    text = torch.randint(SHAPE.vocab_size, (256, T), generator=torch.Generator().manual_seed(9))
    assert abs(router.calibrate(model, made, text, (budget, None))["big"] - budget) <= 0.05


@every_kind
def test_more_big_with_a_higher_shift(model, idx, name):
    made, counts = random_system(name), []
    for shift in (-99.0, -2.0, -1.0, 0.0, 1.0, 2.0, 99.0):
        made.shift[BIG] = shift
        counts.append((route_of(model, made, idx) == BIG).sum().item())
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[3] < counts[-1]


@every_kind
def test_gradients_reach_all_that_learns_and_only_that(model, idx, name):
    made = random_system(name)
    loss, _ = made.step_loss(model, DEBUG, (1, None), idx, idx.roll(-1, 1), torch.zeros(B), 0)
    loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    silent = {key for key, weight in made.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0}
    # without a state to read V stands idle; beyond that only what the plain linear router does not have
    assert silent == ({"w_s"} if name == "rmoe_np" else set())
    grouped = [weight for group in made.groups(0.1) for weight in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, made.parameters()))


@every_kind
def test_flops(model, name):
    made = random_system(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        state, seq = None, {"idx": torch.zeros(B, T, dtype=torch.long)}
        for layer in range(L):
            _, state = made(layer, torch.randn(B, T, SHAPE.n_embd), state, seq)
    assert made.flops() * B * T == counter.get_total_flops()


@every_kind
def test_bfloat16_activations(idx, name):
    """What a GPU gives a router: it computes in float32 all the same."""
    made, h = random_system(name), torch.randn(B, T, SHAPE.n_embd).bfloat16()
    logits = [made(layer, h, None, {"idx": idx})[0] for layer in range(L)]
    assert all(z.dtype == torch.float32 for z in logits)


@every_kind
def test_one_graph(model, idx, name):
    """On a GPU the mixed forward is compiled: no part of it may fall back to python, and all values stay."""
    made, values = random_system(name), (torch.tensor(0.5), torch.tensor(3.0), {BIG: torch.tensor(0.3)})
    noise = None if made.learns == "linear" else gates.gumbel_noise(B, T, L, torch.Generator().manual_seed(1))
    losses = []
    for loss in (gates.mixed_loss, torch.compile(gates.mixed_loss, dynamic=False, fullgraph=True, backend="eager")):
        losses.append(loss(model, made, False, idx, idx.roll(-1, 1), noise, *values)[0])
    torch.testing.assert_close(*losses)


# ---------------------------------------------------------------------------------------------------------------------
# RMoE

@pytest.mark.parametrize("shape, hidden", [(DuoConfig(), 64), (DuoConfig(n_embd=64, n_head=2), 32)])
def test_rmoe_has_the_parameters_of_the_mlp(shape, hidden):
    """At both presets' sizes: equal among the three, and as near to the MLP's as a whole p can be, within 2%."""
    def count(name):
        made = router.new_router(shape, dataclasses.replace(DEBUG, hidden=hidden), name, (4, None))
        return sum(w.numel() for w in made.parameters())
    wanted, p = count("mlp"), zoo.matched_width(shape, hidden)
    assert count("rmoe") == count("rmoe_np") == count("rmoe_detach") == pytest.approx(wanted, rel=0.02)
    miss = abs(count("rmoe") - wanted)
    with pytest.MonkeyPatch.context() as patch:
        for other in (p - 1, p + 1):
            patch.setattr(zoo, "matched_width", lambda *_: other)
            assert abs(count("rmoe") - wanted) > miss


def test_rmoe_against_torchs_gru(idx):
    """torch's cell orders its rows r, z, n too; its second bias, which ours lacks, is 0 here."""
    made = random_system("rmoe")
    p = made.w_x.shape[0]
    made.b_gru.data = torch.randn(3 * p, generator=torch.Generator().manual_seed(4))
    cell = torch.nn.GRUCell(p, p)
    cell.weight_ih.data, cell.weight_hh.data = made.w_x.data.T, made.w_s.data.T
    cell.bias_ih.data, cell.bias_hh.data = made.b_gru.data, torch.zeros(3 * p)
    state, expected = None, torch.zeros(B * T, p)
    for layer in range(L):
        h = torch.randn(B, T, SHAPE.n_embd, generator=torch.Generator().manual_seed(layer))
        logits, state = made(layer, h, state)
        x = torch.nn.functional.rms_norm(h, h.shape[-1:], eps=1e-5) @ made.w_in[layer] + made.b_in[layer]
        expected = cell(x.flatten(0, 1), expected)
        torch.testing.assert_close(state.flatten(0, 1), expected)
        torch.testing.assert_close(logits[..., [SMALL, BIG]].flatten(0, 1),
                                   (expected @ made.w_out[layer] + made.b_out[layer])[:, [SMALL, BIG]])


@pytest.mark.parametrize("name, state, gradient", [("rmoe", True, True), ("rmoe_detach", True, False),
                                                   ("rmoe_np", False, False)])
def test_what_is_handed_up(name, state, gradient):
    """Layer 1's logits depend on layer 0's input where the state is passed, and teach layer 0 unless it is detached."""
    made, rng = random_system(name), torch.Generator().manual_seed(5)
    first, other, second = torch.randn(3, 1, 1, SHAPE.n_embd, generator=rng)
    logits = [made(1, second, made(0, h)[1])[0][..., BIG] for h in (first.unsqueeze(0), other.unsqueeze(0))]
    assert (logits[0] != logits[1]).item() == state
    logits[0].backward()
    assert (made.w_in.grad[0].abs().max() > 0).item() == gradient


def erasing_model():
    """The planted model of test_router.py, but for two things: a flagged token and its twin differ in the sign of the
    flag alone, and layer 0 erases it, whichever FFN runs. So the layers above, which should act on it, cannot see it.
    """
    model = planted_model()
    with torch.no_grad():
        table = model.embedding.weight
        table[2:22, 4:] = 0.3 * table[2:22, 4:].sign()  # all of one length, so that RMSNorm divides all alike
        table[22:] = table[2:22]
        table[2:22, 1], table[22:, 1] = -1, 1
        scale = table[2].square().mean().add(1e-5).rsqrt()  # what RMSNorm multiplies by
        for ffn in (model.blocks[0].small, model.blocks[0].big):
            ffn.down.weight.zero_()
            gate, up = ffn.gate_up.weight.chunk(2)
            up.zero_()
            up[:, 1] = 1  # gate reads the constant, up the flag f: silu(scale) * scale f, in each inner unit
            ffn.down.weight[1] = -1 / (torch.nn.functional.silu(scale) * scale) / gate.shape[0]
    return model


def erasing_batch(step, n=16, T=16):
    rng = torch.Generator().manual_seed(step)
    flag = torch.rand(n, T, generator=rng).argsort(1) < 6
    return torch.randint(2, 22, (n, T), generator=rng) + 20 * flag, flag.long(), torch.zeros(n, dtype=torch.int64)


def test_layer_0_erases():
    model, seen = erasing_model(), []

    def look(layer, h, state, seq):
        seen.append(h)
        return torch.tensor([0.0, 1.0, 0.0]).expand(*h.shape[:2], 3), state
    idx = torch.arange(2, 22).unsqueeze(1)
    for tokens in (idx, idx + 20):
        model(tokens, look)
    assert (seen[0] - seen[3]).abs().max() > 1
    torch.testing.assert_close(seen[1], seen[4], atol=1e-5, rtol=0)


def test_only_a_state_carries_what_is_erased(tmp_path):
    model, budget = erasing_model(), (2 * 6 / 16, None)
    losses = {}
    for name in ("linear", "mlp", "rmoe_np", "rmoe"):
        route, losses[name], targets = learn(model, name, erasing_batch, budget, tmp_path)
        right = (route[..., 1:] == torch.where(targets == 1, BIG, SMALL).unsqueeze(-1)).float().mean().item()
        assert right > 0.95 if name == "rmoe" else right < 0.7
    assert losses["rmoe"] < min(losses[name] for name in ("linear", "mlp", "rmoe_np")) - 0.1


# ---------------------------------------------------------------------------------------------------------------------
# OpenMoE: the table, the places, the diagnosis

def parity_model():
    """The planted model, its flag the parity of two signs in the embedding: no linear function of it tells."""
    model = planted_model()
    with torch.no_grad():
        table, rng = model.embedding.weight, torch.Generator().manual_seed(3)
        first, flag = torch.randint(2, (40,), generator=rng) * 2 - 1, torch.arange(40) // 20 * 2 - 1
        table[2:, 1] = first
        table[2:, 4:] = 0  # nothing else by which an id could be told
        table[2:, 4] = first * flag
    return model


def test_only_the_table_knows_each_token(tmp_path):
    budget = (3 * 6 / 16, None)
    for name, solves in (("linear", False), ("token_id", True)):
        route, _, targets = learn(parity_model(), name, erasing_batch, budget, tmp_path)
        right = (route == torch.where(targets == 1, BIG, SMALL).unsqueeze(-1)).float().mean().item()
        assert right > 0.97 if solves else right < 0.75


def test_the_table_reads_nothing_but_the_id(model, idx):
    """The same token has the same route wherever it stands."""
    route = route_of(model, random_system("token_id"), idx)
    for token in idx.unique():
        assert len(route[idx == token].unique(dim=0)) == 1


def by_hand(made, wants):
    """wants [B, T] of one layer -> choices, by a loop over the queue, C new places for each span."""
    route = torch.full(wants.shape, SMALL)
    for b in range(len(wants)):
        for t in range(wants.shape[1]):
            if t % made.span == 0:
                left = made.places
            if wants[b, t] and left > 0:
                route[b, t], left = BIG, left - 1
    return route


@pytest.mark.parametrize("cut", [[40], [1] * 40, [7, 1, 9, 12, 11]])
def test_places_are_filled_in_order(cut):
    """Also beyond one context, whole, token by token, and in pieces that straddle its end."""
    made, rng = random_system("capacity", budget=0.8), torch.Generator().manual_seed(6)
    assert made.places == 4  # ceil(1.25 * 0.8 / 3 * 12)
    h, idx = torch.randn(B, sum(cut), SHAPE.n_embd, generator=rng), torch.zeros(B, sum(cut), dtype=torch.long)
    for layer in range(L):
        seq, done, choices = {}, 0, []
        for n in cut:
            for part in h[:, done:done + n].split(T, 1):  # the model never reads more than a context at once
                done += part.shape[1]
                seq["idx"] = idx[:, :done]
                choices.append(made(layer, part, None, seq)[0].argmax(-1))
        wants = made.wants(layer, h).argmax(-1) == BIG
        got = torch.cat(choices, 1)
        assert got.equal(by_hand(made, wants))
        assert (got != BIG)[wants].any()  # the limit was felt


def test_no_sequence_exceeds_the_places(model, idx):
    made = random_system("capacity", budget=0.8)
    made.shift[BIG] = 100.0  # all want it
    route = route_of(model, made, idx)
    assert ((route == BIG).sum(1) == made.places).all()
    assert (route[:, :made.places] == BIG).all()


def test_information_by_hand():
    """Half of the tokens have id 0 and take BIG; of id 1 half do, and half of id 2: H(c) = H(3/4), I = H - ln 2 / 2."""
    counts = np.array([[0, 0, 8], [0, 2, 2], [0, 2, 2]])
    information, h = diagnosis.mutual_information(counts)
    assert h == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75))
    assert information == pytest.approx(h - np.log(2) / 2)


def test_the_diagnosis_finds_what_is_planted():
    """Layer 0 follows the id, layer 1 the domain, layer 2 the position, layer 3 nothing, layer 4 is always BIG."""
    rng = np.random.default_rng(1)
    idx, domain = rng.integers(0, 300, (64, 32)), np.arange(2).repeat(32)
    routes = np.full((64, 32, 5), BIG)
    routes[..., 0] = np.where(rng.integers(0, 2, 300)[idx], BIG, SMALL)
    routes[..., 1] = np.where(domain == 1, BIG, SMALL)[:, None]
    routes[..., 2] = np.where(np.arange(32) < 10, BIG, SMALL)
    routes[..., 3] = rng.integers(1, 3, (64, 32))
    found = diagnosis.dependence(routes, idx, domain, 300)
    for planted, (variable, part) in enumerate(found.items()):
        (whole, low, high), layers = diagnosis.share(part["saved"], part["needed"])
        assert low < whole < high or whole == pytest.approx(low) == pytest.approx(high)
        assert np.isnan(layers[4]) and np.isnan(part["information"][4])
        assert part["information"][planted] == pytest.approx(1)
        for layer in range(4):
            if layer == planted:
                assert layers[layer] > 0.6
            else:  # as counted, 300 ids seem to tell something; held out they do not
                assert layers[layer] < 0.01
                assert part["information"][layer] == pytest.approx(part["shuffled"][layer], abs=0.04)
        if variable == "token id":
            assert part["information"][3] > 0.05


def test_layers_that_copy_each_other():
    """Two layers alike, a third by itself: known mutual information, and the spread that copying gives."""
    rng = np.random.default_rng(2)
    first, third = rng.integers(1, 3, (2, 50, 400))
    routes = np.stack((first, first, third), -1)
    p = diagnosis.pairs(routes).mean(0)
    mutual = diagnosis.cross_layer(p)
    assert mutual[0, 1] == pytest.approx(np.log(2), abs=1e-3)
    assert mutual[0, 2] == pytest.approx(0, abs=1e-3)
    assert diagnosis.mean_cross_layer(p) == pytest.approx(np.log(2) / 3, abs=1e-3)
    n_big = (routes == BIG).sum(-1)
    mixed, independent = diagnosis.spread(p)
    assert mixed == pytest.approx(n_big.std(), abs=1e-6)
    assert independent == pytest.approx(np.sqrt(3 / 4), abs=1e-2)


def test_agreement_and_chance():
    rng = np.random.default_rng(3)
    final, other = np.where(rng.random((2, 50, 100, 2)) < [0.3, 0.9], BIG, SMALL)
    assert diagnosis.agreement(final, final)[0] == 1
    same, chance = diagnosis.agreement(other, final)
    assert same == pytest.approx(chance, abs=0.02)
    assert chance == pytest.approx((0.3 ** 2 + 0.7 ** 2 + 0.9 ** 2 + 0.1 ** 2) / 2, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# effects.py: RMoE and OpenMoE on a run of their own

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """-> a run of ten steps with the oracle's files, and all routers that the two effects read, at k = 1 and 2"""
    folder = tmp_path_factory.mktemp("effects")
    write_texts(folder / "texts", n=200)
    flags = ["--device=cpu", f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'run'}"]
    train.main([f"--{key}={value}" for key, value in (TINY | {"corpus": folder / "texts"}).items()] + flags)
    flags.append("--preset=debug")
    oracle.main(flags)
    router.main([*flags, "--name=linear,token_id,capacity,mlp,rmoe,rmoe_np", "--budget=1,2", "--tokens=128"])
    return folder / "run", flags + ["--tokens=128"]


def finding_of(run, system):
    return next(line for line in json.loads((run / "zoo.json").read_text()) if line["system"] == system)


def test_the_effect_of_rmoe(finished):
    """Against the numbers that router.py reports: (rmoe - fixed) - (rmoe_np - fixed), the mean over both budgets."""
    run, flags = finished
    effects.main([*flags, "--name=rmoe"])
    found, rows = finding_of(run, "rmoe"), json.loads((run / "routers.json").read_text())
    minus = {(row["name"], row["budget"]): row["versus"]["fixed"][0] for row in rows}
    gains = [minus["rmoe_np", k] - minus["rmoe", k] for k in (1, 2)]
    assert found["effect"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert found["ci"][0] <= found["effect"] <= found["ci"][1]
    detail = found["detail"]
    assert detail["kinds"] == ["linear", "mlp", "rmoe_np", "rmoe"] and detail["budgets"] == [1, 2]
    for name in detail["kinds"]:
        np.testing.assert_allclose([row[0] for row in detail["minus_fixed"][name]], [minus[name, k] for k in (1, 2)],
                                   rtol=1e-3, atol=1e-6)
        arrays = dict(np.load(run / "routers" / f"{name}_k1_s1.npz"))
        n_big = (arrays["routes"] == BIG).sum(-1)
        assert detail["spread"][name][0][0] == pytest.approx(n_big.std(), rel=1e-3, abs=1e-6)
        np.testing.assert_allclose(detail["big_per_token"][name], np.bincount(n_big.ravel(), minlength=4) / n_big.size,
                                   rtol=1e-3)


def test_the_effect_of_openmoe(finished, monkeypatch):
    run, flags = finished
    text = np.random.default_rng(1).integers(0, 256, 3000).astype(np.uint16)
    monkeypatch.setattr(effects.data, "extra_domain", lambda *_: (text, text, "random"))
    effects.main([*flags, "--name=openmoe"])
    detail = finding_of(run, "openmoe")["detail"]
    assert set(detail["choices_told_by"]) == {"linear", "token_id", "capacity", "mlp", "rmoe", "rmoe_np", "oracle"}
    # the table's choices are told by the id alone: as counted, all of them
    counted = [share for share in detail["choices_told_by"]["token_id"]["token id"]["information"] if share is not None]
    np.testing.assert_allclose(counted, 1)
    assert detail["early"]["agreement"][-1] == detail["early"]["of_the_way"][-1] == 1
    row = next(row for row in json.loads((run / "routers.json").read_text())
               if (row["name"], row["budget"]) == ("linear", 1))  # there is one domain
    assert detail["table"]["linear"]["gain"][0] == pytest.approx(-row["versus"]["fixed"][0], rel=1e-3, abs=1e-6)
    a, b = (np.load(run / "routers" / f"{name}_k1_s1.npz")["losses"] for name in ("capacity", "linear"))
    np.testing.assert_allclose([part[0] for part in detail["drop"]["loss_minus_linear"]],
                               (a - b).reshape(len(a), 8, 2).mean((0, 2)), rtol=1e-3, atol=1e-6)


def test_training_again_ends_where_it_ended(finished):
    """early_learning's last moment is the run's own router: same text, same seeds, same calibration."""
    run, flags = finished
    config = effects.parse_config(effects.EffectsConfig, flags, effects.PRESETS)
    r, _, windows = router.start(config)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "agreement", lambda routes, final: seen.append(final) or (1.0, 0.5))
        effects.early_learning(r, windows, config, 1.0, 1)
    assert np.array_equal(seen[-1], np.load(run / "routers" / "linear_k1_s1.npz")["routes"])


def test_missing_routers_are_named(finished, tmp_path):
    run, flags = finished
    (tmp_path / "routers").mkdir()
    for file in ("ckpt.pt", "config.json", "tokenizer.json"):
        os.link(run / file, tmp_path / file)
    flags = [flag for flag in flags if "out_dir" not in flag] + [f"--out_dir={tmp_path}"]
    user_error(lambda: effects.main([*flags, "--name=rmoe"]), "rmoe_np", "python router.py --name=rmoe,rmoe_np")
    user_error(lambda: effects.main([*flags, "--name=openmoe"]), "python router.py --name=linear,token_id,capacity")
    for name in ("rmoe", "rmoe_np"):
        os.link(run / "routers" / f"{name}_k1_s1.npz", tmp_path / "routers" / f"{name}_k1_s1.npz")
    user_error(lambda: effects.main([*flags, "--name=rmoe"]), "patterns", "python oracle.py")


def test_effects_refuse_what_cannot_work(tmp_path):
    (tmp_path / "zoo.json").write_text("[{")
    user_error(lambda: effects.read(tmp_path / "zoo.json"), "zoo.json", "damaged")
    assert effects.read(tmp_path / "none.json") == []
    user_error(lambda: effects.main(["--tokens=-5"]), "--tokens=-5")
    user_error(lambda: effects.main(["--name=rmoe, glidr"]), "--name=glidr", "rmoe")


def test_all_leaves_out_what_cannot_learn_here(capsys):
    """--name=all --choices=xsb: systems of two choices say so in a line, the others train."""
    config, run = dataclasses.replace(DEBUG, choices="xsb"), SimpleNamespace(shape=SHAPE, domains=["a", "b"])
    kept = {name for name in zoo.KINDS if router.can_learn(run, config, name, (1, None), left_out=True)}
    assert {"rmoe", "token_id", "capacity", "glider", "rewire"} <= kept and not {"tryage", "arch", "lora_mixer"} & kept
    assert "tryage: left out. --choices=xsb" in capsys.readouterr().out
