"""The exercises, all that there are: each check fails on the stub, passes with the solution, and rejects mistakes."""
import ast
import functools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUBS, SOLUTIONS = ROOT / "exercises", ROOT / "exercises" / "solutions"
EXERCISES = sorted(path.name for path in STUBS.glob("ex*.py"))
each = pytest.mark.parametrize("name", EXERCISES)

# What a student may well get wrong: (exercise, text of the solution, what is written instead, what the check must say)
MISTAKES = [
    ("ex01_flops.py", "2 * 3 * d *", "2 * 2 * d *", "three products"),
    ("ex01_flops.py", "total += 2 * 3 * d *", "total += 3 * d *", "2 FLOPs each"),
    ("ex01_flops.py", "2 * 2 * n_keys * d", "2 * 2 * n_keys * n_keys * d", "one more key"),
    ("ex01_flops.py", "2 * 2 * n_keys * d", "2 * n_keys * d", "weighted sum"),
    ("ex01_flops.py", "2 * 2 * d * d +", "2 * d * d +", "the output projection"),
    ("ex01_flops.py", "2 * d * config.vocab_size", "0", "the read-out"),
    ("ex01_flops.py", "(config.small_width if choice == SMALL else config.big_width)",
     "(config.small_width + config.big_width)", "one FFN, the one it chose"),
    ("ex01_flops.py", "total += 2 * 2 * d * d  #", "total += 0 if choice == SKIP else 4 * d * d  #", "still writes"),
    ("ex02_prefix_tree.py", "range(1, L + 1))  #", "range(L + 1))  #", "the root is a node"),
    ("ex02_prefix_tree.py", "sum(n_choices ** length for length in range(1, L + 1))", "n_choices ** L", "the leaves"),
    ("ex02_prefix_tree.py", "sum(n_choices ** length for length in range(1, L + 1))",
     "n_choices * (n_choices ** L - 1) / (n_choices - 1)", "a float"),
    ("ex02_prefix_tree.py", "max(0, k - (L - length))", "0", "that no route with"),
    ("ex02_prefix_tree.py", "min(k, length) + 1", "min(k, length)", "search.py evaluates"),
    ("ex02_prefix_tree.py", "comb(L, k) * L / tree_of_k", "2 ** L * L / tree_of_k", "20 routes one by one are 120"),
    ("ex02_prefix_tree.py", "if k is None", "if not k", "1 routes one by one are 3"),
    ("ex02_prefix_tree.py", "range(1, L + 1))  #", "range(L))  #", "each choice once in the first layer"),
    ("ex03_oracle.py", "!= k", "> k", "BIG, not k = "),
    ("ex03_oracle.py", "if route.count(BIG) != k", "if t < 0", "BIG, not k = "),
    ("ex03_oracle.py", "history.clone()", "history", "was changed"),
    ("ex03_oracle.py", "losses[0, t].item()", "losses.mean().item()", "its own loss on targets[0, t]"),
    ("ex03_oracle.py", "full[0, t] = torch.tensor(route)", "full[:] = torch.tensor(route)", "when only token t"),
    ("ex03_oracle.py", "full[0, t] = torch.tensor(route)", "full[0, t - 1] = torch.tensor(route)", "when only token t"),
    ("ex03_oracle.py", """if loss < least:
            best, least = list(route), loss
    return best, least""", """if losses.mean() < least:
            best, least, final = list(route), losses.mean(), loss
    return best, final""", "not a mean over the tokens"),
    ("ex03_oracle.py", "if loss < least", "if best is None", "do you try all routes"),
    ("ex03_oracle.py", "if loss < least", "if -loss < least", "do you try all routes"),
    ("ex04_sparse.py", "torch.zeros_like(x)", "x.clone()", "its row must be zero"),
    ("ex04_sparse.py", "((SMALL, small), (BIG, big))", "((SMALL, big), (BIG, small))", "tokens with SMALL"),
    ("ex04_sparse.py", "y[chose] = ffn(x[chose])", "y[chose] = ffn(x[chose]).flip(0)", "back to its own token"),
    ("ex04_sparse.py", "ffn(x[chose])", "ffn(x[chose].detach())", "the gradient of x"),
    ("ex04_sparse.py", "ffn(x[chose])", "ffn(x[chose]).detach()", "no gradient"),
    ("ex04_sparse.py", "y[chose] = ffn(x[chose])", "y = y + chose.unsqueeze(-1) * ffn(x.flatten(0, 1)).view_as(x)",
     "it computed 15 rows"),
    ("ex04_sparse.py", "y[chose] = ffn(x[chose])", "y[chose] = torch.cat([ffn(row[None]) for row in x[chose]])",
     "one product of all rows"),
    ("ex04_sparse.py", "torch.zeros_like(x)", "x.mul_(choice.unsqueeze(-1) > 0)", "x was overwritten"),
    ("ex04_sparse.py", "return y", "return x + y", "what is to be added alone"),
    ("ex04_sparse.py", "if chose.any():", "if True:", "nobody chose"),
    ("ex04_sparse.py", "ffn(x[chose])", "ffn(x)", "wants rows"),
    ("ex05_bootstrap.py", "np.exp(losses.mean())", "np.exp(losses).mean()", "exp of the mean"),
    ("ex05_bootstrap.py", "np.exp(losses.mean())", "2 ** losses.mean()", "is 4, not"),
    ("ex05_bootstrap.py", "losses.sum() / np.log(2) /", "losses.sum() /", "nats per byte"),
    ("ex05_bootstrap.py", "losses.sum() / np.log(2) / n_bytes.sum()", "(losses / np.log(2) / n_bytes.clip(1)).mean()",
     "all bits by all bytes"),
    ("ex05_bootstrap.py", "losses.sum() / np.log(2) / n_bytes.sum()",
     "np.divide(losses, n_bytes, out=np.full_like(losses, np.inf), where=n_bytes > 0).mean()", "stand for no byte"),
    ("ex05_bootstrap.py", "(a[draws] - b[draws])", "(a[draws] - b[rng.integers(S, size=draws.shape)])",
     "draw once for both"),
    ("ex05_bootstrap.py", "(a[draws] - b[draws])", "(b[draws] - a[draws])", "mean(a) - mean(b)"),
    ("ex05_bootstrap.py", "a, b = a.mean(1), b.mean(1)  #", "a, b, draws = a.ravel(), b.ravel(), rng.integers("
     "a.size, size=(RESAMPLES, a.size))  #", "whole sequences, not tokens"),
    ("ex05_bootstrap.py", "[2.5, 97.5]))\n\n", "[5, 95]))\n\n", "keep 95%"),
    ("ex05_bootstrap.py", "means = (a[draws] - b[draws]).mean(1)", "means = (a - b)[draws[:, 0]]",
     "over all S sequences"),
    ("ex05_bootstrap.py", "draws = rng.integers(S, size=(RESAMPLES, S))",
     "draws = rng.permuted(np.arange(S)[None].repeat(RESAMPLES, 0), axis=1)", "draw with replacement"),
    ("ex05_bootstrap.py", "a[rng.integers(S, size=(RESAMPLES, S))].mean(1) - b[rng.integers(S, size=(RESAMPLES, S))]",
     "(a - b)[rng.integers(S, size=(RESAMPLES, S))]", "the covariance says"),
    ("ex05_bootstrap.py", "b[rng.integers(S, size=(RESAMPLES, S))]", "b[[range(S)]]", "the covariance says"),
    ("ex06_calibrate.py", ".sum(-1).float().mean().item()", ".float().mean().item()", "multiply by the layers"),
    ("ex06_calibrate.py", "router.shift[BIG] = shift", "router.shift[:] = shift", "only that of BIG"),
    ("ex06_calibrate.py", "        low *= 2", "        break", "between your first two ends"),
    ("ex06_calibrate.py", "<= tolerance:", "<= 10 * tolerance:", "asked for 0.5 BIG per token"),
    ("ex07_selection.py", "above ** (n - 1)", "above ** n", "n=1: you say"),
    ("ex07_selection.py", "losses.std(0, ddof=1).mean()", "losses.std()", "take each token's own"),
    ("ex07_selection.py", "(x.mean(0) - x[choice, tokens]).mean()", "(x.mean(0) - x.min(0)).mean()",
     "the judge's own best route"),
    ("ex07_selection.py", "1 - kept / seen", "kept / seen", "the share is 1.00"),
    ("ex08_memory.py", "small, FLAG, FLAG, -1.0)\n    adds(first.big, FLAG, FLAG, -1.0)",
     "small, FLAG, FLAG, 0.0)\n    adds(first.big, FLAG, FLAG, 0.0)", "both can solve it"),
    ("ex08_memory.py", "CONSTANT, ANSWER_1, 1.0)", "CONSTANT, ANSWER_0, 1.0)", "nothing to win by routing"),
    ("ex08_memory.py", "    first, *later", "    model.embedding.weight[2:, FLAG] = 0\n    first, *later",
     "not even the state helps"),
    ("ex09_reference.py", "> 4 * error", "> 0 * error", "the source itself (is honest, but you say it leaks)"),
    ("ex09_reference.py", "> 4 * error", "> 1e9 * error", "a model trained on the validation text (leaks, but"),
    ("ex09_reference.py", "            return True", "            pass", "a tenth of the label mixed in (leaks, but"),
    ("ex09_reference.py", "(reference(other)[:, :t + 1], p[:, :t + 1],", "(reference(other)[:, 0], p[:, 0],",
     "the label in the last quarter (leaks, but"),
    ("ex09_reference.py", "-(p * log_p).sum(-1)  #",
     "-log_p.gather(-1, targets.expand(len(log_p), -1, -1)[..., None])[..., 0]  #", "so it takes route 1"),
    ("ex09_reference.py", "cross_entropy.argmin(0, keepdim=True)",
     "cross_entropy.mean((1, 2), keepdim=True).argmin(0, keepdim=True).expand(1, *targets.shape)", "route of its own"),
    ("ex10_own_router.py", "-h.shape[1]:]", "-h.shape[1]:].roll(-1, 1)", "must not look ahead"),
    ("ex10_own_router.py", "[:, -h.shape[1]:]", "[:, :h.shape[1]]", "token by token"),
]


def load(path, source=None):
    """A file as a module of its own: exercise and solution share their name."""
    module = types.ModuleType(path.stem)
    exec(compile(source or path.read_text(), str(path), "exec"), module.__dict__)
    return module


def stubs(name):
    """-> the functions and classes of the exercise that are left to the student"""
    tree = ast.parse((STUBS / name).read_text())
    return [node.name for node in tree.body if "raise NotImplementedError(" in ast.unparse(node)]


def checks(exercise):
    return [value for key, value in vars(exercise).items() if key.startswith("test_")]


@functools.cache
def exercise_of(name):
    """Loaded once: what a check trains, and keeps, serves all the mistakes."""
    return load(STUBS / name)


def solved(name, patch, source=None):
    """The exercise with the functions of its solution in place -> its checks"""
    exercise, solution = exercise_of(name), load(SOLUTIONS / name, source)
    for function in stubs(name):
        patch.setattr(exercise, function, getattr(solution, function))
    return checks(exercise)


@each
def test_form(name):
    text, number = (STUBS / name).read_text(), int(name[2:4])
    exercise = load(STUBS / name)
    assert exercise.__doc__.startswith(f"Exercise {number}: ")
    for part in ("Task", "Why", "Read first", "Hint"):
        assert part in exercise.__doc__, f"the docstring of {name} has no {part!r}"
    for function in stubs(name):
        assert getattr(exercise, function).__doc__, f"{function} has no docstring"
        assert re.search(rf'NotImplementedError\("exercise {number}: fill in {function}\b', text)
    assert 1 <= len(checks(exercise)) <= 3
    for line in (text + (SOLUTIONS / name).read_text()).splitlines():
        assert len(line) <= 120, line


@each
def test_the_stub_fails(name):
    for check in checks(load(STUBS / name)):
        with pytest.raises(NotImplementedError, match=rf"^exercise {int(name[2:4])}: fill in "):
            check()


@each
def test_the_solution_passes(name, monkeypatch):
    defined = [node.name for node in ast.parse((SOLUTIONS / name).read_text()).body
               if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert stubs(name) and sorted(defined) == sorted(stubs(name))
    for check in solved(name, monkeypatch):
        check()


@pytest.mark.parametrize("name, right, wrong, message", MISTAKES)
def test_a_mistake_is_told(name, right, wrong, message, monkeypatch):
    source = (SOLUTIONS / name).read_text()
    assert source.count(right) == 1
    with pytest.raises(AssertionError, match=re.escape(message)):
        for check in solved(name, monkeypatch, source.replace(right, wrong)):
            check()


def test_only_the_checks_are_collected(pytestconfig):
    """By `python -m pytest exercises`; by the project's own `python -m pytest` none of them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "exercises"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = [f"exercises/{name}::{check.__name__}" for name in EXERCISES for check in checks(load(STUBS / name))]
    assert [line for line in listing.splitlines() if "::" in line] == expected
    assert [path.name for path in sorted(SOLUTIONS.glob("*.py"))] == EXERCISES
    assert pytestconfig.getini("testpaths") == ["tests"]
