"""open_pattern: which units are open, built once for several products."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatelet.kernels import _dispatch
from gatelet.kernels._checks import check_tensor
from gatelet.kernels._pattern import OpenPattern, bits_of, flat, spread, words


def open_pattern(gate: Float[Tensor, "*lead G"], group_size: int = 1) -> OpenPattern:
    """Return the pattern of the gates that are not zero (NaN is not), by example and by unit.

    Args:
        gate: (..., G).
        group_size: consecutive units that share a gate; N = G · group_size.

    >>> open_pattern(torch.tensor([[1.0, 0.0, 2.0]])).rows
    tensor([[5]])
    """
    check_tensor(gate, "gate")
    _dispatch.refuse_transforms("open_pattern", gate)
    units = gate.shape[-1] * group_size
    rows, cols = pattern_of(flat(gate.detach()), units, "auto")
    return OpenPattern(rows, cols, gate.shape[:-1], units)


def pattern_of(gate: Tensor, units: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return the pattern of gates (B, G) by example and by unit."""
    found: tuple[Tensor, Tensor] = (_build if _dispatch.plain(gate) else torch.ops.gatelet.open_pattern)(
        gate, units, backend
    )
    return found


def _build(gate: Tensor, units: int, backend: str) -> tuple[Tensor, Tensor]:
    if _dispatch.runs_numba(backend, gate):
        from gatelet.kernels import _sparse

        return _sparse.pattern(gate.contiguous(), units)
    if _dispatch.runs_triton(backend, gate):
        from gatelet.kernels import _triton

        return _triton.pattern(gate.contiguous(), units)
    mask = spread(gate, units) != 0
    return bits_of(mask), bits_of(mask.t())


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
