"""Every search against brute force: plain forwards of explicit routes, with no code of search.py."""
import collections
import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
from model import BIG, SKIP, SMALL, DuoConfig, DuoGPT, KVCache
from search import Exhaustive, Patterns, Search, allowed, dp, greedy, make_tree, settle

S, T, V = 3, 6, 37  # sequences, tokens, vocabulary
CHOICES = {"small-big": (SMALL, BIG), "skip-big": (SKIP, BIG), "three": (SKIP, SMALL, BIG)}
FREE = (None, None)  # the budget that allows every route
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]
DTYPES = [("cpu", torch.float32), pytest.param("cuda", torch.float32, marks=NO_GPU),
          pytest.param("cuda", torch.bfloat16, marks=NO_GPU)]
two_way = pytest.mark.parametrize("choices", [CHOICES["small-big"], CHOICES["skip-big"]], ids=["small-big", "skip-big"])
all_ways = pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4)  # losses here differ by tenths, rounding is near 1e-5


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# brute force

def make(seed, device="cpu", scale=6):
    """A random small model, with each seed another shape, and its text."""
    g = torch.Generator().manual_seed(seed)
    width = (16, 24, 32)[seed // 3 % 3]
    model = DuoGPT(DuoConfig(3 + seed % 3, 2, width, T, V, big_width=2 * width, small_width=6)).init_weights(g)
    for p in model.parameters():  # larger weights, so that a wrong path shows
        p.data *= scale if p.dim() == 2 else 1
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    model.execution = "dense"  # of plain forwards: Search.score runs the blocks' sparse path, this is the other one
    idx, targets = torch.randint(V, (2, S, T), generator=g)
    return model.to(device), idx.to(device), targets.to(device), g


def number(routes):
    """Routes [..., L] -> their number in itertools.product((SKIP, SMALL, BIG), repeat=L)"""
    return sum(routes[..., i].long() * 3 ** (routes.shape[-1] - 1 - i) for i in range(routes.shape[-1]))


def plain(model, idx, targets, history, t, routes):
    """Plain forwards of idx[:, :t+1]: token t runs each of `routes` [R, L], earlier ones their routes in `history`
    [S, T, L] -> logits [R, S, V], losses [R, S] at t"""
    R = len(routes)
    full = history[:, :t + 1].expand(R, S, t + 1, -1).clone()
    full[:, :, t] = routes[:, None]
    logits, losses = model(idx[:, :t + 1].repeat(R, 1), full.flatten(0, 1), targets[:, :t + 1].repeat(R, 1),
                           reduction="none")
    return logits[:, t].view(R, S, V), losses[:, t].view(R, S)


def past_of(model, idx, history, t):
    """Keys and values of the first t tokens: a plain forward with a cache -> two tensors [L, S, H, t, D]"""
    cache = KVCache(model.config, len(idx), idx.device, model.compute_dtype)
    if t:
        model(idx[:, :t], history[:, :t], cache=cache)
    return cache.k[..., :t, :], cache.v[..., :t, :]


class Case:
    """One position of S different sequences: the Search, and the true loss of each of the 3^L routes there."""

    def __init__(self, seed, device="cpu", model=None):
        made, self.idx, self.targets, self.g = make(seed, device)
        self.model = model or made
        self.L, self.t = self.model.config.n_layer, seed % T  # seeds 0, 6, ...: no past
        self.history = torch.full((S, T, self.L), BIG, device=device)  # a frozen context
        if seed // T % 2:  # one that some search left behind
            self.history = torch.randint(3, (S, T, self.L), generator=self.g).to(device)
        self.past = past_of(self.model, self.idx, self.history, self.t)
        self.every = torch.tensor(list(itertools.product((SKIP, SMALL, BIG), repeat=self.L)), device=device)
        self.logits, self.truth = plain(self.model, self.idx, self.targets, self.history, self.t, self.every)
        self.loss_of = dict(zip(map(tuple, self.every.tolist()), self.truth.tolist(), strict=True))  # route: S losses

    def search(self, directions=None):
        if directions is None:
            directions = self.model.embedding.weight[self.targets[:, self.t]].unsqueeze(1)
        return Search(self.model, self.idx[:, self.t], self.past, directions)

    def true(self, routes):
        """Routes [n, S, L] -> true losses [n, S]"""
        return self.truth[number(routes), torch.arange(S, device=routes.device)]

    def allowed(self, choices, *budgets):
        """The routes that at least one of the budgets (n_big, n_skip) allows, as tuples"""
        return [r for r in itertools.product(choices, repeat=self.L) if any(
            (n_big is None or r.count(BIG) == n_big) and (n_skip is None or r.count(SKIP) == n_skip)
            for n_big, n_skip in budgets)]

    def budgets(self, choices):
        """Every single budget of each kind that allows a route, by kind"""
        counts = range(self.L + 1)
        kinds = {"free": [FREE], "big": [(k, None) for k in counts], "skip": [(None, s) for s in counts],
                 "both": list(itertools.product(counts, counts))}
        return {kind: [b for b in budgets if self.allowed(choices, b)] for kind, budgets in kinds.items()}

    def some_budgets(self, choices):
        """One random budget of each kind, and all of one kind"""
        kinds = self.budgets(choices)
        picked = [[b[torch.randint(len(b), (), generator=self.g)]] for b in kinds.values()]
        return [*picked, kinds["both"] if len(choices) == 3 else kinds["big"]]

    def check_best(self, found, choices, budgets, keep):
        """found: of each budget the `keep` best routes, in order?"""
        assert list(found) == list(budgets)
        for budget, candidates in found.items():
            routes = torch.tensor(self.allowed(choices, budget), device=candidates.device)
            n = min(keep, len(routes))
            assert candidates.shape == (n, S, self.L)
            numbers = number(candidates)
            assert torch.isin(numbers, number(routes)).all()
            assert all(len(set(column)) == n for column in numbers.T.tolist())  # no route twice
            close(self.true(candidates), self.truth[number(routes)].sort(0).values[:n])


def test_brute_force_can_tell_routes_apart():
    # What follows means something only if the losses of routes differ by much more than the tolerance.
    gaps = torch.cat([Case(seed).truth.sort(0).values.diff(dim=0).flatten() for seed in range(12)])
    assert gaps.median() > 0.005 and (gaps < 2e-4).float().mean() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# one position

@pytest.mark.parametrize("seed", range(12))
@all_ways
def test_tree_and_score_equal_plain_forwards(choices, seed):
    case = Case(seed)
    for budgets in case.some_budgets(choices)[:4]:
        routes = case.allowed(choices, *budgets)
        for limit in ((1, 3, 7)[seed // 2 % 3], 10 ** 6):  # pieces of any size
            search = case.search()
            tree = make_tree(case.model, choices, budgets[0], limit)
            assert sorted(map(tuple, tree.routes.tolist())) == routes  # product() counts upwards
            losses = search.leaf_losses(tree)
            assert losses.shape == (len(routes), S, 1)
            close(losses[..., 0], case.truth[number(tree.routes)])
    mixed = torch.tensor(choices)[torch.randint(len(choices), (9, S, case.L), generator=case.g)]  # a token, a route
    close(case.search().score(mixed)[..., 0], case.true(mixed))
    for choice in choices:  # no token needs a query, all tokens take one FFN
        same = torch.full((1, S, case.L), choice)
        close(case.search().score(same)[..., 0], case.true(same))


@pytest.mark.parametrize("seed", [1, 9])
@pytest.mark.parametrize("device", DEVICES)
def test_position_on_each_device(device, seed):
    case = Case(seed, device)
    for limit in (7, 10 ** 6):
        tree = make_tree(case.model, CHOICES["three"], FREE, limit)
        for scored in (case.search().leaf_losses(tree), case.search().score(tree.routes[:, None].expand(-1, S, -1))):
            torch.testing.assert_close(scored[..., 0], case.truth[number(tree.routes)], rtol=1e-4, atol=1e-3)
    for find in (Exhaustive(case.model, CHOICES["three"], 50),
                 partial(dp, choices=CHOICES["three"], width=99, completion="small")):
        candidates = find(case.search(), [(1, 1)], 3)[1, 1]
        best = case.truth[number(torch.tensor(case.allowed(CHOICES["three"], (1, 1)), device=device))].sort(0).values
        torch.testing.assert_close(case.true(candidates), best[:3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_near_float32(device):
    for seed in (1, 5, 7, 11):
        model, idx, targets, _ = make(seed, device, scale=1)  # large weights would enlarge the rounding too
        history, t = torch.full((S, T, model.config.n_layer), BIG, device=device), seed % T
        rounded = copy.deepcopy(model)
        rounded.compute_dtype = torch.bfloat16
        tree = make_tree(model, CHOICES["three"], FREE, 64)
        losses, rough = (Search(m, idx[:, t], past_of(m, idx, history, t), m.embedding.weight[targets[:, t], None])
                         .leaf_losses(tree) for m in (model, rounded))
        error = (rough - losses).abs()
        assert rough.dtype == torch.float32 and 1e-5 < error.mean() < 0.015 and error.max() < 0.1
        assert losses.std(0).mean() > 0.15  # routes differ by much more


@pytest.mark.parametrize("seed", range(8))
def test_directions(seed):
    case = Case(seed)
    p = (3 * torch.randn(S, V, generator=case.g)).softmax(-1)  # some belief about the next token
    weight, targets = case.model.embedding.weight, case.targets[:, case.t]
    search = case.search(torch.stack((p @ weight, weight[targets]), 1))
    tree = make_tree(case.model, CHOICES["three"], FREE, 50)
    expected = -(p * case.logits.log_softmax(-1)).sum(-1)  # CE(p, q) = -sum_y p(y) log q(y)   [3^L, S]
    losses = search.leaf_losses(tree)
    close(losses, torch.stack((expected, case.truth), -1)[number(tree.routes)])
    # Column 0 chooses, and the label's loss is reported beside it: it is not the lowest.
    for find in (Exhaustive(case.model, CHOICES["three"], 50),
                 partial(dp, choices=CHOICES["three"], width=999, completion="early")):
        route, chosen = settle(search, find(search, [FREE], 4))[FREE]
        close(chosen[:, 0], expected.min(0).values)
        close(chosen[:, 1], case.true(route[None])[0])
        assert (chosen[:, 1] > case.truth.min(0).values + 1e-3).any()
    # greedy too goes by column 0
    found = greedy(search, [(1, None)], 1, CHOICES["small-big"])[1, None]
    single = number(torch.eye(case.L, dtype=torch.long) + 1)
    close(expected[number(found), torch.arange(S)][0], expected[single].min(0).values)


@pytest.mark.parametrize("seed", range(6))
def test_patterns_equal_plain_forwards(seed):
    model, idx, targets, _ = make(seed)
    for choices, limit in (((SMALL, BIG), 10 ** 6), ((SKIP, SMALL, BIG), 5)):
        tree, search = make_tree(model, choices, FREE, limit), Patterns(model, idx, targets)
        losses = search.leaf_losses(tree)
        assert losses.shape == (len(choices) ** model.config.n_layer, S * T, 1)
        for pattern, loss in zip(tree.routes, losses, strict=True):
            close(loss.view(S, T), model(idx, pattern.long(), targets, reduction="none")[1])


def shape(model):
    c = model.config
    return c.n_layer, c.n_embd, c.small_width, c.big_width


@pytest.mark.parametrize("seed", range(6))
def test_flops(seed):
    case = Case(seed)
    (L, d, w_small, w_big), keys = shape(case.model), case.t + 1
    nodes = 2 ** L - 1  # that have children: 1 + 2 + 4 + ...
    attention = nodes * (8 * d * d + 4 * d * keys)  # Q, K, V and the output projection; scores and weighted sum
    ffns = {SKIP: 0, SMALL: nodes * 6 * d * w_small, BIG: nodes * 6 * d * w_big}  # a choice's edges: one a node
    for choices in (CHOICES["small-big"], CHOICES["skip-big"]):
        tree, search = make_tree(case.model, choices, FREE, 3), case.search()
        with FlopCounterMode(display=False) as counter:
            search.leaf_losses(tree)
        read_out = 2 ** L * 2 * d * (V + 1)  # the vocabulary, and one direction
        assert search.flops == S * (attention + ffns[choices[0]] + ffns[choices[1]] + read_out)
        # Outside the matrix products, where torch's counter does not look: a token's own key, and the direction.
        unseen = nodes * 4 * d + 2 ** L * 2 * d
        assert counter.get_total_flops() == search.flops - S * unseen
    # Exactly one BIG: the prefixes are all-SMALL, or have had it. BIG's edges leave the first kind only.
    tree, search = make_tree(case.model, (SMALL, BIG), (1, None), 10 ** 6), case.search()
    search.leaf_losses(tree)
    nodes = sum(1 + layer for layer in range(L))
    small_edges = sum(layer + (layer < L - 1) for layer in range(L))  # the last layer of all-SMALL must be BIG
    assert len(tree.routes) == L
    assert search.flops == S * (nodes * (8 * d * d + 4 * d * keys) + 6 * d * (small_edges * w_small + L * w_big)
                                + L * 2 * d * (V + 1))
    # A beam follows only what some budget allows: no BIG leaves one route.
    search = case.search()
    dp(search, [(0, None)], 1, (SMALL, BIG), 1, "small")
    assert search.flops == S * (case.model.flops(SMALL, keys) + 2 * d)
    # One route by itself costs what model.flops says, and its read-outs along M directions: 2 d each.
    routes = torch.randint(3, (5, S, L), generator=case.g)
    search = case.search(torch.randn(S, 3, d, generator=case.g))
    search.score(routes)
    assert search.flops == case.model.flops(routes, keys).sum() + 5 * S * 3 * 2 * d
    # Whole sequences: attention is counted in full, as model.flops does.
    search = Patterns(case.model, case.idx, case.targets)
    search.leaf_losses(make_tree(case.model, (BIG,), FREE, 9))
    assert search.flops == S * T * (case.model.flops(BIG, T) + 2 * d)


# ---------------------------------------------------------------------------------------------------------------------
# the searches

@all_ways
@pytest.mark.parametrize("n_layer", [1, 3, 6])
def test_number_of_routes(choices, n_layer):
    model, comb = DuoGPT(DuoConfig(n_layer, 2, 16, T, V)), math.comb

    def leaves(*budget):
        return len(make_tree(model, choices, budget, 4).routes)

    assert leaves(None, None) == len(choices) ** n_layer
    for k in range(n_layer + 1):
        assert leaves(k, None) == comb(n_layer, k) * (len(choices) - 1) ** (n_layer - k)
        if choices == (SKIP, SMALL, BIG):
            assert leaves(None, k) == comb(n_layer, k) * 2 ** (n_layer - k)
            for s in range(n_layer + 1 - k):
                assert leaves(k, s) == comb(n_layer, k) * comb(n_layer - k, s)


@pytest.mark.parametrize("n_layer", [1, 2, 4])
@all_ways
def test_prefixes_that_lead_nowhere_are_cut(choices, n_layer):
    wanted = [None, *range(n_layer + 2)]
    budgets = list(itertools.product(wanted, wanted))  # impossible ones too
    for some in [[b] for b in budgets] + [budgets[i:i + 2] for i in range(0, len(budgets), 3)]:
        ends = [r for r in itertools.product(choices, repeat=n_layer) if any(
            all(n in (None, r.count(c)) for c, n in zip((BIG, SKIP), b, strict=True)) for b in some)]
        for length in range(1, n_layer + 1):
            prefixes = list(itertools.product(choices, repeat=length))
            expected = [any(r[:length] == p for r in ends) for p in prefixes]
            assert allowed(np.array(prefixes, np.uint8), n_layer, choices, some).tolist() == expected


@pytest.mark.parametrize("seed", range(10))
@all_ways
def test_exhaustive(choices, seed):
    case = Case(seed)
    find = Exhaustive(case.model, choices, (1, 4, 1000)[seed % 3])
    for budgets in (*case.some_budgets(choices), [FREE, *case.budgets(choices)["skip"]]):
        for keep in (1, 5):
            case.check_best(find(case.search(), budgets, keep), choices, budgets, keep)
        tree, losses = find.last
        close(losses, case.truth[number(tree.routes)])


COMPLETIONS = {"small": SMALL, "big": BIG, "early": SKIP}  # an early read-out is what remaining layers that skip give


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("seed", range(6))
@all_ways
def test_dp_of_full_width_is_exact(choices, seed, completion):
    case = Case(seed + 6 * len(completion))  # other models, texts and histories for each completion
    for budgets in case.some_budgets(choices):
        # With two choices no cell before the last layer holds more than this.
        for width in (3 ** case.L, math.comb(case.L - 1, (case.L - 1) // 2))[:4 - len(choices)]:
            case.check_best(dp(case.search(), budgets, 5, choices, width, completion), choices, budgets, 5)


def slow_dp(case, s, routes, choices, width, completion):
    """The beam of one sequence, judged by true losses of completed routes -> its routes, and the smallest difference
    that decided who stays."""
    starts, prefixes, gap = {r[:n] for r in routes for n in range(case.L + 1)}, [()], math.inf
    for layer in range(case.L):
        cells = collections.defaultdict(list)
        for prefix in (p + (choice,) for p in prefixes for choice in choices):
            if prefix in starts:
                route = prefix + (COMPLETIONS[completion],) * (case.L - len(prefix))
                cells[prefix.count(BIG), prefix.count(SKIP)].append((case.loss_of[route][s], prefix))
        keep = width if layer < case.L - 1 else 10 ** 6
        prefixes = []
        for cell in map(sorted, cells.values()):
            gap = min(gap, cell[keep][0] - cell[keep - 1][0]) if len(cell) > keep else gap
            prefixes += [prefix for _, prefix in cell[:keep]]
    return prefixes, gap


@pytest.mark.parametrize("completion", COMPLETIONS)
@all_ways
def test_dp_equals_a_slow_beam(choices, completion):
    compared, missed = 0, 0
    for case in map(Case, range(7 * len(completion), 7 * len(completion) + 7)):
        labels = case.model.embedding.weight[case.targets[:, case.t]]
        directions = torch.stack((labels, torch.randn(labels.shape, generator=case.g)), 1)  # column 0 judges
        for budgets in case.some_budgets(choices):
            best = {b: case.truth[number(torch.tensor(case.allowed(choices, b)))].min(0).values for b in budgets}
            for width in (1, 2, 4):
                found = dp(case.search(directions), budgets, 3 ** case.L, choices, width, completion)
                every = case.allowed(choices, *budgets)
                beams = [slow_dp(case, s, every, choices, width, completion) for s in range(S)]
                for budget, candidates in found.items():
                    fitting, losses = set(case.allowed(choices, budget)), case.true(candidates)
                    assert len(losses)
                    close(losses, losses.sort(0).values)  # best first
                    missed += (losses[0] > best[budget] + 1e-3).sum().item()
                    for s, (beam, gap) in enumerate(beams):
                        routes = list(map(tuple, candidates[:, s].tolist()))
                        assert set(routes) <= fitting  # whatever its width, a beam obeys the budget
                        if gap > 1e-4:  # else rounding decides
                            assert sorted(routes) == sorted(set(beam) & fitting)
                            compared += 1
    assert compared > 100 and missed  # a narrow beam is not exact: the test above is not this one


def slow_greedy(case, s, cheap, costly):
    """-> routes for k = 0..L as tuples, and the smallest difference that decided a promotion"""
    routes, gap = [(cheap,) * case.L], math.inf
    for _ in range(case.L):
        options = []
        for layer, choice in enumerate(routes[-1]):
            if choice == cheap:
                route = routes[-1][:layer] + (costly,) + routes[-1][layer + 1:]
                options.append((case.loss_of[route][s], route))
        options.sort()
        gap = min(gap, options[1][0] - options[0][0]) if len(options) > 1 else gap
        routes.append(options[0][1])
    return routes, gap


@pytest.mark.parametrize("seed", range(12))
@two_way
def test_greedy(choices, seed):
    case, compared = Case(seed), 0
    budgets = [(k, None) for k in range(case.L + 1)]
    found = greedy(case.search(), budgets, 3, choices)
    routes = torch.cat([found[budget] for budget in budgets])  # [L + 1, S, L]: there is one for each k
    assert routes.shape == (case.L + 1, S, case.L)
    for k in range(case.L):  # nested: one layer, and it is promoted
        changed = routes[k] != routes[k + 1]
        assert (changed.sum(-1) == 1).all()
        assert (routes[k][changed] == choices[0]).all() and (routes[k + 1][changed] == choices[1]).all()
    anything = greedy(case.search(), [FREE, (case.L + 1, None)], 99, choices)
    assert anything[FREE].shape == routes.shape and anything[case.L + 1, None].shape == (0, S, case.L)
    losses = case.true(anything[FREE])
    close(losses, case.true(routes).sort(0).values)  # the same routes, best first
    for s in range(S):
        expected, gap = slow_greedy(case, s, *choices)
        if gap > 1e-4:  # else rounding decides
            assert list(map(tuple, routes[:, s].tolist())) == expected
            compared += 1
    assert compared


# ---------------------------------------------------------------------------------------------------------------------
# settle, and searching from left to right

@pytest.mark.parametrize("seed", range(8))
def test_settle_takes_the_best_candidate(seed):
    case = Case(seed)
    candidates = {key: torch.randint(3, (n, S, case.L), generator=case.g) for key, n in (("few", 2), ("many", 20))}
    chosen = settle(case.search(), candidates)
    assert list(chosen) == list(candidates)
    for key, (route, losses) in chosen.items():
        assert route.shape == (S, case.L) and losses.shape == (S, 1)
        close(losses[:, 0], case.true(candidates[key]).min(0).values)
        close(losses[:, 0], case.true(route[None])[0])


FINDERS = {"exhaustive": lambda model, choices: Exhaustive(model, choices, 20),
           "dp": lambda model, choices: partial(dp, choices=choices, width=2, completion="small"),
           "greedy": lambda model, choices: partial(greedy, choices=choices)}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("seed", range(9))
def test_left_to_right(seed, finder):
    """A sequential oracle: each token searches behind the keys and values that its predecessors' choices left."""
    model, idx, targets, g = make(seed)
    L, d, *_ = shape(model)
    choices = list(CHOICES.values())[seed % 2 if finder == "greedy" else seed // 3]
    budget = FREE if seed % 2 else (int(torch.randint(L, (), generator=g)), None)
    every = [r for r in itertools.product(choices, repeat=L) if budget[0] is None or r.count(BIG) == budget[0]]
    past = [torch.zeros(L, S, 2, 0, d // 2) for _ in "kv"]
    find, history, stored = FINDERS[finder](model, choices), torch.zeros(S, T, L, dtype=torch.long), []
    for t in range(T):
        search = Search(model, idx[:, t], past, model.embedding.weight[targets[:, t], None])
        candidates = find(search, [budget], 4)[budget].flip(0)  # so that the first is not the one to keep
        chosen, *new = settle(search, {budget: candidates}, keep_keys=True)
        past = [torch.cat(pair, -2) for pair in zip(past, new, strict=True)]
        route, losses = chosen[budget]
        if finder == "exhaustive":  # the brute-force oracle would have chosen the same, or an equal one
            truth = plain(model, idx, targets, history, t, torch.tensor(every))[1]
            close(losses[:, 0], truth.min(0).values)
        assert all(tuple(r) in every for r in route.tolist())
        history[:, t] = route
        stored.append(losses[:, 0])
    # The whole sequences, each token by its chosen route, in one plain forward.
    close(torch.stack(stored, 1), model(idx, history, targets, reduction="none")[1])
    for mine, cached in zip(past, past_of(model, idx, history, T), strict=True):
        close(mine, cached)
    assert history.flatten(0, 1).unique(dim=0).shape[0] > 1 or len(every) == 1  # tokens choose differently


# ---------------------------------------------------------------------------------------------------------------------
# ties and planted answers

def one_term_sums(model, g, alive):
    """Make routes tie exactly: only layer `alive` (none, where None) adds anything to the residual stream.

    Each row of the other matrices has one entry. A product then sums one term, which cannot be rounded otherwise in
    another row of a batch."""
    for name, p in model.named_parameters():
        if name.endswith("out.weight") or name.endswith("down.weight") and f"blocks.{alive}." not in name:
            p.data.zero_()
        elif p.dim() == 2:
            rows, columns = p.shape
            if not name.endswith("down.weight"):
                columns = 4  # few, so that tokens and FFNs meet
            column = torch.randint(columns, (rows,), generator=g)
            if name.endswith("gate_up.weight"):
                column = column[:rows // 2].repeat(2)  # a gate and its partner read the same
            p.data *= 3 * F.one_hot(column, p.shape[1])


def cheapest_of_the_best(case, choices, budget):
    """-> least FLOPs among the routes of least loss [S], of all routes that the budget allows"""
    routes = torch.tensor(case.allowed(choices, budget))
    truth = case.truth[number(routes)]
    cost = case.model.flops(routes[:, None]).expand(-1, S)
    return cost.masked_fill(truth > truth.min(0).values + 1e-5, 2 ** 62).min(0).values


@pytest.mark.parametrize("seed", range(9))
@all_ways
def test_ties_go_to_the_cheaper(choices, seed):
    model, _, _, g = make(seed)
    alive = None if seed < 3 else seed % model.config.n_layer  # all routes tie, or all that agree in this layer
    one_term_sums(model, g, alive)
    case = Case(seed, model=model)
    assert (case.truth.std(0) > 1e-3).any() == (alive is not None)
    finds = [Exhaustive(model, choices, 9),
             partial(dp, choices=choices, width=2 if alive is None else 99, completion="small")]
    if len(choices) == 2:
        finds.append(partial(greedy, choices=choices))
    for (budget, *_), find in itertools.product(case.some_budgets(choices)[:4], finds):
        expected = cheapest_of_the_best(case, choices, budget)
        first = find(case.search(), [budget], 1)[budget][0]  # already the first candidate
        found = find(case.search(), [FREE, budget], 7)[budget]
        route, losses = settle(case.search(), {budget: found.flip(0)})[budget]  # in whatever order they come
        for r in (first, found[0], route):
            assert torch.equal(model.flops(r[None])[0], expected)
        close(losses[:, 0], case.true(route[None])[0])


@pytest.mark.parametrize("seed", range(8))
@two_way
def test_planted_layer_is_found(choices, seed):
    """One layer's choice decides, the others change nothing: every search must get that one right."""
    model, _, _, _ = make(seed)
    planted = seed // 3 % model.config.n_layer
    for layer, block in enumerate(model.blocks):
        if layer != planted:
            block.small.down.weight.data.zero_()
            block.big.down.weight.data.zero_()
            if SKIP in choices:
                block.out.weight.data.zero_()
    case, (cheap, costly) = Case(seed, model=model), choices
    low, high = (case.truth[number(torch.full((case.L,), cheap) + (costly - cheap) * choice * torch.eye(
        case.L, dtype=torch.long)[planted])] for choice in (0, 1))  # losses [S] of the two choices there
    right, clear = torch.where(high < low, costly, cheap), (high - low).abs() > 0.01
    assert clear.any()
    budgets = [(k, None) for k in range(1, case.L)]  # there both choices are possible in the planted layer
    for find in (Exhaustive(model, choices, 9), partial(dp, choices=choices, width=4, completion="small"),
                 partial(dp, choices=choices, width=4, completion="early"), partial(greedy, choices=choices)):
        for candidates in find(case.search(), budgets, 1).values():
            assert torch.equal(candidates[0, clear, planted].long(), right[clear])


# ---------------------------------------------------------------------------------------------------------------------
# kernels

def randn(*size, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device, dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 24, 384])
def test_read_out_log_sum_exp(d, device, dtype):
    shapes = [(1, 37), (127, 37), (128, 128), (300, 129), (129, 1000), (600, 4096)]
    for N, entries in shapes + [(70, 70000)] * (d == 16):
        h, weight = (randn(n, d, seed=n, device=device, dtype=dtype) for n in (N, entries))
        for scale in (0.2, 10):  # logits of hundreds: exp would overflow
            expected = ((scale * h).double() @ weight.double().T).logsumexp(-1)
            result = kernels.read_out_log_sum_exp(scale * h, weight)
            assert result.dtype == torch.float32 and result.shape == (N,)
            torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=1e-4)
    # All logits far below zero: an entry too many, of logit 0, would be all that counts.
    weight, h = randn(37, d, device=device, dtype=dtype).abs() + 1, -10 * torch.ones(5, d, device=device, dtype=dtype)
    expected = (h.double() @ weight.double().T).logsumexp(-1)
    assert expected.max() < -100
    torch.testing.assert_close(kernels.read_out_log_sum_exp(h, weight).double(), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("device, dtype", [*DTYPES, ("cpu", torch.bfloat16)])
@pytest.mark.parametrize("H, D", [(1, 8), (2, 12), (3, 16), (1, 24), (2, 64)])
def test_past_and_own_key_equal_plain_attention(H, D, device, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for n, t, scale in itertools.product((1, 5, 130), (1, 2, 17, 200), (1, 4)):
        joint = randn(n, S, 3 * H * D, seed=1, device=device, dtype=dtype)
        joint[..., :H * D] *= scale
        q, k, v = (part.unflatten(-1, (H, D)) for part in joint.chunk(3, -1))  # parts of one product, as in use
        cache = [randn(S, H, 256, D, seed=seed, device=device, dtype=dtype) for seed in (2, 3)]
        past_k, past_v = (c[:, :, :t] for c in cache)  # part of a longer cache, as in use
        keys, values = (torch.cat((past.double().expand(n, -1, -1, -1, -1), own.double().unsqueeze(3)), 3)
                        for past, own in ((past_k, k), (past_v, v)))  # [n, S, H, t + 1, D]
        weights = (torch.einsum("nshd,nshtd->nsht", q.double(), keys) / D ** 0.5).softmax(-1)
        expected = torch.einsum("nsht,nshtd->nshd", weights, values)
        for q_, k_, v_ in ((q, k, v), (q.contiguous(), k.contiguous(), v)):
            y = kernels.add_own_key(q_, k_, v_, *kernels.past_attention(q_, past_k, past_v))
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device, dtype", DTYPES)
@pytest.mark.parametrize("n, d", [(1, 16), (4, 24), (60, 96)])
def test_short_steps(n, d, device, dtype):
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 0.02)

    def check(result, expected, expected_dtype=dtype):
        assert result.dtype == expected_dtype
        torch.testing.assert_close(result.double(), expected, **tolerance)

    def plain_norm(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    x, y = (randn(n, S, d, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
    gain, directions = randn(d, seed=3, device=device), randn(S, 3, d, seed=4, device=device)  # these stay float32
    for rows in (x, 1e-3 * x, x[:, 1:], x.transpose(0, 1)):  # small ones, where eps counts; rows that lie apart
        check(kernels.norm(rows, gain), plain_norm(rows.double(), gain))
    total, normed = kernels.add_norm(x, y, gain)
    check(total, x.double() + y.double())
    check(normed, plain_norm(total.double(), gain))
    check(kernels.dot(x, directions), torch.einsum("nsd,smd->nsm", x.double(), directions.double()), torch.float32)
    for inner in (6, 64, 100, 200):
        h, weight = x.flatten(0, 1), randn(2 * inner, d, seed=inner, device=device, dtype=dtype) / d ** 0.5
        gate, up = (h.double() @ weight.double().T).chunk(2, dim=-1)
        check(kernels.swiglu(h, weight), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("device, dtype", DTYPES)
def test_halves_of_an_ffn_equal_the_models(device, dtype):
    block = make(0, device)[0].blocks[0]
    for ffn in (block.small, block.big):
        x = randn(5, ffn.gate_up.in_features, device=device, dtype=dtype)
        halves = F.linear(kernels.swiglu(x, ffn.gate_up.weight.to(dtype)), ffn.down.weight.to(dtype))
        rounding = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
        torch.testing.assert_close(halves, ffn(x), **rounding)
