"""One token over weights that stay: the kernels against float64, what is not read, and refusals."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatelet.kernels import Decided, decode_ffn, decode_input_linear, decode_linear, int8_rows
from gatelet.kernels.backends.rows import as_float

pytestmark = pytest.mark.cpu
SIZES = ((37, 130, 21), (256, 70, 300), (5, 600, 64))
"""D, N, O: vectors with and without a rest; parts of the units with and without one."""
KINDS = {"float32": lambda weight: weight, "bfloat16": Tensor.bfloat16, "int8": int8_rows}


def block(width: int, units: int, outputs: int, kind: str, third: bool, near: bool) -> Decided:
    keep = KINDS[kind]
    w1, w3, w2 = torch.randn(units, width), torch.randn(units, width), torch.randn(units, outputs)
    bias = torch.randn(units)
    limits = torch.tensor([0.4 * width**0.5, (0.4 if third else 0.6) * width**0.5])
    return Decided(
        first=keep(w1),
        first_bias=bias,
        third=keep(w3) if third else None,
        third_bias=bias if third else None,
        down=keep(w2),
        down_bias=torch.randn(outputs),
        activation="silu",
        scale=torch.rand(units),
        norm=torch.rand(units),
        limits=limits,
        near_first=int8_rows(w1) if near else None,
        near_third=int8_rows(w3) if near and third else None,
    )


def by_hand(given: Decided, x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float64: the output, and which units are looked at."""

    def product(weight, bias):
        return F.linear(x.double(), as_float(weight).double(), bias.double())

    a = F.silu(product(given.first, given.first_bias))
    hidden = a if given.third is None else a * product(given.third, given.third_bias)
    seen = a
    if given.near_first is not None:
        seen = F.silu(product(given.near_first, given.first_bias))
        seen = seen if given.near_third is None else seen * product(given.near_third, given.third_bias)
    looked = seen.abs() * given.scale > given.limits[0]
    kept = looked & (hidden.abs() * given.norm > given.limits[1])
    assert 0 < looked.sum() < looked.numel()
    assert 0 < kept.sum() <= looked.sum()
    return torch.where(kept, hidden, 0) @ as_float(given.down).double() + given.down_bias, looked


@pytest.mark.parametrize("tokens", [(), (1,), (1, 3), (7,)])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_block_that_decides_by_itself(sizes, kind, third, near, tokens):
    given = block(*sizes, kind, third, near)
    x = torch.randn(*tokens, sizes[0])
    want, _ = by_hand(given, x)
    have = decode_ffn(given)(x)
    torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("near", [False, True])
def test_rows_of_closed_units_are_not_read(near):
    given = block(64, 200, 32, "float32", True, near)
    x = torch.randn(1, 64)
    want, looked = by_hand(given, x)
    for weight in (given.third, given.down, *((given.first,) if near else ())):
        weight[~looked[0]] = torch.nan
    torch.testing.assert_close(decode_ffn(given)(x).double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [(), (2,), (9,)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_linear_maps(sizes, kind, tokens):
    width, units, _ = sizes
    x, bias = torch.randn(*tokens, width), torch.randn(units)
    weight = KINDS[kind](torch.randn(units, width))
    want = F.linear(x.double(), as_float(weight).double(), bias.double())
    torch.testing.assert_close(decode_linear(weight, bias)(x).double(), want, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float32, torch.bfloat16):
        assert decode_linear(weight)(x.to(dtype)).dtype is dtype

    by_input = KINDS[kind](torch.randn(width, units))
    norm, limit = torch.rand(width), torch.tensor([0.3])
    kept = torch.where(x.abs() * norm > limit, x, 0)
    have = decode_input_linear(by_input, bias, norm, limit)(x)
    want = kept.double() @ as_float(by_input).double() + bias
    torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-4)


def test_small_inputs_are_not_read():
    weight, x = torch.ones(4, 3), torch.tensor([1.0, 0.1, -2.0, 0.0])
    weight[1] = torch.nan
    have = decode_input_linear(weight, None, torch.ones(4), torch.tensor([0.5]))(x)
    torch.testing.assert_close(have, torch.full((3,), -1.0))


def test_threads_change_no_bit():
    given, x = block(64, 3000, 64, "float32", True, False), torch.randn(1, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [decode_ffn(given)(x), decode_linear(given.first)(x)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_refused():
    given = block(8, 70, 5, "float32", True, False)
    run = decode_ffn(given)
    with pytest.raises(ValueError, match="x must have 8 features"):
        run(torch.ones(1, 7))
    with pytest.raises(TypeError, match="x must be float32 or bfloat16 on the CPU"):
        run(torch.ones(1, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="have no gradient"):
        run(torch.ones(1, 8, requires_grad=True))
    with pytest.raises(ValueError, match="down must have a row for each of the 70 units, not 3"):
        decode_ffn(given._replace(down=torch.ones(3, 5)))
    with pytest.raises(ValueError, match=r"third must have shape \(70, 8\)"):
        decode_ffn(given._replace(third=torch.ones(70, 9)))
    with pytest.raises(TypeError, match="must have one type"):
        decode_ffn(given._replace(third=torch.ones(70, 8).bfloat16()))
    with pytest.raises(ValueError, match="near_first and near_third"):
        decode_ffn(given._replace(near_first=int8_rows(torch.ones(70, 8))))
    with pytest.raises(ValueError, match="scale must be 70 contiguous float32 numbers"):
        decode_ffn(given._replace(scale=torch.ones(7)))
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        decode_ffn(given._replace(activation="tanh"))
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or from int8_rows"):
        decode_linear(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match="weight must be contiguous and on the CPU"):
        decode_linear(torch.ones(2, 3).t())
    with pytest.raises(ValueError, match="limit must have 1 dimensions"):
        decode_input_linear(torch.ones(2, 3), None, torch.ones(2), torch.tensor(0.5))
