import torch
from torch.nn.functional import one_hot

from model import BIG, SMALL, random_route


def make_router(model, batch):
    """A table: how much BIG in layer l helps after token id v, counted under random routes. A token takes BIG in the
    layers where that is most; in all 3 of 8 choices are BIG."""
    L, V = len(model.blocks), model.config.vocab_size
    total, count = torch.zeros(2, L, 2, V)  # losses and tokens: layer, whether BIG, id
    for step in range(40):
        x, y = batch(step)
        route = random_route(*x.shape, L, 0.0, 0.5, torch.Generator().manual_seed(step))
        loss = model(x, route, y, reduction="none")[1]
        for layer in range(L):
            cell = (route[..., layer] == BIG) * V + x  # [B, T], 0..2V-1
            total[layer].view(-1).index_add_(0, cell.flatten(), loss.flatten())
            count[layer].view(-1).index_add_(0, cell.flatten(), torch.ones(x.numel()))
    mean = total / count.clamp_min(1)
    of_layer = total.sum(-1) / count.sum(-1)  # [L, 2]
    # The loss with SMALL - with BIG. Few tokens tell little, so an id's own counts as much as 1,000 of its layer's.
    n = count.min(1).values  # [L, V]
    gain = (n * (mean[:, 0] - mean[:, 1]) + 1000 * (of_layer[:, :1] - of_layer[:, 1:])) / (n + 1000)
    # Spend where it is most: sort all pairs (layer, id), and take from the top until 3/8 of the choices are BIG.
    order = gain.flatten().argsort(descending=True)
    spent = count.sum(1).flatten()[order].cumsum(0) / count.sum()
    is_big = torch.zeros(L * V, dtype=torch.bool)
    is_big[order[spent <= 3 / 8]] = True
    is_big = is_big.view(L, V)

    def router(layer, h, state, seq):
        ids = seq["idx"][:, -h.shape[1]:]
        return one_hot(torch.where(is_big[layer][ids], BIG, SMALL), 3).float(), state
    return router
