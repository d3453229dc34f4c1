"""A pretrained Llama becomes a Duo model (paper, appendix A): its feed-forward networks are BIG, and stay as they are.

    python train.py --init_from=FOLDER     FOLDER: config.json, tokenizer.json and model.safetensors, as published

model.py is a Llama already, so nothing is computed anew; names change, and matrices that read the same input are one:

    model.embed_tokens                           embedding (tied: also the read-out)
    model.layers.3.input_layernorm               blocks.3.attention_norm
    model.layers.3.self_attn.{q,k,v}_proj        blocks.3.qkv, see below
    model.layers.3.self_attn.o_proj              blocks.3.out
    model.layers.3.post_attention_layernorm      blocks.3.ffn_norm
    model.layers.3.mlp.{gate,up}_proj, down_proj blocks.3.big.gate_up, big.down
    model.norm                                   final_norm
    none                                         blocks.3.small: new, and all that train.py then trains

Grouped-query attention: 9 query heads may share 3 key heads. Here every head has its own, so each key and value head
is repeated 3 times: the same logits, but more parameters, a larger KV cache and more FLOPs for K and V than published.

The text is cut as the checkpoint's tokenizer cuts it. One difference: <|im_start|> and the like are never made from
text, they only have their ids.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

import data
from common import UserError, write_atomic
from model import DuoConfig

HOW = ("give a folder with config.json, tokenizer.json and model.safetensors of a small Llama, say those of "
       "HuggingFaceTB/SmolLM-135M on Hugging Face, downloaded by hand with a browser")
# Where model.py leaves no choice: config.json's key, what its absence means, and what model.py computes.
FIXED = (("hidden_act", "silu", "silu"), ("rms_norm_eps", 1e-6, 1e-5), ("tie_word_embeddings", False, True),
         ("attention_bias", False, False), ("mlp_bias", False, False))
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path):
    """-> the dict in a file of the checkpoint's folder. Raises UserError."""
    if not path.parent.is_dir():
        raise UserError(f"--init_from={path.parent}: no such folder; {HOW}")
    if not path.is_file():
        raise UserError(f"--init_from={path.parent}: has no {path.name}; {HOW}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, or not JSON; {HOW}")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# shape

def read_shape(folder, block_size, small_width):
    """config.json -> DuoConfig. Raises UserError where model.py computes something else than this checkpoint."""
    path = Path(folder) / "config.json"
    given = read_json(path)
    kind = given.get("model_type")
    if kind != "llama":
        why = " (LayerNorm, biases and learned positions, which model.py has not)" if kind == "gpt2" else ""
        raise UserError(f"{path}: model_type is {kind}{why}, and only llama can be retrofitted; {HOW}")
    for key, absent, wanted in FIXED:
        if given.get(key, absent) != wanted:
            raise UserError(f"{path}: {key} is {given.get(key, absent)}, where model.py has {wanted}; {HOW}")
    # Newer files keep all about rotary positions in rope_parameters, older ones in rope_theta and rope_scaling.
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(f"{path}: scales its rotary positions ({scaling}), which model.py does not; {HOW}")
    try:
        n_head, n_embd = given["num_attention_heads"], given["hidden_size"]
        n_kv, head_width = given.get("num_key_value_heads") or n_head, given.get("head_dim") or n_embd // n_head
        if n_head % n_kv or head_width * n_head != n_embd:
            raise UserError(f"{path}: {n_head} heads of {head_width}, {n_kv} of keys, width {n_embd}: model.py needs "
                            f"heads of hidden_size / num_attention_heads, shared evenly; {HOW}")
        longest = given["max_position_embeddings"]
        if block_size > longest:
            raise UserError(f"--block_size={block_size}: the checkpoint has learned {longest} positions at most; give "
                            f"--block_size={longest} or less")
        return DuoConfig(given["num_hidden_layers"], n_head, n_embd, block_size, given["vocab_size"],
                         given["intermediate_size"], small_width,
                         float(given.get("rope_theta") or rope.get("rope_theta", 10000)))
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}; {HOW}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {HOW}") from None


def adopt(config):
    """Set a TrainConfig's model and tokenizer to those of the folder config.init_from -> DuoConfig, a line that tells.

    The converted tokenizer is kept in config.data_dir, under the name that config.tokenizer then has: a corpus can be
    prepared, and the run resumed, sampled from or searched, without the folder's weights."""
    folder = Path(config.init_from)
    shape = read_shape(folder, config.block_size, config.small_width)
    tokenizer = convert_tokenizer(folder / "tokenizer.json")
    n_vocab = data.read_tokenizer(tokenizer).n_vocab
    if not 0 <= shape.vocab_size - n_vocab < 64:  # some pad the matrix, as train.py does
        raise UserError(f"{folder}: tokenizer.json has {n_vocab} entries, config.json says {shape.vocab_size}: not of "
                        f"one model; {HOW}")
    config.tokenizer = f"{data.ADOPTED}{hashlib.sha256(tokenizer).hexdigest()[:8]}"
    Path(config.data_dir).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(config.data_dir) / f"{config.tokenizer}.json", tokenizer)
    taken = ("n_layer", "n_head", "n_embd", "big_width", "vocab_size")
    for name in taken:
        setattr(config, name, getattr(shape, name))
    values = " ".join(f"{name}={getattr(shape, name)}" for name in (*taken, "rope_theta"))
    return shape, f"from {folder}, whatever flags or preset say: {values} tokenizer={config.tokenizer}"


# ---------------------------------------------------------------------------------------------------------------------
# weights

def read_safetensors(path):
    """-> {name: tensor}. The file: 8 bytes, the length of the header; the header, JSON of {name: {dtype, shape,
    data_offsets}}; then the numbers (format: https://github.com/huggingface/safetensors). Raises UserError."""
    tensors = {}
    try:
        content = np.memmap(path, np.uint8, "r")
        body = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:body].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} is stored as {entry['dtype']}; give a file in {', '.join(DTYPES)}")
            first, last = entry["data_offsets"]
            raw = torch.from_numpy(content[body + first:body + last].copy())  # bytes
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    except FileNotFoundError:
        raise UserError(f"--init_from={path.parent}: has no {path.name}; {HOW}") from None
    except (ValueError, OverflowError, RuntimeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged or cut short; download it again") from None
    return tensors


def read_weights(folder):
    """-> {name: tensor} of model.safetensors, or of the files that model.safetensors.index.json lists."""
    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    return {name: tensor for file in files for name, tensor in read_safetensors(folder / file).items()}


@torch.no_grad()
def load_weights(model, folder):
    """Write the checkpoint's weights into all of `model` but its SMALL modules. Raises UserError if any is missing, of
    another shape than config.json says, or has no place."""
    folder, c = Path(folder), model.config
    weights = read_weights(folder)

    def take(name):
        if name not in weights:
            raise UserError(f"{folder}: its safetensors lack {name}; {HOW}")
        return weights.pop(name).float()

    def every_head(weight):
        """[key heads * D, d] -> [heads * D, d], each one for the n / n_kv query heads that share it, side by side"""
        heads = weight.unflatten(0, (-1, c.n_embd // c.n_head))
        return heads.repeat_interleave(c.n_head // len(heads), dim=0).flatten(0, 1)

    state = {"embedding.weight": take("model.embed_tokens.weight"), "final_norm.weight": take("model.norm.weight")}
    for i in range(c.n_layer):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        q, k, v = (take(f"{there}.self_attn.{name}_proj.weight") for name in "qkv")
        gate, up = (take(f"{there}.mlp.{name}_proj.weight") for name in ("gate", "up"))
        state |= {
            f"{here}.attention_norm.weight": take(f"{there}.input_layernorm.weight"),
            f"{here}.qkv.weight": torch.cat((q, every_head(k), every_head(v))),
            f"{here}.out.weight": take(f"{there}.self_attn.o_proj.weight"),
            f"{here}.ffn_norm.weight": take(f"{there}.post_attention_layernorm.weight"),
            f"{here}.big.gate_up.weight": torch.cat((gate, up)),
            f"{here}.big.down.weight": take(f"{there}.mlp.down_proj.weight")}
    # A tied read-out may be stored a second time, and old files hold tables of the rotary positions.
    left = sorted(name for name in weights if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise UserError(f"{folder}: {left[0]} has no place in model.py; {HOW}")
    for name, parameter in model.named_parameters():
        if ".small." in name:
            continue
        if state[name].shape != parameter.shape:
            raise UserError(f"{folder}: {name} has shape {list(state[name].shape)}, by config.json "
                            f"{list(parameter.shape)}: not of one model; {HOW}")
        parameter.copy_(state[name])


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer

def byte_alphabet():
    """GPT-2's way to write bytes as text -> {character: byte}. What prints stands for itself, the others follow 255."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


def split_pattern(steps, known):
    """The pre_tokenizer's steps -> the one pattern that cuts text as they do, or None where it has other steps.

    GPT-2's own (ByteLevel): a word or number with the space before it, other signs, spaces but the last. Digits comes
    first, so no space joins a number, and spaces before one are cut as at the end of a text.
    known: the bytes in the vocabulary. SmolLM's lacks a few that begin control characters or code points not in use;
    the pattern passes over those characters, and what no pattern matches, tiktoken leaves out.
    """
    byte_level = steps[-1]
    if ([step["type"] for step in steps] not in (["ByteLevel"], ["Digits", "ByteLevel"])
            or byte_level["add_prefix_space"] or not byte_level.get("use_regex", True)):
        return None
    number, seen = r" ?\p{N}+", r"\S"
    if len(steps) == 2:
        number, seen = r"\p{N}" if steps[0]["individual_digits"] else r"\p{N}+", r"[^\s\p{N}]"
    dispensable = {byte: rf"\x{byte:02x}" for byte in (*range(9), *range(14, 32), 127)}
    dispensable |= {0xF1: r"\x{40000}-\x{7ffff}", 0xF2: r"\x{80000}-\x{bffff}", 0xF3: r"\x{c0000}-\x{fffff}",
                    0xF4: r"\x{100000}-\x{10ffff}"}
    in_text = {*range(0xC0), *range(0xC2, 0xF5)}  # UTF-8 has no other bytes
    if in_text - known - dispensable.keys():
        return None
    lost = "".join(there for byte, there in dispensable.items() if byte not in known)
    return rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}{lost}]+|\s+(?!{seen})|\s+"


def convert_tokenizer(path):
    """tokenizer.json of a byte-level BPE -> the bytes of ours (data.tokenizer_json). Raises UserError for another kind.

    tiktoken joins the pair that makes the token with the lowest id, the original the pair that comes first in its list
    of merges: the same, where ids follow that list."""
    saved, alphabet = read_json(path), byte_alphabet()
    try:
        model, special = saved["model"], {token["content"]: token["id"] for token in saved["added_tokens"]}
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        made = [vocab["".join(pair)] for pair in merges]
        of_id = {i: bytes(alphabet[c] for c in token) for token, i in vocab.items()}
        of_id |= dict.fromkeys(special.values())
        ranks = [of_id[i] for i in range(len(vocab) + len(special))]
        before, single = saved["pre_tokenizer"], {token[0] for token in ranks if token and len(token) == 1}
        pattern = split_pattern(before.get("pretokenizers", [before]), single)
        in_order = made == [i for i, token in enumerate(ranks) if token and len(token) > 1]
        odd = saved.get("normalizer") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] != "BPE" or odd or not pattern or not in_order or data.EOT not in special:
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: not a byte-level BPE with {data.EOT}, cut as GPT-2's or SmolLM's is; {HOW}") from None
    if len(ranks) > 65536:
        raise UserError(f"{path}: {len(ranks)} entries do not fit into the 16 bits that a token has here; {HOW}")
    return data.tokenizer_json(ranks, pattern, special)
