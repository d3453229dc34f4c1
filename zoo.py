"""Seven more routing systems, each rebuilt small behind the router interface (gates.Router).

    rmoe, rmoe_np, rmoe_detach   a state over depth                   RMoE, arXiv 2408.06793
    token_id, capacity           the token id alone; limited places   OpenMoE, arXiv 2402.01739 (diagnosis.py: its part)
    tryage                       predicts what each pattern is worth  Tryage, arXiv 2308.11601
    arch                         policies as an input                 Arch-Router, arXiv 2506.16655
    glider                       local gates and a global one         GLIDER, arXiv 2410.07172
    rewire                       learns on at test time               Rewiring Experts on the Fly, arXiv 2510.14853
    lora_mixer                   routed LoRAs on attention            LoRA-Mixer, arXiv 2507.00029

`python router.py --name=rmoe --budget=4` trains one as any other router; effects.py measures what its paper claims.
Each stands here with its equation above the code, what deviates from the paper, and its controls.
"""
import contextlib
import functools
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

import gates
from common import UserError, generator
from gates import GAIN_UNIT, Router
from model import BIG, SKIP, SMALL, DuoGPT, ReadOutLoss

KINDS = {}  # {name: class}, built as KINDS[name](shape, config, share, rng)


# ---------------------------------------------------------------------------------------------------------------------
# RMoE: "Layerwise Recurrent Router for Mixture-of-Experts" (arXiv 2408.06793, section 3)

def matched_width(shape, hidden):
    """-> p, with which RMoE has as many parameters as the MLP router of that width, as nearly as an integer can:
    L p (d + 4) + 6 p^2 + 3 p  against  L hidden (d + 4), both + 3 L"""
    def excess(p):
        return abs(shape.n_layer * (p - hidden) * (shape.n_embd + 4) + 6 * p * p + 3 * p)
    return min(range(1, hidden + 1), key=excess)


class RMoE(Router):
    """A router that remembers: one GRU, shared by all layers, runs over depth and not over time. What layer l reads it
    adds to a state, and each layer decides by that; so a late layer knows what the early ones saw, and chose.

        x_l = W_l rms(h_l) + b_l                        down to p numbers, a projection per layer
        r = sigmoid(U_r x_l + V_r s)                    how much of the old state the proposal may read
        z = sigmoid(U_z x_l + V_z s)                    how much of the old state stays
        s' = (1 - z) tanh(U_n x_l + r V_n s) + z s      s = 0 where a token enters the first layer
        logits = G_l s' + g_l

    It is the MLP router with the GRU in the place of the GELU; p is smaller, so that both have equally many parameters.
    The state belongs to one token: nothing passes between positions, and decoding needs no cache for it.
    """

    def __init__(self, shape, config, share, rng):
        p = matched_width(shape, config.hidden)
        super().__init__(shape, p, config.choices, share, rng)  # W, b, G, g; learns by Gumbel, as the MLP does
        self.w_x, self.w_s = (nn.Parameter(torch.randn(p, 3 * p, generator=rng) / math.sqrt(p)) for _ in "UV")
        self.b_gru = nn.Parameter(torch.zeros(3 * p))

    def handed_on(self, state):
        """What of the lower layer's state reaches this one."""
        return state

    def forward(self, layer, h, state=None, seq=None):
        h = F.rms_norm(h.to(self.w_out.dtype), h.shape[-1:], eps=1e-5)
        x = h @ self.w_in[layer] + self.b_in[layer]  # [B, T, p]
        x_r, x_z, x_n = (x @ self.w_x + self.b_gru).chunk(3, -1)
        state = self.handed_on(state)
        if state is None:
            s, s_r, s_z, s_n = 0.0, 0.0, 0.0, 0.0
        else:
            s = state
            s_r, s_z, s_n = (s @ self.w_s).chunk(3, -1)
        r, z = (x_r + s_r).sigmoid(), (x_z + s_z).sigmoid()
        state = (1 - z) * (x_n + r * s_n).tanh() + z * s
        logits = state @ self.w_out[layer] + self.b_out[layer] + self.shift
        return logits.masked_fill(self.missing, -math.inf), state

    def flops(self):
        L, p, _ = self.w_out.shape
        reads_state = L - 1 if self.handed_on(self.b_out) is not None else 0  # of the first layer it is 0
        return super().flops() + 2 * (L + reads_state) * 3 * p * p

    def groups(self, weight_decay):
        matrices = [self.w_in, self.w_out, self.w_x, self.w_s]
        return [{"params": matrices, "weight_decay": weight_decay},
                {"params": [self.b_in, self.b_out, self.b_gru], "weight_decay": 0.0}]


class RMoENotPassed(RMoE):
    """Control: the same network, but each layer starts from s = 0. (V is there, and has nothing to read.)"""

    def handed_on(self, state):
        return None


class RMoEDetached(RMoE):
    """Control: the state is passed, its gradient is not: what a layer writes is not learned for later layers' sake."""

    def handed_on(self, state):
        return None if state is None else state.detach()


# ---------------------------------------------------------------------------------------------------------------------
# OpenMoE: "An Early Effort on Open Mixture-of-Experts Language Models" (arXiv 2402.01739, section 4). The paper's part
# here is a diagnosis (diagnosis.py); these two routers are its findings, taken at their word.

class TokenId(Router):
    """"Context-independent specialization", as a router: it knows which token it is, and nothing else.

        logits = c E_l[token id] + g_l        E [L, V, 3], a table;  c = sqrt(d)

    No multiplications, so no FLOPs, and all choices are known before the model runs. c: Adam moves each entry by about
    the learning rate a step; in a linear router d entries move one logit, here only one does. It learns by the soft
    mix, as the linear router does, so that nothing but the input differs.
    """

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, 0, config.choices, share, rng, learns="linear")
        self.scale = math.sqrt(shape.n_embd)
        self.w_out = nn.Parameter(torch.zeros(shape.n_layer, shape.vocab_size, 3))  # a linear layer's, of one-hot ids

    def forward(self, layer, h, state=None, seq=None):
        ids = seq["idx"][:, -h.shape[1]:]  # decoding: of the new tokens
        logits = self.scale * F.embedding(ids, self.w_out[layer]) + self.b_out[layer] + self.shift
        return logits.masked_fill(self.missing, -math.inf), state

    def flops(self):
        return 0


CAPACITY_FACTOR = 1.25  # places per BIG that the budget asks for (common in MoE training; below 1 it could not be met)


class Capacity(Router):
    """A linear router under a hard limit: in each layer BIG has C places per sequence, first come, first served.

        C = ceil(factor * k / L * block_size)
        a token that wants BIG gets it while fewer than C before it wanted it; else its next best choice (SMALL)

    So no sequence ever costs more than factor * k: what a batch on several devices needs, whose buffers are of fixed
    size. The price falls on the last tokens. Places are filled in order, so choices are causal; decoding carries how
    many are taken. A text longer than block_size gets C new places for each further block_size tokens.
    """

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, 0, config.choices, share, rng, learns="linear")
        self.span = shape.block_size
        self.places = math.ceil(CAPACITY_FACTOR * share[BIG] * self.span)

    def wants(self, layer, h, state=None, seq=None):
        """-> the logits as if there were room for all"""
        return super().forward(layer, h, state, seq)[0]

    def forward(self, layer, h, state=None, seq=None):
        logits = self.wants(layer, h, state, seq)
        want = (logits.argmax(-1) == BIG).long()  # [B, T]
        T = h.shape[1]
        taken = (seq["idx"].shape[1] - T) % self.span  # tokens of the current span that came before these
        before = seq["wanted"][layer] if taken else 0  # [B, 1]: how many of them wanted BIG
        here, beyond = want[:, :self.span - taken], want[:, self.span - taken:]  # beyond: the next span's, mostly none
        rank = torch.cat((before + here.cumsum(1), beyond.cumsum(1)), 1)  # a token's own number in the queue, from 1
        seq.setdefault("wanted", {})[layer] = rank[:, -1:]
        full = torch.zeros_like(logits, dtype=torch.bool)
        full[..., BIG] = rank > self.places
        return logits.masked_fill(full, -math.inf), state


KINDS |= {"rmoe": RMoE, "rmoe_np": RMoENotPassed, "rmoe_detach": RMoEDetached, "token_id": TokenId,
          "capacity": Capacity}


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
        self.cheap, self.may_skip = SMALL if "s" in config.choices else SKIP, "x" in config.choices
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
    serves_all_budgets = True

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
        self.register_buffer("s", torch.tensor(4.0))  # the paper's are 3 to 1000; effects_prompt.py sweeps it
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


# ---------------------------------------------------------------------------------------------------------------------
# Rewiring Experts on the Fly (arXiv 2510.14853): a vector added to the router's logits goes on learning at test time

class Rewire(Router):
    """The linear router, and a vector per layer and document that learns from the document itself (section 3):

        logits_l = w_l h + b_l + delta_l;   delta <- delta - rate d/d delta CE(soft mix of the tokens read so far)

    delta is 0 for the first m tokens. After every m tokens it takes 5 steps on their next-token loss, all else frozen,
    and the next m tokens are routed with it: no token is scored by a delta that has seen it. Deviations: (1) BIG's
    delta is shifted so that the number of BIG stays (or delta would buy compute); (2) all layers have one; (3) rate.
    """
    rate, steps = 2.0, 5  # the paper's rate is 0.05: here gains are of hundredths of a nat, and so are gradients

    def __init__(self, shape, config, share, rng):
        super().__init__(shape, 0, config.choices, share, rng, learns="linear")
        self.shape, self.tau, self.host = shape, config.tau_end, None
        self.every = max(2, min(32, shape.block_size // 4))  # m

    def forward(self, layer, h, state=None, seq=None):
        logits, state = super().forward(layer, h, state, seq)
        if self.training:  # learns as the linear router does
            return logits, state
        n, T = seq["idx"].shape[1], h.shape[1]  # tokens so far, of which new
        if layer == 0:
            deltas = seq.get("delta", [torch.zeros(len(h), *self.b_out.shape, device=h.device)])  # one per m tokens
            while len(deltas) <= (n - 1) // self.every:
                deltas = [*deltas, self.adapt(seq["idx"][:, :len(deltas) * self.every], deltas[-1])]
            seq["delta"] = deltas
        chunk = torch.arange(n - T, n, device=h.device) // self.every  # [T]
        delta = torch.stack(seq["delta"], 1)[:, :, layer]  # [B, chunks, 3]
        return logits + delta[:, chunk], state

    def adapt(self, idx, delta, since=0):
        """idx [B, t]: the tokens read so far; delta [B, L, 3] -> delta after the steps. since: learn from the losses of
        later tokens only."""
        # Also within inference_mode (sample.py): what is made in there cannot have gradients, but its copy can.
        with torch.inference_mode(False), torch.enable_grad():
            idx, delta = idx[:, -self.shape.block_size:].clone(), delta.clone()
            for _ in range(self.steps):
                loss, _ = self.soft_mix(idx, delta.requires_grad_(), since)
                delta = delta.detach() - self.rate * torch.autograd.grad(loss, delta)[0]
            return self.recentred(idx, delta)

    def soft_mix(self, idx, delta, since=0):
        """-> the documents' next-token losses, added up, so that each has its own delta; and the logits without delta,
        [B, t, L, 3]"""
        if self.host is None:
            raise ValueError("this router reads the model: route within `router.attached(model)`")
        model, plain = self.host[0], []

        def gate(layer, logits):
            plain.append(logits)
            return gates.soft_gate(logits + delta[:, layer].unsqueeze(1), self.tau)
        h, _ = gates.mixed_forward(model, super().forward, idx, gate)
        loss = ReadOutLoss.apply(h[:, since:-1].flatten(0, 1), model.embedding.weight.detach().to(h.dtype),
                                 idx[:, since + 1:].flatten())
        return loss * len(idx), torch.stack(plain, 2)

    @torch.no_grad()
    def recentred(self, idx, delta):
        """delta with BIG's entries shifted by one number per document, so that on idx as many choices are BIG as
        without delta. By bisection."""
        _, plain = self.soft_mix(idx, delta)

        def big(logits):
            return (logits.argmax(-1) == BIG).float().mean((1, 2))  # [B]
        wanted, high = big(plain), 2 * delta.abs().amax((1, 2))
        low, to_big = -high, F.one_hot(torch.tensor(BIG, device=delta.device), 3)
        for _ in range(20):
            middle = (low + high) / 2
            more = big(plain + (delta + middle.view(-1, 1, 1) * to_big).unsqueeze(1)) > wanted
            low, high = torch.where(more, low, middle), torch.where(more, middle, high)
        return delta + low.view(-1, 1, 1) * to_big

    def flops(self):
        """Each step is a forward of the prefix and a backward, which needs no weights' gradients and so costs as much;
        one more forward re-centres."""
        shape, own = self.shape, super().flops()
        with torch.device("meta"):
            model = DuoGPT(shape)
        small = shape.n_layer * 6 * shape.n_embd * shape.small_width  # the mix runs both FFNs
        read = sum(t * (model.flops(BIG, t) + small + own) for t in range(self.every, shape.block_size, self.every))
        return own + (2 * self.steps + 1) * read // shape.block_size

    @contextlib.contextmanager
    def attached(self, model):
        before, self.host = self.host, [model]  # in a list: else it would become a submodule, and part of the file
        try:
            yield
        finally:
            self.host = before


class RewireProse(Rewire):
    """For the effect: learns from the second domain only (prose), so that the first is a shift."""
    home, n_domains = 1, 2

    def step_loss(self, model, config, budget, x, y, domain, step):
        home = domain == self.home
        order = home.long().argsort(descending=True, stable=True)
        rows = order[torch.arange(len(x), device=x.device) % home.sum().clamp(min=1)]  # B again: one graph
        loss, parts = super().step_loss(model, config, budget, x[rows], y[rows], domain[rows], step)
        return loss * home.any(), parts  # a batch that has none teaches nothing


KINDS |= {"rewire": Rewire, "rewire_prose": RewireProse}


# ---------------------------------------------------------------------------------------------------------------------
# LoRA-Mixer (arXiv 2507.00029): routed low-rank experts on the attention's projections

class LoRAMixer(Router):
    """Beside the linear router, four LoRAs on `qkv` and `out` of each layer, chosen by a router on their input x:

        y = W x + sum_e alpha_e(x) B_e A_e x,   p = softmax(G x), alpha = p, at inference its top 2 (sum 1)
        loss = CE + budget + a E sum_e mean(p_e) share_e - lambda mean entropy(p)      (share_e: of the tokens' top 1)

    First half of the steps: alpha is given, a domain owns its experts (they share it evenly). Second half: p is learned
    and fuses softly; the experts learn on (the paper's joint regime; freezing them then did not help here). The last
    two terms are the Specialization Balance Loss: SBL+, as typeset, rewards entropy; the paper's text wants few experts
    per token, so SBL- (lambda < 0) punishes it.
    """
    def __init__(self, shape, config, share, rng, experts=4, rank=4, scale=0.1, balance=0.01, entropy=0.01, few=False):
        if config.choices != "sb":
            raise UserError(f"--choices={config.choices}: this system needs sb; where tokens skip, the sparse path "
                            "reads parts of qkv's weight, and its LoRAs would be left out")
        super().__init__(shape, 0, "sb", share, rng, learns="linear")
        L, d, E, T = shape.n_layer, shape.n_embd, experts, shape.block_size
        self.experts, self.balance, self.entropy, self.few = E, balance, entropy, few
        self.scale = scale  # of the LoRAs' output: they learn at the routers' rate
        self.a = nn.Parameter(torch.randn(L, 2, d, E * rank, generator=rng) / d ** 0.5)
        self.b_qkv = nn.Parameter(torch.zeros(L, E * rank, 3 * d))  # zeros: at first the model is the base
        self.b_proj = nn.Parameter(torch.zeros(L, E * rank, d))
        if E > 1:
            self.gate = nn.Parameter(torch.zeros(L, 2, d, E))
            self.register_buffer("domains", torch.tensor(1))
        self.given, self.seen = None, None  # alpha [B, 1, E]; a list, where p [.., E] of each projection is wanted
        self.hooked = False
        if few:
            n = max(1, config.steps // 10)
            self.register_buffer("text", torch.zeros(n, 2, config.batch_size, T, dtype=torch.int32))
            self.register_buffer("text_domain", torch.zeros(n, config.batch_size, dtype=torch.int64))

    def prepare(self, model, batch, config, budget):
        if self.experts > 1:
            self.domains.fill_(1 + max(batch(-1 - i)[2].max() for i in range(20)))
        for i in range(len(self.text) if self.few else 0):
            x, y, self.text_domain[i] = batch(-1 - i)
            self.text[i] = torch.stack((x, y))

    def add(self, layer, which, module, args, y):
        """A forward hook of qkv (which=0) and out (1): row by row, so it also holds for a sorted part of the tokens."""
        x, E = args[0], self.experts
        low = (x @ self.a[layer, which].to(x.dtype)).unflatten(-1, (E, -1))  # [.., E, rank]
        if E > 1:
            low = low * self.alpha(x, self.gate[layer, which]).unsqueeze(-1).to(x.dtype)
        return y + self.scale * low.flatten(-2) @ (self.b_proj if which else self.b_qkv)[layer].to(x.dtype)

    def alpha(self, x, gate):
        """x [.., d] -> weights of the experts [.., E]"""
        if self.given is not None:
            return self.given
        p = (F.rms_norm(x.float(), x.shape[-1:], eps=1e-5) @ gate).softmax(-1)
        if self.seen is not None:
            self.seen.append(p)
        return p if self.training else top2(p)

    @contextlib.contextmanager
    def attached(self, model):
        hooks = []
        if not self.hooked:  # once, also where contexts are nested
            hooks = [getattr(block, name).register_forward_hook(functools.partial(self.add, layer, which))
                     for layer, block in enumerate(model.blocks) for which, name in enumerate(("qkv", "out"))]
        before, self.hooked = self.hooked, True
        try:
            yield
        finally:
            self.hooked = before
            for hook in hooks:
                hook.remove()

    def step_loss(self, model, config, budget, x, y, domain, step):
        if self.few:  # a tenth of the sequences, again and again
            (x, y), domain = self.text[step % len(self.text)].long(), self.text_domain[step % len(self.text)]
        if self.experts > 1 and step < config.steps // 2:
            expert, owners = torch.arange(self.experts, device=x.device), self.domains.clamp(max=self.experts)
            owned = ((expert - domain.unsqueeze(1)) % owners == 0).float()  # [B, E]
            self.given = (owned / owned.sum(1, keepdim=True)).unsqueeze(1)
        tau, alpha = gates.schedule(config, step / max(1, config.steps - 1))
        self.seen = []
        loss, cross_entropy, big = gates.mixed_loss(model, self, config.per_token, x, y, None, tau, alpha,
                                                    {BIG: budget[0] / len(model.blocks)})
        seen, self.given, self.seen = self.seen, None, None
        return loss + sum(map(self.balance_loss, seen)) / max(1, len(seen)), {"loss": cross_entropy, "BIG": big}

    def balance_loss(self, p):
        p = p.flatten(0, -2)  # [N, E]
        share = F.one_hot(p.argmax(-1), self.experts).float().mean(0)
        entropy = -(p * p.clamp_min(1e-9).log()).sum(-1).mean()
        return self.balance * self.experts * (p.mean(0) * share).sum() - self.entropy * entropy

    def groups(self, weight_decay):
        return [{"params": [p for key, p in self.named_parameters() if key != "b_out"], "weight_decay": weight_decay},
                {"params": [self.b_out], "weight_decay": 0.0}]

    def flops(self):
        """All experts are computed, also where only two count: that is what runs."""
        L, _, d, low = self.a.shape
        gate = 2 * L * 2 * d * self.experts if self.experts > 1 else 0
        return super().flops() + gate + 2 * L * low * (d + 3 * d + d + d)


def top2(p):
    """p [.., E] -> its two largest, with sum 1; the others 0"""
    top, where = p.topk(2)
    return torch.zeros_like(p).scatter(-1, where, top / top.sum(-1, keepdim=True))


LORAS = {  # the losses compared, and the control: one LoRA of the same total rank, as if all alpha were 1/4 (with
    # alpha = 1 it moves four times as far, and on few sequences is worse for that alone)
    "lora_mixer": {}, "lora_sharp": {"entropy": -0.01}, "lora_balance": {"entropy": 0.0},
    "lora_budget": {"balance": 0.0, "entropy": 0.0}, "lora_single": {"experts": 1, "rank": 16, "scale": 0.025},
}
KINDS |= {f"{name}{'_few' * few}": functools.partial(LoRAMixer, **values, few=few)
          for name, values in LORAS.items() for few in (False, True)}
