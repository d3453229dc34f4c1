"""oracle.py: its files against plain forwards, which share no code with search.py; the controls on models whose answer
is known; what an interruption may not lose; what bad input leads to."""
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import user_error
from test_data import source_file
from tqdm import tqdm

import common
import data
import oracle
import train
from common import load_checkpoint, load_run, parse_config, save_checkpoint
from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT

SCRIPT = Path(oracle.__file__).resolve()
L, T = 4, 16
TINY = {"preset": "debug", "device": "cpu", "corpus": "python", "corpus_mb": 0, "vocab_size": 300, "n_layer": L,
        "n_embd": 16, "block_size": T, "p_skip": 0.25, "skip_every": 2, "learning_rate": 0.02, "max_steps": 60,
        "batch_size": 16, "eval_interval": 60, "save_interval": 60, "eval_sequences": 4}
LETTERS = {"x": SKIP, "s": SMALL, "b": BIG}
FIELDS = {"idx", "targets", "domain", "domains", "labels", "budgets", "routes", "losses", "usage", "context", "choices",
          "search", "criterion", "checkpoint", "signature", "notes"}
NOTES = {"command", "job", "seed", "width", "completion", "reference", "device", "torch", "processes", "seconds",
         "flops_per_token", "agreement_with_float32", "largest_difference_from_forward", "peak_memory_gb"}


def close(a, b, atol=2e-5):
    """Losses of routes differ by tenths here, rounding is near 1e-6."""
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def command_line(options):
    return [f"--{key}={value}" for key, value in options.items()]


def quiet(main, options):
    """-> what main prints"""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(command_line(options)) in (None, 0)
    return out.getvalue()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """-> a folder with a python corpus of 120 made-up files (in data/; prepared once, then found there), a run and a
    reference trained on it, and that corpus's data_dir."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "sources").mkdir()
    for i in range(120):
        (folder / "sources" / f"m{i}.py").write_text(source_file(i))
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(data, "python_files", lambda: sorted((folder / "sources").glob("*.py")))
        for name, options in (("run", {}), ("reference", {"train_route": "big", "seed": 2})):
            quiet(train.main, TINY | options | {"data_dir": folder / "data", "out_dir": folder / name})
            whole = load_checkpoint(folder / name / "ckpt.pt")
            del whole["optimizer"]  # nothing here reads it; reading takes half as long without
            save_checkpoint(folder / name / "ckpt.pt", whole)
    return folder


def fresh(here, folder, source="run"):
    """A folder with the run's checkpoint and nothing else -> folder"""
    folder.mkdir()
    shutil.copy(here / source / "ckpt.pt", folder)
    return folder


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def flags(here, out, **options):
    return {"out_dir": out, "data_dir": here / "data", "device": "cpu", "preset": "debug", "tokens": 32} | options


def file_of(search="exhaustive", context="sequential", choices="sb", criterion="label", budgets="all", **_):
    name = f"oracle/{choices}_{context}_{search}" + (f"_{criterion}" if criterion != "label" else "")
    return name + ("" if "all" in budgets else "_" + budgets.replace("/", "s").replace(",", "+")) + ".npz"


@pytest.fixture
def ask(here, tmp_path):
    """-> a function: run oracle.py for one search of 32 tokens per domain -> the arrays that it wrote"""
    def ask(name="out", **options):
        out = tmp_path / name
        if not out.exists():
            fresh(here, out)
        quiet(oracle.main, flags(here, out, **options))
        return arrays(out / file_of(**options))
    return ask


@pytest.fixture(scope="module")
def plan(here):
    """The debug plan as a user runs it -> its folder, what it printed"""
    out = fresh(here, here / "plan")
    with torch.no_grad():
        return out, quiet(oracle.main, flags(here, out, tokens=64, batch_size=4))


@pytest.fixture
def unwritten(here):
    """-> a function: a Run, for what is called apart from main"""
    def unwritten(out, **options):
        return oracle.Run(parse_config(oracle.OracleConfig, command_line(flags(here, out, **options)), oracle.PRESETS))
    return unwritten


# ---------------------------------------------------------------------------------------------------------------------
# brute force

def slow(folder):
    """The checkpoint's model, on the path that Search.score does not take"""
    model = load_run(folder, "cpu")[0]
    model.execution, model.compute_dtype = "dense", torch.float32
    return model


def log_p(model, idx, history, t, routes):
    """Plain forwards of idx[:, :t+1]: token t runs each of `routes` [R, L], earlier ones their routes in `history`
    [S, T, L] -> log-probabilities [R, S, V] at t"""
    R, S = len(routes), len(idx)
    full = history[None, :, :t + 1].repeat(R, 1, 1, 1)
    full[:, :, t] = routes[:, None]
    logits, _ = model(idx[:, :t + 1].repeat(R, 1), full.flatten(0, 1))
    return logits[:, t].log_softmax(-1).unflatten(0, (R, S))


def loss_on(log_p, y):
    """log-probabilities [R, S, V], labels [S] -> losses [R, S]"""
    return -log_p.gather(-1, y.expand(len(log_p), -1).unsqueeze(-1))[..., 0]


def legal(label, choices, t, n_layer=L):
    """All routes that a budget as given on the command line allows at position t -> [R, L]"""
    big, _, skip = label.replace("any", "").partition("/")
    counts = {}
    if "-" in big:  # a ramp: the straight line from the first position to the last, rounded
        first, last = map(int, big.split("-"))
        counts[BIG] = round(first + (last - first) * t / (T - 1))
    elif big:
        counts[BIG] = int(big)
    if skip:
        counts[SKIP] = int(skip)
    routes = itertools.product([LETTERS[c] for c in choices], repeat=n_layer)
    return torch.tensor([r for r in routes if all(r.count(c) == n for c, n in counts.items())])


def place(chosen, routes):
    """Which of `routes` [R, L] is each of `chosen` [S, L]? It has to be one of them."""
    same = (chosen[:, None] == routes[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def each_position(found, model):
    """-> for all budgets and positions of a search (i, label, t, the legal routes there, their log-probabilities by
    plain forwards [R, S, V], which of them was chosen [S], its reported loss [S])"""
    idx, routes = torch.from_numpy(found["idx"]), torch.from_numpy(found["routes"]).long()
    for i, label in enumerate(found["labels"]):
        history = routes[i] if found["context"] == "sequential" else torch.full_like(routes[i], BIG)
        for t in range(T):
            options = legal(str(label), str(found["choices"]), t, routes.shape[-1])
            yield (i, str(label), t, options, log_p(model, idx, history, t, options), place(routes[i, :, t], options),
                   found["losses"][i, :, t])


def test_brute_force_can_tell_routes_apart(here):
    model = slow(here / "run")
    idx, y = data.eval_windows(data.load(here / "data" / "python_bpe300"), "code", 4, T)
    history = torch.full((4, T, L), BIG)
    losses = torch.stack([loss_on(log_p(model, idx, history, t, legal("any", "xsb", t)), y[:, t]) for t in range(T)])
    gaps = losses.sort(1).values.diff(dim=1)
    assert gaps.median() > 2e-3 and losses.std(1).mean() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# one search

def check_form(found, here, options, lanes, n=2):
    """The file holds the fields, shapes and dtypes that the docstring names."""
    frozen, corpus = options["context"] == "frozen", data.load(here / "data" / "python_bpe300")
    K, S, D = len(lanes), 2 * n, 2
    assert set(found) == FIELDS
    shapes = {"idx": (S, T), "targets": (S, T), "domain": (S,), "domains": (D,), "labels": (K,), "budgets": (K,),
              "routes": (K, S, T, L), "losses": (K, S, T), "usage": (K, D, T, L, 3)}
    assert {name: found[name].shape for name in shapes} == shapes
    kinds = {"idx": "int64", "targets": "int64", "budgets": "int64", "routes": "uint8", "losses": "float32",
             "usage": "float32"}
    assert {name: str(found[name].dtype) for name in kinds} == kinds
    for name, default in (("search", "exhaustive"), ("context", "sequential"), ("choices", "sb"),
                          ("criterion", "label")):
        assert found[name] == options.get(name, default)
    assert list(found["labels"]) == list(lanes) and found["budgets"].tolist() == list(lanes.values())
    assert found["checkpoint"] == oracle.file_hash(here / "run" / "ckpt.pt")
    notes = json.loads(str(found["notes"]))
    assert set(notes) >= NOTES and notes["flops_per_token"] > 0 and notes["job"]["budgets"] == options["budgets"]
    if not frozen:  # the check that is made on every run
        assert 0 <= notes["largest_difference_from_forward"] < 1e-4
    # The text: each domain's evaluation windows.
    assert list(found["domains"]) == corpus.domains == ["code", "prose"]
    for d, name in enumerate(corpus.domains):
        for got, expected in zip((found["idx"], found["targets"]), data.eval_windows(corpus, name, n, T), strict=True):
            assert (got[found["domain"] == d] == expected.numpy()).all()
    # Usage: counted one by one.
    for i, d, t, layer, choice in itertools.product(range(K), range(D), range(T), range(L), range(3)):
        of = found["routes"][i, found["domain"] == d, t, layer]
        assert found["usage"][i, d, t, layer, choice] == np.float32(np.mean([c == choice for c in of]))


def check_losses(found, model, exact):
    """Each reported loss is that of a plain forward; the least one there is, where the search is exact."""
    y, gaps = torch.from_numpy(found["targets"]), []
    for i, _, t, _, brute, chosen, reported in each_position(found, model):
        losses = loss_on(brute, y[:, t])
        close(reported, losses[chosen, torch.arange(len(chosen))])
        gaps.append(reported - losses.min(0).values.numpy())
        if exact(found["labels"][i]):
            close(gaps[-1], 0)
    assert min(gap.min() for gap in gaps) > -1e-4
    return np.stack(gaps)


SEARCHES = [  # flags, and the `budgets` that belong to the labels
    ({"search": "exhaustive", "budgets": "all,3-1"}, {"any": -1, "0": 0, "1": 1, "2": 2, "3": 3, "4": 4, "3-1": -2}),
    ({"search": "exhaustive", "choices": "xsb", "budgets": "any,/1,1/2,2-1/1"},
     {"any": -1, "/1": -1, "1/2": 1, "2-1/1": -2}),
    ({"search": "exhaustive", "choices": "xb", "budgets": "2,/2"}, {"2": 2, "/2": -1}),
    ({"search": "dp", "choices": "xsb", "budgets": "/2,1/1", "width": 99, "completion": "big"},
     {"/2": -1, "1/1": 1}),
    ({"search": "dp", "budgets": "2,1-3", "width": 1, "completion": "small"}, {"2": 2, "1-3": -2}),
    ({"search": "greedy", "choices": "xb", "budgets": "any,1,4-0"}, {"any": -1, "1": 1, "4-0": -2}),
    ({"search": "exhaustive", "context": "frozen", "choices": "xsb", "budgets": "any,2,/1,1/2"},
     {"any": -1, "2": 2, "/1": -1, "1/2": 1}),
    ({"search": "dp", "context": "frozen", "choices": "xsb", "budgets": "2,/1", "width": 99, "completion": "early"},
     {"2": 2, "/1": -1}),
    ({"search": "greedy", "context": "frozen", "budgets": "all"},
     {"any": -1, "0": 0, "1": 1, "2": 2, "3": 3, "4": 4}),
]


@pytest.mark.parametrize("options, lanes", SEARCHES)
def test_search_equals_plain_forwards(options, lanes, ask, here):
    options = {"context": "sequential"} | options
    found, model = ask(**options), slow(here / "run")
    check_form(found, here, options, lanes)
    exact = {"exhaustive": lambda _: True, "dp": lambda _: options["width"] == 99,
             "greedy": lambda label: label in ("0", "1", "4")}[options["search"]]
    gaps = check_losses(found, model, exact)
    if options["search"] == "greedy":
        assert gaps.max() < 1.0  # far better than nothing: routes differ by more
    if options["context"] == "sequential":  # the whole text at once, not position by position
        idx, y = torch.from_numpy(found["idx"]), torch.from_numpy(found["targets"])
        for routes, losses in zip(found["routes"], found["losses"], strict=True):
            close(losses, model(idx, torch.from_numpy(routes).long(), y, reduction="none")[1])


def test_ramp_by_hand(ask):
    found = ask(budgets="3-1")
    big = (found["routes"][0] == BIG).sum(-1)
    assert big[0].tolist() == [3] * 4 + [2] * 8 + [1] * 4  # 3 - 2 t / 15, rounded: 2.6 at t = 3, 2.47 at 4
    assert (big == big[0]).all()


@pytest.mark.parametrize("tokens, sequences", [(1, 1), (16, 1), (17, 2), (33, 3)])
def test_tokens_are_rounded_up_to_sequences(tokens, sequences, ask):
    found = ask(tokens=tokens, budgets="0")
    assert found["idx"].shape == (2 * sequences, T)


def test_one_domain(ask):
    both, prose = ask("both", budgets="1"), ask(budgets="1", domain="prose")
    assert list(prose["domains"]) == ["prose"] and prose["domain"].tolist() == [0, 0]
    assert (prose["routes"] == both["routes"][:, 2:]).all()
    close(prose["losses"], both["losses"][:, 2:])
    assert prose["usage"].shape == (1, 1, T, L, 3)


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_batches_do_not_matter(context, ask):
    a, b = (ask(f"batch{n}", context=context, budgets="2", batch_size=n) for n in (1, 3))
    assert (a["routes"] == b["routes"]).mean() > 0.99  # but for ties within rounding
    close(a["losses"], b["losses"], atol=1e-5)


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_rough_search_is_scored_again(context, ask, here, monkeypatch):
    """As on a GPU: the search runs in bfloat16, what is stored is float32."""
    options = {"context": context, "budgets": "2"}
    whole = ask("whole", **options)
    monkeypatch.setattr(common, "compute_dtype", lambda device: (torch.bfloat16, "for this test"))
    found = ask("rescored", **options)  # all 6 routes are among the best 32
    close(found["losses"], whole["losses"], atol=1e-5)
    assert json.loads(str(found["notes"]))["agreement_with_float32"] == 1
    monkeypatch.setattr(oracle, "RESCORED", 1)  # now bfloat16 alone decides, but does not say how well it did
    found = ask("rough", **options)
    gaps = check_losses(found, slow(here / "run"), lambda _: False)
    assert 1e-4 < gaps.max() < 0.1 and gaps.mean() < 0.01
    assert 0.5 < json.loads(str(found["notes"]))["agreement_with_float32"] <= 1


def test_agreement_counts_sequences(here, unwritten, tmp_path):
    r = unwritten(fresh(here, tmp_path / "out"))
    idx, y, _ = r.windows(64)
    find, budget, past = oracle.Exhaustive(r.exact, (SMALL, BIG), 99), (2, None), torch.zeros(2, L, 8, 2, 0, 8)
    directions = r.directions(idx, y, "label", 0)[:, 0]
    routes = find(oracle.Search(r.exact, idx[:, 0], past, directions), [budget], 1)[budget][0]
    notes = {"agreed": 0, "compared": 0}
    for wrong in (0, 3):
        routes[:wrong] = SKIP  # which no search over two choices finds
        oracle.agreement(r, find, idx[:, 0], past, directions, {budget: routes}, 0, notes)
    assert notes == {"agreed": 8 + 5, "compared": 16}


# ---------------------------------------------------------------------------------------------------------------------
# what a route is chosen by

@pytest.mark.parametrize("options", [
    {"search": "exhaustive", "context": "frozen", "choices": "xsb", "budgets": "any,2"},
    {"search": "exhaustive", "context": "sequential", "budgets": "1,3-1"},
    {"search": "dp", "context": "sequential", "budgets": "2", "width": 99}])
def test_expected_loss_chooses(options, ask, here):
    """The route is the one of least CE(p_ref, p_route); the loss is the label's."""
    found, model = ask(criterion="expected", reference=here / "reference", **options), slow(here / "run")
    idx, y = torch.from_numpy(found["idx"]), torch.from_numpy(found["targets"])
    p = slow(here / "reference")(idx, BIG)[0].softmax(-1)
    hindsight = 0
    for *_, t, _, brute, chosen, reported in each_position(found, model):
        cross_entropy, n = -(p[:, t] * brute).sum(-1), torch.arange(len(idx))  # [R, S]
        close(cross_entropy[chosen, n], cross_entropy.min(0).values)
        losses = loss_on(brute, y[:, t])
        close(reported, losses[chosen, n])
        hindsight += (reported - losses.min(0).values.numpy()).mean()
    assert hindsight / T / len(found["labels"]) > 0.05  # the label would often choose another


def drawn(r, idx, targets):
    """The labels that --criterion=split draws, from the directions that stand for them -> [S, T]"""
    directions, table = r.directions(idx, targets, "split", 0), r.exact.embedding.weight
    assert torch.equal(directions[:, :, 1], table[targets])
    labels = torch.cdist(directions[:, :, 0].flatten(0, 1), table).argmin(1).view(idx.shape)
    assert torch.allclose(table[labels], directions[:, :, 0], atol=1e-6)
    return labels


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_split_label_chooses(context, ask, here, unwritten, tmp_path):
    options = {"criterion": "split", "reference": here / "reference", "context": context, "budgets": "any,2"}
    found, again, other = ask(**options), ask("again", **options), ask("other", seed=2, **options)
    for name in ("routes", "losses"):
        assert (found[name] == again[name]).all()
    assert (found["routes"] != other["routes"]).any(-1).mean() > 0.1  # other labels were drawn
    idx, y = torch.from_numpy(found["idx"]), torch.from_numpy(found["targets"])
    y2 = drawn(unwritten(tmp_path / "out", reference=here / "reference"), idx, y)
    assert (y2 != y).any(1).all()
    for *_, t, _, brute, chosen, reported in each_position(found, slow(here / "run")):
        losses, n = loss_on(brute, y2[:, t]), torch.arange(len(idx))
        close(losses[chosen, n], losses.min(0).values)
        close(reported, loss_on(brute, y[:, t])[chosen, n])


def test_split_labels_follow_the_reference(here, unwritten, tmp_path):
    r = unwritten(fresh(here, tmp_path / "out"), reference=here / "reference")
    idx, y, _ = r.windows(16)
    p = slow(here / "reference")(idx[:1], BIG)[0][0].softmax(-1)  # [T, V]
    n = 512
    labels = drawn(r, idx[:1].repeat(n, 1), y[:1].repeat(n, 1))
    share = torch.stack([(labels == v).float().mean(0) for v in range(p.shape[1])], 1)
    error = (share - p) / (p * (1 - p) / n).sqrt().clamp_min(1 / n)
    assert error.abs().max() < 5 and 0.5 < error[p > 0.02].std() < 1.5  # as chance has it: all draws independent
    assert len({tuple(row) for row in labels.tolist()}) > n / 2


def test_split_labels_do_not_depend_on_batches(here, unwritten, tmp_path):
    r = unwritten(fresh(here, tmp_path / "out"), reference=here / "reference")
    idx, y, _ = r.windows(64)
    one_by_one = torch.cat([r.directions(idx[i:i + 1], y[i:i + 1], "split", i) for i in range(len(idx))])
    assert torch.allclose(one_by_one, r.directions(idx, y, "split", 0))


def apart(here):
    """The run's own weights under another hash -> folder"""
    folder = here / "apart"
    if not folder.exists():
        saved = torch.load(here / "run" / "ckpt.pt", weights_only=True)
        folder.mkdir()
        torch.save(saved | {"another": 1}, folder / "ckpt.pt")
    return folder


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_a_model_that_is_its_own_reference_foresees_all_big(context, ask, here):
    """CE(p, q) is least at q = p, which is what all-BIG predicts."""
    found = ask(criterion="expected", reference=apart(here), context=context, choices="xsb", budgets="any")
    all_big = (found["routes"][0] == BIG).all(-1)
    assert all_big.mean() > 0.95
    idx, y = torch.from_numpy(found["idx"]), torch.from_numpy(found["targets"])
    close(found["losses"][0], slow(here / "run")(idx, BIG, y, reduction="none")[1], atol=1e-2)  # a tie is no other p


# ---------------------------------------------------------------------------------------------------------------------
# models whose answer is known

@pytest.fixture
def known(here, tmp_path, monkeypatch):
    """-> a function: run oracle.py with all three criteria on text that a Markov chain wrote, whose transitions are
    what `reference` predicts; neither model attends to earlier tokens, so a prediction depends on one token alone.
    -> the run's folder, oracle.json, and a function that runs one more search -> its arrays"""
    def known(model, reference, budgets, sequences=64):
        V = model.config.vocab_size
        for name, m in (("out", model), ("truth", reference)):
            for block in m.blocks:
                block.out.weight.zero_()
            (tmp_path / name).mkdir()
            save_checkpoint(tmp_path / name / "ckpt.pt", load_checkpoint(here / "run" / "ckpt.pt") | {
                "model": m.state_dict(), "model_config": dataclasses.asdict(m.config)})
        p = reference(torch.arange(V)[:, None], BIG)[0][:, 0].softmax(-1).double().numpy()
        rng, tokens = np.random.default_rng(1), [0]
        for u in rng.random(2 * sequences * T + 1):
            tokens.append(min(V - 1, int(np.searchsorted(p[tokens[-1]].cumsum(), u))))
        half = sequences * T + 1
        corpus = dataclasses.replace(data.load(here / "data" / "python_bpe300"), domains=["text"], train={
            "text": np.array(tokens[:half], np.uint16)}, val={"text": np.array(tokens[half:2 * half], np.uint16)})
        monkeypatch.setattr(data, "load", lambda folder: corpus)
        n, jobs = sequences * T, []
        for context, tokens, some in (("frozen", n, budgets), ("sequential", n // 2, "2")):
            jobs += [oracle.Job(tokens, context), oracle.Job(tokens, context, budgets=some, criterion="expected"),
                     oracle.Job(tokens, context, budgets=some, criterion="split")]
        monkeypatch.setitem(oracle.PLANS, "debug", ([("frozen", n, n), ("sequential", n // 2, n // 4)], jobs, 0))
        options = flags(here, tmp_path / "out", reference=tmp_path / "truth", tokens=0, batch_size=64)
        quiet(oracle.main, options)

        def one_more(**more):
            quiet(oracle.main, options | {"tokens": n} | more)
            return arrays(tmp_path / "out" / file_of(**more))
        return tmp_path / "out", json.loads((tmp_path / "out" / "oracle.json").read_text()), one_more
    return known


def check_controls(row):
    assert row["gain"][0] == pytest.approx(row["foresight"][0] + row["hindsight"][0], abs=1e-9)
    assert row["gain"][0] == pytest.approx(row["fixed"] - row["label"], abs=1e-5)


def test_noise_is_hindsight(known):
    """Routes that differ by zero-mean noise on the logits: the label's oracle gains, but nothing of it is learnable."""
    g = torch.Generator().manual_seed(1)
    model, truth = (DuoGPT(DuoConfig(L, 2, 16, T, 64, small_width=8, big_width=8)) for _ in "mt")
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=g) / 4)
        if "down" in name:
            p.mul_(0.5)
    model.final_norm.weight.fill_(0.7)
    truth.load_state_dict(model.state_dict())
    for block in truth.blocks:  # the logits without the noise
        block.big.down.weight.zero_()
    _, result, _ = known(model, truth, "1,2,4")
    rows = {row["k"]: row for row in result["controls"]["frozen"]}
    assert list(rows) == [1, 2, 4]
    # One route: nothing to choose, nothing to gain.
    assert max(abs(value) for name in ("gain", "foresight", "learnable") for value in rows[4][name]) < 1e-5
    for row in (rows[1], rows[2], *result["controls"]["sequential"]):
        check_controls(row)
        gain, low, _ = row["gain"]
        assert low > 0.1  # the noise is large
        assert row["learnable"][1] <= 0 and row["learnable"][2] < low / 4
        assert row["foresight"][0] < gain / 4 and row["hindsight"][1] > gain / 2
    (row,) = result["controls"]["sequential"]
    assert row["k"] == 2 and row["sequences"] == 32  # the windows that both searched


def test_planted_route_is_found(known):
    """BIG in layer 2 makes half of the labels (bit 1 of the id) likelier; half of the tokens (bit 0) are followed by
    such ones. All other choices hardly matter. What is chosen by the truth must take BIG there for these tokens and no
    other; what is chosen by the label, for these labels and no other."""
    g, planted = torch.Generator().manual_seed(1), 2
    model, truth = (DuoGPT(DuoConfig(L, 2, 16, T, 64, small_width=4, big_width=8)) for _ in "mt")
    ids = torch.arange(64)
    model.embedding.weight.normal_(std=0.05, generator=g)
    model.embedding.weight[:, 0] = 2.0 * (ids % 2) - 1  # who is helped
    model.embedding.weight[:, 1] = 0.6 * (ids // 2 % 2) - 0.3  # which labels become likelier
    model.embedding.weight[:, 2] = 1.0
    model.final_norm.weight[:3] = torch.tensor([0.0, 2.0, 0.0])  # two of these columns are for the FFNs alone
    for block in model.blocks:
        block.big.gate_up.weight.normal_(std=0.1, generator=g)
        block.big.down.weight.normal_(std=0.02, generator=g)  # enough to break ties
        block.small.down.weight.zero_()
    truth.load_state_dict(model.state_dict())
    for m, column in ((model, 2), (truth, 0)):  # the model's BIG pushes every token, the truth's each its way
        for block in m.blocks if m is truth else [m.blocks[planted]]:
            block.big.gate_up.weight.zero_()
            block.big.down.weight.zero_()
        big = m.blocks[planted].big
        big.gate_up.weight[0, 2], big.gate_up.weight[8, column], big.down.weight[1, 0] = 1.0, 1.0, 0.5
    out, result, one_more = known(model, truth, "1,3", sequences=16)

    def right(criterion, context, **options):
        """-> the share of tokens for which BIG in the planted layer is chosen where it should be, and not elsewhere"""
        if options:
            found = one_more(criterion=criterion, context=context, **options)
        else:
            budgets = "all" if criterion == "label" else "1,3" if context == "frozen" else "2"
            found = arrays(out / file_of(criterion=criterion, context=context, budgets=budgets))
        helped, likelier = found["idx"] % 2, found["targets"] // 2 % 2
        assert found["search"] == options.get("search", "exhaustive") and 0.3 < helped.mean() < 0.7
        assert 0.9 < (helped == likelier).mean() < 1
        some = np.isin(found["labels"], ("1", "2", "3"))  # where there is a choice to be made
        chosen = (found["routes"][some][..., planted] == BIG) == (likelier if criterion == "label" else helped)
        return chosen.mean()

    for context in ("frozen", "sequential"):
        assert right("label", context) == 1
        assert right("expected", context) == 1
        assert right("split", context) > 0.9  # a drawn label is the likely one, mostly
        for search, criterion in itertools.product(("dp", "greedy"), ("label", "expected")):
            if context == "frozen" or criterion == "label":
                width = {"width": 2} if search == "dp" else {}
                assert right(criterion, context, search=search, budgets="3", **width) == 1
    for row in (*result["controls"]["frozen"], *result["controls"]["sequential"]):
        check_controls(row)
        assert row["foresight"][1] > 0.1 and row["learnable"][1] > 0.1
        assert row["foresight"][0] > 0.8 * row["gain"][0]  # hindsight is what little the label says beyond the truth


# ---------------------------------------------------------------------------------------------------------------------
# baselines

def pattern_losses(model, context, patterns, idx, y):
    """Plain forwards of texts [S, T] -> losses [P, S, T] of patterns that all tokens take, or one after all-BIG ones"""
    idx, y, patterns = torch.as_tensor(idx), torch.as_tensor(y), torch.as_tensor(patterns).long()
    if context == "sequential":
        return np.stack([model(idx, pattern, y, reduction="none")[1].numpy() for pattern in patterns])
    history = torch.full((*idx.shape, patterns.shape[1]), BIG)
    return np.stack([loss_on(log_p(model, idx, history, t, patterns), y[:, t]).numpy() for t in range(idx.shape[1])], 2)


@pytest.mark.parametrize("context", ["sequential", "frozen"])
def test_patterns(context, plan, here):
    found, model = arrays(plan[0] / "oracle" / f"patterns_{context}.npz"), slow(here / "run")
    corpus, k_of = data.load(here / "data" / "python_bpe300"), (found["patterns"] == BIG).sum(1)
    assert sorted(map(tuple, found["patterns"])) == list(itertools.product((SMALL, BIG), repeat=L))
    assert found["domain"].tolist() == [0] * 4 + [1] * 4 and list(found["domains"]) == corpus.domains
    shapes = {"patterns": (16, L), "means": (16, 8), "idx": (8, T), "chosen": (2, L + 1), "fixed": (L + 1, 8, T),
              "hundred": (L + 1, 100), "per_token": (L + 1, 8), "curve": (L + 1, 8, 4), "curve_n": (4,)}
    assert {name: found[name].shape for name in shapes} == shapes and found["curve_n"].tolist() == [1, 2, 4, 8]
    choice = []
    for d, name in enumerate(corpus.domains):
        rows, (idx, y) = found["domain"] == d, data.eval_windows(corpus, name, 4, T)
        assert (found["idx"][rows] == idx.numpy()).all()
        losses = pattern_losses(model, context, found["patterns"], idx, y)
        close(found["means"][:, rows], losses.mean(-1))
        # Chosen on training text: four windows, evenly spaced.
        starts = [i * (len(corpus.train[name]) - 1 - T) // 4 for i in range(4)]
        text = np.stack([corpus.train[name][i:i + T + 1] for i in starts]).astype(np.int64)
        training = pattern_losses(model, context, found["patterns"], text[:, :-1], text[:, 1:]).mean((1, 2))
        for k in range(L + 1):
            best = found["chosen"][d, k]
            assert k_of[best] == k and training[best] < training[k_of == k].min() + 1e-5
            close(found["fixed"][k, rows], losses[best])
            ids = found["hundred"][k]
            assert sorted(ids[ids >= 0]) == sorted((k_of == k).nonzero()[0])  # fewer than a hundred: all there are
            close(found["per_token"][k, rows], losses[k_of == k].min(0).mean(-1))
            choice.append(losses[best].mean() - losses[k_of == k].mean((1, 2)).min())
            # The selection curve: the mean of the least loss over all subsets of n patterns.
            for j, n in enumerate((1, 2, 4, 8)):
                subsets = np.array(list(itertools.combinations(range(math.comb(L, k)), min(n, math.comb(L, k)))))
                least = losses[k_of == k].astype(float)[subsets].min(1).mean(0)
                close(found["curve"][k, rows, j], least.mean(-1))
    assert max(choice) > 1e-3, "validation text may have chosen"


def test_oracle_and_baselines_meet(plan):
    """In the frozen context the least loss of all patterns is the oracle's, and at k = 0 and L there is one route."""
    found, patterns = (arrays(plan[0] / "oracle" / f"{name}.npz")
                       for name in ("sb_frozen_exhaustive", "patterns_frozen"))
    assert list(found["labels"]) == ["any", "0", "1", "2", "3", "4"]
    close(patterns["curve"][..., -1], found["losses"][1:].mean(-1))
    close(patterns["fixed"][[0, L]], found["losses"][[1, L + 1]])
    assert (patterns["fixed"][1:L].mean(-1) > found["losses"][2:L + 1].mean(-1) + 0.01).all()
    assert (np.diff(patterns["curve"], axis=-1) < 1e-5).all()


def test_least_of_is_the_chance_over_all_subsets():
    for C in range(1, 8):
        sizes = list(range(1, C + 3))
        weights = oracle.least_of(C, sizes).numpy()
        for n, row in zip(sizes, weights, strict=True):
            subsets = list(itertools.combinations(range(C), min(n, C)))
            least = np.bincount([s[0] for s in subsets], minlength=C)  # of sorted values the first is the least
            np.testing.assert_allclose(row, least / len(subsets), atol=1e-12)
    many = oracle.least_of(531441, [1, 1000, 2 ** 19])  # 3^12 routes, of whose choose() no float holds the value
    np.testing.assert_allclose(many.sum(1), 1, atol=1e-6)


def random_run(here, folder, n_layer, block_size):
    """A run of another shape, not trained -> folder"""
    model = DuoGPT(DuoConfig(n_layer, 2, 8, block_size, 320, big_width=16, small_width=4))
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=g) / 3)
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", load_checkpoint(here / "run" / "ckpt.pt") | {
        "model": model.state_dict(), "model_config": dataclasses.asdict(model.config)})
    return folder


def test_hundred_of_many_patterns(here, unwritten, tmp_path):
    """At 9 layers there are 126 patterns of k = 4."""
    out, hundreds = random_run(here, tmp_path / "out", 9, 4), []
    for seed in (1, 2):
        oracle.run_baselines(unwritten(out, seed=seed), "sequential", 8, 8, tqdm(disable=True))
        found = arrays(out / "oracle" / "patterns_sequential.npz")
        k_of, model = (found["patterns"] == BIG).sum(1), slow(out)
        assert found["hundred"].shape == (10, 100)
        for k, ids in enumerate(found["hundred"]):
            n = min(100, math.comb(9, k))
            assert (ids >= 0).tolist() == [True] * n + [False] * (100 - n)
            assert len(set(ids[:n])) == n and (k_of[ids[:n]] == k).all()
        _, y, _ = unwritten(out).windows(8)
        losses = pattern_losses(model, "sequential", found["patterns"][found["hundred"][4]], found["idx"], y)
        close(found["per_token"][4], losses.min(0).mean(-1))
        hundreds.append(found["hundred"][4])
    assert set(hundreds[0]) != set(hundreds[1])  # drawn by the seed


def test_baselines_of_another_domain_or_seed_are_not_kept(here, tmp_path, monkeypatch):
    monkeypatch.setitem(oracle.PLANS, "debug", ([("sequential", 16, 16)], [], 0))  # the baselines alone
    out, found = fresh(here, tmp_path / "out"), []
    for options in ({"domain": "code"}, {"domain": "prose"}, {"domain": "prose", "seed": 2}):
        quiet(oracle.main, flags(here, out, tokens=16, **options))
        found.append(arrays(out / "oracle" / "patterns_sequential.npz"))
    assert [list(patterns["domains"]) for patterns in found] == [["code"], ["prose"], ["prose"]]
    assert (found[1]["hundred"] != found[2]["hundred"]).any()


# ---------------------------------------------------------------------------------------------------------------------
# interrupted, and run again

@pytest.fixture
def interrupt(monkeypatch):
    """-> a context manager: within it, oracle's function `name` is interrupted when it is called the n-th time; by
    default it never is. -> the list of calls that came to an end"""
    @contextlib.contextmanager
    def interrupt(name, n=None):
        done, real = [], getattr(oracle, name)

        def call(*args, **options):
            if len(done) + 1 == n:
                raise KeyboardInterrupt
            result = real(*args, **options)
            done.append(name)
            return result
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if n else contextlib.nullcontext():
            patch.setattr(oracle, name, call)
            yield done
    return interrupt


def same(a, b):
    """All but the notes, which hold seconds, are bitwise equal."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a if name != "notes")


@pytest.mark.parametrize("options, units", [({"context": "sequential", "budgets": "any,1/0", "tokens": 16}, 4),
                                            ({"context": "frozen", "budgets": "any,2"}, 4)])
def test_resume(options, units, ask, interrupt, tmp_path):
    options |= {"batch_size": 1}
    name, parts = f"run_{options['context']}", tmp_path / "out" / "oracle" / "parts"
    with interrupt(name) as done:
        whole = ask("whole", **options)
    assert len(done) == units  # so many batches and budgets
    with interrupt(name, 3):
        ask(**options)
    assert len(list(parts.iterdir())) == 2 and not (tmp_path / "out" / file_of(**options)).exists()
    with interrupt(name, 2):  # once more, after one other
        ask(**options)
    assert len(list(parts.iterdir())) == 3
    with interrupt(name) as done:
        found = ask(**options)
    assert len(done) == units - 3  # nothing twice
    assert same(found, whole)
    assert list(parts.iterdir()) == []
    assert json.loads(str(found["notes"]))["flops_per_token"] == json.loads(str(whole["notes"]))["flops_per_token"]


def test_resume_with_another_batch_size(ask, interrupt):
    """It is what the message for too little memory tells people to do."""
    options = {"context": "frozen", "budgets": "any,2"}
    whole = ask("whole", batch_size=2, **options)
    with interrupt("run_frozen", 2):
        ask(batch_size=3, **options)
    found = ask(batch_size=2, **options)
    assert found["losses"].shape == whole["losses"].shape
    close(found["losses"], whole["losses"], atol=1e-5)


def test_a_finished_search_is_not_repeated(ask, interrupt, here, tmp_path):
    options = {"budgets": "1", "search": "dp", "context": "frozen"}
    first, path = ask(**options), tmp_path / "out" / file_of(**options)
    content = path.read_bytes()
    for unchanged in ({}, {"batch_size": 1}, {"reference": here / "reference"}, {"seed": 2}):
        with interrupt("run_frozen") as done:
            ask(**options | unchanged)
        assert done == [] and path.read_bytes() == content
    for changed in ({"budgets": "2"}, {"width": 2}, {"completion": "small"}, {"choices": "xsb"}, {"search": "greedy"}):
        with interrupt("run_frozen") as done:
            ask(**options | changed)
        assert done == ["run_frozen"]
    assert same(ask(**options), first)


def test_a_search_for_some_budgets_leaves_the_whole_one_alone(ask, here, tmp_path):
    ask(context="frozen")
    path = tmp_path / "out" / file_of(context="frozen")
    content = path.read_bytes()
    for options in ({"budgets": "1"}, {"search": "dp"}, {"choices": "xb"},
                    {"criterion": "expected", "reference": here / "reference"}):
        ask(context="frozen", **options)
        assert path.read_bytes() == content


def test_a_smaller_search_does_not_replace_a_larger_one(ask, here, tmp_path):
    ask(context="frozen")
    path = tmp_path / "out" / file_of(context="frozen")
    content = path.read_bytes()
    for options in ({"tokens": 16}, {"domain": "code"}):
        user_error(lambda options=options: ask(context="frozen", **options), path, "holds 4 sequences",
                   "replaced by 2", "move it away")
        assert path.read_bytes() == content
    assert len(ask(context="frozen", tokens=48)["idx"]) == 6  # a larger one does
    assert len(ask(name="other", context="frozen", tokens=16)["idx"]) == 2


def test_its_own_reference_is_refused(ask, here):
    user_error(lambda: ask(criterion="expected", reference=here / "run", context="frozen"), "the run itself")


def test_another_reference_is_another_search(ask, interrupt, here):
    """And for drawn labels another seed."""
    apart(here)
    options = {"budgets": "2", "context": "frozen"}
    ask(reference=here / "reference", criterion="expected", **options)
    ask(reference=here / "reference", criterion="split", **options)
    for criterion, reference, seed, calls in (("expected", "reference", 1, 0), ("expected", "apart", 1, 1),
                                              ("split", "reference", 1, 0), ("split", "reference", 2, 1)):
        with interrupt("run_frozen") as done:
            ask(criterion=criterion, reference=here / reference, seed=seed, **options)
        assert len(done) == calls


def test_another_checkpoint_is_another_search(ask, interrupt, here, tmp_path):
    ask(budgets="2")
    shutil.copy(here / "reference" / "ckpt.pt", tmp_path / "out")
    with interrupt("run_sequential") as done:
        found = ask(budgets="2")
    assert len(done) == 1 and found["checkpoint"] == oracle.file_hash(here / "reference" / "ckpt.pt")


@pytest.mark.parametrize("context, name, batches", [("sequential", "Patterns", 6), ("frozen", "fixed_losses", 2)])
def test_baselines_resume(context, name, batches, here, unwritten, interrupt, tmp_path):
    """Batches of 6 sequences: 4 and 2 in the sequential context, of training and of validation text (2 more)."""
    made = []
    for folder in ("whole", "out"):
        r = unwritten(fresh(here, tmp_path / folder))
        for n, done_by_then in {"whole": [(None, batches)], "out": [(2, 1), (None, batches - 1)]}[folder]:
            with interrupt(name, n) as done:
                oracle.run_baselines(r, context, 96, 32, tqdm(disable=True))
            assert len(done) == done_by_then
        made.append(arrays(r.folder / f"patterns_{context}.npz"))
    assert same(*made)


def test_parts_of_earlier_searches_go_too(here, interrupt, tmp_path, monkeypatch):
    """Interrupted in the second search of a plan; when that is done, nothing is left of the first one either."""
    monkeypatch.setitem(oracle.PLANS, "debug", ([("frozen", 16, 16)], [
        oracle.Job(16, "frozen"), oracle.Job(16, budgets="1")], 0))
    options = flags(here, fresh(here, tmp_path / "out"), tokens=16, batch_size=1)
    with interrupt("run_sequential", 2):
        quiet(oracle.main, options)
    quiet(oracle.main, options)
    assert list((tmp_path / "out" / "oracle" / "parts").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# the plan

def test_plan(plan, here):
    out, text = plan
    result, files = json.loads((out / "oracle.json").read_text()), {}
    for path in (out / "oracle").glob("*.npz"):
        files[path.stem] = arrays(path)
    searches = {"sb_sequential_exhaustive_any+1", "sb_frozen_exhaustive"}
    assert set(files) == searches | {"patterns_sequential", "patterns_frozen"}
    assert result["checkpoint"] == oracle.file_hash(out / "ckpt.pt") and result["seed"] == 1
    assert set(result["searches"]) == searches
    for name, search in result["searches"].items():
        assert f"{name}: " in text
        assert {row["domain"] for row in search["rows"]} == {"code", "prose", "all"}
        for row in search["rows"]:
            i = list(files[name]["labels"]).index(row["budget"])
            d = {"code": [0], "prose": [1], "all": [0, 1]}[row["domain"]]
            losses = files[name]["losses"][i, np.isin(files[name]["domain"], d)]
            assert row["loss"] == pytest.approx(losses.mean(), abs=1e-6)
            assert row["ci"][0] <= row["loss"] <= row["ci"][1]
            assert f"{row['loss']:.4f}" in text
    assert set(result["baselines"]) == set(result["curves"]) == {"sequential", "frozen"}
    for context, table in result["baselines"].items():
        rows = {(row["domain"], row["k"]): row for row in table}
        assert set(rows) == set(itertools.product(("code", "prose", "all"), range(L + 1)))
        for row in rows.values():  # each reading of "best" may choose what the one before it may, and more
            order = [row[name][0] for name in ("random", "best100_data_set", "best100_sequence", "best100_token")]
            assert sorted(order, reverse=True) == order
            assert row["fixed"][0] >= row["best100_data_set"][0] - 1e-5  # here the hundred are all
        curve = result["curves"][context]["2"]
        assert list(curve) == ["1", "2", "4", "8"]
        assert curve["1"] == pytest.approx(rows["all", 2]["random"][0], abs=1e-5)
        assert curve["8"] == pytest.approx(rows["all", 2]["best100_token"][0], abs=1e-5)
    assert result["controls"] == {}
    assert "no --reference" in text and "python train.py --train_route=big" in text
    (finding,) = result["findings"]  # the others need 12 layers
    assert finding["id"] == "F8 (oracle)" and finding["verdict"] in ("holds", "fails", "undecided")
    assert finding["context"] == "frozen" and finding["seeds"] == [1]  # where all budgets were searched
    assert set(finding) >= {"claim", "effect", "ci", "detail", "command"}
    big = (files["sb_frozen_exhaustive"]["routes"][0] == BIG).sum(-1)  # `any` is the first budget
    assert finding["effect"] == pytest.approx(big[:, :4].mean() - big[:, -4:].mean())
    assert text.rstrip().endswith(f"done: {out}/oracle.json and {out}/oracle/*.npz")


def test_a_part_of_the_text_stays_that_part(here, tmp_path, monkeypatch):
    """--tokens is of a plan's longest search; the others, planned on less, see as much less of it."""
    monkeypatch.setitem(oracle.PLANS, "debug", ([], [
        oracle.Job(128, "frozen"), oracle.Job(64, "frozen", budgets="1"), oracle.Job(16, "frozen", budgets="2")], 0))
    out = fresh(here, tmp_path / "out")
    quiet(oracle.main, flags(here, out, tokens=64))
    assert [len(arrays(out / file_of(context="frozen", budgets=budgets))["idx"]) for budgets in ("all", "1", "2")] == [
        8, 4, 2]  # of 16 tokens, two domains; half a sequence is a whole one


def test_controls_are_planned_where_there_is_a_reference(here, tmp_path, monkeypatch):
    jobs = [oracle.Job(16, "frozen"), oracle.Job(16, "frozen", criterion="expected")]
    monkeypatch.setitem(oracle.PLANS, "debug", ([("frozen", 16, 16)], jobs, 0))
    options = flags(here, fresh(here, tmp_path / "out"), tokens=16)
    for more, controls in (({}, set()), ({"reference": here / "reference"}, {"frozen"})):
        text = quiet(oracle.main, options | more)
        assert ("no --reference: foresight and hindsight are left out" in text) == (not more)
        assert (tmp_path / "out" / file_of(context="frozen", criterion="expected")).exists() == bool(more)
        assert set(json.loads((tmp_path / "out" / "oracle.json").read_text())["controls"]) == controls


def test_quality(plan, here):
    out, text = plan
    rows = json.loads((out / "oracle.json").read_text())["quality"]
    names = list(dict.fromkeys(row["search"] for row in rows))
    assert {"greedy", "dp, early, width 1", "dp, small, width 4", "dp, big, width 16"} < set(names)
    assert [(row["search"], row["k"]) for row in rows] == list(itertools.product(names, range(L + 1)))
    # The exact losses: frozen context, every 8th position, 16 sequences per domain.
    corpus, model = data.load(here / "data" / "python_bpe300"), slow(here / "run")
    idx, y = (torch.cat(part) for part in zip(*(data.eval_windows(corpus, d, 16, T) for d in corpus.domains)))
    history = torch.full((*idx.shape, L), BIG)
    for row in rows:
        gap, low, high = row["gap"]
        assert gap >= -1e-6 and low - 1e-9 <= gap <= high + 1e-9 and row["work"] > 0 and row["against"] == "exhaustive"
        assert row["tokens"] == 32 * 2  # sequences and positions
        brute = [loss_on(log_p(model, idx, history, t, legal(str(row["k"]), "sb", t)), y[:, t]).min(0).values.mean()
                 for t in (4, 12)]
        assert row["loss"] - gap == pytest.approx(np.mean(brute), abs=1e-5)
        if row["search"] == "dp, early, width 32" or row["k"] in (0, L):
            assert gap == pytest.approx(0, abs=1e-6)  # wide enough, or one route only
    work = {row["search"]: row["work"] for row in rows}
    assert work["dp, small, width 1"] > work["dp, early, width 1"]  # runs the rest of the layers to judge
    assert max(row["gap"][0] for row in rows if row["search"] == "greedy") > 1e-4  # it is no exact search
    for name in names:
        assert f"  {name}: {work[name]:.1%} of the work of exhaustive, mean gap " in text


def test_quality_resumes(plan, here, interrupt, tmp_path, monkeypatch):
    monkeypatch.setitem(oracle.PLANS, "debug", ([], [oracle.Job(16, "frozen")], 16))
    options = flags(here, fresh(here, tmp_path / "out"), tokens=16)
    with interrupt("greedy", 2):  # at the second of two positions
        oracle.main(command_line(options))
    first = json.loads((tmp_path / "out" / "oracle.json").read_text())
    assert first["quality"] == [] and first["searches"].keys() == {"sb_frozen_exhaustive"}  # what was known by then
    with interrupt("greedy") as done:
        quiet(oracle.main, options)
    assert len(done) == 1 and not list((tmp_path / "out" / "oracle" / "parts").iterdir())
    shutil.copytree(fresh(here, tmp_path / "fresh"), tmp_path / "straight")
    quiet(oracle.main, options | {"out_dir": tmp_path / "straight"})
    whole, resumed = (json.loads((tmp_path / name / "oracle.json").read_text()) for name in ("straight", "out"))
    assert whole["quality"] == resumed["quality"] and len(whole["quality"]) > 12


def test_the_plan_again_does_nothing(plan, here, interrupt, tmp_path):
    shutil.copytree(plan[0], tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with contextlib.ExitStack() as stack:
        done = [stack.enter_context(interrupt(name))
                for name in ("run_sequential", "run_frozen", "pattern_losses", "run_quality")]
        text = quiet(oracle.main, flags(here, tmp_path / "out", tokens=64))
    assert done == [[], [], [], []]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == files
    assert text.splitlines()[2:-1] == plan[1].splitlines()[2:-1]  # the same tables; first and last name the folder


def test_controls_are_added_to_what_is_there(plan, here, tmp_path):
    """After the plan: two more commands, and oracle.json has the controls, with quality and the rest as they were."""
    shutil.copytree(plan[0], tmp_path / "out")
    before = json.loads((tmp_path / "out" / "oracle.json").read_text())
    for criterion in ("expected", "split"):
        text = quiet(oracle.main, flags(here, tmp_path / "out", context="frozen", criterion=criterion, tokens=64,
                                        budgets="2,any,3", reference=here / "reference"))
    result = json.loads((tmp_path / "out" / "oracle.json").read_text())
    assert {key: result[key] for key in ("baselines", "quality", "findings", "curves")} == {
        key: before[key] for key in ("baselines", "quality", "findings", "curves")}
    rows = result["controls"]["frozen"]
    assert {(row["k"], row["domain"]) for row in rows} == set(itertools.product((2, 3), ("all", "code", "prose")))
    for row in rows:
        check_controls(row)
        assert row["gain"][0] > -1e-6 and f"k={row['k']:<3} {row['gain'][0]:.4f}" in text
    assert "gain over the best fixed pattern, frozen" in text


def test_two_processes_make_the_same_files(plan, here, tmp_path, monkeypatch):
    out = fresh(here, tmp_path / "out")
    monkeypatch.setattr(oracle.claims, "FEW", 8)  # as the processes have it
    shutil.copytree(plan[0], tmp_path / "plan")
    quiet(oracle.main, flags(here, tmp_path / "plan", tokens=64, batch_size=4))  # nothing to do but to report
    plan = tmp_path / "plan", plan[1]
    # --standalone: a port that is free
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT,
                           *command_line(flags(here, out, tokens=64, batch_size=4))],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1  # only one of them reports
    names = sorted(path.name for path in (plan[0] / "oracle").glob("*.npz"))
    assert sorted(path.name for path in (out / "oracle").glob("*.npz")) == names
    for name in names:
        found = arrays(out / "oracle" / name)
        assert same(found, arrays(plan[0] / "oracle" / name))
        assert name.startswith("patterns") or json.loads(str(found["notes"]))["processes"] == 2
    assert list((out / "oracle" / "parts").iterdir()) == []
    one, two = (json.loads((folder / "oracle.json").read_text()) for folder in (plan[0], out))
    for result in (one, two):  # all but times and command lines
        result["searches"] = {name: search["rows"] for name, search in result["searches"].items()}
        assert [line.pop("command")[:16] for line in result["findings"]] == ["python oracle.py"]
    assert one == two


def test_processes_share_the_work(ask, here, monkeypatch, tmp_path):
    """The second of two processes searches every other batch, and leaves the rest, the file and the tables alone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FileNotFoundError):
        ask(budgets="1", context="frozen", batch_size=1)
    assert len(list((tmp_path / "out" / "oracle" / "parts").iterdir())) == 2  # of 4
    assert not (tmp_path / "out" / "oracle.json").exists()


def test_a_deep_model(here, tmp_path):
    """24 layers, where no exhaustive search goes: dp and greedy do."""
    out = random_run(here, tmp_path / "out", 24, 4)
    options = flags(here, out, tokens=8)
    for choices, routes in (("sb", "2^24"), ("xsb", "3^24")):
        user_error(lambda: quiet(oracle.main, options | {"search": "exhaustive", "choices": choices, "budgets": "any"}),
                   "--search=exhaustive", f"{routes} routes are too many", "--search=dp or greedy")
    model = slow(out)
    for search in ("greedy", "dp"):
        quiet(oracle.main, options | {"search": search, "budgets": "12"})
        found = arrays(out / file_of(search, budgets="12"))
        assert ((found["routes"] == BIG).sum(-1) == 12).all()
        idx, y = torch.from_numpy(found["idx"]), torch.from_numpy(found["targets"])
        close(found["losses"][0], model(idx, torch.from_numpy(found["routes"][0]).long(), y, reduction="none")[1])
        some_pattern = model(idx, torch.tensor([SMALL, BIG] * 12), y)[1].item()
        assert found["losses"].mean() < some_pattern - 0.1


# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.fixture
def refused(here, tmp_path):
    """-> a function: oracle.py must end with one line that holds all parts, and leave no result"""
    def refused(options, *parts):
        out = Path(options.get("out_dir", tmp_path / "out"))
        if "out_dir" not in options and not out.exists():
            fresh(here, out)
        user_error(lambda: quiet(oracle.main, flags(here, out) | options), *parts)
        assert not list(out.glob("oracle/**/*.npz"))
    return refused


FORMS = "none of any, all, a number of BIG (say 4), of SKIP (/6), of both (4/3), a ramp (6-2)"


@pytest.mark.parametrize("options, parts", [
    ({"budgets": "13"}, ["--budgets=13", "no route of 4 layers over --choices=sb has 13 BIG"]),
    ({"budgets": "any,1,5"}, ["--budgets=5", "no route of 4 layers"]),
    ({"budgets": "3/2", "choices": "xsb"}, ["--budgets=3/2", "4 layers", "3 BIG", "2 SKIP"]),
    ({"budgets": "1/2", "choices": "xb"}, ["--budgets=1/2", "1 BIG", "2 SKIP"]),
    ({"budgets": "/1", "choices": "sb"}, ["--budgets=/1", "--choices=sb", "1 SKIP"]),
    ({"budgets": "0-5"}, ["--budgets=0-5", "5 BIG"]),
    ({"budgets": "6-2"}, ["--budgets=6-2", "6 BIG"]),
    ({"budgets": "1", "choices": "xs"}, ["--budgets=1", "--choices=xs", "1 BIG"]),
    *(({"budgets": text, "choices": "xsb"}, [f"--budgets={text}: {text.split(',')[-1]!r} is", FORMS])
      for text in ("two", "2.5", "1/x", "any/1", "1,2;3", "3-2-1", "*", "-3", "-", "/", "1,", ",", "-1-2", "4/", "1/-1",
                   "1, 2", "+1", "4-")),
    ({"search": "beam"}, ["--search=beam", "choose from exhaustive, dp, greedy"]),
    ({"context": "causal"}, ["--context=causal", "choose from sequential, frozen"]),
    ({"criterion": "luck"}, ["--criterion=luck", "choose from label, expected, split"]),
    ({"search": "dp", "completion": "late"}, ["--completion=late", "choose from early, small, big"]),
    *(({"choices": text}, [f"--choices={text}", "two or three of x (SKIP), s (SMALL) and b (BIG), each once"])
      for text in ("b", "sbb", "ss", "sq", "big", "s,b")),
    ({"search": "greedy", "choices": "xsb"}, ["--choices=xsb", "greedy", "give sb or xb"]),
    ({"search": "greedy", "choices": "xs"}, ["--choices=xs", "greedy", "give sb or xb"]),
    ({"context": "frozen", "budgets": "1,3-1"}, ["--budgets=1,3-1", "ramp", "--context=sequential"]),
    ({"criterion": "expected"}, ["--criterion=expected", "--reference", "python train.py --train_route=big"]),
    ({"criterion": "split"}, ["--criterion=split", "--reference"]),
    ({"tokens": -1}, ["--tokens=-1", "0 or more"]),
    ({"batch_size": -1}, ["--batch_size=-1", "0 or more"]),
    ({"search": "dp", "width": 0}, ["--width=0", "1 or more"]),
    ({"tokens": 100000, "search": "dp"}, ["--tokens=100000", "validation set holds 352", "fewer"]),
    ({"tokens": 353, "search": "dp"}, ["--tokens=353", "352"]),
    ({"tokens": 401, "search": "dp", "domain": "prose"}, ["--tokens=401", "400"]),
    ({"width": 4}, ["--width", "--search=dp"]),
    ({"completion": "big", "search": "greedy"}, ["--search=greedy", "--completion", "--search=dp"]),
    ({"width": 4, "budgets": "2"}, ["--search=exhaustive", "--width", "--search=dp"]),
    ({"tokens": 100000}, ["--tokens=100000", "352"]),
    ({"domain": "poetry"}, ["--domain=poetry", "choose from all, code, prose"]),
    ({"preset": "huge"}, ["--preset=huge", "gpu, cpu, debug"]),
    ({"budget": 4}, ["unknown argument --budget", "did you mean --budgets?"]),
    ({"tokens": "many"}, ["--tokens", "many"]),
    ({"device": "abacus"}, ["--device=abacus"]),
])
def test_bad_values(options, parts, refused):
    refused(options, *parts)


def changed(path, **values):
    """Write the reference's checkpoint with other values -> its folder"""
    path.mkdir(parents=True)
    save_checkpoint(path / "ckpt.pt", values)
    return path


def test_bad_checkpoints(here, refused, tmp_path):
    whole = load_checkpoint(here / "reference" / "ckpt.pt")
    (tmp_path / "empty").mkdir()
    refused({"out_dir": tmp_path / "empty"}, tmp_path / "empty" / "ckpt.pt", "no checkpoint", "python train.py")
    for name in ("out_dir", "reference"):
        old = changed(tmp_path / f"old_{name}")
        torch.save(whole | {"version": 0}, old / "ckpt.pt")
        refused({name: old}, old / "ckpt.pt", "version 1")
        (old / "ckpt.pt").write_bytes((here / "run" / "ckpt.pt").read_bytes()[:1000])
        refused({name: old}, old / "ckpt.pt", "damaged or cut short")
    refused({"reference": tmp_path / "nowhere"}, tmp_path / "nowhere", "no checkpoint")
    other = changed(tmp_path / "other", **whole | {"fingerprint": "0123456789abcdef"})
    refused({"reference": other, "criterion": "split"}, f"--reference={other}", "0123456789abcdef", "same text")
    refused({"out_dir": other}, f"{other}/ckpt.pt", "0123456789abcdef", "--data_dir")


def test_reference_of_a_shorter_context(here, refused, tmp_path):
    whole = load_checkpoint(here / "reference" / "ckpt.pt")
    short = changed(tmp_path / "short", **whole | {"model_config": whole["model_config"] | {"block_size": 8}})
    refused({"reference": short, "criterion": "split"}, f"--reference={short}", "8 tokens", "--block_size=16")


def test_bad_input_on_the_command_line(here, tmp_path):
    """The script itself, as a user runs it."""
    out = fresh(here, tmp_path / "out")
    done = subprocess.run([sys.executable, SCRIPT, *command_line(flags(here, out, budgets=13))],
                          capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("oracle.py: error: --budgets=13: ") and done.stderr.count("\n") == 1


def test_out_of_memory_names_the_flag(refused, monkeypatch):
    def settle(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(oracle, "settle", settle)
    refused({"budgets": "1"}, "out of GPU memory", "--batch_size")


def test_ramps_and_controls_live_together(plan, here, tmp_path):
    """A ramp from 3 to 1 is no k to compare with."""
    shutil.copytree(plan[0], tmp_path / "out")
    options = {"reference": here / "reference", "tokens": 16}
    quiet(oracle.main, flags(here, tmp_path / "out", budgets="all,3-1", **options))
    quiet(oracle.main, flags(here, tmp_path / "out", budgets="1,3-1", criterion="expected", **options))
    controls = json.loads((tmp_path / "out" / "oracle.json").read_text())["controls"]
    assert {row["k"] for row in controls["sequential"]} == {1}
