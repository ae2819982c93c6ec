"""Checkpoints and results: whole, of the same data, found to be damaged, written by two at once."""

import gzip
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from gatelet_lab import data, files
from gatelet_lab.data.idx import NAMES
from gatelet_lab.training import jobs
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe
from gatelet_lab.training.settings import override


def trainer(split):
    return PaperTrainer(
        override(recipe("straight_through", "quick"), ["experts=20", "bottleneck=4", "epochs=1"]), 0, split
    )


def test_another_data_set_of_the_same_sizes_is_another(tmp_path):
    split = data.load("digits")
    trainer(split).save(tmp_path / "run.pt")
    trainer(data.load("digits")).load(tmp_path / "run.pt")
    other = replace(split, train_images=split.train_images.flip(0))
    with pytest.raises(files.CheckpointError, match=r"belongs to another run: content was '\w+', is '\w+'"):
        trainer(other).load(tmp_path / "run.pt")


def test_a_flipped_bit_is_found(tmp_path):
    made, path = trainer(data.load("digits")), tmp_path / "run.pt"
    made.save(path)
    whole = path.read_bytes()
    found = 0
    for place in range(200, len(whole) - 200, len(whole) // 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            made.load(path)
        except files.CheckpointError as error:
            assert str(path) in str(error)  # noqa: PT017  (padding between records may hold anything)
            found += 1
    assert found >= 10
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(files.CheckpointError, match="damaged, or no checkpoint"):
        made.load(path)


def test_two_writers_of_one_file(tmp_path):
    path, failed = tmp_path / "shared.json", []

    def write(number):
        for _ in range(100):
            files.write_json(path, {"values": [number] * 500})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    files.write_json(path, {"values": [0] * 500})
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        values = json.loads(path.read_text())["values"]
        if len(set(values)) != 1 or len(values) != 500:
            failed.append(values)
    assert not failed
    assert [each.name for each in tmp_path.iterdir()] == ["shared.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk to write to")
def test_a_full_disk(tmp_path):
    path = tmp_path / "run.pt"
    files.write_json(path, {})

    def write(file):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(OSError, match=r"No space left on device; .*was not written, the last good file"):
        files.write_atomically(path, write)
    with pytest.raises(OSError, match="there was none before"):
        files.write_atomically(tmp_path / "new.pt", write)
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"', "{", "{}", '{"config": 1}'])
def test_result_files_of_another_kind(tmp_path, text):
    job = jobs.Job(recipe("straight_through", "quick"), 0)
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / f"{job.name}.json"
    path.write_text(text)
    with pytest.raises(files.CheckpointError, match=str(path)):
        jobs.read_result(tmp_path, job)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    head = (0x0803).to_bytes(4, "big") + np.array([2, 4, 4], ">u4").tobytes()
    for stem, name in NAMES.items():
        whole = head + bytes(32) if "images" in stem else (0x0801).to_bytes(4, "big") + np.array([2], ">u4").tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(whole + bytes(100_000_000)))
    with pytest.raises(data.DataError, match="too long: 49 bytes, its header promises 48"):
        data.load(tmp_path)


def test_a_terminal_that_shows_ascii_only_and_a_path_with_brackets(tmp_path):
    out = tmp_path / "h" / "[" / "b]"
    command = [
        "reproduce",
        "--dataset",
        "digits",
        "--rows",
        "rectifier",
        "--epochs",
        "1",
        "--jobs",
        "1",
        "--set",
        "bottleneck=4",
    ]
    command += ["--out", str(out)]
    code = f"import sys; sys.argv[1:] = {command!r}\n"
    code += "if __name__ == '__main__':\n    from gatelet_lab.cli import main\n    main()"
    (tmp_path / "run.py").write_text(code)
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, str(tmp_path / "run.py")], capture_output=True, env=env, timeout=300)
    assert found.returncode == 0, found.stderr.decode()[-1500:]
    assert b"/[/b]" in found.stdout.replace(b"\n", b"")
    torch.testing.assert_close(1, 1)
