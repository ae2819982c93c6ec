"""What relaxed units share: a temperature, and the relaxation at this temperature."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatelet._checks import check_finite, check_positive, is_transformed
from gatelet.estimators._kinds import Kind


def keep(module: nn.Module, value: float | Tensor, name: str = "temperature", positive: bool = True) -> None:
    """Store a number on the module: a float as it is, a tensor as a buffer, an ``nn.Parameter`` to be learned.

    Raises:
        ValueError: for a number that is not above 0 (unless ``positive`` is False), a tensor that is not a floating
            scalar, or one that requires a gradient and is no ``nn.Parameter``: its gradient would be lost.
    """
    if not isinstance(value, Tensor):
        setattr(module, name, check_positive(value, name) if positive else check_finite(value, name))
        return
    if value.dim() or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating scalar, not a tensor of shape {tuple(value.shape)}, {value.dtype}")
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif value.requires_grad:
        raise ValueError(f"{name} requires a gradient: pass an nn.Parameter, which the module can own")
    else:
        module.register_buffer(name, value.clone())
    if positive:
        _check_above_zero(value, name)


def _check_above_zero(value: Tensor, name: str) -> None:
    # As for the logits: the value is tested where that needs no synchronisation.
    if value.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed(value):
        return
    check_positive(value.item(), name)


def at(value: float | Tensor, dtype: torch.dtype, name: str = "temperature") -> float | Tensor:
    """Return a temperature in this dtype, after a check that training has not moved it to 0 or below."""
    if isinstance(value, Tensor):
        _check_above_zero(value, name)
        return value.to(dtype)
    return value


def relax(z: Float[Tensor, "*lead N"], temperature: float | Tensor, kind: Kind) -> Float[Tensor, "*lead N"]:
    """Return the relaxed gates of perturbed logits z: σ(z/τ), or the corresponding map of the kind."""
    return kind.relax(z, at(temperature, z.dtype))
