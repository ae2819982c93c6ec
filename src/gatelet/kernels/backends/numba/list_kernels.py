"""The products over lists of open units, compiled by Numba. Import this module only to run them.

A pair costs the reading of one row, which may lie anywhere in the table, and little else. So rows are prefetched, and
sums stay in registers while rows are read. Where the order is free, pairs are taken by unit: then the large matrix (the
weights) is read or written once and in order, while the small one (the examples) stays in cache.

All lists are int64. Arguments named like tensors are addresses, 0 for a tensor that is not given.
"""

import math
from typing import Any

from gatelet.kernels.backends.numba import gather as g
from gatelet.kernels.backends.numba import vector as v
from gatelet.kernels.backends.numba.kernels import compiled, type_as

VECTOR, MOST = v.VECTOR, v.MOST
PAIR = 16
"""Bytes of a pair while lists are turned around: unit and example, 32 bits each, and its place in the list."""
AHEAD = 2 * v.MOST
"""How many pairs ahead rows are prefetched for dot products."""
AHEAD_BYTES, FARTHEST = 1 << 14, 64
"""For sums, rows are prefetched this many bytes ahead (they fit in the first-level cache), at most this many pairs."""
# Numba's cache needs these as globals of this module.
arguments, gather_dots, gather_axpy = g.arguments, g.gather_dots, g.gather_axpy
gather_sum, PIECE = g.gather_sum, g.PIECE
above = g.above
take, lowest, prefetch = v.take, v.lowest, v.prefetch
read, write, read_word, write_word = v.read, v.write, v.read_word, v.write_word
clear = v.clear


@compiled
def bounded(value: Any) -> Any:  # pragma: no cover (compiled)
    """Return the number, or infinity for NaN."""
    return value if value == value else math.inf


@compiled
def kth(near: Any, have: Any, most: Any, size: Any, one: Any) -> Any:  # pragma: no cover (compiled)
    """Return the ``most``-th largest of ``have`` numbers, whose order changes: Hoare's selection."""
    low, high, wanted = 0, have - 1, most - 1
    while low < high:
        pivot = read(near + (low + high) // 2 * size, one)
        i, j = low, high
        while i <= j:
            while read(near + i * size, one) > pivot:
                i += 1
            while read(near + j * size, one) < pivot:
                j -= 1
            if i <= j:
                moved = read(near + i * size, one)
                write(near + i * size, read(near + j * size, one))
                write(near + j * size, moved)
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return read(near + wanted * size, one)


@compiled
def cut(
    values: Any, names: Any, have: Any, most: Any, near: Any, size: Any, one: Any
) -> Any:  # pragma: no cover (compiled)
    """Keep the ``most`` largest of ``have`` numbers of a list, in order (among equals the first); return the least."""
    for i in range(have):
        write(near + i * size, type_as(bounded(read(values + i * size, one)), one))
    least = kth(near, have, most, size, one)
    equals = most
    for i in range(have):
        equals -= 1 if bounded(read(values + i * size, one)) > least else 0
    at = 0
    for i in range(have):
        z = read(values + i * size, one)
        keeps = bounded(z) > least
        if not keeps and equals > 0 and bounded(z) == least:
            keeps = True
            equals -= 1
        if keeps:
            write(values + at * size, z)
            write_word(names + at * 8, read_word(names + i * 8))
            at += 1
    return least


@compiled
def piece_of(pitch: Any) -> Any:  # pragma: no cover (compiled)
    """Return how many vectors of a row are summed at once: pieces of about one size, at most PIECE."""
    vectors = (pitch + VECTOR - 1) // VECTOR
    pieces = max((vectors + PIECE - 1) // PIECE, 1)
    return max((vectors + pieces - 1) // pieces, 1)


@compiled
def ahead_of(piece: Any) -> Any:  # pragma: no cover (compiled)
    """Return how many bytes of a list ahead rows are prefetched."""
    return 8 * min(AHEAD_BYTES // (piece * VECTOR), FARTHEST)


@compiled
def sum_rows(
    count: Any,
    indices: Any,
    last: Any,
    scales: Any,
    table: Any,
    pitch: Any,
    piece: Any,
    ahead: Any,
    start: Any,
    target: Any,
    size: Any,
    one: Any,
) -> None:  # pragma: no cover (compiled)
    """Write start + Σ scale · row to ``target`` for rows that ``count`` indices name; ``last``: where the list ends.

    ``piece`` and ``ahead`` are from ``piece_of`` and ``ahead_of``.
    """
    at, step = 0, piece * VECTOR
    while at < pitch:
        left = pitch - at
        vectors = piece if left > step else (left + VECTOR - 1) // VECTOR
        rest = min(left - (vectors - 1) * VECTOR, VECTOR) // size
        begin = start + at if start != 0 else 0
        # What comes next is the next piece of the same rows or, after the last one, the next list.
        back, leap = (8 * count, step) if left > step else (0, -at)
        gather_sum(
            *(vectors, rest, count, indices, ahead, back, leap, last),
            *(scales, table + at, pitch, begin, target + at, one),
        )
        at += step


@compiled
def start_of(example: Any, starts: Any, most: Any) -> Any:  # pragma: no cover (compiled)
    """Return where an example's list starts: as listed or, without ``starts``, at a multiple of ``most``."""
    return read_word(starts + 8 * example) if starts != 0 else example * most


@compiled
def ascends(units: Any, begin: Any, end: Any, count: Any) -> Any:  # pragma: no cover (compiled)
    """Return whether a list is sorted, without repeats, and of units 0 … ``count`` - 1."""
    before, fine = -1, True
    for i in range(begin, end):
        unit = read_word(units + 8 * i)
        fine &= unit > before
        before = unit
    return fine and before < count


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make(one: Any) -> dict[str, Any]:
    """Return the kernels, not yet compiled, for numbers of the type of ``one``."""
    size = one.itemsize
    lanes = VECTOR // size
    zero = one * 0

    def dots(p: Any) -> None:
        """values[i] = ⟨x[b], weight[n]⟩ + bias[n] for the pairs (b, n) of the lists; a task is ``span`` examples.

        If ``wrong`` is given, lists are checked first: it becomes 1 if the units of one do not ascend below ``count``.
        """
        counter, x, weight, bias, starts, most, units, values, examples, count, width, span, pairs, wrong = arguments(
            p, 14
        )
        length, rest, pitch = width // lanes * VECTOR, width % lanes, width * size
        while True:
            first = take(counter) * span
            if first >= examples:
                break
            for b in range(first, min(first + span, examples)):
                i, end = start_of(b, starts, most), start_of(b + 1, starts, most)
                if wrong != 0 and not ascends(units, i, end, count):
                    write_word(wrong, 1)
                    continue
                while i < end:
                    k = min(end - i, MOST)
                    at, later = units + 8 * i, units + 8 * min(i + AHEAD, pairs - k)
                    gather_dots(k, at, later, weight, pitch, x + b * pitch, length, rest, values + i * size, one)
                    if bias != 0:
                        for e in range(i, i + k):
                            shift = read(bias + read_word(units + 8 * e) * size, one)
                            write(values + e * size, read(values + e * size, one) + shift)
                    i += k

    def by_example(p: Any) -> None:
        """out[b] = bias + Σ values[i] · weight[n] over the list of b; a task is ``span`` examples.

        ``wrong`` is as in ``dots``.
        """
        counter, values, weight, bias, starts, most, units, out, examples, count, width, span, pairs, wrong = arguments(
            p, 14
        )
        pitch, last = width * size, units + 8 * (pairs - 1)
        piece = piece_of(pitch)
        ahead = ahead_of(piece)
        while True:
            first = take(counter) * span
            if first >= examples:
                break
            for b in range(first, min(first + span, examples)):
                i, end = start_of(b, starts, most), start_of(b + 1, starts, most)
                if wrong != 0 and not ascends(units, i, end, count):
                    write_word(wrong, 1)
                    continue
                at, scales, target = units + 8 * i, values + i * size, out + b * pitch
                sum_rows(end - i, at, last, scales, weight, pitch, piece, ahead, bias, target, size, one)

    def by_unit(p: Any) -> None:
        """Σ values[i] · table[b] to sums, Σ values[i] to total, ⟨weight[n], table[b]⟩ to products, over units n.

        A task is ``span`` touched units. With ``dense``, sums and total have a row for every unit, zero for units that
        no pair names; else they have a row for every touched unit.
        """
        (
            counter,
            values,
            table,
            weight,
            touched,
            starts,
            examples,
            places,
            sums,
            total,
            products,
            count,
            units,
            width,
            dense,
            scratch,
            stride,
            span,
            pairs,
        ) = arguments(p, 19)
        near = scratch + take(counter + 8) * stride
        length, rest, pitch = width // lanes * VECTOR, width % lanes, width * size
        while True:
            first = take(counter) * span
            if first >= count:
                break
            for t in range(first, min(first + span, count)):
                n, row = read_word(touched + 8 * t), t
                if products != 0:
                    soon = weight + read_word(touched + 8 * min(t + 4, count - 1)) * pitch
                    for line in range(0, pitch, 64):
                        prefetch(soon + line)
                if dense != 0:
                    row = n
                    begin = read_word(touched + 8 * t - 8) + 1 if t != 0 else 0
                    if sums != 0:
                        clear(sums + begin * pitch, (n - begin) * pitch)
                    if total != 0:
                        clear(total + begin * size, (n - begin) * size)
                    if t == count - 1 and sums != 0:
                        clear(sums + (n + 1) * pitch, (units - n - 1) * pitch)
                    if t == count - 1 and total != 0:
                        clear(total + (n + 1) * size, (units - n - 1) * size)
                i, end, fresh, whole = read_word(starts + 8 * t), read_word(starts + 8 * t + 8), 1, zero
                while i < end:
                    k = min(end - i, MOST)
                    at, later = examples + 8 * i, examples + 8 * min(i + AHEAD, pairs - k)
                    if products != 0:
                        gather_dots(k, at, later, table, pitch, weight + n * pitch, length, rest, near, one)
                        for e in range(k):
                            write(products + read_word(places + 8 * (i + e)) * size, read(near + e * size, one))
                    if values != 0:
                        for e in range(k):
                            scale = read(values + read_word(places + 8 * (i + e)) * size, one)
                            whole += scale
                            write(near + e * size, scale)
                    if sums != 0:
                        target = sums + row * pitch
                        gather_axpy(k, at, later, near, table, pitch, target, length, rest, fresh, one)
                    fresh = 0
                    i += k
                if total != 0:
                    write(total + row * size, whole)

    def add_rows(p: Any) -> None:
        """weight[touched[t]] += scale · rows[t]; a task is ``span`` rows. ``scale`` is an address too."""
        counter, rows, touched, weight, scale, order, count, width, span = arguments(p, 9)
        length, rest, pitch = width // lanes * VECTOR, width % lanes, width * size
        while True:
            first = take(counter) * span
            if first >= count:
                break
            for t in range(first, min(first + span, count)):
                soon = weight + read_word(touched + 8 * min(t + 4, count - 1)) * pitch
                for line in range(0, pitch, 64):
                    prefetch(soon + line)
                target, at = weight + read_word(touched + 8 * t) * pitch, order + 8 * t
                gather_axpy(1, at, at, scale, rows, pitch, target, length, rest, 0, one)

    def select(p: Any) -> None:
        """Take ``width`` more numbers of an example and keep the ``most`` largest so far; of equals, the first.

        An example's list has room for ``room`` numbers. A full list is cut to ``most``, in order; after that, smaller
        numbers are not added. With ``last``, all lists are cut at the end. NaN counts as infinity.
        """
        (
            counter,
            block,
            bias,
            values,
            units,
            counts,
            floors,
            examples,
            width,
            first,
            most,
            room,
            last,
            scratch,
            stride,
        ) = arguments(p, 15)
        near = scratch + take(counter + 8) * stride
        while True:
            start = take(counter) * 8
            if start >= examples:
                break
            for b in range(start, min(start + 8, examples)):
                row, mine, names = block + b * width * size, values + b * room * size, units + b * room * 8
                have, floor = read_word(counts + 8 * b), read(floors + b * size, one)
                n = 0
                while n < width:
                    wide = min(64, width - n)
                    bits = above(row + n * size, bias + n * size, wide, floor, one)
                    while bits != 0:
                        place = n + lowest(bits)
                        bits &= bits - 1
                        z = read(row + place * size, one) + read(bias + place * size, one)
                        if z <= floor:
                            continue
                        write(mine + have * size, z)
                        write_word(names + have * 8, first + place)
                        have += 1
                        if have == room:
                            floor = cut(mine, names, have, most, near, size, one)
                            have = most
                    n += wide
                if last != 0 and have > most:
                    cut(mine, names, have, most, near, size, one)
                    have = most
                write_word(counts + 8 * b, have)
                write(floors + b * size, floor)

    made = (dots, by_example, by_unit, add_rows, select)
    return {kernel.__name__: kernel for kernel in made}


# Long: the kernels are nested functions, because Numba fixes their types and widths by what they close over.
def _make_turning(one: Any) -> dict[str, Any]:
    """Return the kernels that turn lists by example into lists by unit: a radix sort; a task is a part of the pairs.

    ``counters`` has a row of 2^bits for each part: first how many of its pairs have each digit, then where they go.
    """

    def pairs_of(p: Any) -> None:
        """Write a record for every pair; a task is ``span`` examples."""
        counter, starts, units, records, examples, span = arguments(p, 6)
        while True:
            first = take(counter) * span
            if first >= examples:
                break
            for b in range(first, min(first + span, examples)):
                for i in range(read_word(starts + 8 * b), read_word(starts + 8 * b + 8)):
                    write_word(records + PAIR * i, read_word(units + 8 * i) | (b << 32))
                    write_word(records + PAIR * i + 8, i)

    def count(p: Any) -> None:
        counter, records, counters, pairs, parts, shift, bits = arguments(p, 7)
        digits = 1 << bits
        while True:
            part = take(counter)
            if part >= parts:
                break
            mine = counters + part * digits * 8
            clear(mine, digits * 8)
            for i in range(part * pairs // parts, (part + 1) * pairs // parts):
                at = mine + 8 * (((read_word(records + PAIR * i) & 0xFFFFFFFF) >> shift) & (digits - 1))
                write_word(at, read_word(at) + 1)

    def place(p: Any) -> None:
        """Turn the counts into places; one task."""
        counter, counters, parts, bits = arguments(p, 4)
        if take(counter) == 0:
            before = 0
            for digit in range(1 << bits):
                for part in range(parts):
                    at = counters + ((part << bits) + digit) * 8
                    have = read_word(at)
                    write_word(at, before)
                    before += have

    def scatter(p: Any) -> None:
        counter, records, sorted_records, counters, pairs, parts, shift, bits = arguments(p, 8)
        digits = 1 << bits
        while True:
            part = take(counter)
            if part >= parts:
                break
            mine = counters + part * digits * 8
            for i in range(part * pairs // parts, (part + 1) * pairs // parts):
                word = read_word(records + PAIR * i)
                at = mine + 8 * (((word & 0xFFFFFFFF) >> shift) & (digits - 1))
                to = read_word(at)
                write_word(at, to + 1)
                write_word(sorted_records + PAIR * to, word)
                write_word(sorted_records + PAIR * to + 8, read_word(records + PAIR * i + 8))

    def heads(p: Any) -> None:
        """Count the units that begin in each part, or, with ``touched``, write the lists."""
        counter, records, counters, touched, starts, examples, places, pairs, parts = arguments(p, 9)
        while True:
            part = take(counter)
            if part >= parts:
                break
            first = part * pairs // parts
            before = read_word(records + PAIR * (first - 1)) & 0xFFFFFFFF if first != 0 else -1
            at = read_word(counters + 8 * part) if touched != 0 else 0
            for i in range(first, (part + 1) * pairs // parts):
                word = read_word(records + PAIR * i)
                n = word & 0xFFFFFFFF
                if touched != 0:
                    write_word(examples + 8 * i, word >> 32)
                    write_word(places + 8 * i, read_word(records + PAIR * i + 8))
                if n != before:
                    if touched != 0:
                        write_word(touched + 8 * at, n)
                        write_word(starts + 8 * at, i)
                    at += 1
                    before = n
            if touched == 0:
                write_word(counters + 8 * part, at)
            elif part == parts - 1:
                write_word(starts + 8 * at, pairs)

    made = (pairs_of, count, place, scatter, heads)
    return {kernel.__name__: kernel for kernel in made}


products, turning = g.Kernels(_make), g.Kernels(_make_turning)
