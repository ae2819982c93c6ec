"""Every op × backend × dtype, forward and every gradient, against the dense definition on identical inputs.

The truth here is written out pair by pair in float64 and uses nothing of the library.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_input_linear, gated_linear, open_pattern

BACKENDS = ("dense", "numba", "auto", "triton")
DTYPES = (torch.float32, torch.float64)
QUICK = settings(max_examples=15, deadline=None, derandomize=True, database=None)

SIZES = st.one_of(st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 130]), st.integers(1, 200))
CASES = st.fixed_dictionaries(
    {
        "batch": SIZES,
        "groups": st.integers(0, 70),
        "group": st.sampled_from([1, 1, 1, 3, 8, 10, 64]),
        "width": SIZES,
        "outputs": st.integers(0, 70),
        "rate": st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
        "scale": st.sampled_from([1e-6, 1.0, 1e6]),
        "layout": st.sampled_from(["plain", "strided", "expanded"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


LARGEST = {
    "batch": lambda value: value % 35,
    "groups": lambda value: value % 5,
    "width": lambda value: min(value, 34),
    "outputs": lambda value: min(value, 34),
}


class Problem:
    """The tensors of a case."""

    def __init__(self, case, dtype, backend):
        if backend == "triton":  # interpreted on a CPU, where a program of a kernel takes milliseconds
            case = {name: LARGEST[name](value) if name in LARGEST else value for name, value in case.items()}
        draw = torch.Generator().manual_seed(case["seed"])
        batch, width, outputs, group = case["batch"], case["width"], case["outputs"], case["group"]
        units = case["groups"] * group

        def tensor(*shape):
            wanted = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
            if case["layout"] == "strided" and len(shape) == 2:  # every second column of a wider matrix, transposed
                wide = torch.zeros(2 * shape[1], shape[0], dtype=dtype)
                wide[::2] = wanted.t()
                wanted = wide[::2].t()
            if case["layout"] == "expanded" and len(shape) == 2 and shape[0]:
                wanted = wanted[:1].expand(shape)
            return wanted.requires_grad_()

        self.x = tensor(batch, width)
        self.weight, self.w2 = tensor(units, width), tensor(outputs, units)
        self.bias = tensor(units) if case["bias"] else None
        self.b2 = tensor(outputs) if case["bias"] else None
        is_open = torch.rand(batch, case["groups"], generator=draw) < case["rate"]
        value = torch.randn(is_open.shape, generator=draw, dtype=torch.float64) * case["scale"]
        self.gate = (value * is_open).to(dtype).requires_grad_()
        self.hidden = tensor(batch, units)
        self.group = group
        self.upper = torch.randn(batch, units, generator=draw, dtype=torch.float64).to(dtype)
        self.upper2 = torch.randn(batch, outputs, generator=draw, dtype=torch.float64).to(dtype)

    def mask(self):
        return self.gate.detach().repeat_interleave(self.group, 1) != 0


def double(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def gradients(out, inputs, upper):
    wanted = [each for each in inputs if each is not None]
    return [out, *torch.autograd.grad(out, wanted, upper, allow_unused=True, materialize_grads=True)]


def compare(found, truth, magnitude, dtype, roundings=30):
    """Errors against the sum of the absolute values of what is added up, the only scale that rounding knows."""
    eps = torch.finfo(dtype).eps
    for index, (have, want, size) in enumerate(zip(found, truth, magnitude, strict=True)):
        assert have.dtype == dtype
        assert have.shape == want.shape
        bound = roundings * eps * size.abs() + 100 * torch.finfo(dtype).tiny
        worst = ((have.double() - want).abs() - bound).max() if have.numel() else torch.tensor(-1.0)
        assert worst <= 0, f"result {index} is off by {worst:g} more than rounding explains"


def truths(make, inputs, upper):
    """The results in float64, and those of the absolute values (all terms added up without cancelling)."""
    exact = [double(each) for each in inputs]
    size = [None if each is None else each.detach().double().abs().requires_grad_() for each in inputs]
    return gradients(make(*exact), exact, upper.double()), gradients(make(*size), size, upper.double().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(case=CASES)
def test_gated_linear(backend, dtype, case):
    p = Problem(case, dtype, backend)
    mask = p.mask()

    def dense(x, weight, bias, gate):
        return F.linear(x, weight, bias) * gate.repeat_interleave(p.group, 1) * mask

    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(dense, inputs, p.upper)
    found = gradients(gated_linear(*inputs, backend=backend), inputs, p.upper)
    is_open = p.gate.detach() != 0
    truth[-1], size[-1] = truth[-1] * is_open, size[-1] * is_open
    compare(found, truth, size, dtype)
    with torch.no_grad():
        compare([gated_linear(*inputs, backend=backend)], truth[:1], size[:1], dtype)
        given_pattern = gated_linear(*inputs, pattern=open_pattern(p.gate, p.group), backend=backend)
        compare([given_pattern], truth[:1], size[:1], dtype)


RECORDS = {
    "one example, rows of weights with a rest": (1, 300, 1030, 0.3),
    "one example, all open": (1, 130, 64, 1.0),
    "more examples of a unit than a record holds, beside units with fewer": (40, 1100, 149, 0.25),
    "full records only": (64, 64, 257, 1.0),
    "more examples than a task takes, and more units than are listed at once": (300, 1090, 70, 0.1),
}


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", RECORDS.values(), ids=RECORDS)
def test_the_limits_of_records_and_tasks(shape, dtype):
    batch, units, width, rate = shape
    case = {"batch": batch, "groups": units, "group": 1, "width": width, "outputs": 3, "rate": rate, "scale": 1.0}
    p = Problem({**case, "layout": "plain", "bias": True, "seed": 0}, dtype, "numba")
    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(lambda x, weight, bias, gate: F.linear(x, weight, bias) * gate, inputs, p.upper)
    truth[-1], size[-1] = truth[-1] * p.mask(), size[-1] * p.mask()
    compare(gradients(gated_linear(*inputs, backend="numba"), inputs, p.upper), truth, size, dtype)
    with torch.no_grad():
        compare([gated_linear(*inputs, backend="numba")], truth[:1], size[:1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(case=CASES)
def test_gated_linear_with_a_wider_support(backend, dtype, case):
    p = Problem(case, dtype, backend)
    mask = p.mask()
    draw = torch.Generator().manual_seed(case["seed"] + 1)
    support = (p.gate.detach() != 0) | (torch.rand(p.gate.shape, generator=draw) < 0.2)

    def dense(x, weight, bias, gate):
        pre = F.linear(x, weight, bias)
        path = pre.detach() * gate.repeat_interleave(p.group, 1)  # the gate's gradient, on all
        return pre * gate.detach().repeat_interleave(p.group, 1) * mask + path - path.detach()

    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(dense, inputs, p.upper)
    found = gradients(gated_linear(*inputs, support=support, backend=backend), inputs, p.upper)
    truth[-1], size[-1] = truth[-1] * support, size[-1] * support
    compare(found, truth, size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@QUICK
@given(case=CASES)
def test_gated_input_linear(backend, dtype, case):
    p = Problem(case, dtype, backend)
    mask = p.mask()
    inputs = (p.hidden, p.w2, p.b2)
    truth, size = truths(lambda hidden, w2, b2: F.linear(hidden * mask, w2, b2), inputs, p.upper2)
    pattern = open_pattern(p.gate, p.group)
    found = gradients(gated_input_linear(p.hidden, pattern, p.w2, p.b2, backend=backend), inputs, p.upper2)
    compare(found, truth, size, dtype)
    by_unit = p.w2.detach().t().contiguous().t()
    with torch.no_grad():
        compare([gated_input_linear(p.hidden, pattern, by_unit, p.b2, backend=backend)], truth[:1], size[:1], dtype)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(QUICK, max_examples=8)
@given(case=CASES)
def test_gated_ffn(backend, activation, case):
    """In float64, where a smooth activation does not hide errors behind its own rounding."""
    p = Problem(case, torch.float64, backend)
    mask = p.mask()
    act = (lambda z: z) if activation == "identity" else getattr(F, activation)

    def dense(x, w1, b1, gate, w2, b2):
        return F.linear(act(F.linear(x, w1, b1)) * gate.repeat_interleave(p.group, 1) * mask, w2, b2)

    inputs = (p.x, p.weight, p.bias, p.gate, p.w2, p.b2)
    exact = [double(each) for each in inputs]
    truth = gradients(dense(*exact), exact, p.upper2)
    gate_at = 4 if p.bias is not None else 3
    truth[gate_at] = truth[gate_at] * (p.gate.detach() != 0)
    out = gated_ffn(p.x, p.weight, p.bias, p.gate, activation, p.w2, p.b2, backend=backend)
    found = gradients(out, inputs, p.upper2)
    for have, want in zip(found, truth, strict=True):
        scale = want.abs().max().item() if want.numel() else 1.0
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-11 * scale + 1e-300)
    with torch.no_grad():
        again = gated_ffn(p.x, p.weight, p.bias, p.gate, activation, p.w2, p.b2, backend=backend)
    torch.testing.assert_close(again, out)


def test_the_comparison_rejects_a_wrong_sum():
    """One pair's product left out of a sum of a thousand is seen."""
    x, weight = torch.rand(1, 1000), torch.rand(1, 1000)
    short = weight.clone()
    short[0, 500] = 0
    make = lambda x, w: x @ w.t()  # noqa: E731
    truth, size = truths(make, (x, weight), torch.ones(1, 1))
    with pytest.raises(AssertionError, match="rounding"):
        compare([make(x, short)], truth[:1], size[:1], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes(backend):
    x, weight, gate = torch.randn(2, 3, 5, 64), torch.randn(96, 64), (torch.rand(2, 3, 5, 96) < 0.1).float()
    out = gated_linear(x, weight, None, gate, backend=backend)
    torch.testing.assert_close(out, F.linear(x, weight) * gate)
    one = gated_linear(x[0, 0, 0], weight, None, gate[0, 0, 0], backend=backend)
    torch.testing.assert_close(one, out[0, 0, 0])
    pattern = open_pattern(gate)
    torch.testing.assert_close(gated_input_linear(out, pattern, weight.t(), backend=backend), out @ weight)
