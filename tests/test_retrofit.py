"""retrofit.py: a pretrained Llama as BIG. Its logits and token ids stay what they were, and all else is refused."""
import json
import random

import pytest
import regex  # tiktoken requires it
import torch
from conftest import user_error
from torch.nn import functional as F

import data
import oracle
import retrofit
import router
import sample
import train
from common import load_checkpoint, load_run
from model import BIG, SMALL, DuoGPT

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 300,
          "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 500.0}
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1}  # the first ids, as SmolLM has them
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al. 2019
WORDS = ["alpha", "beta", "gamma", "loss", "model", "token", "it's", "route", "layer", " 12", "3.5", "(x)", "\n  "]


# ---------------------------------------------------------------------------------------------------------------------
# a checkpoint of random weights, in Hugging Face's layout

def random_weights(seed=0, config=CONFIG):
    """-> {name in the checkpoint: tensor}"""
    rng, c = torch.Generator().manual_seed(seed), config
    d, inner, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] * c["num_key_value_heads"] // 4
    shapes = {"model.embed_tokens": (c["vocab_size"], d), "model.norm": (d,)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm": (d,), p + "post_attention_layernorm": (d,), p + "self_attn.q_proj": (d, d),
                   p + "self_attn.k_proj": (kv, d), p + "self_attn.v_proj": (kv, d), p + "self_attn.o_proj": (d, d),
                   p + "mlp.gate_proj": (inner, d), p + "mlp.up_proj": (inner, d), p + "mlp.down_proj": (d, inner)}
    return {f"{name}.weight": torch.randn(shape, generator=rng) * 0.3 + (len(shape) == 1)
            for name, shape in shapes.items()}


def write_safetensors(path, weights):
    """The format, written out: https://github.com/huggingface/safetensors"""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    for name, w in weights.items():
        header[name] = {"dtype": names[w.dtype], "shape": list(w.shape), "data_offsets": [end, end + w.nbytes]}
        end += w.nbytes
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header
                     + b"".join(w.contiguous().view(torch.uint8).numpy().tobytes() for w in weights.values()))


def write_tokenizer(path, digits=True, vocab_size=300, lost=b""):
    """A byte-level BPE tokenizer.json like SmolLM's (digits) or GPT-2's, its merges learned from a little text; without
    the bytes of `lost`."""
    text = " ".join(random.Random(0).choices(WORDS, k=5000))
    letter = {byte: character for character, byte in retrofit.byte_alphabet().items()}
    parts, merges = [bytes([b]) for b in range(256) if b not in lost], []
    words = [[bytes([b]) for b in word.encode()] for word in {*text.split(" "), *(" " + w for w in text.split(" "))}]
    while len(parts) + len(SPECIAL) < vocab_size:
        pairs = sorted({pair for word in words for pair in zip(word, word[1:])})
        merges.append(max(pairs, key=lambda pair: sum(list(zip(w, w[1:])).count(pair) for w in words)))
        parts.append(b"".join(merges[-1]))
        words = [join(word, merges[-1]) for word in words]
    spell = {part: "".join(letter[b] for b in part) for part in parts}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for name, i in SPECIAL.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if digits else byte_level, "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": SPECIAL | {spell[part]: i for i, part in enumerate(parts, len(SPECIAL))},
                  "merges": [f"{spell[a]} {spell[b]}" for a, b in merges]}}))


def join(word, pair):
    """Every occurrence of the pair in a list of strings, from the left, becomes one -> list"""
    done = []
    for part in word:
        if (*done[-1:], part) == pair:
            done[-1] += part
        else:
            done.append(part)
    return done


def write_folder(folder, weights=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_tokenizer(folder / "tokenizer.json")
    write_safetensors(folder / "model.safetensors", weights or random_weights())
    return folder


def load(folder, block_size=16):
    model = DuoGPT(retrofit.read_shape(folder, block_size, 0)).init_weights(torch.Generator().manual_seed(1))
    retrofit.load_weights(model, folder)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# the same logits

def llama(w, idx, c=CONFIG):
    """A Llama with grouped-query attention, written out with none of the project's code: one head at a time."""
    d, H = c["hidden_size"], c["num_attention_heads"]
    D, shared, T = d // H, H // c["num_key_value_heads"], idx.size(1)
    angle = torch.arange(T)[:, None] / c["rope_theta"] ** (torch.arange(0, D, 2) / D)  # [T, D/2]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def turn(x):  # [B, T, D] as complex numbers
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), -1)

    x = w["model.embed_tokens.weight"][idx]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h, heads = norm(x, p + "input_layernorm"), []
        q, k, v = (h @ w[f"{p}self_attn.{name}_proj.weight"].T for name in "qkv")
        for head in range(H):
            mine, others = slice(head * D, head * D + D), slice(head // shared * D, head // shared * D + D)
            score = turn(q[..., mine]) @ turn(k[..., others]).transpose(1, 2) / D ** 0.5
            score = score.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
            heads.append(score.softmax(-1) @ v[..., others])
        x = x + torch.cat(heads, -1) @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, p + "post_attention_layernorm")
        gate, up = (h @ w[f"{p}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


IDX = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_big_is_the_checkpoint(tmp_path, dtype):
    weights = {name: w.to(dtype) for name, w in random_weights().items()}
    expected = llama({name: w.float() for name, w in weights.items()}, IDX)
    logits = load(write_folder(tmp_path / "llama", weights))(IDX, BIG)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    other = random_weights() | {"model.layers.1.self_attn.k_proj.weight": torch.randn(16, 32)}
    assert (llama(other, IDX) - expected).abs().max() > 0.1  # keys matter, so sharing them wrongly would show


def test_shards_and_a_tied_copy(tmp_path):
    whole, weights = load(write_folder(tmp_path / "whole")), random_weights()
    folder = write_folder(tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"]}
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: weights[name] for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert load(folder)(IDX, BIG)[0].equal(whole(IDX, BIG)[0])


def test_equals_transformers(tmp_path):
    """Files written by transformers itself; the published rotary base is in another place there."""
    transformers = pytest.importorskip("transformers", reason="transformers is optional, and not installed")
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    theirs.save_pretrained(tmp_path / "llama")
    with torch.no_grad():
        expected = theirs(IDX).logits
    model = load(tmp_path / "llama")
    assert model.config.rope_theta == 500.0
    logits = model(IDX, BIG)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# the same token ids

def random_texts(n, seed=0, more=()):
    rng = random.Random(seed)
    pieces = [*WORDS, *"  \n\t012ab's.,é漢²½😀", " ", "\u2028", "'ll", *more]
    return ["".join(rng.choices(pieces, k=rng.randrange(1, 15))) for _ in range(n)]


def slow_ids(saved, text, digits):
    """tokenizer.json by its own rules: each digit alone, then GPT-2's words, then merge after merge of its list."""
    letter = {byte: character for character, byte in retrofit.byte_alphabet().items()}
    ids = []
    for stretch in regex.findall(r"\p{N}|\P{N}+", text) if digits else [text]:
        for word in regex.findall(GPT2, stretch):
            parts = [letter[b] for b in word.encode()]
            for merge in saved["model"]["merges"]:
                parts = join(parts, tuple(merge.split(" ")))
            ids += [saved["model"]["vocab"][part] for part in parts]
    return ids


@pytest.mark.parametrize("digits", [True, False])
def test_token_ids(tmp_path, digits):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, digits)
    saved, encoding = json.loads(path.read_text()), data.read_tokenizer(retrofit.convert_tokenizer(path))
    assert encoding.n_vocab == 300 and encoding.eot_token == 0
    for text in [*random_texts(500), "a  12", "a  b", "<|im_start|>"]:  # the last is no special token: it is text
        ids = encoding.encode_ordinary(text)
        assert ids == slow_ids(saved, text, digits), text
        assert encoding.decode(ids) == text and not set(ids) & {0, 1}


def test_token_ids_equal_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is optional, and not installed")
    path = tmp_path / "tokenizer.json"
    for digits in (True, False):
        write_tokenizer(path, digits)
        theirs = tokenizers.Tokenizer.from_file(str(path))
        encoding = data.read_tokenizer(retrofit.convert_tokenizer(path))
        for text in random_texts(2000):
            assert encoding.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_characters_without_bytes_are_left_out(tmp_path):
    """As in SmolLM's vocabulary; tiktoken would end the process over one of them."""
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, lost=b"\x04\x1d\xf1")
    encoding = data.read_tokenizer(retrofit.convert_tokenizer(path))
    for text in random_texts(500, more=["\x04", "\x1d", "\U00040000", "\U0007ffff", "\x05", "\U00080000"]):
        kept = regex.sub("[\x04\x1d\U00040000-\U0007ffff]", "", text)
        assert encoding.decode(encoding.encode_ordinary(text)) == kept, text
    write_tokenizer(path, lost=b"z")
    user_error(lambda: retrofit.convert_tokenizer(path), path)


# ---------------------------------------------------------------------------------------------------------------------
# the pipeline

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """-> a folder with a corpus and a checkpoint"""
    here = tmp_path_factory.mktemp("retrofit")
    (here / "texts").mkdir()
    for i in range(30):
        (here / "texts" / f"{i}.txt").write_text(" ".join(random.Random(i).choices(WORDS, k=150)))
    write_folder(here / "llama")
    return here


def flags(here, out_dir, **options):
    options = {"preset": "debug", "device": "cpu", "init_from": here / "llama", "corpus": here / "texts",
               "data_dir": here / "data", "out_dir": out_dir, "block_size": 16, "max_steps": 8, "save_interval": 4,
               "eval_interval": 8, "learning_rate": 0.01} | options
    return [f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def out(here):
    assert train.main(flags(here, here / "out")) == 0
    return here / "out"


def test_only_small_learns(here, out):
    trained, config, rest = load_run(out, "cpu")
    before = load(here / "llama").state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not tensor.equal(before[name])}
    assert changed and all(".small." in name for name in changed)
    assert len(changed) == 4  # gate_up and down of 2 layers
    assert trained(IDX, BIG)[0].equal(load(here / "llama")(IDX, BIG)[0])
    assert (config.big_width, config.small_width, config.rope_theta, config.vocab_size) == (48, 3, 500.0, 300)
    assert rest["train_config"]["n_layer"] == 2 and rest["train_config"]["init_from"] == str(here / "llama")


def test_resume_reads_no_weights(here, out, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "llama")
    batches = train.micro_batches

    def stop(config, corpus, device, step, rank, world):
        if step == 5:
            raise KeyboardInterrupt
        return batches(config, corpus, device, step, rank, world)
    monkeypatch.setattr(train, "micro_batches", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(here, tmp_path / "out", init_from=folder))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == 4
    (folder / "model.safetensors").unlink()
    assert train.main(flags(here, tmp_path / "out", init_from=folder, resume=True)) == 0
    whole, resumed = (load_checkpoint(path / "ckpt.pt")["model"] for path in (out, tmp_path / "out"))
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())
    user_error(lambda: train.main(flags(here, tmp_path / "out", init_from="", vocab_size=300, resume=True)),
               "--init_from", folder)


def test_oracle_router_and_sample_run(here, out, capsys):
    common = ["--device=cpu", f"--out_dir={out}"]
    assert not oracle.main([*common, "--preset=debug", f"--data_dir={here / 'data'}"])
    assert not router.main([*common, "--preset=debug", "--name=linear", "--budget=1", f"--data_dir={here / 'data'}"])
    capsys.readouterr()
    assert not sample.main([*common, "--prompt=model ", "--tokens=8", "--route=random"])
    assert capsys.readouterr().out.startswith("model ")
    tables = json.loads((out / "oracle.json").read_text())
    assert tables and (out / "routers.json").is_file()


def test_oracle_names_a_missing_tokenizer(out, tmp_path):
    user_error(lambda: oracle.main(["--device=cpu", f"--out_dir={out}", f"--data_dir={tmp_path}"]),
               "--tokenizer=llama-", tmp_path, "--data_dir")


def test_small_width_and_what_the_folder_overrides(here, tmp_path, capsys):
    assert train.main(flags(here, tmp_path / "out", small_width=5, n_layer=7, max_steps=1)) == 0
    assert "whatever flags or preset say: n_layer=2 n_head=4 n_embd=32 big_width=48" in capsys.readouterr().out
    model, config, _ = load_run(tmp_path / "out", "cpu")
    assert config.small_width == 5 and len(model.blocks) == 2
    assert model(IDX, SMALL)[0].isfinite().all()
    assert F.cross_entropy(model(IDX, BIG)[0].flatten(0, 1), IDX.flatten()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# what is refused: one line, which names the value and how to get a folder that works

WHERE = "SmolLM-135M"


@pytest.mark.parametrize("changes,parts", [
    ({"model_type": "gpt2"}, ["gpt2", "LayerNorm", WHERE]),
    ({"model_type": "mamba"}, ["mamba", WHERE]),
    ({"tie_word_embeddings": False}, ["tie_word_embeddings is False", WHERE]),
    ({"rms_norm_eps": 1e-6}, ["rms_norm_eps is 1e-06", "1e-05", WHERE]),
    ({"attention_bias": True}, ["attention_bias", WHERE]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", WHERE]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", WHERE]),
    ({"head_dim": 16}, ["4 heads of 16", WHERE]),
    ({"num_key_value_heads": 3}, ["3 of keys", WHERE]),
    ({"hidden_size": 12}, ["n_embd=12", WHERE]),
    ({"max_position_embeddings": 8}, ["--block_size=16", "--block_size=8"]),
    ({"vocab_size": 299}, ["300", "299", WHERE]),
    ({"vocab_size": 320}, ["embedding", "[300, 32]", "[320, 32]"]),
    ({"intermediate_size": 64}, ["big.gate_up", "[96, 32]", "[128, 32]"]),
    ({"num_hidden_layers": 3}, ["model.layers.2", WHERE]),
    ({"num_hidden_layers": 1}, ["model.layers.1", WHERE]),
])
def test_other_architectures(here, tmp_path, changes, parts):
    folder = write_folder(tmp_path / "llama", **changes)
    user_error(lambda: train.main(flags(here, tmp_path / "out", init_from=folder)), *parts)


def test_missing_files(here, tmp_path):
    def refused(*parts):
        return user_error(lambda: train.main(flags(here, tmp_path / "out", init_from=tmp_path / "llama")), *parts)
    refused("no such folder", WHERE, tmp_path / "llama")
    (tmp_path / "llama").mkdir()
    refused("config.json", WHERE)
    write_folder(tmp_path / "llama")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (tmp_path / "llama" / name).unlink()
        refused(f"has no {name}", WHERE)
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"} | {
        key: CONFIG[key] for key in ("rms_norm_eps", "tie_word_embeddings")}))
    refused("lacks 'num_attention_heads'", WHERE)
    (tmp_path / "llama" / "config.json").write_text("{")
    refused("config.json", "damaged")


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:5], lambda raw: raw[:100], lambda raw: raw[:-1],
    lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw[:8] + b"x" + raw[9:],
    lambda raw: raw.replace(b"F32", b"F16", 1)])
def test_damaged_weights(tmp_path, damage):
    path = write_folder(tmp_path / "llama") / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    user_error(lambda: retrofit.read_safetensors(path), path, "damaged")


def test_weights_that_do_not_fit(tmp_path):
    weights = random_weights()
    folder = write_folder(tmp_path / "a", weights | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    user_error(lambda: load(folder), "q_proj.bias", "no place", WHERE)
    folder = write_folder(tmp_path / "b", weights | {"model.norm.weight": torch.ones(32).double()})
    user_error(lambda: load(folder), "F64", "BF16")


@pytest.mark.parametrize("change", [
    lambda t: t["model"].update(type="Unigram"), lambda t: t.update(normalizer={"type": "NFC"}),
    lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), lambda t: t.update(pre_tokenizer=None),
    lambda t: t["model"]["merges"].reverse(), lambda t: t["model"]["merges"].pop(),
    lambda t: t.update(added_tokens=t["added_tokens"][1:]), lambda t: t["model"]["vocab"].update({"new": 400}),
    lambda t: t.pop("model")])
def test_other_tokenizers(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path)
    retrofit.convert_tokenizer(path)
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))
    user_error(lambda: retrofit.convert_tokenizer(path), path, "byte-level BPE", WHERE)


def test_other_flags(here, tmp_path):
    user_error(lambda: train.main(flags(here, tmp_path / "out", train_route="big")), "--train_route=big", "--init_from")
    user_error(lambda: router.main([*flags(here, tmp_path / "out"), "--joint", "--budget=1"]), "--init_from", "--joint")
