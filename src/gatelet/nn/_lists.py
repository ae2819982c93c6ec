"""Autograd over lists of open (example, latent) pairs, and the three products it uses.

The products are the kernels' (:mod:`gatelet.kernels.backends`) where these take the tensors, else PyTorch's operators
for embeddings, which form no row per pair, on any device and inside of tracing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatelet.kernels.backends import BACKENDS
from gatelet.kernels.choose import compiles
from gatelet.kernels.ops._declare import plain
from gatelet.kernels.pattern import Lists

TOGETHER = 1024
"""Rows of a gradient that are worked on at once: they stay in the caches, and no second tensor of its size exists."""


def compiled(*tensors: Tensor) -> bool:
    """Return whether the compiled kernels take these tensors."""
    kind = tensors[0].dtype
    known = kind in (torch.float32, torch.float64) and all(
        each.device.type == "cpu" and each.dtype == kind and each.is_contiguous() for each in tensors
    )
    return known and plain(*tensors) and compiles()


def dots(x: Tensor, weight: Tensor, lists: Lists) -> Tensor:
    """Return ⟨x[b], W[n]⟩ of each pair, (P,).

    It is the gradient of :func:`by_example` in its coefficients, for which PyTorch has an operator.
    """
    if not len(lists.units):
        return x.new_zeros(0)
    if compiled(x, weight):
        return BACKENDS["numba"].products.dots(x, weight, None, None, lists)[0]  # type: ignore[no-any-return]
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), weight, lists.units, lists.starts, lists.examples(), 0
    )
    return found


def by_example(values: Tensor, weight: Tensor, lists: Lists) -> Tensor:
    """Return y (B, D), the sum of the open latents' rows."""
    if compiled(values, weight):
        return BACKENDS["numba"].products.by_example(values, weight, None, lists)  # type: ignore[no-any-return]
    return F.embedding_bag(
        lists.units, weight, lists.starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def by_unit(values: Tensor, x: Tensor, lists: Lists) -> tuple[Tensor, Tensor]:
    """Return the latents that are open somewhere (R,), ascending, and the sums of their examples' rows (R, D)."""
    if compiled(values, x):
        return _rows(BACKENDS["numba"].products.touched(values, x, lists))
    ordered, order = lists.units.sort(stable=True)
    latents, counts = torch.unique_consecutive(ordered, return_counts=True)
    rows = F.embedding_bag(
        *(lists.examples()[order], x, F.pad(counts.cumsum(0), (1, 0))),
        mode="sum",
        per_sample_weights=values[order],
        include_last_offset=True,
    )
    return latents, rows


def sum_backward(slope: Tensor, weight: Tensor, values: Tensor, lists: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Return from the gradient of :func:`by_example` those of its values, and of its weight: latents and their rows."""
    if compiled(slope, weight, values):
        found, rows = BACKENDS["numba"].products.dots_and_by_unit(slope, weight, values, lists, sparse=True)
        return found, *_rows(rows)
    return dots(slope, weight, lists), *by_unit(values, slope, lists)


def _rows(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the rows that a sparse matrix holds, and these rows."""
    return sparse._indices()[0], sparse._values()


def rows_as_gradient(latents: Tensor, rows: Tensor, like: Tensor, sparse: bool) -> Tensor:
    """Return rows as the gradient of a matrix: a coalesced sparse tensor, or a dense one with zeros elsewhere."""
    if sparse:
        return torch.sparse_coo_tensor(latents[None], rows, like.shape, is_coalesced=True, check_invariants=False)
    return torch.zeros_like(like).index_copy_(0, latents, rows)


class ListedLinear(torch.autograd.Function):
    """z = ⟨x[b], W[n]⟩ + bias[n] at the listed pairs, whose values are known already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, lists: Lists, sparse: bool
    ) -> Tensor:
        """Return the values."""
        ctx.save_for_backward(x, weight)
        ctx.lists, ctx.sparse = lists, sparse
        return values.view_as(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias, from the pairs alone."""
        x, weight = ctx.saved_tensors
        lists, (for_x, for_weight, for_bias) = ctx.lists, ctx.needs_input_grad[:3]
        slope = slope.contiguous()
        found_x = by_example(slope, weight, lists) if for_x else None
        found_weight = rows_as_gradient(*by_unit(slope, x, lists), weight, ctx.sparse) if for_weight else None
        found_bias = weight.new_zeros(lists.count).index_add_(0, lists.units, slope) if for_bias else None
        return found_x, found_weight, found_bias, None, None, None


class ListedSum(torch.autograd.Function):
    """y[b] = Σ value · W[n] over the listed pairs; for unit rows the gradient's parallel part can be removed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, lists: Lists, sparse: bool, unit_rows: bool) -> Tensor:
        """Return y."""
        ctx.save_for_backward(values, weight)
        ctx.lists, ctx.sparse, ctx.unit_rows = lists, sparse, unit_rows
        return by_example(values, weight, lists)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values and weight, from the pairs alone."""
        values, weight = ctx.saved_tensors
        lists, (for_values, for_weight) = ctx.lists, ctx.needs_input_grad[:2]
        slope = slope.contiguous()
        if not for_weight:
            return dots(slope, weight, lists) if for_values else None, None, None, None, None
        found_values, latents, rows = sum_backward(slope, weight, values, lists)
        if ctx.unit_rows:
            tangent_(rows, weight, latents)
        return found_values, rows_as_gradient(latents, rows, weight, ctx.sparse), None, None, None


def tangent_(gradient: Tensor, weight: Tensor, latents: Tensor) -> None:
    """Remove from each latent's gradient (R, D), in place, the part that is parallel to its row of the weight."""
    for part, names in zip(gradient.split(TOGETHER), latents.split(TOGETHER), strict=True):
        rows = weight[names]
        share = torch.linalg.vecdot(part, rows) / torch.linalg.vecdot(rows, rows)
        part.addcmul_(rows, share[:, None], value=-1)


class UnitRows(torch.autograd.Function):
    """The identity for a matrix whose rows keep their length; parts along the rows leave its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        """Return the matrix."""
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep the rows."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """Return the tangent part."""
        (weight,) = ctx.saved_tensors
        share = (slope * weight).sum(-1, keepdim=True) / (weight * weight).sum(-1, keepdim=True)
        tangent: Tensor = slope - share * weight
        return tangent
