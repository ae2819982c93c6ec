"""sample_gates: the same gates with every backend, from noise or from a generator."""

import importlib.util
import inspect

import pytest
import torch

from gatelet.kernels import gated_linear, open_pattern, sample_gates
from gatelet.kernels.ops.sample_gates import uniform

TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 64])
@pytest.mark.parametrize("backend", ["dense", TRITON])
def test_gates_pattern_and_counts(backend, group, dtype):
    logits = torch.randn(2, 35, 66, dtype=dtype)
    noise = torch.rand(logits.shape, dtype=torch.promote_types(dtype, torch.float32))
    found = sample_gates(logits, noise=noise, group_size=group, backend=backend)
    want = (noise < logits.to(noise.dtype).sigmoid()).to(dtype)
    assert torch.equal(found.gates, want)
    pattern = open_pattern(want, group)
    assert torch.equal(found.pattern.rows, pattern.rows)
    assert torch.equal(found.pattern.cols, pattern.cols)
    assert (found.pattern.lead, found.pattern.units) == (pattern.lead, pattern.units)
    assert torch.equal(found.counts, want.flatten(0, 1).sum(0).int())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (64, 64), (5,)])
@pytest.mark.parametrize("backend", ["dense", TRITON])
def test_any_shape(backend, shape):
    found = sample_gates(torch.full(shape, 40.0), backend=backend)
    assert torch.equal(found.gates, torch.ones(shape))
    assert torch.equal(found.counts, torch.full((shape[-1],), 1 if len(shape) == 1 else shape[0], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["auto", "dense", TRITON])
def test_a_generator_gives_the_same_gates_with_every_backend(backend):
    logits = torch.randn(70, 130)
    first, again, other = (
        sample_gates(logits, generator=torch.Generator().manual_seed(seed), backend=backend).gates for seed in (1, 1, 2)
    )
    want = sample_gates(logits, generator=torch.Generator().manual_seed(1), backend="dense").gates
    assert torch.equal(first, again)
    assert torch.equal(first, want)
    assert not torch.equal(first, other)


def test_the_noise_is_philox():
    """Random123's known answer for a zero counter and key, 6627e8d5, as the folded fraction it becomes."""
    (first,) = uniform(torch.tensor(0), 1).tolist()
    assert first == pytest.approx(0x6627E8D5 / 2**31, rel=1e-6)


def test_the_noise_is_uniform():
    noise = uniform(torch.tensor(0x123456789ABCDEF), 1 << 18)
    assert noise.min() >= 0
    assert noise.max() < 1
    share = torch.histc(noise, 64, 0, 1) / len(noise)
    assert (share - 1 / 64).abs().max() < 5 * (1 / 64 / len(noise)) ** 0.5
    centred = noise - 0.5
    for lag in (1, 2, 64):
        assert abs((centred[lag:] * centred[:-lag]).mean() * 12) < 5 / len(noise) ** 0.5


def test_gates_are_drawn_at_their_probability():
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(20_000, 3)
    share = sample_gates(logits).counts / 20_000
    torch.testing.assert_close(share, logits[0].sigmoid(), atol=0.015, rtol=0)


def test_the_pattern_serves_the_ops():
    logits, x, weight = torch.randn(6, 9), torch.randn(6, 5), torch.randn(18, 5)
    found = sample_gates(logits, group_size=2)
    out = gated_linear(x, weight, None, found.gates, pattern=found.pattern)
    torch.testing.assert_close(out, x @ weight.t() * found.gates.repeat_interleave(2, 1))


def test_opcheck():
    logits = torch.randn(6, 9)
    check = torch.library.opcheck
    for backend in ("dense", "auto"):
        check(torch.ops.gatelet.sample_gates.default, (logits, torch.rand(6, 9), None, 2, backend))
        check(torch.ops.gatelet.sample_gates.default, (logits, None, torch.tensor(5), 1, backend))


def test_errors_name_the_argument():
    draw = inspect.unwrap(sample_gates)
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="noise"):
        draw(logits, noise=torch.rand(2, 4))
    with pytest.raises(TypeError, match=r"noise must have dtype torch\.float32"):
        draw(logits, noise=torch.rand(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="group_size"):
        draw(logits, group_size=0)
    with pytest.raises(ValueError, match="backend"):
        draw(logits, backend="numba")
    with pytest.raises(TypeError, match="logits"):
        draw(torch.zeros(2, 3, dtype=torch.int64))
