"""The dense backend: plain PyTorch computes all units, then discards closed ones. It runs on any device and dtype."""

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels.backends import _pairs, triton
from gatelet.kernels.backends._activations import activate, slope
from gatelet.kernels.backends._protocol import Backend, Kernel, Layer, Worth
from gatelet.kernels.pattern import Bits, Form, Lists, bits_of, mask_of, spread


class Dense(Backend):
    """The backend that is always available."""

    name = "dense"
    device = ""
    by_gate = True
    looks = False
    spares = None

    def missing(self) -> str | None:
        """Return None: nothing is missing."""
        return None

    def cannot(self, layer: Layer) -> str | None:
        """Return None: every layer can run."""
        return None

    def worth(self, layer: Layer) -> Worth:
        """Return that it is always worth running: the others are compared with it."""
        return Worth(1.0)

    def kernel(self, layer: Layer) -> Kernel:
        """Return the only one."""
        return "dense"

    @property
    def products(self) -> Any:
        """This module."""
        return sys.modules[__name__]


def pattern(gate: Tensor, units: int) -> Form:
    """Return the pattern of gates (B, G) as bits."""
    mask = spread(gate, units) != 0
    return Bits(bits_of(mask), bits_of(mask.t()), units // max(gate.shape[1], 1))


def promise(gate: Tensor, units: int, keep: bool) -> None:
    """Return no pattern: the gates say what is open."""


def dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    pattern: Form | None,
    *,
    keep: bool = False,
    activation: str = "identity",
    fill: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return act(x Wᵀ + b) ∘ gate at open pairs and, to ``keep``, x Wᵀ + b at all pairs."""
    if isinstance(pattern, Lists):
        pre = _pairs.dots(x, weight, bias, pattern)
        return _pairs.finish(pre, gate, activation), pre if keep else x.new_empty(0)
    units = weight.shape[0]
    pre = F.linear(x, weight, bias)
    if (fused := _fused(pre)) and not (gate is None and pattern is None):
        rows = pattern.rows if gate is None and isinstance(pattern, Bits) else None
        return fused.finish(pre, gate, rows, activation, in_place=not keep), pre if keep else x.new_empty(0)
    value = activate(pre, activation)
    if gate is not None:
        each = spread(gate, units)
        value = closed(value.mul_(each) if not keep and activation == "identity" else value * each, each)
    elif pattern is not None:
        value = torch.where(_mask(pattern, units), value, 0)
    return value, pre if keep else x.new_empty(0)


def by_example(
    coefficient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: Form | None,
    gate: Tensor | None = None,
    *,
    own: bool = False,
) -> Tensor:
    """Return C W + bias over the open pairs."""
    if isinstance(pattern, Lists):
        return _pairs.by_example(coefficient, weight, bias, pattern)
    return gathered(coefficient if own else _open(coefficient, pattern), weight, bias)


def by_unit(
    coefficient: Tensor,
    x: Tensor,
    pattern: Form | None,
    *,
    need_rows: bool = True,
    need_sum: bool = False,
    transposed: bool = False,
    own: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return Cᵀ x over the open pairs, and the sums of C over the examples."""
    if isinstance(pattern, Lists):
        rows, sums = _pairs.by_unit(coefficient, x, pattern, need_rows, need_sum)
        return rows.t() if rows is not None and transposed else rows, sums
    coefficient = coefficient if own else _open(coefficient, pattern)
    rows = gathered(coefficient.t(), x) if need_rows else None
    return rows.t() if rows is not None and transposed else rows, coefficient.sum(0) if need_sum else None


def pointwise(
    upper: Tensor,
    pre: Tensor,
    gate: Tensor,
    pattern: Form | None,
    wide: Form | None = None,
    *,
    need_gate: bool,
    need_coefficient: bool,
    activation: str = "identity",
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return C = g · gate · act'(z) where the gate is not zero, and the gate's gradient there or on ``wide``."""
    if isinstance(pattern, Lists):
        return _pairs.pointwise(upper, pre, gate, need_gate, need_coefficient, activation)
    if fused := _fused(upper):
        found: tuple[Tensor | None, Tensor | None] = fused.pointwise(
            *(upper, pre, gate, None, wide),
            need_gate=need_gate,
            need_coefficient=need_coefficient,
            activation=activation,
        )
        return found
    units = upper.shape[1]
    each = spread(gate, units)
    coefficient = slopes = None
    if need_coefficient:
        product = upper * each
        if activation != "identity":
            product = product * slope(pre, activation)
        coefficient = closed(product, each)
    if need_gate:
        is_open = each != 0 if wide is None else _mask(wide, units)
        slopes = torch.where(is_open, upper * activate(pre, activation), 0)
        if gate.shape != slopes.shape:
            slopes = slopes.unflatten(1, (gate.shape[1], -1)).sum(-1)
    return coefficient, slopes


def _fused(tensor: Tensor) -> Any:
    """Return kernels that do several operations of torch in one pass; None on devices other than CUDA."""
    there = tensor.device.type == "cuda" and tensor.dtype in triton.DTYPES and triton.missing() is None
    return triton.Triton().products if there else None


def closed(product: Tensor, gate: Tensor) -> Tensor:
    """Return the product with the gate, where NaN and infinity times a closed gate are zero too.

    One sum tells whether the product holds NaN or infinity; testing every number would cost as much as the product. On
    a GPU every number is tested, because waiting for the sum would cost more.
    """
    if product.device.type != "cpu":
        return torch.where(gate != 0, product, 0)
    if product.numel() and not math.isfinite(product.sum().item()):
        return torch.where(gate != 0, product, 0)
    return product


def _mask(pattern: Form, units: int) -> Tensor:
    if not isinstance(pattern, Bits):
        raise TypeError("a number per pair of (B, N) goes with a pattern of bits")
    return mask_of(pattern.rows, units)


def _open(coefficient: Tensor, pattern: Form | None) -> Tensor:
    if pattern is None:
        return coefficient
    return torch.where(_mask(pattern, coefficient.shape[1]), coefficient, 0)


def gathered(coefficient: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return coefficient @ rows + bias, where a zero coefficient leaves its row out even if that is NaN or infinite.

    ``coefficient`` is (R, C), ``rows`` (C, D). One product is formed; only if the result is not finite, the careful sum
    too. On a GPU, where the test would make the host wait, a kernel does it. Without a kernel such a sum is NaN.
    """
    if rows.device.type != "cpu":
        if fused := _fused(rows):
            result = product(coefficient, rows, bias)
            fused.repair(result, coefficient, rows, bias)
            return result
        finite = rows.isfinite()
        spoilt = (coefficient != 0).to(rows.dtype) @ (~finite.all(1)).to(rows.dtype) > 0
        result = product(coefficient, torch.where(finite, rows, 0), bias)
        return result.masked_fill(spoilt.unsqueeze(1), torch.nan)
    result = product(coefficient, rows, bias)
    probe = min(rows, result, key=Tensor.numel)  # a NaN in a row shows in both: look at the smaller
    if probe.numel() and not math.isfinite(probe.sum().item()):
        bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        finite = rows.clone()
        finite[bad] = 0
        result = product(coefficient, finite, bias)
        for index in bad:
            hit = coefficient[:, index] != 0
            result[hit] += coefficient[hit, index, None] * rows[index]
    return result


def product(coefficient: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Return coefficient @ rows + bias."""
    return coefficient @ rows if bias is None else torch.addmm(bias, coefficient, rows)
