"""The gater by least squares: the best map of its rank, by hand; degenerate data; where distil begins."""

import copy

import pytest
import torch
from torch import nn

import gatelet
from gatelet.convert import blocks
from gatelet.convert.gater_regression import RIDGE, SPREAD, GaterRegression
from gatelet.nn.gaters import Gater


def problem(tokens=400, width=6, gates=15, noise=0.5):
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64) + 3
    return x, x @ torch.randn(width, gates, dtype=torch.float64) + noise * torch.randn(tokens, gates).double()


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 6, 9])
def test_it_is_the_best_map_of_its_rank(rank):
    x, y = problem()
    gater = Gater(6, 15, rank).double()
    fit = GaterRegression(gater)
    for part in (slice(150), slice(150, None)):  # sums over batches
        fit.add(x[part], y[part])
    assert fit.write()
    # By hand: the singular vectors of the fitted values of a least-squares problem with the ridge as further rows.
    x0, y0 = x - x.mean(0), y - y.mean(0)
    ridge = (RIDGE * x0.square().sum(0).mean()).sqrt() * torch.eye(6).double()
    rows = torch.cat([x0, ridge])
    full = torch.linalg.lstsq(rows, torch.cat([y0, torch.zeros(6, 15).double()])).solution
    u, s, v = torch.linalg.svd(rows @ full, full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ v[:rank])[:400] + y.mean(0)
    # Without the tanh, which is nearly linear there, the logits are proportional to that.
    logits = gater.gates(gater.hidden(x))
    scale = (logits * best).sum() / best.square().sum()
    torch.testing.assert_close(logits, scale * best)
    assert float(logits.std()) == pytest.approx(SPREAD, rel=0.1)
    assert float(gater.hidden(x).abs().max()) < 1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(20, 6), torch.randn(20, 15)),  # nothing to tell tokens apart by
        (torch.randn(20, 6), torch.zeros(20, 15)),  # nothing to tell
        (torch.zeros(0, 6), torch.zeros(0, 15)),
    ],
)
def test_data_that_say_nothing_change_nothing(x, y):
    gater = Gater(6, 15, 3)
    before = copy.deepcopy(gater.state_dict())
    fit = GaterRegression(gater)
    fit.add(x, y)
    assert not fit.write()
    torch.testing.assert_close(gater.state_dict(), before)


def pair(group_size=1):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16))
    model = copy.deepcopy(teacher)
    gatelet.convert(model, target_rate=0.25, bottleneck=8, group_size=group_size)
    return model, teacher, list(torch.randn(20, 64, 16))


@pytest.mark.parametrize("group_size", [1, 4])
def test_distil_begins_there_and_does_not_go_back_behind_a_better_gater(group_size):
    model, teacher, data = pair(group_size)
    found = gatelet.distil(model, teacher, data, steps=1, lr=1e-9)
    name = "0.gating"
    assert found.errors[name] < 0.8 * found.first_errors[name]
    better = gatelet.distil(model, teacher, data, steps=200)
    assert better.first_errors[name] == pytest.approx(found.errors[name], rel=1e-4)
    gating = blocks(model)[name][1]
    kept = copy.deepcopy(gating.gater.state_dict())
    again = gatelet.distil(model, teacher, data, steps=1, lr=1e-9)
    assert again.first_errors[name] == pytest.approx(better.errors[name], rel=1e-4)
    if better.errors[name] < found.errors[name]:
        torch.testing.assert_close(gating.gater.state_dict(), kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("gater", "looks"), [("preview", 1), ("self", 1), ("mlp", 30)])
def test_the_beginning_reads_no_more_text_than_it_needs(gater, looks):
    """Where W2 alone says what a unit weighs, one batch is enough; a gater of least squares takes what there is."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    model, seen = copy.deepcopy(teacher), []
    gatelet.convert(model, 0.5, bottleneck=2, gater=gater)
    teacher.register_forward_hook(lambda *args: seen.append(1))
    gatelet.distil(model, teacher, torch.randn(31, 4, 8).unbind(), steps=1, held_out=1, calibration=1, progress=False)
    steps = 2 if gater == "mlp" else 0  # one, and the look behind it
    assert len(seen) == looks + steps + 2  # a look at what is held out before, and one behind
    scale = getattr(model[0].gating.gater, "scale", None)
    assert scale is None or torch.equal(scale, teacher[2].weight.norm(dim=0)) or torch.equal(scale, torch.ones(32))
