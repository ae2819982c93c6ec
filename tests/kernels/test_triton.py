"""The Triton kernels: each form in each dtype, what is asked of them where they are not, and that they compile.

On a CPU they run in Triton's interpreter, program by program; with ``--device cuda`` as they are.
"""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch
from test_parity import compare, gradients, truths
from torch.nn import functional as F

from gatelet.kernels import choose, explain, gated_ffn, gated_input_linear, gated_linear, open_pattern, pattern
from gatelet.kernels.backends import Layer, dense, triton

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# (B, groups, group): one example; few; tiles; groups too small for lists; lists of one word and of several; a group
# that is no tile's size; a group of two tiles.
FORMS = {
    "one": (1, 200, 1),
    "few": (5, 70, 1),
    "few, groups": (16, 3, 20),
    "tiles": (70, 130, 1),
    "tiles, small groups": (17, 20, 3),
    "lists": (66, 5, 16),
    "lists of several words": (140, 3, 24),
    "lists, two tiles": (20, 2, 130),
}


class Problem:
    def __init__(self, form, dtype, width=65, outputs=33, rate=0.3):
        batch, groups, self.group = FORMS[form]
        units = groups * self.group

        def tensor(*shape):
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

        self.x, self.weight, self.bias = tensor(batch, width), tensor(units, width), tensor(units)
        self.w2, self.b2, self.hidden = tensor(outputs, units), tensor(outputs), tensor(batch, units)
        value = torch.randn(batch, groups, dtype=torch.float64)
        is_open = torch.rand(batch, groups) < rate
        if form == "lists":  # of no example, of one, of a block of them, of one more, of all
            is_open = torch.arange(batch).unsqueeze(1) < torch.tensor([0, 1, 64, 65, 66])
        self.gate = (value * is_open).to(dtype).requires_grad_()
        self.support = (self.gate.detach() != 0) | (torch.rand(batch, groups) < 0.2)
        self.upper = torch.randn(batch, units, dtype=torch.float64).to(dtype)
        self.upper2 = torch.randn(batch, outputs, dtype=torch.float64).to(dtype)
        self.mask = self.gate.detach().repeat_interleave(self.group, 1) != 0

    def each(self, gate):
        return gate.repeat_interleave(self.group, 1)


# float32 rounds sums of a hundred products; half precision rounds twice: the coefficient, and the sum.
ROUNDINGS = {torch.float32: 30, torch.float64: 30, torch.bfloat16: 3, torch.float16: 3}


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gated_linear(form, dtype):
    p = Problem(form, dtype)
    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(lambda x, w, b, gate: F.linear(x, w, b) * p.each(gate) * p.mask, inputs, p.upper)
    is_open = p.gate.detach() != 0
    truth[-1], size[-1] = truth[-1] * is_open, size[-1] * is_open
    found = gradients(gated_linear(*inputs, backend="triton"), inputs, p.upper)
    compare(found, truth, size, dtype, ROUNDINGS[dtype])
    with torch.no_grad():
        compare([gated_linear(*inputs, backend="triton")], truth[:1], size[:1], dtype, ROUNDINGS[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_a_wider_support(form):
    p = Problem(form, torch.float64)

    def dense(x, weight, bias, gate):
        pre = F.linear(x, weight, bias)
        path = pre.detach() * p.each(gate)
        return pre * p.each(gate.detach()) * p.mask + path - path.detach()

    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(dense, inputs, p.upper)
    truth[-1], size[-1] = truth[-1] * p.support, size[-1] * p.support
    found = gradients(gated_linear(*inputs, support=p.support, backend="triton"), inputs, p.upper)
    compare(found, truth, size, torch.float64)


@pytest.mark.parametrize("form", ["few", "tiles", "lists"])
def test_inf_but_closed_in_a_wider_support(form):
    p = Problem(form, torch.float64)
    with torch.no_grad():
        p.gate[:, 1], p.support[:, 1] = 0, True
        p.weight[p.group : 2 * p.group] = torch.inf
    out = gated_linear(p.x, p.weight, p.bias, p.gate, support=p.support, backend="triton")
    assert (out[:, p.group : 2 * p.group] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("form", ["few", "tiles", "lists"])
def test_an_example_of_nan_spoils_the_units_that_it_has_open(form):
    p = Problem(form, torch.float64, width=5)
    with torch.no_grad():
        p.x[0] = torch.nan
    inputs = (p.x, p.weight, p.bias, p.gate)
    found, want = (gradients(gated_linear(*inputs, backend=each), inputs, p.upper) for each in ("triton", "dense"))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert found[2].isnan().any()
    assert not found[2].isnan().all()


def test_a_single_pair_whose_bit_is_a_sign():
    p = Problem("tiles", torch.float64, width=5)
    with torch.no_grad():
        p.gate.zero_()
        p.gate[63, 63] = 2.0
    inputs = (p.x, p.weight, p.bias, p.gate)
    found, want = (gradients(gated_linear(*inputs, backend=each), inputs, p.upper) for each in ("triton", "dense"))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
        assert a.count_nonzero()


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "silu"])
def test_nan_passes_an_open_unit(activation):
    x, gate = torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), torch.ones(2, 3)
    out = gated_ffn(x, torch.ones(3, 2), None, gate, activation, torch.ones(4, 3), None, backend="triton")
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gated_input_linear(form, dtype):
    p = Problem(form, dtype)
    inputs = (p.hidden, p.w2, p.b2)
    truth, size = truths(lambda hidden, w2, b2: F.linear(hidden * p.mask, w2, b2), inputs, p.upper2)
    found = gated_input_linear(p.hidden, open_pattern(p.gate, p.group), p.w2, p.b2, backend="triton")
    compare(gradients(found, inputs, p.upper2), truth, size, dtype, ROUNDINGS[dtype])


@pytest.mark.parametrize(("form", "activation"), list(zip(FORMS, ["gelu", "silu", "relu"] * 3, strict=False)))
def test_gated_ffn(form, activation):
    p = Problem(form, torch.float64)
    act = getattr(F, activation)

    def dense(x, w1, b1, gate, w2, b2):
        return F.linear(act(F.linear(x, w1, b1)) * p.each(gate) * p.mask, w2, b2)

    inputs = (p.x, p.weight, p.bias, p.gate, p.w2, p.b2)
    truth, _ = truths(dense, inputs, p.upper2)
    truth[4] = truth[4] * (p.gate.detach() != 0)
    arguments = (p.x, p.weight, p.bias, p.gate, activation, p.w2, p.b2)
    found = gradients(gated_ffn(*arguments, backend="triton"), inputs, p.upper2)
    for have, want in zip(found, truth, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(gated_ffn(*arguments, backend="triton"), found[0])


@pytest.mark.parametrize("programs", [1, 1 << 20])
@pytest.mark.parametrize("form", ["few", "lists of several words"])
def test_any_division_of_the_work(form, programs, monkeypatch):
    from gatelet.kernels.backends.triton import products

    shares = {"FEW_PROGRAMS": programs, "CHUNK": programs, "LIST_WORDS": 2, "SPAN": 16, "PROGRAMS": min(programs, 64)}
    for name, value in shares.items():
        monkeypatch.setattr(products, name, value)
    p = Problem(form, torch.float64)
    inputs = (p.x, p.weight, p.bias, p.gate)
    truth, size = truths(lambda x, w, b, gate: F.linear(x, w, b) * p.each(gate) * p.mask, inputs, p.upper)
    is_open = p.gate.detach() != 0
    truth[-1], size[-1] = truth[-1] * is_open, size[-1] * is_open
    compare(gradients(gated_linear(*inputs, backend="triton"), inputs, p.upper), truth, size, torch.float64)


@pytest.mark.parametrize("form", ["few", "tiles", "lists of several words"])
def test_the_same_bits_again(form):
    """No sum depends on who comes first."""
    p = Problem(form, torch.float32)
    inputs = (p.x, p.weight, p.bias, p.gate)
    first, second = (gradients(gated_linear(*inputs, backend="triton"), inputs, p.upper) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [20, 90])
def test_where_a_dense_product_is_not_finite_it_is_formed_again(batch):
    """The product is looked at, or, where they are fewer numbers, the rows."""
    from gatelet.kernels.backends.triton import products

    coefficient = torch.randn(batch, 70) * (torch.rand(batch, 70) < 0.1)
    rows, bias = torch.randn(70, 65), torch.randn(65)
    rows[3, 5], rows[7, 9] = torch.nan, torch.inf
    coefficient[:, [3, 7]] = 0
    coefficient[1, 3], coefficient[2, 7] = 1, -1
    want = coefficient.double() @ rows.nan_to_num(0, 0, 0).double()
    want[1, 5], want[2, 9] = torch.nan, -torch.inf
    found = torch.addmm(bias, coefficient, rows)
    products.repair(found, coefficient, rows, bias)
    torch.testing.assert_close(found, (want + bias).float(), equal_nan=True)
    torch.testing.assert_close(dense.gathered(coefficient, rows, bias), (want + bias).float(), equal_nan=True)
    mirrored = (rows.t() @ coefficient.t()).t()
    products.repair(mirrored, coefficient, rows)
    torch.testing.assert_close(mirrored, want.float(), equal_nan=True)


@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_what_is_left_beside_dense_products(group, activation, wide):
    """What the dense backend runs on a CUDA device."""
    from gatelet.kernels.backends.triton import products

    batch, gates = 70, 50
    z, upper = (torch.randn(batch, gates * group) for _ in range(2))
    gate = torch.randn(batch, gates) * (torch.rand(batch, gates) < 0.3)
    z.masked_fill_(gate.repeat_interleave(group, 1) == 0, torch.nan)
    support = products.pattern(torch.ones_like(gate), gates * group) if wide else None
    if wide:
        z = z.nan_to_num(0.5)
    every = gate.repeat_interleave(group, 1)
    safe = torch.where(every != 0, z, 0)
    value = safe if activation == "identity" else F.gelu(safe)
    torch.testing.assert_close(products.finish(z, gate, None, activation), value * every)
    want = dense.pointwise(upper, z, gate, None, support, need_gate=True, need_coefficient=True, activation=activation)
    have = products.pointwise(
        upper, z, gate, None, support, need_gate=True, need_coefficient=True, activation=activation
    )
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)
    bits = products.pattern(gate, gates * group)
    torch.testing.assert_close(products.finish(z.nan_to_num(), None, bits.rows), torch.where(every != 0, z, 0))


def lists_problem(dtype, batch=7, units=90, width=70):
    """Lists of none, of one, and of more pairs than a program takes at a time."""
    gate = torch.rand(batch, units) < torch.tensor([0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0])[:batch, None]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), gate.sum(1).cumsum(0)])
    examples, names = gate.nonzero(as_tuple=True)
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((batch, width), (units, width), units)]
    return (
        pattern.Lists(starts, names, units),
        examples,
        *tensors,
        torch.randn(len(names), dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
def test_lists_of_open_units(dtype):
    from gatelet.kernels.backends.triton import products

    lists, examples, x, weight, bias, values = lists_problem(dtype)
    shift = torch.randn(x.shape[1], dtype=torch.float64).to(dtype)
    wide = [each.double() for each in (x, weight, bias, values, shift)]
    wx, ww, wb, wv, ws = wide
    places = torch.finfo(dtype).eps * 30

    def close(have, want):
        torch.testing.assert_close(have.double(), want, rtol=places, atol=places * 10)

    z = (wx[examples] * ww[lists.units]).sum(1) + wb[lists.units]
    out, pre = products.dots(x, weight, bias, None, lists, keep=True)
    close(out, z)
    close(pre, z)
    out, _ = products.dots(x, weight, bias, values, lists, activation="relu")
    close(out, z.relu() * wv)
    sums = torch.zeros_like(wx).index_add(0, examples, wv[:, None] * ww[lists.units])
    close(products.by_example(values, weight, shift, lists), sums + ws)
    rows = torch.zeros_like(ww).index_add(0, lists.units, wv[:, None] * wx[examples])
    total = torch.zeros_like(wb).index_add(0, lists.units, wv)
    for transposed in (False, True):
        have, whole = products.by_unit(values, x, lists, need_sum=True, transposed=transposed)
        close(have.t() if transposed else have, rows)
        close(whole, total)
    sparse = products.touched(values, x, lists)
    close(sparse.to_dense(), rows)
    assert torch.equal(sparse.indices()[0], lists.units.unique())
    turned = products.turn(lists)
    assert torch.equal(lists.units[turned.places], lists.units.sort().values)
    assert torch.equal(examples[turned.places], turned.examples)
    coefficient, slopes = products.pointwise(
        out, z.to(dtype), values, lists, need_gate=True, need_coefficient=True, activation="relu"
    )
    close(coefficient, out.double() * wv * (z > 0))
    close(slopes, out.double() * z.relu())


def test_the_setting_for_float32_products_is_torchs():
    from gatelet.kernels.backends.triton import products

    assert products._types(torch.float32)["PRECISION"] == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert products._types(torch.float32)["PRECISION"] == "tf32"
        assert products._types(torch.float64)["PRECISION"] == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


# -------------------------------------------------------------------- where they are not


def test_without_triton_the_backend_says_so(monkeypatch):
    triton.missing.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x, gate = torch.ones(2, 3), torch.ones(2, 4)
    try:
        with pytest.raises(RuntimeError, match=r"triton is not installed \(pip install 'gatelet\[triton\]'\)"):
            gated_linear(x, torch.ones(4, 3), None, gate, backend="triton")
    finally:
        triton.missing.cache_clear()


ALONE = """
import sys, warnings
sys.modules["triton"] = None  # as if it were not installed
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import gatelet
x, weight, gate = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
gatelet.kernels.gated_linear(x, weight, None, gate)
try:
    gatelet.kernels.gated_ffn(x, weight, None, gate, "relu", weight.t(), None, backend="triton")
except RuntimeError as error:
    sys.exit(0 if "triton is not installed" in str(error) else 1)
sys.exit(1)
"""


def test_the_library_works_without_triton():
    assert subprocess.run([sys.executable, "-c", ALONE], timeout=60).returncode == 0


def test_cpu_tensors_need_the_interpreter(monkeypatch, device):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton.missing.cache_clear()
    x, gate = torch.ones(2, 3, device="cpu"), torch.ones(2, 4, device="cpu")
    here = torch.cuda.is_available()
    try:
        with pytest.raises(ValueError if here else RuntimeError, match="on cpu" if here else "no CUDA device"):
            gated_linear(x, torch.ones(4, 3, device="cpu"), None, gate, backend="triton")
    finally:
        triton.missing.cache_clear()


def test_a_device_without_kernels_is_named():
    x, gate = torch.ones(2, 3, device="meta"), torch.ones(2, 4, device="meta")
    with pytest.raises(ValueError, match="tensors are on meta"):
        gated_linear(x, torch.ones(4, 3, device="meta"), None, gate, backend="triton")


# -------------------------------------------------------------------- what auto does on a CUDA device


def rule(**given):
    layer = Layer(1, 4096, 14336, 1, torch.bfloat16, torch.device("cuda"), False, 0.1)._replace(**given)
    return choose.choose("auto", layer, pytest.fail).backend


def test_auto_takes_the_kernels_where_they_read_or_multiply_much_less(monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: None)
    groups = {"group": 128, "batch": 4096}
    assert rule() == "triton"
    assert rule(**groups) == "triton"
    assert rule(**groups, gradients=True) == "triton"
    for case in (
        {"rate": None},
        {"rate": 0.9},
        {"batch": 16},  # at 10 % open, 81 % are open for some example of 16
        {"batch": 4096},
        {"gradients": True, "batch": 2},
        {"width": 256},
        {"dtype": torch.float64},
        {**groups, "rate": 0.5},
        {**groups, "rate": 0.3, "gradients": True},
        {"rate": 0.25, "gradients": True},
        {"width": 1024, "gradients": True},
        {**groups, "batch": 64},
        {**groups, "batch": 512, "width": 512},
        {**groups, "group": 8},
    ):
        assert rule(**case) == "dense", case


def test_on_cuda_without_triton_the_reference_runs_and_says_so_once(monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    choose._announce.cache_clear()
    with pytest.warns(UserWarning, match="computed and discarded, because triton is not installed"):
        assert rule() == "dense"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rule() == "dense"


def test_explain_names_triton():
    x, weight, gate = torch.zeros(64, 512), torch.zeros(1024, 512), torch.zeros(64, 1024)
    assert explain(x, weight, gate, backend="triton").backend == "triton"


# -------------------------------------------------------------------- the interpreter does not check everything

# Triton's compiler needs no GPU to compile for one. In a process of its own, where kernels are not interpreted.
COMPILE = """
import inspect
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gatelet.kernels.backends.triton import kernels

ACC, DOT = tl.float32, tl.bfloat16
SIZES = dict(BM=64, BN=128, BK=64, BD=128, FEW=16, SPAN=16, WORDS=16, BLOCK=64, PARTS=32, SLOTS=16, KP=16, ACROSS=1)
FLAGS = dict(ACC=ACC, DOT=DOT, PRECISION="ieee", ACTIVATION="gelu", UNIT=False)
WORDS = ("rows", "cols", "wide_rows", "seed", "starts", "names", "places")
POINTERS = {"x", "weight", "bias", "gate", "out", "pre", "coefficient", "sums", "upper", "slopes", "logits", "noise"}
POINTERS |= {"product", "table", "values"}
TYPES = dict.fromkeys(WORDS, "*i64") | dict.fromkeys(POINTERS, "*bf16")
TYPES |= {"examples": "*i32", "flags": "*i32", "counts": "*i32"}
BITS, GROUPS, PARTS, ROWS = {}, {"starts": "*i32"}, {"parts": "*fp32"}, {"rows": "*bf16"}
CASES = [
    (kernels.pattern, (), {}, BITS), (kernels.lists, (), {}, GROUPS), (kernels.add_parts, (), {}, PARTS),
    (kernels.finish, ("rows",), {}, BITS), (kernels.finish, ("gate",), {"UNIT": True}, BITS),
    (kernels.group_dots, (), {"BM": 128}, GROUPS), (kernels.group_dots, ("pre",), {"BN": 64}, GROUPS),
    (kernels.few_dots, ("rows", "pre"), {"BK": 256}, BITS),
    (kernels.few_dots, ("rows", "pre"), {"BK": 512, "FEW": 1}, BITS),
    (kernels.one_by_example, (), {"SPAN": 128}, PARTS),
    (kernels.group_by_unit, ("sums",), {}, GROUPS), (kernels.group_by_unit, ("x", "out"), {"BD": 16}, GROUPS),
    (kernels.spoilt, (), {"BD": 64}, ROWS),
    (kernels.repair, ("flags",), {"BD": 64}, ROWS), (kernels.repair, (), {"BD": 64}, ROWS),
    (kernels.pair_dots, (), {"BK": 256}, BITS), (kernels.pair_sums, (), {}, {"examples": "*i64"}),
    (kernels.pointwise, (), {}, BITS), (kernels.pointwise, ("slopes",), {"UNIT": True}, BITS),
    (kernels.sample, ("noise",), {}, BITS),
]
for kernel, absent, sizes, kinds in CASES:
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {**SIZES, **FLAGS, **sizes, **dict.fromkeys(absent)}
    types = {**TYPES, **kinds}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(index,): constants[name] for index, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, values)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    product = any(word in made.asm["ptx"] for word in ("wgmma", "mma.sync"))
    print(kernel.fn.__name__, made.metadata.shared, "tensor cores" if product else "")
"""


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    import os

    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    assert len(lines) == 20
    assert all(int(shared) <= 99 * 1024 for _, shared, *_ in lines)  # what the smallest GPU with bfloat16 has
    assert sum(len(line) == 3 for line in lines) == 4  # the products of tiles
