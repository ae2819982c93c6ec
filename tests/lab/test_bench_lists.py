"""What the benchmarks of lists, of narrow weights and of busy machines time computes the same as dense."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gatelet_lab.bench import busy as bench_busy
from gatelet_lab.bench import lists as bench_lists
from gatelet_lab.bench import rows as bench_rows
from gatelet_lab.commands import bench_kernels
from gatelet_lab.commands.bench_kernels import BenchKernels

SMALL = (16, 70, 4, 9)
QUICK = BenchKernels(quick=True, patience=0.0)


def test_list_ways_agree() -> None:
    tables = bench_lists.tables(*SMALL)
    forward = {name: way() for name, way in tables["forward"].items()}
    for found in forward.values():
        torch.testing.assert_close(found, forward["dense"])
    ways = tables["forward and backward"]
    for_hidden, for_weight = ways["dense"]()
    for name in ("ours, rows touched", "ours, dense", "embedding_bag, sparse", "embedding_bag, dense"):
        for_values, rows = ways[name]()
        torch.testing.assert_close(rows.to_dense() if rows.is_sparse else rows, for_weight)
        torch.testing.assert_close(for_values, for_hidden.gather(1, bench_lists_indices()))
    ways = tables["encoder, units given"]
    torch.testing.assert_close(
        ways["ours"]().view(bench_lists_indices().shape), ways["dense"]().gather(1, bench_lists_indices())
    )
    ways = tables["encoder with its top-k"]
    values, _ = ways["dense"]()
    torch.testing.assert_close(ways["ours"]()[0].sort(1, descending=True).values, values)


def bench_lists_indices() -> torch.Tensor:
    """The units that the peer's sparse matrix names."""
    width, units, most, batch = SMALL
    draw = torch.Generator().manual_seed(0)
    for size in (units, batch, batch):
        torch.randn(size, width, generator=draw)
    torch.randn(units, generator=draw)
    return torch.stack([torch.randperm(units, generator=draw)[:most].sort().values for _ in range(batch)])


@pytest.mark.filterwarnings("ignore")  # torch's dynamic quantisation is deprecated; it is the peer
@pytest.mark.parametrize("make", [bench_rows.layers, bench_rows.ffns])
def test_row_ways_agree(make) -> None:
    with torch.inference_mode():
        found = {name: way().float() for name, way in make(32, 70, 2, 0.3).items()}
    want = found["dense float32"]
    for name, each in found.items():
        if name.startswith("narrow") or name == "gated_linear float32":
            assert (each - want).abs().max() < 0.1 * want.abs().max(), name


@pytest.mark.filterwarnings("ignore")
def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(bench_lists, "SHAPES", (SMALL, SMALL))
    monkeypatch.setattr(bench_rows, "LAYERS", ((32, 70, 1),))
    monkeypatch.setattr(bench_busy, "LAYERS", ((32, 70, 1),))
    bench_kernels.run(replace(QUICK, lists=True, rows=True, plot=tmp_path / "new"), Console(width=200))
    out = capsys.readouterr().out
    for name, title in (("lists", "forward"), ("rows", "linear")):
        first = json.loads((tmp_path / "new" / f"{name}.json").read_text())["results"][0]
        assert first["title"] == title
        assert all(took > 0 for took in first["ms"].values())
    assert "embedding_bag, sparse" in out
    assert "narrow int8" in out
    bench_busy.show_busy(1, 0.1, 0.05, Console(width=200))
    assert "beside 1 busy processes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--busy -1"):
        bench_kernels.run(replace(QUICK, busy=-1), Console())


def test_many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lists, "MANY", (16, (128, 256), 8, 4))
    found = bench_lists.show_many(Console(), rounds=2)
    assert [set(each["ns"]) for each in found] == [{"forward", "encoder", "backward and update", "embedding_bag"}] * 2
