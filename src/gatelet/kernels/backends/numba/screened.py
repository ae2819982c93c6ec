"""The k largest outputs of a linear map: candidates from a product in bfloat16, then exact products for them alone.

Some processors multiply bfloat16 several times faster than float32; there, most outputs need no exact product. With x̃
and w̃ rounded to bfloat16 and z̃ the rounded product, the Cauchy–Schwarz inequality gives
|z − z̃| ≤ m = (‖x − x̃‖ + 2⁻⁸‖x‖)·‖w‖ + 2⁻⁸|z̃|. The k-th largest z is at least t, the k-th largest z̃ − m. So outputs
with z̃ + m < t are not among the k largest. The others are computed exactly. The result is that of the float32 product,
except for the order of equals.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gatelet.kernels.backends.numba.lists import dots, top_k

UNIT = 2.0**-8
"""The largest relative error of rounding to bfloat16."""
SUMS = 2.0**-12
"""More than the relative error of a sum of thousands of float32 products."""
LEAST = 256
"""For fewer examples, rounding the weights costs more than it saves."""
FIRST = 8
"""One in this many examples tests whether the bound excludes enough latents."""
FAILING = 0.3
"""If it fails for more than this share of them, the other examples are computed in float32."""


def worth(x: Tensor, weight: Tensor) -> bool:
    """Return whether screening should be faster: many examples, float32, a processor that multiplies bfloat16."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast and x.dtype == torch.float32 and len(x) >= LEAST and weight.shape[1] >= 64


def screened_top_k(x: Tensor, weight: Tensor, bias: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return each example's ``most`` largest of x Wᵀ + b and their indices, in the order of the units.

    Args:
        x: (B, D), float32.
        weight: (N, D).
        bias: (N,).
        most: K, at most N.
    """
    lengths, first = torch.linalg.vector_norm(weight, dim=1), len(x) // FIRST
    found = [_screened(x[:first], weight, bias, most, lengths)] if first else []
    if not found or found[0][2].float().mean() <= FAILING:
        found.append(_screened(x[first:], weight, bias, most, lengths))
    values, units, beyond = (torch.cat(each) for each in zip(*found, strict=True))
    missing = len(x) - len(values)
    values, units = F.pad(values, (0, 0, 0, missing)), F.pad(units, (0, 0, 0, missing))
    beyond = F.pad(beyond, (0, missing), value=True)
    if bool(beyond.any()):
        values[beyond], units[beyond] = top_k(x[beyond], weight, bias, most)
    return values, units


def _screened(x: Tensor, weight: Tensor, bias: Tensor, most: int, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and units (B, K) chosen from candidates, and whether there may be more candidates, (B,)."""
    units = len(weight)
    listed = min(units, 6 * most + 64)
    near, at = top_k(x, weight, bias, listed, half=True)
    size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    lost = torch.linalg.vector_norm(x - x.bfloat16().float(), dim=1, keepdim=True)
    factors = (lost + (UNIT + SUMS) * size) * (1 + 2 * UNIT)  # the last factor: w̃ may be longer than w
    result = UNIT * (1 + 2 * UNIT)
    margin = factors * lengths[at] + result * (near - bias[at]).abs()
    limit = (near - margin).topk(most, dim=1, sorted=False).values.amin(1, keepdim=True)
    kept = near + margin >= limit
    values = torch.full_like(near, -torch.inf)
    values[kept] = dots(x, weight, bias, F.pad(kept.sum(1).cumsum(0), (1, 0)), at[kept])
    best = values.topk(most, dim=1, sorted=False).indices.sort(dim=1).values
    last = near.amin(1, keepdim=True)  # no z̃ beyond the list is larger
    ceiling = last + factors * lengths.max() + result * (last.abs() + bias.abs().max())
    beyond = ((ceiling >= limit) if listed < units else torch.zeros_like(limit, dtype=torch.bool)).squeeze(1)
    return values.gather(1, best), at.gather(1, best), beyond
