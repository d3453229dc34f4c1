"""train.py: what a seed fixes, what a kill, a signal or a full disk may not lose, and what bad input leads to."""
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_common import Payload, SizeLimit, exit_code

import common
import data
import train
from common import UserError, load_checkpoint, parse_config, read_jsonl
from model import BIG, SKIP, SMALL
from train import TrainConfig

SCRIPT = Path(train.__file__).resolve()
TINY = {"preset": "debug", "device": "cpu", "vocab_size": 300, "n_layer": 2, "n_embd": 16, "block_size": 16,
        "p_skip": 0.25, "skip_every": 2, "learning_rate": 0.01, "max_steps": 20, "eval_sequences": 4}
WORDS = ["alpha", "beta", "gamma", "loss", "model", "token", "route", "layer", "skip", "small", "big"]


def write_texts(folder, n=30):
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.txt").write_text(" ".join(random.Random(i).choices(WORDS, k=150)))
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """-> a folder with a corpus; TINY's runs train on it."""
    folder = tmp_path_factory.mktemp("train")
    write_texts(folder / "texts")
    return folder


@pytest.fixture
def flags(here, tmp_path):
    """-> a function: name of the out_dir, options -> the command line"""
    def flags(name="out", **options):
        options = TINY | {"corpus": here / "texts", "data_dir": here / "data", "out_dir": tmp_path / name} | options
        return [f"--{key}={value}" for key, value in options.items()]
    return flags


@pytest.fixture
def go(flags, tmp_path):
    """-> a function: train in this process -> the run's folder"""
    def go(name="out", **options):
        assert train.main(flags(name, **options)) == 0
        return tmp_path / name
    return go


@pytest.fixture(scope="module")
def base(here):
    """The run that others are compared with: TINY, 20 steps, without a break."""
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    train.main([*flags, f"--corpus={here / 'texts'}", f"--data_dir={here / 'data'}", f"--out_dir={here / 'base'}"])
    return here / "base"


def saved(folder):
    return load_checkpoint(folder / "ckpt.pt")


def differences(a, b, path=""):
    """-> the names of what is not bitwise equal in two trees of dicts, lists, tensors and values"""
    if isinstance(a, dict) and isinstance(b, dict):
        return [name for key in a.keys() | b.keys() for name in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [name for i, pair in enumerate(zip(a, b, strict=True)) for name in differences(*pair, f"{path}/{i}")]
    return [] if (a.equal(b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b) else [path]


def same(a, b):
    """Two runs' checkpoints: weights, optimizer and step are bitwise equal."""
    a, b = saved(a), saved(b)
    return not [name for key in ("model", "optimizer", "step", "model_config", "fingerprint")
                for name in differences(a[key], b[key], key)]


def lines(folder, *kinds):
    """-> the log's lines of these kinds, without what a clock decides"""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"}
            for line in read_jsonl(folder / "metrics.jsonl") if line["kind"] in kinds]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def refused(capfd):
    """-> a function: run train.py in this process; it must end with code 2 and one line, which holds all parts"""
    def refused(argv, *parts):
        capfd.readouterr()
        assert exit_code(lambda: train.main(argv)) == 2
        error = [line for line in re.split("[\r\n]+", capfd.readouterr().err) if line.strip() and line[:5] != "step "]
        assert len(error) == 1, error
        assert ": error: " in error[0]
        for part in parts:
            assert str(part) in error[0]
        return error[0]
    return refused


class Crash(Exception):
    """Ends a run in this process as a kill does: nothing is saved, nothing is said."""


def crash():
    raise Crash


@pytest.fixture
def before_step(monkeypatch):
    """-> a context manager: a run within it calls `event` before step n; by default it crashes there."""
    @contextlib.contextmanager
    def before_step(n, event=crash):
        def batches(config, corpus, device, step, rank, world):
            if step == n:
                event()
            return micro_batches(config, corpus, device, step, rank, world)

        micro_batches = train.micro_batches
        with monkeypatch.context() as patch, pytest.raises(Crash) if event is crash else contextlib.nullcontext():
            patch.setattr(train, "micro_batches", batches)
            yield
    return before_step


@pytest.fixture
def snapshots(monkeypatch):
    """-> {step: checkpoint} of all that the runs of this test save"""
    taken = {}

    def save(path, checkpoint):
        taken[checkpoint["step"]] = copy.deepcopy(checkpoint)
        real(path, checkpoint)

    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save)
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# processes

def process(argv, log, environ, die_in_save):
    """`python train.py` in a process of its own, stdout and stderr in a file, killed within its die_in_save-th save."""
    os.environ.update(environ)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    saves, save = [], train.save_checkpoint

    def fsync(file):  # half of the bytes have reached the disk
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_checkpoint(path, checkpoint):
        saves.append(path)
        if len(saves) == die_in_save:
            os.fsync = fsync
        save(path, checkpoint)

    train.save_checkpoint = save_checkpoint
    common.run(train.main)


@pytest.fixture
def start(tmp_path):
    """-> a function: start train.py with these arguments -> its Process, output in .log; killed with the test.

    The processes are forked from a server that has imported torch and run nothing: as good as new, 4 s sooner.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    started = []

    def start(argv, die_in_save=0, **environ):
        log = tmp_path / f"process{len(started)}.log"
        child = context.Process(target=process, args=(argv, log, environ, die_in_save))
        started.append(child)
        child.start()
        child.log = log
        return child

    yield start
    for child in started:
        child.kill()
        child.join()


def finish(child):
    """-> its exit code"""
    child.join(60)
    assert child.exitcode is not None, f"still running: {child.log.read_text()}"
    return child.exitcode


def wait_for(child, condition):
    """Until condition() holds; the process has to be running then."""
    end = time.time() + 60
    while not condition():
        assert child.exitcode is None, child.log.read_text()
        assert time.time() < end
        time.sleep(0.001)


def logged_step(folder):
    """-> the last step in the log, 0 without one"""
    return max((line["step"] for line in read_jsonl(folder / "metrics.jsonl")), default=0)


# ---------------------------------------------------------------------------------------------------------------------
# one seed, one result

def test_same_seed_same_weights(base, go):
    again, other = go("again"), go("other", seed=2)
    assert same(base, again)
    assert lines(base, "train", "eval", "end") == lines(again, "train", "eval", "end")
    assert not same(base, other)
    a, b = saved(base)["model"], saved(other)["model"]
    assert not any(a[name].equal(b[name]) for name in a if a[name].dim() == 2)


def test_evaluating_and_saving_change_nothing(base, go):
    often = go("often", eval_interval=1, save_interval=1)
    rarely = go("rarely", eval_interval=1000, save_interval=1000)
    assert same(base, often)
    assert same(base, rarely)
    assert lines(often, "eval")[9::10] == lines(base, "eval")  # nor is an evaluation changed by those before it
    assert lines(rarely, "eval") == lines(base, "eval")[-1:]
    assert lines(rarely, "end") == lines(base, "end")
    other_eval = go("other_eval", eval_sequences=2)
    assert not differences(saved(base)["model"], saved(other_eval)["model"])


def test_micro_batches_add_up(base, go):
    for micro_batch in (1, 2):
        folder = go(f"micro{micro_batch}", micro_batch=micro_batch)
        close(lines(base, "train"), lines(folder, "train"))
        assert saved(folder)["train_config"]["micro_batch"] == micro_batch


def close(expected, got, rel=1e-3):
    """Two logs of train lines are equal but for rounding. (Adam makes much of it in the weights.)"""
    assert [line["step"] for line in got] == [line["step"] for line in expected] != []
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=rel)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=10 * rel)
        assert b["learning_rate"] == a["learning_rate"]
        assert b["tokens"] == a["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# batches and routes

@pytest.fixture
def config(flags):
    def config(**options):
        options = parse_config(TrainConfig, flags(**options), train.PRESETS)
        train.check(options, 1)
        return options
    return config


@pytest.fixture
def corpus(base):
    return data.load(saved(base)["corpus"])


def whole_step(config, corpus, world=1, step=5):
    """A step's batch, all processes' parts put together -> x, y, routes, list of counts"""
    parts = [part for rank in range(world)
             for part in train.micro_batches(config, corpus, torch.device("cpu"), step, rank, world)]
    assert all(len(x) == len(y) == len(route) == config.micro_batch for x, y, route, _ in parts)
    return *(torch.cat([part[i] for part in parts]) for i in range(3)), [part[3] for part in parts]


@pytest.mark.parametrize("micro_batch, world", [(1, 1), (2, 1), (4, 2), (1, 4), (2, 4)])
def test_same_tokens_and_routes_however_cut(config, corpus, micro_batch, world):
    expected = whole_step(config(batch_size=8), corpus)
    got = whole_step(config(batch_size=8, micro_batch=micro_batch), corpus, world)
    for a, b in zip(expected[:3], got[:3], strict=True):
        assert a.equal(b)
    assert len(got[3]) == 8 // micro_batch


def test_each_step_has_its_own_batch(config, corpus):
    x, y, route, _ = whole_step(config(), corpus)
    assert x[:, 1:].equal(y[:, :-1])
    x6, _, route6, _ = whole_step(config(), corpus, step=6)
    assert not x.equal(x6)
    assert not route.equal(route6)
    # The streams are apart: other routing leaves the tokens, another seed changes both.
    assert whole_step(config(p_skip=0), corpus)[0].equal(x)
    other = whole_step(config(seed=2), corpus)
    assert not other[0].equal(x)
    assert not other[2].equal(route)


def in_groups(rows):
    """-> for each layer of rows [b, T, L] the numbers of SKIP, SMALL and BIG"""
    return [tuple((layer == choice).sum().item() for choice in (SKIP, SMALL, BIG)) for layer in rows.unbind(-1)]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
@pytest.mark.parametrize("p_skip, p_big, skip_every, two_way, three_way", [
    (0.25, 0.5, 2, (0, 8, 8), (4, 6, 6)), (0.25, 0.5, 1, None, (4, 6, 6)), (0.25, 0.5, 4, (0, 8, 8), (4, 6, 6)),
    (0.25, 0.5, 0, (0, 8, 8), None), (0.5, 0.0, 2, (0, 16, 0), (8, 8, 0)), (0.25, 1.0, 2, (0, 0, 16), (4, 0, 12)),
    (1.0, 0.5, 2, (0, 8, 8), (16, 0, 0)), (0.0, 0.5, 2, (0, 8, 8), (0, 8, 8))])
def test_shares_of_random_routing(config, corpus, micro_batch, p_skip, p_big, skip_every, two_way, three_way):
    """p_big of all tokens are BIG; in every skip_every-th sequence p_skip skip, and p_big of the rest are BIG. Of 16
    tokens, in each sequence and layer exactly; and the counts that the model is told are those of the routes."""
    options = config(p_skip=p_skip, p_big=p_big, skip_every=skip_every, batch_size=6, micro_batch=micro_batch)
    _, _, route, counts = whole_step(options, corpus)
    assert route.shape == (6, 16, 2)
    for i, row in enumerate(route):
        expected = three_way if skip_every and i % skip_every == 0 else two_way
        assert in_groups(row.unsqueeze(0)) == [expected] * 2
    assert counts == [in_groups(rows) for rows in route.split(micro_batch)]


def test_random_routing_reaches_every_place(config, corpus):
    """Over many steps each position of each layer is BIG in half of all cases, whatever its neighbours are."""
    options = config(batch_size=16, skip_every=0)
    routes = torch.cat([whole_step(options, corpus, step=step)[2] for step in range(40)])
    share = (routes == BIG).float().mean(0)  # [T, L]; its standard deviation is 0.02
    assert (share - 0.5).abs().max() < 0.1
    both = ((routes[..., 0] == BIG) & (routes[..., 1] == BIG)).float().mean()
    assert abs(both - 0.25) < 0.02  # the layers are drawn apart


def test_batches_of_a_dense_run(config, corpus):
    assert all(part[2:] == (BIG, None) for part in
               train.micro_batches(config(train_route="big", micro_batch=1), corpus, torch.device("cpu"), 0, 0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# schedule

def test_phase(config):
    for route in ("random", "big"):
        assert train.phase(config(train_route=route, max_steps=21), 13) == (route, 13, 21)
    half = config(train_route="big_then_small", max_steps=21)
    assert [train.phase(half, step) for step in (0, 9, 10, 20)] == [
        ("big", 0, 10), ("big", 9, 10), ("random", 0, 11), ("random", 10, 11)]


def test_learning_rate(config):
    options = config(learning_rate=1.0, warmup_steps=10, max_steps=110, final_lr=0.1)
    rates = [train.learning_rate(options, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[60] == pytest.approx((1 + 0.1) / 2)  # half way down the cosine
    assert train.learning_rate(options, 110) == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    for extreme in (config(warmup_steps=0, max_steps=1), config(warmup_steps=50, max_steps=20)):
        assert 0 < train.learning_rate(extreme, 0) <= 0.01


def test_learning_rate_starts_anew_in_the_second_phase(config):
    options = config(train_route="big_then_small", warmup_steps=3, max_steps=20)
    rates = [train.learning_rate(options, step) for step in range(20)]
    assert rates[10:] == rates[:10]
    assert rates[9] < rates[3] / 5


# ---------------------------------------------------------------------------------------------------------------------
# what moves

def moved(before, after):
    return {name for name in before if not before[name].equal(after[name])}


def test_dense_baseline_leaves_small_alone(go, snapshots):
    folder = go(train_route="big", eval_interval=1, save_interval=1)
    assert moved(snapshots[1]["model"], snapshots[20]["model"]) == {
        name for name in snapshots[1]["model"] if ".small." not in name}
    for line in lines(folder, "eval", "end"):
        assert set(line["domains"]["text"]) == {"big"}


def test_big_then_small(go, config, corpus, snapshots):
    folder = go(train_route="big_then_small", save_interval=1)
    first, mid, last = (snapshots[step]["model"] for step in (1, 10, 20))
    small = {name for name in first if ".small." in name}
    assert moved(first, mid) == first.keys() - small
    assert moved(mid, last) == small
    assert set(lines(folder, "eval")[-1]["domains"]["text"]) == {"small", "random", "big"}
    kinds = [next(train.micro_batches(config(train_route="big_then_small"), corpus, torch.device("cpu"), step, 0, 1))[2]
             for step in (9, 10)]
    assert kinds[0] == BIG
    assert kinds[1].shape == (4, 16, 2)


def test_random_routing_moves_everything(go, snapshots):
    go(save_interval=1)
    assert moved(snapshots[1]["model"], snapshots[20]["model"]) == snapshots[1]["model"].keys()


def test_it_learns(go):
    folder = go(max_steps=150, p_skip=0, eval_interval=75, batch_size=8)
    losses = [line["loss"] for line in lines(folder, "train")]
    result = lines(folder, "end")[0]
    fresh = lines(go("fresh", max_steps=1), "train")[0]["loss"]
    assert fresh == pytest.approx(math.log(300), abs=0.2)  # a model without training knows nothing
    assert losses[-1] < losses[0] - 1 < fresh - 1
    for route in ("small", "random", "big"):
        assert result["domains"]["text"][route]["loss"] < math.log(300) - 1
    # Words drawn one by one, and tokens that are parts of words: a bigram is good at that.
    assert 1.5 < result["bigram"]["text"] < 2.5


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves and prints

def test_files_of_a_run(base, config, here):
    expected = dataclasses.asdict(config(out_dir=here / "base"))
    log = read_jsonl(base / "metrics.jsonl")
    assert sorted(os.listdir(base)) == ["ckpt.pt", "config.json", "metrics.jsonl", "tokenizer.json"]
    assert json.loads((base / "config.json").read_text()) == expected == saved(base)["train_config"] == log[0]["config"]
    assert [(line["kind"], line["step"]) for line in log] == [
        ("start", 0), ("train", 10), ("eval", 10), ("train", 20), ("eval", 20), ("end", 20)]

    start, train_line, end = log[0], log[1], log[-1]
    assert start["versions"] == {"python": sys.version.split()[0], "torch": torch.__version__}
    assert (start["device"], start["processes"]) == ("cpu", 1)
    assert start["fingerprint"] == saved(base)["fingerprint"]
    assert re.fullmatch("[0-9a-f]{16}", start["fingerprint"])
    assert train_line["tokens"] == 10 * 4 * 16
    assert train_line["learning_rate"] == train.learning_rate(config(), 9)
    assert train_line["grad_norm"] > 0
    assert set(train_line) == {"kind", "step", "loss", "learning_rate", "grad_norm", "tokens"}  # as the docstring says
    assert end["domains"] == log[-2]["domains"]
    assert 0 < end["bigram"]["text"] < math.log(300)
    assert end["tokens_per_second"] > 0


def test_bigram_is_fitted_on_the_tokens_trained_on(config, corpus, monkeypatch):
    options = config(max_steps=1, batch_size=1)
    x, y, _, _ = whole_step(options, corpus, step=0)
    monkeypatch.setattr(data, "bigram_loss", lambda corpus, seen, windows: seen["text"])
    assert corpus.train["text"][train.bigram(corpus, options)].tolist() == [*x[0].tolist(), y[0, -1].item()]
    assert train.bigram(corpus, config()).sum() > 20 * 17  # 20 steps of 4 windows, some of them overlapping


def test_bits_per_byte(base, config, corpus):
    """The definition: nats of all validation windows / ln 2 / bytes of the text that they stand for."""
    _, y = train.validation_windows(corpus, config(), "text")
    n_bytes = sum(len(corpus.encoding.decode_single_token_bytes(token)) for token in y.flatten().tolist()
                  if token != corpus.eot)
    for result in lines(base, "end")[0]["domains"]["text"].values():
        assert result["bits_per_byte"] == pytest.approx(result["loss"] * y.numel() / math.log(2) / n_bytes)


def test_what_is_printed(go, capfd):
    go()
    out, err = capfd.readouterr()
    for part in ("n_layer=2", "seed=1", "parameters", "embeddings", "device cpu, processes 1", "float32",
                 "fingerprint ", "bigram", "bits/byte", "next: python sample.py"):
        assert part in out
    bar = re.split("[\r\n]", err.strip())[-1]
    # step, %, smoothed loss, tok/s, elapsed and remaining time
    assert re.fullmatch(r"step 20/20 100% \|.*\|, loss \d\.\d{4}, [\d,]+ tok/s \[\d\d:\d\d<\d\d:\d\d\]", bar), bar


# ---------------------------------------------------------------------------------------------------------------------
# resume

@pytest.mark.parametrize("route", ["random", "big", "big_then_small"])
def test_resume_is_exact(route, base, go, flags, tmp_path, before_step):
    straight = base if route == "random" else go("straight", train_route=route)
    for save_interval, step in ((10, 10), (5, 17), (3, random.randrange(4, 20))):  # at a phase's start, in it, anywhere
        name = f"broken{save_interval}"
        with before_step(step):
            train.main(flags(name, train_route=route, save_interval=save_interval, eval_interval=5))
        assert saved(tmp_path / name)["step"] == step // save_interval * save_interval
        broken = go(name, train_route=route, save_interval=save_interval, resume=True)
        assert same(straight, broken), step
    assert lines(straight, "end") == lines(broken, "end")


def test_log_of_a_resumed_run(base, go, flags, before_step):
    with before_step(17):
        train.main(flags(eval_interval=5, save_interval=10))
    broken = go(resume=True)
    assert [line["step"] for line in lines(broken, "start")] == [0, 10]
    assert [line["step"] for line in lines(broken, "eval")] == [5, 10, 20]  # what came after step 10 is not there twice
    assert lines(broken, "eval")[1:] == lines(base, "eval")
    assert [line["step"] for line in lines(broken, "train")] == [5, 10, 20]
    assert lines(broken, "train")[-1] == lines(base, "train")[-1]


def test_resume_without_a_checkpoint_starts(base, go, flags, tmp_path, before_step):
    assert same(base, go("new", resume=True))
    with before_step(13):  # before its first checkpoint, but with lines in its log
        train.main(flags("early", save_interval=15))
    with open(tmp_path / "early" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    early = go("early", save_interval=10, resume=True)
    assert same(base, early)
    assert lines(early, "train", "eval", "end") == lines(base, "train", "eval", "end")


def test_a_run_is_not_overwritten(base, flags, refused):
    before = content(base)
    refused(flags(out_dir=base), base / "ckpt.pt", "--resume", "--out_dir")
    assert content(base) == before


def test_resume_of_a_finished_run(base, go, capsys):
    before = content(base)
    go(out_dir=base, resume=True)
    assert "finished already, 20 of 20 steps" in capsys.readouterr().out
    assert content(base) == before


def test_a_finished_checkpoint_has_its_end_line(base, flags, tmp_path, monkeypatch):
    """Whenever the process dies: once the last checkpoint stands, nothing is left to do."""
    def save(path, checkpoint):
        real(path, checkpoint)
        if checkpoint["step"] == 20:
            raise Crash
    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save)
    with pytest.raises(Crash):
        train.main(flags())
    assert train.main(flags(resume=True)) == 0
    assert lines(tmp_path / "out", "end") == lines(base, "end")


def test_resume_with_another_config_names_the_field(base, here, config, corpus):
    """Every field that changes what is learned."""
    device, before = torch.device("cpu"), content(base)
    for field in dataclasses.fields(TrainConfig):
        if field.name in train.FREE:
            continue
        options = config(out_dir=base, resume=True)
        then = getattr(options, field.name)
        now = f"{then}x" if field.type is str else then + 1
        setattr(options, field.name, now)
        with pytest.raises(UserError) as caught:
            train.start_or_resume(options, None, None, corpus, device)
        assert f"trained with --{field.name}={then}, not {now}" in str(caught.value)
    assert content(base) == before


def test_resume_with_another_config(base, flags, refused):
    before = content(base)
    refused(flags(out_dir=base, resume=True, n_embd=32), "--n_embd=16, not 32", "--out_dir")
    refused(flags(out_dir=base, resume=True, max_steps=40), "--max_steps=20, not 40")
    assert content(base) == before


def test_resume_may_change_what_is_not_learned(base, go, flags, before_step):
    with before_step(15):
        train.main(flags())
    assert same(base, go(resume=True, eval_interval=3, save_interval=4, compile="off"))


def test_resume_on_another_corpus(go, flags, refused, tmp_path):
    texts = write_texts(tmp_path / "texts")
    out = go(corpus=texts)
    before = content(out)
    other = write_texts(tmp_path / "other", 25)
    refused(flags(corpus=other, resume=True), f"--corpus={texts}, not {other}")
    (texts / "0.txt").write_text("alpha beta " * 90)  # the same path holds another text now
    refused(flags(corpus=texts, resume=True), f"trained on corpus {saved(out)['fingerprint']}", "--corpus")
    assert content(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# killed

def test_kill_and_resume(go, flags, start, tmp_path):
    """One kill at a random point, one within the write of a checkpoint, which leaves a stale temporary file."""
    options = {"max_steps": 120, "save_interval": 7, "eval_interval": 20}
    straight = go("straight", **options)
    out, argv = tmp_path / "out", flags(resume=True, **options)

    target, delay = random.randrange(10, 60), random.uniform(0, 0.03)
    child = start(argv)
    wait_for(child, lambda: logged_step(out) >= target)
    time.sleep(delay)
    child.kill()
    assert finish(child) == -signal.SIGKILL
    with open(out / "metrics.jsonl", "a") as file:  # were it killed while it wrote a line
        file.write('{"kind": "train", "st')

    child = start(argv, die_in_save=random.randrange(2, 5))
    assert finish(child) == -signal.SIGKILL
    stale = [path.stat().st_size for path in out.glob("ckpt.pt.*.tmp")]  # the first kill may have left one too
    assert 0 < min(stale) < (out / "ckpt.pt").stat().st_size
    assert 0 < saved(out)["step"] < 120

    go(resume=True, **options)
    assert same(straight, out), (target, delay)
    assert lines(straight, "train", "eval", "end") == lines(out, "train", "eval", "end")
    assert [line["step"] for line in lines(out, "start")] == sorted(line["step"] for line in lines(out, "start"))


@pytest.mark.slow
def test_twenty_kills(go, flags, start, tmp_path):
    options = {"max_steps": 1500, "save_interval": 5, "eval_interval": 50}
    straight = go("straight", **options)
    out, argv, kills = tmp_path / "out", flags(resume=True, **options), []
    for i in range(20):
        child = start(argv, die_in_save=random.randrange(1, 20) if i % 4 == 3 else 0)
        starts = len(lines(out, "start"))
        if i % 4 != 3:
            if i % 4:  # else at any time, from the first import on
                wait_for(child, lambda starts=starts: len(lines(out, "start")) > starts)
            kills.append(random.uniform(0, 0.4))
            time.sleep(kills[-1])
            child.kill()
        assert finish(child) == -signal.SIGKILL
    assert 100 < saved(out)["step"] < 1500
    go(resume=True, **options)
    assert same(straight, out), kills
    assert lines(straight, "train", "eval", "end") == lines(out, "train", "eval", "end")


# ---------------------------------------------------------------------------------------------------------------------
# interrupted

def interrupted_line(text, out):
    (line,) = [line for line in text.splitlines() if line.startswith("interrupted: ")]
    step = int(re.search(r"holds step (\d+) of", line)[1])
    assert str(out / "ckpt.pt") in line
    assert "--resume" in line
    assert saved(out)["step"] == step
    return step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_leaves(number, base, flags, go, tmp_path, before_step, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with before_step(7, lambda: os.kill(os.getpid(), number)):
        assert train.main(flags()) == 130
    assert interrupted_line(capsys.readouterr().out, tmp_path / "out") == 8  # the step under way is finished first
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert same(base, go(resume=True))
    assert lines(tmp_path / "out", "eval", "end") == lines(base, "eval", "end")


def test_signal_in_the_last_step(base, flags, go, tmp_path, before_step):
    with before_step(19, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert train.main(flags()) == 0  # nothing is left to be interrupted
    assert same(base, tmp_path / "out")
    assert lines(tmp_path / "out", "end") == lines(base, "end")


def test_second_signal_ends_at_once(flags, tmp_path, before_step):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with before_step(7, twice), pytest.raises(SystemExit) as caught:
        train.main(flags(save_interval=5))
    assert caught.value.code == 130
    assert saved(tmp_path / "out")["step"] == 5
    assert signal.getsignal(signal.SIGINT) == before


def test_handlers_come_back_after_an_error(flags, before_step):
    handler = signal.getsignal(signal.SIGTERM)
    with before_step(7):
        train.main(flags())
    assert signal.getsignal(signal.SIGTERM) == handler


def test_ctrl_c_on_the_command_line(go, flags, tmp_path):
    """The script itself, as a user runs it."""
    out, pipe = tmp_path / "out", subprocess.PIPE
    child = subprocess.Popen([sys.executable, SCRIPT, *flags(max_steps=3000, save_interval=1000)], stdout=pipe,
                             stderr=pipe, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.time() + 60
        while logged_step(out) < 20:
            assert child.poll() is None and time.time() < end
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        text, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert 20 <= interrupted_line(text, out) < 3000
    assert "Traceback" not in errors
    assert "error" not in errors


# ---------------------------------------------------------------------------------------------------------------------
# several processes

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two(start, argv):
    """What torchrun starts, without torchrun."""
    port = str(free_port())
    return [start(argv, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            for rank in range(2)]


def test_torchrun_gives_the_same_losses(base, flags, tmp_path):
    port = f"--master_port={free_port()}"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", port, SCRIPT, *flags()],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "processes 2" in done.stdout
    assert done.stdout.count("done: ") == 1  # only one of them talks
    out = tmp_path / "out"
    close(lines(base, "train"), lines(out, "train"))
    assert lines(out, "start")[0]["processes"] == 2
    for a, b in zip(lines(base, "eval"), lines(out, "eval"), strict=True):
        for route, result in a["domains"]["text"].items():
            assert b["domains"]["text"][route]["loss"] == pytest.approx(result["loss"], rel=1e-3)


def test_two_processes_with_micro_batches(base, flags, start, tmp_path):
    assert [finish(child) for child in start_two(start, flags(micro_batch=1))] == [0, 0]
    close(lines(base, "train"), lines(tmp_path / "out", "train"))


def test_two_processes_interrupted_and_resumed(flags, start, tmp_path):
    """A signal to one of them is enough: both leave, at the same step."""
    argv, out, steps = flags(max_steps=3000, eval_interval=3000, save_interval=3000, resume=True), tmp_path / "out", [0]
    for receivers in ([1], [0, 1]):  # torchrun and a terminal send it to all
        children = start_two(start, argv)
        wait_for(children[0], lambda: logged_step(out) >= steps[-1] + 10)
        for i in receivers:
            os.kill(children[i].pid, signal.SIGTERM)
        assert [finish(child) for child in children] == [130, 130], children[0].log.read_text()
        steps.append(interrupted_line(children[0].log.read_text(), out))
        assert "interrupted: " not in children[1].log.read_text()
    assert [line["step"] for line in lines(out, "train")] == list(range(10, steps[-1] + 1, 10))
    assert [line["step"] for line in lines(out, "start")] == steps[:2]


# ---------------------------------------------------------------------------------------------------------------------
# a loss that is lost

def test_nan_stops_the_run(flags, refused, tmp_path, snapshots, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda config, step: 1e30 if step >= 12 else rate(config, step))
    refused(flags(), "loss", "nan at step 14", "lower --learning_rate (now 0.01)", "--grad_clip")
    assert list(snapshots) == [10]
    checkpoint = saved(tmp_path / "out")
    assert checkpoint["step"] == 10
    assert all(w.isfinite().all() for w in checkpoint["model"].values())


def test_a_learning_rate_far_too_high(flags, refused):
    refused(flags(learning_rate=1e30), "nan at step 2:", "--learning_rate")


def test_weights_that_a_bad_gradient_spoilt_are_not_saved(flags, refused, tmp_path, monkeypatch):
    """In the step of a checkpoint the loss may be finite and the gradient not."""
    steps = []

    def clip(parameters, largest):
        steps.append(1)
        parameters = list(parameters)
        if len(steps) == 10:
            parameters[0].grad[0, 0] = math.inf
        return real(parameters, largest)

    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    refused(flags(save_interval=5), "at step 10:", "--learning_rate")
    assert saved(tmp_path / "out")["step"] == 5


# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize("options, parts", [
    ({"learnig_rate": 1}, ["--learnig_rate", "did you mean --learning_rate?"]),
    ({"n_layer": "two"}, ["--n_layer", "int", "two"]),
    ({"n_layer": 0}, ["--n_layer=0", "above 0"]),
    ({"max_steps": -1}, ["--max_steps=-1", "above 0"]),
    ({"learning_rate": "nan"}, ["--learning_rate=nan"]),
    ({"learning_rate": "inf"}, ["--learning_rate=inf"]),
    ({"p_big": 1.5}, ["--p_big=1.5", "0..1"]),
    ({"p_skip": -0.1}, ["--p_skip=-0.1", "0..1"]),
    ({"skip_every": -1}, ["--skip_every=-1"]),
    ({"p_big": "nan"}, ["--p_big=nan", "0..1"]),
    ({"train_route": "small"}, ["--train_route=small", "random", "big", "big_then_small"]),
    ({"compile": "maybe"}, ["--compile=maybe", "auto", "on", "off"]),
    ({"preset": "huge"}, ["--preset=huge", "cpu", "gpu", "debug"]),
    ({"micro_batch": 3}, ["--micro_batch=3", "divide", "4 sequences"]),
    ({"micro_batch": 8}, ["--micro_batch=8", "divide"]),
    ({"micro_batch": -1}, ["--micro_batch=-1"]),
    ({"n_head": 3}, ["n_embd=16", "n_head=3"]),
    ({"n_head": 16}, ["n_embd=16", "n_head=16"]),  # one number a head: nothing for rotary positions to turn
    ({"big_width": -1}, ["--big_width=-1"]),
    ({"small_width": -1}, ["--small_width=-1"]),
    ({"weight_decay": -1}, ["--weight_decay=-1"]),
    ({"grad_clip": 0}, ["--grad_clip=0"]),
    ({"warmup_steps": -1}, ["--warmup_steps=-1"]),
    ({"final_lr": -1}, ["--final_lr=-1"]),
    ({"device": "tpu"}, ["--device=tpu", "cpu", "cuda"]),
    ({"tokenizer": "chars"}, ["--tokenizer=chars", "bpe", "gpt2"]),
    ({"vocab_size": 100}, ["--vocab_size=100"]),
])
def test_bad_values(options, parts, flags, refused, tmp_path):
    refused(flags(**options), *parts)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_where_there_is_none(flags, refused):
    refused(flags(device="cuda"), "--device=cuda", "--device=cpu")


def test_batch_that_the_processes_cannot_share(config):
    with pytest.raises(UserError, match="--batch_size=4.*3 processes"):
        train.check(config(), 3)


def test_bad_input_on_the_command_line():
    """The script itself, as a user runs it."""
    done = subprocess.run([sys.executable, SCRIPT, "--max_step=5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "train.py: error: unknown argument --max_step: did you mean --max_steps?\n"


def test_bad_corpora(flags, refused, tmp_path):
    def make(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    text = make("text.txt", "\n".join(f"line {i} of a text" for i in range(600)).encode())
    for corpus, *parts in ((tmp_path / "nowhere", "no such file or folder"), (tmp_path / "empty", "no text"),
                           (make("binary.txt", random.Random(1).randbytes(9999)), "binary"),
                           (make("short.txt", b"only a few words"), "too little text")):
        refused(flags(corpus=corpus), f"--corpus={corpus}", *parts)
    refused(flags(corpus=text, vocab_size=257, block_size=5000), f"--corpus={text}", "fewer than one context",
            "--block_size")
    assert not list(tmp_path.glob("out/*"))


# ---------------------------------------------------------------------------------------------------------------------
# damaged checkpoints

def test_damaged_checkpoints(base, flags, refused, tmp_path):
    out, whole = tmp_path / "out", (base / "ckpt.pt").read_bytes()
    shutil.copytree(base, out)
    for damaged in (whole[:0], whole[:100], whole[:len(whole) // 2], whole[:-1], random.Random(1).randbytes(5000)):
        (out / "ckpt.pt").write_bytes(damaged)
        refused(flags(resume=True), out / "ckpt.pt", "damaged or cut short", "--out_dir")
        assert (out / "ckpt.pt").read_bytes() == damaged  # it is the user's to delete
        assert (out / "metrics.jsonl").read_bytes() == (base / "metrics.jsonl").read_bytes()


def test_checkpoint_with_a_payload(base, flags, refused, tmp_path):
    (tmp_path / "out").mkdir()
    torch.save(saved(base) | {"extra": Payload(tmp_path / "mark")}, tmp_path / "out" / "ckpt.pt")
    refused(flags(resume=True), tmp_path / "out" / "ckpt.pt", "code besides tensors", "refused")
    assert not (tmp_path / "mark").exists()


def test_checkpoint_of_another_version(base, flags, refused, tmp_path):
    (tmp_path / "out").mkdir()
    torch.save(saved(base) | {"version": 2}, tmp_path / "out" / "ckpt.pt")
    refused(flags(resume=True), tmp_path / "out" / "ckpt.pt", "version 1")


# ---------------------------------------------------------------------------------------------------------------------
# no place to write

def test_full_disk(base, flags, go, refused, tmp_path, monkeypatch):
    """Full while a checkpoint is saved: the one before it stays, and the run goes on from there."""
    def save(path, checkpoint):
        with SizeLimit((base / "ckpt.pt").stat().st_size // 2 if checkpoint["step"] == 15 else 10**9):
            common.save_checkpoint(path, checkpoint)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save)
        refused(flags(save_interval=5), out / "ckpt.pt: File too large", "free space", "--out_dir")
    assert sorted(os.listdir(out)) == ["ckpt.pt", "config.json", "metrics.jsonl", "tokenizer.json"]
    assert saved(out)["step"] == 10
    assert same(base, go(resume=True))


def test_disk_full_from_the_start(flags, refused, tmp_path, monkeypatch):
    def open_out_dir(out_dir):
        with SizeLimit(0):
            return common.open_out_dir(out_dir)
    monkeypatch.setattr(train, "open_out_dir", open_out_dir)
    refused(flags(), tmp_path / "out", "File too large", "--out_dir")
    assert os.listdir(tmp_path / "out") == []


def test_out_dir_that_cannot_be(flags, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(flags(out_dir=tmp_path / "file"), tmp_path / "file", "--out_dir")
    refused(flags(out_dir=tmp_path / "file" / "deeper"), tmp_path / "file", "--out_dir")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_out_dir(base, flags, refused, tmp_path):
    shutil.copytree(base, tmp_path / "out")
    (tmp_path / "out").chmod(0o555)
    refused(flags(resume=True), tmp_path / "out", "Permission denied", "--out_dir")
    assert content(tmp_path / "out") == content(base)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile

def fails_at_once(error):
    def compile(model, **options):
        raise error
    return compile


def fails_when_called(error):
    def compile(model, **options):
        def call(*args, **kwargs):
            model(*args, **kwargs)[1].backward()  # even after it has left gradients
            raise error
        return call
    return compile


@pytest.mark.parametrize("compile", [
    fails_at_once(RuntimeError("Windows not yet supported\nfor torch.compile")),
    fails_when_called(RuntimeError("Failed to find C compiler.\n\nPlease specify via CC")),
    fails_when_called(AssertionError()),  # an error without a text
])
def test_training_goes_on_without_compile(compile, base, go, monkeypatch, capfd):
    monkeypatch.setattr(torch, "compile", compile)
    folder = go(compile="on")
    out, err = capfd.readouterr()
    (line,) = [line for line in out.splitlines() if "compile" in line and "learning_rate=" not in line]
    assert line.startswith("torch.compile failed (")
    assert "--compile=off" in line
    assert "Traceback" not in err
    assert same(base, folder)


def test_what_is_compiled_is_used(base, go, monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *a, **k: calls.append(1) or model(*a, **k))
    assert same(base, go("off", compile="off"))
    assert same(base, go("auto"))  # no CUDA, so off
    assert calls == []
    assert same(base, go("on", compile="on"))
    assert len(calls) == 3 + 20
    assert "compiled in" in capfd.readouterr().out
    assert all(name.startswith(("embedding", "blocks", "final_norm")) for name in saved(base)["model"])  # no _orig_mod


def test_out_of_memory_names_the_flag(flags, refused, monkeypatch):
    monkeypatch.setattr(torch, "compile", fails_when_called(torch.OutOfMemoryError("CUDA out of memory")))
    refused(flags(compile="on"), "--micro_batch")
