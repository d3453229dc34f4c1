import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import UserError
from model import DuoConfig, DuoGPT

SHAPE = DuoConfig(n_layer=3, n_head=2, n_embd=16, block_size=12, vocab_size=40)  # of the routers' tests


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """So small a model gains nothing from a second thread, and waits for it where cores are busy. (The processes that
    are compared bitwise run on one thread too.)"""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def intervals_of_few():
    """Planted data are small: here two sequences are enough for an interval (tests of FEW itself set it back)."""
    import claims
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "FEW", 2)
        yield


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """torch.compile counts how often a function is compiled anew, in all tests together, and then gives up."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def model():
    """A random base of SHAPE whose FFNs matter: large weights."""
    model = DuoGPT(SHAPE).init_weights(torch.Generator().manual_seed(1))
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data *= 3
    return model.eval().requires_grad_(False)


def user_error(call, *parts):
    """call() must raise a UserError of one line that holds all parts -> the line"""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message
