"""Exercise 9: an honest reference for the expected-loss oracle.

Task. The oracle chooses by -log p(label), and what it gains is in part hindsight. To measure what could be foreseen,
oracle.py lets another model, the reference, choose: the route whose prediction p_route has the least cross-entropy
CE(p_ref, p_route). That is foresight only if the reference cannot know the label better than by predicting it. Fill in
leaks, a test that tells leaky references from honest ones, and foresight, which measures what a reference gains.

Why. A reference that was trained on the validation text, or that sees the label by some detour, moves hindsight over
to foresight, and the largest number of the whole study is wrong. Nothing crashes; the result only looks better.

Read first: the docstring of oracle.py from --criterion on, and Run.directions there.

Hint: there are two ways to leak, and each needs a test of its own. A reference may read what it is to predict: what
should not change when the text after position t does? Or it may have read the text before: on which text should an
honest one be equally good? A low loss alone proves nothing: to know the language well is no leak.
"""
import functools
import math
from itertools import combinations

import numpy as np
import torch
from torch.nn import functional as F

from model import BIG, SMALL, DuoConfig, DuoGPT, random_route


def leaks(reference, validation, fresh):
    """Does this reference know more about the validation text than its past says?

    reference: text [S, T + 1] -> p [S, T, V], where p[:, t] predicts text[:, t + 1]. It is given the whole text, but
    should read text[:, :t + 1] only. validation [S, T + 1]: the text of the oracle; fresh [S, T + 1]: as much of the
    same source, that has just been written, so nobody was trained on it. Tokens are 0..V-1. -> bool

    By hand: p always uniform over V tokens: honest (and useless). p[s, t] = 1 for text[s, t + 1]: leaks.
    """
    raise NotImplementedError("exercise 9: fill in leaks")


def foresight(p, log_p, targets, fixed):
    """What choosing by the reference gains over one fixed route, on the true labels, in nats per token.

    p [S, T, V]: the reference's; log_p [R, S, T, V]: log-probabilities of R routes; targets [S, T]; fixed: the number
    of a route -> a number: the mean loss of that route - the mean loss of the routes with the least CE(p, p_route).

    By hand: one token, two routes that give the true label 0.5 and 0.25, fixed = 1. If the reference takes route 0,
    the gain is log 4 - log 2 = 0.693; if it takes route 1, 0.
    """
    raise NotImplementedError("exercise 9: fill in foresight")


# ---------------------------------------------------------------------------------------------------------------------
# the check

V, T, S = 24, 16, 64
VALIDATION, FRESH = 1, 2  # seeds of texts; those from 3 on are other text of the source
CHAIN = np.random.default_rng(1).dirichlet(np.full(V, 0.3), V)  # the source: which token follows which, [V, V]


def write(seed):
    """A text of the source, S sequences [S, T + 1]"""
    rng, text = np.random.default_rng(seed), np.zeros((S, T + 1), np.int64)
    text[:, 0] = rng.integers(V, size=S)
    for t in range(T):
        text[:, t + 1] = (CHAIN[text[:, t]].cumsum(1) < rng.random((S, 1))).sum(1).clip(max=V - 1)
    return torch.from_numpy(text)


def train(model, seeds, steps, route=lambda step: BIG):
    """Train the model on the texts of these seeds, one a step, in turns."""
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    texts = [write(seed) for seed in seeds]
    for step in range(steps):
        text = texts[step % len(texts)]
        model(text[:, :-1], route(step), text[:, 1:], return_logits=False)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


@functools.cache
def small_model(seeds, steps):
    return train(DuoGPT(DuoConfig(n_layer=1, n_head=2, n_embd=24, block_size=T, vocab_size=V)), seeds, steps)


def references():
    """-> {what it is: (reference, whether it leaks)}"""
    chain = torch.from_numpy(CHAIN).float().clamp_min(1e-4)
    chain /= chain.sum(1, keepdim=True)

    def truth(text):
        return chain[text[:, :-1]]

    def cache(text):  # what came in this very text so far is likelier to come again
        seen = F.one_hot(text[:, :-1], V).cumsum(1).float()
        return 0.7 * truth(text) + 0.3 * seen / seen.sum(-1, keepdim=True)

    def with_label(reference, share):
        return lambda text: (1 - share) * reference(text) + share * F.one_hot(text[:, 1:], V)

    def next_but_one(text):  # p(x_t+1 | x_t, x_t+2): never looks at the label itself, but at what it led to
        both = truth(text)
        both[:, :-1] *= chain[:, text[:, 2:]].permute(1, 2, 0)
        return both / both.sum(-1, keepdim=True)

    def last_quarter(text):
        return torch.where(torch.arange(T).view(-1, 1) < 3 * T // 4, truth(text), with_label(truth, 0.1)(text))

    def trained_on(seeds, steps):
        return lambda text: small_model(seeds, steps)(text[:, :-1], BIG)[0].softmax(-1)
    beginner = trained_on((3,), 5)
    return {
        "the source itself": (truth, False),
        "the source, and a cache of the text so far": (cache, False),
        "a model that has hardly learned": (beginner, False),
        "a model trained on other text": (trained_on(tuple(range(3, 13)), 60), False),
        "a model that knows other text by heart": (trained_on((3,), 90), False),
        "the source, with a tenth of the label mixed in": (with_label(truth, 0.1), True),
        "one that has hardly learned, with a twentieth of the label": (with_label(beginner, 0.05), True),
        "one that sees the token after the label": (next_but_one, True),
        "one that sees the label in the last quarter": (last_quarter, True),
        "a model trained on the validation text": (trained_on((VALIDATION,), 90), True),
        "a model trained on it and on other text": (trained_on((VALIDATION, 3, 4), 120), True)}


def test_leaks_are_found():
    validation, fresh, wrong = write(VALIDATION), write(FRESH), []
    for name, (reference, leaky) in references().items():
        if bool(leaks(reference, validation, fresh)) != leaky:
            wrong.append(f"{name} ({'leaks, but you call it honest' if leaky else 'is honest, but you say it leaks'})")
    assert not wrong, f"{len(wrong)} of {len(references())} references misjudged: " + "; ".join(wrong)


def test_foresight_is_counted():
    p = torch.tensor([[[0.4, 0.3, 0.3]]])
    log_p = torch.tensor([[[[0.8, 0.1, 0.1]]], [[[0.4, 0.3, 0.3]]]]).log()
    for label, expected in ((0, -math.log(2)), (1, math.log(3))):
        got = float(foresight(p, log_p, torch.tensor([[label]]), 0))
        assert abs(got - expected) < 1e-5, (
            "routes 0 and 1 predict (0.8, 0.1, 0.1) and (0.4, 0.3, 0.3), the reference (0.4, 0.3, 0.3), so it takes "
            f"route 1, in place of route 0. With label {label} that gains {expected:.3f} nats; you say {got:.3f}")


def test_a_leak_looks_like_foresight():
    base = train(DuoGPT(DuoConfig(n_layer=4, n_head=2, n_embd=16, block_size=T, vocab_size=V)), (3, 4), 60,
                 lambda step: random_route(S, T, 4, 0.0, 0.5, torch.Generator().manual_seed(step)))
    patterns = [[BIG if layer in big else SMALL for layer in range(4)] for big in combinations(range(4), 2)]
    text, other = write(VALIDATION), write(5)
    targets = text[:, 1:]
    fixed = int(np.argmin([base(other[:, :-1], pattern, other[:, 1:])[1].item() for pattern in patterns]))
    log_p = torch.stack([base(text[:, :-1], pattern)[0].log_softmax(-1) for pattern in patterns])  # [6, S, T, V]
    losses = torch.stack([base(text[:, :-1], pattern, targets, reduction="none")[1] for pattern in patterns])
    oracle = (losses[fixed] - losses.min(0).values).mean().item()
    got = float(foresight(F.one_hot(targets, V).float(), log_p, targets, fixed))
    assert abs(got - oracle) < 1e-4, (
        f"a reference that is sure of the label gains what the oracle gains, {oracle:.3f} nats; you say {got:.3f}. "
        "Does each token have a route of its own?")
    gains = {name: float(foresight(reference(text), log_p, targets, fixed))
             for name, (reference, _) in references().items()}
    honest = gains["the source itself"]  # nobody can foresee more, but for luck
    for name, (_, leaky) in references().items():
        assert gains[name] > honest + 0.01 if leaky else gains[name] < honest + 0.01, (
            f"the source itself foresees {honest:.3f} nats, {name} {gains[name]:.3f}; of the two, "
            f"{name if leaky else 'the source'} should gain more")
