"""Two processes: what is a moving average is the same in both, and is that of the whole batch."""

import os
import sys
import time

import pytest
import torch

import ranks
from gatelet.estimators import Rectifier, ScoreFunction, StraightThrough
from gatelet.sparsity import AdaptiveL1, FiringRateBias

BATCHES = 5


def data() -> list[tuple[torch.Tensor, ...]]:
    """Logits, gates and losses of batches of 8, which the two processes halve."""
    source = torch.Generator().manual_seed(0)
    logits = [torch.randn(8, 3, generator=source) + torch.tensor([-3.0, 0.0, 3.0]) for _ in range(BATCHES)]
    return [
        (a, (torch.rand(8, 3, generator=source) < a.sigmoid()).float(), torch.rand(8, generator=source) + 1)
        for a in logits
    ]


def state(rank: int, world: int) -> dict[str, torch.Tensor]:
    """The buffers after the batches, of which this process sees its part."""
    per_unit, running = ScoreFunction(), ScoreFunction("running_mean")
    bias, l1 = FiringRateBias(0.4, step=0.1, decay=0.5), AdaptiveL1(0.5, weight=0.1)
    for batch in data():
        logits, gates, loss = (part.chunk(world)[rank] for part in batch)
        for estimator in (per_unit, running):
            estimator.coefficients(logits, gates, loss)
        bias.penalty(StraightThrough(), logits, gates)
        l1.penalty(Rectifier(), gates, gates)
    modules = {"per_unit": per_unit, "running": running, "bias": bias, "l1": l1}
    return torch.nn.ModuleDict(modules).state_dict()


def main(rank: int, folder: str) -> None:
    """What each of the two processes runs."""
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    ranks.join(rank, folder)
    torch.save(state(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # none of the exchange's threads is left: one that still works when the interpreter ends aborts the process
    if threads:
        assert len(os.listdir("/proc/self/task")) == threads


def lone(rank: int, folder: str) -> None:
    """The first process takes a step that the other, busy until it is killed, does not take."""
    ranks.join(rank, folder)
    estimator, gates = ScoreFunction(), torch.ones(4, 3)
    estimator.coefficients(torch.zeros(4, 3), gates, torch.ones(4))
    if rank:
        time.sleep(600)
    try:
        estimator.coefficients(torch.zeros(4, 3), gates, torch.ones(4))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.cpu
def test_a_process_that_gives_up_ends_while_the_other_goes_on(tmp_path):
    with ranks.started(lone, tmp_path, GATELET_PATIENCE="2") as processes:
        said = processes[0].communicate(timeout=120)[1]
        assert processes[1].poll() is None
    assert processes[0].returncode == 1
    assert "process 1 did not come to this one within 2 s" in said


@pytest.mark.cpu
def test_two_processes_hold_the_state_of_the_whole_batch(tmp_path):
    first, second = ranks.saved(main, tmp_path)
    whole, halves = state(0, 1), [state(rank, 2) for rank in range(2)]
    assert set(first) == set(second) == set(whole)
    for key, value in whole.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, msg=lambda text, key=key: f"{key}: {text}")
    # without the exchange the halves would differ: the comparison above can fail
    for key in ("per_unit.numerator", "running.numerator", "bias.rate", "bias.bias", "l1.weight"):
        assert not torch.equal(halves[0][key], halves[1][key]), key
