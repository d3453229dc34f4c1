"""What every script shares: dataclass -> command line, device, seeds, files that survive a crash, checkpoints.

A script looks like this (one dataclass is the single source of its flags, --help and config.json):

    @dataclass
    class Config:
        out_dir: str = arg("out", "folder of the run")
        ...
    def main(argv=None):
        config = parse_config(Config, argv, PRESETS)
        ...
    if __name__ == "__main__":
        run(main)
"""
import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from model import DuoConfig, DuoGPT

CHECKPOINT_VERSION = 1


class UserError(Exception):
    """Bad input. Its text is the one clear line that the user sees: it names the value and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# command line

def arg(default, help):
    """A config field with its one line of documentation, which --help prints."""
    return dataclasses.field(default=default, metadata={"help": help})


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints the usage first; we promise one line
        raise UserError(message.replace("argument ", ""))


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() in ("true", "1")


def parse_config(cls, argv=None, presets=None):
    """Read the command line into the dataclass `cls`.

    Order: the dataclass's defaults, then the preset, then explicit flags. A preset is a dict of field values in
    `presets`; `--preset=auto` takes `gpu` or `cpu` by the device. Raises UserError for a bad flag or value.
    """
    parser = Parser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for f in fields.values():
        kind = {"type": parse_bool, "nargs": "?", "const": True} if f.type is bool else {"type": f.type}
        shown = "" if f.default == "" else f" (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=f.type.__name__.upper(), **kind,
                            help=f.metadata["help"].replace("%", "%%") + shown)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), fields, n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        raise UserError(f"unknown argument {flag}: {hint}")
    given = vars(given)
    values = {}
    if presets:
        name = given.get("preset", fields["preset"].default)
        if name == "auto":
            name = "gpu" if find_device(given.get("device", "auto")).type == "cuda" else "cpu"
        if name not in presets:
            raise UserError(f"--preset={name}: choose from auto, {', '.join(presets)}")
        values = dict(presets[name], preset=name)
    return cls(**(values | given | ({"preset": values["preset"]} if presets else {})))


def run(main):
    """Call main() and turn what a user can cause into one line and an exit code: 2 bad input, 130 interrupted."""
    script = Path(sys.argv[0]).name
    try:
        code = main() or 0
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        code = 2
    except torch.OutOfMemoryError:
        print(f"{script}: error: out of GPU memory: lower --micro_batch (sequences per forward) where the script has "
              "it, or use a smaller --preset", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader left (`| head`); what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a read-only folder
        print(f"{script}: error: {error.filename or 'output'}: {error.strerror or error}: free space there, or choose "
              "another --out_dir or --data_dir", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if "RANK" in os.environ:  # under torchrun: a thread of the process group may outlive it, and would abort the exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# device, dtype, seeds

def find_device(name):
    """'auto' is cuda where there is one, else cpu. -> torch.device. Raises UserError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name}: choose auto, cpu, cuda, cuda:N or mps") from None
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, False) or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: not available on this machine; use --device=cpu or leave it out")
    return device


def compute_dtype(device):
    """The dtype of activations, and why. Parameters and optimizer state are always float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU multiplies bfloat16 natively"
    return torch.float32, "no native bfloat16 here"


def derive_seed(seed, *purpose):
    """A seed for one purpose: derive_seed(1, "data", step). Streams of different purposes are independent. The step is
    part of the name, so there is no generator state to save: step 500 draws the same numbers after a resume."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch wants 63 bits


def generator(device, seed, *purpose):
    """torch.Generator on `device`, seeded for one purpose (see derive_seed)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


# ---------------------------------------------------------------------------------------------------------------------
# files

def write_atomic(path, data):
    """Write bytes under a temporary name, then rename: a crash or a full disk leaves the old file whole."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def open_out_dir(out_dir):
    """Create the run's folder and prove that it can be written to, before hours are spent. -> Path"""
    folder = Path(out_dir)
    if folder.is_file():
        raise UserError(f"--out_dir={out_dir}: is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ".probe", b"x")
    (folder / ".probe").unlink(missing_ok=True)  # another process of the same torchrun may have been faster
    return folder


def save_checkpoint(path, checkpoint):
    """Save a dict of tensors and plain values. Serialized in memory first, so that a full disk is a plain OSError."""
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION} | checkpoint, buffer)
    write_atomic(path, buffer.getbuffer())


def load_checkpoint(path, device="cpu"):
    """-> the dict. Raises UserError for a file that is missing, cut short, of another version, or holds a pickle."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no checkpoint here; make one with `python train.py --out_dir={path.parent}`")
    content = io.BytesIO(path.read_bytes())  # a file that cannot be read is an OSError, and no damaged one
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at what a damaged file might be
            checkpoint = torch.load(content, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # on a damaged file torch's unpickler may raise anything
        payload = "unsupported global" in str(error).lower()
        what = "holds code besides tensors and was refused" if payload else "is damaged or cut short"
        raise UserError(f"{path}: {what}; delete it and train again, or choose another --out_dir") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("version") != CHECKPOINT_VERSION:
        raise UserError(f"{path}: not a nanoduo checkpoint of version {CHECKPOINT_VERSION}; train again in another "
                        "--out_dir")
    return checkpoint


def load_run(out_dir, device):
    """-> model (in eval mode, on `device`), its DuoConfig, the rest of the checkpoint (step, train_config, ...)."""
    checkpoint = load_checkpoint(Path(out_dir) / "ckpt.pt", device)
    config = DuoConfig(**checkpoint.pop("model_config"))
    model = DuoGPT(config).to(device)
    model.load_state_dict(checkpoint.pop("model"))
    model.compute_dtype, _ = compute_dtype(torch.device(device))
    checkpoint.pop("optimizer", None)
    return model.eval(), config, checkpoint


def catch_signals():
    """-> a list that the first SIGINT or SIGTERM is put into, so that a loop can save and leave (a second one ends at
    once), and a function that gives the signals back."""
    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number) if not stop else sys.exit(130))
                for s in (signal.SIGINT, signal.SIGTERM)}
    return stop, lambda: [signal.signal(number, handler) for number, handler in handlers.items()]


def commit():
    """-> the commit that is checked out, with + where files differ from it; empty outside git."""
    def git(*words):
        here = ["git", "-C", Path(__file__).parent]
        return subprocess.run([*here, *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def append_jsonl(path, record):
    """One JSON object a line, flushed, so that a reader can follow a run and a kill loses at most the last line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_jsonl(path):
    """-> list of dicts. A last line cut short by a kill is left out."""
    lines = Path(path).read_text().split("\n") if Path(path).exists() else []
    return [json.loads(line) for line in lines[:-1] if line]
