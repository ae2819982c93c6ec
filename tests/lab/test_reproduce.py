"""The command line, on data that need no download: its output, its errors, and that nothing is lost."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gatelet_lab import data, table
from gatelet_lab.commands import reproduce
from gatelet_lab.files import CheckpointError
from gatelet_lab.training import jobs, recipes, settings
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import ROWS, recipe

GATELET = str(Path(sys.executable).with_name("gatelet"))
SMALL = ("--dataset", "digits", "--rows", "sigmoid", "noisy_sigmoid")
TIMES = ("seconds_per_epoch", "seconds")


def gatelet(*arguments, **options):
    return subprocess.run([GATELET, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


def rows(out):
    found = json.loads((out / "table.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = gatelet("reproduce", *SMALL, "straight_through", "--epochs", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_output_is_complete(finished):
    out, done = finished
    content = json.loads((out / "table.json").read_text())
    assert content["dataset"] == "digits"
    assert content["preset"] == "quick"
    assert content["version"]
    assert [row["row"] for row in content["rows"]] == ["straight_through", "noisy_sigmoid", "sigmoid"]
    for row in content["rows"]:
        assert {
            "row",
            "seed",
            "train_nll",
            "valid_error",
            "test_error",
            "test_error_sampled",
            "open_test",
            "open_train",
            "epochs",
            "seconds_per_epoch",
            "valid_error_sampled",
            "valid_error_mean_of_10",
            "config",
            "paper",
        } <= set(row)
        assert row["epochs"] == 3
    assert content["rows"][0]["paper"]["test_error"] == 1.39
    assert (out / "table.md").read_text().count("\n| ") == 5
    for name in ("curves.png", "gates.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "tensorboard").glob("*/events*"))) == 3
    assert "Baseline Sigmoid+Noise" in done.stdout
    assert "1.87" in done.stdout  # the paper's number beside it
    assert not list((out / "checkpoints").iterdir())


def test_a_second_run_refuses_the_directory_and_overwrites_nothing(finished):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = gatelet("reproduce", *SMALL, "--epochs", 3, "--out", out)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_resuming_a_finished_run_shows_it_again(finished):
    out, _ = finished
    before = rows(out)
    done = gatelet("reproduce", *SMALL, "straight_through", "--epochs", 3, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert rows(out) == before


def test_a_setting_overrides_the_recipe_and_is_told(tmp_path):
    out = tmp_path / "out"
    frozen = ("--set", "gater_rate=0", "--set", "options.std=0.5", "--set", "experts=100")
    done = gatelet("reproduce", "--dataset", "digits", "--rows", "noisy_sigmoid", "--epochs", 1, "--out", out, *frozen)
    assert done.returncode == 0, done.stderr
    (row,) = rows(out)
    assert row["config"]["gater_rate"] == 0
    assert row["config"]["options"] == {"std": 0.5}
    assert row["config"]["experts"] == 100
    assert json.loads((out / "table.json").read_text())["set"] == list(frozen[1::2])
    assert "--set options.std=0.5" in (out / "table.md").read_text()


def in_this_process(options, planned, console, finish):
    """What worker processes do, where a test can change what they know."""
    for job in planned:
        trainer = PaperTrainer(
            job.recipe, job.seed, split := options.load(), teacher=jobs.read_teacher(options, job.recipe, split)
        )
        trainer.advance()
        result = trainer.result() | {"history": []}
        if job.recipe.row == "teacher":
            torch.save(trainer.best, jobs.weights_file(options.out, job))
        (options.out / "rows" / f"{job.name}.json").write_text(json.dumps(result))
        finish(job, result)


def test_the_preset_best_learns_from_a_teacher_tells_its_cost_and_has_no_paper_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "teacher", lambda: recipes.teacher().but(epochs=1, experts=20, batch=64))
    monkeypatch.setattr(jobs, "train_all", in_this_process)
    small = reproduce.Reproduce(
        preset="best", dataset="digits", epochs=1, settings=("experts=50", "bottleneck=2"), out=tmp_path / "o"
    )
    told = io.StringIO()
    reproduce.run(small, Console(width=120, file=told))
    assert "Thousand multiply-adds per image: gater" in told.getvalue()
    assert "first teacher-seed0, which others learn from" in told.getvalue()
    teacher = json.loads((tmp_path / "o" / "rows" / "teacher-seed0.json").read_text())
    assert teacher["config"]["more_training"] == recipes.best().optimiser.more_training
    assert f"The teacher's test error is {teacher['test_error']:.2f} %" in told.getvalue()
    (row,) = rows(tmp_path / "o")
    assert row["paper"] is None
    assert row["config"]["optimizer"] == "adamw"


def test_a_frozen_gater_stays_as_it_was(digits):
    frozen = settings.override(recipe("straight_through", "quick"), ["gater_rate=0", "experts=50", "bottleneck=10"])
    trainer = PaperTrainer(frozen, 0, digits)
    trainer.advance()  # max-norm shortens the start's weights once
    before = [parameter.clone() for parameter in trainer.model.layer.gater.parameters()]
    trainer.advance()
    assert all(torch.equal(one, two) for one, two in zip(before, trainer.model.layer.gater.parameters(), strict=True))


LONGER = ("reproduce", *SMALL, "--epochs", "30", "--out")  # enough that a busy machine does not miss them


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = gatelet(*LONGER, out)
    assert done.returncode == 0, done.stderr
    return rows(out)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_numbers(how, tmp_path, uninterrupted):
    process = subprocess.Popen(
        [GATELET, *LONGER, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    checkpoints = tmp_path / "cut" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, told = process.communicate(timeout=30)  # ends only when the workers, who share the pipe, are gone too
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert b"--resume" in told
    resumed = gatelet(*LONGER, tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "cut") == uninterrupted


def bad_calls(out, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    alien = tmp_path / "alien"
    alien.mkdir()
    (alien / "thesis.txt").write_text("")
    return {
        "unknown row": (("--rows", "straight_thru", "--out", tmp_path / "a"), "straight_through"),
        "no row": (("--rows", "--out", tmp_path / "a"), "--rows"),
        "no seed": (("--seeds", 0, "--out", tmp_path / "a"), "--seeds"),
        "no epoch": (("--epochs", 0, "--out", tmp_path / "a"), "--epochs"),
        "text for a number": (("--epochs", "many", "--out", tmp_path / "a"), "--epochs"),
        "unknown option": (("--presets", "quick"), "--preset"),
        "unknown preset": (("--preset", "fast"), "quick"),
        "unknown data": (("--dataset", "nowhere", "--out", tmp_path / "a"), "nowhere"),
        "no such device": (("--device", "abacus", "--out", tmp_path / "a"), "abacus"),
        "output is a file": (("--out", file, "--dataset", "digits"), "not a directory"),
        "output is under a file": (("--out", file / "x", "--dataset", "digits"), "--out"),
        "output is somebody's": (("--out", alien, "--dataset", "digits", "--resume"), "not the output of this"),
        "another preset": (("--out", out, "--dataset", "digits", "--preset", "paper", "--resume"), "preset"),
        "no such key": (("--set", "gater_rat=0", "--out", tmp_path / "a"), "'gater_rate'"),
        "a setting without a value": (("--set", "gater_rate", "--out", tmp_path / "a"), "key=value"),
        "a setting of another type": (("--set", "batch=1.5", "--out", tmp_path / "a"), "--set batch=1.5: must be int"),
        "a setting out of range": (("--set", "momentum=1", "--out", tmp_path / "a"), "momentum must lie in [0, 1)"),
        "no such option": (("--set", "options.slope=sigmoid", "--out", tmp_path / "a"), "row noisy_rectifier: options"),
        "no such estimator": (("--set", "estimator=straight_thru", "--out", tmp_path / "a"), "'straight_through'"),
        "other settings": (("--out", out, *SMALL, "--epochs", 3, "--set", "rate=1", "--resume"), "not rate=1"),
        "another length": (("--out", out, *SMALL, "--epochs", 5, "--resume"), "epochs (3, not 5)"),
    }


def test_bad_calls_name_the_argument_without_a_traceback(finished, tmp_path, monkeypatch, capsys):
    from gatelet_lab import cli

    out, _ = finished
    for case, (arguments, told) in bad_calls(out, tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["gatelet", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        message = " ".join((captured.out + captured.err).split())
        assert exit_.value.code == 2, case
        assert told in message, f"{case}: {message}"
        assert "Traceback" not in message, case
    assert not (tmp_path / "a").exists()


def test_a_damaged_result_is_told(finished):
    out, _ = finished
    path = out / "rows" / "sigmoid-seed0.json"
    good = path.read_text()
    try:
        path.write_text(good[:50])
        done = gatelet("reproduce", *SMALL, "--epochs", 3, "--out", out, "--resume")
        assert done.returncode == 2
        assert "sigmoid-seed0.json" in "".join(done.stderr.split())
    finally:
        path.write_text(good)


def test_seeds_are_shown_as_mean_and_deviation():
    row = {
        "row": "sigmoid",
        "config": {"title": "Baseline Sigmoid"},
        "train_nll": 1e-3,
        "valid_error": 2.0,
        "test_error_sampled": 2.0,
        "open_test": 1.0,
        "multiply_adds": {"gater": 1000, "experts": 500, "output": 500, "dense": 8000},
        "epochs": 8,
        "paper": {"train_nll": 1e-3, "valid_error": 1.0, "test_error": 1.0},
    }
    _, lines = table.cells([row | {"test_error": 1.0}, row | {"test_error": 3.0}])
    assert len(lines) == 1
    assert "2.00 ± 1.41" in lines[0]
    assert lines[0][6:8] == ["2", "25"]  # thousand multiply-adds, and in per cent of dense


def test_jobs_come_in_the_tables_order():
    jobs = reproduce.plan(reproduce.Reproduce(rows=("sigmoid", "noisy_rectifier"), seeds=2))
    assert [job.name for job in jobs] == [
        "noisy_rectifier-seed0",
        "noisy_rectifier-seed1",
        "sigmoid-seed0",
        "sigmoid-seed1",
    ]
    assert next(iter(ROWS)) == "noisy_rectifier"


def test_an_older_result_counts_for_what_it_did_not_know_yet(finished, tmp_path):
    """It was one network: a row of before there were ensembles must not be taken for one."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for path in (out / "rows").glob("*.json"):
        row = json.loads(path.read_text())
        del row["config"]["members"]
        path.write_text(json.dumps(row))
    same = gatelet("reproduce", *SMALL, "straight_through", "--epochs", 3, "--out", out, "--resume")
    assert same.returncode == 0, same.stderr
    job = jobs.Job(recipe("sigmoid", "quick").but(epochs=3, members=2), 0)
    with pytest.raises(CheckpointError, match=r"members \(1, not 2\)"):
        jobs.read_result(out, job)
