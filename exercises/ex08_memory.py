"""Exercise 8: a problem that only a router with a memory can solve.

Task. zoo.py's rmoe hands a state from layer to layer (a GRU over depth), so a late layer knows what the early ones saw.
On real text it was no better than the same router without the state (ZOO.md, H100). Is it useless, or had it nothing to
remember? Design a problem in which it must win: fill in plant, which writes the weights of a small model by hand. A
token with a flag is followed by token 1, one without by token 0. empty_model and adds below are your tools: there is
no attention, and FFNs are set coordinate by coordinate.

Why. A method that wins nowhere may be broken. A planted problem, whose answer is known, shows that the code can do what
its idea promises; only then does a null result on real text mean something.

Read first: RMoE in zoo.py, and planted_model in tests/test_router.py: there every layer sees the flag.

Hint: a stateless router in layer l knows the residual h that enters layer l, and nothing else. For it to fail, the
choices that matter must be made where h does not tell any more what a good choice is. Who could have seen it before?
"""
import tempfile
from itertools import product
from pathlib import Path

import torch

import router
from model import BIG, SMALL, DuoConfig, DuoGPT

CONSTANT, FLAG, ANSWER_0, ANSWER_1 = range(4)  # coordinates of the residual; 4..15 only tell tokens apart
N = 20  # tokens 2..21 have no flag; 22..41, their twins, differ from them in the flag alone


def empty_model(n_layer=3):
    """A model whose attention and FFNs write nothing. Tokens 0 and 1 are the answers. Of the others, h enters layer 0
    as (1, -1, 0, 0, ..) where there is no flag and as (1, 1, 0, 0, ..) where there is one."""
    model = DuoGPT(DuoConfig(n_layer, n_head=2, n_embd=16, block_size=16, vocab_size=2 + 2 * N, big_width=4,
                             small_width=4)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.zero_()
    table = model.embedding.weight
    table[:, CONSTANT] = 1
    table[0, ANSWER_0], table[1, ANSWER_1] = 3, 3
    signs = torch.randint(2, (N, 12), generator=torch.Generator().manual_seed(2)) * 2 - 1
    table[2:, 4:] = 0.3 * signs.repeat(2, 1)  # all of one length, which RMSNorm divides by
    table[2:, FLAG] = torch.tensor([-1.0, 1.0]).repeat_interleave(N)
    return model


def adds(ffn, read, write, amount):
    """Set an FFN (block.small or block.big) so that it adds amount * h[read] to h[write]. (Exactly so for the h that
    enters layer 0. A longer h is divided by more, so less of it is added.)"""
    size = torch.tensor((2 + 12 * 0.3 ** 2) / 16).sqrt()  # what RMSNorm divides that h by
    gate, up = ffn.gate_up.weight.zero_().chunk(2)
    gate[0, CONSTANT], up[0, read] = 1, 1
    ffn.down.weight.zero_()[write, 0] = amount * size / torch.nn.functional.silu(1 / size)


def plant(model):
    """Write FFNs of empty_model() by adds(model.blocks[l].small or .big, read, write, amount). Nothing is returned.

    By hand: after adds(model.blocks[0].big, FLAG, ANSWER_1, 2.0), a BIG in layer 0 makes (1, 1, 0, 2, ..) of an h
    with a flag: token 1 is likelier next. Without one it makes (1, -1, 0, -2, ..).
    """
    raise NotImplementedError("exercise 8: fill in plant")


# ---------------------------------------------------------------------------------------------------------------------
# the check

STATELESS = ("linear", "mlp", "rmoe_np")  # the last: rmoe itself, but its state starts anew in each layer


def batch(step, n=16, T=16):
    """-> tokens [n, T], 6 of 16 with a flag; what follows each, [n, T]; their domain"""
    rng = torch.Generator().manual_seed(step)
    flag = torch.rand(n, T, generator=rng).argsort(1) < 6
    return torch.randint(2, 2 + N, (n, T), generator=rng) + N * flag, flag.long(), torch.zeros(n, dtype=torch.int64)


def planted():
    """-> the model; the losses [2^L, n, T] of all patterns on text that nobody learns from, and BIG in each pattern"""
    model = empty_model()
    plant(model)
    patterns = list(product((SMALL, BIG), repeat=len(model.blocks)))
    idx, targets, _ = batch(10 ** 6 + 1, n=64)
    losses = torch.stack([model(idx, list(pattern), targets, reduction="none")[1] for pattern in patterns])
    return model, losses, torch.tensor(patterns).eq(BIG).sum(1)


def test_there_is_something_to_win():
    """The best pattern is the same for all tokens; the oracle takes each token's own."""
    _, losses, _ = planted()
    fixed, oracle = losses.mean((1, 2)).min().item(), losses.min(0).values.mean().item()
    assert fixed - oracle > 0.1, (
        f"the best fixed pattern is at {fixed:.3f} nats, each token's own best route at {oracle:.3f}: there is nothing "
        "to win by routing. With a flag one choice must be better, without it the other")


def test_only_the_state_wins():
    model, losses, n_big = planted()
    fixed, oracle = losses.mean((1, 2)).min().item(), losses.min(0).values.mean().item()
    # Of equal routes the cheaper one: the budget is what the oracle spends.
    best = (losses + 1e-4 * n_big.view(-1, 1, 1)).argmin(0)
    budget = (n_big[best].float().mean().item(), None)
    config = router.RouterConfig(**router.PRESETS["debug"] | {
        "steps": 50, "hidden": 16, "learning_rate": 0.05, "save_interval": 1000})
    idx, targets, _ = batch(10 ** 6 + 1, n=64)
    won = {}
    for name in (*STATELESS, "rmoe"):
        with tempfile.TemporaryDirectory() as folder:
            made = router.train_router(model, config, name, budget, batch, Path(folder) / "x.pt", "planted")
        router.calibrate(model, made, batch(10 ** 6, n=64)[0], budget)
        loss = router.choose(model, made, idx, targets)[1].mean().item()
        won[name] = (fixed - loss) / (fixed - oracle) if fixed > oracle else 0.0
    found = "of what the oracle wins over the best fixed pattern, " + ", ".join(f"{n} {w:.0%}" for n, w in won.items())
    stateless = max(won[name] for name in STATELESS)
    assert won["rmoe"] > 0.8, (f"not even the state helps: {found} (80% wanted). Does any layer see the flag? A state "
                               "can only hold what h told some layer before")
    assert stateless < 0.5, (f"both can solve it: {found} (below 50% wanted without a state). Where choices matter, h "
                             "still tells what to choose; a linear layer finds even a weak trace of it")
