"""Seven more routing systems, each rebuilt small behind the router interface (gates.Router). ../shared/SEEDS.md"""
import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from gates import Router
from model import BIG

KINDS = {}


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
