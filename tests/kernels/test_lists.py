"""The products over lists of open units, against loops and PyTorch's own."""

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from gatelet.kernels.backends.numba import lists, memory
from gatelet.kernels.pattern import fixed_starts

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.float64)
SIZES = ((1, 1, 1), (3, 70, 5), (67, 300, 130), (9, 5000, 33), (4, 60, 401))
"""B, N, D: odd sizes, more units than the sort's digit, vectors with and without a rest, rows of several pieces."""


def draw(batch: int, units: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return sorted lists of 0 to 20 units an example, some empty."""
    draw = torch.Generator().manual_seed(seed)
    each = [
        torch.randperm(units, generator=draw)[: int(torch.randint(0, 21, (), generator=draw))].sort().values
        for _ in range(batch)
    ]
    if batch > 2:
        each[1] = each[1][:0]
    starts = torch.tensor([0] + [len(list_) for list_ in each]).cumsum(0)
    return starts, torch.cat(each)


def problem(batch: int, units: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    starts, open_units = draw(batch, units)
    return {
        "starts": starts,
        "units": open_units,
        "examples": torch.arange(batch).repeat_interleave(starts.diff()),
        "x": torch.randn(batch, width, dtype=dtype),
        "weight": torch.randn(units, width, dtype=dtype),
        "bias": torch.randn(units, dtype=dtype),
        "shift": torch.randn(width, dtype=dtype),
        "values": torch.randn(len(open_units), dtype=dtype),
        "grad": torch.randn(batch, width, dtype=dtype),
    }


def close(have: Tensor, want: Tensor) -> None:
    tolerance = 1e-4 if want.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_products(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    p = problem(*sizes, dtype)
    _batch, units, _ = sizes
    rows, picked = p["x"][p["examples"]], p["weight"][p["units"]]
    for bias in (p["bias"], None):
        want = (rows * picked).sum(1) + (0 if bias is None else bias[p["units"]])
        close(lists.dots(p["x"], p["weight"], bias, p["starts"], p["units"]), want)
    for shift in (p["shift"], None):
        want = torch.zeros_like(p["x"]).index_add(0, p["examples"], picked * p["values"][:, None])
        have = lists.by_example(p["values"], p["weight"], shift, p["starts"], p["units"])
        close(have, want if shift is None else want + shift)

    turned = lists.turned(p["starts"], p["units"], units)
    assert turned.touched.equal(p["units"].unique())
    assert p["examples"][turned.places].equal(turned.examples)
    assert p["units"][turned.places].equal(turned.touched.repeat_interleave(turned.starts.diff()))
    assert turned.places.sort().values.equal(torch.arange(len(p["units"])))

    want = torch.zeros_like(p["weight"]).index_add(0, p["units"], p["grad"][p["examples"]] * p["values"][:, None])
    total = torch.zeros_like(p["bias"]).index_add(0, p["units"], p["values"])
    for dense in (False, True):
        sums, whole, products = lists.by_unit(p["values"], p["grad"], turned, weight=p["weight"], dense=dense)
        assert sums is not None
        assert whole is not None
        assert products is not None
        close(sums if dense else lists.as_sparse(sums, turned).to_dense(), want)
        close(whole if dense else lists.as_sparse(whole, turned).to_dense(), total)
        close(products, (p["grad"][p["examples"]] * picked).sum(1))
    assert lists.by_unit(None, p["grad"], turned) == (None, None, None)

    found, rows_of = lists.backward(p["grad"], p["weight"], p["values"], turned)
    close(found, (p["grad"][p["examples"]] * picked).sum(1))
    moved = p["weight"].clone()
    lists.add_rows(moved, rows_of, turned, -0.5)
    close(moved, p["weight"] - 0.5 * want)


def test_no_pairs() -> None:
    starts, units = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    weight, x, shift = torch.randn(5, 3), torch.randn(3, 3), torch.randn(3)
    assert lists.dots(x, weight, None, starts, units).shape == (0,)
    assert lists.by_example(x.new_empty(0), weight, shift, starts, units).equal(shift.expand(3, 3))
    turned = lists.turned(starts, units, 5)
    sums, total, _ = lists.by_unit(x.new_empty(0), x, turned, dense=True)
    assert sums is not None
    assert total is not None
    assert sums.equal(torch.zeros(5, 3))
    assert total.equal(torch.zeros(5))
    assert fixed_starts(2, 0).tolist() == [0, 0, 0]
    assert fixed_starts(2, 3).tolist() == [0, 3, 6]


def test_an_unread_row_may_be_nan() -> None:
    p = problem(7, 40, 9, torch.float32)
    closed = torch.ones(40, dtype=torch.bool).index_fill(0, p["units"], False)
    p["weight"][closed] = torch.nan
    assert lists.dots(p["x"], p["weight"], None, p["starts"], p["units"]).isfinite().all()
    assert lists.by_example(p["values"], p["weight"], None, p["starts"], p["units"]).isfinite().all()
    turned = lists.turned(p["starts"], p["units"], 40)
    assert all(each.isfinite().all() for each in lists.backward(p["grad"], p["weight"], p["values"], turned))


def test_threads_change_nothing() -> None:
    p = problem(300, 900, 130, torch.float32)

    def everything() -> list[Tensor]:
        turned = lists.turned(p["starts"], p["units"], 900)
        found = [*turned[:4], *lists.backward(p["grad"], p["weight"], p["values"], turned)]
        found += lists.top_k(p["x"], p["weight"], p["bias"], 20)
        found.append(lists.by_example(p["values"], p["weight"], None, p["starts"], p["units"]))
        return found

    alone = everything()
    torch.set_num_threads(3)
    try:
        together = everything()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, together, strict=True):
        close(other.double(), one.double()) if one.dtype == torch.float32 else None
        assert one.dtype.is_floating_point or other.equal(one)


@pytest.mark.parametrize("units", [[0, 3, 9], [0, -1, 2], [2, 1, 1], [1, 1, 2], [5, 6, -(1 << 40)], [5, 1 << 40, 0]])
def test_products_look_at_lists(units: list[int]) -> None:
    """And read no row of a list that is wrong."""
    starts, x, weight = torch.tensor([0, 2, 3]), torch.ones(2, 40), torch.ones(9, 40)
    for each, wanted in ((units, 1), ([7, 8, 0], 0)):  # each example begins anew
        wrong = array("q", (0,))
        lists.dots(x, weight, None, starts, torch.tensor(each), wrong)
        assert wrong[0] == wanted
        wrong = array("q", (0,))
        lists.by_example(torch.ones(3), weight, None, starts, torch.tensor(each), wrong)
        assert wrong[0] == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "units", "most"), [(1, 1, 1), (5, 70, 70), (3, 1100, 7), (300, 300, 20)])
def test_top_k(batch: int, units: int, most: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size, dtype=dtype) for size in ((batch, 9), (units, 9), (units,)))
    for shift in (bias, None):
        values, indices = lists.top_k(x, weight, shift, most)
        want, places = torch.nn.functional.linear(x, weight, shift).topk(most)
        places, order = places.sort()
        assert indices.equal(places)
        close(values, want.gather(1, order))


def test_top_k_of_equals_infinities_and_nan() -> None:
    one = torch.ones(1, 1)
    column = torch.tensor([1.0, -torch.inf, 2.0, 1.0, torch.nan, 1.0, -torch.inf, torch.inf])[:, None].repeat(20, 1)
    for most, want in ((3, [4, 7, 12]), (50, None)):
        values, indices = lists.top_k(one, column, None, most)
        if want is not None:
            assert indices.tolist() == [want]
        found = values.flatten()
        assert found.isnan().sum() + found.isinf().sum() == min(most, 40)
    values, indices = lists.top_k(one, -torch.inf * torch.ones(100, 1), None, 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]
    assert values.isneginf().all()
    values, indices = lists.top_k(one, torch.ones(200, 1), None, 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="most must be between 1 and the number of units, 5, not 6"):
        lists.top_k(one, torch.ones(5, 1), None, 6)


def test_large_results_are_ordinary_tensors() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    for shape in ((3, 5), (memory.LARGE // 8, 3)):
        found = memory.empty(like, shape)
        assert found.shape == shape
        assert found.dtype == torch.float64
        found.zero_()
        assert found.sum() == 0


@pytest.mark.parametrize("there", [True, False])
def test_pages_are_asked_for_only_where_they_are_not_there_yet(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def in_core(place: int, length: int, told: Any) -> int:
        told[0] = bytes([there])
        return 0

    system = memory._System(lambda *args: asked.append(args), in_core)
    monkeypatch.setattr(memory, "_system", lambda: system)
    memory.empty(torch.zeros(1), (memory.LARGE // 4, 1))
    memory.empty(torch.zeros(1), (3, 5))  # too small to be worth it
    assert bool(asked) is not there
