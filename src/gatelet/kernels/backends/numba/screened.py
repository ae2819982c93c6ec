"""The k largest outputs of a linear map, found by a product in bfloat16 and settled by exact ones.

Where a processor multiplies bfloat16 several times faster than float32, most outputs need no exact product. Rounding
moves z = ⟨x, w⟩ by no more than c·‖w‖, with c = ‖x − x̃‖ + 2⁻⁸‖x̃‖ for the factors and 2⁻⁸‖x̃‖ for the result, by
Cauchy and Schwarz. So the k-th largest of z̃ − c‖w‖ is at most the k-th largest z, and whatever has z̃ + c‖w‖ below it is
not among the k largest. The others are computed exactly. The result is that of the float32 product, ties apart.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatelet.kernels.backends.numba.lists import dots, top_k

UNIT = 2.0**-8
"""The largest relative error of rounding to bfloat16."""
SUMS = 2.0**-12
"""More than the relative error of a sum of thousands of float32 products."""
LEAST = 64
"""Fewer examples are not worth the rounding of the weights."""


def worth(x: Tensor, weight: Tensor) -> bool:
    """Return whether screening is expected to pay: many examples, float32, a processor that multiplies bfloat16."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast and x.dtype == torch.float32 and len(x) >= LEAST and weight.shape[1] >= 64


def screened_top_k(x: Tensor, weight: Tensor, bias: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return each example's ``most`` largest of x Wᵀ + b, and where they are, in the order of the units.

    Args:
        x: (B, D), float32.
        weight: (N, D).
        bias: (N,).
        most: K, at most N.
    """
    units, lengths = len(weight), torch.linalg.vector_norm(weight, dim=1)
    listed = min(units, 6 * most + 64)
    size = torch.linalg.vector_norm(x, dim=1)
    lost = torch.linalg.vector_norm(x - x.bfloat16().float(), dim=1)
    margin = ((lost + (2 * UNIT + SUMS) * size) * (1 + UNIT)).max() * lengths
    upper, at = top_k(x, weight, bias + margin, listed, half=True)
    limit = (upper - 2 * margin[at]).topk(most, dim=1, sorted=False).values.amin(1, keepdim=True)
    kept = upper >= limit
    values = torch.full_like(upper, -torch.inf)
    values[kept] = dots(x, weight, bias, F.pad(kept.sum(1).cumsum(0), (1, 0)), at[kept])
    best = values.topk(most, dim=1, sorted=False).indices.sort(dim=1).values
    found = values.gather(1, best), at.gather(1, best)
    if listed < units:  # where the whole list is kept, more may lie beyond it
        beyond = kept.all(1)
        if bool(beyond.any()):
            found[0][beyond], found[1][beyond] = top_k(x[beyond], weight, bias, most)
    return found
