"""The processes of a test that needs two: each runs a function of the test's file, and none outlives the test."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import gatelet

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
"""Gloo looks for no other network, and two processes do not compete for the cores."""


def path_of(*folders: Path) -> str:
    """Return a PYTHONPATH with these folders, the one of this file, and gatelet's."""
    return os.pathsep.join(map(str, [*folders, Path(__file__).parent, Path(gatelet.__file__).parents[1]]))


def join(rank: int, folder: str) -> None:
    """Let this process, one of two, meet the other one."""
    where: dict[str, Any] = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **where, timeout=timedelta(seconds=60))


def leave() -> None:
    """End together: a process that leaves while the other still talks to it can end that one."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def started(
    function: Callable[[int, str], None], folder: Path, **environment: str
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start two processes that run ``function(rank, folder)``; at the end of the block kill what still runs."""
    file = Path(inspect.getfile(function))
    code = f"import {file.stem} as test; test.{function.__name__}({{}}, {str(folder)!r})"
    variables = os.environ | {"PYTHONPATH": path_of(file.parent)} | ENVIRONMENT | environment
    processes = [
        subprocess.Popen([sys.executable, "-c", code.format(rank)], env=variables, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def saved(function: Callable[[int, str], None], folder: Path, **environment: str) -> list[Any]:
    """Run the two processes to their end, and return what each saved as ``{rank}.pt`` in the folder."""
    with started(function, folder, **environment) as processes:
        errors = [process.communicate(timeout=480)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
