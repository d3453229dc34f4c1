"""A GPT in which every token may take a BIG or a SMALL feed-forward network in every layer, or SKIP the layer.

Duo-LLM (arXiv 2410.10846, section 3.1) in the style of Llama 2: pre-RMSNorm, rotary positions, SwiGLU, no biases, tied
embeddings. Attention is shared; the two feed-forward networks (FFNs) stand side by side:

    SKIP = 0   x_l+1 = x_l                          (K and V of the layer are still written: later tokens may read them)
    SMALL = 1  y = x_l + attention(x_l);  x_l+1 = y + small(y)
    BIG = 2    y = x_l + attention(x_l);  x_l+1 = y + big(y)

An example. One token, layers 0..3, route 0 1 2 1: layer 0 only writes its K and V (4 d^2 FLOPs, d the width); layers
1 and 3 pay attention (8 d^2 + 4 T d) and a small FFN (6 d w_small), layer 2 attention and a big one (6 d w_big). Its
budget is k = 1, the number of BIG choices. `flops(route)` adds this up, and the read-out.

Two ways to execute a route, with equal values and gradients:
    dense    compute both FFNs for all tokens and select. Short, and the reference for tests.
    sparse   sort the tokens by choice, run each FFN on its own rows, sort back. The default, and really faster. (For a
             router on a GPU by kernels, which need not know how many rows there will be: kernels.routed_ffn.)
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

import kernels

SKIP, SMALL, BIG = 0, 1, 2


@dataclass
class DuoConfig:
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256  # longest sequence, in tokens
    vocab_size: int = 4096
    big_width: int = 0  # inner width of the BIG FFN; 0: 4 * n_embd, as in the paper
    small_width: int = 0  # inner width of the SMALL FFN; 0: a sixteenth of the big one, as in the paper
    rope_theta: float = 10000.0  # base of the rotary angles; a pretrained checkpoint may have another

    def __post_init__(self):
        self.big_width = self.big_width or 4 * self.n_embd
        self.small_width = self.small_width or max(1, self.big_width // 16)
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head} (rotary pairs)")


# ---------------------------------------------------------------------------------------------------------------------
# routes

def exact_shares(T, p_skip, p_big):
    """-> how many of T tokens SKIP, and how many take BIG; the rest take SMALL."""
    n_skip = round(p_skip * T)
    return n_skip, min(round(p_big * T), T - n_skip)


def route_counts(B, T, L, p_skip, p_big):
    """-> for each layer the numbers of (SKIP, SMALL, BIG) tokens in B sequences of a random_route."""
    n_skip, n_big = exact_shares(T, p_skip, p_big)
    return [(B * n_skip, B * (T - n_skip - n_big), B * n_big)] * L


def random_route(B, T, L, p_skip, p_big, generator):
    """Stage 1's random routing (paper, section 3.1) -> route [B, T, L] uint8 on the generator's device.

    In each sequence and layer exactly round(p * T) tokens, a random set, make each choice. A token's marginal
    probability is the paper's; exact counts make all shapes static, so the sparse path compiles and never waits for the
    device.
    """
    n_skip, n_big = exact_shares(T, p_skip, p_big)
    rank = torch.rand(B, T, L, generator=generator, device=generator.device).argsort(dim=1)  # a permutation of 0..T-1
    return (rank >= n_skip).to(torch.uint8) + (rank >= T - n_big).to(torch.uint8)


class PermuteRows(torch.autograd.Function):
    """rows[order]. Its gradient is a gather by the inverse permutation; autograd's own would be a slow scatter-add."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, grad):
        order, inverse = ctx.saved_tensors
        return grad[inverse], None, None


class Sorting:
    """The tokens of one layer in the order of their choice: SKIP first, then SMALL, then BIG.

    counts: the three group sizes, plain ints; order, inverse: [N] permutations of the N = B * T tokens, or None where
    all tokens make one choice and nothing needs to move.
    """

    def __init__(self, counts, order=None, inverse=None):
        self.counts, self.order, self.inverse = counts, order, inverse

    def apply(self, x, *parts):
        """Run each function on its own rows of x [B, T, d]. parts: (number of rows, function), in sorted order; the
        function None gives zeros, and is never alone. -> [B, T, d']"""
        parts = [(n, function) for n, function in parts if n > 0]
        if len(parts) == 1:  # one function serves all tokens, in whatever order
            return parts[0][1](x)
        rows = PermuteRows.apply(x.flatten(0, 1), self.order, self.inverse)  # [N, d]
        done = [torch.zeros_like(r) if function is None else function(r)
                for r, (_, function) in zip(rows.split([n for n, _ in parts]), parts, strict=True)]
        return PermuteRows.apply(torch.cat(done), self.inverse, self.order).unflatten(0, x.shape[:2])


def sort_route(route, B, T, L, counts=None):
    """route: an int, a pattern [L] or a route [B, T, L] -> a Sorting for each layer.

    counts: L triples, where the caller knows them; without them a tensor [B, T, L] costs one wait for the device.
    """
    if not isinstance(route, torch.Tensor) or route.dim() == 1:  # all tokens alike
        pattern = [route] * L if isinstance(route, int) else [int(choice) for choice in route]
        if len(pattern) != L or not set(pattern) <= {SKIP, SMALL, BIG}:
            raise ValueError(f"route {pattern}: expected {L} choices, each 0 (SKIP), 1 (SMALL) or 2 (BIG)")
        return [Sorting([B * T if choice == c else 0 for c in (SKIP, SMALL, BIG)]) for choice in pattern]
    if route.shape != (B, T, L):
        raise ValueError(f"route has shape {tuple(route.shape)}, expected [B, T, L] = {(B, T, L)}")
    choices = route.flatten(0, 1).T  # [L, N]
    if counts is None:
        counts = torch.stack([(choices == c).sum(1) for c in (SKIP, SMALL, BIG)], 1).tolist()
        if any(sum(n) != B * T for n in counts):
            raise ValueError("route holds a value other than 0 (SKIP), 1 (SMALL) and 2 (BIG)")
    # Stable: rows stay in memory order within a group. Bytes sort in one pass, int64 in eight.
    order = choices.to(torch.uint8).argsort(dim=1, stable=True)
    inverse = torch.empty_like(order).scatter_(1, order, torch.arange(B * T, device=order.device).expand(L, -1))
    return [Sorting(n, o, i) for n, o, i in zip(counts, order, inverse, strict=True)]


def expand_route(route, B, T, L, device):
    """An int, a pattern [L] or a route [B, T, L] -> [B, T, L] int64 on the device."""
    return torch.as_tensor(route, device=device).long().expand(B, T, L)


# ---------------------------------------------------------------------------------------------------------------------
# the network

class Linear(nn.Linear):
    """No bias; the float32 weight is cast to the activations' dtype at each use, so that no autocast is needed."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps) * g, in float32
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-5).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): three matrices, which is what makes the paper's parameter counts add up."""

    def __init__(self, width, inner):
        super().__init__()
        self.gate_up = Linear(width, 2 * inner)
        self.down = Linear(inner, width)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_i+D/2) by an angle that grows with the position. x [B, T, H, D]"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class ReadOutLoss(torch.autograd.Function):
    """Mean cross-entropy of the read-out h W^T, h [N, d], W [V, d], targets [N], in nats.

        loss = mean_n( logsumexp_v(z_nv) - z_n,y(n) ),  z = h W^T;    N dloss/dz = softmax(z) - onehot(y)

    The gradient of the logits is taken in the forward pass, while each row is at hand: compiled, one kernel reads the
    logits and writes the gradient, where plain autograd takes two, one of them later. For training only.
    """

    @staticmethod
    def forward(ctx, h, weight, targets):
        logits = h @ weight.T
        log_sum = logits.float().logsumexp(-1, keepdim=True)  # [N, 1]
        label = logits.gather(-1, targets.unsqueeze(-1)).float()  # [N, 1]
        is_label = torch.arange(weight.size(0), device=h.device) == targets.unsqueeze(-1)
        grad = ((logits.float() - log_sum).exp() - is_label.float()).to(h.dtype)  # [N, V]
        ctx.save_for_backward(h, weight, grad)
        return (log_sum - label).mean()

    @staticmethod
    def backward(ctx, grad_loss):
        h, weight, grad = ctx.saved_tensors
        scale = grad_loss / h.size(0)
        return (grad @ weight) * scale, (grad.T @ h) * scale if ctx.needs_input_grad[1] else None, None


class KVCache:
    """Keys and values of the tokens read so far, for token-by-token decoding. `length` tokens are in it."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        self.length = 0
        self.seq = {}  # what a router knows of the sequence so far

    def append(self, layer, k, v):
        """Write k, v [B, H, T, D] behind what is there -> all keys, all values of the layer [B, H, length + T, D]"""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k.detach(), v.detach()
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.attention_norm = RMSNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.ffn_norm = RMSNorm(width)
        self.small = SwiGLU(width, config.small_width)
        self.big = SwiGLU(width, config.big_width)

    def attend(self, q, k, v, cos, sin, cache, layer):
        """q, k, v [B, T, d] -> [B, T, d]. With a cache the keys and values of earlier tokens come first. q=None: all
        tokens skip, so keys and values are written and nothing is read."""
        past = cache.length if cache is not None else 0
        k, v = (t.unflatten(-1, (self.n_head, -1)) for t in (k, v))  # [B, T, H, D]
        k, v = rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)  # [B, H, T, D]
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if q is None:
            return None
        q = rotate(q.unflatten(-1, (self.n_head, -1)), cos, sin).transpose(1, 2)
        mask = None
        if past and q.size(2) > 1:  # several new tokens behind a past: token i sees keys 0..past+i
            mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0)
        return y.transpose(1, 2).flatten(2)

    def forward(self, x, sorting, cos, sin, cache=None, layer=0):
        """The sparse path. x [B, T, d] -> [B, T, d]; only the work that the tokens chose is done."""
        n_skip, n_small, n_big = sorting.counts
        n_read = n_small + n_big
        if not n_skip:
            x = x + self.attention(x, cos, sin, cache, layer)
        else:  # a token that skips needs no query, but its key and value are written
            h = self.attention_norm(x)
            w_q, w_kv = self.qkv.weight.to(x.dtype).split((x.size(-1), 2 * x.size(-1)))
            k, v = F.linear(h, w_kv).chunk(2, dim=-1)
            q = sorting.apply(h, (n_skip, None), (n_read, lambda rows: F.linear(rows, w_q))) if n_read else None
            # One fused kernel over the whole sequence; rows of skipping tokens come out of it and are dropped.
            y = self.attend(q, k, v, cos, sin, cache, layer)
            if n_read == 0:
                return x
            x = x + sorting.apply(y, (n_skip, None), (n_read, self.out))
        # The norm is row by row, so it may follow the sorting: the gather then fuses with it.
        return x + sorting.apply(x, (n_skip, None), (n_small, lambda rows: self.small(self.ffn_norm(rows))),
                                 (n_big, lambda rows: self.big(self.ffn_norm(rows))))

    def attention(self, x, cos, sin, cache=None, layer=0):
        """attention(x) of a layer that no token skips"""
        q, k, v = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        return self.out(self.attend(q, k, v, cos, sin, cache, layer))

    def forward_routed(self, x, is_big, cos, sin, cache=None, layer=0):
        """A router's layer on a GPU: sparse, but how many tokens are BIG (is_big [B, T]) is known to the GPU alone, and
        nothing waits for it. No token skips, no gradients."""
        y = self.attention(x, cos, sin, cache, layer)
        return kernels.routed_ffn(x, y, self.ffn_norm.weight, is_big, self.big, self.small)

    def forward_dense(self, x, choice, cos, sin, cache=None, layer=0):
        """The slow obvious path: everything for everyone, then select by choice [B, T]."""
        choice, y = choice.unsqueeze(-1), x + self.attention(x, cos, sin, cache, layer)
        h = self.ffn_norm(y)
        y = y + torch.where(choice == BIG, self.big(h), self.small(h))
        return torch.where(choice == SKIP, x, y)


class DuoGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.execution = "sparse"  # or "dense"
        self.compute_dtype = torch.float32  # of activations; parameters stay float32
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)  # also the read-out (tied)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.n_embd)
        # Angles of the rotary positions: position * theta^(-2i/D)
        half = config.n_embd // config.n_head // 2
        frequency = config.rope_theta ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.block_size), frequency)  # [T, D/2]
        self.register_buffer("cos", angle.cos()[None, :, None], persistent=False)  # [1, T, 1, D/2]
        self.register_buffer("sin", angle.sin()[None, :, None], persistent=False)

    def init_weights(self, generator):
        """GPT-2's scaled init, with a std that falls with the square root of the width: 0.02 at width 384
        (why: NOTES.md), and 1 / sqrt(2 L) of that for the matrices that write into the residual stream."""
        std = 0.02 * math.sqrt(384 / self.config.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer) if writes else std,
                                generator=generator)
        return self

    def copy_in(self, dtype):
        """-> a copy whose weights are kept in dtype, so that no use has to cast them: for inference. The tables of the
        rotary positions stay float32."""
        copied = copy.deepcopy(self).to(dtype)
        copied.compute_dtype, copied.cos, copied.sin = dtype, self.cos, self.sin
        return copied

    def forward(self, idx, route, targets=None, counts=None, cache=None, reduction="mean", return_logits=True,
                return_stats=False):
        """idx [B, T] int64; route: an int, a pattern [L], a route [B, T, L], or a router, which decides layer by layer:
        `logits [B, T, 3], state = router(layer, h, state, seq)`, hard choice by argmax (README: a router of your own).

        -> logits [B, T, V] float32, as precise as compute_dtype (None with return_logits=False), loss in nats (None
        without targets [B, T]; a scalar, or [B, T] with reduction="none"); with return_stats=True also a dict:
        route [B, T, L], flops [B, T], share [L, 3].
        counts: see sort_route. cache: a KVCache; idx then holds only the new tokens. Raises ValueError on wrong shapes.
        """
        B, T = idx.shape
        L, start = len(self.blocks), cache.length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size={self.config.block_size}")
        position = (self.cos[:, start:start + T], self.sin[:, start:start + T])
        router = route if callable(route) else None
        if router:
            choices, state, seq = [], None, cache.seq if cache else {}
            seq["idx"] = torch.cat((seq["idx"], idx), 1) if "idx" in seq else idx
        else:
            sortings = sort_route(route, B, T, L, counts)
            if self.execution == "dense" or return_stats:
                choices = expand_route(route, B, T, L, idx.device).unbind(-1)  # L times [B, T]
        x = self.embedding(idx).to(self.compute_dtype)  # [B, T, d]
        # Sorting here would wait for the GPU in each layer, to hear how many tokens chose what.
        unsorted = (kernels.routes_by_kernel(x, self.config.big_width, self.config.small_width)
                    and not getattr(router, "may_skip", True) and not torch.is_grad_enabled())
        for layer, block in enumerate(self.blocks):
            if router:
                choice_logits, state = router(layer, x, state, seq)
                choices.append(choice_logits.argmax(-1))
            if self.execution == "dense":
                x = block.forward_dense(x, choices[layer], *position, cache, layer)
            elif router and unsorted:
                x = block.forward_routed(x, choices[layer] == BIG, *position, cache, layer)
            else:
                sorting = sort_route(choices[layer].unsqueeze(-1), B, T, 1)[0] if router else sortings[layer]
                x = block(x, sorting, *position, cache, layer)
        if cache:
            cache.length += T
        h, weight = self.final_norm(x), self.embedding.weight.to(x.dtype)
        logits, loss = None, None
        if targets is not None and reduction == "mean" and not return_logits:  # training
            loss = ReadOutLoss.apply(h.flatten(0, 1), weight, targets.flatten())
        else:
            logits = F.linear(h, weight).float()  # [B, T, V]
            if targets is not None:
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
                loss = loss if reduction == "mean" else loss.view(B, T)
        result = logits if return_logits else None, loss
        if not return_stats:
            return result
        route = torch.stack(list(choices), dim=-1).to(torch.uint8)
        share = torch.stack([(route == c).float().mean((0, 1)) for c in (SKIP, SMALL, BIG)], dim=-1)
        return *result, {"route": route, "flops": self.flops(route, T), "share": share}

    def flops(self, route, context=None):
        """Forward FLOPs per token, 2 per multiply-add, attention over the full `context` (default block_size), read-out
        included. route: an int or a pattern [L] -> int; [B, T, L] -> int64 [B, T].

        SKIP costs K and V only. That is what decoding runs; over a whole sequence the fused attention kernel also
        computes, and we drop, the rows of skipping tokens (4 T d each): faster than a ragged kernel, but not free.
        """
        d, T = self.config.n_embd, context or self.config.block_size
        write_kv = 2 * d * 2 * d
        attend = 2 * d * 2 * d + 2 * 2 * T * d  # Q and output projection; scores and weighted sum
        ffn = (2 * 3 * d * width for width in (self.config.small_width, self.config.big_width))
        cost = [write_kv] + [write_kv + attend + f for f in ffn]
        read_out = 2 * d * self.config.vocab_size
        if isinstance(route, int):
            return len(self.blocks) * cost[route] + read_out
        total = torch.tensor(cost, device=route.device)[route.long()].sum(-1) + read_out
        return int(total) if route.dim() == 1 else total

    def parameter_table(self):
        """-> text: parameters by kind, the paper's split (section 3.1)."""
        kinds = {"attention": ("qkv", "out"), "big": ("big",), "small": ("small",), "embeddings": ("embedding",),
                 "norms": ()}
        count = dict.fromkeys(kinds, 0)
        for name, parameter in self.named_parameters():
            kind = next((kind for kind, parts in kinds.items() if set(parts) & set(name.split("."))), "norms")
            count[kind] += parameter.numel()
        total = sum(count.values())
        rows = [f"  {kind:<12}{n:>14,}{n / total:>8.1%}" for kind, n in (count | {"total": total}).items()]
        return "\n".join(["parameters", *rows])
