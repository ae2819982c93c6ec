"""Derivatives of second order, forward-mode derivatives and transforms: those of the naive version, never zeros."""

import pytest
import torch
from torch.autograd import forward_ad, functional
from torch.nn import functional as F

from gatelet.kernels import gated_ffn, gated_input_linear, gated_linear, open_pattern

# torch scripts its own formulas when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

BACKENDS = ["dense", "numba", "auto", "triton"]


def problem(group=1):
    draw = torch.Generator().manual_seed(5)

    def tensor(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    gate = tensor(3, 6 // group)
    gate[0, 0] = gate[2, 1] = 0
    return tensor(3, 4), tensor(6, 4), tensor(6), gate, tensor(5, 6), tensor(5), group


def ops(backend, group=1, support=None):
    """Each op and its dense definition, as functions of tensors that all have gradients."""
    *_, gate, _, _, _ = problem(group)
    is_open, pattern = gate != 0, open_pattern(gate, group)
    wide = is_open if support is None else support

    def each(gate):
        return gate.repeat_interleave(group, 1)

    return {
        "gated_linear": (
            (0, 1, 2, 3),
            lambda x, w, b, g: gated_linear(x, w, b, g, backend=backend, support=support),
            lambda x, w, b, g: F.linear(x, w, b) * each(torch.where(wide, g, 0)),
        ),
        "gated_input_linear": (
            ("hidden", 4, 5),
            lambda h, w, b: gated_input_linear(h, pattern, w, b, backend=backend),
            lambda h, w, b: F.linear(torch.where(each(is_open), h, 0), w, b),
        ),
        "gated_ffn": (
            (0, 1, 2, 3, 4, 5),
            lambda x, w, b, g, v, c: gated_ffn(x, w, b, g, "gelu", v, c, backend=backend),
            lambda x, w, b, g, v, c: F.linear(F.gelu(F.linear(x, w, b)) * each(torch.where(is_open, g, 0)), v, c),
        ),
    }


def inputs(places, group=1):
    given = problem(group)
    hidden = given[0] @ given[1].t()
    return [(hidden if place == "hidden" else given[place]).clone().requires_grad_() for place in places]


def second(function, tensors, upper):
    """The gradients of a function of the gradients; ``upper`` None for a constant incoming gradient."""
    out = function(*tensors)
    first = torch.autograd.grad(out.sum() if upper is None else (out * upper).sum(), tensors, create_graph=True)
    total = sum(each.square().sum() for each in first)
    return torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op", ["gated_linear", "gated_input_linear", "gated_ffn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order(backend, op, group, constant):
    places, function, dense = ops(backend, group)[op]
    upper = None if constant else torch.randn(3, 6 if op == "gated_linear" else 5, dtype=torch.float64)
    have, want = (second(each, inputs(places, group), upper) for each in (function, dense))
    assert any(each.count_nonzero() for each in want)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_with_a_wider_support(backend):
    support = torch.ones(3, 6, dtype=torch.bool)
    support[1, 1] = problem()[3][1, 1] != 0
    places, function, dense = ops(backend, support=support)["gated_linear"]
    have, want = (second(each, inputs(places), None) for each in (function, dense))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["gated_linear", "gated_input_linear", "gated_ffn"])
@pytest.mark.parametrize("backend", ["dense", "numba"])
def test_gradgradcheck(backend, op):
    places, function, _ = ops(backend)[op]
    tensors = inputs(places)
    if op != "gated_input_linear":  # a closed gate opens where it moves
        gate = tensors[3].detach()
        is_open, values = gate != 0, gate[gate != 0].clone().requires_grad_()

        def spread(*given):
            moved = torch.zeros_like(gate).masked_scatter(is_open, given[3])
            return function(*given[:3], moved, *given[4:])

        assert torch.autograd.gradgradcheck(spread, [*tensors[:3], values, *tensors[4:]])
    else:
        assert torch.autograd.gradgradcheck(function, tensors)


def kernels_of(device):
    """The kernels that run on the device of the tests."""
    return "numba" if device == "cpu" else "triton"


def test_arguments_that_depend_on_each_other_are_differentiated_once(device):
    """x is a function of the weight: its own derivative must not enter the op's a second time."""
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([[1.0, 0, 2, 0]] * 3, dtype=torch.float64)
    start = torch.randn(3, 4, dtype=torch.float64)

    def run(linear):
        (slope,) = torch.autograd.grad(linear(start @ weight).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), weight)[0]

    have = run(lambda x: gated_linear(x, weight, None, gate, backend=kernels_of(device)))
    torch.testing.assert_close(have, run(lambda x: F.linear(x, weight) * gate))


def test_hessian_and_products_with_it():
    x, weight, bias, gate, *_ = problem()

    def loss(linear):
        return lambda w: linear(w).square().sum()

    ours, dense = loss(lambda w: gated_linear(x, w, bias, gate)), loss(lambda w: F.linear(x, w, bias) * gate)
    vector = torch.randn_like(weight)
    torch.testing.assert_close(functional.hessian(ours, weight), functional.hessian(dense, weight))
    for product in (functional.hvp, functional.vhp):
        torch.testing.assert_close(product(ours, weight, vector)[1], product(dense, weight, vector)[1])
    torch.testing.assert_close(torch.func.hessian(ours)(weight), torch.func.hessian(dense)(weight))


@pytest.mark.parametrize("op", ["gated_linear", "gated_input_linear", "gated_ffn"])
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_forward_mode(backend, op):
    places, function, dense = ops(backend)[op]
    tensors = [each.detach() for each in inputs(places)]
    tangents = [torch.randn_like(each) for each in tensors]

    def tangent(run):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(run(*map(forward_ad.make_dual, tensors, tangents))).tangent

    torch.testing.assert_close(tangent(function), tangent(dense))
    assert tangent(function).count_nonzero()


def test_forward_mode_is_refused_by_kernels_asked_for_by_name(device):
    name = kernels_of(device)
    says = rf'backend="{name}" has no torch\.func transforms and no forward-mode'
    x, weight, bias, gate, *_ = problem()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=says),
    ):
        gated_linear(forward_ad.make_dual(x, x), weight, bias, gate, backend=name)
