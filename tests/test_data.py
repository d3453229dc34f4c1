"""data.py: what becomes of a file, what is the same everywhere, and what bad input, damage and bad networks lead to."""
import ast
import functools
import http.server
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import user_error

import data

WORDS = ["alpha", "beta", "gamma", "delta", "loss", "model", "token", "route", "layer", "skip", "small", "big", "all"]
REAL_FILES = functools.cache(data.python_files)


def words(rng, n):
    return " ".join(rng.choices(WORDS, k=n))


def source_file(i):
    """A small module, different for each i, with a docstring at three levels and a comment."""
    rng = random.Random(i)
    return (f'"""Module {i}: {words(rng, 20)}."""\nimport os  # comment {i}\n\n\nclass Thing{i}:\n    """Thing '
            f'{words(rng, 9)}.\n\n    {words(rng, 9)}\n    """\n    value = {i}\n\n'
            f'    def {rng.choice(WORDS)}(self, x):\n        """Do {words(rng, 9)}."""\n'
            f'        return [x + {rng.randrange(999)}, self.{rng.choice(WORDS)}]\n')


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A python corpus of 60 made-up files; -> their folder. Add files to it, then call data.prepare()."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(60):
        (folder / f"m{i}.py").write_text(source_file(i))
    monkeypatch.setattr(data, "python_files", lambda: sorted(folder.glob("*.py")))
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder of 40 text files."""
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i in range(40):
        path = folder / ("deeper" if i % 2 else ".") / f"t{i}.txt"
        path.write_text(words(random.Random(i), 120) + f"\n\nend {i}\n")
    return folder


def tiny(tmp_path, corpus="python", name="data", **options):
    return data.prepare(str(corpus), data_dir=tmp_path / name, **({"vocab_size": 300} | options))


def text_of(corpus, tokens):
    return corpus.encoding.decode(tokens.tolist())


# ---------------------------------------------------------------------------------------------------------------------
# docstrings

CUT = [  # source, code, prose
    ('"""Doc."""\nx = 1\n', "x = 1\n", "Doc."),
    ('# top\n"""Doc."""  # noqa\nx = 1\n', "# top\n# noqa\nx = 1\n", "Doc."),
    ('"doc"; x = 1\n', "x = 1\n", "doc"),
    ('def f(): "doc"\n', "def f(): \n", "doc"),
    ('def f(): "doc"; return 1\n', "def f(): return 1\n", "doc"),
    ('é = "ü"\ndef ñ(ä="日本"): "döc"; return "é"\n', 'é = "ü"\ndef ñ(ä="日本"): return "é"\n', "döc"),
    ('@d\nasync def f():\n    """A.\n\n      B.\n    C.\n    """\n    await x\n', "@d\nasync def f():\n    await x\n",
     "A.\n\n  B.\nC."),
    ('class A:\n    "one"\n    def f(self):\n        r"""two\\d"""\n        def g():\n            "a"\n            x\n',
     "class A:\n    def f(self):\n        def g():\n            x\n", "one\n\ntwo\\d\n\na"),
    ('try:\n    pass\nfinally:\n    def f():\n        ("doc")\n        x = "not"\n',
     'try:\n    pass\nfinally:\n    def f():\n        x = "not"\n', "doc"),
    ('if a:\n    pass\nelif b:\n    class A:\n        "doc"\n        x = 1\n',
     "if a:\n    pass\nelif b:\n    class A:\n        x = 1\n", "doc"),
    ('match a:\n    case 1:\n        def f():\n            "doc"\n            x\n',
     "match a:\n    case 1:\n        def f():\n            x\n", "doc"),
    ('def f():\r\n    "doc"\r\n    return 1\r\n', "def f():\n    return 1\n", "doc"),
    ('\ufeff"doc"\nx = 1', "x = 1", "doc"),
    ('x = 1\n"not"\ndef f():\n    b"nor this"\n    f"or {x}"\n',
     'x = 1\n"not"\ndef f():\n    b"nor this"\n    f"or {x}"\n', None),
    ('def f():\n    "tail"', "def f():\n", "tail"),
    ('"a\\ud800b"\nx = 1\n', "x = 1\n", "ab"),  # half a surrogate pair is not text
    ('s = "\x0c"\nclass A:\n    "doc"\n    y = 1\n', 's = "\x0c"\nclass A:\n    y = 1\n', "doc"),
]


@pytest.mark.parametrize(("source", "code", "prose"), CUT)
def test_docstrings_are_cut_from_code_and_become_prose(tmp_path, source, code, prose):
    path = tmp_path / "m.py"
    path.write_bytes(source.encode())
    assert data.extract(path) == {"code": code, **({"prose": prose} if prose else {})}


def test_code_of_real_files_still_parses_and_keeps_comments():
    files = [path for path in REAL_FILES() if 5000 < path.stat().st_size < 20000]
    parsed = 0
    for path in random.Random(1).sample(files, 60):
        result = data.extract(path)
        if not isinstance(result, dict) or "code" not in result:
            continue
        comments = re.findall(r"^ *#.*", path.read_text("utf-8-sig"), re.MULTILINE)
        docstrings = [node.body[0].value.value for node in ast.walk(ast.parse(path.read_bytes()))
                      if isinstance(node, data.ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)]
        for comment in comments:
            assert comment in result["code"] or any(comment.strip() in text for text in docstrings)
        try:
            tree = ast.parse(result["code"])
        except SyntaxError as error:
            assert "indented block" in str(error)  # a body of nothing but a docstring
            continue
        parsed += 1
        if not any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body):
            assert ast.get_docstring(tree) is None
    assert parsed > 30


def test_files_left_out_and_counted(tmp_path, sources):
    (sources / "latin.py").write_bytes(b"x = '\xe9'\n")
    (sources / "broken.py").write_text("def f(:\n")
    (sources / "nul.py").write_bytes(b"x = 1\0\n")
    (sources / "deep.py").write_text("if x: pass\n" + "elif x: pass\n" * 1500)  # deeper than Python recurses
    (sources / "copy.py").write_text(source_file(3))
    (sources / "empty.py").write_text("")
    (sources / "other_docstring.py").write_text(source_file(3).replace("Module 3", "Module three"))  # the same code
    corpus = data.load(tiny(tmp_path))
    assert corpus.left_out == {"duplicate": 1, "duplicate document": 1, "not UTF-8": 1, "not parsed": 3}
    total = Counter()
    for name, count in corpus.counts.items():
        total[name.split("_")[1]] += count["documents"]
    assert total == {"code": 60, "prose": 61}


def test_the_pool_gives_the_same_documents(sources, monkeypatch):
    serial = data.python_documents(0)
    monkeypatch.setattr(data, "POOL_BYTES", 0)
    assert data.python_documents(0) == serial


def test_python_files_follow_the_requirements():
    names = {path.parts[-2] for path in REAL_FILES()}
    assert {"torch", "numpy", "sympy", "json", "asyncio"} <= names  # sympy: only torch asks for it
    assert not {"pip", "ruff"} & names
    assert not {"ipykernel", "nbclient"} & names  # for the notebook: below the comment of requirements.txt


# ---------------------------------------------------------------------------------------------------------------------
# split, sample, determinism

def test_documents_are_whole_shuffled_and_split_by_file(tmp_path, sources):
    corpus = data.load(tiny(tmp_path))
    found = {}
    for split in ("train", "val"):
        for domain in ("code", "prose"):
            tokens = getattr(corpus, split)[domain]
            assert tokens[-1] == corpus.eot
            pieces = text_of(corpus, tokens).split(data.EOT)[:-1]
            assert len(pieces) == corpus.counts[f"{split}_{domain}"]["documents"] == np.sum(tokens == corpus.eot)
            assert sum(len(piece.encode()) for piece in pieces) == corpus.counts[f"{split}_{domain}"]["bytes"]
            pattern = r"class Thing(\d+)" if domain == "code" else r"Module (\d+):"
            found[split, domain] = [int(re.search(pattern, piece)[1]) for piece in pieces]
    assert found["train", "code"] == found["train", "prose"] and found["val", "code"] == found["val", "prose"]
    train, val = found["train", "code"], found["val", "code"]
    assert not set(train) & set(val) and sorted(train + val) == list(range(60)) and val
    assert train != sorted(train)


def fake_documents(n, sizes=None):
    return sorted((data.sha256(str(i).encode()), {"text": "x" * (sizes[i] if sizes else 100)}) for i in range(n))


def test_validation_share():
    documents = fake_documents(20000)
    val = data.choose_validation(documents)
    assert 0.03 < len(val) / 20000 < 0.05
    assert val & {key for key, _ in documents[:5000]} == data.choose_validation(documents[:5000])  # a file stays
    keys = sorted(key for key, _ in documents)
    assert any(key > keys[15000] for key in val)  # the lot is not the order
    for n in (2, 3, 10, 30):  # small corpora get something too, and most stays in training
        assert 0 < len(data.choose_validation(fake_documents(n))) <= max(1, n // 5)
    for seed in range(20):  # one giant among small ones never leaves training
        documents = [(data.sha256(f"{seed} {i}".encode()), {"text": "x" * (9000 if i == 0 else 100)}) for i in range(9)]
        assert documents[0][0] not in data.choose_validation(documents)


def test_every_domain_gets_validation_text():
    for seed in range(20):  # only 5 of 200 files have prose
        documents = [(data.sha256(f"{seed} {i}".encode()), {"code": "x" * 100} | ({"prose": "y" * 50} if i < 5 else {}))
                     for i in range(200)]
        val = data.choose_validation(documents)
        held = sum("prose" in texts for key, texts in documents if key in val)
        assert 1 <= held <= 3 and len(val) < 40


def test_corpus_mb_keeps_a_random_sample_within_the_budget():
    sizes = {data.sha256(str(i).encode()): 1 + i * 37 % 1000 for i in range(5000)}
    kept = data.fill_budget(sizes, 1)
    assert 990_000 < sum(sizes[key] for key in kept) <= 1_000_000
    assert kept == sorted(kept) and data.fill_budget(sizes, 0) == sorted(sizes)
    equal = dict.fromkeys(sizes, 1000)
    assert set(data.fill_budget(equal, 1)) < set(data.fill_budget(equal, 2))


def test_two_prepares_are_bitwise_equal(tmp_path, sources):
    a, b = tiny(tmp_path, name="a"), tiny(tmp_path, name="b")
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(["meta.json", "tokenizer.json"] + [f"{s}_{d}.bin" for s in ("train", "val")
                                                              for d in ("code", "prose")])
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in files)
    fingerprint = data.load(a).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    (sources / "m0.py").write_text(source_file(0) + "# changed\n")
    assert data.load(tiny(tmp_path, name="c")).fingerprint != fingerprint
    assert data.load(tiny(tmp_path, name="b", vocab_size=299)).fingerprint != fingerprint


def test_real_python_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "python_files", REAL_FILES)
    folder = data.prepare(vocab_size=512, corpus_mb=1, data_dir=tmp_path)
    assert folder.name == "python_1mb_bpe512"
    line = r"prepared .*: \d+\.\d\dM tokens of \d\.\d MB, fingerprint \w{16}, in \d+ s\n"
    assert re.fullmatch(line, capsys.readouterr().out)
    corpus = data.load(folder)
    size = sum(count["bytes"] for count in corpus.counts.values())
    assert 800_000 < size <= 1_000_000 and corpus.domains == ["code", "prose"]
    assert all(count["bytes"] / count["tokens"] > 1.5 for count in corpus.counts.values())
    stamp = (folder / "meta.json").stat().st_mtime_ns
    assert data.prepare(vocab_size=512, corpus_mb=1, data_dir=tmp_path) == folder  # found, not made again
    assert (folder / "meta.json").stat().st_mtime_ns == stamp and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary

def test_tokenizer_round_trip(tmp_path, sources):
    folder = tiny(tmp_path)
    corpus, again = data.load(folder), data.load(folder)
    rng = random.Random(0)
    samples = ["", "a" + data.EOT + "b", data.EOT, " " * 1_000_000, " " * 1_000_000 + "x", "\n" * 5000, "\t\n " * 3000,
               "a" * 50_000, "=" * 50_000, "1" * 50_000, "\u2003" * 5000, "é日本🙂\x00\x85\u2028\r\n\r", source_file(1),
               *("".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
                         for _ in range(200)) for _ in range(200))]
    for text in samples:
        ids = corpus.encoding.encode_ordinary(text)
        assert corpus.encoding.decode(ids) == text
        assert ids == again.encoding.encode_ordinary(text) and corpus.eot not in ids
        assert sum(corpus.token_bytes[ids]) == len(text.encode())
    assert corpus.vocab_size == corpus.encoding.n_vocab == len(corpus.token_bytes) == 300
    assert corpus.eot == 299 and corpus.token_bytes[299] == 0 and corpus.token_bytes.dtype == np.int64
    assert corpus.encoding.encode(data.EOT, allowed_special="all") == [299]


def test_literal_endoftext_in_a_document_is_ordinary_text(tmp_path, texts):
    for path in texts.glob("*.txt"):
        path.write_text(path.read_text() + data.EOT + "more")
    corpus = data.load(tiny(tmp_path, texts))
    for split in ("train", "val"):
        assert np.sum(getattr(corpus, split)["text"] == corpus.eot) == corpus.counts[f"{split}_text"]["documents"]


def test_pattern_suits_code():
    ranks = [bytes([i]) for i in range(256)]
    pieces = tiktoken.Encoding("x", pat_str=data.PATTERN, special_tokens={}, mergeable_ranks={
        token: i for i, token in enumerate(ranks + [b"\n        ", b" x", b".y", b"123", b"_z", b"):", b"\n    "])})
    ids = pieces.encode_ordinary("):\n        return x.y_z + 1234\n\n")
    tokens = [pieces.decode([i]) for i in ids]
    assert tokens[:2] == ["):", "\n        "] and {" x", ".y", "_z", "123"} <= set(tokens)


def test_vocabulary_sees_training_text_only(tmp_path, sources, monkeypatch):
    files = sorted(sources.glob("*.py"))
    monkeypatch.setattr(data, "choose_validation", lambda _: {data.sha256(path.read_bytes()) for path in files[:5]})
    before = data.load(tiny(tmp_path, name="before"))
    for path in files[:5]:
        path.write_text(path.read_text() + "zyzzyva = 'zyzzyva'\n" * 200)
    after = data.load(tiny(tmp_path, name="after"))
    assert "zyzzyva" in text_of(after, after.val["code"]) and "zyzzyva" not in text_of(after, after.train["code"])
    assert before.encoding._mergeable_ranks == after.encoding._mergeable_ranks
    files[9].write_text(files[9].read_text() + "zyzzyva = 'zyzzyva'\n" * 200)  # in training text the word is learned
    learned = data.load(tiny(tmp_path, name="learned"))
    assert b"zyzzyva" in learned.encoding._mergeable_ranks


@pytest.mark.parametrize(("options", "parts"), [
    ({"vocab_size": 60000}, ["--vocab_size=60000", "too small"]),
    ({"vocab_size": 65536}, ["--vocab_size=65536", "65535"]),
    ({"vocab_size": 256}, ["--vocab_size=256", "257"]),
    ({"tokenizer": "gpt4"}, ["--tokenizer=gpt4", "bpe or gpt2"]),
    ({"corpus_mb": -1}, ["--corpus_mb=-1"]),
])
def test_bad_options(tmp_path, sources, options, parts):
    user_error(lambda: tiny(tmp_path, **options), *parts)
    assert not list((tmp_path / "data").glob("*"))  # nothing half-made stays


def test_gpt2_tokenizer(tmp_path, texts, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    user_error(lambda: tiny(tmp_path, texts, tokenizer="gpt2"), "--tokenizer=gpt2", "--tokenizer=bpe")
    ranks = {bytes([i]): i for i in range(256)} | {b" token": 256}
    stand_in = tiktoken.Encoding("gpt2", pat_str=data.PATTERN, mergeable_ranks=ranks, special_tokens={data.EOT: 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    corpus = data.load(tiny(tmp_path, texts, tokenizer="gpt2"))
    assert corpus.name.endswith("_gpt2") and corpus.vocab_size == 258 and 256 in corpus.train["text"]
    (texts / "t0.txt").write_text("edited " * 30)  # the same vocabulary, other text: the fingerprint tells them apart
    assert data.load(tiny(tmp_path, texts, tokenizer="gpt2")).fingerprint != corpus.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# damage

def damage_header(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset:offset + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(("harm", "part"), [
    (lambda path: damage_header(path, 0, b"notduo"), "not a nanoduo token file"),
    (lambda path: damage_header(path, 8, b"\x63"), "version 99"),
    (lambda path: damage_header(path, 16, b"\x00\x00\x00\x00"), "another vocabulary"),
    (lambda path: damage_header(path, 48, b"\xff\xff"), "its header promises"),
    (lambda path: damage_header(path, 48, bytes(8)), "its header promises"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "its header promises"),
    (lambda path: path.write_bytes(path.read_bytes()[:-2]), "its header promises"),
    (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "its header promises"),
    (lambda path: path.write_bytes(path.read_bytes()[:20]), "within its header"),
    (lambda path: path.write_bytes(b""), "within its header"),
    (lambda path: path.unlink(), "missing"),
])
def test_damaged_token_file(tmp_path, texts, harm, part):
    folder = tiny(tmp_path, texts)
    data.load(folder)
    harm(folder / "val_text.bin")
    user_error(lambda: data.load(folder), folder / "val_text.bin", part, f"delete the folder {folder}")


def test_damaged_json(tmp_path, texts):
    folder = tiny(tmp_path, texts)
    for name in ("meta.json", "tokenizer.json"):
        good = (folder / name).read_bytes()
        for bad in (good[:-5], b"", b"{}", b"\xff"):
            (folder / name).write_bytes(bad)
            user_error(lambda: data.load(folder), folder, "delete the folder")
        (folder / name).unlink()
        user_error(lambda name=name: data.load(folder), folder / name, "delete the folder")
        (folder / name).write_bytes(good)
    saved = json.loads(good)
    saved["ranks"][-1], saved["ranks"][-2] = saved["ranks"][-2], saved["ranks"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    user_error(lambda: data.load(folder), "another vocabulary")
    user_error(lambda: data.load(tmp_path / "nowhere"), tmp_path / "nowhere", "python data.py")


def test_crash_in_the_middle_leaves_nothing(tmp_path, texts, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    for name in ("train_bpe", "write_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(data, name, crash)
            with pytest.raises(KeyboardInterrupt):
                tiny(tmp_path, texts)
        assert list((tmp_path / "data").iterdir()) == []
    data.load(tiny(tmp_path, texts))  # and the next call makes it whole


def test_kill_in_the_middle_leaves_nothing_that_loads(tmp_path, texts):
    script = ("import os, sys, data\nwrite = data.write_tokens\n"
              "data.write_tokens = lambda *a: os._exit(9) if 'val' in str(a[0]) else write(*a)\n"
              f"data.prepare({str(texts)!r}, vocab_size=300, data_dir={str(tmp_path / 'data')!r})\n")
    result = subprocess.run([sys.executable, "-c", script], cwd=Path(data.__file__).parent, check=False)
    assert result.returncode == 9
    (left,) = (tmp_path / "data").iterdir()
    assert left.name.endswith(".tmp")
    user_error(lambda: data.load(left))
    data.load(tiny(tmp_path, texts))


def test_a_folder_of_the_user_is_not_overwritten(tmp_path, sources):
    mine = tmp_path / "data" / "python_bpe300"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("x")
    user_error(lambda: tiny(tmp_path), mine, "move it away")
    assert (mine / "thesis.txt").read_text() == "x"


def test_another_process_was_faster(tmp_path, texts, monkeypatch):
    build = data.build

    def slow_build(*args):
        monkeypatch.setattr(data, "build", build)
        tiny(tmp_path, texts)
        return build(*args)

    monkeypatch.setattr(data, "build", slow_build)
    folder = tiny(tmp_path, texts)
    data.load(folder)
    assert list((tmp_path / "data").iterdir()) == [folder]


# ---------------------------------------------------------------------------------------------------------------------
# --corpus=PATH

def test_text_folder(tmp_path, texts):
    (texts / ".hidden").write_text("hidden secret")
    (texts / "picture.png").write_bytes(b"\x89PNG\0\0")
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    folder = tiny(tmp_path, texts)
    corpus = data.load(folder)
    assert re.fullmatch(r"texts-[0-9a-f]{8}_bpe300", folder.name) and corpus.domains == ["text"]
    assert corpus.left_out == {"not text": 2}
    everything = text_of(corpus, np.concatenate([corpus.train["text"], corpus.val["text"]]))
    assert "hidden" not in everything
    assert sorted(everything.split(data.EOT)[:-1]) == sorted(path.read_text() for path in texts.rglob("t*.txt"))
    (texts / "t0.txt").write_text("edited " * 30)
    edited = tiny(tmp_path, texts)
    assert edited != folder and "edited" in text_of(data.load(edited), data.load(edited).train["text"])


@pytest.mark.parametrize("newline", ["\n", "\n\n", " "])
def test_single_file_is_cut_into_documents(tmp_path, newline):
    path = tmp_path / "my notes.v2.txt"
    path.write_text(newline.join(words(random.Random(i), 30) + f" {i}." for i in range(3000)))
    corpus = data.load(tiny(tmp_path, path))
    counts = corpus.counts
    assert counts["train_text"]["bytes"] + counts["val_text"]["bytes"] == path.stat().st_size
    documents = counts["train_text"]["documents"] + counts["val_text"]["documents"]
    assert 1 <= path.stat().st_size / documents / data.CHUNK * 1.5 <= 3
    pieces = text_of(corpus, corpus.train["text"]).split(data.EOT)[:-1] + text_of(corpus, corpus.val["text"]).split(
        data.EOT)[:-1]
    assert sum(not piece.endswith(newline) for piece in pieces) <= 1 or newline == " "
    assert 0.01 < counts["val_text"]["bytes"] / path.stat().st_size < 0.2
    assert corpus.name.startswith("my-notes.v2-")


def test_corpus_mb_on_text(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(words(random.Random(i), 30) + f" {i}." for i in range(15000)))
    assert path.stat().st_size > 2e6
    corpus = data.load(tiny(tmp_path, path, corpus_mb=1))
    assert "_1mb_" in corpus.name and 0.95e6 < sum(count["bytes"] for count in corpus.counts.values()) <= 1e6


def test_bad_paths(tmp_path):
    def prepare(name):
        return lambda: tiny(tmp_path, tmp_path / name)

    user_error(prepare("nowhere"), f"--corpus={tmp_path / 'nowhere'}", "no such file", "python")
    user_error(lambda: tiny(tmp_path, ""), "--corpus=", "no such file")
    (tmp_path / "empty").mkdir()
    user_error(prepare("empty"), "no text in this folder")
    (tmp_path / "empty" / "x.bin").write_bytes(b"\0\1")
    user_error(prepare("empty"), "no text in this folder", "1 binary")
    (tmp_path / "nul.txt").write_bytes(b"text\0text" * 9999)
    user_error(prepare("nul.txt"), "nul.txt", "binary")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 9999)
    user_error(prepare("latin.txt"), "latin.txt", "binary")
    (tmp_path / "short.txt").write_text("too short\n" * 5)
    user_error(prepare("short.txt"), "short.txt", "too little text", "bytes")
    (tmp_path / "nothing.txt").write_text("")
    user_error(prepare("nothing.txt"), "too little text (0 bytes")
    (tmp_path / "same.txt").write_text("\n" * 99999)
    user_error(prepare("same.txt"), "too little text")


# ---------------------------------------------------------------------------------------------------------------------
# downloads, from a server on this machine

GOOD = b"".join(b"line %d of a small play\n" % i for i in range(20000))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({"/missing": 404, "/error": 500, "/created": 201}.get(self.path, 200))
        body = b"<html>Please log in</html>" if self.path in ("/login", "/missing") else GOOD
        body = GOOD + b"more" if self.path == "/longer" else GOOD[:-1] + b"?" if self.path == "/changed" else body
        if self.path != "/no_length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in ("/broken", "/stalled"):
            self.wfile.write(body[:1000])
            self.wfile.flush()
            time.sleep(1.5 if self.path == "/stalled" else 0)
        elif self.path == "/no_length":
            self.wfile.write(body[:1000])
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TIMEOUT", 0.5)


def test_download(tmp_path, server, local):
    data.download(f"{server}/good", tmp_path / "play.txt", len(GOOD), data.sha256(GOOD))
    assert (tmp_path / "play.txt").read_bytes() == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["play.txt"]


@pytest.mark.parametrize(("page", "part"), [
    ("missing", "404"), ("error", "500"), ("created", "201"), ("login", "bytes arrived"), ("broken", "1000 bytes"),
    ("no_length", "1000 bytes"), ("longer", "expected"), ("changed", "sha256"), ("stalled", "cannot be downloaded")])
def test_bad_download_leaves_no_file(tmp_path, server, local, page, part):
    url = f"{server}/{page}"
    path, digest = tmp_path / "play.txt", data.sha256(GOOD)
    user_error(lambda: data.download(url, path, len(GOOD), digest), url, part, "--corpus=python")
    assert list(tmp_path.iterdir()) == []


def test_offline(tmp_path, local):
    url = "http://127.0.0.1:9/play.txt"  # nobody listens there
    path = tmp_path / "play.txt"
    user_error(lambda: data.download(url, path, 9, "x"), url, "cannot be downloaded", "--corpus=python")
    assert list(tmp_path.iterdir()) == []


def test_named_corpora(tmp_path, server, local, monkeypatch):
    stories = data.EOT.join(f"\nStory {i}: {words(random.Random(i), 40)}.\n" for i in range(300)).encode()
    monkeypatch.setattr(data, "DOWNLOADS", {
        "tinyshakespeare": (f"{server}/good", len(GOOD), data.sha256(GOOD)),
        "tinystories": (f"{server}/missing", len(stories), data.sha256(stories))})
    corpus = data.load(tiny(tmp_path, "tinyshakespeare"))
    assert corpus.name == "tinyshakespeare_bpe300" and corpus.domains == ["text"]
    assert sum(count["bytes"] for count in corpus.counts.values()) == len(GOOD)
    user_error(lambda: tiny(tmp_path, "tinystories"), "404")
    assert not list((tmp_path / "data").glob("tinystories*"))
    path = tmp_path / "data" / "tinystories.txt"
    path.write_text("my own stories")
    user_error(lambda: tiny(tmp_path, "tinystories"), path, "move it away")
    assert path.read_text() == "my own stories"
    path.write_bytes(stories)
    corpus = data.load(tiny(tmp_path, "tinystories"))
    assert sum(count["documents"] for count in corpus.counts.values()) == 300
    assert text_of(corpus, corpus.train["text"][:9]).startswith("Story ")


# ---------------------------------------------------------------------------------------------------------------------
# batches

def made_up(train, val, vocab_size=50):
    return data.Corpus(Path("data/made_up"), "made_up", list(train), train, val, None, vocab_size, None, "", 0, {}, {})


def test_sample_batch():
    corpus = made_up({"code": np.arange(100, dtype="<u2"), "prose": np.arange(1000, 1030, dtype="<u2")}, {})
    x, y = data.sample_batch(corpus, 4000, 8, seed=3)
    assert x.shape == y.shape == (4000, 8) and str(x.dtype) == str(y.dtype) == "torch.int64"
    assert (y == x + 1).all()  # consecutive, so that no window crosses from code into prose
    starts = Counter(x[:, 0].tolist())
    assert set(starts) == set(range(92)) | set(range(1000, 1022))  # every place, the last ones too
    assert max(starts.values()) < 75  # 35 each on average
    assert all((a == b).all() for a, b in zip((x, y), data.sample_batch(corpus, 4000, 8, seed=3)))
    assert (x != data.sample_batch(corpus, 4000, 8, seed=4)[0]).any()
    domain, start = data.window_starts(corpus, 4000, 8, seed=3)
    assert (x[:, 0].numpy() == start + 1000 * domain).all()
    short = made_up({"code": np.arange(100, dtype="<u2"), "prose": np.arange(8, dtype="<u2")}, {})
    assert set(data.window_starts(short, 500, 8, 1)[0]) == {0}  # a domain shorter than a window is never drawn
    user_error(lambda: data.sample_batch(short, 4, 100, 1), "100 training tokens", "--block_size=100")
    assert data.sample_batch(short, 4, 99, 1)[0].shape == (4, 99)


@pytest.mark.parametrize(("length", "n", "block_size"),
                         [(101, 10, 10), (101, 3, 10), (109, 10, 10), (1000, 7, 9), (11, 1, 10)])
def test_eval_windows(length, n, block_size):
    corpus = made_up({}, {"code": np.arange(length, dtype="<u2")})
    x, y = data.eval_windows(corpus, "code", n, block_size)
    assert x.shape == (n, block_size) and (y == x + 1).all()
    assert len(set(x.flatten().tolist())) == n * block_size  # no overlap
    steps = np.diff(x[:, 0].numpy())
    assert n == 1 or steps.max() - steps.min() <= 1
    holds = (length - 1) // block_size
    user_error(lambda: data.eval_windows(corpus, "code", holds + 1, block_size), f"holds {holds} ", "--block_size")


# ---------------------------------------------------------------------------------------------------------------------
# bigram model

def slow_bigram(pairs, vocab_size):
    """The same model with dictionaries, straight from the definition."""
    count, after, before = Counter(pairs), defaultdict(set), defaultdict(set)
    for a, b in pairs:
        after[a].add(b)
        before[b].add(a)

    def discount(counts):
        counts = list(counts)
        return counts.count(1) / (counts.count(1) + 2 * counts.count(2))

    D, E = discount(count.values()), discount(map(len, before.values()))

    def q(b):
        return (max(len(before.get(b, ())) - E, 0) + E * len(before) / vocab_size) / len(count)

    def p(a, b):
        total = sum(n for (first, _), n in count.items() if first == a)
        return (max(count[a, b] - D, 0) + D * len(after[a]) * q(b)) / total if total else q(b)

    return p


def zipf_tokens(seed, n, vocab_size):
    draws = np.random.default_rng(seed).zipf(1.5, n) - 1
    return np.minimum(draws, vocab_size - 3).astype("<u2")  # two ids are never used


def test_bigram_is_a_distribution_and_equals_the_slow_version():
    V = 40
    tokens = zipf_tokens(0, 600, V).astype(np.int64)
    p = data.fit_bigram(tokens[:-1] * V + tokens[1:], V)
    slow = slow_bigram(list(zip(tokens[:-1].tolist(), tokens[1:].tolist())), V)
    b = np.arange(V)
    for a in range(V):
        row = p(np.full(V, a), b)
        assert abs(row.sum() - 1) < 1e-12 and (row > 0).all()
        np.testing.assert_allclose(row, [slow(a, i) for i in range(V)], rtol=1e-12)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 1, 1, 1], [1, 2] * 50])
def test_bigram_of_hardly_anything_is_still_a_distribution(tokens):
    tokens = np.array(tokens, np.int64)
    p = data.fit_bigram(tokens[:-1] * 5 + tokens[1:], 5)
    for a in range(5):
        row = p(np.full(5, a), np.arange(5))
        assert abs(row.sum() - 1) < 1e-12 and (row > 0).all()


def test_bigram_loss_uses_what_was_seen():
    V = 40
    train = {"code": zipf_tokens(1, 500, V), "prose": zipf_tokens(2, 300, V)}
    val = {"code": zipf_tokens(3, 200, V), "prose": zipf_tokens(4, 100, V)}
    seen = {domain: np.random.default_rng(5).random(len(tokens)) < 0.8 for domain, tokens in train.items()}
    pairs = [(int(t[i]), int(t[i + 1]))
             for d, t in train.items() for i in range(len(t) - 1) if seen[d][i] and seen[d][i + 1]]
    windows = {domain: [torch.from_numpy(part.astype(np.int64)) for part in (t[:-1], t[1:])]
               for domain, t in val.items()}
    slow, losses = slow_bigram(pairs, V), data.bigram_loss(made_up(train, val, V), seen, windows)
    for domain, t in val.items():
        expected = np.mean([-np.log(slow(int(t[i]), int(t[i + 1]))) for i in range(len(t) - 1)])
        assert losses[domain] == pytest.approx(expected, rel=1e-12)


def test_bigram_at_the_size_of_gpt2():
    train = {"text": zipf_tokens(1, 200_000, 50257)}
    val = {"text": zipf_tokens(2, 300_000, 50257)}
    corpus = made_up(train, val, 50257)
    windows = {"text": data.eval_windows(corpus, "text", 1000, 256)}
    loss = data.bigram_loss(corpus, {"text": np.ones(200_000, bool)}, windows)
    assert 1 < loss["text"] < np.log(50257)


# ---------------------------------------------------------------------------------------------------------------------
# command line

def test_command_line(tmp_path, texts):
    def command(*flags):
        return subprocess.run([sys.executable, Path(data.__file__), *flags, f"--data_dir={tmp_path / 'data'}"],
                              capture_output=True, text=True, check=False)

    result = command(f"--corpus={texts}", "--preset=debug", "--vocab_size=300", "--corpus_mb=0")
    assert result.returncode == 0 and result.stderr == ""
    assert "train_text" in result.stdout and "bytes/token" in result.stdout and "fingerprint" in result.stdout
    result = command(f"--corpus={tmp_path / 'nowhere'}")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("data.py: error: --corpus=") and result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# a domain that no base has been trained on

@pytest.fixture
def headers(tmp_path, monkeypatch):
    """50 made-up headers as torch's; -> their folder (of the package, with include/ in it)"""
    folder = tmp_path / "torch"
    (folder / "include" / "ATen" / "ops").mkdir(parents=True)
    for i in range(50):
        text = f"#pragma once\n// {words(random.Random(i), 40)}\nint f{i}(int x);\n"
        (folder / "include" / ("ATen" if i % 2 else ".") / f"h{i}.h").write_text(text)
    (folder / "include" / "ATen" / "ops" / "generated.h").write_text("generated from a template")
    (folder / "include" / "copy.h").write_bytes((folder / "include" / "h0.h").read_bytes())
    (folder / "include" / "latin.h").write_bytes(b"// caf\xe9\n")
    monkeypatch.setattr(data.torch, "__file__", str(folder / "__init__.py"))
    return folder


def test_extra_domain(tmp_path, sources, headers):
    corpus = data.load(tiny(tmp_path))
    before = {path.name: path.read_bytes() for path in corpus.folder.iterdir()}
    train, val, fingerprint = data.extra_domain("cpp", corpus)
    files = {split: text_of(corpus, tokens).split(data.EOT)[:-1] for split, tokens in (("train", train), ("val", val))}
    assert not set(files["train"]) & set(files["val"])  # disjoint by file
    assert sorted(files["train"] + files["val"]) == sorted(path.read_text() for path in headers.rglob("h*.h"))
    assert 1 <= len(files["val"]) <= 10
    assert {path.name: path.read_bytes() for path in corpus.folder.iterdir() if path.is_file()} == before
    headers.joinpath("include", "h0.h").write_text("changed")
    again = data.extra_domain("cpp", corpus)  # kept, not made again
    assert again[2] == fingerprint and again[0].tolist() == train.tolist()
    (corpus.folder / "extra_cpp").rename(tmp_path / "old")
    assert data.extra_domain("cpp", corpus)[2] != fingerprint
    assert json.loads((corpus.folder / "extra_cpp" / "meta.json").read_text())["torch"] == torch.__version__


def test_extra_domain_is_capped(tmp_path, sources, headers, monkeypatch):
    corpus = data.load(tiny(tmp_path))
    monkeypatch.setattr(data, "EXTRA_MB", 0.004)
    assert 2000 < sum(len(text_of(corpus, tokens)) for tokens in data.extra_domain("cpp", corpus)[:2]) < 4800


def test_extra_domain_that_cannot_be(tmp_path, sources, headers, monkeypatch):
    corpus = data.load(tiny(tmp_path))
    user_error(lambda: data.extra_domain("java", corpus), "java", "choose from cpp")
    monkeypatch.setattr(data, "write_tokens", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.extra_domain("cpp", corpus)
    assert not list(corpus.folder.glob("extra*"))  # a crash leaves nothing
    (corpus.folder / "extra_cpp").mkdir()
    user_error(lambda: data.extra_domain("cpp", corpus), "extra_cpp", "delete it")
    (corpus.folder / "extra_cpp").rmdir()
    for path in headers.rglob("*.h"):
        path.unlink()
    user_error(lambda: data.extra_domain("cpp", corpus), headers / "include", "install torch")
