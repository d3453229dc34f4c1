"""`python -m pytest exercises` marks the exercises; `python -m pytest exercises/ex01_flops.py` marks one."""
import torch

collect_ignore = ["solutions"]
torch.set_num_threads(1)  # so small a model gains nothing from a second thread


def pytest_configure(config):
    config.option.tbstyle = "short"  # the message and its line: of unsolved exercises there are many
