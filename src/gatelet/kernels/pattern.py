"""Which (example, unit) pairs are open: as bits, or as sorted lists. Imports nothing of gatelet."""

from collections.abc import Callable
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
        group: how many consecutive units open together.
        pending: gates (B, N / group) whose bits are still to be written: the first product that reads them does it.
        write: writes them, from gates to rows and cols.
        notes: what a backend derives from the bits and reads again.
    """

    __slots__ = ("cols", "group", "notes", "pending", "rows", "write")

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        group: int = 1,
        pending: Tensor | None = None,
        write: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.rows, self.cols, self.group, self.pending, self.write = rows, cols, group, pending, write
        self.notes: Any = None

    def written(self) -> "Bits":
        """Return the pattern with its bits written."""
        if self.pending is not None and self.write is not None:
            self.write(self.pending, self.rows, self.cols)
            self.pending = None
        return self

    def tensors(self) -> list[Tensor]:
        """Return what an op of torch takes instead; :func:`form_of` is the way back."""
        self.written()
        return [self.rows, self.cols]


class Lists:
    """The open units of each example, ascending, one example after the other (the index half of a CSR matrix).

    Number i of P pairs is unit ``units[i]`` of the example b with starts[b] ≤ i < starts[b + 1]. What belongs to the
    pairs (gates, coefficients, results) is a tensor (P,) in the same order: no tensor (B, N) need exist.

    Attributes:
        starts: (B + 1,) int64. If every example has K > 0 units, K may be given; the tensor is made when it is read.
        length: K, or the starts that were given.
        units: (P,) int64.
        count: N, the number of units.
        by_unit: the same pairs unit by unit, None until a product needs them.
        notes: what a backend derives from the lists and reads again.
        given: units that were not checked yet; None after the check. The first product that reads them checks them, or
            else the first access to ``units``.
        name: the name of the argument, for errors.
        watched: tensors of a caller, who might change them, each with its version.
    """

    __slots__ = ("_units", "by_unit", "count", "given", "length", "name", "notes", "watched")

    def __init__(
        self,
        starts: Tensor | int,
        units: Tensor,
        count: Any,
        by_unit: "ByUnit | None" = None,
        *,
        looked: bool = True,
        name: str = "indices",
        watched: tuple[tuple[Tensor, int], ...] = (),
    ) -> None:
        self.length, self._units, self.count, self.by_unit = starts, units, count, by_unit
        self.given, self.name, self.watched = None if looked else units, name, watched
        self.notes: Any = None

    @property
    def starts(self) -> Tensor:
        """Where each example's list starts, and where the last one ends."""
        if not isinstance(self.length, Tensor):
            self.length = fixed_starts(self.batch, self.length, self._units.device)
        return self.length

    @property
    def units(self) -> Tensor:
        """The units; raises unless they ascend within each example and are among 0 … N − 1, as they were given."""
        if any(each._version != version for each, version in self.watched):
            raise RuntimeError(
                f"{self.name}: was changed in place after it was given; give a copy (clone()), or make a new pattern"
            )
        if self.given is not None:
            _check_lists(self.starts, self._units, self.count, self.name)
            self.given = None
        return self._units

    @property
    def pairs(self) -> Any:
        """P."""
        return self._units.shape[0]

    @property
    def batch(self) -> Any:
        """B."""
        return self.length.shape[0] - 1 if isinstance(self.length, Tensor) else self.pairs // self.length

    def examples(self) -> Tensor:
        """Return the example of each pair, (P,)."""
        every = torch.arange(self.batch, device=self.starts.device)
        return every.repeat_interleave(self.starts.diff(), output_size=len(self.units))

    def tensors(self) -> list[Tensor]:
        """Return what an op of torch takes instead; :func:`form_of` is the way back."""
        # N as the size of a tensor, so that no value has to be read.
        return [self.starts, self.units, self.starts.new_empty((0, self.count))]


@dataclass(frozen=True)
class ByUnit:
    """The pairs of :class:`Lists` unit by unit, the examples of each ascending.

    Attributes:
        starts: (N + 1,) int64.
        examples: (P,) int64.
        places: (P,) int64, the place of each pair in the order by example.
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
    """Which units are open for which examples; built once, and read by every product of the forward and backward pass.

    Attributes:
        form: :class:`Bits` or :class:`Lists`.
        lead: the leading shape of the gates; B is its product.
        units: N.
        most: K, where every example has as many open units; None otherwise.
    """

    form: Form
    lead: torch.Size
    units: int
    most: int | None = None

    @staticmethod
    def from_indices(indices: Tensor, units: int) -> "OpenPattern":
        """Return the pattern of given open units: no tensor of examples × units is made.

        What belongs to the open pairs (gates, values, their gradients) then is a tensor of the indices' shape or, for a
        CSR tensor, of its ``values()``'.

        Args:
            indices: (..., K) integers, ascending within each example; or a sparse CSR tensor (B, N), whose non-zeros
                are the open pairs. On the CPU they are looked at; on a GPU that would make the host wait.
            units: N.

        Raises:
            TypeError: for indices that are not a tensor of integers, or units that are not an integer.
            ValueError: for indices out of range, repeated in an example or not ascending, or a CSR tensor of another
                width or one whose parts do not fit.
            RuntimeError: by an op or its backward pass, if indices were changed in place after this.

        >>> OpenPattern.from_indices(torch.tensor([[0, 2], [1, 3]]), units=4).values_shape
        torch.Size([2, 2])
        """
        if not isinstance(indices, Tensor):
            raise TypeError(f"indices must be a torch.Tensor, not {type(indices).__name__}")
        if isinstance(units, bool) or not isinstance(units, int | torch.SymInt) or units < 0:
            raise TypeError(f"units must be an integer of at least 0, not {units!r}")
        return pattern_of_indices(indices, units, "indices", now=True)

    @property
    def values_shape(self) -> torch.Size:
        """The shape of what belongs to the open pairs, where the pattern was given as lists."""
        if not isinstance(self.form, Lists):
            raise TypeError("this pattern is one of bits; values for its pairs have shape (..., N)")
        return torch.Size((self.form.pairs,) if self.most is None else (*self.lead, self.most))

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


def fixed_starts(batch: Any, most: Any, device: Any = None) -> Tensor:
    """Return the starts of lists of ``most`` units for each of ``batch`` examples."""
    if most == 0:
        return torch.zeros(batch + 1, dtype=torch.int64, device=device)
    return torch.arange(0, batch * most + 1, most, device=device)


def pattern_of_indices(indices: Tensor, units: int, name: str, *, now: bool = False) -> OpenPattern:
    """Return the pattern of given open units, which errors call ``name``; see :meth:`OpenPattern.from_indices`.

    On a CPU they are checked ``now``, or by the first product.
    """
    looks = indices.device.type == "cpu" and not torch.compiler.is_compiling()
    starts: Tensor | int
    if indices.layout == torch.sparse_csr:
        if indices.dim() != 2 or indices.shape[1] != units:
            raise ValueError(f"{name} is a CSR tensor of shape {tuple(indices.shape)}, not (B, {units})")
        starts, names = indices.crow_indices().long(), indices.col_indices().long()
        if looks:
            check_starts(starts, len(names), f"{name}: the CSR tensor's crow_indices()")
        lead, most = indices.shape[:1], None
    else:
        _check_integers(indices, name)
        lead, most = indices.shape[:-1], indices.shape[-1]
        names = indices.reshape(-1)
        if names.dtype != torch.int64:
            names = names.long()
        starts = most if looks and most else fixed_starts(lead.numel(), most, indices.device)
    lists = Lists(starts, names, units, looked=not looks, name=name, watched=watched(starts, names))
    if now and looks:
        _ = lists.units
    return OpenPattern(lists, lead, units, most)


def watched(*tensors: Tensor | int | None) -> tuple[tuple[Tensor, int], ...]:
    """Return the tensors with their versions, by which torch tells that one was written to in place."""
    if torch.compiler.is_compiling():
        return ()
    return tuple((each, each._version) for each in tensors if isinstance(each, Tensor) and not each.is_inference())


def _check_integers(indices: Tensor, name: str) -> None:
    """Raise unless these are integers (..., K)."""
    if indices.layout != torch.strided:
        raise TypeError(f"{name}: a sparse tensor must be CSR, not {indices.layout}; to_sparse_csr() makes one")
    dtype = indices.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or indices.dim() == 0:
        raise TypeError(f"{name} must be integers (..., K), not {dtype} {tuple(indices.shape)}")


def check_starts(starts: Tensor, pairs: int, what: str) -> None:
    """Raise unless each example's list begins where the last one ends, in all from 0 to P."""
    if starts[0] != 0 or starts[-1] != pairs or bool((starts[1:] < starts[:-1]).any()):
        raise ValueError(f"{what} must ascend from 0 to the number of indices, {pairs}")


def _check_lists(starts: Tensor, units: Tensor, count: int, name: str) -> None:
    """Raise unless every example's list is ascending and within 0 … N − 1."""
    if not len(units):
        return
    wrong = units[1:] <= units[:-1]
    begins = starts[1:-1]
    wrong[begins[(begins > 0) & (begins < len(units))] - 1] = False
    low, high = int(units.min()), int(units.max())
    if low < 0 or high >= count:
        raise ValueError(f"{name} must lie in 0 … {count - 1}, but {low if low < 0 else high} is among them")
    if wrong.any():
        place = int(wrong.nonzero()[0])
        first, second = int(units[place]), int(units[place + 1])
        example = int(torch.searchsorted(starts, place, right=True)) - 1
        how = f"repeats unit {first}" if first == second else f"has unit {first} before unit {second}"
        raise ValueError(f"{name} must be ascending within each example, but example {example} {how}")


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
