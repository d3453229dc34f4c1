"""Exercise 6: calibrate a router to a budget by bisection.

Task. A router learns with soft weights, but is used with hard choices (argmax), so what it spends is off its budget.
One number mends this: a shift, added to the logit of BIG in every layer and for every token. The larger the shift, the
more BIG. Fill in big_per_token, which measures what a shift leads to, and calibrate, which finds the shift that meets
a budget.

Why. Policies can only be compared at equal compute: a router that spends 6.3 BIG per token where 6 were asked for
looks better than it is. The shift is fitted on training text, never on the text that is reported.

Read first: Router.forward in gates.py (where the shift enters) and choose in router.py. (calibrate in router.py is the
answer, for two shares at once: look at it last.)

Hint: first find a bracket, by steps that double until one end spends too much and the other too little; then halve it.
What layer 2 reads depends on what layers 0 and 1 chose, so there is no way around running the model for each shift.
"""
import torch

from gates import Router, shares
from model import BIG, DuoConfig, DuoGPT
from router import choose


def big_per_token(model, router, idx, shift):
    """Set the router's shift of BIG, route idx [S, T] by hard choices, and count -> a number, 0..L.

    By hand: 2 layers, one text of 2 tokens whose routes are (BIG, SMALL) and (BIG, BIG): 3 BIG for 2 tokens, so 1.5.
    """
    raise NotImplementedError("exercise 6: fill in big_per_token")


def calibrate(model, router, idx, n_big, tolerance=0.02):
    """Find the shift with which the router spends n_big BIG per token on idx [S, T], up to the tolerance, and leave
    the router with it -> the shift.

    By hand: shift 0 gives 3.1 where 2 are asked for; -1 gives 2.4; -2 gives 1.7; so it lies in -2..-1; try -1.5.
    """
    raise NotImplementedError("exercise 6: fill in calibrate")


# ---------------------------------------------------------------------------------------------------------------------
# the check

L, T = 4, 12


def small_model_and_router(scale=1.0):
    """A model whose FFNs matter, so that later choices depend on earlier ones, and a router. scale: of its logits."""
    model = DuoGPT(DuoConfig(n_layer=L, n_head=2, n_embd=16, block_size=T, vocab_size=200))
    model.init_weights(torch.Generator().manual_seed(1))
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data *= 3
    router, rng = Router(model.config, 0, "sb", shares(L, "sb", 2, None), None), torch.Generator().manual_seed(2)
    router.w_out.data = scale * torch.randn(router.w_out.shape, generator=rng)
    router.b_out.data *= scale
    text = torch.randint(200, (2, 32, T), generator=rng)  # two texts: one to calibrate on, one to look at afterwards
    return model.eval().requires_grad_(False), router.eval().requires_grad_(False), text


def test_hard_choices_are_counted():
    model, router, (idx, _) = small_model_and_router()
    for shift in (0.0, 3.0, -3.0):
        got = float(big_per_token(model, router, idx, shift))
        assert router.shift.tolist() == [0, 0, shift], (
            f"router.shift is {router.shift.tolist()} after shift={shift}; it has a place for each of SKIP, SMALL and "
            "BIG, and only that of BIG is to be set")
        routes = model(idx, router, return_stats=True)[2]["route"]  # [S, T, L]
        expected = sum((routes[..., layer] == BIG).float().mean().item() for layer in range(L))
        hint = ("that is the share of all choices: multiply by the layers" if abs(got * L - expected) < 1e-4 else
                "count choices, the argmax of the logits, and divide by the number of tokens")
        assert abs(got - expected) < 1e-4, f"{got:.3f} BIG per token, but the routes have {expected:.3f}; {hint}"


def test_the_budget_is_met():
    test_hard_choices_are_counted()  # a search that counts wrongly cannot end well
    for scale in (1.0, 100.0):  # of the logits: a router may be very sure of its choices
        model, router, (idx, other) = small_model_and_router(scale)
        before, passes = router.w_out.clone(), [0]

        def count(*_):
            passes[0] += 1
            assert passes[0] <= 60, (
                f"more than 60 passes over the text for a budget of {n_big}, logits of size {scale:g}. Is the answer "
                "between your first two ends? Doubling finds such a pair in about 10, 20 halvings are plenty")
        model.register_forward_pre_hook(count)
        for n_big in (0.5, 2.0, 3.3):
            passes[0] = 0
            shift = calibrate(model, router, idx, n_big)
            assert router.shift[BIG].item() == torch.tensor(float(shift)).item(), (
                f"calibrate gave {shift}, but the router is left with {router.shift[BIG].item()}")
            assert router.shift[:BIG].eq(0).all() and router.w_out.equal(before), "only the shift of BIG may change"
            passes[0] = 0
            spent = (choose(model, router, idx)[0] == BIG).sum(-1).float().mean().item()
            assert abs(spent - n_big) <= 0.02, (
                f"asked for {n_big} BIG per token, spends {spent:.3f} with a shift of {shift:.3f} (logits of size "
                f"{scale:g}). Was the model run anew for each shift? Does the first bracket hold the answer?")
            there = (choose(model, router, other)[0] == BIG).sum(-1).float().mean().item()
            assert abs(there - n_big) < 0.3, f"on other text of the same kind it spends {there:.2f}, not {n_big}"
