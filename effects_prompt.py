"""What Tryage, Arch-Router and GLIDER claim, measured: systems of zoo.py that decide from a summary of the prompt.

effects.py is the command that calls these functions, and says what they return. The first section is of use to it and
to effects_adapt.py, too: it stands here because they import this file, and this one neither of them.
"""
import copy
import dataclasses
import re
from pathlib import Path

import numpy as np
import torch

import claims
import data
import router
import zoo
from common import UserError
from gates import GAIN_UNIT
from model import BIG

# ---------------------------------------------------------------------------------------------------------------------
# a finding, and what it is measured on

def rounded(value):
    """For JSON: arrays to lists, numbers to 4 significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float | np.floating) else value


def finding(claim, paper, part, unit, seeds, sequences, detail, parts=None):
    """-> what an effect returns. part: (estimate, low, high), above 0 where the claim holds; parts: if several must."""
    return {"claim": claim, "paper": paper, "effect": part[0], "ci": list(part[1:]), "unit": unit,
            "verdict": claims.verdict(parts or [part]), "seeds": sorted(set(seeds)), "sequences": sequences,
            "detail": rounded(detail)}


def routers_of(r, name):
    """-> {(budget, seed): Router}: the run's {SMALL, BIG} routers of that name. UserError where there is none."""
    folder, found = Path(r.config.out_dir) / "routers", {}
    for path in sorted(folder.glob(f"{name}_k*.npz")):  # written last: a router that still learns has none
        if match := re.fullmatch(rf"{name}_k([\d.]+)_s(\d+)", path.stem):
            file = path.with_suffix(".pt")
            found[float(match[1]), int(match[2])] = router.load_router(file, r.checkpoint, r.shape, r.device)[0]
    if not found:
        raise UserError(f"{folder}: no {name} router here; make one with `python router.py --name={name} --budget=4 "
                        f"--out_dir={r.config.out_dir}`")
    return found


def evenly(r, tokens, n):
    """-> x, y [n, T] on the device: n windows, evenly spaced over the tokens, or as many as there are"""
    n = min(n, (len(tokens) - 1) // r.shape.block_size)
    corpus = dataclasses.replace(r.corpus, val={"these": tokens})
    return [t.to(r.device) for t in data.eval_windows(corpus, "these", n, r.shape.block_size)]


# ---------------------------------------------------------------------------------------------------------------------
# what Tryage, Arch-Router and GLIDER share

def one_per_seed(found):
    """-> {(budget, seed): Router}, of each seed the one with the least budget"""
    return {(k, seed): made for (k, seed), made in found.items() if k == min(b for b, s in found if s == seed)}


def losses_of(r, made, x, y):
    """-> loss of each sequence [S] with the router's hard choices, numpy"""
    return router.choose(r.exact, made, x, y)[1].mean(-1).double().cpu().numpy()


@torch.no_grad()
def meet(r, made, x, k):
    """Shift a zoo.Planned router until it spends k BIG per token on x [S, T]. The token embeddings are all that it
    reads, so that no layer need be run."""
    e, low, high = r.exact.embedding(x), -100.0, 100.0
    for _ in range(40):
        made.shift[BIG] = (low + high) / 2
        spent = (made.plan(e, {}) > 0).sum(-1).float().mean().item()
        low, high = (low, made.shift[BIG].item()) if spent > k else (made.shift[BIG].item(), high)


# ---------------------------------------------------------------------------------------------------------------------
# Tryage

@torch.no_grad()
def tryage(r, windows, config):
    """One head, swept over prices, against a linear router trained for each budget, both at the linear one's spending
    on these windows. And what the head knows: how often it picks the pattern that is best for the token, and R^2 (over
    what each pattern's own mean explains) of advantages and, for the control, of raw losses."""
    x, y, L = windows[0].to(r.device), windows[1].to(r.device), r.shape.n_layer
    heads = {seed: made for (_, seed), made in one_per_seed(routers_of(r, "tryage")).items()}
    lines = {key: made for key, made in routers_of(r, "linear").items() if key[1] in heads}
    if not lines:
        raise UserError(f"{config.out_dir}/routers: no linear router with a seed of the tryage ones; make one with "
                        f"`python router.py --name=linear --budget=4 --seed={min(heads)} --out_dir={config.out_dir}`")
    rows, gains, curves, known = [], [], [], []
    for (k, seed), line in lines.items():
        route, losses = router.choose(r.exact, line, x, y)
        achieved = (route == BIG).sum(-1).float().mean().item()
        meet(r, heads[seed], x, achieved)
        linear, mine = losses.mean(-1).double().cpu().numpy(), losses_of(r, heads[seed], x, y)
        gains.append(linear - mine)
        rows.append({"k": k, "seed": seed, "achieved": achieved, "linear": linear.mean(), "tryage": mine.mean(),
                     "linear_minus_tryage": claims.interval(gains[-1])})
    for made in heads.values():
        curves.append([])
        for k in range(0, L + 1, max(1, L // 6)):
            meet(r, made, x, k)
            curves[-1].append([made.shift[BIG].item() * -GAIN_UNIT, k, losses_of(r, made, x, y).mean()])
        losses = torch.cat([made.pattern_losses(r.exact, made.library, *rows_) for rows_ in
                            zip(x.split(32), y.split(32), strict=True)])  # [S, T, P]
        e = r.exact.embedding(x)
        guess, raw, advantage = made.predict(e, {}), made.predict(e, {}, head=1), losses.mean(-1, keepdim=True) - losses
        best = losses.argmin(-1)

        def r2(predicted, true):
            spread = (true - true.mean((0, 1))).square().sum()
            return 1 - ((predicted - true).square().sum() / spread).item()

        def hits(choice):
            return (choice == best).float().mean().item()
        known.append({"accuracy": hits(guess.argmax(-1)), "accuracy_of_control": hits(raw.argmin(-1)),
                      "majority": best.flatten().bincount().max().item() / best.numel(),
                      "chance": 1 / len(made.library),
                      "r2_advantage": r2(guess * GAIN_UNIT, advantage), "r2_raw": r2(raw, losses),
                      "r2_advantage_of_control": r2(raw.mean(-1, keepdim=True) - raw, advantage),
                      "loss_chosen": losses.gather(-1, guess.argmax(-1, keepdim=True)).mean().item(),
                      "loss_best_pattern": losses.mean((0, 1)).min().item(),
                      "loss_oracle_in_library": losses.amin(-1).mean().item()})
    gain = claims.interval(np.mean(gains, 0))
    return finding("one head swept over prices beats a linear router trained for each budget",
                   "Tryage: its router picks the best model 50.9% of the time, two language models as routers 23.6% "
                   "and 10.8%; sweeping lambda draws the Pareto front", gain, "nats, linear minus tryage", heads,
                   len(x), {
                       "budgets": rows, "curve_price_budget_loss": np.mean(curves, 0),
                       "known": {key: np.mean([one[key] for one in known]) for key in known[0]},
                       "library": next(iter(heads.values())).library.int()})


# ---------------------------------------------------------------------------------------------------------------------
# Arch-Router

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


def arch(r, windows, config):
    """Add cpp, which neither base nor matcher has seen, by its descriptor and a row of the table. Accuracy: over tokens
    after the first look at the prompt. Controls: a softmax head on the same summaries, which has no place for cpp; the
    same trained again with it; the matcher before training (whitening alone, no "other")."""
    cpp, held_out, fingerprint = data.extra_domain("cpp", r.corpus)
    per_domain, names = int((windows[2] == 0).sum()), [*r.domains, "cpp"]
    x_new, y_new = evenly(r, held_out, per_domain)
    texts = [windows[0][torch.from_numpy(windows[2] == d)].to(r.device) for d in range(len(r.domains))] + [x_new]
    train = [evenly(r, tokens, 128) for tokens in (*(r.corpus.train[d] for d in r.domains), cpp)]
    found, parts, gains = [], [], []
    made_by_seed = one_per_seed(routers_of(r, "arch"))
    for (k, _), made in made_by_seed.items():
        def looks(x, made=made):
            return zoo.summary(r.exact.embedding(x), {}, made.every)[0][:, made.every - 1:]  # [S, T', d]

        def right(choose):
            """-> of each domain, for each sequence the share of tokens that are given to it"""
            return [(choose(looks(x)) == d).float().mean(-1).double().cpu().numpy() for d, x in enumerate(texts)]

        def by_policy(made):
            return lambda z: made.match(z, made.policy[1:]).masked_fill(~made.used, -torch.inf).argmax(-1) - 1

        def by_head(n):
            label = torch.arange(n, device=r.device).repeat_interleave(len(train[0][0]))
            z = [looks(x)[:, ::made.every] for x, _ in train[:n]]
            head = softmax_head(torch.cat(z).flatten(0, 1), label.repeat_interleave(z[0].shape[1]))
            return lambda z: head_choices(head, z)

        def on_new():
            meet(r, made, x_new, k)
            return losses_of(r, made, x_new, y_new)
        with torch.no_grad():
            before, loss_before = right(by_policy(made)), on_new()
            to_other = (by_policy(made)(looks(x_new)) == -1).float().mean().item()
            rank, _ = zoo.greedy_ranks(r.fast, *(t[:32] for t in train[-1]), made.cheap)
            made.add_policy(r.exact, train[-1][0][:32], rank, k)
            after, loss_after = right(by_policy(made)), on_new()
            untrained = copy.deepcopy(made)
            untrained.change.zero_()
            untrained.other.fill_(-1e9)
            plain = right(by_policy(untrained))
            made.policy[1:], made.rank[0] = made.policy[0], rank  # all default, and that is cpp's own pattern
            made.used[1:] = False
            loss_own = on_new()
        fixed, again = right(by_head(len(r.domains))), right(by_head(len(names)))
        parts.append(after[-1] - 1 / len(names))
        gains.append(loss_before - loss_after)
        accuracy = {"before": before, "after": after, "untrained": plain, "softmax": fixed, "softmax_retrained": again}
        found.append({key: [one.mean() for one in value] for key, value in accuracy.items()} | {
            "new_to_other_before": to_other, "loss_before": loss_before.mean(), "loss_after": loss_after.mean(),
            "loss_own_pattern": loss_own.mean()})
    accuracy, gain = claims.interval(np.mean(parts, 0)), claims.interval(np.mean(gains, 0))
    detail = {"domains": names, "chance": 1 / len(names), "extra_fingerprint": fingerprint,
              "loss_before_minus_after": gain} | {key: np.mean([one[key] for one in found], 0) for key in found[0]}
    return finding("a domain added by its descriptor alone is recognized, without training",
                   "Arch-Router: 93.17% of routes right overall; new policies need no retraining", accuracy,
                   "accuracy on the new domain, minus chance", [seed for _, seed in made_by_seed], len(x_new), detail)


# ---------------------------------------------------------------------------------------------------------------------
# GLIDER

@torch.no_grad()
def glider(r, windows, config):
    """Sweep s, each calibrated anew on the very windows, held-in (the run's domains) or held-out (cpp), so that all
    compare at one budget. s for the headline is chosen on training text. The mix: all three domains, weighed alike."""
    _, held_out, fingerprint = data.extra_domain("cpp", r.corpus)
    per_domain, grid = min(int((windows[2] == 0).sum()), 256 if r.device.type == "cuda" else 32), (0, 0.25, 1, 4, 16)
    groups = {"train": [evenly(r, r.corpus.train[d], per_domain) for d in r.domains],
              "held_in": [evenly(r, r.corpus.val[d], per_domain) for d in r.domains],
              "held_out": [evenly(r, held_out, per_domain)]}
    groups = {key: [torch.cat(part) for part in zip(*texts, strict=True)] for key, texts in groups.items()}
    made_by_seed, losses, cosines = one_per_seed(routers_of(r, "glider")), {key: [] for key in groups}, []
    for (k, _), made in made_by_seed.items():
        for key, (x, y) in groups.items():
            losses[key].append([])
            for s in grid:
                made.s.fill_(s)
                router.calibrate(r.exact, made, x, (k, None))
                losses[key][-1].append(losses_of(r, made, x, y))
        n = len(r.domains)

        def by_text(centre, made=made):
            """-> mean cosine with each prototype, of each domain's text and of the held-out one"""
            made.centre.copy_(centre)
            z = made.cosines(r.exact.embedding(torch.cat([groups[key][0] for key in ("held_in", "held_out")])), {})
            return torch.stack([part.mean((0, 1)) for part in z[:, made.every - 1:, :n].split(per_domain)])
        centre = made.centre.clone()
        cosines.append([by_text(centre), by_text(torch.zeros_like(centre))])
    losses = {key: np.mean(values, 0) for key, values in losses.items()}  # [len(grid), S]
    chosen = 1 + losses["train"][1:].mean(1).argmin()
    gains = {key: losses[key][0] - losses[key][chosen] for key in ("held_in", "held_out")}
    held_in, out = (claims.interval(gain) for gain in gains.values())
    mix = (losses["held_in"].mean(1) * len(r.domains) + losses["held_out"].mean(1)) / (len(r.domains) + 1)
    detail = {
        "s": list(grid), "chosen_s": grid[chosen], "best_s_on_mix": grid[int(mix.argmin())], "mix": mix,
        "held_in": losses["held_in"].mean(1), "held_out": losses["held_out"].mean(1), "gain_held_out": out,
        "budgets": [k for k, _ in made_by_seed], "extra_fingerprint": fingerprint,
        "gains_held_in": [claims.interval(losses["held_in"][0] - row) for row in losses["held_in"][1:]],
        "gains_held_out": [claims.interval(losses["held_out"][0] - row) for row in losses["held_out"][1:]],
        "domains": [*r.domains, "cpp"], "cosines": cosines[0][0], "cosines_uncentered": cosines[0][1],
        "profiles": next(iter(made_by_seed.values())).profile[:n]}
    return finding("a global score added to a trained local router lowers the loss on the domains it knows",
                   "GLIDER: held-in +6.6%, held-out at most +0.88", held_in,
                   "nats, local alone minus local and global", [seed for _, seed in made_by_seed],
                   len(gains["held_in"]), detail)
