"""Exercise 5: perplexity, bits per byte, and intervals that pair.

Task. Fill in perplexity and bits_per_byte, then two 95% bootstrap intervals of a difference of losses: one resamples
the sequences of both policies together (paired), one each policy's by itself. Then look at their widths: the paired one
is much narrower. Which term of var(a - b) = var(a) + var(b) - 2 cov(a, b) has gone where?

Why. Sequences differ in difficulty by far more than policies differ in loss. An interval that does not pair drowns
small effects; one that resamples tokens, as if those of one sequence were independent, finds effects
that are not there.

Read first: bootstrap_means and interval in claims.py; evaluate in train.py for bits per byte.

Hint: the bootstrap draws S sequences out of S with replacement (rng.integers) and takes the mean loss of the draw; do
so 2,000 times, then np.percentile(means, [2.5, 97.5]). Pairing is one line: which sequences are drawn is decided once
for both policies. All tokens of a sequence come along with it.
"""
from types import SimpleNamespace

import numpy as np
import torch

import claims
import train
from model import BIG, DuoConfig, DuoGPT

RESAMPLES = 2000


def perplexity(losses):
    """losses [S, T], nats per token -> float. By hand: losses ln 2 and ln 8 have perplexity 4 (not 5)."""
    raise NotImplementedError("exercise 5: fill in perplexity")


def bits_per_byte(losses, n_bytes):
    """losses [S, T], nats per token; n_bytes [S, T]: how many bytes of text each token stands for (0 for the end of a
    document) -> float, bits over the whole text per byte of the whole text. By hand: losses ln 2 and ln 8 on tokens of
    1 and 3 bytes are 1 + 3 bits on 4 bytes: 1.
    """
    raise NotImplementedError("exercise 5: fill in bits_per_byte")


def paired_interval(a, b, rng):
    """a, b [S, T]: losses of two policies on the same tokens; rng: a numpy Generator -> (low, high), the 95% bootstrap
    interval over sequences of mean(a) - mean(b), from RESAMPLES draws.

    By hand: if b is a + 0.1 everywhere, each draw differs by -0.1, however hard its sequences are: (-0.1, -0.1).
    """
    raise NotImplementedError("exercise 5: fill in paired_interval")


def unpaired_interval(a, b, rng):
    """The same, but a's and b's sequences are drawn apart, as if the policies had read different texts."""
    raise NotImplementedError("exercise 5: fill in unpaired_interval")


# ---------------------------------------------------------------------------------------------------------------------
# the check

def test_units():
    """The numbers that train.py reports, from the same losses."""
    mine = perplexity(np.log([[2.0, 8.0]]))
    assert abs(mine - 4) < 1e-6, f"the perplexity of ln 2 and ln 8 is 4, not {mine:.4g}: take exp of the mean"
    g = torch.Generator().manual_seed(1)
    model = DuoGPT(DuoConfig(1, 1, 8, 10, 20)).init_weights(g).eval()
    tokens, n_bytes = torch.randint(20, (41,), generator=g).numpy(), np.arange(20) % 7
    corpus = SimpleNamespace(domains=["code"], val={"code": tokens}, token_bytes=n_bytes)
    config = SimpleNamespace(train_route="big", eval_sequences=4, block_size=10)
    reported = train.evaluate(model, corpus, config, "cpu")["code"]["big"]
    x, y = train.validation_windows(corpus, config, "code")
    losses = model(x, BIG, y, reduction="none")[1].detach().numpy()
    mine, right = perplexity(losses), np.exp(reported["loss"])
    assert abs(mine - right) < 1e-3, f"perplexity {mine:.4f}; the loss that train.py reports gives {right:.4f}"
    mine, right = bits_per_byte(losses, n_bytes[y.numpy()]), reported["bits_per_byte"]
    assert np.isfinite(mine), "some tokens stand for no byte: divide the sums, not each token's bits by its bytes"
    assert abs(mine / right - np.log(2)) > 1e-3, f"{mine:.4f} are nats per byte; a bit is ln 2 nats"
    assert abs(mine - right) < 1e-3, f"bits per byte {mine:.4f}, train.py reports {right:.4f}: all bits by all bytes"


def planted(seed, S=40, T=30):
    """Losses of two policies: a sequence is hard or easy for both; b gains 0.05 on average, on some more."""
    rng = np.random.default_rng(seed)
    hard, gain = rng.normal(4, 0.8, (S, 1)), rng.normal(0.05, 0.1, (S, 1))
    return hard + rng.normal(0, 0.3, (S, T)), hard - gain + rng.normal(0, 0.3, (S, T))


def test_paired_interval():
    a, _ = planted(0)
    low, high = paired_interval(a, a + 0.1, np.random.default_rng(0))
    assert high - low < 1e-6, f"a - (a + 0.1) varies by {high - low:.3f} between draws; draw once for both policies"
    assert abs(low + 0.1) < 1e-6, f"a - (a + 0.1) is {low:.3f}; the difference is mean(a) - mean(b), nats per token"
    for seed in range(3):
        a, b = planted(seed)
        low, high = paired_interval(a, b, np.random.default_rng(0))
        _, right_low, right_high = claims.interval((a - b).mean(1))
        width = right_high - right_low
        widths = f"your interval is {high - low:.3f} wide, claims.interval's {width:.3f}"
        assert high - low > 0.9 * width, widths + ": draw with replacement, whole sequences, not tokens, and keep 95%"
        assert high - low < 1.1 * width, widths + ": take the mean over all S sequences of each draw"
        assert max(abs(low - right_low), abs(high - right_high)) < 0.1 * width, (
            f"{low:.4f} to {high:.4f}, but claims.interval gives {right_low:.4f} to {right_high:.4f}")


def test_why_pairing_is_narrower():
    """Drawn apart, the policies' sequences no longer vary together: the term - 2 cov(a, b) is lost."""
    for seed in range(3):
        a, b = planted(seed)
        paired, unpaired = (f(a, b, np.random.default_rng(0)) for f in (paired_interval, unpaired_interval))
        (var_a, cov), (_, var_b) = np.cov(a.mean(1), b.mean(1))
        ratio = (paired[1] - paired[0]) / (unpaired[1] - unpaired[0])
        expected = ((var_a + var_b - 2 * cov) / (var_a + var_b)) ** 0.5
        assert abs(ratio / expected - 1) < 0.15, (
            f"paired / unpaired is {ratio:.3f}, the covariance says {expected:.3f}. Are a's and b's sequences drawn "
            "apart, and still whole?")
        assert unpaired[0] < (a - b).mean() < unpaired[1], f"the unpaired interval {unpaired} does not hold the mean"
