"""What torch asks of an op, and what users do to one: transforms, threads, forks, NaN, memory."""

import inspect
import os
import platform
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.nn import functional as F

from gatelet import kernels
from gatelet.kernels import choose, explain, gated_ffn, gated_input_linear, gated_linear, open_pattern
from gatelet.kernels.backends import Layer, numba

OPS = (gated_linear, gated_input_linear, gated_ffn)


def tensors(batch=9, units=70, width=33, group=1, rate=0.3, dtype=torch.float64, grad=True):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(batch, width, generator=draw, dtype=dtype)
    weight = torch.randn(units, width, generator=draw, dtype=dtype)
    bias = torch.randn(units, generator=draw, dtype=dtype)
    gate = torch.rand(batch, units // group, generator=draw, dtype=dtype)
    gate = torch.where(gate < rate, gate + 0.5, 0)
    return [each.requires_grad_(grad) for each in (x, weight, bias, gate)]


def second(units, outputs=7, dtype=torch.float64):
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(outputs, units, generator=draw, dtype=dtype).requires_grad_()
    return weight, torch.randn(outputs, generator=draw, dtype=dtype).requires_grad_()


# A gate that moves through zero opens a unit, so the finite difference is taken on the open gates only.
def opened(gate):
    is_open = gate.detach() != 0
    return gate[is_open].detach().clone().requires_grad_(), is_open


@pytest.mark.parametrize("group", [1, 10])
@pytest.mark.parametrize("backend", ["dense", "numba"])
def test_gradcheck(backend, group):
    x, weight, bias, gate = tensors(batch=3, units=20, width=5, group=group)
    values, is_open = opened(gate)
    w2, b2 = second(20, 4)
    pattern = open_pattern(gate, group)

    def spread(values):
        return torch.zeros(is_open.shape, dtype=values.dtype).masked_scatter(is_open, values)

    def linear(x, weight, bias, values):
        return gated_linear(x, weight, bias, spread(values), backend=backend)

    def after(hidden, w2, b2):
        return gated_input_linear(hidden, pattern, w2, b2, backend=backend)

    def ffn(x, weight, bias, values, w2, b2):
        return gated_ffn(x, weight, bias, spread(values), "gelu", w2, b2, backend=backend)

    assert torch.autograd.gradcheck(linear, (x, weight, bias, values))
    hidden = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (hidden, w2, b2))
    assert torch.autograd.gradcheck(ffn, (x, weight, bias, values, w2, b2))


@pytest.mark.parametrize("backend", ["dense", "numba", "auto", "triton"])
def test_opcheck(backend):
    x, weight, bias, gate = tensors()
    w2, b2 = second(70)
    check = torch.library.opcheck
    rows, cols = torch.ops.gatelet.open_pattern(gate.detach(), 70, backend)
    check(torch.ops.gatelet.open_pattern.default, (gate.detach(), 70, backend))
    form = [rows, cols]
    check(torch.ops.gatelet.gated_linear.default, (x, weight, bias, gate, form, [], False, backend, True))
    check(torch.ops.gatelet.gated_linear.default, (x, weight, None, gate, form, form, False, backend, True))
    check(torch.ops.gatelet.gated_input_linear.default, (x.new_ones(9, 70), form, w2, b2, False, False, backend, True))
    check(
        torch.ops.gatelet.gated_ffn.default, (x, weight, bias, gate, "gelu", w2, b2, form, False, False, backend, True)
    )


# In a process of their own: the suite's run-time type checks cannot be traced.
TRACED = """
import sys, torch
from gatelet.kernels import gated_ffn, gated_linear

def block(x, weight, bias, gate, w2, b2):
    hidden = gated_linear(x, weight, bias, gate, backend=sys.argv[1])
    return gated_ffn(x, weight, bias, gate, "relu", w2, b2, backend=sys.argv[1]).sum() + hidden.sin().sum()

torch.manual_seed(0)
shapes = (80, 65), (130, 65), (130,), (80, 130), (64, 130), (64,)
inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
inputs[3] = inputs[3] * (torch.rand(80, 130) < 0.1)
inputs = [each.requires_grad_() for each in inputs]
want = torch.autograd.grad(block(*inputs), inputs)
compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), want, strict=True):
    torch.testing.assert_close(a, b)

class Module(torch.nn.Module):
    def forward(self, x, weight, bias, gate):
        return gated_linear(x, weight, bias, gate, backend=sys.argv[1])

plain = tuple(each.detach() for each in inputs[:4])
program = torch.export.export(Module(), plain)
assert "gatelet.gated_linear" in str(program.graph), program.graph
torch.testing.assert_close(program.module()(*plain), gated_linear(*plain, backend=sys.argv[1]))
"""


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_and_export_keep_the_op(backend):
    found = subprocess.run([sys.executable, "-c", TRACED, backend], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]


def test_transforms_run_dense_and_a_named_kernel_refuses_them(device):
    x, weight, bias, gate = tensors(grad=False)
    want = gated_linear(x, weight, bias, gate)
    each = torch.vmap(lambda x, gate: gated_linear(x, weight, bias, gate))(x.unsqueeze(1), gate.unsqueeze(1))
    torch.testing.assert_close(each.squeeze(1), want)
    slope = torch.func.grad(lambda w: gated_linear(x, w, bias, gate).sum())(weight)
    torch.testing.assert_close(slope, gate.t() @ x)
    named = "numba" if device == "cpu" else "triton"
    with pytest.raises(NotImplementedError, match=rf'backend="{named}" has no torch\.func transforms'):
        torch.func.grad(lambda w: gated_linear(x, w, bias, gate, backend=named).sum())(weight)
    with pytest.raises(NotImplementedError, match=r"open_pattern does not work under torch\.vmap"):
        torch.vmap(lambda gate: open_pattern(gate).rows)(gate.unsqueeze(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("backend", "batch", "group"),
    [(backend, 9, group) for backend in ("dense", "numba", "auto", "triton") for group in (1, 10)]
    + [("triton", 17, 1), ("triton", 17, 35)],  # few examples, and tiles or lists
)
def test_closed_units_may_hold_anything(backend, batch, group, value):
    x, weight, bias, gate = tensors(batch=batch, group=group, rate=0.2)
    w2, b2 = second(70)
    with torch.no_grad():
        gate[:, 1] = 0  # closed for all
        gate[0, 0], gate[1:, 0] = 0, 1  # closed for one example
    upper = torch.randn(batch, 70, dtype=torch.float64)

    def run(weight, bias, w2, x, upper):
        # The two ops' gradients, the second's with a hidden layer that was filled with the value at closed units.
        out = gated_linear(x, weight, bias, gate, backend=backend)
        ffn = gated_ffn(x, weight, bias, gate, "relu", w2, b2, backend=backend)
        found = torch.autograd.grad([out, ffn], (x, weight, gate), [upper, torch.ones_like(ffn)])
        return out, ffn, *found

    want = run(weight, bias, w2, x, upper)
    spoilt, offset, after = weight.detach().clone(), bias.detach().clone(), w2.detach().clone()
    span = slice(group, 2 * group)
    spoilt[span], offset[span], after[:, span] = value, value, value
    arriving = torch.where(gate.detach().repeat_interleave(group, 1) == 0, value, upper)
    have = run(spoilt.requires_grad_(), offset.requires_grad_(), after.requires_grad_(), x, arriving)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)
    # A unit that is open for others leaves the example that has it closed alone.
    spoilt = weight.detach().clone()
    spoilt[:group] = value
    leaf = x.detach().clone().requires_grad_()
    out = gated_linear(leaf, spoilt, bias, gate, backend=backend)
    (slope,) = torch.autograd.grad(out, leaf, upper)
    torch.testing.assert_close(out[0], want[0][0])
    assert slope[0].isfinite().all()
    assert not slope[1:].isfinite().any()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_announced_once(dtype):
    choose._announce.cache_clear()
    x, weight, bias, gate = tensors(dtype=dtype)
    with pytest.warns(UserWarning, match="discarded, because the CPU kernels are for float32"):
        out = gated_linear(x, weight, bias, gate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = gated_linear(x, weight, bias, gate)
        torch.autograd.grad(out.sum(), (x, weight, bias, gate))
    torch.testing.assert_close(out, F.linear(x, weight, bias) * gate)


@pytest.mark.cpu
def test_threads():
    """Two Python threads at once, each with two of torch's."""
    inputs = tensors(batch=150, units=300, width=140, rate=0.1, dtype=torch.float32)
    upper = torch.randn(150, 300)

    def run():
        out = gated_linear(*inputs, backend="numba")
        return [out, *torch.autograd.grad(out, inputs, upper)]

    want, wrong = run(), []

    def stress():
        torch.set_num_threads(2)
        for _ in range(30):
            pairs = zip(run(), want, strict=True)
            wrong.extend(not torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)

    team = [threading.Thread(target=stress) for _ in range(2)]
    try:
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
    finally:
        torch.set_num_threads(1)
    assert len(wrong) == 300
    assert not any(wrong)


@pytest.mark.cpu
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(count):
    inputs = tensors(batch=70, units=130, width=140, dtype=torch.float32, grad=False)
    want = gated_linear(*inputs, backend="numba")
    torch.set_num_threads(count)
    try:
        assert torch.equal(gated_linear(*inputs, backend="numba"), want)
    finally:
        torch.set_num_threads(1)


FORK = """
import os, sys, torch
from gatelet.kernels import gated_linear
torch.set_num_threads(2)
x, weight, gate = torch.ones(80, 70), torch.ones(90, 70), torch.eye(80, 90)
want = gated_linear(x, weight, None, gate, backend="numba")
child = os.fork()
if child == 0:
    found = gated_linear(x, weight, None, gate, backend="numba")
    os._exit(0 if torch.equal(found, want) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_fork():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0


def test_importing_the_library_leaves_numba_alone():
    code = "import sys, gatelet; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


MEMORY = """
import pathlib, sys, torch
from gatelet.kernels import gated_linear
from torch.nn import functional as F
torch.set_num_threads(2)
B, N, D = 1024, 8192, 256
x, weight = (torch.randn(s, D, requires_grad=True) for s in (B, N))
gate = (torch.rand(B, N) < 0.1).float().requires_grad_()
small = [x[:64].detach().requires_grad_(), weight[:64].detach().requires_grad_(), gate[:64, :64].detach()]
small[2].requires_grad_()
upper = torch.randn(B, N)
def run(x, weight, gate, upper):
    y = gated_linear(x, weight, None, gate, backend="numba") if sys.argv[1] == "sparse" else F.linear(x, weight) * gate
    y.backward(upper)
def kilobytes(what):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))
run(*small, upper[:64, :64])  # compiles, and starts threads
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
before = kilobytes("VmRSS")
run(x, weight, gate, upper)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.cpu
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell peaks")
def test_memory_stays_below_dense():
    def peak(how):
        found = subprocess.run([sys.executable, "-c", MEMORY, how], capture_output=True, text=True, timeout=60)
        return int(found.stdout)

    sparse, dense = peak("sparse"), peak("dense")
    assert dense > 60_000  # kilobytes: the measurement sees what it is to see
    assert sparse <= dense


OTHER_PROCESSOR = """
import torch
from gatelet.kernels import gated_linear
x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((70, 149), (90, 149), (90,)))
gate = ((torch.rand(70, 90) < 0.2) * torch.randn(70, 90)).requires_grad_()
inputs, upper = (x, weight, bias, gate), torch.randn(70, 90)
have, want = (
    torch.autograd.grad(gated_linear(*inputs, backend=backend), inputs, upper) for backend in ("numba", "dense")
)
torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.cpu
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the processor asked for is an x86")
def test_processors_with_narrower_vectors():
    """AVX2, wherever this runs."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+popcnt"}
    found = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSOR], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr


OTHER_WIDTH = """
from llvmlite import binding
theirs = binding.get_host_cpu_features
class Other(str):
    def flatten(self):
        return self
binding.get_host_cpu_features = lambda: Other("" if theirs().get("avx512f") else "+avx512f")
from gatelet.kernels.backends.numba import vector as _vector
binding.get_host_cpu_features = theirs
assert _vector.VECTOR == (32 if theirs().get("avx512f") else 64)
"""


@pytest.mark.cpu
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the widths are those of x86")
def test_the_other_width_of_vectors(tmp_path):
    """What runs on processors with AVX-512 is right where they are not there, and the other way round."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", OTHER_WIDTH + OTHER_PROCESSOR],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr


# -------------------------------------------------------------------- what is asked for, and what runs


@pytest.mark.cpu
def test_explain_says_what_runs():
    x, weight = torch.zeros(1024, 256), torch.zeros(512, 256)
    sparse, dense = torch.zeros(1024, 512), torch.ones(1024, 512)
    sparse[:, ::50] = 1
    assert explain(x, weight, sparse).kernel == "unit"
    assert explain(x, weight, sparse[:, ::16]).kernel == "group"
    assert explain(x, weight, dense).backend == "dense"
    assert explain(x, weight, dense, backend="numba").backend == "numba"
    assert explain(x[:1, :2], weight[:8, :2], dense[:1, :8]).backend == "dense"
    assert explain(x.half(), weight.half(), sparse).backend == "dense"


def test_the_machine_is_measured_once_and_says_something_plausible():
    numba.measured.cache_clear()
    cost = numba.measured("unit", torch.float32)
    assert 0 <= cost.fixed <= 0.4
    assert 0.5 <= cost.slope <= 3
    assert numba.measured("unit", torch.float32) is cost


@pytest.mark.cpu
def test_auto_goes_by_the_processor_not_by_a_clock(monkeypatch):
    """Two processes of one seed must choose alike; only who asks for it gets a measurement."""
    asked = []
    monkeypatch.setattr(numba, "measured", lambda *given: asked.append(given) or numba.Costs(0.4, 3.0))
    x, weight, gate = torch.zeros(512, 256), torch.zeros(512, 256), torch.zeros(512, 512)
    before = explain(x, weight, gate)
    assert not asked
    assert before == explain(x, weight, gate)
    kernels.measure_costs()
    try:
        assert explain(x, weight, gate).limit < before.limit
    finally:
        kernels.measure_costs(False)
    assert asked
    assert before == explain(x, weight, gate)


@pytest.mark.parametrize("kind", [("AMD", "AVX512"), ("AMD", "AVX2"), ("", "AVX512"), ("", "DEFAULT")])
def test_every_processor_has_costs(kind, monkeypatch):
    monkeypatch.setattr(numba, "processor", lambda: kind)
    for kernel in ("unit", "group"):
        cost = numba.costs(kernel, torch.float32)
        assert 0 <= cost.fixed <= 0.4
        assert 0.5 <= cost.slope <= 3


def layer(batch, width, units):
    return Layer(batch, width, units, 1, torch.float32, torch.device("cpu"), False)


@pytest.mark.cpu
def test_auto_takes_dense_from_break_even_on(monkeypatch):
    """T = fixed + slope·α of dense: here 0.1 + 2α, which reaches 1 at α = 0.45 (for very many features)."""
    monkeypatch.setattr(numba, "costs", lambda *_: numba.Costs(0.1, 2.0))
    assert numba.limit(layer(1 << 20, 1 << 20, 1)) == pytest.approx(0.45, abs=1e-3)
    x, weight = torch.zeros(512, 256), torch.zeros(512, 256)
    below, above = (torch.zeros(512, 512) for _ in range(2))
    below[:, :100], above[:, :250] = 1, 1  # at D = 256: (1 - 0.1 - 50/256) / (2·(1 + 90/256)) = 0.26
    assert explain(x, weight, below).backend == "numba"
    assert explain(x, weight, above).backend == "dense"
    assert explain(x, weight, above).limit == pytest.approx(0.2607, abs=1e-4)
    assert "under break-even at 26%" in explain(x, weight, below).reason
    assert explain(x[:8], weight, above[:8]).backend == "numba"  # few examples: weights are read by both
    # Weights of 4 MiB do not stay near: few examples lift break-even by 8/B.
    near, far = (numba.limit(layer(64, 256, units)) for units in (4095, 4096))
    assert far - near == pytest.approx(8 / 64)
    # A call costs as much as 65 536 multiply-adds: half of 256 · 512.
    assert numba.limit(layer(1, 256, 512)) == 0.5


def test_auto_takes_the_two_products_of_an_ffn_for_what_they_are(monkeypatch):
    """Break-even of a pair of products is that of either, not of one with as many features as both."""
    monkeypatch.setattr(numba, "costs", lambda *_: numba.Costs(0.1, 2.0))
    seen = []
    original = choose.choose
    monkeypatch.setattr(choose, "choose", lambda *args, **more: seen.append(original(*args, **more)) or seen[-1])
    x, w1, w2, gate = torch.zeros(512, 256), torch.zeros(512, 256), torch.zeros(512, 256).t(), torch.zeros(512, 512)
    OPS[2](x, w1, None, gate, "relu", w2, None)
    assert seen[0].limit == explain(x, w1, gate).limit


def test_errors_name_the_argument():
    # Without the suite's run-time type checks, as users call them.
    gated_linear, gated_input_linear, gated_ffn = map(inspect.unwrap, OPS)
    x, weight, bias, gate = tensors(grad=False)
    with pytest.raises(ValueError, match="backend"):
        gated_linear(x, weight, bias, gate, backend="nmba")
    with pytest.raises(ValueError, match="x must have 33 features"):
        gated_linear(x[:, 1:], weight, bias, gate)
    with pytest.raises(ValueError, match="gate must have"):
        gated_linear(x, weight, bias, gate[:, 1:])
    with pytest.raises(ValueError, match="gate must have the leading shape"):
        gated_linear(x, weight, bias, gate[1:])
    with pytest.raises(TypeError, match="weight"):
        gated_linear(x, weight.float(), bias, gate)
    with pytest.raises(ValueError, match="bias"):
        gated_linear(x, weight, bias[1:], gate)
    with pytest.raises(ValueError, match="support"):
        gated_linear(x, weight, bias, gate, support=gate[1:] != 0)
    with pytest.raises(ValueError, match="pattern"):
        gated_input_linear(gate[1:], open_pattern(gate), weight.t(), None)
    with pytest.raises(TypeError, match="pattern"):
        gated_input_linear(gate, gate, weight.t(), None)
    with pytest.raises(ValueError, match="activation"):
        gated_ffn(x, weight, bias, gate, "tanh", weight.t(), None)
    with pytest.raises(ValueError, match="w2"):
        gated_ffn(x, weight, bias, gate, "relu", weight, None)


def test_public_names():
    ops = {"gated_linear", "gated_input_linear", "gated_ffn", "open_pattern"}
    assert {*ops, "OpenPattern", "explain"} <= set(dir(kernels))
