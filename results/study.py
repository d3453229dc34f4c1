"""The runs behind h100_skip_share.jsonl, for a GPU: python results/study.py writes out/study/skip_share.jsonl.

Short gpu-preset trainings that differ in which sequences skip and how much, each evaluated on five kinds of routes. The
committed figures were made by an earlier form of it; the shares in all sequences before train.py had skip_every.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import train
from common import find_device, generator, load_run, parse_config
from model import BIG, SMALL, random_route

OUT = Path("out/study/skip_share.jsonl")


@torch.no_grad()
def losses(out_dir, config):
    """-> {"domain/kind of route": nats per token} on the validation windows that train.py evaluates on."""
    device = find_device(config.device)
    model, shape, checkpoint = load_run(out_dir, device)
    corpus = data.load(Path(checkpoint["corpus"]))
    result = {}
    for domain in corpus.domains:
        x, y = (t.to(device) for t in train.validation_windows(corpus, config, domain))
        shares = {"two": (0.0, 0.5), "three": (1 / 3, 1 / 3), "bigskip": (0.5, 0.5)}  # p_skip, p_big
        routes = {kind: random_route(len(x), shape.block_size, shape.n_layer, *p, generator(device, 1, "study", domain))
                  for kind, p in shares.items()} | {"small": SMALL, "big": BIG}
        for kind, route in routes.items():
            parts = [model(x[i:i + 64], route if isinstance(route, int) else route[i:i + 64], y[i:i + 64],
                           reduction="none")[1] for i in range(0, len(x), 64)]
            result[f"{domain}/{kind}"] = round(torch.cat(parts).double().mean().item(), 5)
    return result


def main():
    for skip_every, p_skip in ((0, 0.0), (1, 0.1), (1, 0.2), (1, 0.33), (4, 0.333), (8, 0.333)):
        for seed in (1, 2, 3):
            out_dir = f"out/study/every{skip_every}_share{p_skip}_seed{seed}"
            config = parse_config(train.TrainConfig, [
                "--preset=gpu", "--max_steps=600", f"--skip_every={skip_every}", f"--p_skip={p_skip}", f"--seed={seed}",
                f"--out_dir={out_dir}"], train.PRESETS)
            train.train(config)
            with open(OUT, "a") as file:
                line = {"skip_every": skip_every, "p_skip": p_skip, "seed": seed, "loss": losses(out_dir, config)}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
