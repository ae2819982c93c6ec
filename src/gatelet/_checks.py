"""The checks of arguments that several modules share: each raises at the call and names the argument."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

_MOST = torch.iinfo(torch.int64).max
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_LONG = 128
"""Integers of more bits are not written out."""


class NotFiniteError(ValueError, FloatingPointError):
    """A given tensor, or one that a model computed in training, holds NaN or infinity."""


def check_logits(logits: Any, name: str = "logits") -> None:
    """Raise unless ``logits`` is a floating tensor (..., N) without NaN and infinity.

    The values are tested where that needs no synchronisation: on the CPU, outside of ``torch.compile``
    and of the ``torch.func`` transforms.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, not {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension (..., N), not be a scalar")
    if not at_hand(logits):
        return
    # One sum over the values; the exact test runs only if the sum is not finite.
    if not math.isfinite(logits.detach().sum().item()) and not logits.detach().isfinite().all():
        bad = int((~logits.detach().isfinite()).sum())
        raise NotFiniteError(f"{name} holds {bad} values that are NaN or infinite (of {logits.numel()})")


def at_hand(tensor: Tensor) -> bool:
    """Whether reading the tensor's values costs nothing: on the CPU, not traced, not transformed, not fake."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not values_hidden(tensor)


def values_hidden(tensor: Tensor) -> bool:
    """Whether the code must not depend on the tensor's values: transformed, fake, or traced for other values."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if torch._C._get_tracing_state() is not None or _is_wrapped(tensor):
        return True
    return is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether this runs in a mode whose tensors hold no numbers (FakeTensorMode, make_fx)."""
    return torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode(tensor) is not None


def is_transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform (vmap, grad) wraps the tensor, so that its values cannot be looked at."""
    return not torch.compiler.is_compiling() and bool(_is_wrapped(tensor))


def check_input(x: Any, weight: Tensor | Callable[[], Tensor], name: str = "x") -> None:
    """Raise unless ``x`` is an input (..., D) of a linear map with this weight (N, D), without NaN and infinity."""
    check_logits(x, name)
    if callable(weight):  # quantised modules return their weight when called
        weight = weight()
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} must have {weight.shape[1]} features in its last dimension, but has shape {tuple(x.shape)}"
        )
    if x.dtype != weight.dtype and not weight.is_quantized and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} has dtype {x.dtype}, but the layer's weights have {weight.dtype}: convert one of them")


def check_rate(value: float, name: str = "target_rate") -> float:
    """Return ``value`` if it lies strictly between 0 and 1; raise otherwise."""
    if not _is_number(value) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, not {_shown(value)}")
    return float(value)


def check_positive(value: float, name: str) -> float:
    """Return ``value`` if it is a finite number above 0; raise otherwise."""
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, not {_shown(value)}")
    return float(value)


def check_weight(value: float, name: str) -> float:
    """Return ``value`` if it is a finite number of at least 0; raise otherwise."""
    if not _is_number(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, not {_shown(value)}")
    return float(value)


def check_finite(value: float, name: str) -> float:
    """Return ``value`` if it is a finite number; raise otherwise."""
    if not _is_number(value):
        raise ValueError(f"{name} must be a finite number, not {_shown(value)}")
    return float(value)


def check_count(value: int, name: str) -> int:
    """Return ``value`` if it is an integer of at least 1 that tensors can count to; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {_shown(value)}")
    if value > _MOST:
        raise ValueError(f"{name} must be an integer below 2⁶³, not {_shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold, and not a boolean."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # no float() first: it raises for a long integer


def _shown(value: Any) -> str:
    long = isinstance(value, int) and value.bit_length() > _LONG
    return f"an integer of {value.bit_length()} bits" if long else repr(value)


def check_choice(value: Any, choices: Iterable[str], name: str) -> str:
    """Return ``value`` if it is one of ``choices``; raise with the nearest ones otherwise."""
    known = list(choices)
    if value in known:
        return str(value)
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown {name} {value!r}{hint} (known: {', '.join(known)})")


def check_noise(noise: Tensor, shape: torch.Size, name: str = "noise") -> None:
    """Raise unless ``noise`` is a tensor of the given shape."""
    if not isinstance(noise, Tensor) or noise.shape != shape:
        found = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"{name} must be a tensor of shape {tuple(shape)}, not {found}")
