"""RowAdam against torch's SparseAdam and Adam, and what it leaves alone."""

import pytest
import torch

from gatelet.row_adam import RowAdam, _distinct, _rows


def sparse(rows, values, shape):
    return torch.sparse_coo_tensor(torch.tensor(rows)[None], values, shape, check_invariants=False)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 37), (torch.float64, 16), (torch.float32, 1)])
def test_steps_are_those_of_sparse_adam(dtype, width):
    torch.manual_seed(0)
    start = torch.randn(50, width, dtype=dtype)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
    first, second = RowAdam([mine], **options), torch.optim.SparseAdam([theirs], **options)
    for step in range(6):
        rows = torch.randperm(50)[:20].tolist()
        if step == 3:
            rows += rows[:5]  # not coalesced
        elif step > 3:
            rows = sorted(rows + rows[: 5 * (step - 4)])  # ascending: each once in step 4, some twice in step 5
        values = torch.randn(len(rows), width, dtype=dtype)
        mine.grad, theirs.grad = (sparse(rows, values.clone(), start.shape) for _ in range(2))
        first.step()
        second.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(mine, theirs, **tolerance)


def test_dense_gradients_take_steps_of_adam():
    start = torch.randn(7, 5)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    first, second = RowAdam([mine], 0.1), torch.optim.Adam([theirs], 0.1)
    for _ in range(4):
        mine.grad = torch.randn(7, 5)
        theirs.grad = mine.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["sparse", "dense", "gathered"])
def test_unit_rows_stay_on_the_sphere_and_lose_the_parallel_part(kind, monkeypatch):
    torch.manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(9, 6, dtype=torch.float64), dim=1)
    grad = torch.randn(9, 6, dtype=torch.float64)
    tangent = grad - (grad * weight).sum(1, keepdim=True) * weight
    wanted = torch.nn.functional.normalize(weight - 0.1 * tangent / (tangent.abs() + 1e-8), dim=1)
    mine = torch.nn.Parameter(weight.clone())
    optimizer = RowAdam([{"params": [mine], "unit_rows": True}], lr=0.1)
    if kind == "gathered":
        moments = torch.zeros_like(weight), torch.zeros_like(weight)
        loose = mine.detach().t().contiguous().t()  # not contiguous: the way without the kernel
        options = {"rate": 0.1 * 0.001**0.5 / 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "unit": True}
        _rows(loose, *moments, torch.arange(9), grad, options)
        torch.testing.assert_close(loose, wanted, rtol=1e-5, atol=1e-6)
        return
    mine.grad = grad if kind == "dense" else sparse(list(range(9)), grad, (9, 6))
    optimizer.step()
    torch.testing.assert_close(mine.detach(), wanted, rtol=1e-5, atol=1e-6)


def test_untouched_rows_and_their_moments_stay():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = RowAdam([weight], 0.1)
    for _ in range(2):
        weight.grad = sparse([2], torch.ones(1, 3), (4, 3))
        optimizer.step()
    state = optimizer.state[weight]
    others = [0, 1, 3]
    assert bool((weight[others] == 1).all())
    assert not state["exp_avg"][others].any()
    assert not state["exp_avg_sq"][others].any()
    assert bool((weight[2] < 1).all())


def test_rows_that_autograd_hands_on_are_not_copied():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    torch.nn.functional.embedding(torch.tensor([1, 3]), weight, sparse=True).sum().backward()
    assert not weight.grad.is_coalesced()
    rows, values = _distinct(weight.grad)
    assert rows.tolist() == [1, 3]
    assert values.data_ptr() == weight.grad._values().data_ptr()


def test_a_saved_state_continues():
    torch.manual_seed(0)
    start = torch.randn(8, 4)
    whole, halves = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one, two = RowAdam([whole], 0.1), RowAdam([halves], 0.1)
    for step in range(4):
        values = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in ((whole, one), (halves, two)):
            weight.grad = sparse([1, 4, 6], values.clone(), (8, 4))
            optimizer.step()
        if step == 1:
            state = two.state_dict()
            two = RowAdam([halves], 0.1)
            two.load_state_dict(state)
    assert torch.equal(whole, halves)


def test_refusals():
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="lr must be"):
        RowAdam([weight], lr=0.0)
    with pytest.raises(ValueError, match="betas must lie"):
        RowAdam([weight], betas=(1.0, 0.9))
    weight.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=False)
    with pytest.raises(TypeError, match="matrices"):
        RowAdam([weight]).step()
