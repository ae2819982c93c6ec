"""Which (example, unit) pairs are open: as bits, or as sorted lists. Imports nothing of gatelet."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Bits:
    """One bit per pair, in both orders; together 1/16 of a float32 output's size.

    The size does not depend on how many pairs are open, so nothing has to be counted before memory is reserved, and
    ``torch.compile`` can plan. A word of one order times a word of the other is a block of 64 × 64 pairs.

    Attributes:
        rows: by example, (B, ⌈N/64⌉) int64; bit i of word w is unit 64·w + i.
        cols: by unit, (N, ⌈B/64⌉) int64; bit i of word w is example 64·w + i.
        group: so many consecutive units open together.
        pending: gates (B, N / group) whose bits are still to be written: the first product that runs does it.
        notes: what a backend derives from the bits and reads again.
    """

    __slots__ = ("cols", "group", "notes", "pending", "rows")

    def __init__(self, rows: Tensor, cols: Tensor, group: int = 1, pending: Tensor | None = None) -> None:
        self.rows, self.cols, self.group, self.pending = rows, cols, group, pending
        self.notes: Any = None

    def tensors(self) -> list[Tensor]:
        """Return what an op of torch takes instead; :func:`form_of` is the way back."""
        return [self.rows, self.cols]


class Lists:
    """The open units of each example, ascending, one example after the other (the index half of a CSR matrix).

    Number i of P pairs is unit ``units[i]`` of the example b with starts[b] ≤ i < starts[b + 1]. What belongs to the
    pairs (gates, coefficients, results) is a tensor (P,) in the same order: no tensor (B, N) need exist.

    Attributes:
        starts: (B + 1,) int64.
        units: (P,) int64.
        count: N, the number of units there are.
        by_unit: the same pairs unit by unit, None until a product wants them so.
    """

    __slots__ = ("by_unit", "count", "starts", "units")

    def __init__(self, starts: Tensor, units: Tensor, count: int, by_unit: "ByUnit | None" = None) -> None:
        self.starts, self.units, self.count, self.by_unit = starts, units, count, by_unit

    def tensors(self) -> list[Tensor]:
        """Return what an op of torch takes instead; :func:`form_of` is the way back."""
        # One number that a tensor's size tells without being read: N.
        return [self.starts, self.units, self.starts.new_empty((0, self.count))]


@dataclass(frozen=True)
class ByUnit:
    """The pairs of :class:`Lists` unit by unit, the examples of each ascending.

    Attributes:
        starts: (N + 1,) int64.
        examples: (P,) int64.
        places: (P,) int64, where each pair stands in the order by example.
    """

    starts: Tensor
    examples: Tensor
    places: Tensor


Form = Bits | Lists


def form_of(tensors: list[Tensor], group: int = 1) -> Form | None:
    """Return the pattern from what its ``tensors()`` gave; None for no tensors."""
    if not tensors:
        return None
    if len(tensors) == 2:
        return Bits(tensors[0], tensors[1], group)
    return Lists(tensors[0], tensors[1], tensors[2].shape[1])


@dataclass(frozen=True)
class OpenPattern:
    """Which units are open for which examples: built once, read by every product of forward and backward.

    Attributes:
        form: :class:`Bits` or :class:`Lists`.
        lead: the leading shape of the gates; B is its product.
        units: N.
    """

    form: Form
    lead: torch.Size
    units: int

    @property
    def rows(self) -> Tensor:
        """The bits by example, (B, ⌈N/64⌉) int64; bit i of word w is unit 64·w + i."""
        return self._bits.rows

    @property
    def cols(self) -> Tensor:
        """The bits by unit, (N, ⌈B/64⌉) int64; bit i of word w is example 64·w + i."""
        return self._bits.cols

    @property
    def _bits(self) -> Bits:
        if not isinstance(self.form, Bits):
            raise TypeError("this pattern was given as lists of units and has no bits")
        return self.form


def flat(tensor: Tensor) -> Tensor:
    """Return (..., C) as (B, C); unlike ``reshape(-1, C)`` also for no examples or no columns."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def words(count: Any) -> Any:
    """Return how many words hold ``count`` bits (an int, or torch's symbol for one when tracing)."""
    return -(-count // 64)


def bits_of(mask: Tensor) -> Tensor:
    """Return the bits of a mask (R, C) as words (R, ⌈C/64⌉).

    >>> bits_of(torch.tensor([[True, False, True]]))
    tensor([[5]])
    """
    height, width = mask.shape
    padded = torch.nn.functional.pad(mask, (0, 64 * words(width) - width)).view(height, words(width), 64)
    # Bit 63 is the sign: the sum wraps around to it.
    return (padded.long() << torch.arange(64, device=mask.device)).sum(-1)


def mask_of(rows: Tensor, units: int) -> Tensor:
    """Return the mask (B, N) whose bits these are."""
    flags = (rows.unsqueeze(-1) >> torch.arange(64, device=rows.device)) & 1
    return flags.flatten(1)[:, :units].bool()


def spread(gate: Tensor, units: int) -> Tensor:
    """Return one number per unit (B, N) from one per group (B, G)."""
    return gate if gate.shape[1] == units else gate.repeat_interleave(units // gate.shape[1], dim=1)
