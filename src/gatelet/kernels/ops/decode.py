"""Inference for one token at a time with fixed weights: most of the work is prepared once, so that a call is short."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from gatelet._checks import check_choice
from gatelet.kernels.backends import BACKENDS, rows
from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.rows import Decided, Gated, Int8Rows, Rows
from gatelet.kernels.ops._checks import check_tensor
from gatelet.kernels.ops._declare import plain

FEW = 4
"""Up to this many tokens run one by one."""
KINDS = (torch.float32, torch.bfloat16)


class Decode:
    """A map of tokens x (..., D), for inference: a kernel for few tokens, plain PyTorch for many.

    Args:
        width: D.
        prepare: takes the module of kernels and returns the map of x (D,), float32; its weights must be contiguous.
        dense: maps x (..., D).

    Raises:
        ValueError, TypeError: at the call, for an input of another width, dtype or device.
        RuntimeError: at the call, where autograd records what happens to x, since there is no gradient.
    """

    def __init__(self, width: int, prepare: Callable[[Any], Callable[[Tensor], Tensor]], dense: Any) -> None:
        self.width, self.dense = width, dense
        self.run: Callable[[Tensor], Tensor] | None = None
        if not BACKENDS["numba"].missing():
            from gatelet.kernels.backends.numba import decode

            self.run = prepare(decode)

    def __call__(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead N"]:
        """Return the map's value, in x's dtype."""
        check_tensor(x, "x")
        if x.dtype not in KINDS or x.device.type != "cpu":
            raise TypeError(f"x must be float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")
        if x.dim() == 0 or x.shape[-1] != self.width:
            raise ValueError(f"x must have {self.width} features in its last dimension, not shape {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("rows for inference have no gradient: call them under torch.no_grad()")
        if self.run is None or x.numel() > FEW * self.width or not x.numel() or not plain(x):
            out: Tensor = self.dense(x)
            return out.to(x.dtype)
        own = x if x.dtype is torch.float32 else x.float()
        if own.numel() == self.width:
            out = self.run(own.contiguous())
        else:
            out = torch.stack([self.run(each) for each in own.reshape(-1, self.width).contiguous().unbind()])
        return out.view(*x.shape[:-1], out.shape[-1]).to(x.dtype)


def decode_linear(weight: Rows, bias: Float32[Tensor, " N"] | None = None) -> Decode:
    """Return the map x Wᵀ + b for inference, W in few bytes, float32 sums.

    Args:
        weight: (N, D), float32 or bfloat16, or from :func:`gatelet.kernels.int8_rows`. This tensor is read, not a copy:
            it may be changed in place, but must stay contiguous.
        bias: (N,) float32, or None.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    >>> decode_linear(torch.ones(3, 2))(torch.ones(1, 2))
    tensor([[2., 2., 2.]])
    """
    units, width = _shape(weight, "weight")
    _check_vector(bias, "bias", units)
    ones = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    return Decode(
        width,
        lambda run: run.linear(weight, bias),
        lambda x: rows.linear(x, weight, bias, ones),
    )


def decode_input_linear(
    weight: Rows,
    bias: Float32[Tensor, " N"] | None,
    norm: Float32[Tensor, " D"],
    limit: Float32[Tensor, "..."],
) -> Decode:
    """Return the map Σ_d x_d · W[d] + b over the inputs with norm_d·|x_d| > limit; rows of the others are not read.

    Args:
        weight: (D, N), a row per input; otherwise as for :func:`decode_linear`.
        bias: (N,) or None.
        norm: (D,), what sizes are multiplied by before they are compared.
        limit: (1,).

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    >>> keep_large = decode_input_linear(torch.ones(3, 2), None, torch.ones(3), torch.tensor([0.5]))
    >>> keep_large(torch.tensor([[1.0, 0.1, -3.0]]))
    tensor([[-2., -2.]])
    """
    width, units = _shape(weight, "weight")
    _check_vector(bias, "bias", units)
    _check_vector(norm, "norm", width)
    _check_vector(limit, "limit", 1)

    def dense(x: Tensor) -> Tensor:
        kept = torch.where(x.abs().float() * norm > limit, x, 0)
        return rows.input_linear(kept, weight, bias)

    return Decode(width, lambda run: run.input_linear(weight, bias, norm, limit), dense)


def decode_ffn(given: Decided) -> Decode:
    """Return the map of a feed-forward block that decides by itself which units are open (:class:`Decided`).

    Rows of closed units are not read: those of W1 and W2 where W_g x decides, those of all three where int8 copies do.

    Args:
        given: the block's weights, all stored in one type, and what decides; tensors are read, not copied.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit, or an unknown activation.

    >>> given = Decided(torch.ones(2, 2), None, None, None, torch.ones(2, 1), None, "relu",
    ...                 scale=torch.tensor([1.0, 0.1]), norm=torch.ones(2), limits=torch.tensor([0.5, -1.0]))
    >>> decode_ffn(given)(torch.ones(1, 2))
    tensor([[2.]])
    """
    units, width = _shape(given.first, "first")
    if given.down.shape[0] != units:
        raise ValueError(f"down must have a row for each of the {units} units, not {given.down.shape[0]}")
    outputs = _shape(given.down, "down")[1]
    for name, each in (("third", given.third), ("near_first", given.near_first), ("near_third", given.near_third)):
        if each is not None and _shape(each, name) != (units, width):
            raise ValueError(f"{name} must have shape {(units, width)}, as first has, not {tuple(each.shape)}")
    kinds = {_kind(each) for each in (given.first, given.third, given.down) if each is not None}
    if len(kinds) > 1:
        raise TypeError(f"first, third and down must have one type, not {' and '.join(sorted(map(str, kinds)))}")
    if (given.near_third is not None) != (given.near_first is not None and given.third is not None):
        raise ValueError("near_first and near_third: give copies of all maps into the units, or of none")
    check_choice(given.activation, ACTIVATIONS, "activation")
    for name in ("first_bias", "third_bias", "scale", "norm"):
        _check_vector(getattr(given, name), name, units)
    _check_vector(given.down_bias, "down_bias", outputs)
    _check_vector(given.limits, "limits", 2)
    return Decode(width, lambda run: run.ffn(given), lambda x: rows.decided_ffn(given, x))


def gated_block(given: Gated) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None:
    """Return the map of a feed-forward block with a gater network (:class:`Gated`), for one token at a time.

    The map takes x (D,) and the counts of open units (N,), int64, to which it adds, and returns the output (O,) and the
    gates (N,). It returns None, and counts nothing, if a number is not finite, the threshold is NaN or W2 has changed.
    The result is None instead of a map if no kernel can read these weights.
    """
    matrices = (given.hidden, given.gates, given.first, given.third, given.down)
    tensors = (*matrices, given.hidden_bias, given.gates_bias, given.first_bias, given.third_bias, given.down_bias)
    read = [each for each in (*tensors, given.threshold) if each is not None]
    if BACKENDS["numba"].missing() or not all(_lies_plain(each) for each in read):
        return None
    from gatelet.kernels.backends.numba import network

    return network.prepare(given)


def _lies_plain(tensor: Tensor) -> bool:
    """Whether this is a contiguous, non-empty float32 tensor on the CPU."""
    return (
        tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() > 0
    )


def _kind(weight: Rows) -> torch.dtype:
    return weight.values.dtype if isinstance(weight, Int8Rows) else weight.dtype


def _shape(weight: Rows, name: str) -> tuple[int, int]:
    """Return the size of a weight that a kernel can read where it lies."""
    values = weight.values if isinstance(weight, Int8Rows) else weight
    if not isinstance(weight, Int8Rows):
        check_tensor(values, name, 2)
        if values.dtype not in KINDS:
            raise TypeError(f"{name} must be float32, bfloat16 or from int8_rows, not {values.dtype}")
    if values.device.type != "cpu" or not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous and on the CPU")
    return values.shape[0], values.shape[1]


def _check_vector(value: Tensor | None, name: str, size: int) -> None:
    if value is None:
        return
    check_tensor(value, name, 1)
    if value.shape != (size,) or value.dtype is not torch.float32 or not value.is_contiguous():
        raise ValueError(f"{name} must be {size} contiguous float32 numbers, not {tuple(value.shape)} {value.dtype}")
