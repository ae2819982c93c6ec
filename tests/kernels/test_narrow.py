"""Weights of few bytes: values against float64, errors within what the format rounds."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import Int8Rows, gated_ffn, gated_linear, int8_rows, narrow_ffn, narrow_input_linear, narrow_linear
from gatelet.kernels.backends.numba import narrow
from gatelet.kernels.backends.rows import as_float

pytestmark = pytest.mark.cpu
SIZES = ((1, 37, 130, 21, 130), (1, 256, 70, 300, 70), (3, 5, 64, 8, 16), (16, 130, 200, 70, 200))
"""B, D, N, O, G: vectors with and without a rest, one example and several, groups."""
KINDS = {"float32": lambda weight: weight, "bfloat16": Tensor.bfloat16, "int8": int8_rows}
FLOAT = 2.0**-23
"""What float32 rounds, relative."""


def problem(batch: int, width: int, units: int, outputs: int, gates: int) -> dict[str, Tensor]:
    gate = torch.rand(batch, gates) * (torch.rand(batch, gates) < 0.3)
    gate[-1] = 0  # an example with nothing open
    gate[0, -1] = 0.5
    return {
        "x": torch.randn(batch, width),
        "w1": torch.randn(units, width),
        "w3": torch.randn(units, width),
        "w2": torch.randn(units, outputs),
        "b1": torch.randn(units),
        "b3": torch.randn(units),
        "b2": torch.randn(outputs),
        "gate": gate,
        "each": gate.repeat_interleave(units // gates, 1),
    }


@pytest.mark.parametrize("backend", ["dense", "numba"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_values(sizes: tuple[int, ...], kind: str, backend: str) -> None:
    p = problem(*sizes)
    w1, w2, w3 = (KINDS[kind](p[name]) for name in ("w1", "w2", "w3"))
    full = {name: each.double() for name, each in p.items()}
    z = F.linear(full["x"], as_float(w1).double(), full["b1"])
    hidden = F.silu(z) * full["each"]
    have = narrow_linear(p["x"], w1, p["b1"], p["gate"], "silu", backend=backend)
    torch.testing.assert_close(have.double(), hidden, rtol=1e-4, atol=1e-5)
    assert have[p["each"] == 0].eq(0).all()

    have = narrow_input_linear(hidden.float(), w2, p["b2"], backend=backend)
    want = hidden @ as_float(w2).double() + full["b2"]
    torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-4)

    have = narrow_ffn(p["x"], w1, p["b1"], p["gate"], "silu", w2, backend=backend)
    torch.testing.assert_close(have.double(), want - full["b2"], rtol=1e-4, atol=1e-4)
    factor = F.linear(full["x"], as_float(w3).double(), full["b3"])
    have = narrow_ffn(p["x"], w1, p["b1"], p["gate"], "silu", w2, p["b2"], w3=w3, b3=p["b3"], backend=backend)
    want = (hidden * factor) @ as_float(w2).double() + full["b2"]
    torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["dense", "numba"])
def test_errors_are_the_formats(backend: str) -> None:
    """bfloat16 keeps 8 bits of a number, int8 is off by half a step; float32 adds D of its roundings."""
    p = problem(5, 200, 70, 9, 70)
    exact = F.linear(p["x"].double(), p["w1"].double()) * p["each"]
    size = F.linear(p["x"].double().abs(), p["w1"].double().abs()) * p["each"]
    rounding = 200 * FLOAT * size
    rows = int8_rows(p["w1"])
    bounds = {
        "bfloat16": 2.0**-8 * size,
        "int8": 0.5 * rows.scales.double() * p["x"].double().abs().sum(1, keepdim=True) * p["each"],
    }
    for kind, bound in bounds.items():
        have = narrow_linear(p["x"], KINDS[kind](p["w1"]), None, p["gate"], backend=backend)
        error = (have.double() - exact).abs()
        assert (error <= bound + 2 * rounding).all(), kind
        assert error.max() > 0.01 * bound.max(), f"{kind} was not used"


def test_int8_rows() -> None:
    weight = torch.randn(30, 17) * torch.logspace(-6, 6, 30)[:, None]
    weight[3] = 0
    rows = int8_rows(weight.requires_grad_())
    error = (as_float(rows) - weight).abs()
    assert (error <= 0.5001 * rows.scales[:, None]).all()
    assert rows.values[weight.abs().amax(1) > 0].abs().amax(1).eq(127).all()
    assert rows.shape == (30, 17)
    assert not rows.scales.requires_grad
    with pytest.raises(ValueError, match="weight must be finite"):
        int8_rows(torch.tensor([[torch.inf]]))


def test_bfloat16_activations() -> None:
    p = problem(2, 64, 70, 33, 70)
    low = {name: each.bfloat16() for name, each in p.items()}
    have = narrow_ffn(low["x"], low["w1"], low["b1"], low["gate"], "gelu", low["w2"], low["b2"], backend="numba")
    assert have.dtype == torch.bfloat16
    full = {name: each.float() for name, each in low.items()}
    want = (F.gelu(F.linear(full["x"], full["w1"], full["b1"])) * full["gate"]) @ full["w2"] + full["b2"]
    torch.testing.assert_close(have.float(), want, rtol=2.0**-7, atol=1e-3)


def test_what_is_closed_is_not_read_and_threads_change_no_bit() -> None:
    p = problem(1, 300, 900, 130, 900)
    closed = p["gate"][0] == 0
    closed[5] = False
    for name in ("w1", "w3", "w2"):
        p[name][closed] = torch.nan
    args = (p["x"], p["w1"], p["b1"], p["gate"], "relu", p["w2"], p["b2"])
    alone = narrow_ffn(*args, w3=p["w3"], backend="numba")
    torch.set_num_threads(3)
    try:
        together = narrow_ffn(*args, w3=p["w3"], backend="numba")
    finally:
        torch.set_num_threads(1)
    assert alone.isfinite().all()
    assert alone.equal(together)


@pytest.mark.parametrize("sizes", SIZES[:3])
def test_a_few_float32_examples_take_this_way(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(*sizes)
    p["gate"][0, 0] = torch.nan  # open
    p["w1"][p["each"].ne(0).logical_not().all(0)] = torch.inf  # closed for everybody: not read
    taken: list[str] = []
    for name in ("linear", "ffn"):
        way = getattr(narrow, name)
        monkeypatch.setattr(
            narrow, name, lambda *args, way=way, name=name, **more: (taken.append(name), way(*args, **more))[1]
        )
    for bias in (p["b1"], None):
        have = gated_linear(p["x"], p["w1"], bias, p["gate"], backend="numba")
        torch.testing.assert_close(
            have, gated_linear(p["x"], p["w1"], bias, p["gate"], backend="dense"), equal_nan=True
        )
        args = (p["x"], p["w1"], bias, p["gate"], "gelu", p["w2"].t(), p["b2"])
        have, want = (gated_ffn(*args, backend=backend) for backend in ("numba", "dense"))
        torch.testing.assert_close(have, want, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert taken == ["linear", "ffn"] * 2


def test_many_examples_and_leading_shapes() -> None:
    p = problem(24, 9, 20, 5, 20)
    have = narrow_linear(p["x"].view(4, 6, 9), int8_rows(p["w1"]), p["b1"], p["gate"].view(4, 6, 20))
    want = F.linear(p["x"], as_float(int8_rows(p["w1"])), p["b1"]) * p["gate"]
    torch.testing.assert_close(have, want.view(4, 6, 20))
    assert narrow_linear(p["x"][:0], p["w1"], None, p["gate"][:0]).shape == (0, 20)
    assert narrow_ffn(p["x"][0], p["w1"], None, p["gate"][0], "relu", p["w2"]).shape == (5,)


def _bad(change: str, p: dict[str, Any]) -> dict[str, Any]:
    rows = int8_rows(p["w1"])
    changes: dict[str, dict[str, Any]] = {
        "scales": {"w1": Int8Rows(rows.values, rows.scales[:-1]), "w2": int8_rows(p["w2"]), "w3": None},
        "alike": {"w2": p["w2"].bfloat16()},
        "w2 rows": {"w2": p["w2"][:-1]},
        "w3 rows": {"w3": p["w3"][:-1], "b3": None},
        "width": {"x": p["x"][:, :-1]},
        "bias": {"b1": p["b1"][:-1]},
        "dtype": {"x": p["x"].double()},
        "half": {"w1": p["w1"].half()},
        "b3": {"w3": None},
    }
    return p | changes[change]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ("scales", ValueError, "w1 must have a scale for each of its 12 rows, not 11"),
        ("alike", TypeError, "w1, w2 and w3 must have one type"),
        ("w2 rows", ValueError, "w2 must have a row for each of w1's 12 units"),
        ("w3 rows", ValueError, "w3 must have a row for each of w1's 12 units"),
        ("width", ValueError, "x must have 7 features"),
        ("bias", ValueError, "b1 must have shape"),
        ("dtype", TypeError, "x must be float32 or bfloat16"),
        ("half", TypeError, "w1 must be float32, bfloat16 or from int8_rows"),
        ("b3", ValueError, "b3 was given without w3"),
    ],
)
def test_bad_arguments(change: str, error: type[Exception], words: str) -> None:
    p = _bad(change, problem(2, 7, 12, 5, 12))
    with pytest.raises(error, match=words):
        inspect.unwrap(narrow_ffn)(
            p["x"], p["w1"], p["b1"], p["gate"], "silu", p["w2"], p["b2"], w3=p["w3"], b3=p["b3"]
        )


def test_refusals() -> None:
    p = problem(2, 7, 12, 5, 12)
    with pytest.raises(RuntimeError, match="narrow_linear is for inference and has no gradient"):
        narrow_linear(p["x"].requires_grad_(), p["w1"], None, p["gate"])
    with torch.no_grad():
        narrow_linear(p["x"], p["w1"], None, p["gate"])
    many = copy.deepcopy(p["x"].detach()).repeat(9, 1)
    with pytest.raises(ValueError, match=r'backend="numba" cannot run this: 18 examples are more than 16'):
        narrow_linear(many, p["w1"], None, p["gate"].repeat(9, 1), backend="numba")
    with pytest.raises(ValueError, match="activation"):
        narrow_linear(many, p["w1"], None, p["gate"].repeat(9, 1), "tanh")
