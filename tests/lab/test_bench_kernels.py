"""The benchmark times only what computes the same, and its table can be read."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gatelet_lab import data
from gatelet_lab.bench import auto, kernels, step, timing, trained
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


def test_a_peer_that_fails_is_announced(monkeypatch):
    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernels, "grouped_mm", fails)
    with pytest.warns(UserWarning, match="grouped_mm is left out, because it fails: no such kernel"):
        ways = kernels.prepare(kernels.Row("row", 24, 32, group=8), 5, 0.3, True)
    assert "grouped_mm" not in ways


def test_what_other_processes_used_is_not_said_where_it_is_not_known(monkeypatch):
    monkeypatch.setattr(timing, "Path", lambda path: Path("/nowhere"))
    assert math.isnan(timing.interleaved({"way": lambda: None}, 0.0)[1])


def test_learnt_gates_are_timed_beside_those_drawn_again(tmp_path, monkeypatch, capsys):
    digits = data.load("digits")
    monkeypatch.setattr(trained.data, "load", lambda name: digits)
    monkeypatch.setattr(trained, "recipe", lambda row, table: recipe(row, "quick").but(experts=64, bottleneck=16))
    monkeypatch.setattr(trained, "ROWS", ("noisy_rectifier",))
    monkeypatch.setattr(trained, "BATCHES", (8,))
    options = replace(QUICK, trained=tmp_path, epochs=1)
    bench_kernels.run(options, Console(width=250))
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("  8 ")] == [
        ["8", "forward"],
        ["8", "f+b"],
    ] * 2
    assert len(json.loads((tmp_path / "trained.json").read_text())["results"]) == 4  # test images, in training
    (made,) = tmp_path.glob("*.pt")
    before = made.stat().st_mtime_ns
    learnt = trained.kept(made, lambda: pytest.fail("it is there"))
    assert made.stat().st_mtime_ns == before
    kinds = trained.drawn_again(learnt[0].gate, len(learnt[0].gate))
    assert torch.equal(kinds["as often"].count_nonzero(0), kinds["trained"].count_nonzero(0))
    assert not torch.equal(kinds["as often"], kinds["trained"])
    assert kinds["random"].count_nonzero() == kinds["trained"].count_nonzero()
    monkeypatch.setattr(trained, "common_dense", lambda *args: trained.dense(*args) * 1.1)
    with pytest.raises(RuntimeError, match="common units dense computes something else"):
        trained.compare(learnt[0], 8, False, lambda ways: dict.fromkeys(ways, 1.0))
