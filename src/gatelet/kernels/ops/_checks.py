"""The checks of arguments that the ops share. Each raises at the call and names the argument."""

from typing import Any

from torch import Tensor


def check_tensor(value: Any, name: str, dims: int | None = None) -> None:
    """Raise unless ``value`` is a floating tensor, with ``dims`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, not {value.dtype}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, but has shape {tuple(value.shape)}")


def check_same(value: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Raise unless both have one dtype and device."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, but {other_name} has {other.dtype}: convert one of them")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, but {other_name} is on {other.device}")


def check_affine(x: Any, weight: Any, bias: Any, names: tuple[str, str, str] = ("x", "weight", "bias")) -> None:
    """Raise unless x (..., D), weight (N, D) and bias (N,) or None form an affine map."""
    check_tensor(x, names[0])
    check_tensor(weight, names[1], 2)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{names[0]} must have {weight.shape[1]} features in its last dimension, as {names[1]} "
            f"{tuple(weight.shape)} has, but has shape {tuple(x.shape)}"
        )
    check_same(x, weight, names[0], names[1])
    if bias is not None:
        check_tensor(bias, names[2], 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{names[2]} must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
        check_same(bias, weight, names[2], names[1])


def check_gate(gate: Any, x: Tensor, units: int, name: str = "gate") -> None:
    """Raise unless ``gate`` is (..., G) with x's leading shape and G dividing N."""
    check_tensor(gate, name)
    if gate.dim() == 0 or gate.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of x, {tuple(x.shape[:-1])}, but has shape {tuple(gate.shape)}"
        )
    groups = gate.shape[-1]
    if (groups == 0) != (units == 0) or (groups and units % groups):
        raise ValueError(
            f"{name} must have one number per unit or per group of units: {groups} gates do not divide {units} units"
        )
    if gate.device != x.device:
        raise ValueError(f"{name} is on {gate.device}, but x is on {x.device}")


def check_second(
    hidden: Tensor, weight: Tensor, bias: Any, outputs: int, names: tuple[str, str, str] = ("hidden", "w2", "b2")
) -> None:
    """Raise unless hidden units, weight and bias (O,) or None have one dtype and device, and the bias its length."""
    check_same(hidden, weight, names[0], names[1])
    if bias is not None:
        check_tensor(bias, names[2], 1)
        if bias.shape[0] != outputs:
            raise ValueError(f"{names[2]} must have shape ({outputs},), not {tuple(bias.shape)}")
        check_same(bias, weight, names[2], names[1])
