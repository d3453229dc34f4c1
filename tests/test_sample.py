"""sample.py: the cache against full re-forwards, what is drawn, what the reader sees, and what bad input leads to."""
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import sample
import train
from common import UserError, load_checkpoint, load_run, save_checkpoint
from model import BIG, SKIP, SMALL

ESCAPE = re.compile("\x1b\\[[0-9;]*m")
L, T, VOCAB = 12, 32, 300  # layers, context and vocabulary of the run below; its matrix is padded to 320 entries
PATTERN = "012121012121"


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A run of 20 steps on a small folder of text."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "texts").mkdir()
    for i in range(20):
        text = "".join(f"{i * j}: größe naïve 数据 {'abcdefg'[j % 7] * (i % 5 + 1)}\tend\n" for j in range(60))
        (folder / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    train.main(["--preset=debug", "--device=cpu", f"--corpus={folder / 'texts'}", f"--data_dir={folder / 'data'}",
                f"--out_dir={folder / 'out'}", f"--vocab_size={VOCAB}", "--max_steps=20", "--eval_interval=20",
                "--eval_sequences=1", "--learning_rate=0.01", "--p_big=0.3"])
    # So few steps leave BIG and SMALL alike: greedy text would not show which of them ran.
    checkpoint, noise = load_checkpoint(folder / "out" / "ckpt.pt"), torch.Generator().manual_seed(1)
    for name, weight in checkpoint["model"].items():
        if ".small." in name:
            weight += 0.3 * torch.randn(weight.shape, generator=noise)
    save_checkpoint(folder / "out" / "ckpt.pt", checkpoint)
    return folder / "out"


@pytest.fixture(scope="module")
def model(out_dir):
    return load_run(out_dir, "cpu")[0]


@pytest.fixture(scope="module")
def encoding(out_dir):
    return data.read_tokenizer((out_dir / "tokenizer.json").read_bytes())


@pytest.fixture
def write(out_dir, capsys):
    """-> a function: flags -> what `python sample.py` writes to stdout; write.err is then the last line on stderr."""
    def write(*flags):
        sample.main([f"--out_dir={out_dir}", "--device=cpu", "--tokens=50", "--prompt=12: gr", *flags])
        captured = capsys.readouterr()
        write.err = captured.err.splitlines()[-1]
        return captured.out
    return write


def hidden_router(model):
    """A router that depends on the hidden state, as learned ones do; each layer has its own weights."""
    weight = torch.randn(L, model.config.n_embd, 3, generator=torch.Generator().manual_seed(3))
    return lambda layer, h, state, seq: (h @ weight[layer], state)


def make_route(name, model):
    if name == "router":
        return hidden_router(model)
    return sample.parse_route(name, L, 0.5, torch.Generator().manual_seed(5))


def greedy(logits):
    return sample.sampler(VOCAB, 0, 0, None)(logits)


def run_generate(model, prompt, n, route, pick):
    """-> tokens [n], routes [n, L], logits [n, V] of one sequence"""
    seen = []

    def spy(logits):
        seen.append(logits[0].clone())
        return pick(logits)
    steps = list(sample.generate(model, torch.tensor([prompt]), n, route, spy))
    return [token.item() for token, _ in steps], torch.cat([route for _, route in steps]).long(), torch.stack(seen)


@torch.no_grad()
def reference(model, prompt, n, route_of, pick):
    """The same without a cache: each step reads the whole window anew. route_of(i): choices [L] of token i."""
    text, first, out = list(prompt), 0, []  # the window starts at token `first`
    for _ in range(n):
        if len(text) - first > T:
            first = len(text) - 1 - T // 2  # half a window, and the token that no longer fitted
        route = torch.stack([route_of(i) for i in range(first, len(text))])[None]
        logits = model(torch.tensor([text[first:]]), route)[0][:, -1]
        out.append(logits[0])
        text.append(pick(logits).item())
    return text[len(prompt):], torch.stack(out)


# ---------------------------------------------------------------------------------------------------------------------
# generation

@pytest.mark.parametrize("name", ["big", "small", PATTERN, "random", "router"])
@pytest.mark.parametrize("forced", [False, True])
def test_cache_equals_full_forwards(model, name, forced):
    """2.5 contexts, so 3 overflows. `forced` dictates varied tokens: left to itself, a tiny model repeats one."""
    n = 2 * T + T // 2

    def make_pick():
        dictated = iter(i * i % VOCAB for i in range(n))
        return (lambda logits: torch.tensor([next(dictated)])) if forced else greedy
    tokens, routes, logits = run_generate(model, [40], n, make_route(name, model), make_pick())
    # The prompt is one token, so routes[i] is the route of the text's token i: the reference replays what was decided.
    expected, expected_logits = reference(model, [40], n, lambda i: routes[i], make_pick())
    assert tokens == expected
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    if name in ("random", "router"):
        assert set(routes.flatten().tolist()) == {SMALL, BIG} | ({SKIP} if name == "router" else set())
        assert (routes != routes[0]).any()
    else:
        fixed = {"big": [BIG] * L, "small": [SMALL] * L, PATTERN: [int(c) for c in PATTERN]}[name]
        assert (routes == torch.tensor(fixed)).all()


@pytest.mark.parametrize("length", [5, T - 1, T, T + 9])
def test_prompt_of_any_length(model, length):
    """A prompt longer than the context counts with its last T tokens."""
    prompt = [(7 * i) % VOCAB for i in range(length)]
    tokens, _, logits = run_generate(model, prompt, 2 * T, SMALL, greedy)
    expected, expected_logits = reference(model, prompt[-T:], 2 * T, lambda i: torch.full((L,), SMALL), greedy)
    assert tokens == expected
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_router_sees_each_token_once(model):
    """Also across overflows: a router may count what a sequence has used."""
    inner, seen = hidden_router(model), []

    def router(layer, h, state, seq):
        if layer == 0:
            seen.append((h.size(1), seq["idx"][0].tolist()))
        return inner(layer, h, state, seq)
    tokens, _, _ = run_generate(model, [1, 2, 3], 3 * T, router, greedy)
    assert [size for size, _ in seen] == [3] + [1] * (3 * T - 1)
    assert seen[-1][1] == [1, 2, 3] + tokens[:-1]


def test_each_sequence_keeps_its_route(model):
    """One batch, two routes: as two batches of one."""
    route = torch.tensor([BIG, SMALL]).view(2, 1, 1)
    steps = list(sample.generate(model, torch.tensor([[1, 2], [1, 2]]), 40, route, greedy))
    assert (steps[0][1] == torch.tensor([[BIG] * L, [SMALL] * L])).all()
    alone = [run_generate(model, [1, 2], 40, choice, greedy)[0] for choice in (BIG, SMALL)]
    assert torch.stack([token for token, _ in steps], 1).tolist() == alone
    assert alone[0] != alone[1]


def test_random_router():
    """BIG has its share, the rest is SMALL; draws are independent over tokens and layers."""
    router, h = sample.random_router(0.3, torch.Generator().manual_seed(1)), torch.zeros(4, 2000, 8)
    choice = torch.stack([router(layer, h, None, {})[0].argmax(-1) for layer in range(3)])
    assert choice.unique().tolist() == [SMALL, BIG] and abs((choice == BIG).float().mean() - 0.3) < 0.02
    for other in (choice.roll(1, 0), choice.roll(1, 1), choice.roll(1, 2)):  # another layer, sequence, token
        assert abs((choice == other).float().mean() - 0.58) < 0.02  # 0.3^2 + 0.7^2


def test_random_share_is_the_runs(write, monkeypatch):
    """p_big = 0.3; and routing and text are separate streams."""
    steps = []
    monkeypatch.setattr(sample, "write_stream", lambda model, prompt, s, *_: (steps.append(list(s)), (0.0, 1.0))[1])
    for flag in ("--temperature=0", "--temperature=1", "--seed=2"):
        write("--route=random", "--tokens=150", flag)
    routes = [torch.cat([route for _, route in s]) for s in steps]
    assert abs((routes[0] == BIG).float().mean() - 0.3) < 0.04
    assert torch.equal(routes[0], routes[1]) and not torch.equal(routes[0], routes[2])
    assert [token for token, _ in steps[0]] != [token for token, _ in steps[1]]


@pytest.mark.parametrize("temperature, top_k", [(0, 0), (1.0, 0), (1.0, 5), (100.0, 310), (1e-320, 0)])
def test_padded_entries_are_never_drawn(model, temperature, top_k):
    """The likeliest entries by far are the 20 that only pad the vocabulary."""
    logits = torch.randn(1000, 320, generator=torch.Generator().manual_seed(1))
    logits[:, VOCAB:] += 50
    ids = sample.sampler(VOCAB, temperature, top_k, torch.Generator().manual_seed(1))(logits)
    rank = logits[:, :VOCAB].argsort(descending=True).argsort().gather(1, ids[:, None])
    assert ids.max() < VOCAB
    assert rank.max() < {0: 1, 1e-320: 1, 1.0: top_k or VOCAB, 100.0: VOCAB}[temperature]
    if temperature >= 1:
        assert len(set(rank.flatten().tolist())) >= min(5, top_k or 5)


def test_seed(write):
    for route in ("--route=random", "--route=big"):
        first = write("--temperature=1", route)
        assert write("--temperature=1", route) == first
        assert write("--temperature=1", route, "--seed=2") != first


# ---------------------------------------------------------------------------------------------------------------------
# what the reader sees

class Terminal(io.StringIO):
    def isatty(self):
        return True


def stream(model, encoding, ids, out, routes=(BIG,)):
    steps = ((torch.tensor([i]), torch.full((1, L), routes[n % len(routes)])) for n, i in enumerate(ids))
    figures = sample.write_stream(model, ">> ", steps, encoding, out)
    return out.getvalue(), figures


def test_streaming_equals_decoding_at_once(model, encoding):
    text = "größe 数据 😀\tnaïve\nend"
    ids = encoding.encode_ordinary(text)
    assert any("\ufffd" in encoding.decode([i]) for i in ids), "no token of this text ends within a character"
    half = encoding.encode_ordinary("😀")[:-1]  # cut within a character, in the middle and at the end
    for case in (ids, half + [encoding.eot_token] + ids + half):
        assert stream(model, encoding, case, io.StringIO())[0] == ">> " + encoding.decode(case) + "\n"


def test_each_token_comes_at_once(model, encoding):
    """...and a character when its last byte does."""
    arrived, seen = io.BytesIO(), []
    out = io.TextIOWrapper(arrived, encoding="utf-8")  # buffers what is not flushed

    def steps():
        for i in encoding.encode_ordinary("a 😀b"):
            seen.append(arrived.getvalue().decode())
            yield torch.tensor([i]), torch.full((1, L), BIG)
    sample.write_stream(model, "", steps(), encoding, out)
    assert seen[:2] == ["", "a"] and not any("\ufffd" in text for text in seen) and seen[-1].endswith("😀")


def test_colours(model, encoding, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ids = encoding.encode_ordinary("a b\nc d") + [encoding.eot_token]
    plain, figures = stream(model, encoding, ids, io.StringIO(), (SKIP, SMALL, BIG))
    assert not ESCAPE.search(plain)
    n_big = sum(n % 3 == 2 for n in range(len(ids)))
    flops = sum(model.flops(n % 3) for n in range(len(ids))) / len(ids)
    assert figures == (pytest.approx(n_big * L / len(ids)), pytest.approx(flops))

    coloured, _ = stream(model, encoding, ids, Terminal(), (SKIP, SMALL, BIG))
    text, legend = coloured.rstrip("\n").rsplit("\n", 1)
    assert ESCAPE.sub("", text) + "\n" == plain
    cheap, dear = (f"\x1b[48;5;{sample.SCALE[level][0]};" for level in (0, -1))
    assert text.count(cheap) >= 2 and text.count(dear) >= 1 and "\x1b[2m<|endoftext|>" in text
    assert not re.search("m[^\x1b]*\n[^\x1b]*\x1b\\[0m", text), "a colour runs over the end of a line"
    assert "all-small" in legend and "all-big" in legend and all(f"48;5;{b};" in legend for b, _ in sample.SCALE)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            assert stream(model, encoding, ids, Terminal(), (SKIP, SMALL, BIG))[0] == plain


def test_pipe_is_plain(write, model, encoding):
    """Even where the model writes an escape sequence of its own."""
    out = write("--temperature=50", "--route=random")
    assert out.startswith("12: gr") and out.endswith("\n") and "\x1b" not in out
    ids = [encoding.encode_single_token(bytes([byte])) for byte in range(128)]
    out, _ = stream(model, encoding, ids, io.StringIO())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
    assert "\\x00" in out and "\\x1b" in out and "\t\n" in out and "xyz" in out


def test_last_line(write):
    write("--route=" + PATTERN)
    n_big, share = re.fullmatch(r"50 tokens, ([\d.]+) BIG per token, ([\d.]+) of all-big's FLOPs, \d+ tokens/s",
                                write.err).groups()
    assert float(n_big) == PATTERN.count("2") and 0.3 < float(share) < 0.9
    write("--route=big")
    assert write.err.startswith("50 tokens, 12.00 BIG per token, 1.00 of")


def test_wrap_and_columns():
    lines = sample.wrap("a\tb\x1b[0m\n\n数据数据数据 naïve", 9)
    assert lines == ["a   b\\x1b", "[0m      ", " " * 9, "数据数据 ", "数据 naïv", "e        "]
    both = sample.columns(["one\ntwo\nthree", "four"], ["A", "B"], 23).splitlines()
    assert both == ["A          | B", "-" * 10 + " | " + "-" * 10, "one        | four", "two        |", "three      |"]


def test_compare(write, model, monkeypatch):
    """Its two columns are the two separate runs."""
    monkeypatch.setenv("COLUMNS", "83")
    flags = ("--temperature=0", "--tokens=90")
    rows = [(row + " ").partition(" | ") for row in write("--compare", *flags).splitlines()]
    for name, choice, side in (("big", BIG, 0), ("small", SMALL, 2)):
        header, _, *column = [row[side].rstrip() for row in rows]
        assert header == f"all-{name}, {model.flops(choice) / 1e6:.2f}M FLOPs per token"
        alone = [line.rstrip() for line in sample.wrap(write(f"--route={name}", *flags)[:-1], 40)]
        assert column[:len(alone)] == alone and not any(column[len(alone):])
    assert write("--route=big", *flags) != write("--route=small", *flags)


def test_prompts(write, encoding, out_dir, monkeypatch):
    """Empty: from <|endoftext|>, which is not printed. Left out: what suits the corpus."""
    prompts, generate = [], sample.generate

    def spy(model, idx, *rest):
        prompts.append(idx[0].tolist())
        return generate(model, idx, *rest)
    monkeypatch.setattr(sample, "generate", spy)
    write("--prompt=")
    write("--prompt=a<|endoftext|>")  # plain text, not the mark
    assert prompts[0] == [encoding.eot_token] and encoding.eot_token not in prompts[1]
    assert {"python", *data.DOWNLOADS} == set(sample.PROMPTS)
    for prompt in sample.PROMPTS.values():
        assert prompt and prompt == prompt.rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# the corpus of a run, and bad input

def spoil(path, what):
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.write_text("{")
    else:
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(saved | {"special": {data.EOT: 200}, "ranks": saved["ranks"][:200]}))


@pytest.mark.parametrize("what", ["missing", "damaged", "another vocabulary"])
def test_bad_vocabulary(out_dir, tmp_path, write, what):
    copy = shutil.copytree(out_dir, tmp_path / "copy")
    assert write(f"--out_dir={copy}") == write()  # a run can be moved, and needs no corpus
    spoil(copy / "tokenizer.json", what)
    with pytest.raises(UserError, match=what) as error:
        write(f"--out_dir={copy}")
    assert str(copy / "tokenizer.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag, words", [
    ("--out_dir=nowhere", "nowhere/ckpt.pt: no checkpoint here; make one with `python train.py"),
    ("--route=0121", "--route=0121: give big, small, random, or 12 digits"),
    ("--route=012121212123", "--route=012121212123: give big, small, random, or 12 digits"),
    ("--route=bgi", "--route=bgi: give big"),
    ("--temperature=-1", "--temperature=-1.0: must be 0 or more"),
    ("--temperature=nan", "--temperature=nan: must be 0 or more"),
    ("--temperature=hot", "--temperature: invalid float value: 'hot'"),
    ("--tokens=0", "--tokens=0: must be 1 or more"),
    ("--top_k=-2", "--top_k=-2: must be 0 or more"),
    ("--temprature=1", "unknown argument --temprature: did you mean --temperature?"),
    ("--preset=huge", "--preset=huge: choose from"),
    ("--device=abacus", "--device=abacus: choose"),
])
def test_bad_input(write, flag, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        write(flag)
    assert "\n" not in str(error.value)


def test_compare_takes_no_route(write):
    with pytest.raises(UserError, match="--route=small: --compare shows big and small"):
        write("--compare", "--route=small")


def test_baseline_is_noted(out_dir, tmp_path, write, capsys):
    """A dense baseline can be sampled, but its SMALL FFNs hold noise."""
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    checkpoint["train_config"]["train_route"] = "big"
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    shutil.copy(out_dir / "tokenizer.json", tmp_path)
    for flags, noted in (["--route=small"], True), (["--compare"], True), ([], False):
        sample.main([f"--out_dir={tmp_path}", "--device=cpu", "--tokens=2", *flags])
        assert ("its SMALL FFNs never learned" in capsys.readouterr().err) == noted


def test_exit_code(out_dir):
    script = str(Path(sample.__file__))
    done = subprocess.run([sys.executable, script, f"--out_dir={out_dir}", "--device=cpu", "--route=012"],
                          check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("sample.py: error: --route=012: give big, small, random, or 12 digits, one per layer of "
                           "this run: 0 skip, 1 small, 2 big\n")
