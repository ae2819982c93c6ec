"""Jobs on a Dask cluster of separate processes, and everything that is checked before one is trained."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import optuna
import pytest
import torch
from upath import UPath

import gatelet
from gatelet_lab import cli, data, files
from gatelet_lab.commands import claims
from gatelet_lab.training import cluster, jobs, recipes
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.settings import override
from machines_page import command

ADDRESS = "tcp://host:8786"
SMALL = ("--dataset", "digits", "--set", "experts=20", "--set", "bottleneck=5")
PRELOAD = """
import os
import fsspec
from fsspec.implementations.local import LocalFileSystem
from upath import UPath
from upath.registry import register_implementation


class Shared(LocalFileSystem):
    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path):
        place = str(path).removeprefix("shared://")
        return LocalFileSystem._strip_protocol(os.path.join(os.environ["SHARED"], place))


class SharedPath(UPath):
    pass


fsspec.register_implementation("shared", Shared, clobber=True)
register_implementation("shared", SharedPath, clobber=True)
"""


def run(monkeypatch, capsys, *arguments):
    """Run a command in this process; return its exit status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["gatelet", *map(str, arguments)])
    status = 0
    try:
        cli.main()
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


class Cluster:
    """A scheduler and its workers."""

    def __init__(self, folder):
        self.folder, self.processes = folder, {}
        path = os.pathsep.join((str(folder), str(Path(gatelet.__file__).parents[1])))
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "SHARED": str(folder)}
        self.environment["DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL"] = "1 h"  # a machine that stands still is not lost
        (folder / "preload.py").write_text(PRELOAD)
        self.start("scheduler", *command("dask scheduler"), "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
        self.url = self.wait("scheduler", "Scheduler at:").split()[-1]

    def start(self, name, program, *arguments):
        words = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        with (self.folder / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(words, stderr=log, env=self.environment, cwd=self.folder)

    def worker(self, name):
        place = (
            "--local-directory",
            self.folder / "scratch",
            "--no-dashboard",
            "--preload",
            self.folder / "preload.py",
        )
        words = command("dask worker", [(ADDRESS, self.url), ("--nworkers 8", "--nworkers 1")])
        self.start(name, *words, "--no-nanny", "--name", name, *place)

    def wait(self, name, words):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            for line in (self.folder / f"{name}.log").read_text().splitlines():
                if words in line:
                    return line
            time.sleep(0.05)
        raise AssertionError((self.folder / f"{name}.log").read_text())

    def end(self, name, how=signal.SIGKILL):
        process = self.processes.pop(name)
        process.send_signal(how)
        process.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.worker("one")
        made.worker("two")
        for name in ("one", "two"):
            made.wait(name, "Starting established connection")
        yield made
    finally:
        for name in list(made.processes):
            made.end(name)


@contextlib.contextmanager
def once(there, then):
    """Call ``then`` in a thread as soon as ``there`` returns something, and wait for it at the end."""
    over = threading.Event()

    def wait():
        while not over.wait(0.01):
            if found := there():
                then(found)
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_lost_worker_costs_at_most_its_epoch(dask, tmp_path, monkeypatch, capsys):
    out, length, known = tmp_path / "out", 40, {}

    def kill(_):
        dask.end("two")
        time.sleep(0.1)
        for path in (out / "checkpoints").glob("*.pt"):
            known[path.stem] = torch.load(path)["history"]

    names = ("sigmoid", "noisy_sigmoid")
    both = [out / "checkpoints" / f"{name}-seed0.pt" for name in names]
    with once(lambda: all(path.is_file() for path in both), kill):
        words = command("gatelet reproduce", [(ADDRESS, dask.url), ("/shared/run", out), ("paper", "quick")])
        status, told = run(monkeypatch, capsys, *words[1:], *SMALL, "--rows", *names, "--epochs", length)
    assert status == 0, told
    for name in names:
        assert f"{name}-seed0: epoch 2: valid" in told
        recipe = override(recipes.recipe(name, "quick").but(epochs=length), SMALL[3::2])
        trainer = PaperTrainer(recipe, 0, data.load("digits"))
        while not trainer.finished:
            trainer.advance()
        wanted = json.loads(json.dumps(trainer.result()))
        found = json.loads((out / "rows" / f"{name}-seed0.json").read_text())
        assert {key: found[key] for key in wanted if "seconds" not in key} == {
            key: each for key, each in wanted.items() if "seconds" not in key
        }
        done = known[f"{name}-seed0"]
        assert found["history"][: len(done)] == done  # seconds included: these epochs were not trained again
        assert len(done) < length


def test_ctrl_c_stops_the_workers(dask, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with once(lambda: list(out.glob("checkpoints/*.pt")), lambda _: os.kill(os.getpid(), signal.SIGINT)):
            endless = ("--set", "patience=5000", "--epochs", 5000, "--out", out, "--scheduler", dask.url)
            status, told = run(monkeypatch, capsys, "reproduce", *SMALL, "--rows", "sigmoid", *endless)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert "--resume continues" in told
    with distributed.Client(dask.url, set_as_default=False) as client:
        deadline = time.monotonic() + 60
        while any(client.run(lambda dask_worker: dask_worker.state.executing_count).values()):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_the_output_may_lie_behind_a_url(dask, monkeypatch, capsys):
    monkeypatch.setenv("SHARED", str(dask.folder))
    monkeypatch.syspath_prepend(dask.folder)
    importlib.import_module("preload")
    place = ("--out", "shared://runs/frontier", "--scheduler", dask.url)
    short = ("--methods", "straight_through", "--shares", 0.1, "--epochs", 1, "--seeds", 1)
    words = ("frontier", "--dataset", "digits", *short, "--set", "experts=20", "--set", "bottleneck=5", *place)
    status, told = run(monkeypatch, capsys, *words)
    assert status == 0, told
    out = dask.folder / "runs" / "frontier"
    (point,) = json.loads((out / "frontier.json").read_text())["points"]
    assert point["seeds"] == 1
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not list((out / "checkpoints").iterdir())
    assert list(out.glob("tensorboard/*/events*"))
    weights = files.read_tensors(
        files.location("shared://runs/frontier/rows/straight_through-0.1-seed0.weights.pt"), "cpu"
    )
    assert "output.weight" in weights
    status, told = run(monkeypatch, capsys, *words, "--resume")
    assert status == 0
    assert "1 of them were finished before" in told


def test_a_search_trains_on_the_workers(dask, tmp_path, monkeypatch, capsys):
    place = ("--storage", f"sqlite:///{tmp_path}/study.db", "--out", tmp_path / "out", "--scheduler", dask.url)
    status, told = run(monkeypatch, capsys, "sweep", "sigmoid", *SMALL, "--epochs", 2, "--trials", 3, *place)
    assert status == 0, told
    assert "gatelet reproduce --preset quick --rows sigmoid --epochs 2 --set experts=20" in told
    study = optuna.load_study(study_name="sigmoid-quick-digits", storage=f"sqlite:///{tmp_path}/study.db")
    for trial in study.get_trials():
        assert list(trial.intermediate_values) == list(range(len(trial.intermediate_values)))
    assert not list((tmp_path / "out").iterdir())


def test_the_claims_are_trained_on_the_workers(dask, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "_DRAWS", 2)
    monkeypatch.setattr(jobs, "LocalWorkers", lambda *_: pytest.fail("trained here"))
    short = ("--epochs", 1, "--seeds", 1, "--train-images", 200)
    status, told = run(
        monkeypatch, capsys, "claims", *SMALL, *short, "--out", tmp_path / "out", "--scheduler", dask.url
    )
    assert status == 0, told
    assert "sts_no_momentum-seed0: epoch 1: valid" in told
    found = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert {each["row"] for each in found["runs"]} == set(claims.VARIANTS)
    options = claims.Claims(dataset="digits", epochs=1, seeds=1, train_images=200, settings=SMALL[3::2])
    trainer = PaperTrainer(claims.variant(options, "sbn"), 0, options.load())
    trainer.advance()
    (sbn,) = (each for each in found["runs"] if each["row"] == "sbn")
    assert sbn["train_nll"] == trainer.result()["train_nll"]


def test_every_worker_must_see_the_output(dask):
    """The memory of this process is a place that no other one sees."""
    out = UPath("memory://nobody/elsewhere")
    with (
        distributed.Client(dask.url, set_as_default=False) as client,
        pytest.raises(ValueError, match=r"--out memory:.*does not see it as this process does \(FileNotFoundError"),
    ):
        cluster.check_out(client, dask.url, out)
    assert not out.exists()  # and the same command may be given again


BAD = {
    "nobody there": (("--scheduler", "tcp://127.0.0.1:9"), "no scheduler answers there within 1 s"),
    "no address": (("--scheduler", "nowhere"), "--scheduler nowhere: no scheduler answers"),
    "jobs too": (("--jobs", 2), "--jobs: with --scheduler"),
    "another device": (("--device", "abacus"), "abacus"),
    "a place in one process": (("--out", "memory://x"), "is in the memory of one process"),
    "an unknown kind of place": (("--out", "nosuch://x"), "nosuch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_name_the_argument(case, dask, tmp_path, monkeypatch, capsys):
    arguments, words = BAD[case]
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    given = ("reproduce", *SMALL, "--rows", "sigmoid", "--scheduler", dask.url, "--out", tmp_path / "out", *arguments)
    status, told = run(monkeypatch, capsys, *given)
    assert status == 2
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["gatelet", "torch", "python"])
def test_workers_of_another_version_are_refused(what, dask, tmp_path, monkeypatch, capsys):
    ours = cluster.versions()
    monkeypatch.setattr(cluster, "versions", lambda: ours | {what: "0.0"})
    given = ("reproduce", *SMALL, "--rows", "sigmoid", "--scheduler", dask.url, "--out", tmp_path / "out")
    status, told = run(monkeypatch, capsys, *given)
    assert status == 2
    assert f"has {what} {ours[what]}, and here is 0.0" in told
    assert not (tmp_path / "out").exists()


def test_workers_with_other_data_or_threads_are_refused(dask, monkeypatch):
    with distributed.Client(dask.url, set_as_default=False) as client:
        with pytest.raises(ValueError, match=r"worker tcp://.* reads \d+, and here is"):
            cluster.check_data(client, dask.url, os.getpid)
        info = {"workers": {"tcp://far:1": {"nthreads": 4}}}
        monkeypatch.setattr(client, "scheduler_info", lambda **_: info)
        with pytest.raises(ValueError, match=r"runs 4 jobs in one process.*--nthreads 1"):
            cluster.check_versions(client, dask.url)


def test_a_scheduler_without_workers_is_told(dask, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    for name in [name for name in dask.processes if name != "scheduler"]:
        dask.end(name)
    with pytest.raises(ValueError, match="has no workers; start some: dask worker"):
        cluster.connect(dask.url)
