import copy
import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from model import (
    BIG,
    SKIP,
    SMALL,
    DuoConfig,
    DuoGPT,
    KVCache,
    SwiGLU,
    expand_route,
    random_route,
    route_counts,
    sort_route,
)

B, T, L, V = 3, 12, 4, 64
ROUNDING = {"cpu": 1, "cuda": 10}  # a GPU adds in another order, and these weights are large
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


def make(seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    model = DuoGPT(DuoConfig(L, 2, 32, T, V, big_width=64, small_width=8)).init_weights(g)
    for p in model.parameters():  # larger weights, so that a wrong path shows
        p.data *= 6 if p.dim() == 2 else 1
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    idx, targets = torch.randint(V, (2, B, T), generator=g)
    return model.to(device), idx.to(device), targets.to(device), g


def any_route(g, device="cpu"):
    return torch.randint(3, (B, T, L), generator=g).to(device)


def loss_and_gradients(model, *args, **kw):
    model.zero_grad()
    _, loss = model(*args, **kw)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
                           for n, p in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_sparse_equals_dense(seed, device):
    model, idx, targets, g = make(seed, device)
    # Routes of every kind: mixed, one choice for all, a pattern, and two choices of three.
    for route in (any_route(g, device), SKIP, SMALL, BIG, torch.tensor([0, 1, 2, 1]),
                  torch.randint(2, (B, T, L), generator=g).to(device) * 2):
        model.execution = "dense"
        loss, gradients = loss_and_gradients(model, idx, route, targets)
        model.execution = "sparse"
        loss2, gradients2 = loss_and_gradients(model, idx, route, targets)
        torch.testing.assert_close(loss2, loss, rtol=1e-5, atol=1e-5)
        for name in gradients:
            torch.testing.assert_close(gradients2[name], gradients[name], rtol=1e-3, atol=2e-5 * ROUNDING[device],
                                       msg=name)


def test_causality():
    model, idx, _, g = make()
    route = any_route(g)
    logits = model(idx, route)[0]
    for t in range(1, T):  # new tokens and new routes from t on leave everything before t as it was
        idx2, route2 = idx.clone(), route.clone()
        idx2[:, t:], route2[:, t:] = (idx2[:, t:] + 1) % V, (route2[:, t:] + 1) % 3
        logits2 = model(idx2, route2)[0]
        torch.testing.assert_close(logits2[:, :t], logits[:, :t], rtol=0, atol=1e-5)
        assert (logits2[:, t:] - logits[:, t:]).abs().max() > 1e-3


def plain_gpt(model, idx, ffn):
    """A plain pre-norm GPT with the Duo model's weights, written out with none of its code. ffn: "big" or "small"."""
    c, w = model.config, dict(model.named_parameters())
    D = c.n_embd // c.n_head
    x = w["embedding.weight"][idx]
    angle = torch.arange(idx.size(1))[:, None] * 10000.0 ** (-torch.arange(D // 2) / (D // 2))[None]  # [T, D/2]

    def norm(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def turn(x):  # [B, H, T, D] as complex numbers
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.exp(1j * angle)
        return torch.cat((z.real, z.imag), -1)

    for i in range(c.n_layer):
        p = {n.removeprefix(f"blocks.{i}."): v for n, v in w.items() if n.startswith(f"blocks.{i}.")}
        q, k, v = (norm(x, p["attention_norm.weight"]) @ p["qkv.weight"].T).split(c.n_embd, -1)
        q, k, v = (t.view(*idx.shape, c.n_head, D).transpose(1, 2) for t in (q, k, v))
        score = turn(q) @ turn(k).transpose(-1, -2) / D ** 0.5
        score = score.masked_fill(torch.ones(score.shape[-2:]).triu(1).bool(), float("-inf"))
        x = x + (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p["out.weight"].T
        gate, up = (norm(x, p["ffn_norm.weight"]) @ p[f"{ffn}.gate_up.weight"].T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ p[f"{ffn}.down.weight"].T
    return norm(x, w["final_norm.weight"]) @ w["embedding.weight"].T


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_choice_equivalence(execution):
    model, idx, _, _ = make()
    model.execution = execution
    for choice, ffn in ((BIG, "big"), (SMALL, "small")):
        torch.testing.assert_close(model(idx, choice)[0], plain_gpt(model, idx, ffn), rtol=1e-4, atol=1e-4)
    # all-SKIP is the embedding, read out
    x = model.embedding.weight[idx]
    expected = F.rms_norm(x, (32,), model.final_norm.weight, 1e-5) @ model.embedding.weight.T
    torch.testing.assert_close(model(idx, SKIP)[0], expected)


def test_the_forms_of_a_route_agree():
    model, idx, _, _ = make()
    for pattern in itertools.product((SKIP, SMALL, BIG), repeat=2):
        pattern = torch.tensor([*pattern, BIG, SMALL])
        full = pattern.expand(B, T, L).clone()
        torch.testing.assert_close(model(idx, pattern)[0], model(idx, full)[0], rtol=0, atol=1e-5)
    assert torch.equal(expand_route(SMALL, B, T, L, "cpu"), torch.full((B, T, L), SMALL))


def test_keys_of_a_skipping_token_are_written():
    # Token 0 skips layer 1; a later token must still see its key and value there, computed from its unchanged residual.
    model, idx, _, _ = make()
    route = torch.full((B, T, L), BIG)
    route[:, 0, 1] = SKIP
    before = model(idx, route)[0]
    model.blocks[1].qkv.weight.data[32:] *= 2  # K and V of layer 1
    after = model(idx, route)[0]
    torch.testing.assert_close(after[:, 0], before[:, 0])  # the skipping token does not read them
    assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_gradient_isolation(execution):
    model, idx, targets, g = make()
    model.execution = execution
    route = any_route(g)
    route[..., 1] = SMALL  # nobody takes layer 1's BIG
    route[..., 2] = BIG  # nobody takes layer 2's SMALL
    route[..., 3] = SKIP  # nobody takes anything in layer 3, so its K and V reach nobody either
    _, gradients = loss_and_gradients(model, idx, route, targets)
    for name, gradient in gradients.items():
        idle = name.startswith(("blocks.1.big", "blocks.2.small", "blocks.3"))
        assert (gradient.abs().max() == 0) == idle, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_token_by_token_equals_whole(execution, device):
    model, idx, _, g = make(device=device)
    model.execution = execution
    for route in (any_route(g, device), expand_route(BIG, B, T, L, device), expand_route(SKIP, B, T, L, device)):
        whole = model(idx, route)[0]
        for first in (1, 5, T):  # a prefill of `first` tokens, then one by one, then a last piece of three
            cache = KVCache(model.config, B, device, torch.float32)
            cuts = [0, first, *range(first + 1, T - 2), T] if first < T else [0, T]
            parts = [model(idx[:, a:b], route[:, a:b], cache=cache)[0] for a, b in itertools.pairwise(cuts)]
            assert cache.length == T
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4 * ROUNDING[device])


class LinearRouter:
    """A causal router with state over depth, and memory over the sequence through `seq`."""

    def __init__(self, g):
        self.weight = torch.randn(L, 32, 3, generator=g)
        self.calls = []

    def __call__(self, layer, h, state, seq):
        state = h.sum(-1, keepdim=True) * 0.1 if state is None else state + 0.1
        self.calls.append((layer, h.shape[1], seq["idx"].shape[1]))
        return h @ self.weight[layer] + state * torch.tensor([0.0, 1.0, -1.0]), state


def test_router_decides_layer_by_layer():
    model, idx, targets, g = make()
    router = LinearRouter(g)
    logits, loss, stats = model(idx, router, targets, return_stats=True)
    route = stats["route"]
    assert set(route.unique().tolist()) == {SKIP, SMALL, BIG}  # the test means something
    assert [layer for layer, _, _ in router.calls] == list(range(L))
    again, loss2, stats2 = model(idx, route, targets, return_stats=True)
    torch.testing.assert_close(again, logits)
    assert torch.equal(stats2["flops"], stats["flops"]) and torch.equal(stats["flops"], model.flops(route, T))
    torch.testing.assert_close(stats["share"].sum(-1), torch.ones(L))
    assert stats["share"][0, BIG] == (route[..., 0] == BIG).float().mean()

    cache, routes, parts = KVCache(model.config, B, "cpu", torch.float32), [], []  # and the same token by token
    for t in range(T):
        part, _, stats = model(idx[:, t:t + 1], router, cache=cache, return_stats=True)
        parts.append(part)
        routes.append(stats["route"])
    assert torch.equal(torch.cat(routes, 1), route) and router.calls[-1] == (L - 1, 1, T)
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)


def test_loss():
    model, idx, targets, g = make()
    route = any_route(g)
    logits, mean = model(idx, route, targets)
    losses = model(idx, route, targets, reduction="none")[1]
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert losses.shape == (B, T)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(mean, expected.mean())


@pytest.mark.parametrize("device", DEVICES)
def test_fused_read_out_equals_autograd(device):
    model, idx, targets, g = make(device=device)
    route = any_route(g, device)
    loss, gradients = loss_and_gradients(model, idx, route, targets)
    loss2, gradients2 = loss_and_gradients(model, idx, route, targets, return_logits=False)
    torch.testing.assert_close(loss2, loss)
    for name in gradients:
        torch.testing.assert_close(gradients2[name], gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad()  # a scaled loss scales the gradient
    (3 * model(idx, route, targets, return_logits=False)[1]).backward()
    torch.testing.assert_close(model.embedding.weight.grad, 3 * gradients["embedding.weight"], rtol=1e-3, atol=3e-5)


def counted(model, *args, **kw):
    # The counter knows the products inside the plain attention, not those inside the CPU's fused one.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args, **kw)
    return counter.get_total_flops()


def test_flops_are_what_is_computed():
    model, idx, _, g = make()
    for route in (SMALL, BIG, SKIP, torch.randint(1, 3, (B, T, L), generator=g), torch.tensor([1, 2, 2, 1])):
        expected = model.flops(expand_route(route, B, T, L, "cpu"), T).sum()
        assert counted(model, idx, route) == expected
    # With skips the fused attention also computes rows that are dropped, as the docstring says: 4 T d each.
    route = any_route(g)
    dropped = (route == SKIP).sum() * 4 * T * 32
    assert counted(model, idx, route) == model.flops(route, T).sum() + dropped
    # One sequence token by token: nothing is dropped, and the token at position t reads t + 1 keys.
    cache = KVCache(model.config, 1, "cpu", torch.float32)
    for t in range(T):
        one = route[:1, t:t + 1]
        assert counted(model, idx[:1, t:t + 1], one, cache=cache) == model.flops(one, t + 1).sum()


def test_flops_forms_and_example():
    model = make()[0]
    d, w_small, w_big = 32, 8, 64
    # The example of model.py's docstring: route 0 1 2 1.
    expected = 4 * 4 * d * d + 3 * (4 * d * d + 4 * T * d) + 2 * 6 * d * w_small + 6 * d * w_big + 2 * d * V
    assert model.flops(torch.tensor([0, 1, 2, 1])) == expected
    assert isinstance(model.flops(BIG), int) and model.flops(BIG) == model.flops(torch.full((L,), BIG))
    per_token = model.flops(torch.full((B, T, L), BIG))
    assert per_token.shape == (B, T) and (per_token == model.flops(BIG)).all()


def test_random_route():
    g = torch.Generator().manual_seed(1)
    route = random_route(8, 40, 5, 0.2, 0.3, g)
    for choice, n in ((SKIP, 8), (SMALL, 20), (BIG, 12)):  # exact, in each sequence and layer
        assert ((route == choice).sum(1) == n).all()
    assert route_counts(8, 40, 5, 0.2, 0.3) == [(64, 160, 96)] * 5
    assert not torch.equal(route[0], route[1]) and not torch.equal(route[..., 0], route[..., 1])
    # Every position is BIG equally often: no position leaks into the choice.
    many = (random_route(4000, 10, 1, 0.0, 0.3, g) == BIG).float().mean((0, 2))
    assert (many - 0.3).abs().max() < 0.04  # 5.5 standard deviations


def test_counts_given_are_counts_found():
    g = torch.Generator().manual_seed(2)
    route = random_route(B, T, L, 0.25, 0.5, g)
    for found, given in zip(sort_route(route, B, T, L), route_counts(B, T, L, 0.25, 0.5), strict=True):
        assert tuple(found.counts) == given
        assert torch.equal(found.order[found.inverse], torch.arange(B * T))


def test_bad_shapes_and_values():
    model, idx, _, g = make()
    for route in (torch.zeros(B, T, L + 1, dtype=torch.long), torch.full((B, T, L), 3), 3, -1, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="route"):
            model(idx, route)
    with pytest.raises(ValueError, match="block_size=12"):
        model(torch.zeros(1, T + 1, dtype=torch.long), BIG)
    with pytest.raises(ValueError, match="n_head=3"):
        DuoConfig(n_embd=32, n_head=3)


def test_paper_proportions():
    config = DuoConfig(n_layer=12, n_head=20, n_embd=2560, block_size=8, vocab_size=32000)
    with torch.device("meta"):
        table = DuoGPT(config).parameter_table()
    count = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in table.splitlines()[1:]}
    # Section 3.1: 59 M small, 944 M big, 314 M attention, 1.399 B in all.
    assert [round(count[kind] / 1e6) for kind in ("small", "big", "attention", "total")] == [59, 944, 315, 1399]


def test_init_is_seeded_and_scaled():
    a, b, c = (DuoGPT(DuoConfig(2, 2, 64, 8, 100)).init_weights(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)
    assert a.blocks[0].qkv.weight.std().item() == pytest.approx(0.02 * 6 ** 0.5, rel=0.1)  # 384 / 64 = 6
    assert a.blocks[0].big.down.weight.std().item() == pytest.approx(0.01 * 6 ** 0.5, rel=0.1)  # sqrt(2 * 2 layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_compiled_bf16_on_cuda():
    """What train.py runs on a GPU, against float32 uncompiled: same loss and gradients up to bfloat16's rounding."""
    model, idx, targets, _ = make(device="cuda")
    route = random_route(B, T, L, 0.25, 0.5, torch.Generator("cuda").manual_seed(1))
    counts = route_counts(B, T, L, 0.25, 0.5)
    loss, gradients = loss_and_gradients(model, idx, route, targets)
    fast = torch.compile(copy.deepcopy(model), dynamic=False, mode="reduce-overhead", fullgraph=True)
    fast.compute_dtype = torch.float32
    for _ in range(3):  # eager warm-up, capture, replay
        loss2, gradients2 = loss_and_gradients(fast, idx, route, targets, counts=counts, return_logits=False)
    torch.testing.assert_close(loss2, loss, rtol=1e-3, atol=1e-3)
    for name in gradients:
        torch.testing.assert_close(gradients2[f"_orig_mod.{name}"], gradients[name], rtol=2e-2, atol=2e-3, msg=name)
    model.compute_dtype = torch.bfloat16
    loss3 = model(idx, route, targets, return_logits=False)[1]
    assert abs(loss3.item() - loss.item()) < 0.05


class ByToken:
    """A router of few lines: which tokens are BIG depends on their id and the layer."""
    may_skip = False

    def __call__(self, layer, h, state, seq):
        is_big = seq["idx"][:, -h.shape[1]:] * (layer + 3) % 7 < 3
        return F.one_hot(torch.where(is_big, BIG, SMALL), 3).float(), state

    def route(self, idx):
        return torch.stack([self(layer, idx, None, {"idx": idx})[0].argmax(-1) for layer in range(L)], -1)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_routed_ffn_is_each_tokens_own(device):
    """The kernels against their plain form, for every share of BIG, and shapes that no tile divides."""
    g = torch.Generator().manual_seed(1)
    for B, T, d, inner, p_big in ((2, 25, 64, (256, 16), 0.3), (3, 11, 96, (384, 24), 0.0), (1, 1, 96, (384, 24), 1.0),
                                  (2, 300, 384, (1536, 96), 0.4), (1, 700, 72, (136, 40), 0.9),
                                  (1, 9, 30, (7, 5), 0.5)):
        x, y = torch.randn(2, B, T, d, generator=g).to(device)
        weight, ffns = (1 + 0.1 * torch.randn(d, generator=g)).to(device), [SwiGLU(d, n).to(device) for n in inner]
        is_big = (torch.rand(B, T, generator=g) < p_big).to(device)
        big, small = (x + y + ffn(F.rms_norm(x + y, (d,), weight, 1e-5)) for ffn in ffns)
        expected = torch.where(is_big.unsqueeze(-1), big, small)
        torch.testing.assert_close(kernels.routed_ffn(x, y, weight, is_big, *ffns), expected, rtol=1e-4, atol=1e-4)
        if device == "cuda":
            found = kernels.routed_ffn(x.bfloat16(), y.bfloat16(), weight, is_big, *ffns).float()
            assert (found - expected).norm() / expected.norm() < 0.01 and (found - expected).abs().max() < 0.1


@torch.no_grad()
def test_a_routed_layer_is_the_dense_one():
    """In its plain form, which any machine runs."""
    model, idx, _, g = make()
    x, position = model.embedding(idx), (model.cos[:, :T], model.sin[:, :T])
    for block in model.blocks:
        is_big = torch.rand(B, T, generator=g) < 0.4
        dense = block.forward_dense(x, torch.where(is_big, BIG, SMALL), *position)
        torch.testing.assert_close(block.forward_routed(x, is_big, *position), dense, rtol=1e-5, atol=1e-5)
        x = dense


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@torch.no_grad()
def test_a_routed_forward_on_cuda():
    """As near to float32 as dense execution in bfloat16 is; and it waits for nothing, so a CUDA graph can hold it."""
    model, idx, _, _ = make(device="cuda")
    router = ByToken()
    model.execution = "dense"
    exact, rough = (setattr(model, "compute_dtype", dtype) or model(idx, router.route(idx))[0]
                    for dtype in (torch.float32, torch.bfloat16))
    allowed = 1.5 * (rough - exact).norm()
    model.execution = "sparse"
    assert (model(idx, router)[0] - exact).norm() < allowed
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(idx, router)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cache = KVCache(model.config, B, idx.device, torch.bfloat16)
    by_token = torch.cat([model(idx[:, t:t + 1], router, cache=cache)[0] for t in range(T)], 1)
    assert (by_token - exact).norm() < allowed
    fast = torch.compile(model.copy_in(torch.bfloat16), dynamic=False, mode="reduce-overhead", fullgraph=True)
    for other in (idx, idx.flip(1), idx):  # warm up, capture, replay; other tokens, so other counts
        result = fast(other, router)[0].clone()
    assert (result - exact).norm() < allowed
