"""Inference for a few examples over weights of few bytes: only the rows of open units are read."""

import functools
import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from gatelet._checks import check_choice
from gatelet.kernels import choose
from gatelet.kernels.backends import BACKENDS, rows
from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.rows import Int8Rows, Rows
from gatelet.kernels.ops._checks import check_gate, check_tensor
from gatelet.kernels.ops._declare import ORDINARY, plain, recording, untraced
from gatelet.kernels.pattern import flat

EXAMPLES = 16
"""The most examples for which rows are read one by one."""
ACTIVE = (torch.float32, torch.bfloat16)


def narrow_linear(
    x: Float[Tensor, "*lead D"],
    weight: Rows,
    bias: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "*lead G"],
    activation: str = "identity",
    *,
    backend: str = "auto",
) -> Float[Tensor, "*lead N"]:
    """act(x Wᵀ + b) ∘ gate for inference, W stored in few bytes; only its rows of open units are read.

    Numbers are multiplied and added as float32. With more than 16 examples, while tracing, and where Numba's kernels do
    not run, the weight is converted to float32 at every call and everything is computed, which is slower than a float32
    weight.

    Args:
        x: (..., D), float32 or bfloat16.
        weight: (N, D), float32 or bfloat16, or from :func:`gatelet.kernels.int8_rows`.
        bias: (N,) or None.
        gate: (..., G), one number per unit (G = N) or per group of N / G consecutive units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.
        backend: ``"auto"``, ``"dense"``, ``"numba"``.

    Returns:
        (..., N), in x's dtype; zero where closed.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        RuntimeError: where autograd records: there is no gradient.

    >>> from gatelet.kernels import int8_rows
    >>> narrow_linear(torch.ones(1, 2), int8_rows(torch.ones(3, 2)), None, torch.tensor([[1.0, 0.0, 2.0]]))
    tensor([[2., 0., 4.]])
    """
    if backend in ("auto", "numba"):
        found = _at_once(x, weight, bias, gate, activation)
        if found is not None:
            return found
    check_choice(activation, ACTIVATIONS, "activation")
    _check(x, "x", (weight, "weight", 1), (bias, "bias", weight.shape[0]))
    check_gate(gate, x, weight.shape[0])
    _refuse_gradients("narrow_linear", x, weight, bias, gate)
    own = flat(x)
    run = _running(backend, own, weight.shape[0], x, weight, bias, gate)
    out: Tensor = run.linear(own, weight, bias, flat(gate), activation)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _at_once(x: Any, weight: Any, bias: Any, gate: Any, activation: Any) -> Tensor | None:
    """Return the layer's values for one example where nothing is to be found out; None: go the long way.

    Behind a product that empties the caches, each step of the long way takes some microseconds.
    """
    kept, scales = weight if type(weight) is Int8Rows else (weight, None)
    shift, by = x if bias is None else bias, x if scales is None else scales
    for each in (x, kept, gate, shift, by):
        if type(each) not in ORDINARY or not each.is_cpu:
            return None
    if x.dtype is not gate.dtype or x.dtype is not shift.dtype or not untraced() or forward_ad._current_level >= 0:
        return None
    if recording(x, kept, bias, gate, scales) or type(activation) is not str:
        return None
    shapes = (x.shape, kept.shape, None if bias is None else bias.shape, gate.shape)
    run = _fitting(*shapes, None if scales is None else scales.shape, x.dtype, kept.dtype, activation)
    if run is None or not (x.is_contiguous() and kept.is_contiguous() and gate.is_contiguous()):
        return None
    found: Tensor | None = None
    if shift.is_contiguous() and by.is_contiguous() and (scales is None or scales.dtype is torch.float32):
        found = run(x, kept, bias, gate, scales)
    return found


@functools.lru_cache(maxsize=64)
def _fitting(
    x: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    gate: torch.Size,
    scales: torch.Size | None,
    dtype: torch.dtype,
    stored: torch.dtype,
    activation: str,
) -> Any:
    """Return what computes one example of these shapes and dtypes; None if they need checks."""
    if dtype not in ACTIVE or stored not in ((torch.int8,) if scales is not None else ACTIVE):
        return None
    if len(weight) != 2 or not x or not gate or x.numel() != x[-1] or gate.numel() != gate[-1] or x[:-1] != gate[:-1]:
        return None
    units, width = weight
    if x[-1] != width or not width or not gate[-1] or units % gate[-1] or activation not in ACTIVATIONS:
        return None
    if bias not in (None, (units,)) or scales not in (None, (units,)) or BACKENDS["numba"].missing():
        return None
    sizes = (units, width, units // gate[-1], (*x[:-1], units))
    return _kernels().one(*sizes, bits=8 * stored.itemsize, half=dtype == torch.bfloat16, activation=activation)


def narrow_input_linear(
    hidden: Float[Tensor, "*lead N"],
    weight: Rows,
    bias: Float[Tensor, " O"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "*lead O"]:
    """Hidden W + b for inference, W stored in few bytes; only its rows of units that are not zero are read.

    As :func:`narrow_linear` otherwise.

    Args:
        hidden: (..., N), float32 or bfloat16; what is zero is closed.
        weight: (N, O), by unit: the transpose of a linear layer's weight; as in :func:`narrow_linear`.
        bias: (O,) or None.
        backend: ``"auto"``, ``"dense"``, ``"numba"``.

    Returns:
        (..., O), in hidden's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`narrow_linear`.

    >>> narrow_input_linear(torch.tensor([[1.0, 0.0, 3.0]]), torch.ones(3, 2).bfloat16())
    tensor([[4., 4.]])
    """
    _check(hidden, "hidden", (weight, "weight", 0), (bias, "bias", weight.shape[1]))
    _refuse_gradients("narrow_input_linear", hidden, weight, bias)
    own = flat(hidden)
    run = _running(backend, own, weight.shape[0], hidden, weight, bias)
    out: Tensor = run.input_linear(own, weight, bias)
    return out.view(*hidden.shape[:-1], weight.shape[1])


def narrow_ffn(
    x: Float[Tensor, "*lead D"],
    w1: Rows,
    b1: Float[Tensor, " N"] | None,
    gate: Float[Tensor, "*lead G"],
    activation: str,
    w2: Rows,
    b2: Float[Tensor, " O"] | None = None,
    *,
    w3: Rows | None = None,
    b3: Float[Tensor, " N"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "*lead O"]:
    """(act(x W1ᵀ + b1) ∘ (x W3ᵀ + b3) ∘ gate) W2 + b2 for inference, in one kernel that reads open units' rows alone.

    With ``w3`` and ``activation="silu"`` this is SwiGLU; without ``w3`` its factor is left out. As
    :func:`narrow_linear` otherwise.

    Args:
        x: (..., D), float32 or bfloat16.
        w1: (N, D), as in :func:`narrow_linear`; all weights have one type.
        b1: (N,) or None.
        gate: (..., G), one number per unit (G = N) or per group of N / G consecutive units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` or ``"silu"``.
        w2: (N, O), by unit: the transpose of a linear layer's weight.
        b2: (O,) or None.
        w3: (N, D) or None.
        b3: (N,) or None.
        backend: ``"auto"``, ``"dense"``, ``"numba"``.

    Returns:
        (..., O), in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`narrow_linear`.

    >>> x, gate = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 1.0]])
    >>> narrow_ffn(x, torch.ones(3, 2), None, gate, "relu", torch.ones(3, 1), w3=torch.ones(3, 2))
    tensor([[8.]])
    """
    check_choice(activation, ACTIVATIONS, "activation")
    units = w1.shape[0]
    _check(x, "x", (w1, "w1", 1), (b1, "b1", units))
    if w2.shape[0] != units:
        raise ValueError(f"w2 must have a row for each of w1's {units} units, not {w2.shape[0]}")
    _check(x.new_empty((1, units)), "the hidden layer", (w2, "w2", 0), (b2, "b2", w2.shape[1]))
    if w3 is None and b3 is not None:
        raise ValueError("b3 was given without w3")
    if w3 is not None:
        _check(x, "x", (w3, "w3", 1), (b3, "b3", units))
        if w3.shape[0] != units:
            raise ValueError(f"w3 must have a row for each of w1's {units} units, not {w3.shape[0]}")
    kinds = {_kind(each) for each in (w1, w2, w3) if each is not None}
    if len(kinds) > 1:
        raise TypeError(f"w1, w2 and w3 must have one type, not {' and '.join(sorted(map(str, kinds)))}")
    check_gate(gate, x, units)
    _refuse_gradients("narrow_ffn", x, w1, b1, gate, w2, b2, w3, b3)
    own = flat(x)
    run = _running(backend, own, units, x, w1, b1, gate, w2, b2, w3, b3)
    out: Tensor = run.ffn(own, w1, b1, flat(gate), activation, w2, b2, w3, b3)
    return out.view(*x.shape[:-1], w2.shape[1])


def _kind(weight: Rows) -> torch.dtype:
    return weight.values.dtype if isinstance(weight, Int8Rows) else weight.dtype


def _check(x: Any, name: str, weight: tuple[Any, str, int], bias: tuple[Any, str, int]) -> None:
    """Raise unless x's features are the size of the weight's dimension, and dtypes and the bias's size fit."""
    check_tensor(x, name)
    rows_of, weight_name, dim = weight
    if not isinstance(rows_of, Int8Rows):
        check_tensor(rows_of, weight_name, 2)
        if rows_of.dtype not in ACTIVE:
            raise TypeError(f"{weight_name} must be float32, bfloat16 or from int8_rows, not {rows_of.dtype}")
    elif rows_of.scales.shape != rows_of.values.shape[:1]:
        raise ValueError(
            f"{weight_name} must have a scale for each of its {len(rows_of.values)} rows, not {len(rows_of.scales)}"
        )
    if x.dtype not in ACTIVE:
        raise TypeError(f"{name} must be float32 or bfloat16, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != rows_of.shape[dim]:
        raise ValueError(
            f"{name} must have {rows_of.shape[dim]} features in its last dimension, as {weight_name} "
            f"{tuple(rows_of.shape)} has, but has shape {tuple(x.shape)}"
        )
    device = rows_of.values.device if isinstance(rows_of, Int8Rows) else rows_of.device
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but {weight_name} is on {device}")
    value, bias_name, size = bias
    if value is not None:
        check_tensor(value, bias_name, 1)
        if len(value) != size:
            raise ValueError(f"{bias_name} must have shape ({size},), not {tuple(value.shape)}")


def _refuse_gradients(op: str, *values: Rows | None) -> None:
    if recording(*(each for each in values if isinstance(each, Tensor))):
        raise RuntimeError(f"{op} is for inference and has no gradient: call it under torch.no_grad()")


def _running(backend: str, x: Tensor, units: int, *values: Rows | None) -> Any:
    """Return what computes: Numba's kernels or plain PyTorch."""
    choose.check_backend(backend)
    if backend == "triton":
        raise ValueError('backend="triton" has no kernels for weights of few bytes')
    why = None
    if x.device.type != "cpu":
        why = f"the tensors are on {x.device}"
    elif len(x) > EXAMPLES:
        why = f"{len(x)} examples are more than {EXAMPLES}"
    why = why or BACKENDS["numba"].missing()
    if backend == "numba" and why:
        raise ValueError(f'backend="numba" cannot run this: {why}')
    tensors = [part for each in values for part in (each if isinstance(each, Int8Rows) else (each,))]
    if backend == "dense" or why or not plain(*tensors):
        return rows
    return _kernels()


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("gatelet.kernels.backends.numba.narrow")
