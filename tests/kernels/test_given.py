"""Open units that are given, as indices or a CSR tensor: op × backend against the dense definition."""

import importlib.util
import inspect

import pytest
import torch
from torch.nn import functional as F

from gatelet.kernels import OpenPattern, gated_ffn, gated_input_linear, gated_linear

# What torch says once of its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse (invariant checks|CSR tensor support):UserWarning")

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
)
BACKENDS = ["dense", "numba", "auto", TRITON]
B, N, D, OUT, K = 7, 30, 9, 6, 4


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).requires_grad_()


class Problem:
    """K open units of each example, in a leading shape; and the dense gates that say the same."""

    def __init__(self, lead=(B,), dtype=torch.float64, most=K):
        self.indices = torch.rand(*lead, N).argsort(-1)[..., :most].sort(-1).values
        self.pattern = OpenPattern.from_indices(self.indices, N)
        self.x, self.w1, self.b1 = draw(*lead, D, dtype=dtype), draw(N, D, dtype=dtype), draw(N, dtype=dtype)
        self.rows2, self.b2 = draw(N, OUT, dtype=dtype), draw(OUT, dtype=dtype)
        self.values = draw(*lead, most, dtype=dtype)

    def wide(self, values):
        shape = (*values.shape[:-1], N)
        return torch.zeros(shape, dtype=values.dtype).scatter(-1, self.indices, values)


def gradients(out, inputs):
    upper = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, inputs, upper)]


def cases(p, **more):
    """Each op at given indices, the dense definition and what both differentiate."""
    give = {"pattern": p.pattern, **more}
    activate = torch.nn.functional.gelu

    def at(dense):
        return dense.gather(-1, p.indices)

    return {
        "gated_linear": (
            (p.x, p.w1, p.b1, p.values),
            lambda **k: gated_linear(p.x, p.w1, p.b1, p.values, **give, **k),
            lambda: at(F.linear(p.x, p.w1, p.b1)) * p.values,
        ),
        "gated_input_linear": (
            (p.values, p.rows2, p.b2),
            lambda **k: gated_input_linear(p.values, weight=p.rows2, bias=p.b2, by_unit=True, **give, **k),
            lambda: p.wide(p.values) @ p.rows2 + p.b2,
        ),
        "gated_ffn": (
            (p.x, p.w1, p.b1, p.values, p.rows2, p.b2),
            lambda **k: gated_ffn(p.x, p.w1, p.b1, p.values, "gelu", p.rows2, p.b2, by_unit=True, **give, **k),
            lambda: (activate(F.linear(p.x, p.w1, p.b1)) * p.wide(p.values)) @ p.rows2 + p.b2,
        ),
    }


OPS = ["gated_linear", "gated_input_linear", "gated_ffn"]


@pytest.mark.parametrize("lead", [(B,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, op, lead):
    p = Problem(lead)
    inputs, run, dense = cases(p)[op]
    for have, want in zip(gradients(run(backend=backend), inputs), gradients(dense(), inputs), strict=True):
        torch.testing.assert_close(have, want)
    with torch.no_grad():
        torch.testing.assert_close(run(backend=backend), dense())


@pytest.mark.parametrize("wanted", ["x", "w1", "b1", "values", "rows2", "b2"])
@pytest.mark.parametrize("backend", ["dense", "numba", TRITON])
def test_each_gradient_alone(backend, wanted):
    p = Problem()
    inputs, run, dense = cases(p)["gated_ffn"]
    for each in inputs:
        each.requires_grad_(each is getattr(p, wanted))
    only = [getattr(p, wanted)]
    for have, want in zip(gradients(run(backend=backend), only), gradients(dense(), only), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_weight_gradients(backend, op):
    p = Problem()
    inputs, run, dense = cases(p)[op]
    have, want = gradients(run(backend=backend, sparse_grad=True), inputs), gradients(dense(), inputs)
    touched = p.indices.unique()
    for a, b, leaf in zip(have[1:], want[1:], inputs, strict=True):
        weight = leaf is p.w1 or leaf is p.rows2
        assert a.is_sparse == weight
        if weight:
            assert a.is_coalesced()
            assert torch.equal(a.indices()[0], touched)
        torch.testing.assert_close(a.to_dense() if weight else a, b)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_optimisers_take_sparse_gradients(optimiser):
    p = Problem()
    before = p.rows2.detach().clone()
    steps = optimiser([p.rows2], lr=0.1)
    gated_input_linear(p.values, p.pattern, p.rows2, by_unit=True, sparse_grad=True).square().sum().backward()
    steps.step()
    moved = (p.rows2.detach() != before).any(1).nonzero().flatten()
    assert torch.equal(moved, p.indices.unique())


@pytest.mark.parametrize("form", ["pattern of CSR", "CSR", "indices"])
@pytest.mark.parametrize("backend", ["dense", "numba", TRITON])
def test_other_ways_to_give_them(backend, form):
    p = Problem()
    csr = p.wide(torch.ones(B, K, dtype=torch.float64)).to_sparse_csr()
    pattern = {"pattern of CSR": OpenPattern.from_indices(csr, N), "CSR": csr, "indices": p.indices}[form]
    want = F.linear(p.x, p.w1).gather(1, p.indices)
    have = gated_linear(p.x, p.w1, None, None, pattern=pattern, backend=backend)
    assert have.shape == (want.shape if form == "indices" else (B * K,))
    torch.testing.assert_close(have.view(B, K), want)
    out = gated_input_linear(have, pattern, p.rows2.t(), backend=backend)
    torch.testing.assert_close(out, p.wide(want) @ p.rows2)


@pytest.mark.parametrize("backend", ["dense", "numba", TRITON])
def test_examples_of_any_number_of_open_units(backend):
    """None, one, all."""
    gates = torch.zeros(4, N, dtype=torch.float64)
    gates[1, 5] = 2
    gates[2] = torch.randn(N, dtype=torch.float64)
    csr, x, weight = gates.to_sparse_csr(), draw(4, D), draw(N, D)
    values = csr.values().clone().requires_grad_()
    have = gradients(gated_linear(x, weight, None, values, pattern=csr, backend=backend), (x, weight, values))
    dense = gates.requires_grad_()
    rows, columns = dense.nonzero(as_tuple=True)
    want = gradients((F.linear(x, weight) * dense)[rows, columns], (x, weight, dense))
    want[3] = want[3][rows, columns]
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("lead", "most"), [((0,), 3), ((3,), 0)], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["dense", "numba", TRITON])
def test_nothing_open(backend, op, lead, most):
    p = Problem(lead, most=most)
    inputs, run, dense = cases(p)[op]
    for have, want in zip(gradients(run(backend=backend), inputs), gradients(dense(), inputs), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["dense", "numba"])
def test_gradgradcheck(backend, op):
    p = Problem((3,))
    inputs, run, dense = cases(p)[op]

    def second(make):
        first = torch.autograd.grad(make().square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    for have, want in zip(second(lambda: run(backend=backend)), second(dense), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    p = Problem(dtype=dtype)
    for _, run, dense in cases(p).values():
        torch.testing.assert_close(run(), dense(), rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.05)


@pytest.mark.parametrize("backend", ["dense", "numba", TRITON])
def test_opcheck(backend):
    p = Problem()
    form = p.pattern.form.tensors()
    check, ops = torch.library.opcheck, torch.ops.gatelet
    values = p.values.flatten().detach().requires_grad_()
    check(ops.gated_linear.default, (p.x, p.w1, p.b1, values, form, [], False, backend, True))
    check(ops.gated_input_linear.default, (values, form, p.rows2, p.b2, True, False, backend, True))
    ffn = (p.x, p.w1, p.b1, values, "gelu", p.rows2, p.b2, form, True, False, backend, True)
    check(ops.gated_ffn.default, ffn)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("indices", "what"),
    [
        ([[0, 1], [2, 30]], "lie in 0 … 29, but 30"),
        ([[-1, 1], [2, 3]], "lie in 0 … 29, but -1"),
        ([[0, 1], [3, 3]], "example 1 repeats unit 3"),
        ([[5, 2], [3, 4]], "example 0 has unit 5 before unit 2"),
    ],
)
def test_wrong_indices_are_named(indices, what, backend):
    with pytest.raises(ValueError, match=f"indices must .*{what}"):
        OpenPattern.from_indices(torch.tensor(indices), 30)
    given = torch.tensor(indices)
    x, weight, values = torch.ones(2, 3), torch.ones(30, 3), torch.ones(given.shape)
    linear, after, ffn = map(inspect.unwrap, (gated_linear, gated_input_linear, gated_ffn))
    with pytest.raises(ValueError, match=f"pattern must .*{what}"):
        linear(x, weight, None, None, pattern=given, backend=backend)
    with pytest.raises(ValueError, match=f"pattern must .*{what}"):
        after(values, given, weight, by_unit=True, backend=backend)
    with pytest.raises(ValueError, match=f"pattern must .*{what}"):
        ffn(x, weight, None, values, "relu", weight, None, pattern=given, by_unit=True, backend=backend)


def test_the_next_example_may_start_lower():
    OpenPattern.from_indices(torch.tensor([[4, 5], [0, 1], [1, 5]]), 6)


@pytest.mark.cpu
@pytest.mark.parametrize("starts", [[0, 2], [0, 0, 2], [0, 2, 2], [0, 0, 2, 2, 2]])
def test_wrong_order_is_found_beside_examples_with_nothing_open(starts):
    def csr(units):
        return torch.sparse_csr_tensor(torch.tensor(starts), torch.tensor(units), torch.ones(2), (len(starts) - 1, 6))

    OpenPattern.from_indices(csr([2, 5]), 6)
    with pytest.raises(ValueError, match=f"example {starts.index(2) - 1} has unit 5 before unit 2"):
        OpenPattern.from_indices(csr([5, 2]), 6)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["dense", "numba"])
@pytest.mark.parametrize("starts", [[0, 10**8, 3], [0, 3, 2], [0, 1, 2], [-(10**8), 1, 3], [1, 2, 3]], ids=str)
def test_a_csr_tensor_whose_parts_do_not_fit(starts, backend):
    csr = torch.sparse_csr_tensor(
        torch.tensor(starts), torch.tensor([1, 2, 3]), torch.ones(3), (2, 30), check_invariants=False
    )
    with pytest.raises(ValueError, match=r"pattern: .*crow_indices\(\) must ascend from 0 to .* 3"):
        gated_linear(torch.ones(2, 3), torch.ones(30, 3), None, None, pattern=csr, backend=backend)


@pytest.mark.parametrize("form", ["pattern", "CSR", "indices"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_that_were_changed_in_place_are_refused(backend, op, form):
    p = Problem()
    csr = p.wide(torch.ones(B, K, dtype=torch.float64)).to_sparse_csr()
    given = p.indices if form != "CSR" else csr.col_indices()
    p.pattern = {"pattern": p.pattern, "CSR": OpenPattern.from_indices(csr, N), "indices": p.indices}[form]
    if form == "CSR":
        p.values = p.values.detach().flatten().requires_grad_()
    _, run, _ = cases(p)[op]
    run(backend=backend).sum().backward()
    out = run(backend=backend)
    given.fill_(10**9)
    with pytest.raises(RuntimeError, match="was changed in place after it was given"):
        out.sum().backward()
    if form != "indices":
        with pytest.raises(RuntimeError, match="indices: was changed in place"):
            run(backend=backend)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, by jvp
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_transforms(backend, op):
    p = Problem()
    inputs, run, dense = cases(p)[op]
    first = inputs[0]

    def of(make):
        return lambda value: at_first(make, value).square().sum()

    def at_first(make, value):
        name = next(name for name in ("x", "values") if getattr(p, name) is first)
        setattr(p, name, value)
        try:
            return make()
        finally:
            setattr(p, name, first)

    run, dense = (lambda: cases(p, backend=backend)[op][1]()), (lambda: cases(p)[op][2]())
    value, tangent = first.detach(), torch.randn_like(first)
    torch.testing.assert_close(torch.func.grad(of(run))(value), torch.func.grad(of(dense))(value))
    several = torch.stack([value, tangent])
    torch.testing.assert_close(torch.func.vmap(of(run))(several), torch.func.vmap(of(dense))(several))
    have, want = (torch.func.jvp(of(each), (value,), (tangent,)) for each in (run, dense))
    torch.testing.assert_close(have, want)


def test_errors_name_the_argument():
    linear, after, ffn = map(inspect.unwrap, (gated_linear, gated_input_linear, gated_ffn))
    p, from_indices = Problem(), inspect.unwrap(OpenPattern.from_indices)
    with pytest.raises(TypeError, match=r"indices must be integers .*float64"):
        OpenPattern.from_indices(p.values, N)
    with pytest.raises(TypeError, match=r"indices must be integers .*complex64"):
        OpenPattern.from_indices(torch.ones(2, 2, dtype=torch.complex64), N)
    with pytest.raises(TypeError, match=r"indices must be a torch\.Tensor, not list"):
        from_indices([[1]], N)
    with pytest.raises(TypeError, match=r"indices: a sparse tensor must be CSR, not torch\.sparse_coo"):
        OpenPattern.from_indices(torch.eye(3).to_sparse(), 3)
    for units in (3.5, True, -1):
        with pytest.raises(TypeError, match=r"units must be an integer of at least 0"):
            from_indices(torch.tensor([[0]]), units)
    with pytest.raises(ValueError, match=r"CSR tensor of shape \(7, 30\), not \(B, 31\)"):
        OpenPattern.from_indices(p.wide(p.values).to_sparse_csr(), N + 1)
    with pytest.raises(ValueError, match=r"gate must have a number for each of pattern's pairs, \(7, 4\)"):
        linear(p.x, p.w1, None, p.values[:, 1:], pattern=p.pattern)
    with pytest.raises(ValueError, match=r"pattern is for gates \(7, 30\)"):
        linear(p.x[1:], p.w1, None, p.values, pattern=p.pattern)
    with pytest.raises(ValueError, match=r"pattern is for gates \(7, 30\), but hidden and weight need \(7, 29\)"):
        after(p.values, p.pattern, p.rows2[1:], by_unit=True)
    with pytest.raises(ValueError, match="hidden must have a number"):
        after(p.values[1:], p.pattern, p.rows2, by_unit=True)
    with pytest.raises(ValueError, match="support goes with gates"):
        linear(p.x, p.w1, None, p.values, pattern=p.pattern, support=p.values != 0)
    with pytest.raises(ValueError, match="sparse_grad=True goes with given indices"):
        linear(p.x, p.w1, None, p.wide(p.values), sparse_grad=True)
    with pytest.raises(ValueError, match="by_unit=True"):
        after(p.values, p.pattern, p.rows2.t(), sparse_grad=True)
    with pytest.raises(TypeError, match=r"gate must be a torch\.Tensor"):
        linear(p.x, p.w1, None, None)
    with pytest.raises(TypeError, match="pattern must be an OpenPattern"):
        ffn(p.x, p.w1, None, p.values, "relu", p.rows2.t(), None, pattern=[1])
    with pytest.raises(NotImplementedError, match="sparse_grad=True does not work under"):
        torch.func.grad(lambda w: linear(p.x.detach(), w, None, None, pattern=p.pattern, sparse_grad=True).sum())(p.w1)
    with pytest.raises(TypeError, match="has no bits"):
        _ = p.pattern.rows
