"""The k largest of a linear map's outputs, per example, without keeping all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatelet.nn._lists import compiled

NUMBERS = 1 << 22
"""Outputs that are formed at once, and searched while they are still in the caches."""
FEW = 16
"""For fewer examples the product takes nearly all of the time."""


def largest(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (B, k) of the k largest of W x + b, in any order.

    Args:
        x: (B, D).
        weight: W (N, D).
        bias: b (N,).
        k: at most N.
    """
    if not k:
        return x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.long, device=x.device)
    if len(x) >= FEW and compiled(x, weight, bias):
        from gatelet.kernels.backends.numba import lists, screened

        return (screened.screened_top_k if screened.worth(x, weight) else lists.top_k)(x, weight, bias, k)
    if len(x) < FEW:
        few = F.linear(x, weight, bias).topk(k, dim=-1, sorted=False)
        return few.values, few.indices
    rows = max(1, NUMBERS // len(weight))
    found = [F.linear(part, weight, bias).topk(k, dim=-1, sorted=False) for part in x.split(max(rows, 256))]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def largest_in_groups(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, opened: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the same among the units of each example's open groups; only these are computed.

    Args:
        x: (B, D).
        weight: W (N, D), groups of N / E consecutive units.
        bias: b (N,).
        k: at most the units of e groups.
        opened: (B, e), each example's groups.
        groups: E.
    """
    batch, count = opened.shape
    flat, size = opened.reshape(-1), len(weight) // groups
    order = flat.argsort(stable=True)
    parts = torch.bincount(flat, minlength=groups).tolist()
    z = x.new_empty((batch * count, size))
    for group, places in enumerate(order.split(parts)):
        span = slice(group * size, (group + 1) * size)
        z[places] = F.linear(x[places // count], weight[span], bias[span])
    values, at = z.view(batch, count * size).topk(k, dim=-1, sorted=False)
    return values, opened.gather(1, at // size) * size + at % size
