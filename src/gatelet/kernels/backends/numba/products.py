"""The Numba products as functions of tensors: memory, sizes of tasks, threads."""

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from gatelet.kernels.backends import _pairs
from gatelet.kernels.backends._activations import ACTIVATIONS
from gatelet.kernels.backends.numba import SMALLEST_GROUP, lists, memory, narrow, turn
from gatelet.kernels.backends.numba import team as _team
from gatelet.kernels.backends.numba.kernels import MOST, RECORD, RUNS, SLICE, VECTOR, WORDS, products
from gatelet.kernels.pattern import Bits, Form, Lists, words

FEW_EXAMPLES, FEW_TOKENS = 8, 32
"""At most this many go through the kernels that read a unit's row once for all of them, whatever is open: of a layer,
and of a whole feed-forward layer."""
FEW = "few"
"""The notes of a pattern whose first product went that way."""
NEAR = 1 << 15
"""Without gradients the examples must also be of fewer numbers than this: their rows then stay near."""
CROWD, CROWD_TO_LEARN = 5, 10
"""But not if the units that are open for one of them are open for more than so many on average, without and with
gradients. Other kernels then gain more by keeping slices of the examples near."""


def _bits(tensor: Tensor) -> int:
    return tensor.element_size() * 8


def _aligned(size: int) -> int:
    """Return the size rounded up to pairs of cache lines: threads must not share a line."""
    return -(-size // 128) * 128 + 128


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _reserve(gate: Tensor, units: int) -> tuple[Tensor, Tensor, int]:
    batch = gate.shape[0]
    rows = gate.new_empty((batch, words(units)), dtype=torch.int64)
    cols = gate.new_empty((units, words(batch)), dtype=torch.int64)
    return rows, cols, units // max(gate.shape[1], 1)


def pattern(gate: Tensor, units: int) -> Bits:
    """Return the pattern of gates (B, G) by example and by unit."""
    return _written(promise(gate, units, True))


def promise(gate: Tensor, units: int, keep: bool) -> Bits:
    """Return the pattern of gates (B, G), whose bits the first product that reads them writes."""
    gate = gate.contiguous()
    return Bits(*_reserve(gate, units), pending=gate, write=_write)


def _written(pattern: Form | None) -> Bits:
    """Return the pattern; write it first if that was not done yet."""
    if not isinstance(pattern, Bits):
        raise TypeError("this product reads a pattern of bits")
    return pattern.written()


def _write(gate: Tensor, rows: Tensor, cols: Tensor) -> None:
    _build(gate, rows, cols, len(cols))


def _build(gate: Tensor, rows: Tensor | None, cols: Tensor | None, units: int) -> None:
    if gate.numel():
        batch, group = gate.shape[0], units // gate.shape[1]
        products.run(
            *("pattern", _bits(gate), _team.threads(batch * units)),
            **{"gate": gate.data_ptr(), "rows": _address(rows), "cols": _address(cols)},
            **{"B": batch, "N": units, "group": group},
        )


def _most_bytes(batch: int) -> int:
    """Return the most bytes of a slice of the examples: they stay in the first-level cache while units pass."""
    return SLICE * (4 if batch <= 16 else 2 if batch <= 48 else 1)


def _slicing(width: int, size: int, most_bytes: int = SLICE) -> tuple[int, int]:
    """Return into how many slices the products cut a row of ``width`` numbers, and the numbers in each."""
    lanes = VECTOR // size
    vectors = -(-width // lanes)
    slices = max(-(-vectors * VECTOR // most_bytes), 1)
    each = max(-(-vectors // slices), 1)
    return -(-vectors // each), each * lanes


def _span(units: int, team: int) -> int:
    """Return how many units a task has: many, as they share a pass over the examples, but some tasks per thread."""
    span = 256
    while span > 64 and units < 4 * span * team:
        span //= 2
    return span


def _records(words: int, bits: int, size: int) -> int:
    """Return the bytes of the records of this many words of ``bits`` bits, with a number for each of their pairs."""
    most = words * -(-min(bits, 64) // MOST)
    return -(-most * RECORD // 64) * 64 + most * MOST * size + 64 * RECORD


def pack(x: Tensor) -> Tensor:
    """Return x (B, D) in slices, as the products read it; a single example already has that order."""
    batch, width = x.shape
    lanes = VECTOR // x.element_size()
    if batch == 1 and width % lanes == 0:
        return x
    slices, each = _slicing(width, x.element_size(), _most_bytes(batch))
    packed = x.new_empty(batch * slices * each)
    sizes = {"B": batch, "D": width, "most_bytes": _most_bytes(batch)}
    products.run("pack", _bits(x), _team.threads(x.numel()), x=x.data_ptr(), packed=packed.data_ptr(), **sizes)
    return packed


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
    """Return act(x Wᵀ + b) ∘ gate at open pairs and, to ``keep``, x Wᵀ + b; zero elsewhere if ``fill``."""
    x, weight = x.contiguous(), _by_rows(weight)
    bias = None if bias is None else bias.contiguous()
    if isinstance(pattern, Lists):
        found = _looking(lists.dots, pattern, x, weight, bias)
        return _pairs.finish(found, gate, activation), found if keep else x.new_empty(0)
    if gate is not None and (pattern is None or (isinstance(pattern, Bits) and pattern.pending is not None)):
        few = _few_dots(x, weight, bias, gate, activation, keep)
        if few is not None:
            if pattern is not None:
                pattern.notes = FEW
            return few
    gate = None if gate is None else gate.contiguous()
    batch, units = x.shape[0], weight.shape[0]
    out = x.new_empty((batch, units))
    pre = x.new_empty((batch, units) if keep else 0)
    if not out.numel():
        return out, pre
    rows, cols, mask = None, None, gate
    if isinstance(pattern, Bits):
        rows, cols, mask = pattern.rows, pattern.cols, pattern.pending
        pattern.pending = None
    elif batch > 1:  # the product builds the pattern and drops it
        cols = x.new_empty((units, words(batch)), dtype=torch.int64)
    group = units // gate.shape[1] if gate is not None else pattern.group if isinstance(pattern, Bits) else 1
    _dots(x, weight, bias, gate, mask, rows, cols, out, pre if keep else None, group, activation, fill)
    return out, pre


def _few_dots(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor] | None:
    """Return what ``dots`` does for a few float32 examples, which need no pattern; None for others."""
    by_unit = gate.shape[1] == len(weight)
    if not _few(x, FEW_TOKENS if by_unit else FEW_EXAMPLES) or (keep and not by_unit):
        return None
    if not keep and len(x) > FEW_EXAMPLES and x.numel() >= NEAR:
        return None
    pre = x.new_empty((len(x), len(weight)) if keep else 0)
    found = narrow.linear(x, weight, bias, gate, activation, pre if keep else None, CROWD_TO_LEARN if keep else CROWD)
    return None if found is None else (found, pre)


one, decoder = narrow.one, lists.decoder


def ffn(
    x: Tensor, w1: Tensor, b1: Tensor | None, gate: Tensor, activation: str, w2: Tensor, b2: Tensor | None
) -> Tensor | None:
    """Return (act(x W1ᵀ + b1) ∘ gate) W2 + b2 of a few float32 examples, in one pass; None for others."""
    return narrow.ffn(x, w1, b1, gate, activation, w2, b2, most=CROWD) if _few(x, FEW_TOKENS) else None


def gradients(
    upper: Tensor,
    pre: Tensor,
    gate: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    pattern: Form | None,
    need: tuple[bool, ...],
    activation: str = "identity",
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of x, w1, b1, the gates and w2 (by unit) in one pass, if that is how ``dots`` went."""
    if not (isinstance(pattern, Bits) and pattern.notes is FEW):
        return None
    w2 = None if w2 is None else _by_rows(w2)
    return narrow.gradients(upper, pre, gate, x, _by_rows(w1), w2, need, activation)


def _few(x: Tensor, most: int = FEW_EXAMPLES) -> bool:
    return len(x) <= most and x.dtype == torch.float32


def _dots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    out: Tensor,
    pre: Tensor | None,
    group: int,
    activation: str,
    fill: bool,
) -> None:
    """Write to ``out`` and ``pre``. With ``mask`` (B, G) its non-zeros are the pattern, which is written first."""
    batch, width = x.shape
    units = weight.shape[0]
    team = _team.threads(batch * units * width // _team.DENSE)
    code = ACTIVATIONS.index(activation)
    name = "one_dots" if batch == 1 else "group_dots" if group >= SMALLEST_GROUP else "dots"
    if mask is not None and (name == "group_dots" or batch > 64):
        # Written in a pass of its own, along the examples' rows. For a few examples the product does it.
        _build(mask, rows, cols, units)
        mask = None
    args = {
        **{"W": weight.data_ptr(), "bias": _address(bias), "gate": _address(gate), "cols": _address(cols)},
        **{"out": out.data_ptr(), "pre": _address(pre), "N": units, "D": width},
        **{"group": group, "fill": int(fill), "code": code},
    }
    if name != "dots":
        stride = 4 * batch + 512
        scratch = x.new_empty(team * stride, dtype=torch.uint8)
        args |= {"x": x.data_ptr(), "room": scratch.data_ptr(), "stride": stride}
        args |= {"B": batch} if name == "group_dots" else {"mask": _address(mask), "rows": _address(rows)}
    else:
        span_b, span_n = min(256, 64 * words(batch)), _span(units, team)
        chunks, size = span_b // 64, x.element_size()
        stride = _aligned(128 * span_n * size + chunks * RUNS + _records(chunks * span_n, batch, size))
        scratch = x.new_empty(team * stride, dtype=torch.uint8)
        packed = pack(x)
        args |= {"packed": packed.data_ptr(), "scratch": scratch.data_ptr(), "stride": stride, "B": batch}
        args |= {"mask": _address(mask), "rows": _address(rows), "span_b": span_b, "span_n": span_n}
        args["most_bytes"] = _most_bytes(batch)
    products.run(name, _bits(x), team, **args)


def by_example(
    coefficient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: Form | None,
    gate: Tensor | None = None,
    *,
    own: bool = False,
) -> Tensor:
    """Return y (B, D) with y[b] = bias + Σ_n C[b, n] W[n] over open n."""
    coefficient, weight = coefficient.contiguous(), _by_rows(weight)
    bias = None if bias is None else bias.contiguous()
    if isinstance(pattern, Lists):
        return _looking(lists.by_example, pattern, coefficient, weight, bias)
    if gate is not None and isinstance(pattern, Bits) and pattern.notes is FEW:
        return narrow.next_layer(coefficient, gate, weight, bias)
    rows = _written(pattern).rows
    batch, (units, width) = coefficient.shape[0], weight.shape
    out = weight.new_empty((batch, width))
    if not out.numel():
        return out
    team = _team.threads(batch * units * width // _team.DENSE)
    size = weight.element_size()
    slices, each = _slicing(width, size)
    # Each thread takes some of the examples, so that pairs are listed once. Where there are few examples it takes some
    # of the slices instead, since every thread would read all of W.
    by_batch = batch >= 64 * team or slices < 2 * team
    span = min(256, -(-batch // team) if by_batch else batch)
    span_s = slices if by_batch else -(-slices // team)
    size_s = span_s * span * each * size
    stride = _aligned(64 * SLICE + size_s + WORDS * RUNS + _records(WORDS * span, 64, size))
    scratch = weight.new_empty(team * stride, dtype=torch.uint8)
    products.run(
        *("by_example", _bits(weight), team),
        **{"C": coefficient.data_ptr(), "W": weight.data_ptr(), "bias": _address(bias), "rows": rows.data_ptr()},
        **{"out": out.data_ptr(), "B": batch, "N": units, "D": width, "span_b": span, "span_s": span_s},
        **{"room": scratch.data_ptr(), "room_stride": stride},
    )
    return out


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
    """Return V[n] = Σ_b C[b, n] x[b] over open b, and the sums Σ_b C[b, n]; None for what is not needed."""
    coefficient, x = coefficient.contiguous(), x.contiguous()
    if isinstance(pattern, Lists):
        turned = _turned(pattern)
        found, total, _ = lists.by_unit(coefficient, x, turned, dense=True, need_rows=need_rows, need_total=need_sum)
        return found.t() if found is not None and transposed else found, total
    cols = _written(pattern).cols
    (batch, width), units = x.shape, coefficient.shape[1]
    result = memory.empty(x, (units, width)) if need_rows else None
    sums = x.new_empty(units) if need_sum else None
    source = pack(x) if need_rows else x
    team = _team.threads()
    span = 128 if units >= 256 * team else 64
    size, chunks = x.element_size(), words(batch)
    stride = _aligned(span * SLICE + 64 * span * size + chunks * RUNS + _records(chunks * span, batch, size))
    scratch = x.new_empty(team * stride, dtype=torch.uint8)
    products.run(
        *("by_unit", _bits(x), team),
        **{"C": coefficient.data_ptr(), "packed": source.data_ptr(), "cols": cols.data_ptr()},
        **{"V": _address(result), "total": _address(sums), "B": batch, "N": units, "D": width, "span_n": span},
        most_bytes=_most_bytes(batch),
        **{"room": scratch.data_ptr(), "room_stride": stride},
    )
    return result.t() if result is not None and transposed else result, sums


turned = turn.turned


def _by_rows(weight: Tensor) -> Tensor:
    """Return the weight with contiguous rows."""
    if weight.is_contiguous():
        return weight
    return turned(weight.t()) if weight.t().is_contiguous() else weight.contiguous()


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
    """Return C = g · gate · act'(z) at open pairs and the gate's gradient (B, G), in ``into`` if given."""
    if isinstance(pattern, Lists):
        return _pairs.pointwise(upper, pre, gate, need_gate, need_coefficient, activation)
    rows = _written(pattern if wide is None else wide).rows
    upper, gate = upper.contiguous(), gate.contiguous()
    batch, units = upper.shape
    slopes = into if into is not None else torch.empty_like(gate) if need_gate else None
    coefficient = torch.empty_like(upper) if need_coefficient else None
    if not upper.numel():
        return coefficient, slopes
    products.run(
        *("pointwise", _bits(upper), _team.threads(upper.numel())),
        **{"g": upper.data_ptr(), "z": _address(pre), "gate": gate.data_ptr(), "rows": rows.data_ptr()},
        **{"C": _address(coefficient), "slopes": _address(slopes), "B": batch, "N": units},
        **{"group": units // max(gate.shape[1], 1), "code": ACTIVATIONS.index(activation)},
    )
    return coefficient, slopes


def touched(coefficient: Tensor, x: Tensor, pattern: Lists) -> Tensor:
    """Return V of ``by_unit`` as a coalesced sparse COO tensor with the rows of the units that any pair names."""
    turned = _turned(pattern)
    rows, _, _ = lists.by_unit(coefficient.contiguous(), x.contiguous(), turned, need_total=False)
    assert rows is not None
    return lists.as_sparse(rows, turned)


def dots_and_by_unit(
    upper: Tensor, weight: Tensor, coefficient: Tensor, pattern: Lists, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Return ``dots`` of ``upper`` and W, and ``by_unit`` of C and ``upper``: each row of W is read once."""
    turned = _turned(pattern)
    values, rows = lists.backward(
        upper.contiguous(), weight.contiguous(), coefficient.contiguous(), turned, dense=not sparse
    )
    return values, lists.as_sparse(rows, turned) if sparse else rows


def _looking(product: Callable[..., Tensor], pattern: Lists, *args: Tensor | None) -> Tensor:
    """Return a product over lists, which looks at the lists on the way if nobody has done so."""
    if pattern.given is not None:
        wrong = array("q", (0,))
        found = product(*args, pattern.length, pattern.given, wrong)
        if not wrong[0]:
            pattern.given = None
            return found
    return product(*args, pattern.length, pattern.units)  # which raises if there is something wrong with the units


def _turned(pattern: Lists) -> lists.Turned:
    """Return the lists by unit."""
    units = pattern.units  # raises if they were changed
    if pattern.notes is None:
        pattern.notes = lists.turned(pattern.starts, units, pattern.count)
    found: lists.Turned = pattern.notes
    return found
