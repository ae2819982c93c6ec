"""Screening by bfloat16 products keeps the k largest, also where nearly all outputs are near each other."""

import pytest
import torch

from gatelet.kernels.backends.numba import screened
from gatelet.kernels.backends.numba.lists import top_k
from gatelet.kernels.backends.numba.screened import screened_top_k

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("case", ["random", "long rows", "biased", "large biases", "near ties", "one example", "all"])
def test_the_largest_are_those_of_the_exact_product(case):
    torch.manual_seed(0)
    x, weight, bias, k = torch.randn(100, 96), torch.randn(3000, 96) / 10, torch.zeros(3000), 16
    if case == "long rows":
        weight *= torch.rand(3000, 1).exp() * 3
        x *= torch.rand(100, 1) * 5
    elif case == "biased":
        bias = 20 * torch.randn(3000)
    elif case == "large biases":  # they drown what the products tell: bfloat16's own error is what matters
        bias, weight = -1000.0 - torch.rand(3000), 100 * weight
    elif case == "near ties":  # bfloat16 tells none of them from another: the list overflows
        weight = weight[:1] + 1e-4 * torch.randn(3000, 96)
    elif case == "one example":
        x = x[:1]
    elif case == "all":
        weight, bias, k = weight[:16], bias[:16], 16
    values, at = screened_top_k(x, weight, bias, k)
    exact = (x.double() @ weight.double().T + bias.double()).float()
    wanted = exact.topk(k).values
    torch.testing.assert_close(values.sort(descending=True).values, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.gather(1, at), values, rtol=1e-5, atol=1e-5)
    assert bool((at.diff(dim=1) > 0).all())


@pytest.mark.parametrize("spread", [1e-4, 1.0], ids=["near ties", "apart"])
def test_examples_that_bfloat16_does_not_settle_go_by_the_exact_product_and_most_of_them_skip_the_screening(
    spread, monkeypatch
):
    torch.manual_seed(0)
    x, weight = torch.randn(256, 96), torch.randn(1, 96) + spread * torch.randn(3000, 96)
    asked = {True: 0, False: 0}

    def count(x, *args, half=False):
        asked[half] += len(x)
        return top_k(x, *args, half=half)

    monkeypatch.setattr(screened, "top_k", count)
    screened.screened_top_k(x, weight, torch.zeros(3000), 16)
    assert asked == ({True: 32, False: 256} if spread < 1 else {True: 256, False: 0})
