"""The subcommands: one file each, all of them in the list, their options a dataclass; an estimator's options."""

import dataclasses
import sys
from pathlib import Path

import pytest

from gatelet.estimators import ScoreFunction, StraightThrough
from gatelet_lab import cli, commands
from gatelet_lab.training.settings import estimator


def test_every_file_is_in_the_list_and_says_what_it_takes():
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(commands.NAMES) == files
    found = commands.commands()
    assert {" ".join(each.words) for each in found} >= {"reproduce", "train sae", "bench kernels"}
    for each in found:
        assert dataclasses.is_dataclass(each.options)
        assert each.options.__doc__
        for field in dataclasses.fields(each.options):
            assert field.type != "Any", (each.words, field.name)


@pytest.mark.parametrize("words", [(), ("train",), ("bench", "kernels")])
def test_help_is_there_at_every_level(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gatelet", *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert ("kernels" if words == ("bench", "kernels") else "{") in shown


def test_an_estimator_has_its_options_behind_its_name():
    made = estimator("score_function:baseline=none,decay=0.5")
    assert isinstance(made, ScoreFunction)
    assert (made.baseline, made.decay) == ("none", 0.5)
    assert isinstance(estimator("straight_through"), StraightThrough)
    with pytest.raises(ValueError, match="name:option=value"):
        estimator("straight_through:slope")
    with pytest.raises(ValueError, match="--estimators straight_through:slop=1"):
        estimator("straight_through:slop=1")
