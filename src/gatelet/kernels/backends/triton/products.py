"""The Triton products as functions of tensors: memory, forms, sizes of tiles. Import this module only to run them."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gatelet.kernels.backends.triton import FEW, SMALLEST_LIST, kernels
from gatelet.kernels.pattern import Bits, Form, words

INTERPRETED = not isinstance(kernels.pattern, triton.runtime.JITFunction)
SPAN, WIDE_SPAN, SLOTS = 32, 128, 16
"""Units that a program for few examples looks at at a time, in ``dots`` (which reads whole rows of weights) and in
``by_example`` (which reads parts of them); and open ones of these that it takes at a time."""
WARPS = 8
"""For tiles of products: with four, their accumulators and addresses do not fit into the registers."""
PROGRAMS, FEW_PROGRAMS = 256, 2048
"""About as many programs as keep a large GPU (132 multiprocessors) busy with tiles, and with reading a few rows."""
LIST_WORDS = 16
"""Words of examples that are made into a list at a time."""
LARGE_BATCH = 1024
"""From so many examples on a tile has twice as many: a group's weights are read less often then."""

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
    # Interpreted, what is NaN or overflows does so silently, as on a GPU.
    with np.errstate(all="ignore") if INTERPRETED else nullcontext(), torch.cuda.device_of(like):
        kernel[grid](*args, **meta)


def _precision() -> str:
    """Return how float32 is multiplied: as torch's own setting for matrix products says."""
    matmul = torch.backends.cuda.matmul
    try:
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    except AttributeError:  # torch before 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"


def _types(dtype: torch.dtype) -> dict[str, Any]:
    """Return the types in which a product of this dtype adds up and multiplies."""
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
    gate = gate.contiguous()
    batch, gates = gate.shape
    rows = gate.new_empty((batch, words(units)), dtype=torch.int64)
    cols = gate.new_empty((units, words(batch)), dtype=torch.int64)
    group = units // max(gates, 1)
    sizes = (batch, units, gates, group, rows.shape[1], cols.shape[1])
    launch(kernels.pattern, (cols.shape[1], rows.shape[1]), gate, (gate, rows, cols, *sizes))
    return Bits(rows, cols, group)


build = pattern


def promise(gate: Tensor, units: int, keep: bool) -> Bits | None:
    """Return the pattern of gates; None for few examples of inference, whose kernels read the gates themselves."""
    return pattern(gate, units) if keep or len(gate) > FEW else None


def _listed(pattern: Form | None) -> GroupLists | None:
    """Return the examples of each group; None where groups are too small, or examples too few, to go by lists."""
    if not isinstance(pattern, Bits) or pattern.group < SMALLEST_LIST or pattern.rows.shape[0] <= FEW:
        return None
    if pattern.notes is None:
        cols, batch, group = pattern.cols, pattern.rows.shape[0], pattern.group
        (units, col_words) = cols.shape
        gates = units // group
        examples = cols.new_empty((gates, batch), dtype=torch.int32)
        starts = cols.new_empty((gates, col_words + 1), dtype=torch.int32)
        launch(kernels.lists, (gates,), cols, (cols, examples, starts, batch, group, col_words), WORDS=LIST_WORDS)
        pattern.notes = GroupLists(examples, starts, group)
    found: GroupLists = pattern.notes
    return found


def _rows(pattern: Form | None) -> Tensor | None:
    return pattern.rows if isinstance(pattern, Bits) else None


def _unit_tiles(units: int, most: int, listed: GroupLists | None) -> tuple[int, int]:
    """Return how many units a tile has, and how many tiles there are."""
    if listed is None:
        return most, -(-units // most)
    size = _power(listed.group, 16, most)
    return size, len(listed.examples) * -(-listed.group // size)


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

    Open is what the pattern says or, without one, the gate. Without ``fill`` closed pairs may be left as they are.
    """
    x, gate = x.contiguous(), None if gate is None else gate.contiguous()
    (batch, width), units = x.shape, weight.shape[0]
    if pattern is None and gate is not None and batch > FEW:
        pattern = build(gate, units)
    rows, listed = _rows(pattern), _listed(pattern)
    # Programs of listed examples write open pairs alone.
    allocate = x.new_zeros if listed is not None and fill else x.new_empty
    out = allocate((batch, units))
    pre = allocate((batch, units)) if keep else None
    gates = units if gate is None else gate.shape[1]
    group = units // max(gates, 1) if listed is None else listed.group
    if batch <= FEW:
        sizes = (batch, units, width, gates, group, words(units))
        launch(
            kernels.few_dots,
            (-(-units // SPAN),),
            x,
            (x, weight, bias, gate, rows, out, pre, *sizes, *weight.stride()),
            ACTIVATION=activation,
            FEW=FEW,
            SPAN=SPAN,
            SLOTS=SLOTS,
            BK=_power(width, 16, 512 // x.element_size()),
            **_types(x.dtype),
        )
    else:
        tile_m, tile_n, tile_k = _TILES[x.element_size()]
        tile_m = tile_m if batch >= LARGE_BATCH else min(tile_m, 64)
        tile_n, blocks = _unit_tiles(units, tile_n, listed)
        examples, starts = (None, None) if listed is None else (listed.examples, listed.starts)
        tile_sizes = (batch, units, width, gates, group, words(units), words(batch))
        launch(
            kernels.dots,
            (-(-batch // tile_m), blocks),
            x,
            (x, weight, bias, gate, rows, examples, starts, out, pre, *tile_sizes, *weight.stride()),
            ACTIVATION=activation,
            BM=tile_m,
            BN=tile_n,
            BK=tile_k,
            num_warps=WARPS,
            **_types(x.dtype),
        )
    return out, x.new_empty(0) if pre is None else pre


def by_example(
    coefficient: Tensor, weight: Tensor, bias: Tensor | None, pattern: Form | None, gate: Tensor | None = None
) -> Tensor:
    """Return y (B, D) with y[b] = bias + Σ_n C[b, n] W[n] over open n; open as for :func:`dots`."""
    coefficient = coefficient.contiguous()
    batch, (units, width) = coefficient.shape[0], weight.shape
    rows, listed = _rows(pattern), _listed(pattern)
    if batch <= FEW:
        return _few_by_example(coefficient, weight, bias, None if rows is not None else gate, rows)
    tile_m, tile_d, tile_k = _TILES[weight.element_size()]
    tile_m = tile_m if batch >= LARGE_BATCH else min(tile_m, 64)
    columns = -(-width // tile_d)
    if listed is None:
        out = weight.new_empty((batch, width))
        sizes = (batch, units, width, words(units))
        launch(
            kernels.by_example,
            (-(-batch // tile_m), columns),
            weight,
            (coefficient, weight, bias, rows, out, *sizes, *weight.stride()),
            GIVEN=False,
            BM=tile_m,
            BD=tile_d,
            num_warps=WARPS,
            **_types(weight.dtype),
        )
        return out
    sums = weight.new_zeros((batch, width), dtype=_sums_dtype(weight.dtype))
    if bias is not None:
        sums += bias
    col_words = words(batch)
    each = max(1, -(-col_words * columns // PROGRAMS))
    list_sizes = (batch, units, width, len(listed.examples), listed.group, col_words, each)
    launch(
        kernels.group_by_example,
        (columns, -(-col_words // each)),
        weight,
        (coefficient, weight, listed.examples, listed.starts, sums, *list_sizes, *weight.stride()),
        # A share of the examples has about a tenth of them open.
        BM=_power(8 * each, 16, 64),
        BD=tile_d,
        BK=_power(listed.group, 16, tile_k),
        num_warps=WARPS,
        **_types(weight.dtype),
    )
    return sums.to(weight.dtype)


def _few_by_example(
    coefficient: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, rows: Tensor | None
) -> Tensor:
    batch, (units, width) = coefficient.shape[0], weight.shape
    types = _types(weight.dtype)
    tile_d = _TILES[weight.element_size()][1]
    columns = -(-width // tile_d)
    # Enough parts to keep the GPU busy, of some spans each.
    each = WIDE_SPAN * max(1, -(-units * columns // (FEW_PROGRAMS * WIDE_SPAN)))
    count = -(-units // each)
    gates = units if gate is None else gate.shape[1]
    parts = weight.new_empty((count, batch, width), dtype=_sums_dtype(weight.dtype))
    sizes = (batch, units, width, gates, units // max(gates, 1), words(units))
    launch(
        kernels.few_by_example,
        (columns, count),
        weight,
        (coefficient, weight, gate, rows, parts, *sizes, *weight.stride(), each),
        FEW=FEW,
        SPAN=WIDE_SPAN,
        SLOTS=SLOTS,
        BD=tile_d,
        **types,
    )
    out = weight.new_empty((batch, width))
    size = out.numel()
    launch(
        kernels.add_parts,
        (-(-size // 1024),),
        weight,
        (parts, bias, out, count, size, width),
        BLOCK=1024,
        ACC=types["ACC"],
    )
    return out


def repair(product: Tensor, coefficient: Tensor, weight: Tensor) -> None:
    """Compute C W (B, D) again, in place, where it is not finite: the row of a unit with C = 0 may have been."""
    (batch, units), width = coefficient.shape, weight.shape[1]
    tile_m, tile_d, _ = _TILES[weight.element_size()]
    sizes = (batch, units, width, words(units))
    launch(
        kernels.by_example,
        (-(-batch // tile_m), -(-width // tile_d)),
        weight,
        (coefficient.contiguous(), weight, None, None, product, *sizes, *weight.stride()),
        GIVEN=True,
        BM=tile_m,
        BD=tile_d,
        num_warps=WARPS,
        **_types(weight.dtype),
    )


def by_unit(
    coefficient: Tensor,
    x: Tensor,
    pattern: Form | None,
    *,
    need_rows: bool = True,
    need_sum: bool = False,
    transposed: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return V, V[n] = Σ_b C[b, n] x[b] over open b, and the sums Σ_b C[b, n]; None for what is not needed.

    V is (N, D), or ``transposed`` (D, N).
    """
    if not isinstance(pattern, Bits):
        raise TypeError("this product reads a pattern of bits")
    coefficient, x = coefficient.contiguous(), x.contiguous()
    cols, listed = pattern.cols, _listed(pattern)
    (batch, width), units = x.shape, coefficient.shape[1]
    out = x.new_empty((width, units) if transposed else (units, width)) if need_rows else None
    sums = x.new_empty(units) if need_sum else None
    tile_n, tile_d, _ = _TILES[x.element_size()]
    tile_n, blocks = _unit_tiles(units, tile_n, listed)
    group = 1 if listed is None else listed.group
    examples, starts = (None, None) if listed is None else (listed.examples, listed.starts)
    launch(
        kernels.by_unit,
        (blocks, max(1, -(-width // tile_d)) if need_rows else 1),
        x,
        (
            *(coefficient, x, cols, examples, starts, out, sums, batch, units, width, group, words(batch)),
            *((1, units) if transposed else (width, 1)),
        ),
        BN=tile_n,
        BD=tile_d,
        num_warps=WARPS,
        **_types(x.dtype),
    )
    return out, sums


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
    """Return C = g · gate · act'(z) at open pairs, and the gate's gradient (B, G), on the wide pattern if given."""
    upper, gate = upper.contiguous(), gate.contiguous()
    rows, wide_rows = _rows(pattern), _rows(wide)
    (batch, units), gates = upper.shape, gate.shape[1]
    coefficient = torch.empty_like(upper) if need_coefficient else None
    slopes = into if into is not None else torch.empty_like(gate) if need_gate else None
    group = units // max(gates, 1)
    tile_n = 64 if group == 1 else _power(group, 16, 128)
    sizes = (batch, units, gates, group, words(units))
    launch(
        kernels.pointwise,
        (-(-batch // 16), -(-units // tile_n) if group == 1 else gates),
        upper,
        (upper, pre, gate, rows, wide_rows, coefficient, slopes, *sizes),
        ACTIVATION=activation,
        UNIT=group == 1,
        BM=16,
        BN=tile_n,
        ACC=_types(upper.dtype)["ACC"],
    )
    return coefficient, slopes


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
