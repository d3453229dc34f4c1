"""Stage 0: from text to tokens, with no download. The default corpus is the Python source that is installed anyway.

    python data.py                        # prepare the corpus of the preset that fits this machine, print a table
    python data.py --corpus=my_notes.txt  # any text file or folder; also tinyshakespeare and tinystories (downloads)

    files -> documents {domain: text} -> train | val by content hash -> vocabulary (train only) -> uint16 token files

A `.py` file gives two documents: `code`, the source with its docstrings cut out, and `prose`, those docstrings.
"""
import ast
import base64
import contextlib
import gc
import hashlib
import http.client
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch
from tqdm import tqdm

from common import UserError, arg, parse_config, run, write_atomic

EOT = "<|endoftext|>"
# How text is cut before merging: a word with the one sign before it (" x", ".x", "_x"), up to 3 digits, signs, newlines
# with the indentation that follows, spaces. Indentation is one token, and a line can end in a prompt ("def f(x):") just
# as it does in training. The cap of 256 is for the regex engine, whose stack overflows on a million spaces in a row.
PATTERN = (r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++|[\r\n]{1,256}+[ \t]{0,256}+|[ \t]{1,256}(?!\S)"
           r"|\s{1,256}+")
HEADER = struct.Struct("<8sQ32sQ")  # magic, version, sha256 of tokenizer.json, number of tokens
MAGIC, VERSION = b"nanoduo\0", 1
ADOPTED = "llama-"  # begins the name of a pretrained model's tokenizer, which retrofit.py keeps in data_dir
SPLIT_RULE = 1  # raise it when choose_validation or extract changes: it is part of the fingerprint
VAL_SHARE, VAL_LEAST, VAL_MOST = 0.04, 0.02, 0.2
BPE_SAMPLE = 30_000_000  # bytes of training text: more changes hardly any merge
MIN_BYTES, CHUNK = 4096, 16384  # the least text worth splitting; a single file is cut into documents of about CHUNK
POOL_BYTES = 40_000_000  # more source than this is parsed by several processes; less takes under 10 s
EXTRA_MB = 6  # of an extra domain: 2 to 3M tokens
TIMEOUT = 30  # seconds without a byte before a download is given up
HUGGING_FACE = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
DOWNLOADS = {  # name: url, bytes, sha256
    "tinyshakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                        1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": (f"{HUGGING_FACE}/TinyStoriesV2-GPT4-valid.txt",
                    22502601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
}
PRESETS = {
    "cpu": {"vocab_size": 1024, "corpus_mb": 20},
    "gpu": {"vocab_size": 4096, "corpus_mb": 0},
    "debug": {"vocab_size": 512, "corpus_mb": 1},
}


@dataclass
class DataConfig:
    corpus: str = arg("python", "python, tinyshakespeare, tinystories, or the path of a text file or folder")
    tokenizer: str = arg("bpe", "bpe: a vocabulary trained on this corpus; gpt2: GPT-2's, which tiktoken downloads")
    vocab_size: int = arg(4096, "entries of the bpe vocabulary, <|endoftext|> included")
    corpus_mb: int = arg(0, "keep only so many MB of source, a random but reproducible sample; 0 keeps all")
    data_dir: str = arg("data", "folder that holds the prepared corpora")
    preset: str = arg("auto", "cpu, gpu, debug, or auto: by the device")
    device: str = arg("auto", "only decides what --preset=auto means")
    out_dir: str = arg("out", "not used here: a corpus belongs to --data_dir, not to a run")
    seed: int = arg(1, "not used here: the order and the split follow from the text itself")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def progress(items, what, total=None):
    return tqdm(items, what, total, disable=None, leave=False)  # disable=None: no bar in a log file


# ---------------------------------------------------------------------------------------------------------------------
# the python corpus: what is installed anyway

def python_files():
    """-> sorted list of the .py files of the standard library, of requirements.txt (down to its first comment: what
    only the notebook needs is no text to learn from) and of all that those require."""
    files = set()
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        files |= {path for path in Path(root).rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts)}
    todo, done = Path(__file__).with_name("requirements.txt").read_text().partition("#")[0].splitlines(), set()
    while todo:
        requirement = todo.pop()  # such as: numpy>=1.23; python_version < "3.12"
        name = re.match(r"\s*([\w.-]*)", requirement)[1].lower().replace("_", "-")
        if not name or name in done or "extra ==" in requirement:
            continue
        done.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # required only on other systems
            continue
        files |= {Path(package.locate_file(file)) for file in package.files or [] if file.suffix == ".py"}
        todo += package.requires or []
    return sorted(path for path in files if path.is_file())


def extract(path):
    """A .py file -> {domain: text}, empty for an empty file, or the reason (str) to leave it out."""
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is so many objects that looking for cycles among them would double the time
    try:
        source = Path(path).read_bytes().decode("utf-8-sig")
        source = source.replace("\r\n", "\n").replace("\r", "\n")  # the line ends that ast counts, and no others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: invalid escape sequence, say
            nodes = list(find_docstrings(ast.parse(source)))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not parsed"
    finally:
        if collecting:
            gc.enable()
    prose = "\n\n".join(filter(None, (inspect.cleandoc(node.value.value) for node in nodes)))
    prose = prose.encode("utf-8", "ignore").decode()  # "\ud800" in a docstring is a lone surrogate: no text
    texts = {"code": cut_docstrings(source, nodes), "prose": prose}
    return {domain: text for domain, text in texts.items() if text.strip()}


def find_docstrings(node):
    """Yield the docstring statements under an ast node, in source order. (ast.walk also visits every expression, and
    takes longer than parsing.)"""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
        yield node.body[0]
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for statement in getattr(node, field, ()):
            yield from find_docstrings(statement)


def cut_docstrings(source, nodes):
    """Cut the spans of `nodes` (statements in source order) out of the source; a line that this
    empties goes too, comments stay."""
    text = source.encode()
    line_start = [0]  # byte offset of each line, because col_offset counts bytes
    for line in text.split(b"\n"):
        line_start.append(line_start[-1] + len(line) + 1)
    pieces, end = [], 0
    for node in nodes:
        start = line_start[node.lineno - 1] + node.col_offset
        stop = line_start[node.end_lineno - 1] + node.end_col_offset
        stop = re.compile(rb"[ \t]*(;[ \t]*)?").match(text, stop).end()  # `"doc"; x = 1` keeps x = 1
        line = text.rfind(b"\n", 0, start) + 1
        if not text[line:start].strip() and text[stop:stop + 1] in (b"\n", b""):
            start, stop = line, stop + 1
        pieces.append(text[end:start])
        end = stop
    return b"".join(pieces + [text[end:]]).decode()


def python_documents(corpus_mb):
    """-> sorted list of (content hash, {domain: text}), Counter of files left out by reason."""
    files, sizes, left_out = {}, {}, Counter()
    for path in progress(python_files(), "reading"):
        content = path.read_bytes()
        key = sha256(content)
        left_out["duplicate"] += key in files
        files[key], sizes[key] = str(path), len(content)
    keys = fill_budget(sizes, corpus_mb)
    paths = [files[key] for key in keys]
    if sum(sizes[key] for key in keys) < POOL_BYTES:
        results = [extract(path) for path in progress(paths, "parsing")]
    else:  # ast.parse makes 5 to 8 MB/s and holds the interpreter lock, so threads would not help
        workers = min(os.cpu_count() or 1, 8)
        quiet = (signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C only the parent speaks
        with multiprocessing.Pool(workers, signal.signal, quiet) as pool:
            results = list(progress(pool.imap(extract, paths, chunksize=64), "parsing", len(paths)))
    left_out.update(result for result in results if isinstance(result, str))
    return [(key, result) for key, result in zip(keys, results) if isinstance(result, dict) and result], left_out


# ---------------------------------------------------------------------------------------------------------------------
# any other text

def read_texts(corpus):
    """Path of a text file or a folder of them -> list of bytes, number of files left out because they hold no text."""
    flag, path = f"--corpus={corpus}", Path(corpus)
    if not corpus or not path.exists():
        raise UserError(f"{flag}: no such file or folder; give a path, or python, {', '.join(DOWNLOADS)}")
    visible = [file for file in sorted(path.rglob("*")) if not any(p[0] == "." for p in file.relative_to(path).parts)]
    contents, binary = [], 0
    for file in [path] if path.is_file() else [file for file in visible if file.is_file()]:
        try:
            content = file.read_bytes()
            content.decode()
        except OSError as error:
            raise UserError(f"{flag}: cannot read {file}: {error.strerror}; move it away") from None
        except UnicodeDecodeError:
            content = b"\0"
        binary += b"\0" in content
        contents += [] if b"\0" in content else [content]
    if not contents:
        what = f"no text in this folder ({binary} binary files)" if path.is_dir() else "a binary file, not UTF-8"
        raise UserError(f"{flag}: {what}; give a UTF-8 text file or a folder of them")
    return contents, binary


def text_documents(contents, separator, corpus_mb):
    """list of bytes -> sorted list of (content hash, {"text": text}). A single file is cut into many documents, so that
    it can be split: at `separator` where it has one, else every 16 kB (5% if short) at a blank line or line end."""
    texts = [content.decode() for content in contents]
    if separator and len(texts) == 1:
        texts = [part.strip() for part in texts[0].split(separator)]
    elif len(texts) == 1:
        text, texts, start = texts[0], [], 0
        size = max(1, min(CHUNK, len(text) // 20))
        while start < len(text):
            middle, end = start + size // 2, start + size
            cuts = [text.rfind(sign, middle, end) + len(sign) for sign in ("\n\n", "\n") if sign in text[middle:end]]
            stop = cuts[0] if cuts and end < len(text) else end
            texts.append(text[start:stop])
            start = stop
    documents = {sha256(text.encode()): text for text in texts if text.strip()}  # exact duplicates fall together
    keys = fill_budget({key: len(text.encode()) for key, text in documents.items()}, corpus_mb)
    left_out = Counter(duplicate=sum(bool(text.strip()) for text in texts) - len(documents))
    return [(key, {"text": documents[key]}) for key in keys], left_out


def receive(url):
    """Yield the bytes at the url in pieces. Raises UserError for an error page, no network, a stalled server."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            if response.status != 200:
                raise UserError(f"{url}: the server answered {response.status}; try later, or use --corpus=python")
            while piece := response.read(1 << 16):
                yield piece
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code}; try later, or use --corpus=python") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); go online, or use --corpus=python") from None


def download(url, path, size, digest):
    """Fetch the url into the file `path`, which appears only if `size` (bytes) and sha256 `digest` are right."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    total, hasher = 0, hashlib.sha256()
    try:
        with open(temporary, "wb") as file, tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
            for piece in receive(url):
                total += file.write(piece)
                hasher.update(piece)
                bar.update(len(piece))
                if total > size:
                    break
        if total != size or hasher.hexdigest() != digest:
            what = f"{total} bytes arrived, {size} expected" if total != size else "its sha256 is not the expected one"
            raise UserError(f"{url}: {what}: broken off or changed, nothing is kept; try again or use --corpus=python")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_download(name, data_dir):
    """-> the bytes of a corpus in DOWNLOADS, fetched into data_dir at the first use."""
    url, size, digest = DOWNLOADS[name]
    path = data_dir / f"{name}.txt"
    if not path.exists():
        download(url, path, size, digest)
    content = path.read_bytes()
    if sha256(content) != digest:
        raise UserError(f"{path}: not the {name} of {url}; move it away, then it is downloaded again")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# sample and split, both by content hash: the same on every machine, and a file stays where it was when others come

def fill_budget(sizes, corpus_mb):
    """{content hash: bytes} -> sorted list of the hashes kept: the first that fit in corpus_mb * 1e6 bytes."""
    left, kept = corpus_mb * 1e6 or float("inf"), []
    for key in sorted(sizes):
        if sizes[key] <= left:
            left -= sizes[key]
            kept.append(key)
    return kept


def choose_validation(documents):
    """-> set of content hashes, about 4% of the documents, drawn by the last 8 hex digits of the hash (their order
    follows the first ones). In a small corpus chance may leave a domain too little: then the next documents are drawn
    until it has 2%. A document with a fifth of a domain or more stays in training, unless there are no smaller ones."""
    def lot(document):
        return int(document[0][-8:], 16) / 16**8  # uniform in [0, 1)

    total, held, val = Counter(), Counter(), set()
    for _, texts in documents:
        total.update({domain: len(text) for domain, text in texts.items()})
    for document in sorted(documents, key=lot):
        key, texts = document
        scarce = any(held[domain] < VAL_LEAST * total[domain] for domain in texts)
        small = all(len(text) < VAL_MOST * total[domain] for domain, text in texts.items())
        if small and (lot(document) < VAL_SHARE or scarce):
            val.add(key)
            held.update({domain: len(text) for domain, text in texts.items()})
    for domain in total:
        if not held[domain]:
            val.add(min((len(texts[domain]), key) for key, texts in documents if domain in texts)[1])
    return val


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary

def train_bpe(texts, vocab_size):
    """Byte-pair vocabulary of a list of texts -> list of byte strings in rank order, vocab_size - 1 of them."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=PATTERN)  # the last id is <|endoftext|>
    ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(ranks) < vocab_size - 1:
        raise UserError(f"--vocab_size={vocab_size}: the training text is too small, giving {len(ranks) + 1} entries; "
                        f"use --vocab_size={len(ranks) + 1} or less, or more text")
    return ranks


def gpt2_bpe():
    """-> ranks and split pattern of GPT-2's vocabulary (50,257 entries), downloaded by tiktoken on first use."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors; ValueError: a wrong hash
        raise UserError(f"--tokenizer=gpt2: tiktoken cannot download it ({type(error).__name__}); go online, or use "
                        "the default --tokenizer=bpe") from None
    return sorted(gpt2._mergeable_ranks, key=gpt2._mergeable_ranks.get), gpt2._pat_str


def tokenizer_json(ranks, pattern, special=None):
    """list of byte strings by id, None where the id is of `special`, {name: id}; else <|endoftext|> comes last."""
    ranks = [None if token is None else base64.b64encode(token).decode() for token in ranks]
    return json.dumps({"pattern": pattern, "special": special or {EOT: len(ranks)}, "ranks": ranks}, indent=0).encode()


def read_tokenizer(data):
    """The bytes of tokenizer.json -> tiktoken.Encoding."""
    saved = json.loads(data)
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(saved["ranks"]) if token is not None}
    return tiktoken.Encoding("nanoduo", pat_str=saved["pattern"], mergeable_ranks=ranks,
                             special_tokens=saved["special"])


# ---------------------------------------------------------------------------------------------------------------------
# token files

def write_tokens(path, texts, encoding, vocab_hash, bar):
    """Header, then each text's tokens and <|endoftext|>, as uint16. -> number of tokens"""
    count = 0
    with open(path, "wb") as file:
        file.write(bytes(HEADER.size))  # not valid until the count is known
        for i in range(0, len(texts), 256):  # lists of Python ints take 20 times the memory of the file
            for ids in encoding.encode_ordinary_batch(texts[i:i + 256], num_threads=min(os.cpu_count() or 1, 8)):
                count += file.write(np.array(ids + [encoding.eot_token], "<u2").tobytes()) // 2
            bar.update(len(texts[i:i + 256]))
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, bytes.fromhex(vocab_hash), count))
        file.flush()
        os.fsync(file.fileno())
    return count


def damaged(path, what):
    return UserError(f"{path}: {what}; delete the folder {path.parent}, then it is prepared again")


def read_tokens(path, vocab_hash):
    """-> np.memmap uint16. Raises UserError for anything but a whole file of this version and vocabulary."""
    if not path.is_file():
        raise damaged(path, "missing")
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise damaged(path, "cut short within its header")
    magic, version, saved_hash, count = HEADER.unpack(header)
    if magic != MAGIC:
        raise damaged(path, "not a nanoduo token file")
    if version != VERSION:
        raise damaged(path, f"of version {version}, this code reads version {VERSION}")
    if saved_hash.hex() != vocab_hash:
        raise damaged(path, "encoded with another vocabulary than tokenizer.json")
    expected, size = HEADER.size + 2 * count, path.stat().st_size
    if size != expected or count == 0:
        raise damaged(path, f"holds {size} bytes where its header promises {expected}")
    return np.memmap(path, "<u2", "r", HEADER.size, (count,))


# ---------------------------------------------------------------------------------------------------------------------
# prepare and load

@contextlib.contextmanager
def appearing_whole(folder):
    """-> a temporary folder to fill; it becomes `folder`, whole, at the end, and is gone where filling fails."""
    temporary = Path(tempfile.mkdtemp(".tmp", f"{folder.name}.", folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def prepare(corpus="python", tokenizer="bpe", vocab_size=4096, corpus_mb=0, data_dir="data"):
    """-> Path of the prepared corpus; it is prepared now if it is not there. The folder appears under its name only
    when it is whole. Raises UserError for bad values, a missing or unsuitable text, a failed download."""
    adopted = tokenizer.startswith(ADOPTED)
    if adopted and not (Path(data_dir) / f"{tokenizer}.json").is_file():
        raise UserError(f"--tokenizer={tokenizer}: {data_dir} has no {tokenizer}.json; give the --data_dir of the run, "
                        "or copy the run's tokenizer.json there under that name")
    if tokenizer not in ("bpe", "gpt2") and not adopted:
        raise UserError(f"--tokenizer={tokenizer}: choose bpe or gpt2")
    if tokenizer == "bpe" and not 257 <= vocab_size <= 65535:
        raise UserError(f"--vocab_size={vocab_size}: choose from 257 (the bytes and {EOT}) to 65535 (16 bits a token)")
    if corpus_mb < 0:
        raise UserError(f"--corpus_mb={corpus_mb}: give a number of MB, or 0 for all")
    data_dir, start, name = Path(data_dir), time.time(), corpus
    if corpus not in ("python", *DOWNLOADS):  # hash the content on each call: an edited file is another corpus
        contents, binary = read_texts(corpus)
        name = re.sub(r"[^\w.-]", "-", Path(corpus).resolve().stem)
        name += "-" + sha256("".join(map(sha256, contents)).encode())[:8]
    parts = [name, f"{corpus_mb}mb" if corpus_mb else "", f"bpe{vocab_size}" if tokenizer == "bpe" else tokenizer]
    folder = data_dir / "_".join(filter(None, parts))
    if (folder / "meta.json").exists():
        return folder
    if folder.exists():
        raise UserError(f"{folder}: not a prepared corpus (no meta.json); move it away, or choose another --data_dir")
    data_dir.mkdir(parents=True, exist_ok=True)

    if corpus == "python":
        documents, left_out = python_documents(corpus_mb)
    elif corpus in DOWNLOADS:
        content = read_download(corpus, data_dir)
        documents, left_out = text_documents([content], EOT if corpus == "tinystories" else None, corpus_mb)
    else:
        documents, left_out = text_documents(contents, None, corpus_mb)
        left_out["not text"] = binary

    with appearing_whole(folder) as temporary:
        summary = build(temporary, folder.name, f"--corpus={corpus}", documents, left_out, tokenizer, vocab_size)
    print(f"prepared {folder}: {summary}, in {time.time() - start:.0f} s")
    return folder


def build(folder, name, flag, documents, left_out, tokenizer, vocab_size):
    """Split, train the vocabulary, encode and write the files of a corpus into `folder` -> a line that sums it up."""
    domains = ["text"] if documents and "text" in documents[0][1] else ["code", "prose"]
    splits = {(split, domain): [] for split in ("train", "val") for domain in domains}  # lists of (hash, text)
    val, seen = choose_validation(documents), set()
    for key, texts in documents:
        for domain, text in texts.items():
            digest = sha256(f"{domain}\0{text}".encode())
            if digest in seen:  # two files that differ in nothing but their docstrings, say
                left_out["duplicate document"] += 1
            else:
                splits["val" if key in val else "train", domain].append((digest, text))
            seen.add(digest)
    total = sum(len(text.encode()) for items in splits.values() for _, text in items)
    if total < MIN_BYTES or not all(splits.values()):
        raise UserError(f"{flag}: too little text ({total} bytes in {len(seen)} documents) to split into training and "
                        f"validation; give at least {MIN_BYTES} bytes, in several files or lines")

    if tokenizer == "gpt2":
        saved = tokenizer_json(*gpt2_bpe())
    elif tokenizer != "bpe":
        saved = (folder.parent / f"{tokenizer}.json").read_bytes()
    else:  # on training text only; of a big corpus the same share of each domain
        share = min(1, BPE_SAMPLE / total)
        samples = [splits["train", domain][:max(1, int(share * len(splits["train", domain])))] for domain in domains]
        saved = tokenizer_json(train_bpe([text for items in samples for _, text in items], vocab_size), PATTERN)
    write_atomic(folder / "tokenizer.json", saved)
    encoding, vocab_hash, counts = read_tokenizer(saved), sha256(saved), {}
    with progress(None, "encoding", sum(map(len, splits.values()))) as bar:
        for (split, domain), items in splits.items():
            texts = [text for _, text in items]
            tokens = write_tokens(folder / f"{split}_{domain}.bin", texts, encoding, vocab_hash, bar)
            size = sum(len(text.encode()) for text in texts)
            counts[f"{split}_{domain}"] = {"documents": len(items), "bytes": size, "tokens": tokens}
    digests = sorted(f"{split} {domain} {digest}" for (split, domain), items in splits.items() for digest, _ in items)
    fingerprint = sha256("\n".join([f"rule {SPLIT_RULE}", vocab_hash, *digests]).encode())[:16]
    meta = {"name": name, "domains": domains, "vocab_size": encoding.n_vocab, "fingerprint": fingerprint,
            "counts": counts, "left_out": {reason: n for reason, n in sorted(left_out.items()) if n}}
    write_atomic(folder / "meta.json", json.dumps(meta, indent=1).encode())
    tokens = sum(count["tokens"] for count in counts.values())
    return f"{tokens / 1e6:.2f}M tokens of {total / 1e6:.1f} MB, fingerprint {fingerprint}"


@dataclass
class Corpus:
    folder: Path
    name: str
    domains: list
    train: dict  # {domain: np.memmap uint16}
    val: dict
    encoding: tiktoken.Encoding
    vocab_size: int
    token_bytes: np.ndarray  # [V] int64: bytes of text that a token stands for; 0 for <|endoftext|> and its like
    fingerprint: str
    eot: int
    counts: dict  # {"train_code": {"documents": , "bytes": , "tokens": }, ...}
    left_out: dict  # {reason: number of files}


def load(folder):
    """-> Corpus. Raises UserError, naming the file and the remedy, if anything in the folder is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no prepared corpus here; make it with `python data.py`")
    data = {}
    for name in ("meta.json", "tokenizer.json"):
        try:
            data[name] = (folder / name).read_bytes()
            json.loads(data[name])
        except (OSError, ValueError):
            raise damaged(folder / name, "missing or damaged") from None
    try:
        meta, encoding = json.loads(data["meta.json"]), read_tokenizer(data["tokenizer.json"])
        domains, counts, left_out = meta["domains"], meta["counts"], meta["left_out"]
        vocab_size, name, fingerprint = meta["vocab_size"], meta["name"], meta["fingerprint"]
    except (KeyError, ValueError, TypeError):
        raise damaged(folder / "meta.json", "it or tokenizer.json lacks an entry") from None
    vocab_hash = sha256(data["tokenizer.json"])
    train = {domain: read_tokens(folder / f"train_{domain}.bin", vocab_hash) for domain in domains}
    val = {domain: read_tokens(folder / f"val_{domain}.bin", vocab_hash) for domain in domains}
    special = {encoding.encode_single_token(name) for name in encoding.special_tokens_set}
    lengths = [0 if i in special else len(encoding.decode_single_token_bytes(i)) for i in range(vocab_size)]
    return Corpus(folder, name, domains, train, val, encoding, vocab_size, np.array(lengths, np.int64), fingerprint,
                  encoding.eot_token, counts, left_out)


# ---------------------------------------------------------------------------------------------------------------------
# a domain that no base has been trained on

def header_files():
    """-> sorted list of the C++ headers that torch is installed with. Left out: ATen/ops, 7,000 short files generated
    from one template, which would make validation a copy of training in all but names."""
    folder = Path(torch.__file__).parent / "include"
    files = [path for path in sorted(folder.rglob("*.h")) if path.parent != folder / "ATen" / "ops"]
    if not files:
        raise UserError(f"{folder}: holds no C++ headers, the domain cpp; install torch from its own wheel "
                        "(python -m pip install --force-reinstall -r requirements.txt)")
    return files


def extra_domain(name, corpus):
    """A domain beside those of the corpus, in the corpus's own vocabulary: cpp, C++ headers with their comments.

    -> train, validation tokens (np.memmap uint16, together 2 to 3M), fingerprint: torch's versions differ in
    their headers. Split by file, exact duplicates removed. Kept in corpus.folder/extra_<name>, there when whole.
    """
    if name != "cpp":
        raise UserError(f"{name}: no such extra domain; choose from cpp")
    folder, vocab_hash = corpus.folder / f"extra_{name}", sha256((corpus.folder / "tokenizer.json").read_bytes())
    if not (folder / "meta.json").exists():
        if folder.exists():
            raise UserError(f"{folder}: not a prepared domain (no meta.json); delete it, then it is prepared again")
        texts = {}
        for path in header_files():
            content = path.read_bytes()
            with contextlib.suppress(UnicodeDecodeError):  # a few are in Latin-1
                texts[sha256(content)] = content.decode("utf-8-sig").replace("\r\n", "\n")
        kept = fill_budget({key: len(text.encode()) for key, text in texts.items()}, EXTRA_MB)
        documents = [(key, {name: texts[key]}) for key in kept if texts[key].strip()]
        val = choose_validation(documents)
        with appearing_whole(folder) as temporary:
            with progress(None, f"encoding {name}", len(documents)) as bar:
                for split, keys in (("train", {key for key, _ in documents} - val), ("val", val)):
                    write_tokens(temporary / f"{split}.bin", [texts[key] for key in sorted(keys)], corpus.encoding,
                                 vocab_hash, bar)
            digests = [f"{'val' if key in val else 'train'} {key}" for key, _ in documents]
            fingerprint = sha256("\n".join([f"rule {SPLIT_RULE}", vocab_hash, *digests]).encode())[:16]
            write_atomic(temporary / "meta.json", json.dumps({
                "name": name, "torch": torch.__version__, "fingerprint": fingerprint,
                "train_files": len(documents) - len(val), "val_files": len(val)}, indent=1).encode())
    try:
        fingerprint = json.loads((folder / "meta.json").read_bytes())["fingerprint"]
    except (ValueError, KeyError):
        raise damaged(folder / "meta.json", "damaged") from None
    return *(read_tokens(folder / f"{split}.bin", vocab_hash) for split in ("train", "val")), fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# batches

def window_starts(corpus, batch_size, block_size, seed):
    """Draw windows of block_size + 1 tokens uniformly, with replacement, over all training positions.

    -> domain [B] (index into corpus.domains), start [B] (position of the first token in that domain), both int64.
    """
    # A window lies within one domain, so one of n tokens has n - block_size places to start.
    places = np.array([max(0, len(corpus.train[domain]) - block_size) for domain in corpus.domains])
    if places.sum() == 0:
        longest = max(map(len, corpus.train.values()))
        raise UserError(f"{corpus.folder}: {longest} training tokens are too few for --block_size={block_size}; give "
                        "more text, or a smaller --block_size")
    draw = np.random.default_rng(seed).integers(places.sum(), size=batch_size)
    ends = np.cumsum(places)
    domain = np.searchsorted(ends, draw, side="right")
    return domain, draw - (ends - places)[domain]


def to_tensors(windows):
    """list of n windows of T + 1 tokens -> x, y [n, T] int64, y the token after x"""
    windows = torch.from_numpy(np.stack(windows).astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def sample_batch(corpus, batch_size, block_size, seed):
    """A training batch -> x, y [B, T] int64; the same for the same seed (an int)."""
    starts = zip(*window_starts(corpus, batch_size, block_size, seed))
    return to_tensors([corpus.train[corpus.domains[d]][i:i + block_size + 1] for d, i in starts])


def eval_windows(corpus, domain, n, block_size):
    """The same n windows for everyone: evenly spaced over the validation set, no overlap -> x, y [n, T] int64."""
    tokens = corpus.val[domain]
    holds = (len(tokens) - 1) // block_size
    if n > holds:
        raise UserError(f"{corpus.folder}: the {domain} validation set holds {holds} windows of {block_size} tokens, "
                        f"not {n}; evaluate on fewer, use a smaller --block_size, or give more text")
    starts = np.arange(n) * (len(tokens) - 1) // n  # the spacing is at least T, since n <= holds
    return to_tensors([tokens[i:i + block_size + 1] for i in starts])


# ---------------------------------------------------------------------------------------------------------------------
# the bar to clear: a bigram model of the same tokens

def discount(counts):
    """D = n1 / (n1 + 2 n2), with n1, n2 the numbers of things counted once and twice; 1/2 where that says nothing."""
    n1, n2 = (counts == 1).sum(), (counts == 2).sum()
    return n1 / (n1 + 2 * n2) if n1 and n2 else 0.5


def fit_bigram(pairs, vocab_size):
    """Interpolated Kneser-Ney. pairs: int64, a * V + b for each adjacent (a, b), repeats included.

    -> a function p(a, b) of two int64 arrays: the probability that b follows a.
    """
    pairs, counts = np.unique(pairs, return_counts=True)
    a, b = pairs // vocab_size, pairs % vocab_size
    total = np.bincount(a, counts, vocab_size)  # c(a .)
    followers = np.bincount(a, minlength=vocab_size)  # N(a .), different tokens seen after a
    predecessors = np.bincount(b, minlength=vocab_size)  # N(. b), different tokens seen before b
    D, E = discount(counts), discount(predecessors)
    # q(b) = [max(N(. b) - E, 0) + E |{b: N(. b) > 0}| / V] / N(. .): in how many contexts b is found, then uniform
    q = np.maximum(predecessors - E, 0) + E * np.count_nonzero(predecessors) / vocab_size
    q = q / len(pairs) if len(pairs) else np.full(vocab_size, 1 / vocab_size)

    def probability(a, b):
        i = np.minimum(np.searchsorted(pairs, a * vocab_size + b), max(0, len(pairs) - 1))
        c = np.where(pairs[i] == a * vocab_size + b, counts[i], 0) if len(pairs) else np.zeros(len(a))
        # p(b | a) = [max(c(a b) - D, 0) + D N(a .) q(b)] / c(a .), and q(b) after an a that was never seen
        return np.where(total[a] > 0, (np.maximum(c - D, 0) + D * followers[a] * q[b]) / np.maximum(total[a], 1), q[b])

    return probability


def bigram_loss(corpus, seen, windows):
    """Fit a bigram model on the training tokens marked in `seen` ({domain: bool [tokens]}, all domains together) and
    evaluate it on `windows` ({domain: (x, y)}, as eval_windows makes them) -> {domain: nats per token}."""
    pairs = []
    for domain, tokens in corpus.train.items():
        i = np.flatnonzero(seen[domain][:-1] & seen[domain][1:])
        pairs.append(tokens[i].astype(np.int64) * corpus.vocab_size + tokens[i + 1])
    probability = fit_bigram(np.concatenate(pairs), corpus.vocab_size)
    return {domain: float(-np.log(probability(x.flatten().numpy(), y.flatten().numpy())).mean())
            for domain, (x, y) in windows.items()}


def summary(corpus):
    """-> the table that `python data.py` prints."""
    lines = [f"{'':12}{'documents':>12}{'bytes':>14}{'tokens':>14}{'bytes/token':>13}"]
    for name, c in corpus.counts.items():
        lines.append(f"{name:12}{c['documents']:12,}{c['bytes']:14,}{c['tokens']:14,}{c['bytes'] / c['tokens']:13.2f}")
    left_out = ", ".join(f"{n} {reason}" for reason, n in corpus.left_out.items()) or "nothing"
    lines.append(f"vocabulary {corpus.vocab_size:,}, fingerprint {corpus.fingerprint}, left out: {left_out}")
    return "\n".join(lines)


def main(argv=None):
    config = parse_config(DataConfig, argv, PRESETS)
    folder = prepare(config.corpus, config.tokenizer, config.vocab_size, config.corpus_mb, config.data_dir)
    print(f"{folder}\n{summary(load(folder))}")


if __name__ == "__main__":
    run(main)
