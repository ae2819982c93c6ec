"""One, two and four processes train to the same numbers; a checkpoint goes on in any number; a killed one ends all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gatelet
from gatelet_lab import cli, data
from gatelet_lab.training import together
from gatelet_lab.training.fit import Stopped, fit
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe
from gatelet_lab.training.vae import Settings, VAEJob, VAETrainer
from gatelet_lab.training.world import ALONE, WholeNoise
from machines_page import command

SMALL = {"epochs": 1, "experts": 40, "bottleneck": 8, "batch": 122}  # does not divide by 4, nor the digits by it
SINGLE = "in single precision"
CASES = {
    "score function": recipe("score_function", "quick").but(**SMALL, momentum=0.5),
    SINGLE: recipe("straight_through", "quick").but(**SMALL),
    "straight-through": recipe("straight_through", "quick").but(**SMALL, input_noise=0.1, hidden_dropout=0.2),
    "smooth times stochastic": recipe("smooth_times_stochastic", "quick").but(**SMALL, members=2, average=0.9),
    "rectifier": recipe("noisy_rectifier", "quick").but(**SMALL, layers=2),
    "best": recipe("best", "best").but(
        **SMALL, teacher_share=0.0, mixup_share=0.0, more_training=0, adversarial_share=0.3, bfloat16=False
    ),
    "two stages": recipe("straight_through", "quick").but(**SMALL, gater="two_stage", gater_groups=8, gate_bias=None),
    "mixture": recipe("sigmoid", "quick").but(**SMALL, kind="mixture", group_size=4, target_rate=0.3),
    "early stopping": recipe("sigmoid", "quick").but(**SMALL | {"epochs": 4}, patience=1, rate=0.0),
}


SHARES = ("gater", "experts", "output")  # multiply-adds, which follow from the shares of open gates
RESULTS = ("straight-through", "two stages")  # sampled tests of others cost and show no more


@contextmanager
def double(split):
    """Train in double precision: in single precision a draw may lie within rounding of its gate's probability."""
    torch.set_default_dtype(torch.float64)
    images = ("train_images", "valid_images", "test_images")
    try:
        yield replace(split, **{part: getattr(split, part).double() for part in images})
    finally:
        torch.set_default_dtype(torch.float32)


def trained(name, world, split):
    """Every number that a training shows, and its weights."""
    with nullcontext(split) if name == SINGLE else double(split) as split:
        return trained_on(name, world, split)


def trained_on(name, world, split):
    trainer = PaperTrainer(CASES[name], 0, split, world=world)
    fit(trainer, None)
    result = {}
    if name in RESULTS:
        told = trainer.result()
        result = {key: each for key, each in told.items() if isinstance(each, float) and "seconds" not in key}
        result |= told["multiply_adds"]
    return rows_of(trainer) | result, {key: each.clone() for key, each in trainer.model.state_dict().items()}


def rows_of(trainer):
    rows = enumerate(asdict(row) for row in trainer.history)
    return {f"{key} {at}": value for at, row in rows for key, value in row.items() if key != "seconds"}


def vae(world, split):
    job = VAEJob("score_function", samples=2, seed=0)
    settings = Settings(latents=10, layers=2, steps=10, batch=22, every=10, draws=4)
    with double(split) as split:
        trainer = VAETrainer(settings, job, split, world)
        fit(trainer, None)
        return rows_of(trainer), {key: each.clone() for key, each in trainer.model.state_dict().items()}


LONG = recipe("score_function", "quick").but(**SMALL | {"epochs": 3})


def interrupted(world, split, path):
    """Train two epochs; the checkpoint is that of the second."""

    def stop(row):
        if row.epoch == 1:
            raise Stopped

    with suppress(Stopped):
        fit(PaperTrainer(LONG, 0, split, world=world), path, stop)


def continued(world, split, path):
    trainer = PaperTrainer(LONG, 0, split, world=world)
    fit(trainer, path)
    return [value for row in trainer.history for key, value in asdict(row).items() if key != "seconds"]


def child(rank, size, port, folder):
    """What each process runs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    split = data.load("digits")
    with together.join("cpu") as world:
        found = {name: trained(name, world, split) for name in CASES} | {"vae": vae(world, split)}
        path = folder / "half.pt"
        if size == 2:
            interrupted(world, split, path)
        else:
            found["continued"] = continued(world, split, path)
    torch.save(found, folder / f"{size}-{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    context = get_context("forkserver")
    context.set_forkserver_preload(["gatelet_lab.training.together", "torch.distributed.tensor"])  # once for all
    for size in (2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=child, args=(rank, size, port, folder)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * size
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (2, 4)}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("name", [*CASES, "vae"])
def test_losses_of_one_two_and_four_processes_agree(ran, digits, name):
    told, weights = vae(ALONE, digits) if name == "vae" else trained(name, ALONE, digits)
    for size, processes in ran.items():
        for rank, found in enumerate(processes):
            numbers, state = found[name]
            assert numbers.keys() == told.keys()
            for key, value in told.items():
                near = 1e-5 if name == SINGLE else 1e-9
                if "open" in key or key in SHARES:  # shares are means in single precision
                    near = 1e-3 if name == SINGLE else 1e-6
                if "error" in key and name == SINGLE:
                    near = 0.6  # an image or two may be right in one of them
                assert numbers[key] == pytest.approx(value, rel=near, abs=near, nan_ok=True), (size, rank, key)
            near = {"rtol": 1e-3, "atol": 1e-5} if name == SINGLE else {"rtol": 1e-7, "atol": 1e-9}
            for key, value in weights.items():
                torch.testing.assert_close(
                    state[key], value, **near, equal_nan=True, msg=lambda text, at=key: f"{at}: {text}"
                )


def test_early_stopping_came_early(ran):
    rows, _ = ran[4][0]["early stopping"]
    assert len(rows) == 2 * 5  # an epoch that is best, and one that is not


def test_a_checkpoint_of_two_processes_goes_on_in_four(ran, digits, tmp_path):
    whole = PaperTrainer(LONG, 0, digits)
    fit(whole, None)
    wanted = [value for row in whole.history for key, value in asdict(row).items() if key != "seconds"]
    for found in ran[4]:
        assert found["continued"] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def draw(logits):
    torch.manual_seed(0)
    gates = gatelet.estimators.ALL["straight_through"]()
    return torch.cat(
        [
            gates.draw_noise(logits.unsqueeze(0), None).squeeze(0),
            torch.randn_like(logits),
            F.dropout(torch.ones_like(logits), 0.4, True),
            torch.rand(3 * len(logits), 4).view(3, -1, 4).sum(0),
        ],
        dim=1,
    )


def test_noise_is_that_of_the_whole_batch():
    whole = draw(torch.zeros(8, 4))
    for rows in (slice(0, 3), slice(3, 8), slice(8, 8)):
        with WholeNoise(rows, 8):
            torch.testing.assert_close(draw(torch.zeros(rows.stop - rows.start, 4)), whole[rows], rtol=0, atol=0)


def test_noise_that_other_rows_decide_is_refused():
    with WholeNoise(slice(0, 2), 8), pytest.raises(RuntimeError, match="other processes' rows"):
        torch.bernoulli(torch.full((2, 4), 0.5))
    with WholeNoise(slice(0, 2), 8), pytest.raises(RuntimeError, match=r"draws \[3, 4\]"):
        torch.rand(3, 4)


def test_parts_of_a_batch_are_all_of_it():
    for size in (1, 2, 3, 4):
        worlds = [type(ALONE)(rank, size) for rank in range(size)]
        for count in (0, 1, 2, 7, 30):
            assert [i for world in worlds for i in range(count)[world.part(count)]] == list(range(count))
            first = [i for world in worlds for i in range(count)[world.part(count // 2, count)]]
            assert first == list(range(count // 2))


def test_a_killed_process_ends_all_and_one_goes_on_alone(tmp_path, monkeypatch, capsys):
    """The command of docs/machines.md, under torchrun."""
    out = tmp_path / "out"
    small = ("--dataset", "digits", "--set", "experts=40", "--set", "bottleneck=8", "--epochs", "30")
    torchrun, *words = command("torchrun --standalone --nproc-per-node 4", [("runs/four", out), ("node 4", "node 2")])
    path = str(Path(gatelet.__file__).parents[1])
    running = subprocess.Popen(
        [str(Path(sys.executable).with_name(torchrun)), *words, *small],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/*.pt")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    seconds = 0.0  # in which this process ran: the whole machine may stand still in between
    while running.poll() is None and seconds < 30:
        time.sleep(0.1)
        seconds += 0.1
    assert running.poll() is not None, "30 s after a process was killed, the others still run"
    told, _ = running.communicate(timeout=300)
    assert running.returncode != 0
    assert "gatelet: another process of this training has ended" in " ".join(told.split())
    monkeypatch.setattr(sys, "argv", ["gatelet", *words[words.index("reproduce") :], *small, "--resume"])
    cli.main()
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    assert row["epochs"] > 1
    assert "straight_through-seed0: epoch 1:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("reproduce", "--scheduler", "tcp://x:1"), "--scheduler: under torchrun"),
        (("reproduce", "--jobs", "2"), "--jobs: under torchrun"),
        (("bench", "kernels"), "this command is for one process"),
    ],
)
def test_what_torchrun_leaves_no_room_for_is_told(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(together, "join", lambda device: nullcontext(ALONE))
    out = ("--dataset", "digits", "--out", str(tmp_path / "out")) if command[0] == "reproduce" else ()
    monkeypatch.setattr(sys, "argv", ["gatelet", *command, *out])
    with pytest.raises(SystemExit):
        cli.main()
    assert words in " ".join(capsys.readouterr().err.split())
