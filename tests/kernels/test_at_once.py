"""One example through gated_linear without the checks that nothing depends on: what the long way gives."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import gated_linear
from gatelet.kernels.backends import BACKENDS

op = importlib.import_module("gatelet.kernels.ops.gated_linear")
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
