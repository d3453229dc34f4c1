"""What Rewiring and LoRA-Mixer claim, measured: systems of zoo.py that change logits as they read, or the weights.

effects.py is the command that calls these functions, and says what they return.
"""
import contextlib

import numpy as np
import torch

import claims
import diagnosis
import gates
import router
from common import UserError, generator
from effects_prompt import finding, routers_of
from model import BIG, KVCache
from zoo import LORAS, top2

# ---------------------------------------------------------------------------------------------------------------------
# what the two share

def at_one_budget(r, names, budget=None):
    """-> k, {name: {seed: Router}}: at the smallest budget that all names have. Raises UserError where one is missing.
    """
    found = {name: routers_of(r, name) for name in names}
    common = set.intersection(*({k for k, _ in of_name} for of_name in found.values()))
    common &= {budget} if budget is not None else common
    if not common:
        raise UserError(f"{r.config.out_dir}/routers: this needs {' and '.join(names)} at one budget; make them with "
                        f"`python router.py --name={','.join(names)} --budget={4 if budget is None else budget:g} "
                        f"--out_dir={r.config.out_dir}`")
    least = min(common)
    return least, {name: {seed: made for (k, seed), made in found[name].items() if k == least} for name in names}


def first_of_each(windows, n):
    """-> idx, targets, domain of the first n windows of each domain"""
    rows = np.concatenate([np.flatnonzero(windows[2] == d)[:n] for d in np.unique(windows[2])])
    return *(part[rows] for part in windows),


def at_budget(r, made, idx, targets, big):
    """Losses [S, T] and BIG per token [S, T], numpy, with `big` BIG per token on these very tokens: the shift is fitted
    on them (no loss is seen), so that what is compared spends the same."""
    before = made.shift.clone()
    router.calibrate(r.exact, made, idx, (big, None), tolerance=0.005)
    route, losses = router.choose(r.exact, made, idx, targets)
    made.shift.copy_(before)
    return losses.cpu().numpy(), (route == BIG).sum(-1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Rewiring

@torch.no_grad()
def own_deltas(made, idx):
    """-> delta [S, L, 3] of each m tokens, each learned from the tokens before them; call within attached()"""
    deltas = [torch.zeros(len(idx), *made.b_out.shape, device=idx.device)]
    for t in range(made.every, idx.shape[1], made.every):
        deltas.append(made.adapt(idx[:, :t], deltas[-1]))
    return deltas


@torch.no_grad()
def control_deltas(made, idx, own, rng):
    """-> {control: deltas}, of other documents, random of equal norm, and fitted on the very tokens that are scored"""
    m, found = made.every, {"own": own} | dict.fromkeys(("other", "random", "future"), own[:1])
    for i, delta in enumerate(own[1:], 1):
        noise = torch.randn(delta.shape, generator=rng, device=delta.device)
        noise *= delta.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
        read = idx[:, :i * m]
        found["other"] = [*found["other"], made.recentred(read, delta.roll(1, 0))]
        found["random"] = [*found["random"], made.recentred(read, noise)]
        found["future"] = [*found["future"], made.adapt(idx[:, :(i + 1) * m], delta, since=i * m)]
    return found


@torch.no_grad()
def with_deltas(r, made, idx, targets, deltas):
    """-> losses, BIG per token [S, T], numpy. The deltas lie where the router looks for those it already has."""
    cache = KVCache(r.shape, len(idx), r.device, torch.float32)
    cache.seq["delta"] = deltas
    _, losses, stats = r.exact(idx, made, targets, cache=cache, reduction="none", return_stats=True)
    return losses.cpu().numpy(), (stats["route"] == BIG).sum(-1).cpu().numpy()


RATES = (0.05, 0.5, 8.0)  # the paper's, and what lies around ours


def rewire(r, windows, config):
    """Routers trained on prose: what delta buys on code (a shift) and on prose, at equal BIG on the same tokens."""
    if len(r.domains) < 2:
        raise UserError(f"{r.config.out_dir}: its corpus has one domain, and this is about a router that meets another")
    k, routers = at_one_budget(r, ["rewire_prose"])
    windows = first_of_each(windows, 64 if r.device.type == "cuda" else 24)
    rng = generator(r.device, config.seed, "rewire")
    m, detail, headline = next(iter(routers["rewire_prose"].values())).every, {"budget": k}, []
    for d, name in enumerate(r.domains):
        idx, targets = (part[windows[2] == d].to(r.device) for part in windows[:2])
        gains, rates, drift = {}, {}, []
        for made in routers["rewire_prose"].values():
            def gain(deltas, made=made, idx=idx, targets=targets):
                """-> loss minus that of the same router without delta, at the same BIG [S, T]; BIG [S, T] minus its"""
                losses, big = with_deltas(r, made, idx, targets, deltas)
                made.train()  # as in training: no adaptation
                plain, plain_big = at_budget(r, made, idx, targets, big.mean())
                made.eval()
                return losses - plain, big - plain_big
            with made.attached(r.exact):
                own = own_deltas(made, idx)
                for control, deltas in control_deltas(made, idx, own, rng).items():
                    difference, more = gain(deltas)
                    gains.setdefault(control, []).append(difference)
                    drift += [more] if control == "own" else []
                ours = made.rate
                for made.rate in RATES if d == 0 else ():
                    rates.setdefault(made.rate, []).append(gain(own_deltas(made, idx))[0])
                made.rate = ours
            rates.setdefault(ours, []).append(gains["own"][-1])
        gains = {control: np.mean(parts, 0) for control, parts in gains.items()}  # over seeds: [S, T]
        detail[name] = {
            "gain": {control: claims.interval(part.mean(1)) for control, part in gains.items()},
            "by_chunk": {control: part.reshape(len(part), -1, m).mean((0, 2)) for control, part in gains.items()},
            "more_big_by_chunk": np.mean(drift, 0).reshape(len(idx), -1, m).mean((0, 2)),
            "rates": {str(rate): claims.interval(np.mean(parts, 0).mean(1)) for rate, parts in sorted(rates.items())}}
        if d == 0:  # code
            headline = gains["own"].mean(1)
    made = next(iter(routers["rewire_prose"].values()))
    detail |= {"every": m, "rate": made.rate, "flops": made.flops(), "flops_without": gates.Router.flops(made),
               "flops_all_big": r.exact.flops(BIG)}
    return finding("a delta learned on the document so far lowers the loss on a domain the router has not seen",
                   "HumanEval +5.5% on OLMoE, about twice the time (arXiv 2510.14853)", claims.interval(-headline),
                   "nats gained", routers["rewire_prose"], len(headline), detail)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA-Mixer

def evenness(p):
    """p [.., n], of any sum -> the entropy of p / sum, over the largest there is: 0..1"""
    return diagnosis.entropy(p / p.sum(-1, keepdims=True)) / np.log(p.shape[-1])


@torch.no_grad()
def specialization(r, made, idx, domain):
    """-> {what: mean over projections} of the weights that the experts get at inference. information: of expert and
    domain, over the domain's entropy, 1 where an expert serves one domain; load: entropy of the experts' use; token:
    mean entropy of p. Entropies are shares of the largest one."""
    made.seen = []
    with made.attached(r.exact):
        for rows in idx.split(32):
            r.exact(rows, made)
    n, made.seen, seen = 2 * r.shape.n_layer, None, made.seen
    p = np.stack([torch.cat(seen[i::n]).cpu().numpy() for i in range(n)])  # [2 L, S, T, E]
    alpha = top2(torch.from_numpy(p)).numpy().sum(2)  # [2 L, S, E]
    joint = np.stack([alpha[:, domain == d].sum(1) for d in np.unique(domain)], 1)  # [2 L, domains, E]
    joint /= joint.sum((1, 2), keepdims=True)
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    information = (joint * np.log(np.maximum(joint, 1e-30) / np.maximum(apart, 1e-30))).sum((1, 2))
    information /= np.maximum(diagnosis.entropy(joint.sum(2)), 1e-30)
    return {"information": information.mean(), "load": evenness(joint.sum(1)).mean(), "token": evenness(p).mean()}


def lora_mixer(r, windows, config):
    """Routed LoRAs against one of the same total rank, few against many sequences, four losses; all at one budget."""
    k, routers = at_one_budget(r, ["lora_mixer", "lora_single"])
    for name in ("linear", *LORAS, *(f"{name}_few" for name in LORAS)):  # the others where there are any
        if name not in routers:
            with contextlib.suppress(UserError):
                routers |= at_one_budget(r, [name], k)[1]
    idx, targets, domain = first_of_each(windows, 128 if r.device.type == "cuda" else 32)
    idx, targets = idx.to(r.device), targets.to(r.device)
    losses, table = {}, {}
    for name, by_seed in routers.items():
        seeds = list(by_seed.values())
        runs = [at_budget(r, made, idx, targets, k) for made in seeds]
        losses[name] = np.mean([loss for loss, _ in runs], 0).mean(1)  # [S]
        row = {"loss": claims.interval(losses[name]), "BIG": np.mean([big for _, big in runs]), "seeds": len(seeds),
               "loss_by_domain": [losses[name][domain == d].mean() for d in range(len(r.domains))],
               "flops": seeds[0].flops()}
        if getattr(seeds[0], "experts", 1) > 1:
            parts = [specialization(r, made, idx, domain) for made in seeds]
            row |= {key: np.mean([part[key] for part in parts]) for key in parts[0]}
        table[name] = row
    for name in table:
        single = "lora_single_few" if name.endswith("_few") else "lora_single"
        if single in losses:
            table[name]["minus_single"] = claims.interval(losses[name] - losses[single])
    return finding("LoRAs that are routed beat one LoRA of the same total rank",
                   "+3.8 points on GSM8K over other LoRA mixtures with 48% of their parameters (arXiv 2507.00029)",
                   claims.interval(losses["lora_single"] - losses["lora_mixer"]), "nats gained",
                   routers["lora_mixer"], len(idx), {"budget": k, "routers": table})
