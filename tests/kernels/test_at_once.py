"""One example, and given indices, without the checks that nothing depends on: what the long way gives."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import OpenPattern, gated_input_linear, gated_linear, int8_rows, narrow_linear
from gatelet.kernels.backends import BACKENDS
from gatelet.kernels.backends.numba import narrow

op = importlib.import_module("gatelet.kernels.ops.gated_linear")
decoder_op = importlib.import_module("gatelet.kernels.ops.gated_input_linear")
pytestmark = pytest.mark.skipif(BACKENDS["numba"].missing() is not None, reason="without Numba there is no such kernel")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each layer that went this way."""
    calls: list[int] = []
    products = BACKENDS["numba"].products
    one: Callable[..., Callable[..., Tensor]] = products.one

    def counted(*sizes: Any) -> Callable[..., Tensor]:
        run = one(*sizes)
        return lambda *args: (calls.append(1), run(*args))[1]

    monkeypatch.setattr(products, "one", counted)
    op._fitting.cache_clear()
    yield calls
    op._fitting.cache_clear()


def drawn(width: int = 256, units: int = 1100, group: int = 1, lead: tuple[int, ...] = (1,)) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    gate = (torch.rand(*lead, units // group) < 0.2) * torch.randn(*lead, units // group)
    return torch.randn(*lead, width), torch.randn(units, width), torch.randn(units), gate


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(("group", "bias"), [(1, True), (11, True), (1, False)])
def test_gives_the_layer(taken: list[int], lead: tuple[int, ...], group: int, bias: bool) -> None:
    x, weight, shift, gate = drawn(lead=lead, group=group)
    shift_or_none = shift if bias else None
    found = gated_linear(x, weight, shift_or_none, gate)
    expected = F.linear(x, weight, shift_or_none) * gate.repeat_interleave(group, -1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert taken == [1]
    weight[gate.repeat_interleave(group, -1).view(-1) == 0] = float("nan")
    assert torch.equal(found, gated_linear(x, weight, shift_or_none, gate))


def test_others_go_the_long_way(taken: list[int]) -> None:
    x, weight, bias, gate = drawn()
    expected = gated_linear(x, weight, bias, gate)
    assert taken == [1]
    others: list[dict[str, Any]] = [
        {"weight": weight.t().contiguous().t()},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
        {"weight": weight.clone().requires_grad_()},
        {"x": x.expand(2, -1), "gate": gate.expand(2, -1)},
        {"backend": "dense"},
    ]
    for other in others:
        found = gated_linear(**({"x": x, "weight": weight, "bias": bias, "gate": gate} | other))
        torch.testing.assert_close(found[:1].float(), expected, atol=1e-4, rtol=1e-5)
    assert taken == [1]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A number for each product over given indices that went this way."""
    calls: list[int] = []
    products = BACKENDS["numba"].products
    decoder: Callable[..., Callable[..., Tensor | None]] = products.decoder

    def counted(*sizes: Any) -> Callable[..., Tensor | None]:
        run = decoder(*sizes)
        return lambda *args: (calls.append(1), run(*args))[1]

    monkeypatch.setattr(products, "decoder", counted)
    decoder_op._fitting.cache_clear()
    yield calls
    decoder_op._fitting.cache_clear()


def lists_drawn(lead: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    indices = torch.rand(*lead, 50).argsort(-1)[..., :6].sort(-1).values
    return torch.randn(*lead, 6, dtype=dtype), indices, torch.randn(50, 21, dtype=dtype), torch.randn(21, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (1,), (9,), (2, 40)], ids=str)
def test_given_indices(decoded: list[int], lead: tuple[int, ...], dtype: torch.dtype) -> None:
    values, indices, weight, bias = lists_drawn(lead, dtype)
    for shift in (None, bias):
        found = gated_input_linear(values, indices, weight, shift, by_unit=True)
        pattern = OpenPattern.from_indices(indices, 50)
        assert found.equal(gated_input_linear(values, pattern, weight, shift, by_unit=True))
        assert found.equal(gated_input_linear(values, indices.int(), weight, shift, by_unit=True))
        wide = torch.zeros(*lead, 50, dtype=dtype).scatter(-1, indices, values)
        torch.testing.assert_close(
            found, wide @ weight if shift is None else wide @ weight + shift, atol=1e-5, rtol=1e-5
        )
    assert decoded == [1, 1, 1, 1]


def test_wrong_indices_are_refused_as_ever(decoded: list[int]) -> None:
    values, indices, weight, _ = lists_drawn((9,))
    for place, wrong, words in (
        ((3, 5), 50, "must lie in"),
        ((0, 0), -1, "must lie in"),
        ((8, 1), 49, "has unit 49 before"),
    ):
        changed = indices.clone()
        changed[place] = wrong
        with pytest.raises(ValueError, match=words):
            gated_input_linear(values, changed, weight, by_unit=True)
    repeated = indices.clone()
    repeated[4, 2] = repeated[4, 1]
    with pytest.raises(ValueError, match="repeats unit"):
        gated_input_linear(values, repeated, weight, by_unit=True)
    assert len(decoded) == 4
    with pytest.raises(ValueError, match="pattern is for gates"):
        gated_input_linear(values, OpenPattern.from_indices(indices, 60), weight, by_unit=True)
    with pytest.raises(TypeError, match="dtype"):
        gated_input_linear(values.double(), indices, weight, by_unit=True)
    with pytest.raises(ValueError, match="a number for each"):
        gated_input_linear(values[:, :5].contiguous(), indices, weight, by_unit=True)


def test_other_products_over_indices_go_the_long_way(decoded: list[int]) -> None:
    values, indices, weight, bias = lists_drawn((9,))
    expected = gated_input_linear(values, indices, weight, bias, by_unit=True)
    assert decoded == [1]
    others: list[dict[str, Any]] = [
        {"weight": weight.t().contiguous(), "by_unit": False},
        {"pattern": indices.int()},
        {"pattern": indices.t().contiguous().t()},
        {"hidden": values.t().contiguous().t()},
        {"weight": weight.clone().requires_grad_()},
        {"backend": "dense"},
    ]
    given: dict[str, Any] = {"hidden": values, "pattern": indices, "weight": weight, "bias": bias, "by_unit": True}
    for other in others:
        torch.testing.assert_close(gated_input_linear(**(given | other)), expected, atol=1e-5, rtol=1e-5)
    assert decoded == [1]


KINDS: dict[str, Callable[[Tensor], Any]] = {"float32": Tensor.float, "bfloat16": Tensor.bfloat16, "int8": int8_rows}


@pytest.mark.parametrize("active", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lead", "units", "group"), [((), 1100, 1), ((1,), 1100, 11), ((1, 1), 40, 5), ((1,), 1026, 3), ((1,), 512, 64)]
)
def test_narrow_rows(
    lead: tuple[int, ...], units: int, group: int, kind: str, active: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, shift, gate = (each.to(active) for each in drawn(53, units, group, lead))
    x[..., 3] = 1e30  # large sums, and in bfloat16 many roundings
    rows = KINDS[kind](weight.float())
    for bias, activation in ((shift, "silu"), (None, "identity")):
        found = narrow_linear(x, rows, bias, gate, activation)
        assert found.equal(narrow.linear(x.view(1, -1), rows, bias, gate.view(1, -1), activation).view(found.shape))
        assert found.dtype == active
    poisoned = x.clone()
    poisoned[..., 0] = float("nan")
    open_units = gate.repeat_interleave(group, -1) != 0
    assert torch.equal(narrow_linear(poisoned, rows, shift, gate).isnan(), open_units)
    monkeypatch.setattr(narrow, "linear", lambda *_: pytest.fail("this went the long way"))
    narrow_linear(x, rows, shift, gate)


def test_narrow_rows_that_need_checks() -> None:
    x, weight, bias, gate = drawn(53, 64)
    rows = int8_rows(weight)
    expected = narrow_linear(x, rows, bias, gate)
    others: list[dict[str, Any]] = [
        {"gate": gate.bfloat16().float().double()},
        {"weight": rows._replace(values=rows.values.t().contiguous().t())},
        {"bias": bias.double()},
    ]
    given: dict[str, Any] = {"x": x, "weight": rows, "bias": bias, "gate": gate}
    for other in others:
        torch.testing.assert_close(narrow_linear(**(given | other)), expected, atol=0.05, rtol=0.05)
    for wrong, words in (
        ({"x": x[:, :50].contiguous()}, "x must have 53 features"),
        ({"bias": bias[:60].contiguous()}, "bias must have shape"),
        ({"gate": gate[:, :60].contiguous()}, "do not divide"),
        ({"weight": rows._replace(scales=rows.scales[:60].contiguous())}, "a scale for each"),
        ({"activation": "tanh"}, "activation"),
    ):
        with pytest.raises(ValueError, match=words):
            narrow_linear(**(given | wrong))
