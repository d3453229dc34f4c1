import numpy as np
import torch


def leaks(reference, validation, fresh):
    def loss(text):
        """-> mean loss of each sequence, in nats"""
        p = reference(text).gather(-1, text[:, 1:, None])[..., 0]
        return -p.clamp_min(1e-9).log().mean(1).double()

    # Does it read ahead? Give every sequence another future: up to t, nothing may change.
    p = reference(validation)
    for t in range(validation.shape[1] - 1):
        other = validation.clone()
        other[:, t + 1:] = other[:, t + 1:].roll(1, 0)
        if not torch.allclose(reference(other)[:, :t + 1], p[:, :t + 1], atol=1e-4):
            return True
    # Has it seen this text before? Then it is better there than on fresh text, by more than chance (4 standard errors).
    here, there = loss(validation), loss(fresh)
    error = np.sqrt((here.var() + there.var()).item() / len(here))
    return (there.mean() - here.mean()).item() > 4 * error


def foresight(p, log_p, targets, fixed):
    cross_entropy = -(p * log_p).sum(-1)  # CE(p, p_route) of each route [R, S, T]
    route = cross_entropy.argmin(0, keepdim=True)  # the label has no part in it
    losses = -log_p.gather(-1, targets.expand(len(log_p), -1, -1)[..., None])[..., 0]  # but it is what counts
    return (losses[fixed] - losses.gather(0, route)[0]).mean().item()
