"""The Triton products as functions of tensors: memory, forms, sizes of tiles. Import this module only to run them."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels.backends import _pairs
from gatelet.kernels.backends.triton import FEW, SMALLEST_LIST, kernels
from gatelet.kernels.pattern import Bits, ByUnit, Form, Lists, words

INTERPRETED = not isinstance(kernels.pattern, triton.runtime.JITFunction)
WARPS = 8
"""For tiles of products: with four warps, their accumulators and addresses do not fit into the registers."""
PROGRAMS = 264
"""About as many programs as a large GPU (132 multiprocessors) runs at a time, if they are large."""
FEW_PROGRAMS = 2048
"""About as many as keep it busy with reading a few rows."""
SPAN = 128
"""Units that such a program reads at a time."""
LIST_WORDS = 16
"""Words of examples that are made into a list at a time."""
CHUNK = 1 << 24
"""Bytes of x that programs running at the same time share, in a cache of about that size."""
SHARED = 160 << 10
"""Bytes of shared memory that a multiprocessor has where the larger tiles run."""


class Few(NamedTuple):
    """How ``dots`` of few examples runs.

    Attributes:
        span: units of a program.
        depth: bytes of their rows that are read at a time.
        warps, stages: of a program, as Triton names them.
    """

    span: int
    depth: int
    warps: int
    stages: int


FEW_DOTS = {1: Few(1, 4096, 1, 1), FEW: Few(16, 256, 2, 4)}
"""By the number of examples that a tile has."""

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# Tiles that fit into the shared memory of any GPU with bfloat16: (examples or units, the other side, depth).
_TILES = {2: (128, 128, 64), 4: (64, 64, 32), 8: (32, 32, 32)}


@dataclass(frozen=True)
class GroupLists:
    """The examples of each group.

    Attributes:
        examples: (G, B) int32, each row's first ones are the examples that have the group open, ascending.
        starts: (G, ⌈B/64⌉ + 1) int32, where in that row the examples of each word of 64 start; last, their number.
        group: units per group.
    """

    examples: Tensor
    starts: Tensor
    group: int


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, args: tuple[Any, ...], **meta: Any) -> None:
    """Run a kernel on the device of ``like``; ``meta`` is what it is compiled for."""
    if 0 in grid:
        return
    # In the interpreter, NaN and overflow are silent, as on a GPU.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext(), torch.cuda.device_of(like):
        kernel[grid](*args, **meta)


def _precision() -> str:
    """Return how float32 is multiplied, by torch's setting for matrix products."""
    matmul = torch.backends.cuda.matmul
    try:
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    except AttributeError:  # torch before 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"


def _types(dtype: torch.dtype) -> dict[str, Any]:
    """Return the types in which a product of this dtype is summed and multiplied."""
    factor = _TYPES[dtype]
    if INTERPRETED and dtype == torch.bfloat16:  # numpy has none; its products are exact in float32
        factor = tl.float32
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "DOT": factor,
        "PRECISION": _precision() if dtype == torch.float32 else "ieee",
    }


def _sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _power(count: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << (count - 1).bit_length()))


def pattern(gate: Tensor, units: int) -> Bits:
    """Return the pattern of gates (B, G) by example and by unit."""
    return _promised(gate, units).written()


def promise(gate: Tensor, units: int, keep: bool) -> Bits | None:
    """Return the pattern of gates where it is needed: for groups with lists, and for few examples with gradients."""
    few, listed = len(gate) <= FEW, units // max(gate.shape[1], 1) >= SMALLEST_LIST
    return _promised(gate, units) if (keep if few else listed) else None


def _promised(gate: Tensor, units: int) -> Bits:
    batch, gates = gate.shape
    rows = gate.new_empty((batch, words(units)), dtype=torch.int64)
    cols = gate.new_empty((units, words(batch)), dtype=torch.int64)
    return Bits(rows, cols, units // max(gates, 1), pending=gate, write=_write)


def _write(gate: Tensor, rows: Tensor, cols: Tensor) -> None:
    (batch, gates), units = gate.shape, len(cols)
    sizes = (batch, units, gates, units // max(gates, 1), rows.shape[1], cols.shape[1])
    launch(kernels.pattern, (cols.shape[1], rows.shape[1]), gate, (gate.contiguous(), rows, cols, *sizes))


def _listed(pattern: Form | None) -> GroupLists | None:
    """Return the examples of each group; None where groups are too small or examples too few for lists."""
    if not isinstance(pattern, Bits) or pattern.group < SMALLEST_LIST or len(pattern.rows) <= FEW:
        return None
    if pattern.notes is None:
        batch, gates = len(pattern.rows), len(pattern.cols) // pattern.group
        if pattern.pending is None:
            cols = pattern.cols[:: pattern.group].contiguous()
        else:  # one bit per gate, instead of one per unit
            rows = pattern.rows.new_empty((batch, words(gates)))
            cols = pattern.cols.new_empty((gates, words(batch)))
            _write(pattern.pending, rows, cols)
        examples = cols.new_empty((gates, batch), dtype=torch.int32)
        starts = cols.new_empty((gates, words(batch) + 1), dtype=torch.int32)
        launch(kernels.lists, (gates,), cols, (cols, examples, starts, batch, words(batch)), WORDS=LIST_WORDS)
        pattern.notes = GroupLists(examples, starts, pattern.group)
    found: GroupLists = pattern.notes
    return found


def _rows(pattern: Form | None) -> Tensor | None:
    return pattern.written().rows if isinstance(pattern, Bits) else None


def dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    pattern: Form | None,
    *,
    keep: bool = False,
    activation: str = "identity",
    fill: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return act(x Wᵀ + b) ∘ gate (B, N) at open pairs, zero elsewhere, and, to ``keep``, x Wᵀ + b there.

    Open is what the pattern says or, without one, the gate. Without ``fill``, and with no gate, closed pairs may hold
    anything.
    """
    if isinstance(pattern, Lists):
        return _pair_dots(x, weight, bias, gate, pattern, keep, activation)
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    batch, units = len(x), weight.shape[0]
    if batch <= FEW and not (gate is None and pattern is None):
        return _few_dots(x, weight, bias, gate, _rows(pattern), keep, activation)
    if pattern is None and gate is not None and units // max(gate.shape[1], 1) >= SMALLEST_LIST:
        pattern = _promised(gate, units)
    listed = _listed(pattern)
    if listed is not None:
        return _group_dots(x, weight, bias, gate, listed, keep, activation)
    product = F.linear(x, weight, bias)
    if gate is None and not fill:
        return product, product if keep else x.new_empty(0)
    # If gates are given they say what is open, as they are read anyway.
    rows = _rows(pattern) if gate is None else None
    out = finish(product, gate, rows, activation, in_place=not keep)
    return out, product if keep else x.new_empty(0)


def finish(
    product: Tensor, gate: Tensor | None, rows: Tensor | None, activation: str = "identity", in_place: bool = False
) -> Tensor:
    """Return act(z) ∘ gate at open pairs, zero elsewhere, from z (B, N); the bits or else the gates say what is
    open."""
    batch, units = product.shape
    out = product if in_place else torch.empty_like(product)
    gates = units if gate is None else gate.shape[1]
    group = units // max(gates, 1)
    tile_m, tile_n = _flat_tile(batch, group)
    launch(
        kernels.finish,
        (-(-batch // tile_m), -(-units // tile_n) if group == 1 else gates),
        product,
        (product, gate, rows, out, batch, units, gates, group, words(units)),
        ACTIVATION=activation,
        UNIT=group == 1,
        BM=tile_m,
        BN=tile_n,
        ACC=_types(product.dtype)["ACC"],
    )
    return out


def _flat_tile(batch: int, group: int) -> tuple[int, int]:
    """Return the examples and units that a program of a kernel without products takes."""
    if group == 1:
        tile_m = _power(batch, 1, 16)
        return tile_m, 2048 // tile_m
    tile_n = _power(group, 16, 128)
    return _power(batch, 1, 2048 // tile_n), tile_n


class GroupTile(NamedTuple):
    """How ``dots`` of groups runs: a tile's examples, units and depth; warps and stages; the least words of a chunk."""

    examples: int
    units: int
    depth: int
    warps: int
    stages: int
    least: int


def _group_tile(x: Tensor, units: int, group: int) -> GroupTile:
    tile_m, tile_n, tile_k = _TILES[x.element_size()]
    if x.element_size() > 2:
        return GroupTile(tile_m, tile_n, tile_k, WARPS, 3, 16)
    # A tenth of 2048 examples, which a group has open, fills the larger tile.
    if len(x) >= 2048 and _shared_memory(x.device) >= SHARED:
        return GroupTile(256, tile_n, tile_k, WARPS, 4 if group <= 64 else 3, 32)
    return GroupTile(tile_m, tile_n, tile_k, WARPS // 2, 4 if group <= 64 else 3, 16)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def _few_dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    keep: bool,
    activation: str,
) -> tuple[Tensor, Tensor]:
    (batch, width), units = x.shape, weight.shape[0]
    out = x.new_empty((batch, units))
    pre = x.new_empty((batch, units)) if keep else None
    gates = units if gate is None else gate.shape[1]
    sizes = (batch, units, width, gates, units // max(gates, 1), words(units))
    few = 1 if batch == 1 else FEW
    tile = FEW_DOTS[few]
    launch(
        kernels.few_dots,
        (-(-units // tile.span),),
        x,
        (x, weight, bias, gate, rows, out, pre, *sizes, *weight.stride()),
        ACTIVATION=activation,
        FEW=few,
        SPAN=tile.span,
        BK=_power(width, 16, tile.depth // x.element_size()),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_types(x.dtype),
    )
    return out, x.new_empty(0) if pre is None else pre


def _group_dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    listed: GroupLists,
    keep: bool,
    activation: str,
) -> tuple[Tensor, Tensor]:
    (batch, width), units = x.shape, weight.shape[0]
    out = x.new_zeros((batch, units))  # programs write open pairs alone
    pre = x.new_empty((batch, units)) if keep else None
    tile = _group_tile(x, units, listed.group)
    chunk_words = max(1, min(words(batch), CHUNK // (64 * width * x.element_size())))
    # More and smaller chunks if there are fewer programs than the GPU can run at once.
    chunk_words = max(min(tile.least, chunk_words), min(chunk_words, words(batch) * units // listed.group // PROGRAMS))
    tile_n = _power(listed.group, 16, tile.units)
    gates = units // listed.group
    sizes = (batch, units, width, gates, listed.group, words(batch), chunk_words)
    launch(
        kernels.group_dots,
        (gates * -(-listed.group // tile_n), -(-words(batch) // chunk_words)),
        x,
        (x, weight, bias, gate, listed.examples, listed.starts, out, pre, *sizes, *weight.stride()),
        ACTIVATION=activation,
        BM=tile.examples,
        BN=tile_n,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_types(x.dtype),
    )
    return out, x.new_empty(0) if pre is None else pre


def by_example(
    coefficient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: Form | None,
    gate: Tensor | None = None,
    *,
    own: bool = False,
) -> Tensor:
    """Return y (B, D), y[b] = bias + Σ_n C[b, n] W[n] over open n: as for :func:`dots`, or else where C is not zero."""
    if isinstance(pattern, Lists):
        return _pair_by_example(coefficient, weight, bias, pattern)
    coefficient = _closed(coefficient.contiguous(), pattern, own)
    if len(coefficient) == 1:
        return _one_by_example(coefficient, weight, bias)
    product = coefficient @ weight if bias is None else torch.addmm(bias, coefficient, weight)
    repair(product, coefficient, weight, bias)
    return product


def _closed(coefficient: Tensor, pattern: Form | None, own: bool) -> Tensor:
    """Return the coefficients with zeros at closed pairs. Our kernels already wrote zeros there; others may not."""
    rows = _rows(pattern)
    return coefficient if own or rows is None else finish(coefficient, None, rows)


def _one_by_example(coefficient: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    units, width = weight.shape
    accumulator = _types(weight.dtype)["ACC"]
    tile_d = _power(width, 16, 512 // weight.element_size())
    columns = -(-width // tile_d)
    # Enough parts to keep the GPU busy; each has some spans.
    each = SPAN * max(1, -(-units * columns // (FEW_PROGRAMS * SPAN)))
    count = -(-units // each)
    parts = weight.new_empty((count, width), dtype=_sums_dtype(weight.dtype))
    launch(
        kernels.one_by_example,
        (columns, count),
        weight,
        (coefficient, weight, parts, units, width, *weight.stride(), each),
        SPAN=SPAN,
        SLOTS=16,
        BD=tile_d,
        ACC=accumulator,
    )
    out = weight.new_empty((1, width))
    launch(
        kernels.add_parts,
        (-(-width // 64),),
        weight,
        (parts, bias, out, count, width),
        ACC=accumulator,
        PARTS=32,
        BLOCK=64,
    )
    return out


def repair(product: Tensor, coefficient: Tensor, rows: Tensor, bias: Tensor | None = None) -> None:
    """Form C R + bias (M, D) again, in place, where it is not finite: a row of R with C = 0 may be the cause."""
    (height, depth), width = coefficient.shape, rows.shape[1]
    tile = 128
    flags = None
    grid = tiles = -(-height // tile) * -(-width // tile)
    if rows.numel() < product.numel():  # a bad number shows in both: look at the smaller
        grid = min(tiles, PROGRAMS)
        flags = product.new_empty((-(-depth // tile), -(-width // tile)), dtype=torch.int32)
        launch(
            kernels.spoilt,
            tuple(flags.shape),
            rows,
            (rows, flags, depth, width, *rows.stride()),
            BM=tile,
            BD=tile,
            num_warps=WARPS,
        )
    sizes = (height, depth, width, 0 if flags is None else flags.numel())
    launch(
        kernels.repair,
        (grid,),
        product,
        (
            *(product, coefficient, rows, bias, flags, *sizes),
            *(*product.stride(), *coefficient.stride(), *rows.stride()),
        ),
        BM=tile,
        BD=tile,
        num_warps=WARPS,
        ACC=_types(rows.dtype)["ACC"],
    )


def by_unit(
    coefficient: Tensor,
    x: Tensor,
    pattern: Form | None,
    *,
    need_rows: bool = True,
    need_sum: bool = False,
    transposed: bool = False,
    own: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return V, V[n] = Σ_b C[b, n] x[b] over open b, and the sums Σ_b C[b, n]; None for what is not needed.

    V is (N, D), or ``transposed`` (D, N).
    """
    if isinstance(pattern, Lists):
        return _pair_by_unit(coefficient, x, pattern, need_rows, need_sum, transposed)
    coefficient, x = coefficient.contiguous(), x.contiguous()
    listed = _listed(pattern)
    if listed is not None:
        return (
            _group_by_unit(coefficient, x, listed, transposed) if need_rows else None,
            _group_sums(coefficient, listed) if need_sum else None,
        )
    coefficient = _closed(coefficient, pattern, own)
    out = None
    if need_rows:
        out = x.t() @ coefficient if transposed else coefficient.t() @ x
        repair(out.t() if transposed else out, coefficient.t(), x)
    return out, coefficient.sum(0) if need_sum else None


def _group_by_unit(coefficient: Tensor, x: Tensor, listed: GroupLists, transposed: bool) -> Tensor:
    (batch, width), units = x.shape, coefficient.shape[1]
    out = x.new_empty((width, units) if transposed else (units, width))
    _, tile_d, tile_m = _TILES[x.element_size()]
    tile_n = _power(listed.group, 16, tile_d)
    columns = -(-width // tile_d)
    # Neighbouring tiles that read few enough columns of x for the cache.
    across = _power(CHUNK // max(1, batch * tile_d * x.element_size()), 1, 1 << (columns.bit_length() - 1))
    launch(
        kernels.group_by_unit,
        (across * (units // listed.group) * -(-listed.group // tile_n), -(-columns // across)),
        x,
        (
            *(coefficient, x, listed.examples, listed.starts, out, None),
            *(batch, units, width, listed.group, words(batch)),
            *((1, units) if transposed else (width, 1)),
        ),
        BN=tile_n,
        BD=tile_d,
        BM=tile_m,
        ACROSS=across,
        num_warps=WARPS if tile_n > 64 else WARPS // 2,
        num_stages=3 if tile_n > 64 else 4,
        **_types(x.dtype),
    )
    return out


def _group_sums(coefficient: Tensor, listed: GroupLists) -> Tensor:
    batch, units = coefficient.shape
    sums = coefficient.new_empty(units)
    tile = _power(listed.group, 16, 128)
    launch(
        kernels.group_by_unit,
        (units // listed.group * -(-listed.group // tile), 1),
        coefficient,
        (
            *(coefficient, None, listed.examples, listed.starts, None, sums),
            *(batch, units, 1, listed.group, words(batch), 1, 1),
        ),
        BN=tile,
        BD=16,
        BM=64,
        ACROSS=1,
        **_types(coefficient.dtype),
    )
    return sums


def pointwise(
    upper: Tensor,
    pre: Tensor,
    gate: Tensor,
    pattern: Form | None,
    wide: Form | None = None,
    *,
    need_gate: bool,
    need_coefficient: bool,
    activation: str = "identity",
    into: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return C = g · gate · act'(z), zero at closed pairs, and the gate's gradient (B, G), on ``wide`` if given."""
    if isinstance(pattern, Lists):
        return _pairs.pointwise(upper, pre, gate, need_gate, need_coefficient, activation)
    upper, gate = upper.contiguous(), gate.contiguous()
    (batch, units), gates = upper.shape, gate.shape[1]
    coefficient = torch.empty_like(upper) if need_coefficient else None
    slopes = into if into is not None else torch.empty_like(gate) if need_gate else None
    group = units // max(gates, 1)
    tile_m, tile_n = _flat_tile(batch, group)
    read = pre if need_gate or activation != "identity" else None
    launch(
        kernels.pointwise,
        (-(-batch // tile_m), -(-units // tile_n) if group == 1 else gates),
        upper,
        (upper, read, gate, _rows(wide), coefficient, slopes, batch, units, gates, group, words(units)),
        ACTIVATION=activation,
        UNIT=group == 1,
        BM=tile_m,
        BN=tile_n,
        ACC=_types(upper.dtype)["ACC"],
    )
    return coefficient, slopes


# -------------------------------------------------------------------- lists of open units


def _pair_dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    lists: Lists,
    keep: bool,
    activation: str,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    (batch, width), pairs = x.shape, len(lists.units)
    pre = x.new_empty(pairs)
    each = -(-pairs // max(batch, 1))  # pairs per example, on average; the host does not know more
    at_a_time = 4
    parts = max(1, -(-each // at_a_time))
    launch(
        kernels.pair_dots,
        (batch, parts),
        x,
        (x, weight, bias, lists.starts, lists.units, pre, width, parts, *weight.stride()),
        KP=at_a_time,
        BK=_power(width, 16, 2048 // x.element_size()),
        num_warps=2,
        ACC=_types(x.dtype)["ACC"],
    )
    return _pairs.finish(pre, gate, activation), pre if keep else x.new_empty(0)


def _pair_by_example(values: Tensor, weight: Tensor, bias: Tensor | None, lists: Lists) -> Tensor:
    batch, width = lists.batch, weight.shape[1]
    out = weight.new_empty((batch, width))
    _pair_sums(values, weight, bias, lists.starts, lists.units, None, out, None)
    return out


def _pair_by_unit(
    values: Tensor, x: Tensor, lists: Lists, need_rows: bool, need_sum: bool, transposed: bool
) -> tuple[Tensor | None, Tensor | None]:
    turned = turn(lists)
    out = sums = None
    if need_rows:
        shape = (x.shape[1], lists.count) if transposed else (lists.count, x.shape[1])
        out = x.new_empty(shape)
    if need_sum:
        sums = x.new_empty(lists.count)
    target = out.t() if out is not None and transposed else out
    _pair_sums(values, x.contiguous(), None, turned.starts, turned.examples, turned.places, target, sums)
    return out, sums


def touched(values: Tensor, x: Tensor, lists: Lists) -> Tensor:
    """Return V as a coalesced sparse COO tensor of the units that any pair names. Their number reaches the host."""
    turned = turn(lists)
    names, counts = torch.unique_consecutive(lists.units[turned.places], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = x.new_empty((len(names), x.shape[1]))
    _pair_sums(values, x.contiguous(), None, starts, turned.examples, turned.places, rows, None)
    shape = (lists.count, x.shape[1])
    return torch.sparse_coo_tensor(names[None], rows, shape, is_coalesced=True, check_invariants=False)


def turn(lists: Lists) -> ByUnit:
    """Return the pairs by unit, with ascending examples. The host does not wait."""
    if lists.by_unit is None:
        # A stable sort of numbers half as wide takes half as long.
        found, places = torch.sort(lists.units.int(), stable=True)
        every = torch.arange(lists.count + 1, device=found.device, dtype=torch.int32)
        example = torch.searchsorted(lists.starts[1:], places, right=True)
        lists.by_unit = ByUnit(torch.searchsorted(found, every), example, places)
    return lists.by_unit


def _pair_sums(
    values: Tensor,
    table: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    names: Tensor,
    places: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Write Σ values · table[name] + bias over every list to ``out`` (lists, D), the sums of the values to ``sums``."""
    width = table.shape[1]
    # Lists of examples are few and long; lists of units are many and short.
    at_a_time, each, warps = (8, 512, 1) if places is None else (1, 4096, 2)
    tile_d = _power(width, 16, each // table.element_size())
    launch(
        kernels.pair_sums,
        (len(starts) - 1, max(1, -(-width // tile_d)) if out is not None else 1),
        table,
        (
            *(values.contiguous(), table, bias, starts, names, places, out, sums, width),
            *(*table.stride(), *((0, 0) if out is None else out.stride())),
        ),
        KP=at_a_time,
        BD=tile_d,
        num_warps=warps,
        ACC=_types(table.dtype)["ACC"],
    )


def sample(
    logits: Tensor, noise: Tensor | None, seed: Tensor | None, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gates (B, G), their pattern by example and by unit, and how many examples have each gate open."""
    logits, noise = logits.contiguous(), None if noise is None else noise.contiguous()
    batch, gates = logits.shape
    units = gates * group
    gate = torch.empty_like(logits)
    rows = logits.new_empty((batch, words(units)), dtype=torch.int64)
    cols = logits.new_empty((units, words(batch)), dtype=torch.int64)
    counts = logits.new_zeros(gates, dtype=torch.int32)
    sizes = (batch, units, gates, group, rows.shape[1], cols.shape[1])
    launch(
        kernels.sample,
        (cols.shape[1], rows.shape[1]),
        logits,
        (logits, noise, seed, gate, rows, cols, counts, *sizes),
        ACC=_types(logits.dtype)["ACC"],
    )
    return gate, rows, cols, counts
