"""The searches of stage 2: for one position of many sequences, which route has the lowest loss (paper, section 3.2)?

An example by hand. Two layers, choices SMALL and BIG, budget k = 1: the routes are 12 and 21. Both are run for the
token, both losses are read off on its label, the lower one wins. With 12 layers there are 4,096 routes; they form a
prefix tree, so that a layer's work is done once for all the routes that agree up to it:

    layer 0        x0                        1 attention, 2 FFNs
                 /    \
    layer 1   x1(1)   x1(2)                  2 attentions, 4 FFNs          2^(L+1) layer evaluations in all,
             /   \\    /   \\                                                where one by one they would be L 2^L
    leaves  11   12  21   22                 4 read-outs

Three searches behind one interface: find(search, budgets, keep) -> {budget: candidate routes [n <= keep, S, L]}, best
first, of equal ones the cheaper first. A budget is a pair (n_big, n_skip), None for any number.
    exhaustive   exact: all routes that the budget allows
    dp           a beam over cells (layer, BIG used): the best `width` partial routes of each, by a cheap completion
    greedy       start with the cheaper choice everywhere, promote the layer that helps most; one pass gives every k
"""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

import kernels
from model import BIG, SKIP, SMALL, rotate, sort_route

# ---------------------------------------------------------------------------------------------------------------------
# the prefix tree

@dataclass
class Group:
    """Nodes of one layer that are expanded together. take: [(choice, which of them; None: all)]; parts: their children,
    in pieces that fit into memory: (first, last, Group of the next layer, or the number of the first leaf)."""
    layer: int
    take: list
    parts: list


@dataclass
class Tree:
    root: Group
    routes: torch.Tensor  # [leaves, L] uint8
    by_cost: torch.Tensor  # the leaves, cheapest first
    within: dict  # {budget: which of them, cheapest first}

    def leaves(self, budget):
        if budget not in self.within:
            self.within[budget] = self.by_cost[matches(self.routes[self.by_cost], budget)]
        return self.within[budget]


def allowed(prefixes, n_layer, choices, budgets):
    """Which prefixes [n, l] can still become a route with (n_big, n_skip) as one of the budgets? None: any number."""
    left = n_layer - prefixes.shape[1]
    result = np.zeros(len(prefixes), dtype=bool)
    for n_big, n_skip in budgets:
        least, most = np.zeros(len(prefixes), int), np.zeros(len(prefixes), int)
        possible = np.ones(len(prefixes), dtype=bool)
        for choice, wanted in ((BIG, n_big), (SKIP, n_skip), (SMALL, None)):
            missing = None if wanted is None else wanted - (prefixes == choice).sum(1)
            if missing is None:
                most += left if choice in choices else 0
            else:
                possible &= (missing >= 0) if choice in choices else (missing == 0)
                least, most = least + missing, most + missing
        result |= possible & (least <= left) & (left <= most)
    return result


def make_tree(model, choices, budget, limit):
    """All routes over `choices` with (n_big, n_skip) = budget, as a Tree that expands at most `limit` nodes at once."""
    L, device = len(model.blocks), model.cos.device
    leaves = []

    def grow(prefixes):
        layer, take, children = prefixes.shape[1], [], []
        for choice in choices:
            longer = np.concatenate((prefixes, np.full((len(prefixes), 1), choice, np.uint8)), 1)
            keep = allowed(longer, L, choices, [budget])
            if keep.any():
                take.append((choice, None if keep.all() else torch.from_numpy(keep.nonzero()[0]).to(device)))
                children.append(longer[keep])
        children, parts = np.concatenate(children), []
        for first in range(0, len(children), limit):
            piece = children[first:first + limit]
            if layer + 1 < L:
                parts.append((first, first + len(piece), grow(piece)))
            else:
                parts.append((first, first + len(piece), sum(map(len, leaves))))
                leaves.append(piece)
        return Group(layer, take, parts)

    root = grow(np.zeros((1, 0), np.uint8))
    routes = torch.from_numpy(np.concatenate(leaves)).to(device)
    return Tree(root, routes, model.flops(routes[:, None])[:, 0].argsort(stable=True), {})


# ---------------------------------------------------------------------------------------------------------------------
# one position

class Search:
    """One position of S sequences: all that the loss of a route there depends on. States are [n, S, d], n routes.

    idx [S]; past: keys and values [L, S, H, t, D] of the t earlier tokens, keys rotated; directions [S, M, d]: what the
    final state is read along. A label y is the direction w_y of its embedding, since -log p(y) = log_sum_exp - h . w_y;
    an expectation under p is the direction sum_y p(y) w_y, the same formula. Column 0 chooses the route, the last one
    is the true label. `flops` counts what was computed, attention over the keys that are really there.
    """

    def __init__(self, model, idx, past, directions):
        self.model, self.past, self.directions = model, past, directions
        self.n_keys = past[0].shape[-2] + 1
        self.position = [table[:, self.n_keys - 1:self.n_keys] for table in (model.cos, model.sin)]  # [1, 1, 1, D/2]
        self.start = model.embedding(idx).to(model.compute_dtype)[None]  # [1, S, d]
        self.flops, self.turned = 0, None

    def project(self, layer, h):
        """h [n, S, d] -> q, k, v [n, S, d], q and k rotated. All nodes stand at one position, so the rotation, a linear
        map, goes into the weights once, and not into each of thousands of queries and keys."""
        if self.turned is None:
            d, H = self.model.config.n_embd, self.model.config.n_head
            weights = torch.stack([block.qkv.weight for block in self.model.blocks])  # [L, 3 d, d]
            qk = weights[:, :2 * d].unflatten(1, (2 * H, -1)).transpose(-1, -2)  # [L, 2 H, d, D]
            qk = rotate(qk, *self.position).transpose(-1, -2)
            self.turned = torch.cat((qk.flatten(1, 2), weights[:, 2 * d:]), 1)
        return F.linear(h, self.turned[layer].to(h.dtype)).chunk(3, -1)

    def attend(self, layer, q, k, v):
        """q, k, v [n, S, d], q and k rotated -> [n, S, d]: each node reads the past, and itself."""
        q, k, v = (t.unflatten(-1, (self.model.config.n_head, -1)) for t in (q, k, v))  # [n, S, H, D]
        if self.n_keys == 1:
            return v.flatten(-2)  # nothing to read but itself
        past, log_sum = kernels.past_attention(q, self.past[0][layer], self.past[1][layer])
        return kernels.add_own_key(q, k, v, past, log_sum).flatten(-2)

    def expand(self, layer, x, take):
        """States x [n, S, d] entering a layer -> its outputs, one for each (choice, node) of `take` (see Group)."""
        block, (n, S, d) = self.model.blocks[layer], x.shape
        self.flops += n * S * 4 * d * d  # keys and values
        if any(choice != SKIP for choice, _ in take):
            self.flops += n * S * (4 * d * d + 4 * d * self.n_keys)
            attended = self.attend(layer, *self.project(layer, kernels.norm(x, block.attention_norm.weight)))
            y, h = kernels.add_norm(x, block.out(attended), block.ffn_norm.weight)
        children = []
        for choice, nodes in take:
            if choice == SKIP:
                children.append(x if nodes is None else x[nodes])
                continue
            ffn = block.big if choice == BIG else block.small
            rows, inner = (y, h) if nodes is None else (y[nodes], h[nodes])
            self.flops += len(rows) * S * 3 * d * ffn.gate_up.out_features
            inner = kernels.swiglu(inner.flatten(0, 1), ffn.gate_up.weight.to(x.dtype))
            children.append(torch.addmm(rows.flatten(0, 1), inner, ffn.down.weight.to(x.dtype).T).view_as(rows))
        return torch.cat(children) if len(children) > 1 else children[0]

    def read_out(self, x):
        """Final states [n, S, d] -> losses [n, S, M]: log_sum_exp(h W^T) - h . direction"""
        h, weight = kernels.norm(x, self.model.final_norm.weight), self.model.embedding.weight.to(x.dtype)
        self.flops += h.numel() * 2 * (len(weight) + self.directions.shape[1])
        log_sum = kernels.read_out_log_sum_exp(h.flatten(0, 1), weight).view(h.shape[:2])
        return log_sum.unsqueeze(-1) - kernels.dot(h, self.directions)

    def leaf_losses(self, tree):
        """-> losses [leaves, S, M] of all routes of the tree"""
        losses = self.start.new_empty((len(tree.routes), *self.directions.shape[:2]), dtype=torch.float32)

        def descend(group, x):
            x = self.expand(group.layer, x, group.take)
            for first, last, below in group.parts:
                if isinstance(below, Group):
                    descend(below, x[first:last])
                else:
                    losses[below:below + last - first] = self.read_out(x[first:last])
        descend(tree.root, self.start)
        return losses

    def finish(self, x, layer, choice):
        """Run states that enter `layer` to the end, all by one choice -> losses [n, S, M]"""
        for rest in range(layer, len(self.model.blocks)):
            x = self.expand(rest, x, [(choice, None)])
        return self.read_out(x)

    def score(self, routes, keep_keys=False):
        """Routes [n, S, L], each run by itself -> losses [n, S, M]; with keep_keys also what each layer writes,
        a list of (k, v) [n, S, H, D]."""
        n, S, L = routes.shape
        x, written, H = self.start.expand(n, S, -1), [], self.model.config.n_head
        for layer, (block, sorting) in enumerate(zip(self.model.blocks, sort_route(routes, n, S, L), strict=True)):
            n_skip, n_small, n_big = sorting.counts
            q, k, v = self.project(layer, kernels.norm(x, block.attention_norm.weight))
            if keep_keys:
                written.append([t.unflatten(-1, (H, -1)) for t in (k, v)])
            if n_small + n_big == 0:
                continue
            attended = self.attend(layer, q, k, v)
            x = x + sorting.apply(attended, (n_skip, None), (n_small + n_big, block.out))
            x = x + sorting.apply(x, (n_skip, None), (n_small, lambda rows: block.small(block.ffn_norm(rows))),
                                  (n_big, lambda rows: block.big(block.ffn_norm(rows))))
        read_out = 2 * self.model.config.n_embd * self.model.config.vocab_size  # counted by self.read_out
        self.flops += (self.model.flops(routes, self.n_keys) - read_out).sum()
        return (self.read_out(x), written) if keep_keys else self.read_out(x)


class Patterns(Search):
    """The same tree for whole sequences: all tokens share a pattern, and each node holds S = B * T states. idx, targets
    [B, T]. Keys and values are those of the pattern itself, so a leaf's loss equals a plain forward of the pattern."""

    def __init__(self, model, idx, targets):
        self.model, (self.B, T) = model, idx.shape
        self.directions = model.embedding.weight[targets.flatten()].unsqueeze(1)  # [B T, 1, d]
        self.position = [table[:, :T] for table in (model.cos, model.sin)]
        self.start = model.embedding(idx.flatten()).to(model.compute_dtype)[None]
        self.n_keys, self.flops = T, 0

    def project(self, layer, h):
        return self.model.blocks[layer].qkv(h).chunk(3, -1)

    def attend(self, layer, q, k, v):
        q, k, v = (t.unflatten(1, (self.B, -1)).flatten(0, 1).unflatten(-1, (self.model.config.n_head, -1))
                   for t in (q, k, v))  # [n B, T, H, D]
        q, k = rotate(q, *self.position), rotate(k, *self.position)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return y.transpose(1, 2).flatten(2).unflatten(0, (-1, self.B)).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# the searches: find(search, budgets, keep) -> {budget: candidate routes [n <= keep, S, L], best first}

def matches(routes, budget):
    """Which routes [..., L] have exactly (n_big, n_skip) = budget? None: any number."""
    counts = zip((BIG, SKIP), budget, strict=True)
    result = torch.ones(routes.shape[:-1], dtype=torch.bool, device=routes.device)
    for choice, wanted in counts:
        if wanted is not None:
            result &= (routes == choice).sum(-1) == wanted
    return result


class Exhaustive:
    """All routes. Several budgets at once share one tree (a frozen context allows that); `last` keeps its losses."""

    def __init__(self, model, choices, limit):
        self.make, self.trees, self.last = partial(make_tree, model, choices, limit=limit), {}, None

    def tree(self, budget):
        if budget not in self.trees:
            self.trees[budget] = self.make(budget)
        return self.trees[budget]

    def __call__(self, search, budgets, keep):
        tree = self.tree(budgets[0] if len(budgets) == 1 else (None, None))
        losses = search.leaf_losses(tree)[..., 0]
        self.last, found = (tree, losses), {}
        for budget in budgets:
            leaves = tree.leaves(budget)
            best = losses[leaves].sort(dim=0, stable=True).indices[:keep]  # stable: of equal losses the cheaper first
            found[budget] = tree.routes[leaves[best]]
        return found


def dp(search, budgets, keep, choices, width, completion):
    """Dynamic programming with a beam: partial routes that used equally many BIG and SKIP share a cell, and each cell
    keeps its best `width` (per token), judged by a cheap completion: `small` or `big`, all remaining layers alike, or
    `early`, a read-out right there. Exact when no cell overflows."""
    L, S = len(search.model.blocks), search.start.shape[1]
    x, device = search.start, search.start.device
    routes = torch.zeros(1, S, L, dtype=torch.uint8, device=device)
    cells = np.zeros((1, 0), np.uint8)  # of each node some route in its cell: the counts are all that matters
    for layer in range(L):
        take, longer, new_cells = [], [], []
        for choice in choices:
            grown = np.concatenate((cells, np.full((len(cells), 1), choice, np.uint8)), 1)
            nodes = allowed(grown, L, choices, budgets).nonzero()[0]
            if len(nodes):
                take.append((choice, torch.from_numpy(nodes).to(device)))
                longer.append(routes[take[-1][1]])
                longer[-1][..., layer] = choice
                new_cells.append(grown[nodes])
        x, routes, cells = search.expand(layer, x, take), torch.cat(longer), np.concatenate(new_cells)
        keys = (cells == BIG).sum(1) * (L + 1) + (cells == SKIP).sum(1)
        members = [torch.from_numpy((keys == key).nonzero()[0]).to(device) for key in np.unique(keys)]
        if layer == L - 1 or all(len(cell) <= width for cell in members):
            continue
        if completion == "early":
            judged = search.read_out(x)[..., 0]
        else:
            judged = search.finish(x, layer + 1, BIG if completion == "big" else SMALL)[..., 0]  # [n, S]
        kept = [cell[judged[cell].sort(dim=0, stable=True).indices[:width]] for cell in members]  # each [<= width, S]
        cells = np.concatenate([cells[cell[:1].cpu().numpy()].repeat(len(k), 0)
                                for cell, k in zip(members, kept, strict=True)])
        kept = torch.cat(kept).unsqueeze(-1)
        x, routes = x.gather(0, kept.expand(-1, -1, x.shape[-1])), routes.gather(0, kept.expand(-1, -1, L))
    losses, cost = search.read_out(x)[..., 0], search.model.flops(routes)
    found = {}
    for budget in budgets:
        fits = matches(routes[:, :1], budget)[:, 0]  # a node's counts are the same for all tokens
        order = cost[fits].sort(dim=0, stable=True).indices
        order = order.gather(0, losses[fits].gather(0, order).sort(dim=0, stable=True).indices[:keep])
        found[budget] = routes[fits].gather(0, order.unsqueeze(-1).expand(-1, -1, L))
    return found


def greedy(search, budgets, keep, choices):
    """Start with the cheaper choice everywhere, then promote, one by one, the layer that lowers the loss most. The
    routes for k and k + 1 differ in one layer. Needs two choices."""
    L, S = len(search.model.blocks), search.start.shape[1]
    cheap, costly = choices
    device = search.start.device
    route = torch.full((1, S, L), cheap, dtype=torch.uint8, device=device)
    steps, losses = [route], [search.score(route)[..., 0]]
    for promoted in range(L):
        # [L - promoted, S]: the layers that are still cheap, of each token
        layers = (route[0] == costly).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :L - promoted].T
        options = route.expand(len(layers), S, L).scatter(2, layers.unsqueeze(-1), costly)
        scored = search.score(options)[..., 0]
        best = scored.argmin(0, keepdim=True)
        route = options.gather(0, best.unsqueeze(-1).expand(1, S, L))
        steps.append(route)
        losses.append(scored.gather(0, best))
    routes, losses, found = torch.cat(steps), torch.cat(losses), {}
    for budget in budgets:
        fits = matches(routes[:, 0], budget)
        order = losses[fits].sort(dim=0, stable=True).indices[:keep]
        found[budget] = routes[fits].gather(0, order.unsqueeze(-1).expand(-1, -1, L))
    return found


def settle(search, candidates, keep_keys=False):
    """Score candidates {key: routes [n, S, L]} and take the best of each, ties to the cheaper -> {key: (route [S, L],
    losses [S, M])}, and with keep_keys the keys and values of the winner (of the only key): k, v [L, S, H, 1, D]."""
    model, chosen, first = search.model, {}, 0
    scored = search.score(torch.cat(list(candidates.values())), keep_keys)  # all in one go
    scored, written = scored if keep_keys else (scored, None)
    for key, routes in candidates.items():
        losses = scored[first:first + len(routes)]
        first += len(routes)
        ties = losses[..., 0] == losses[..., 0].min(0).values
        best = model.flops(routes).masked_fill(~ties, torch.iinfo(torch.int64).max).argmin(0)  # [S]
        rows = torch.arange(len(best), device=best.device)
        chosen[key] = routes[best, rows], losses[best, rows]
    if not keep_keys:
        return chosen
    k, v = (torch.stack([layer[i][best, rows] for layer in written]).unsqueeze(-2) for i in (0, 1))  # [L, S, H, 1, D]
    return chosen, k, v
