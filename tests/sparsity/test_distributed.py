"""Two processes: what is a moving average is the same in both, and is that of the whole batch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gatelet
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
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(state(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # none of the exchange's threads is left: one that still works when the interpreter ends aborts the process
    if threads:
        assert len(os.listdir("/proc/self/task")) == threads


def lone(rank: int, folder: str) -> None:
    """The first process takes a step that the other, busy until it is killed, does not take."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    estimator, gates = ScoreFunction(), torch.ones(4, 3)
    estimator.coefficients(torch.zeros(4, 3), gates, torch.ones(4))
    if rank:
        time.sleep(600)
    try:
        estimator.coefficients(torch.zeros(4, 3), gates, torch.ones(4))
    finally:
        torch.distributed.destroy_process_group()


def start(call: str, folder: Path, **variables: str) -> list["subprocess.Popen[str]"]:
    """Start the two processes."""
    path = os.pathsep.join(str(each) for each in (Path(__file__).parent, Path(gatelet.__file__).parents[1]))
    env = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | variables
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"import test_distributed; test_distributed.{call}({rank}, {str(folder)!r})"],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.cpu
def test_a_process_that_gives_up_ends_while_the_other_goes_on(tmp_path):
    processes = start("lone", tmp_path, GATELET_PATIENCE="2")
    try:
        said = processes[0].communicate(timeout=120)[1]
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
        processes[1].communicate()
    assert processes[0].returncode == 1
    assert "process 1 did not come to this one within 2 s" in said


@pytest.mark.cpu
def test_two_processes_hold_the_state_of_the_whole_batch(tmp_path):
    processes = start("main", tmp_path)
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole, halves = state(0, 1), [state(rank, 2) for rank in range(2)]
    assert set(first) == set(second) == set(whole)
    for key, value in whole.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, msg=lambda text, key=key: f"{key}: {text}")
    # without the exchange the halves would differ: the comparison above can fail
    for key in ("per_unit.numerator", "running.numerator", "bias.rate", "bias.bias", "l1.weight"):
        assert not torch.equal(halves[0][key], halves[1][key]), key
