"""What a run loses, sequence by sequence: python results/losses.py out/run [more runs] writes losses.json into each.

Runs of one corpus are measured on the same validation text, so that they can be compared in pairs, also where their
checkpoints are not kept. In losses.json: `losses`, {routes: nats per token of each sequence [S]}; `flops`, {routes: per
token, a router's own included}; `domain` [S]; `windows` and `fingerprint`, hashes of that text and of the corpus;
`seed`, `train_route`; of a router also `big_per_token` and `big_by_layer`. Routes: "big" of a run trained at all-BIG;
"p_skip/p_big" (of the rest) of one trained on random routes; "k4" of one that a router routes: router.py has measured
that one already, on the same text.
"""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from analyze import batch_losses
from claims import without_nan
from common import Parser, UserError, commit, derive_seed, find_device, load_checkpoint, write_atomic
from common import run as run_script
from model import BIG, random_route
from oracle import OracleConfig, Run
from router import TOKENS

SHARES = (*((0.0, p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)), (1 / 3, 1 / 2), (1 / 2, 1.0))  # of SKIP; of BIG in the rest


def parser():
    flags = Parser(description=__doc__)
    flags.add_argument("runs", nargs="+", help="folders of finished runs")
    flags.add_argument("--device", default="auto")
    return flags


def text_hash(idx):
    """-> a hash of token windows [S, T], array or tensor: runs with the same one can be paired"""
    return hashlib.sha256(np.asarray(idx, dtype=np.int64).tobytes()).hexdigest()[:16]


@torch.no_grad()
def measure(out_dir, device):
    """-> the content of losses.json, on the windows that router.py plans with. Raises UserError."""
    saved = load_checkpoint(Path(out_dir) / "ckpt.pt")
    trained = saved["train_config"]
    if saved["step"] < trained["max_steps"]:
        raise UserError(f"{out_dir}: is not finished, step {saved['step']} of {trained['max_steps']}; the command that "
                        "began it goes on with --resume")
    r = Run(OracleConfig(out_dir=str(out_dir), device=str(device), data_dir=str(Path(saved["corpus"]).parent)))
    x, y, domain = r.windows(min(TOKENS[trained["preset"]], r.holds()))
    T, L = r.shape.block_size, r.shape.n_layer
    found = {"seed": trained["seed"], "train_route": trained["train_route"], "fingerprint": saved["fingerprint"],
             "windows": text_hash(x), "domain": domain.tolist(),
             "domains": r.domains, "losses": {}, "flops": {}, "torch": torch.__version__, "commit": commit(),
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    if trained["train_route"] == "router":
        found |= {"big_per_token": {}, "big_by_layer": {}}
        for path in sorted((Path(out_dir) / "routers").glob("*.npz")):
            with np.load(path) as file:
                notes, route = json.loads(str(file["notes"])), file["routes"]
                if not np.array_equal(file["idx"], x.numpy()):
                    raise UserError(f"{path}: was measured on other sequences than the preset's {len(x)}; move it "
                                    "away, and run router.py --joint once more without --tokens")
                key = f"k{notes['budget']:g}"
                found["losses"][key] = file["losses"].mean(-1, dtype=np.float64).tolist()
                found["flops"][key] = float(file["flops"].mean()) + notes["router_flops"]
                found["big_per_token"][key] = float((route == BIG).sum(-1).mean())
                found["big_by_layer"][key] = (route == BIG).mean((0, 1)).round(4).tolist()
        return found
    routes = {"big": BIG}
    if trained["train_route"] != "big":
        routes = {f"{p_skip:.3g}/{p_big:g}": random_route(
            len(x), T, L, p_skip, p_big, torch.Generator().manual_seed(derive_seed(1, "losses", p_skip, p_big)))
                  for p_skip, p_big in SHARES}
    for key, route in routes.items():
        found["losses"][key] = batch_losses(r.exact, x, y, route).tolist()
        flops = r.exact.flops(route, T)
        found["flops"][key] = flops.double().mean().item() if isinstance(flops, torch.Tensor) else float(flops)
    return found


def main(argv=None):
    flags = parser().parse_args(argv)
    device = find_device(flags.device)
    for out_dir in flags.runs:
        found = measure(out_dir, device)
        write_atomic(Path(out_dir) / "losses.json", json.dumps(without_nan(found)).encode())
        print(f"{out_dir}/losses.json: " + ", ".join(f"{key} {np.mean(values):.4f}" for key, values in
                                                     found["losses"].items()))


if __name__ == "__main__":
    run_script(main)
