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


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench ffn --sizes 0 1 1", "--sizes must be an integer of at least 1, not 0"),
        ("bench ffn --batches", "--batches: give a number of tokens"),
        ("bench ffn --batches 1 0", "--batches must be an integer of at least 1, not 0"),
        ("bench ffn --rate 2", "--rate must lie strictly between 0 and 1"),
        ("bench ffn --group 0", "--group must be an integer of at least 1, not 0"),
        ("bench ffn --seconds nan", "--seconds must be a finite number above 0"),
        ("bench kernels --patience -1", "--patience must be a finite number of at least 0"),
        ("bench kernels --model m.gguf", "--model: goes with --trained"),
        ("bench kernels --step --auto", "--step: measures one thing; leave out --auto"),
        ("bench kernels --auto --rows", "--auto: measures one thing; leave out --rows"),
    ],
)
def test_wrong_options_of_benchmarks_are_named(line, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gatelet", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert told in said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train vae", "interrupted; the same command with --resume continues"),
        ("sweep straight-through", "interrupted; the same command continues"),
        ("diagnose toy", "interrupted"),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_an_interruption_says_how_to_go_on(line, told, early, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    words = line.split()
    monkeypatch.setattr(sys, "argv", ["gatelet", *words])
    if early:
        monkeypatch.setattr("tyro.cli", stop)
        told = "interrupted"
    else:
        known = [each._replace(run=stop) for each in commands.commands()]
        monkeypatch.setattr(cli, "commands", lambda: known)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == told
