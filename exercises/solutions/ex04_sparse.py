import torch

from model import BIG, SMALL


def sparse_ffn(x, choice, small, big):
    y = torch.zeros_like(x)  # rows of tokens that skip stay zero
    for value, ffn in ((SMALL, small), (BIG, big)):
        chose = choice == value  # [B, T]
        if chose.any():
            # x[chose] gathers rows [n, d]; the assignment scatters them back. Both are differentiable.
            y[chose] = ffn(x[chose])
    return y
