"""Screening by bfloat16 products keeps the k largest, also where nearly all outputs are near each other."""

import pytest
import torch

from gatelet.kernels.backends.numba.screened import screened_top_k

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("case", ["random", "long rows", "biased", "near ties", "one example", "all"])
def test_the_largest_are_those_of_the_exact_product(case):
    torch.manual_seed(0)
    x, weight, bias, k = torch.randn(100, 96), torch.randn(3000, 96) / 10, torch.zeros(3000), 16
    if case == "long rows":
        weight *= torch.rand(3000, 1).exp() * 3
        x *= torch.rand(100, 1) * 5
    elif case == "biased":
        bias = 20 * torch.randn(3000)
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
