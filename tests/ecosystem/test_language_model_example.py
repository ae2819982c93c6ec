"""examples/language_model.py on a tiny model: each kind of line is fitted, measured, and in table and picture."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gatelet_lab.language import Language, Text

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "language_model.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("language_model_example", path)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, made)
    spec.loader.exec_module(made)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()
    ids = torch.randint(50, (10, 16))
    monkeypatch.setattr(made, "source", lambda: Language(model, None))
    monkeypatch.setattr(made, "standard_library", lambda tokenizer: Text(ids[:8], ids[8:], (1, 1)))
    monkeypatch.setattr(made, "PROMPT", 8)
    few = {name: dataclasses.replace(line, steps=min(2, line.steps)) for name, line in made.LINES.items()}
    monkeypatch.setattr(made, "LINES", few)
    return made


def kinds(example):
    """The first line of each kind."""
    found = {}
    for name, line in example.LINES.items():
        found.setdefault((line.gater, line.by_block, line.learns, line.relu), name)
    return list(found.values())


def test_every_kind_of_line_is_fitted_and_decodes(example, tmp_path, capsys):
    lines = kinds(example)
    assert len(lines) >= 10
    language, text = example.source(), example.standard_library(None)
    everything = example.rows_of(language.model, text, tmp_path)
    wanted = [*lines, "dense, float32", "dense, bf16", "all units open, float32", "TEAL, 75% of inputs, float32"]
    rows = {name: everything[name] for name in example.chosen(everything, wanted)}
    example.fit(language.model, text, tmp_path, rows)
    example.measure_perplexity(text, tmp_path, rows)
    example.measure(text, tmp_path, rows, new=2, turns=2)
    shown = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table and f"| {name} |" in shown for name in rows)
    assert "nan" not in table
    assert "left out" not in shown
    assert (tmp_path / "language-model.png").stat().st_size > 1000
    example.fit(language.model, text, tmp_path, rows)  # what was fitted and measured stays
    example.measure(text, tmp_path, rows, new=2, turns=2)
    assert not {"error", "turn"} & set(capsys.readouterr().out.replace(":", "").split())


def test_measuring_goes_on_at_the_row_where_it_was_stopped(example, tmp_path, monkeypatch):
    rows = {f"dense, {number}": example.Row(lambda number=number: number) for number in range(4)}
    visited = []

    def visit(model, prompt, new):
        if len(visited) == 6:
            raise KeyboardInterrupt
        visited.append(model)
        return {"ms 1": 1.0, "ms 2": 1.0, "ffn": 1.0}

    text = example.standard_library(None)
    monkeypatch.setattr(example, "visit", visit)
    with pytest.raises(KeyboardInterrupt):
        example.measure(text, tmp_path, rows, new=2, turns=2)
    first, second = visited[:4], visited[4:]
    assert sorted(first) == [0, 1, 2, 3]  # a turn visits every row
    visited.clear()
    example.measure(text, tmp_path, rows, new=2, turns=2)
    assert sorted(second + visited) == [0, 1, 2, 3]  # and the second goes on with those that are left
    assert second + visited != first  # in another order


def test_the_table_compares_with_the_dense_model_of_the_same_precision(example, tmp_path, capsys):
    rows = {
        "dense, float32": example.Row(None),
        "dense, bf16": example.Row(None, "bf16"),
        "all units open, bf16": example.Row(None, "bf16"),
        "self, 70% open, bf16": example.Row(None, "bf16", example.LINES["self, 70% open"]),
        "pruned, 50% open, distilled, float32": example.Row(None, line=example.LINES["pruned, 50% open, distilled"]),
    }
    ms = dict(zip(rows, (10, 8, 5, 4, 6), strict=True))
    measured = {
        name: {"perplexity": 10.0 + value, "visits": [{"ms 1": value, "ms 2": value / 2, "ffn": 1.0}] * 2}
        for name, value in ms.items()
    }
    measured["dense, bf16"]["visits"] = [{"ms 1": each, "ms 2": 4, "ffn": 1.0} for each in (7, 9)]
    measured["pruned, 50% open, distilled, float32"]["perplexity"] = 12345.0
    example.show(rows, measured, tmp_path)
    shown = capsys.readouterr().out
    assert "| self, 70% open, bf16 | 250.0 | 2.00 | 1.25 | 500.0 | 2.00 | 1.25 | 1.0 | 14.00 (-30.0%) |" in shown
    assert "| all units open, bf16 | 200.0 | 1.60 | – |" in shown
    assert "| 12,345 |" in shown
    assert "at most 28.6%; those of dense, float32: 100.0, 100.0 tokens/s." in shown
    example.show(rows, {}, tmp_path)
    assert "no table" in capsys.readouterr().out


def test_a_line_that_was_not_fitted_is_left_out_in_words(example, tmp_path, capsys):
    rows = example.rows_of(None, None, tmp_path)
    name = "self, 70% open, float32"
    example.measure_perplexity(None, tmp_path, {name: rows[name]})
    assert f"{name}: left out, it was not fitted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no line 'nonsense'"):
        example.chosen(rows, ["nonsense"])
    assert set(example.chosen(rows, [])) == set(example.SHORT)
