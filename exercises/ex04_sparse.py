"""Exercise 4: make sparse equal dense.

Task. Fill in sparse_ffn: the FFN step of one layer for a route, with each FFN run once, on the rows of the tokens that
chose it (gather, compute, scatter). Same values as "compute both for all, then select", same gradients, less work.

Why. Saved FLOPs are saved time only if the work is really left out. Multiplying by a mask gives the right loss and
saves nothing, and a scatter gone wrong trains on other tokens' outputs, with no error to be seen.

Read first: Block.forward_dense in model.py (the slow obvious way), then Sorting.apply and PermuteRows (ours; yours may
be simpler: a mask for each choice will do).

Hint: y = torch.zeros_like(x); y[mask] = f(x[mask]) gathers, computes and scatters, and autograd follows. An FFN that
nobody chose is not called at all. What must a token that skips get, so that x + y leaves it alone?
"""
import torch

from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT


def sparse_ffn(x, choice, small, big):
    """What the chosen FFN adds to each token's residual.

    x [B, T, d]; choice [B, T] of SKIP, SMALL, BIG; small, big: functions from rows [n, d] to rows [n, d] -> [B, T, d]:
    big's row for tokens with BIG, small's for SMALL, zeros for SKIP.

    By hand: choice [[2, 0, 2]]. big is called once, on rows 0 and 2, small not at all. The result's row 1 is zeros.
    """
    raise NotImplementedError("exercise 4: fill in sparse_ffn")


# ---------------------------------------------------------------------------------------------------------------------
# the check

B, T, D = 3, 5, 8


class Watched:
    """An FFN with its norm that notes how many rows each call brought."""

    def __init__(self, block, ffn):
        self.norm, self.ffn, self.calls = block.ffn_norm, ffn, []

    def __call__(self, rows):
        assert rows.dim() == 2 and rows.shape[1] == D, f"an FFN wants rows [n, {D}], it got {list(rows.shape)}"
        self.calls.append(len(rows))
        return self.ffn(self.norm(rows))


def make(seed):
    g = torch.Generator().manual_seed(seed)
    model = DuoGPT(DuoConfig(1, 2, D, T, 11, big_width=16, small_width=4)).init_weights(g)
    block = model.blocks[0]
    block.out.weight.data.zero_()  # attention then adds nothing: the layer is its FFN
    x, direction = torch.randn(2, B, T, D, generator=g)
    return model, block, x.requires_grad_(), torch.randint(3, (B, T), generator=g), direction


def gradients(y, direction, x, block):
    """Of a loss that weighs each output differently, by x and by the FFNs' weights."""
    inputs = {"x": x} | {n: p for n, p in block.named_parameters() if n.startswith(("small", "big", "ffn_norm"))}
    found = torch.autograd.grad((y * direction).sum(), inputs.values(), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(inputs.items(), found, strict=True)}


def test_values():
    for seed in range(5):
        model, block, x, choice, _ = make(seed)
        given = x.detach().clone()
        y = sparse_ffn(given, choice, Watched(block, block.small), Watched(block, block.big))
        assert y is not None and y.shape == x.shape, f"x is {list(x.shape)}, the result must be too"
        assert torch.equal(given, x), "x was overwritten: it is the residual, and the caller still needs it"
        dense = block.forward_dense(x, choice, model.cos, model.sin) - x
        assert not torch.allclose(y, x + dense, atol=1e-5), "x + FFN was returned; return what is to be added alone"
        for value, name in ((SKIP, "SKIP: its row must be zero"), (SMALL, "SMALL"), (BIG, "BIG")):
            error = (y - dense)[choice == value].abs().sum()
            assert error < 1e-4, f"differs from dense at tokens with {name}. Does each result go back to its own token?"


def test_gradients():
    for seed in range(5):
        model, block, x, choice, direction = make(seed)
        y = sparse_ffn(x, choice, Watched(block, block.small), Watched(block, block.big))
        assert y.requires_grad, "no gradient: something was detached (.data, .detach(), no_grad, .tolist())"
        dense = block.forward_dense(x, choice, model.cos, model.sin) - x
        mine, right = (gradients(out, direction, x, block) for out in (y, dense))
        for name in right:
            torch.testing.assert_close(mine[name], right[name], rtol=1e-4, atol=1e-5, msg=(
                f"the gradient of {name} is not that of the dense path, though a gather and a scatter carry it along"))


def test_no_work_for_others():
    _, block, x, mixed, _ = make(0)
    for choice in (mixed, *(torch.full((B, T), c) for c in (SKIP, SMALL, BIG))):
        for value, name in ((SMALL, "small"), (BIG, "big")):
            ffns = {"small": Watched(block, block.small), "big": Watched(block, block.big)}
            sparse_ffn(x, choice, **ffns)
            calls, wanted = ffns[name].calls, (choice == value).sum().item()
            assert sum(calls) == wanted, f"{wanted} of {B * T} tokens chose {name}, it computed {sum(calls)} rows"
            assert len(calls) <= 1, f"{name} was called {len(calls)} times: one product of all rows is faster than many"
            assert wanted or not calls, f"nobody chose {name}, yet it was called: with no rows, but not for nothing"
