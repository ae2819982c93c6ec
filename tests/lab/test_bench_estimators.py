"""The benchmark compares like with like: every hand-written estimator has the library's gradient."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from gatelet.estimators import ALL
from gatelet_lab.commands import bench_estimators
from gatelet_lab.commands.bench_estimators import HAND, BenchEstimators

FEW = BenchEstimators(estimators=("straight_through", "leave_one_out", "muprop"), shapes=("256x200",), rounds=2)


def test_hand_written_ones_are_of_the_list():
    assert set(HAND) <= set(ALL)
    assert {name for name in ALL if ALL[name].needs == "loss"} - set(HAND) <= {
        "nvil",
        "arms",
        "carms",
        "shrunk_baseline",
    }


@pytest.mark.parametrize("name", HAND)
def test_each_has_the_gradient_of_the_library(name):
    bench_estimators.check_same(name, torch.randn(6, 5))


def test_a_wrong_one_is_not_timed(monkeypatch):
    monkeypatch.setitem(bench_estimators.HAND, "sigmoid", lambda a, objective: objective(a.sigmoid() * 1.01).mean())
    with pytest.raises(RuntimeError, match="sigmoid"):
        bench_estimators.measure(replace(FEW, estimators=("sigmoid",)))


def test_the_table(tmp_path, capsys):
    threads = torch.get_num_threads()
    bench_estimators.run(replace(FEW, out=tmp_path / "bench.json"), Console(width=150))
    assert torch.get_num_threads() == threads
    rows = {row["estimator"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert list(rows) == list(FEW.estimators)
    assert rows["straight_through"]["goal"] == 1.2
    assert rows["leave_one_out"]["goal"] == 1.5
    assert rows["leave_one_out"]["samples"] == 2
    assert rows["straight_through"]["module_ratio"] > 0
    assert rows["muprop"]["hand_ms"] is None
    assert rows["muprop"]["module_ms"] is None
    assert "leave_one_out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [({"estimators": ("sigmoids",)}, "sigmoid"), ({"shapes": ("1x1",)}, "shape"), ({"rounds": 0}, "--rounds")],
)
def test_bad_options_name_the_argument(change, told):
    with pytest.raises(ValueError, match=told):
        bench_estimators.measure(replace(FEW, **change))
