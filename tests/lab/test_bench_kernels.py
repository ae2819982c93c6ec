"""The benchmark times only what computes the same, and its table can be read."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gatelet_lab import data
from gatelet_lab.bench import auto, kernels, step
from gatelet_lab.commands import bench_kernels
from gatelet_lab.commands.bench_kernels import BenchKernels
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe

QUICK = BenchKernels(quick=True, shape=(48, 64), patience=0.0)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(auto, "AUTO_BATCHES", (1, 3))


def test_the_table_fits_a_screen(capsys):
    bench_kernels.run(QUICK, Console(width=110))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("48→64")] == [["48→64", "units"]] * 6
    assert all(len(kernels.head()) == len(line) for line in lines if "×" in line and "/" not in line)
    assert len(kernels.head()) <= 110


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("op", "group"), [("linear", 1), ("linear", 8), ("ffn", 1)])
def test_a_wrong_kernel_is_not_timed(op, group, backward, monkeypatch):
    row = kernels.Row("row", 24, 32, group=group, op=op, backward=backward)
    found = kernels.measure(row, 5, 0.3, 0.0)
    assert {"dense", "numba", "auto"} <= found["ratio"].keys()
    name = "gated_ffn" if op == "ffn" else "gated_linear"
    original = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **how: original(*args, **how) * 1.01)
    with pytest.raises(RuntimeError, match="is off by"):
        kernels.measure(row, 5, 0.3, 0.0)


def test_auto_is_compared_with_both_backends(short, capsys):
    bench_kernels.run(replace(QUICK, auto=True), Console(width=200))
    out = capsys.readouterr().out
    assert "of 40 layers" in out  # 2 batches, units and groups, with gradients and without, 5 active fractions
    loss = auto.decisions(48, 64, 3, 1, False, torch.float64, 0.0)
    assert all(each.loss >= 0 for each in loss)


def test_a_step_is_the_trainers():
    digits = data.load("digits")
    small = recipe("noisy_rectifier", "quick").but(experts=64, bottleneck=16)
    trainer = PaperTrainer(small, 0, digits)
    ways = step.steps(trainer)
    before = trainer.model.layer.expert.weight.clone()
    for name in ("dense", "auto"):
        ways[name]()
        assert not torch.equal(before, trainer.model.layer.expert.weight)
        before = trainer.model.layer.expert.weight.clone()
    for name in ("gater", "experts", "dense experts", "optimiser"):
        ways[name]()


def test_the_sweeps_can_be_drawn(tmp_path):
    ways = {"dense": 1.0, "numba": 0.3, "auto": 0.3}
    point = {"ms": ways, "ratio": ways}
    report = {"rates": [point | {"rate": rate} for rate in (0.1, 0.5)], "units": [point | {"units": 100}]}
    kernels.plot(report, tmp_path / "kernels.png")
    assert 0 < (tmp_path / "kernels.png").stat().st_size < 200_000
