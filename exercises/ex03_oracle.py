"""Exercise 3: the oracle of one position, by brute force.

Task. Fill in best_route: of all routes with exactly k BIG and no SKIP, which gives the token at position t the lowest
loss on its label? Earlier tokens keep their routes. Use nothing but plain forwards of the model; slow is fine.

Why. This is the oracle, all of it: the rest of search.py is speed. Code that is fast is trusted because something slow
and obvious agrees with it, and what you write here is how tests/test_search.py proves search.py right.

Read first: DuoGPT.forward in model.py (what a route [B, T, L] is), the docstring of search.py, run_sequential in
oracle.py.

Hint: itertools.product makes the routes. For each, copy the tokens' routes, change the one at t, and read off the loss
at t (reduction="none"). The model is causal: whatever stands after t does not change the loss at t.
"""
import torch

from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT, KVCache
from search import Exhaustive, Search, settle


def best_route(model, idx, targets, history, t, k):
    """The oracle's choice at position t.

    idx, targets [1, T] int64: tokens and their labels; history [1, T, L] int64: the routes of the tokens before t (what
    it holds at t and later has no meaning) -> (route, loss): a list of L choices, k of them BIG and the others SMALL,
    and its loss at t in nats, a float.

    By hand: 2 layers, k = 1. Token t runs 1 2, then 2 1. The losses on targets[0, t] are 2.31 and 2.05: ([2, 1], 2.05).
    """
    raise NotImplementedError("exercise 3: fill in best_route")


# ---------------------------------------------------------------------------------------------------------------------
# the check

L, T, V = 4, 6, 37


def make(seed):
    """A random tiny model, with weights large enough for routes to differ, a text and random routes."""
    g = torch.Generator().manual_seed(seed)
    model = DuoGPT(DuoConfig(L, 2, 16, T, V, big_width=32, small_width=6)).init_weights(g)
    for name, weight in model.requires_grad_(False).named_parameters():
        weight *= 1 if "norm" in name else 6
    idx, targets = torch.randint(V, (2, 1, T), generator=g)
    t, k = 1 + seed % (T - 1), 1 + seed % (L - 1)
    history = torch.randint(SMALL, BIG + 1, (1, T, L), generator=g)
    return model, idx, targets, history, t, k


def plain_loss(model, idx, targets, history, t, route):
    full = history.clone()
    full[0, t] = torch.tensor(route)
    return model(idx, full, targets, reduction="none")[1][0, t].item()


def test_the_route_keeps_the_budget():
    for seed in range(8):
        *case, k = make(seed)
        before = case[3].clone()
        route, _ = best_route(*case, k)
        assert len(route) == L, f"the route {route} has {len(route)} choices, the model {L} layers"
        assert list(route).count(BIG) == k, f"the route {list(route)} has {list(route).count(BIG)} BIG, not k = {k}"
        assert SKIP not in route, f"the route {list(route)} skips a layer; the choices are SMALL and BIG"
        assert torch.equal(case[3], before), "history was changed: the caller still needs it; work on a copy"


def test_the_loss_is_of_this_route_at_t():
    for seed in range(8):
        *case, k = make(seed)
        route, loss = best_route(*case, k)
        right = plain_loss(*case, route)
        assert abs(loss - right) < 1e-3, (
            f"you return loss {loss:.4f} for route {list(route)}; when only token t = {case[4]} takes it, after the "
            f"history, its own loss on targets[0, t] is {right:.4f}")


def test_search_finds_the_same():
    """search.py goes another way: one position, keys and values of the earlier tokens, a tree of routes."""
    for seed in range(8):
        model, idx, targets, history, t, k = make(seed)
        cache = KVCache(model.config, 1, "cpu", torch.float32)
        model(idx[:, :t], history[:, :t], cache=cache)
        search = Search(model, idx[:, t], (cache.k[..., :t, :], cache.v[..., :t, :]),
                        model.embedding.weight[targets[:, t]][None])
        find = Exhaustive(model, (SMALL, BIG), limit=100)
        (found, found_loss), = settle(search, find(search, [(k, None)], keep=1)).values()
        found, found_loss = found[0].tolist(), found_loss.item()
        route, _ = best_route(model, idx, targets, history, t, k)
        loss = plain_loss(model, idx, targets, history, t, route)
        assert loss < found_loss + 1e-3, (
            f"position {t}, k = {k}: you chose {list(route)} with loss {loss:.4f}, but {found} has {found_loss:.4f}; "
            "do you try all routes, and compare their losses at t alone, not a mean over the tokens?")
