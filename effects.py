"""What each of zoo.py's systems claims, measured on the last run: one number, its interval, a verdict.

    python router.py --name=all --budget=4,8     trains what is compared here
    python effects.py                            measures, and writes zoo.json
    python effects.py --name=rmoe,glider         these only

Each function below reads the routers of the run (and says which are missing), measures, and returns one finding: the
claim of the system's paper, our effect with its 95% bootstrap interval over sequences, a verdict by claims.verdict, and
in `detail` all that its figure draws. Files: out_dir/zoo.json, a list of findings.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import claims
import router
from common import UserError, arg, parse_config, run, write_atomic

EFFECTS = {}  # {system: function(r, windows, config) -> finding}


@dataclass
class EffectsConfig:
    name: str = arg("", "which systems, comma separated; all where left out")
    out_dir: str = arg("out", "folder of the run; its ckpt.pt and routers/ are read")
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    seed: int = arg(1, "seeds what is drawn here")
    preset: str = arg("auto", "sizes: cpu, gpu or debug")
    data_dir: str = arg("data", "where prepared corpora are kept")
    tokens: int = arg(0, "validation tokens per domain; 0: as planned")


PRESETS = {"gpu": {}, "cpu": {}, "debug": {}}


# HERE
def softmax_head(z, label):
    """The classifier that Arch-Router replaces: logistic regression on summaries z [n, d], label [n] -> mean, W, b. It
    knows the classes that it was trained on, and no others."""
    n_classes, mean, scale = int(label.max()) + 1, z.mean(0), z.std(0) + 1e-6
    z = (z - mean) / scale
    weight = torch.zeros(z.shape[1], n_classes, device=z.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(z @ weight + bias, label) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    return mean, scale, weight.detach(), bias.detach()


def head_choices(head, z):
    """-> which class [...], z [..., d]"""
    mean, scale, weight, bias = head
    return ((z - mean) / scale @ weight + bias).argmax(-1)


def main(argv=None):
    config = parse_config(EffectsConfig, argv, PRESETS)
    names = config.name.split(",") if config.name else list(EFFECTS)
    for name in names:
        if name not in EFFECTS:
            raise UserError(f"--name={name}: no such system; choose from {', '.join(EFFECTS)}")
    r, _, windows = router.start(config)
    path = Path(config.out_dir) / "zoo.json"
    found = {line["system"]: line for line in json.loads(path.read_text())} if path.exists() else {}
    for name in names:
        line = EFFECTS[name](r, windows, config)
        line |= {"system": name, "command": f"python effects.py --name={name}", "checkpoint": r.checkpoint,
                 "torch": torch.__version__,
                 "device": torch.cuda.get_device_name(r.device) if r.device.type == "cuda" else "cpu"}
        found[name] = claims.without_nan(line)
        print(f"{name}: {line['verdict']}. {line['claim']}: {line['effect']:.4f} "
              f"({line['ci'][0]:.4f}..{line['ci'][1]:.4f}) {line['unit']}")
        write_atomic(path, json.dumps(list(found.values()), indent=1).encode())


if __name__ == "__main__":
    run(main)
