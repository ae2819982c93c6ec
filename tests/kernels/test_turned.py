"""A matrix laid out the other way is the same matrix."""

import pytest
import torch

from gatelet.kernels.ops.turned import turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 512), (1000, 67), (67, 1000), (3, 5), (0, 4), (40000, 2)])
def test_rows_become_columns(shape, dtype, device):
    matrix = torch.randn(shape, device=device).to(dtype)
    assert torch.equal(turned(matrix), matrix.t())
    assert turned(matrix).is_contiguous()
    into = torch.empty(shape[::-1], dtype=dtype, device=device)
    assert turned(matrix, into) is into
    assert torch.equal(into, matrix.t())


def test_of_a_matrix_with_gaps(device):
    matrix = torch.randn(600, 400, device=device)[::2, 1::3]
    assert torch.equal(turned(matrix), matrix.t())
