"""Three processes share a study in SQLite and in PostgreSQL; one is killed, and its trial is not lost."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from gatelet_lab import cli
from gatelet_lab.commands import sweep
from gatelet_lab.training.paper import PaperTrainer
from machines_page import command

GRACE = 5


def search(options, log, doomed):
    """What each process runs; the doomed one is killed when its first checkpoint is written."""
    sweep.HEARTBEAT, sweep.GRACE = 1, GRACE
    if doomed:
        save = PaperTrainer.save

        def save_and_die(trainer, path):
            save(trainer, path)
            os.kill(os.getpid(), signal.SIGKILL)

        PaperTrainer.save = save_and_die
    with Path(log).open("w") as file:
        sweep.run(options, Console(width=200, file=file))


def program(name):
    """Return where one of PostgreSQL's programs is; Debian keeps them out of the path."""
    return shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


@contextlib.contextmanager
def postgresql():
    """Run a server of its own, which listens on a socket in a folder alone; yield the study's URL."""
    programs = [program(name) for name in ("initdb", "postgres")]
    if None in programs:
        pytest.skip("PostgreSQL's programs initdb and postgres are not installed")
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="gatelet-postgresql-", dir="/tmp"))
    os.chown(folder, user.pw_uid, user.pw_gid)
    account = {"user": user.pw_uid, "group": user.pw_gid, "cwd": folder} if os.getuid() == 0 else {"cwd": folder}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = None
    try:
        begin = [programs[0], "--pgdata=data", "--auth=trust", "--username=gatelet", "--no-sync"]
        subprocess.run(begin, check=True, **account, **quiet)
        command = [programs[1], "-D", "data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        server = subprocess.Popen(command, **account, **quiet)
        deadline = time.monotonic() + 60
        while not list(folder.glob(".s.PGSQL.*[0-9]")):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"postgresql+psycopg://gatelet@/postgres?host={folder}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # it ends connections and stops
            server.wait()
        shutil.rmtree(folder)


@contextlib.contextmanager
def storage(kind, folder):
    """Yield the URL of an empty database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/study.db"
    else:
        with postgresql() as url:
            yield url


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_killed_trial_is_continued_and_none_runs_twice(kind, tmp_path, monkeypatch, capsys):
    with storage(kind, tmp_path) as url:
        options = sweep.Sweep(
            row="sigmoid",
            dataset="digits",
            epochs=3,
            trials=4,
            settings=("experts=20", "bottleneck=5"),
            storage=url,
            out=tmp_path / "out",
        )
        context = get_context("forkserver")
        context.set_forkserver_preload(
            ["gatelet_lab.commands.sweep", "torch.utils.tensorboard"]
        )  # imported once for all
        logs = [tmp_path / f"{number}.log" for number in range(3)]
        processes = [context.Process(target=search, args=(options, logs[n], n == 0)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
        assert len(list((tmp_path / "out").glob("*.pt"))) <= 1
        database = optuna.storages.RDBStorage(url)
        study = optuna.load_study(study_name="sigmoid-quick-digits", storage=database)
        time.sleep(GRACE + 1)
        monkeypatch.setattr(sweep, "HEARTBEAT", 1)
        monkeypatch.setattr(sweep, "GRACE", GRACE)
        more = len(sweep.finished(study)) + 1
        ours = [("postgresql+psycopg://user:password@host/gatelet", url), ("/shared/sweep", tmp_path / "out")]
        words = command("gatelet sweep", [*ours, ("straight_through", "sigmoid"), ("200", more)])
        settings = [word for setting in options.settings for word in ("--set", setting)]
        monkeypatch.setattr(sys, "argv", [*words, "--dataset", "digits", "--epochs", "3", *settings])
        monkeypatch.setenv("COLUMNS", "200")
        cli.main()
        trials = study.get_trials()
        database.remove_session()
        database.engine.dispose()
    told = capsys.readouterr().out + "".join(log.read_text() for log in logs[1:])
    (killed, *_) = [trial for trial in trials if trial.state == TrialState.FAIL]
    again = next(trial for trial in trials if trial.system_attrs.get("failed_trial") == killed.number)
    assert again.params == killed.params
    assert again.state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert f"trial {again.number} goes on with trial {killed.number}, from its checkpoint" in told
    assert again.intermediate_values[0] == killed.intermediate_values.get(0, again.intermediate_values[0])
    ended = [tuple(trial.params.values()) for trial in trials if trial.state != TrialState.FAIL]
    assert len(set(ended)) == len(ended)
    assert not list((tmp_path / "out").iterdir())
