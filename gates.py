"""What routers are made of: the paper's router, the soft mix of a layer's choices, and what routers learn from.

router.py trains and measures what is built here; zoo.py builds seven more systems from it. A system is a Router that
changes what it has to: `forward`, which decides; `flops`, what deciding costs; `step_loss`, what it learns from;
`prepare`, what is fitted before the first step; `attached`, what it does to the model it routes.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from common import generator
from model import BIG, SKIP, KVCache, ReadOutLoss, random_route
from oracle import LETTERS
from search import Search

GAIN_UNIT = 0.1  # nats per unit of the advantage router's logits


# ---------------------------------------------------------------------------------------------------------------------
# the routers

class Router(nn.Module):
    """`logits [B, T, 3], state = router(layer, h, state, seq)`, h [B, T, d] the residual that enters the layer. All
    five kinds are this: hidden=0 is a linear layer per layer. choices: letters; others get the logit -inf. share:
    (SKIP, SMALL, BIG), where the biases start. told=True: it serves many budgets, and is told which, as the share of
    BIG that is asked for: by seq["asked"] [B] while training, by the buffer `asked` afterwards. learns: linear (soft
    mix), gumbel, distilled or advantage."""

    n_domains = 1  # that the corpus must have at least
    serves_all_budgets = False  # True: what it learns does not depend on the budget, only its calibration does

    def __init__(self, shape, hidden, choices, share, rng, told=False, learns="gumbel"):
        super().__init__()
        self.learns = learns
        L, d = shape.n_layer, shape.n_embd
        self.hidden, self.choices = hidden, choices
        self.may_skip = "x" in choices  # False: on a GPU model.forward need not wait for how many tokens chose what
        if hidden:
            self.w_in = nn.Parameter(torch.randn(L, d, hidden, generator=rng) / math.sqrt(d))
            self.b_in = nn.Parameter(torch.zeros(L, hidden))
        self.w_out = nn.Parameter(torch.zeros(L, hidden or d, 3))  # zeros: at first all tokens are alike
        self.b_out = nn.Parameter(torch.tensor(share).clamp_min(0.01).log().repeat(L, 1))
        if told:
            self.w_k = nn.Parameter(torch.tensor([0.0, 0.0, 1.0]).repeat(L, 1))
            self.register_buffer("asked", torch.tensor(share[BIG]))
        self.told = told
        self.register_buffer("shift", torch.zeros(3))  # the calibration's
        self.register_buffer("missing", torch.tensor([c not in [LETTERS[x] for x in choices] for c in range(3)]))

    def forward(self, layer, h, state=None, seq=None):
        if self.hidden:  # the larger product in the model's dtype, as the model's own; the logits in float32
            z = F.rms_norm(h, h.shape[-1:], eps=1e-5)  # [B, T, d]
            z = F.gelu((z @ self.w_in[layer].to(h.dtype)).to(self.w_out.dtype) + self.b_in[layer])  # [B, T, hidden]
        else:
            z = F.rms_norm(h.to(self.w_out.dtype), h.shape[-1:], eps=1e-5)
        logits = z @ self.w_out[layer] + self.b_out[layer] + self.shift
        if self.told:  # log odds: then already at the start P_BIG is what is asked for
            asked = seq.get("asked", self.asked).clamp(0.01, 0.99)
            logits = logits + self.w_k[layer] * asked.logit().view(-1, 1, 1)
        return logits.masked_fill(self.missing, -math.inf), state

    def flops(self):
        """FLOPs per token of all layers' decisions, counted as model.flops counts."""
        L, n_in, n_out = self.w_out.shape
        return 2 * L * (n_in * n_out + (self.w_in.shape[1] * n_in if self.hidden else 0))

    def groups(self, weight_decay):
        """-> the optimizer's parameter groups: weight decay is for the matrices, not for biases."""
        matrices = [p for key, p in self.named_parameters() if key in ("w_in", "w_out")]
        others = [p for key, p in self.named_parameters() if key not in ("w_in", "w_out")]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def prepare(self, model, batch, config, budget):
        """Fit what is not learned by gradients, once, before the first step; it must end in buffers. batch: step -> x,
        y [B, T], domain [B] of training text; steps below 0 are no training's."""

    def attached(self, model):
        """-> a context in which `model` is what this router routes: for systems that change it, or read it."""
        return contextlib.nullcontext()

    def step_loss(self, model, config, budget, x, y, domain, step):
        """The loss of one step -> loss, and its parts by name. x, y [B, T]; domain [B]: of which text each sequence is.
        Each step's noise has a seed of its own."""
        n_big, n_skip = budget
        L = len(model.blocks)
        rng = generator(x.device, config.seed, "router", "noise", step)
        if self.learns in ("distilled", "advantage"):
            with torch.no_grad():
                h, target = labels(model, x, y, shares(L, config.choices, n_big, n_skip), config.choices,
                                   config.label_positions, config.label_routes if self.learns == "distilled" else 0,
                                   config.label_temperature, rng)
            loss = label_loss(self, h, target)
            return loss, {"loss": loss}
        noise = None if self.learns == "linear" else gumbel_noise(*x.shape, L, rng)
        tau, alpha, big = (torch.full((), value, device=x.device) for value in (
            *schedule(config, step / max(1, config.steps - 1)), n_big / L))  # tensors: numbers would be compiled in
        wanted = {BIG: big} | ({SKIP: n_skip / L} if n_skip is not None else {})
        mixed = compiled_mixed_loss() if compiles(config, x.device) else mixed_loss
        loss, cross_entropy, big = mixed(model, self, config.per_token, x, y, noise, tau, alpha, wanted)
        return loss, {"loss": cross_entropy, "BIG": big}


def shares(n_layer, choices, n_big, n_skip):
    """-> (SKIP, SMALL, BIG): the shares that the budget asks for; what it leaves open is divided evenly."""
    big = n_big / n_layer
    if "s" not in choices:
        return 1 - big, 0.0, big
    skip = 0.0 if "x" not in choices else (1 - big) / 2 if n_skip is None else n_skip / n_layer
    return skip, max(0.0, 1 - big - skip), big


# ---------------------------------------------------------------------------------------------------------------------
# what they learn from: the soft mix, Gumbel draws, labels

def soft_gate(logits, tau):
    """-> weights of the mix [B, T, 3], shares for the budget loss: P = softmax(logits / tau), both."""
    p = (logits / tau).softmax(-1)
    return p, p


def gumbel_noise(B, T, L, rng):
    """-> g [B, T, L, 3] on the generator's device: -log of exponential variables."""
    return -torch.empty(B, T, L, 3, device=rng.device).exponential_(generator=rng).log()


def gumbel_gate(logits, tau, g):
    """Straight-through: forward one choice, argmax(logits + g) with g ~ Gumbel, whose probabilities are exactly
    softmax(logits), so the budget loss takes these; backward the gradient of softmax((logits + g) / tau)."""
    soft = ((logits + g) / tau).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 3).to(soft)
    return soft + (hard - soft).detach(), logits.softmax(-1)


def mixed_forward(model, router, idx, gate, seq=None):
    """Both FFNs for all tokens, mixed, so that gradients reach the router through the model (SMALL is a sixteenth of
    BIG, so that costs little more than all-BIG).

        x_l+1 = sum_c P_c H_c,    H_SKIP = x, H_SMALL = y + small(y), H_BIG = y + big(y), y = x + attention(x)

    idx [B, T]; gate: layer, logits [B, T, 3] -> (P, shares); seq: what a router may know besides idx
    -> h [B, T, d], which the read-out reads, shares [B, T, L, 3]
    """
    position = (model.cos[:, :idx.shape[1]], model.sin[:, :idx.shape[1]])
    x, state, seq, shares = model.embedding(idx).to(model.compute_dtype), None, {"idx": idx} | (seq or {}), []
    for layer, block in enumerate(model.blocks):
        logits, state = router(layer, x, state, seq)
        p, share = gate(layer, logits)
        shares.append(share)
        p_skip, p_small, p_big = p.to(x.dtype).split(1, -1)  # [B, T, 1] each
        y = x + block.attention(x, *position)
        h = block.ffn_norm(y)
        x = p_skip * x + (p_small + p_big) * y + p_small * block.small(h) + p_big * block.big(h)
    return model.final_norm(x), torch.stack(shares, 2)


def budget_loss(share, wanted, per_token=False):
    """mean over sequences of (mean over layers and tokens of P_c - wanted share of c)^2; per_token: over tokens of
    (mean over layers ...)^2. share [B, T, L, 3]; wanted {choice: share, a number or [B, 1]}"""
    mean = share.mean(2) if per_token else share.mean((1, 2)).unsqueeze(1)  # [B, T, 3] or [B, 1, 3]
    return sum(((mean[..., choice] - target) ** 2).mean() for choice, target in wanted.items())


def mixed_loss(model, router, per_token, idx, targets, noise, tau, alpha, wanted, seq=None):
    """CE + alpha * budget loss -> that, CE, BIG per token. noise: see gumbel_noise; None mixes softly (linear)."""
    def gate(layer, logits):
        return soft_gate(logits, tau) if noise is None else gumbel_gate(logits, tau, noise[:, :, layer])
    h, share = mixed_forward(model, router, idx, gate, seq)
    loss = ReadOutLoss.apply(h.flatten(0, 1), model.embedding.weight.to(h.dtype), targets.flatten())
    return (loss + alpha * budget_loss(share, wanted, per_token), loss,
            share[..., BIG].sum(-1).mean())


def compiles(config, device):
    return config.compile == "on" or config.compile == "auto" and device.type == "cuda"


@functools.cache
def compiled_mixed_loss():
    """One graph for all budgets of one kind of router: what changes from step to step, or with the budget, are tensors.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of routers times sets of choices
    return torch.compile(mixed_loss, dynamic=False)


def labels(model, idx, targets, share, choices, positions, n_routes, temperature, rng):
    """What would this token's loss be with choice c in layer l? Each token stands on a random route (drawn by `share`),
    and so do the tokens before it.

    -> h, L times [B, n, d], entering each layer along that route, at n positions; gain [B, n, L, 3]: how much lower
    than with the cheapest choice the loss is when only layer l changes, nats; weight [B, n, L, 3]: the share of
    exp(-loss / temperature) that goes through c, over n_routes more random routes. (Of the two, one is asked for:
    n_routes=0 gives the gain.)
    """
    (B, T), L = idx.shape, len(model.blocks)
    letters = sorted(LETTERS[c] for c in choices)
    share = torch.tensor(share, device=idx.device)

    def draw(*shape):
        return torch.multinomial(share, math.prod(shape), replacement=True, generator=rng).view(shape)
    route, entering = draw(B, T, L), []

    def follow(layer, h, state, seq):
        entering.append(h)
        return F.one_hot(route[..., layer], 3).float(), state
    cache = KVCache(model.config, B, idx.device, model.compute_dtype)
    model(idx, follow, cache=cache)
    past, found = torch.stack((cache.k, cache.v)), []
    where = torch.rand(T, generator=rng, device=idx.device).argsort()[:positions].sort().values
    for t in where.tolist():
        search = Search(model, idx[:, t], past[..., :t, :], model.embedding.weight[targets[:, t]].float().unsqueeze(1))
        if n_routes:
            # Each choice stands in each layer equally often: what is left of a layer's weights is what it does.
            routes = random_route(B, n_routes, L, share[SKIP].item(), share[BIG].item(), rng).transpose(0, 1).long()
            weight = (-search.score(routes)[..., -1] / temperature).softmax(0)  # [n_routes, B]
            found.append(torch.einsum("nb,nblc->blc", weight, F.one_hot(routes, 3).float()))
        else:
            routes = route[:, t].repeat(L, len(letters), 1, 1)  # [L, C, B, L]
            for layer in range(L):
                for i, choice in enumerate(letters):
                    routes[layer, i, :, layer] = choice
            losses = search.score(routes.flatten(0, 1))[..., -1].view(L, -1, B)  # [L, C, B]
            gain = torch.zeros(B, L, 3, device=idx.device)
            gain[..., letters] = (losses[:, :1] - losses).permute(2, 0, 1)
            found.append(gain)
    return [h[:, where] for h in entering], torch.stack(found, 1)


def label_loss(router, h, target):
    """distilled: the cross-entropy of P and the oracle's weights. advantage: the squared error of the predicted gain
    over the cheapest choice (squared: a label's gain is mostly noise, and it is its expectation that is wanted)."""
    logits = torch.stack([router(layer, x)[0] for layer, x in enumerate(h)], 2)  # [B, n, L, 3]
    here = ~router.missing
    logits, target = logits[..., here], target[..., here]
    if router.learns == "distilled":
        return -(target * logits.log_softmax(-1)).sum(-1).mean()
    return ((logits - logits[..., :1] - target / GAIN_UNIT)[..., 1:] ** 2).mean()


def schedule(config, done):
    """-> tau, alpha where a share `done` of the steps is done."""
    return (config.tau_start * (config.tau_end / config.tau_start) ** done,
            config.alpha_start * (config.alpha_end / config.alpha_start) ** done)
