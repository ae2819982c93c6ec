"""The products on lists of open pairs in plain PyTorch, on any device. They copy one row per pair."""

import torch
from torch import Tensor

from gatelet.kernels.backends._activations import activate, slope
from gatelet.kernels.pattern import Lists


def dots(x: Tensor, weight: Tensor, bias: Tensor | None, lists: Lists) -> Tensor:
    """Return ⟨x[b], W[n]⟩ + bias[n] of each pair, (P,). Autograd differentiates it."""
    found = (x[lists.examples()] * weight[lists.units]).sum(-1)
    return found if bias is None else found + bias[lists.units]


def by_example(values: Tensor, weight: Tensor, bias: Tensor | None, lists: Lists) -> Tensor:
    """Return y (B, D), y[b] = bias + Σ value · W[n] over the list of b. Autograd differentiates it."""
    out = weight.new_zeros((lists.batch, weight.shape[1]))
    out = out.index_add(0, lists.examples(), values.unsqueeze(1) * weight[lists.units])
    return out if bias is None else out + bias


def by_unit(values: Tensor, x: Tensor, lists: Lists, need_rows: bool, need_sum: bool) -> tuple[Tensor | None, ...]:
    """Return V (N, D), V[n] = Σ value · x[b] over the pairs of n, and the sums of their values (N,)."""
    rows = sums = None
    if need_rows:
        rows = x.new_zeros((lists.count, x.shape[1]))
        rows.index_add_(0, lists.units, values.unsqueeze(1) * x[lists.examples()])
    if need_sum:
        sums = values.new_zeros(lists.count).index_add_(0, lists.units, values)
    return rows, sums


def touched(values: Tensor, x: Tensor, lists: Lists) -> Tensor:
    """Return V as a coalesced sparse COO tensor of the units that any pair names."""
    names, place = torch.unique(lists.units, return_inverse=True)
    rows = x.new_zeros((len(names), x.shape[1])).index_add_(0, place, values.unsqueeze(1) * x[lists.examples()])
    shape = (lists.count, x.shape[1])
    return torch.sparse_coo_tensor(names[None], rows, shape, is_coalesced=True, check_invariants=False)


def finish(z: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Return act(z) ∘ gate of pairs."""
    value = activate(z, activation)
    return value if gate is None else value * gate


def pointwise(
    upper: Tensor, pre: Tensor, gate: Tensor, need_gate: bool, need_coefficient: bool, activation: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return what ``Products.pointwise`` returns, for pairs that are all open."""
    coefficient = slopes = None
    if need_coefficient:
        coefficient = upper * gate
        if activation != "identity":
            coefficient = coefficient * slope(pre, activation)
    if need_gate:
        slopes = upper * activate(pre, activation)
    return coefficient, slopes
