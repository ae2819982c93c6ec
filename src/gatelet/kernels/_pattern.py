"""The pattern of open (example, unit) pairs, as bits, in both orders."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpenPattern:
    """Which units are open for which examples: built once, read by every product of forward and backward.

    One bit per pair, in both orders, together 1/16 of a float32 output's size: a fixed size that does not depend
    on how many pairs are open, so nothing has to be counted before memory is reserved, and ``torch.compile`` can
    plan. A word of one order times a word of the other is a block of 64 × 64 pairs.

    Attributes:
        rows: by example, (B, ⌈N/64⌉) int64; bit i of word w is unit 64·w + i.
        cols: by unit, (N, ⌈B/64⌉) int64; bit i of word w is example 64·w + i.
        lead: the leading shape of the gates; B is its product.
        units: N.
    """

    rows: Tensor
    cols: Tensor
    lead: torch.Size
    units: int


def flat(tensor: Tensor) -> Tensor:
    """Return (..., C) as (B, C); unlike ``reshape(-1, C)`` also for no examples or no columns."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def words(count: Any) -> Any:
    """Return how many words hold ``count`` bits (an int, or torch's symbol for one when tracing)."""
    return -(-count // 64)


def bits_of(mask: Tensor) -> Tensor:
    """Return the bits of a mask (R, C) as words (R, ⌈C/64⌉).

    >>> bits_of(torch.tensor([[True, False, True]]))
    tensor([[5]])
    """
    height, width = mask.shape
    padded = torch.nn.functional.pad(mask, (0, 64 * words(width) - width)).view(height, words(width), 64)
    # Bit 63 is the sign: the sum wraps around to it.
    return (padded.long() << torch.arange(64, device=mask.device)).sum(-1)


def mask_of(rows: Tensor, units: int) -> Tensor:
    """Return the mask (B, N) whose bits these are."""
    flags = (rows.unsqueeze(-1) >> torch.arange(64, device=rows.device)) & 1
    return flags.flatten(1)[:, :units].bool()


def spread(gate: Tensor, units: int) -> Tensor:
    """Return one number per unit (B, N) from one per group (B, G)."""
    return gate if gate.shape[1] == units else gate.repeat_interleave(units // gate.shape[1], dim=1)


def gathered(coefficient: Tensor, rows: Tensor) -> Tensor:
    """Return coefficient @ rows where a zero coefficient leaves its row out, be it NaN or infinite.

    ``coefficient`` is (R, C), ``rows`` (C, D). One product, and the careful sum only when it went wrong. Off the CPU,
    where asking would make the host wait, a kernel looks; without one, a sum that a bad row enters is NaN.
    """
    if rows.device.type != "cpu":
        from gatelet.kernels import _dispatch

        if rows.device.type == "cuda" and _dispatch.triton_missing() is None:
            from gatelet.kernels import _triton

            result = coefficient @ rows
            _triton.repair(result, coefficient, rows)
            return result
        finite = rows.isfinite()
        spoilt = (coefficient != 0).to(rows.dtype) @ (~finite.all(1)).to(rows.dtype) > 0
        return (coefficient @ torch.where(finite, rows, 0)).masked_fill(spoilt.unsqueeze(1), torch.nan)
    result = coefficient @ rows
    probe = min(rows, result, key=Tensor.numel)  # a NaN in a row left out shows in both
    if probe.numel() and not math.isfinite(probe.sum().item()):
        bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        finite = rows.clone()
        finite[bad] = 0
        result = coefficient @ finite
        for index in bad:
            hit = coefficient[:, index] != 0
            result[hit] += coefficient[hit, index, None] * rows[index]
    return result
