"""Seven more routing systems, each rebuilt small behind the router interface (gates.Router). ../shared/SEEDS.md"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from common import UserError, generator
from gates import GAIN_UNIT, Router
from model import BIG, SKIP, SMALL

KINDS = {}


# ---------------------------------------------------------------------------------------------------------------------
# three systems that look at the prompt: what they share

MOST = 8  # rows in tables of domains or policies; a fixed number, so that files and compiled graphs keep their shapes


def summary(h, seq, every):
    """The prompt so far: the mean of the frozen base's token embeddings e (the residual that enters layer 0).

        z_t = 1/n sum_{i<n} e_i,    n = t + 1, rounded down to a multiple of `every`

    A deviation of Tryage, Arch-Router and GLIDER here: the papers' read the prompt with a text encoder or a language
    model of its own. h [B, T, d]: the newest tokens' e; seq keeps the older ones'
    -> z [B, T, d] float32, known [T] bool: False where no multiple has been reached, z is 0 there.
    """
    e = seq["embedded"] = torch.cat((seq["embedded"], h.float()), 1) if "embedded" in seq else h.float()
    n = torch.arange(1, e.shape[1] + 1, device=h.device)[-h.shape[1]:] // every * every  # [T]
    z = e.cumsum(1)[:, (n - 1).clamp_min(0)] / n.clamp_min(1).unsqueeze(-1)
    return z * (n > 0).unsqueeze(-1), n > 0


def training_text(batch):
    """-> x, y [n, T], domain [n] of training text, drawn apart from the steps', some of each domain."""
    return [torch.cat(parts) for parts in zip(*(batch(-1 - i) for i in range(32)), strict=True)]


@torch.no_grad()
def greedy_ranks(model, x, y, cheap):
    """Which layers should be BIG first on this text? From all-cheap on, always add the layer that lowers the loss most.

    -> rank [L], 0 for the first layer added; loss [L + 1] with k BIG. Pattern k is BIG where rank < k.
    """
    L = len(model.blocks)

    def loss(big):
        return model(x, [BIG if layer in big else cheap for layer in range(L)], y, return_logits=False)[1].item()
    order, losses = [], [loss([])]
    while len(order) < L:
        losses_with = {layer: loss([*order, layer]) for layer in range(L) if layer not in order}
        order.append(min(losses_with, key=losses_with.get))
        losses.append(losses_with[order[-1]])
    return torch.tensor(order, device=x.device).argsort(), losses


class Planned(Router):
    """A router that decides for all layers at once, as the token enters layer 0. `plan`: e [B, T, d], seq -> [B, T, L],
    above 0 where BIG, monotone in shift[BIG]; all else is the cheap choice, SMALL (with --choices=xb SKIP)."""

    def __init__(self, shape, config, learns):
        if config.choices == "xsb":
            raise UserError("--choices=xsb: this router has patterns of two choices; give sb or xb")
        nn.Module.__init__(self)
        self.choices, self.hidden, self.told, self.learns = config.choices, config.hidden, False, learns
        self.cheap = SMALL if "s" in config.choices else SKIP
        self.every = max(1, shape.block_size // 8)  # tokens between two looks at the prompt
        self.register_buffer("shift", torch.zeros(3))
        self.register_buffer("missing", torch.tensor([c not in (self.cheap, BIG) for c in range(3)]))
        self.register_buffer("centre", torch.zeros(shape.n_embd))  # mean embedding of training text

    def forward(self, layer, h, state=None, seq=None):
        if layer == 0:
            state = self.plan(h, seq)
        logits = F.pad(state[..., layer:layer + 1], (2, 0))  # BIG's logit, 0 for the others
        return logits.masked_fill(self.missing, -math.inf), state


# ---------------------------------------------------------------------------------------------------------------------
# Tryage

class Tryage(Planned):
    """Tryage: real-time, intelligent routing of user prompts (arXiv 2308.11601). A perceptive router predicts how well
    each model of a library would do on the prompt; constraints enter with prices that the user sets:

        pattern = argmax_p A_p(e_t, z_t) - lambda * (number of BIG in p),    lambda = -shift[BIG]

    The library is of patterns: the greedily nested one for each k, all-small and all-big among them, and three that
    complement those. A_p is trained to be loss averaged over the library minus loss of p, both of this token where
    all tokens take the pattern: the loss itself is mostly how hard the token is, whatever the pattern. (A control,
    head 1, learns that raw loss; it decides nothing.) The budget plays no part in training: one head serves them all.
    Deviations: it decides per token; MLPs on token embeddings in the place of a language model.
    """

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, config, "patterns' losses")
        L, d, width = shape.n_layer, shape.n_embd, config.hidden
        self.w_in = nn.Parameter(torch.randn(2, 2 * d, width, generator=rng) / math.sqrt(2 * d))  # [0] A, [1] control
        self.b_in = nn.Parameter(torch.zeros(2, width))
        self.w_out = nn.Parameter(torch.zeros(2, width, L + 4))
        self.b_out = nn.Parameter(torch.zeros(2, L + 4))
        nested = torch.arange(L + 1).unsqueeze(1) > torch.arange(L)
        self.register_buffer("library", torch.cat((nested, nested[[L // 2] * 3])))  # [P, L] bool: BIG

    def predict(self, e, seq, head=0):
        """-> A / GAIN_UNIT [B, T, P], or with head=1 the control's raw losses in nats"""
        z, _ = summary(e, seq, self.every)
        f = torch.cat([F.rms_norm(part, part.shape[-1:], eps=1e-5) for part in (e.float(), z - self.centre)], -1)
        return F.gelu(f @ self.w_in[head] + self.b_in[head]) @ self.w_out[head] + self.b_out[head]

    def plan(self, e, seq):
        score = self.predict(e, seq) + self.shift[BIG] * self.library.sum(-1)
        return self.library[score.argmax(-1)].float() * 2 - 1

    def flops(self):
        return 2 * (self.w_in[0].numel() + self.w_out[0].numel())

    @torch.no_grad()
    def pattern_losses(self, model, library, x, y):
        """-> [B, T, P]: each token's loss where all tokens take the pattern"""
        choices = torch.where(library, BIG, self.cheap).tolist()
        return torch.stack([model(x, pattern, y, reduction="none")[1] for pattern in choices], -1)

    def prepare(self, model, batch, config, budget):
        x, y, _ = (t[:32] for t in training_text(batch))
        L, rng = len(model.blocks), generator("cpu", config.seed, "router", "library")
        rank, _ = greedy_ranks(model, x, y, self.cheap)
        library = [rank < k for k in range(L + 1)]
        for k in (L / 4, L / 2, 3 * L / 4):  # the one that helps most beside the nested pattern, token by token
            drawn = torch.stack([torch.randperm(L, generator=rng) < round(k) for _ in range(16)]).to(x.device)
            losses = self.pattern_losses(model, torch.cat((drawn, library[round(k)][None])), x, y)
            library.append(drawn[losses[..., :-1].minimum(losses[..., -1:]).mean((0, 1)).argmin()])
        self.library.copy_(torch.stack(library))
        self.centre.copy_(model.embedding(x).float().mean((0, 1)))

    def step_loss(self, model, config, budget, x, y, domain, step):
        losses, e = self.pattern_losses(model, self.library, x, y), model.embedding(x)
        advantage = (losses.mean(-1, keepdim=True) - losses) / GAIN_UNIT
        loss = F.mse_loss(self.predict(e, {}), advantage)
        control = F.mse_loss(self.predict(e, {}, head=1), losses)
        return loss + control, {"loss": loss, "control": control}


# ---------------------------------------------------------------------------------------------------------------------
# Arch-Router

class Arch(Planned):
    """Arch-Router: aligning LLM routing with human preferences (arXiv 2506.16655). Users write policies in words; the
    router says which one a prompt falls under; a table says what that policy gets. The set of policies is an input,
    so a new one needs no training.

        score_j = a cos(W (z_t - m), W (c_j - m)),    score_0 = b: "other";    policy j = argmax
        BIG in layer l where  rank[j, l] < k[j] + shift[BIG] + u_t

    c_j: mean embedding of a few example lines; m: mean of the domains' means; rank and k are j's row of the table:
    which layers are BIG first, how many. u_t in [0, 1) is spread evenly over positions t, so that 4.3 BIG are 5 for
    three tokens in ten. Row 0 is the default, for "other" and before the first look at the prompt; then come the run's
    domains. Trained (W, a, b) on random subsets of candidates, often without the true one, where "other" is right. Two
    domains alone teach it to tell these two apart and nothing else, so that it learns on single documents as well, each
    described by its second half; and W moves slowly from where it starts, the whitening of z within the domains.
    Deviation: embeddings and a matcher in the place of a 1.5B language model that reads the policies' text.
    """
    SLOW = 0.03  # of the learning rate is W's

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, config, "matching")
        L, d = shape.n_layer, shape.n_embd
        self.change = nn.Parameter(torch.zeros(d, d))  # W = white + SLOW * change
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.other = nn.Parameter(torch.zeros(2))  # b; and one for the single documents of training
        self.register_buffer("white", torch.eye(d))
        self.register_buffer("policy", torch.zeros(MOST, d))
        self.register_buffer("used", torch.arange(MOST) == 0)
        self.register_buffer("rank", torch.arange(L).float().repeat(MOST, 1))
        self.register_buffer("k", torch.full((MOST,), share[BIG] * L))

    def add_policy(self, model, tokens, rank, k):
        """Append a policy: tokens of its example lines, its row of the table. Nothing is trained. -> its number"""
        row = int(self.used.sum())
        if row == MOST:
            raise UserError(f"{MOST - 1} policies: no room for another one; raise MOST in zoo.py, then train again")
        self.policy[row] = model.embedding(tokens).float().flatten(0, -2).mean(0)
        self.rank[row], self.k[row], self.used[row] = rank, k, True
        return row

    def match(self, z, policy, other=0):
        """z [..., d], descriptors [J, d] -> scores [..., 1 + J], "other" first"""
        W = self.white + self.SLOW * self.change
        q, c = (F.normalize((v - self.centre) @ W, dim=-1, eps=1e-6) for v in (z, policy))
        scores = self.log_scale.exp() * (q @ c.T)
        return torch.cat((self.other[other].expand_as(scores[..., :1]), scores), -1)

    def which(self, e, seq):
        """-> policy [B, T]"""
        z, known = summary(e, seq, self.every)
        return torch.where(known, self.match(z, self.policy[1:]).masked_fill(~self.used, -math.inf).argmax(-1), 0)

    def plan(self, e, seq):
        j, T = self.which(e, seq), e.shape[1]
        t = torch.arange(seq["embedded"].shape[1], device=e.device)[-T:]
        u = ((t + 0.5) * (math.sqrt(5) - 1) / 2) % 1  # multiples of the golden ratio: evenly spread, never 0
        return (self.k[j] + self.shift[BIG] + u).unsqueeze(-1) - self.rank[j] - 1

    def flops(self):
        d = len(self.white)
        return 2 * (d * d + (MOST - 1) * d) / self.every  # the policies' own side is computed once

    def prepare(self, model, batch, config, budget):
        x, y, domain = training_text(batch)
        e, domains = model.embedding(x).float(), range(int(domain.max()) + 1)
        means = torch.stack([e[domain == d].mean((0, 1)) for d in domains])  # [D, d]
        self.centre.copy_(means.mean(0))
        z = summary(e, {}, self.every)[0][:, self.every - 1::self.every]
        off = (z - means[domain].unsqueeze(1)).flatten(0, 1)
        size, axes = torch.linalg.eigh(off.T @ off / len(off))
        self.white.copy_(axes * (size / size.mean() + 0.1).rsqrt() @ axes.T)  # 0.1: no axis is blown up too far
        rank, _ = greedy_ranks(model, x[:32], y[:32], self.cheap)
        self.rank[0], self.k[0] = rank, budget[0]
        found = {d: greedy_ranks(model, x[domain == d][:32], y[domain == d][:32], self.cheap)
                 for d in domains}
        share, k = {d: (domain == d).float().mean().item() for d in found}, dict.fromkeys(found, 0)
        # Where is the next BIG worth most? Until the mean over domains is the budget; the last one may be a part.
        while (left := budget[0] - sum(share[d] * k[d] for d in k)) > 1e-6:
            gain = {d: loss[k[d]] - loss[k[d] + 1] for d, (_, loss) in found.items() if k[d] < len(rank)}
            best = max(gain, key=gain.get)
            k[best] += min(1, left / share[best])
            if left < share[best]:
                break
        for d, (rank, _) in found.items():
            self.add_policy(model, x[domain == d][:32], rank, k[d])

    def step_loss(self, model, config, budget, x, y, domain, step):
        rng = generator(x.device, config.seed, "router", "candidates", step)
        e, T = model.embedding(x).float(), x.shape[1]
        z = summary(e, {}, self.every)[0][:, self.every - 1::self.every]  # [B, n, d]
        documents, own = e[:, T // 2:].mean(1), torch.arange(len(x), device=x.device)
        half = z[:, :max(1, z.shape[1] // 2)]  # prefixes that do not reach the second half
        loss = (self.match_loss(half, documents, own, rng, other=1)
                + self.match_loss(z, self.policy[1:int(self.used.sum())], domain, rng))
        return loss, {"loss": loss}

    def match_loss(self, z, policy, true, rng, other=0):
        """z [B, n, d], candidates [J, d], which is true [B] -> cross-entropy, each sequence with a subset of its own"""
        kept = torch.rand(len(z), len(policy), generator=rng, device=z.device) < 0.5
        there = kept.gather(1, true.unsqueeze(1))  # [B, 1]
        kept = F.pad(kept, (1, 0), value=True).unsqueeze(1)  # "other" always is
        scores = self.match(z, policy, other).masked_fill(~kept, -math.inf)  # [B, n, 1 + J]
        label = torch.where(there, true.unsqueeze(1) + 1, 0).expand(z.shape[:2])
        return F.cross_entropy(scores.flatten(0, 1), label.flatten())


# ---------------------------------------------------------------------------------------------------------------------
# GLIDER

class Glider(Router):
    """GLIDER: global and local instruction-driven expert router (arXiv 2410.07172). A local gate per layer reads the
    token, a global one the task; the weight s between them is set by hand.

        logit_l = u_l(h_t) + s sum_d cos(z_t - m, c_d - m) profile[d, l]

    u_l: the linear router, trained alone, as the paper's local gates are; the global part joins when it is done. c_d:
    mean embedding of domain d, m: mean of the c_d, without which all cosines are nearly 1; profile_d: +1 where d's
    greedy pattern at the budget is BIG, else -1. Before the first look at the prompt s is 0. Of two domains the
    centered c_d are opposite, so that where their profiles agree their terms cancel. Deviation: see `summary`.
    """

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, 0, config.choices, share, rng, learns="linear")
        self.every = max(1, shape.block_size // 8)
        self.register_buffer("s", torch.tensor(4.0))  # the paper's are 3 to 1000; effects.py sweeps it
        self.register_buffer("prototype", torch.zeros(MOST, shape.n_embd))
        self.register_buffer("profile", torch.zeros(MOST, shape.n_layer))  # unused rows: 0
        self.register_buffer("centre", torch.zeros(shape.n_embd))

    def forward(self, layer, h, state=None, seq=None):
        logits, _ = super().forward(layer, h)
        if self.training:
            return logits, state
        if layer == 0:
            state = self.cosines(h, seq) @ self.profile  # [B, T, L]
        return logits + F.pad(self.s * state[..., layer:layer + 1], (2, 0)), state  # BIG's

    def cosines(self, e, seq):
        """-> [B, T, MOST], 0 before the first look"""
        z, known = summary(e, seq, self.every)
        q, c = (F.normalize(v - self.centre, dim=-1, eps=1e-6) for v in (z, self.prototype))
        return q @ c.T * known.unsqueeze(-1)

    def flops(self):
        d, L = self.prototype.shape[1], self.profile.shape[1]
        return super().flops() + 2 * MOST * (d + L) / self.every

    def prepare(self, model, batch, config, budget):
        x, y, domain = training_text(batch)
        n, cheap = int(domain.max()) + 1, SMALL if "s" in self.choices else SKIP
        for d in range(n):
            rank, _ = greedy_ranks(model, x[domain == d][:32], y[domain == d][:32], cheap)
            self.prototype[d] = model.embedding(x[domain == d]).float().mean((0, 1))
            self.profile[d] = (rank < round(budget[0])).float() * 2 - 1
        self.centre.copy_(self.prototype[:n].mean(0))


KINDS |= {"tryage": Tryage, "arch": Arch, "glider": Glider}
