"""Exercise 2: what the prefix tree saves.

Task. The oracle tries every route of a token. Run one by one, n routes of L layers are n * L layer evaluations. Routes
that agree up to a layer can share their work up to there: they form a prefix tree, with one evaluation for each of its
edges (one state goes through one layer by one choice). Fill in full_tree and tree_of_k, the number of edges, and
saving, the factor between the two. Then look: does the budget make the tree save more or less? Why?

Why. 4,096 routes a token are what makes this oracle a matter of minutes, and 3^12 = 531,441 one of patience. Know what
a search costs before you start it.

Read first: the docstring of search.py, with its picture of a tree; then allowed and make_tree there.

Hint: count the prefixes of each length, 1 to L. With exactly k BIG, a prefix of length l with b BIG choices belongs to
the tree only if a route can still come of it: b is at most k, and the missing k - b fit into the L - l layers left. How
many such prefixes are there for each b? (math.comb; no list of routes: with 60 layers it would not fit anywhere.)
"""
import math

import torch

from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT
from search import Search, make_tree


def full_tree(L, n_choices):
    """Edges of the tree of all n_choices^L routes -> int.

    By hand: 2 layers, 2 choices: 2 edges leave the root, and 2 more each of the nodes they lead to: 6.
    """
    raise NotImplementedError("exercise 2: fill in full_tree")


def tree_of_k(L, k):
    """Edges of the tree of the routes with exactly k BIG, all other layers SMALL -> int.

    By hand: 2 layers, k = 1: the routes are 12 and 21; the prefixes 1, 12, 2, 21: 4.
    """
    raise NotImplementedError("exercise 2: fill in tree_of_k")


def saving(L, n_choices, k=None):
    """Layer evaluations of all routes one by one, divided by the tree's edges -> float. k=None: all n_choices^L routes;
    else the routes with exactly k BIG among two choices.

    By hand: saving(2, 2) is 4 routes * 2 layers / 6 edges = 1.33; saving(2, 2, 1) is 2 * 2 / 4 = 1: nothing is shared.
    """
    raise NotImplementedError("exercise 2: fill in saving")


# ---------------------------------------------------------------------------------------------------------------------
# the check

class Counting(Search):
    """The project's search, counting the states that come out of its layers."""
    evaluations = 0

    def expand(self, layer, x, take):
        out = super().expand(layer, x, take)
        self.evaluations += len(out)
        return out


def evaluated(L, n_choices, k=None):
    """How many layer evaluations search.py makes for one token at position 0 of a tiny model."""
    model = DuoGPT(DuoConfig(L, 1, 4, 1, 5)).requires_grad_(False)
    nothing = torch.zeros(L, 1, 1, 0, 4)  # keys and values of no earlier token
    search = Counting(model, torch.tensor([0]), (nothing, nothing), model.embedding.weight[None, :1])
    search.leaf_losses(make_tree(model, (SMALL, BIG, SKIP)[:n_choices], (k, None), 10 ** 6))
    return search.evaluations


def test_full_tree():
    for L, n in ((1, 2), (2, 2), (5, 2), (1, 3), (2, 3), (5, 3)):
        mine, real, name = full_tree(L, n), evaluated(L, n), f"full_tree({L}, {n})"
        assert mine != real + 1, f"{name} = {mine}, one too many: the root is a node, but no layer leads to it"
        assert mine != n ** L or mine == real, f"{name} = {mine}: these are the leaves; the layers above them run too"
        assert mine == real, (f"{name} = {mine}, but search.py evaluates {real}: each choice once in the first layer, "
                              "each choice for each of those in the second, and so on")
        assert not isinstance(mine, float), f"{name} = {mine}: a float, which rounds large counts; divide with //"


def test_tree_of_k():
    for L, k in ((2, 1), (3, 0), (3, 3), (5, 1), (5, 2), (6, 4)):
        mine, real = tree_of_k(L, k), evaluated(L, 2, k)
        all_prefixes = sum(math.comb(length, b) for length in range(1, L + 1) for b in range(k + 1))
        assert mine != all_prefixes or mine == real, (
            f"tree_of_k({L}, {k}) = {mine} counts prefixes that no route with {k} BIG starts with: too few layers are "
            "left for the missing BIG choices")
        assert mine == real, f"tree_of_k({L}, {k}) = {mine}, but search.py evaluates {real}"
    for L, k in ((14, 5), (16, 8)):  # by its first choice a tree falls into two, one layer shorter: SMALL, then BIG
        parts = 2 + tree_of_k(L - 1, k) + tree_of_k(L - 1, k - 1)
        assert tree_of_k(L, k) == parts, f"tree_of_k({L}, {k}) = {tree_of_k(L, k)}, but its two halves have {parts}"


def test_saving():
    for L, n, k in ((5, 2, None), (4, 3, None), (6, 2, 3), (3, 2, 0)):
        routes = math.comb(L, k) if k is not None else n ** L
        naive, shared, mine = L * routes, evaluated(L, n, k), saving(L, n, k)
        assert abs(mine - naive / shared) < 1e-9, (
            f"saving({L}, {n}, {k}) = {mine:.4g}; {routes} routes one by one are {naive} evaluations, in the tree "
            f"{shared}: a factor of {naive / shared:.4g}")
