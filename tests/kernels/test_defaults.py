"""What an op returns follows from its arguments alone, whatever torch's default dtype and device are."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

import gatelet
from gatelet.kernels import (
    OpenPattern,
    decode_input_linear,
    decode_linear,
    gated_ffn,
    gated_input_linear,
    gated_linear,
    int8_rows,
    narrow_ffn,
    narrow_input_linear,
    narrow_linear,
    open_pattern,
)
from gatelet.kernels.backends.numba import lists

pytestmark = pytest.mark.cpu
Call = Callable[[], Tensor | tuple[Tensor, ...]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def forward(batch: int) -> dict[str, Call]:
    width, units, outputs = 520, 600, 24
    x, w1, w2 = torch.randn(batch, width), torch.randn(units, width), torch.randn(units, outputs)
    bias, gate = torch.randn(units), (torch.rand(batch, units) < 0.2).float()
    rows, rows2, half = int8_rows(w1), int8_rows(w2), w1.bfloat16()
    return {
        "gated_linear": lambda: gated_linear(x, w1, bias, gate, backend="numba"),
        "gated_linear, auto": lambda: gated_linear(x, w1, bias, gate),
        "gated_input_linear": lambda: gated_input_linear(gate, open_pattern(gate), w2.t()),
        "gated_ffn": lambda: gated_ffn(x, w1, bias, gate, "relu", w2.t(), None, backend="numba"),
        "narrow_linear": lambda: narrow_linear(x, rows, bias, gate),
        "narrow_linear, bfloat16": lambda: narrow_linear(x.bfloat16(), half, bias, gate),
        "narrow_input_linear": lambda: narrow_input_linear(gate, rows2),
        "narrow_ffn": lambda: narrow_ffn(x, rows, bias, gate, "silu", rows2),
    }


def others() -> dict[str, Call]:
    width, units, most, batch = 48, 500, 7, 9
    x, weight, values = torch.randn(batch, width), torch.randn(units, width), torch.randn(batch, most)
    indices = torch.stack([torch.randperm(units)[:most].sort().values for _ in range(batch)])
    gate = (torch.rand(batch, units) < 0.2).float().requires_grad_()
    w, v, given = weight.clone().requires_grad_(), values.clone().requires_grad_(), OpenPattern.from_indices
    layer = gatelet.nn.ConditionalFFN(width, 96, bottleneck=8).eval()
    layer.unit.threshold.fill_(0.0)
    linear, by_input = decode_linear(weight), decode_input_linear(weight, None, torch.ones(units), torch.tensor([0.5]))
    noise, hidden = torch.randn(1, width), torch.randn(1, units)

    def decoder(sparse: bool) -> Call:
        out = lambda: gated_input_linear(v, given(indices, units), w, None, by_unit=True, sparse_grad=sparse)  # noqa: E731
        return lambda: tuple(each.to_dense() for each in torch.autograd.grad(out(), (v, w), x))

    def token() -> Tensor:
        with torch.no_grad():
            found: Tensor = layer(noise)
        return found

    def step() -> Tensor:
        changed, turned = (
            weight.clone(),
            lists.turned(torch.arange(batch + 1, device="cpu") * most, indices.flatten(), units),
        )
        lists.add_rows(changed, torch.ones(len(turned.touched), width, dtype=torch.float32, device="cpu"), turned, -0.5)
        return changed

    return {
        "lists forward": lambda: gated_linear(x, weight, None, None, pattern=indices),
        "lists backward, dense": decoder(False),
        "lists backward, sparse": decoder(True),
        "backward": lambda: torch.autograd.grad(gated_linear(x, w, None, gate, backend="numba"), (w, gate), gate),
        "top_k": lambda: lists.top_k(x, weight, None, most),
        "add_rows": step,
        "one token": token,
        "decode_linear": lambda: linear(noise),
        "decode_input_linear": lambda: by_input(hidden),
    }


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize(
    "make", [lambda: forward(1), lambda: forward(5), lambda: forward(70), others], ids=["1", "5", "70", "others"]
)
def test_results_do_not_depend_on_defaults(make: Callable[[], dict[str, Call]], default: str) -> None:
    torch.manual_seed(0)
    for name, call in make().items():
        want = call()
        with DEFAULTS[default]():
            found = call()
        for have, expected in zip(
            *((each,) if isinstance(each, Tensor) else each for each in (found, want)), strict=True
        ):
            assert have.dtype == expected.dtype, name
            assert have.device == expected.device, name
            assert torch.equal(have, expected), name
