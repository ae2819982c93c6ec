"""The search: by validation error alone, resumable, and a trial that was killed does not stop it."""

import io
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console
from sqlalchemy.exc import IntegrityError

from gatelet_lab import cli, data
from gatelet_lab.commands import sweep
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import rows

SMALL = {
    "row": "sigmoid",
    "dataset": "digits",
    "epochs": 2,
    "space": ("rate=0.03:1:log", "batch=32,64"),
    "settings": ("experts=20", "bottleneck=5"),
}


class Untouchable:
    """Stands for a test set: whatever is done with it is an error."""

    def __getattr__(self, name):
        raise AssertionError(f"the test set was looked at: {name}")

    __len__ = __getitem__ = lambda *_: pytest.fail("the test set was looked at")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return options of a search, with a test set that must not be looked at."""
    split = replace(data.load("digits"), test_images=Untouchable(), test_labels=Untouchable())
    monkeypatch.setattr(data, "load", lambda *_: split)
    places = {"storage": f"sqlite:///{tmp_path}/study.db", "out": tmp_path / "out"}
    return lambda **changes: sweep.Sweep(**SMALL | places | changes)


def study(options):
    return optuna.load_study(study_name="sigmoid-quick-digits", storage=options.storage)


def states(options):
    return [trial.state for trial in study(options).get_trials()]


def run(options):
    told = io.StringIO()
    sweep.run(options, Console(width=200, file=told))
    return told.getvalue()


def test_a_search_ends_with_settings_that_reproduce_takes(small):
    printed = run(small(trials=3))
    best = study(small()).best_trial
    settings = best.user_attrs["settings"]
    expected = " ".join(f"--set {each}" for each in (*SMALL["settings"], *settings))
    assert f"gatelet reproduce --preset quick --rows sigmoid --epochs 2 {expected}" in printed.replace("\n", " ")
    assert f"best {best.value:.2f} % (trial {best.number})" in printed


def test_the_value_is_the_best_validation_error_of_these_settings(small):
    run(small(trials=1))
    (trial,) = study(small()).get_trials()
    assert trial.user_attrs["settings"] == ["rate=0.3", "batch=32"]  # the recipe's own come first
    base, _ = sweep.plan(small())
    trainer = PaperTrainer(base, 0, data.load().without_test())
    while not trainer.finished:
        trainer.advance()
    assert trial.value == min(row.valid_error for row in trainer.history)
    assert list(trial.intermediate_values.values()) == [row.valid_error for row in trainer.history]


def test_the_same_command_continues_and_counts_what_is_there(small):
    run(small(trials=1))
    run(small(trials=2))
    run(small(trials=2))
    assert states(small()) == [TrialState.COMPLETE] * 2


def test_another_search_under_the_same_name_is_refused(small):
    run(small(trials=1))
    with pytest.raises(ValueError, match="experts was 20, is 30; name another study"):
        sweep.run(small(settings=("experts=30", "bottleneck=5")), Console())


def test_ctrl_c_leaves_a_failed_trial_and_the_search_continues(small, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PaperTrainer, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small(trials=1))
    assert states(small()) == [TrialState.FAIL, TrialState.WAITING]
    run(small(trials=1))
    assert states(small()) == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_killed_trial_is_marked_failed(small, monkeypatch):
    monkeypatch.setattr(sweep, "GRACE", 1)
    options = small(trials=1)
    killed = sweep.open_study(options, *sweep.plan(options), sweep._storage(options.storage))
    with pytest.warns(UserWarning, match="optimize"):  # which would go on beating
        trial = killed.ask()
    killed._storage.record_heartbeat(trial._trial_id)
    time.sleep(2.1)
    run(options)
    assert states(options) == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_diverged_trial_is_over_and_the_search_goes_on(small):
    printed = run(small(trials=2, space=("rate=1e29,1e30",)))
    assert states(small()) == [TrialState.PRUNED] * 2
    assert "nothing to recommend" in printed


def test_a_trial_worse_than_the_others_is_stopped_early(small, tmp_path):
    class Bad:
        number = steps = 0

        def report(self, value, step):
            self.steps += 1

        def should_prune(self):
            return True

    base, _ = sweep.plan(small())
    trial, tell = Bad(), sweep.Search.tell
    search = SimpleNamespace(show=lambda *_: None)
    with pytest.raises(optuna.TrialPruned):
        sweep.train(
            PaperTrainer(base, 0, data.load().without_test()), tmp_path / "c.pt", lambda row: tell(search, trial, row)
        )
    assert trial.steps == 1


@pytest.mark.parametrize("preset", ["quick", "paper", "best"])
def test_every_row_has_a_space_of_its_own_that_holds_its_recipe(preset):
    for row in rows(preset):
        base, space = sweep.plan(sweep.Sweep(row=row, preset=preset))
        own = {key: sweep._own(base, key, each) for key, each in space.items()}
        assert len(space) >= 3
        assert [key for key, value in own.items() if value is None] == [], row


def test_tables_that_another_process_makes_are_looked_at_again(small, monkeypatch):
    calls = []

    class Colliding(optuna.storages.RDBStorage):
        def __init__(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise IntegrityError("INSERT INTO alembic_version", {}, Exception("UNIQUE constraint failed"))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Colliding)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    run(small(trials=1))
    assert len(calls) == 2


BAD = {
    "no row": ((), "row"),
    "unknown row": (("sigmoidal",), "'sigmoid'"),
    "no trial": (("sigmoid", "--trials", "0"), "--trials"),
    "no sign": (("sigmoid", "--space", "rate"), "key=low:high"),
    "unknown key": (("sigmoid", "--space", "rat=0:1"), "'rate'"),
    "empty range": (("sigmoid", "--space", "rate=1:0.1"), "low end must be below"),
    "logarithm of zero": (("sigmoid", "--space", "rate=0:1:log"), "must start above 0"),
    "another word": (("sigmoid", "--space", "rate=0.1:1:lin"), "only :log"),
    "text for a number": (("sigmoid", "--space", "batch=1.5:3"), "must be int"),
    "text for the high end": (("sigmoid", "--space", "batch=1:x"), "must be int"),
    "a range of words": (("sigmoid", "--space", "estimator=a:b"), "a:b: estimator is not a number"),
    "an impossible end": (("sigmoid", "--space", "momentum=0:1"), "momentum must lie in [0, 1)"),
    "an unknown choice": (("sigmoid", "--space", "estimator=sigmoid,sigmo"), "'sigmoid'"),
    "twice": (("sigmoid", "--space", "rate=0:1", "--space", "rate=0:1"), "twice"),
    "held and searched": (("sigmoid", "--space", "rate=0:1", "--set", "rate=1"), "twice"),
    "no database": (("sigmoid", "--dataset", "digits", "--storage", "nowhere"), "--storage"),
    "no such folder": (("sigmoid", "--dataset", "digits", "--storage", "sqlite:////nowhere/at/all.db"), "--storage"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_name_the_argument(case, monkeypatch, capsys, tmp_path):
    arguments, told = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gatelet", "sweep", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).split())
    assert exit_.value.code == 2
    assert told.lower() in message.lower()
    assert "Traceback" not in message
