"""open_pattern: which units are open, built once for several products."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.kernels import choose
from gatelet.kernels.backends import BACKENDS, Layer
from gatelet.kernels.ops._checks import check_tensor
from gatelet.kernels.ops._declare import plain, refuse_transforms, transformed
from gatelet.kernels.pattern import Bits, Form, OpenPattern, flat, mask_of, pattern_of_indices, words


def open_pattern(gate: Float[Tensor, "*lead G"], group_size: int = 1) -> OpenPattern:
    """Return the pattern of the gates that are not zero (NaN is not), by example and by unit.

    Args:
        gate: (..., G).
        group_size: consecutive units that share a gate; N = G · group_size.

    >>> open_pattern(torch.tensor([[1.0, 0.0, 2.0]])).rows
    tensor([[5]])
    """
    check_tensor(gate, "gate")
    refuse_transforms("open_pattern", gate)
    units = gate.shape[-1] * group_size
    return OpenPattern(pattern_of(flat(gate.detach()), units, "auto"), gate.shape[:-1], units)


def pattern_of(gate: Tensor, units: int, backend: str) -> Form:
    """Return the pattern of gates (B, G) by example and by unit."""
    if transformed(gate):
        found: Form = BACKENDS["dense"].products.pattern(gate, units)
        return found
    if plain(gate):
        found = _builder(gate, units, backend).pattern(gate, units)
        return found
    rows, cols = torch.ops.gatelet.open_pattern(gate, units, backend)
    return Bits(rows, cols, units // max(gate.shape[1], 1))


def checked(pattern: Any, units: int, lead: torch.Size | None, what: str) -> OpenPattern:
    """Return the pattern, made from indices if these were given; raise unless it has this many units.

    ``lead`` is the leading shape it must have, None for any; ``what`` names the argument that needs it.
    """
    if isinstance(pattern, Tensor):
        pattern = pattern_of_indices(pattern, units, "pattern")
    if not isinstance(pattern, OpenPattern):
        raise TypeError(
            "pattern must be an OpenPattern, indices (..., K) or a sparse CSR tensor, not be a "
            f"{type(pattern).__name__}"
        )
    if pattern.units != units or (lead is not None and pattern.lead != lead):
        wanted = (*(pattern.lead if lead is None else lead), units)
        raise ValueError(f"pattern is for gates {(*pattern.lead, pattern.units)}, but {what} need {wanted}")
    return pattern


def check_values(values: Any, pattern: OpenPattern, name: str) -> None:
    """Raise unless there is one number per pair of a pattern of lists."""
    check_tensor(values, name)
    if values.shape != pattern.values_shape:
        raise ValueError(
            f"{name} must have a number for each of pattern's pairs, {tuple(pattern.values_shape)}, "
            f"but has shape {tuple(values.shape)}"
        )


def mask_of_form(form: Form, units: int) -> Tensor:
    """Return the mask (B, N) of a pattern of bits."""
    if not isinstance(form, Bits):
        raise TypeError("a pattern of lists has no mask")
    return mask_of(form.rows, units)


def _builder(gate: Tensor, units: int, backend: str) -> Any:
    group = units // max(gate.shape[1], 1)
    return choose.builder(backend, Layer(gate.shape[0], 0, units, group, gate.dtype, gate.device, False))


def _build(gate: Tensor, units: int, backend: str) -> tuple[Tensor, Tensor]:
    found = _builder(gate, units, backend).pattern(gate, units)
    return found.rows, found.cols


_open_pattern = torch.library.custom_op(
    "gatelet::open_pattern",
    _build,
    mutates_args=(),
    schema="(Tensor gate, int units, str backend) -> (Tensor, Tensor)",
)


@_open_pattern.register_fake
def _(gate: Tensor, units: Any, backend: str) -> tuple[Tensor, Tensor]:
    batch = gate.shape[0]
    rows = gate.new_empty((batch, words(units)), dtype=torch.int64)
    return rows, gate.new_empty((units, words(batch)), dtype=torch.int64)
