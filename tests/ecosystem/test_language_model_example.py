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
    made = example.makers(None, None, tmp_path)
    wanted = [*lines, "dense, float32", "all units open, float32", "TEAL, 75% of inputs, float32"]
    rows = example.chosen(made, wanted)
    example.fit(tmp_path, rows)
    example.measure_perplexity(tmp_path, rows)
    example.measure(tmp_path, rows, threads=1, new=2, turns=1)
    shown = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table and f"| {name} |" in shown for name in rows)
    assert "nan" not in table
    assert "left out" not in shown
    assert (tmp_path / "language-model.png").stat().st_size > 1000
    example.fit(tmp_path, rows)  # what was fitted stays
    assert "error" not in capsys.readouterr().out


def test_a_line_that_was_not_fitted_is_left_out_in_words(example, tmp_path, capsys):
    example.measure_perplexity(tmp_path, ["self, 70% open, float32"])
    assert "self, 70% open, float32: left out, it was not fitted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no line 'nonsense'"):
        example.chosen(example.makers(None, None, tmp_path), ["nonsense"])
    assert set(example.chosen(example.makers(None, None, tmp_path), [])) == set(example.SHORT)
