"""Seven more routing systems, each rebuilt small behind the router interface (gates.Router). ../shared/SEEDS.md"""
import contextlib
import functools

import torch
import torch.nn as nn
from torch.nn import functional as F

import gates
from common import UserError
from gates import Router
from model import BIG, DuoGPT, ReadOutLoss

KINDS = {}


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
    home = 1

    def prepare(self, model, batch, config, budget):
        if not any((batch(-1 - i)[2] == self.home).any() for i in range(20)):
            raise UserError("--name=rewire_prose: learns from a corpus's second domain, and this one has none; use "
                            "--name=rewire")

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
