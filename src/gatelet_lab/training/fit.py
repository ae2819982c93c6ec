"""The one training loop: steps, a row that reports them, a checkpoint. A resumed run gives exactly the same numbers."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gatelet_lab.files import CheckpointError, read_tensors, write_atomically
from gatelet_lab.training.world import ALONE, World

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Batch = TypeVar("Batch")
Row = TypeVar("Row", bound="DataclassInstance")


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop; it resumes from its last checkpoint."""


def fit(
    trainer: "Trainer[Batch, Row]",
    checkpoint: Path | None,
    show: Callable[[Row], object] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train to the end, from the checkpoint on if there is one.

    Args:
        trainer: what is trained; see :class:`Trainer`.
        checkpoint: file to which the state is written after every row; None: no file.
        show: called with each row, also those of the checkpoint; an exception in it ends the training.
        stop: asked before every step.

    Raises:
        Stopped: when ``stop`` says so.
        FloatingPointError: for a loss that is not finite; the last checkpoint is kept.
        CheckpointError: for a checkpoint that cannot be read or belongs to another run.
    """
    if trainer.world.from_first(checkpoint is not None and checkpoint.is_file()):
        assert checkpoint is not None
        trainer.load(checkpoint)
        for row in trainer.history:
            show(row)
    while not trainer.finished:
        row = trainer.advance(stop)
        if checkpoint is not None and trainer.world.first:
            trainer.save(checkpoint)
        show(row)


class Trainer(ABC, Generic[Batch, Row]):
    """What :func:`fit` trains: a state, and the steps that change it.

    The state after a row decides all later steps, so that a resumed run gives the numbers of an uninterrupted one. With
    several processes each sees its part of every batch, and gradients are averaged. The noise is that of one process,
    so that a checkpoint can be continued by any number of them.
    """

    row_type: ClassVar[Callable[..., Any]]
    """The dataclass of a row."""
    optimizer: torch.optim.Optimizer

    def __init__(self, world: World = ALONE) -> None:
        self.world = world
        self.steps, self.seconds = 0, 0.0
        self.history: list[Row] = []

    # ---------------------------------------------------------------- what a trainer defines

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether there is nothing left to do."""

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the steps up to the next row."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, with its gradient."""

    def rates(self) -> list[float]:
        """Return the next step's learning rate of each of the optimiser's groups."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def after_step(self, batch: Batch) -> None:
        """Do what follows a step."""

    @abstractmethod
    def look(self) -> Row:
        """Return the row for the steps since the last row, without changing what training depends on."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to be continued."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides optimiser, steps, seconds and history."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""

    def of_older(self, state: dict[str, Any]) -> dict[str, Any]:
        """Convert a checkpoint of an earlier version to the present form."""
        return state

    def place(self) -> str:
        """Return where training is, for an error."""
        return f"step {self.steps + 1}"

    # ---------------------------------------------------------------- the loop

    def advance(self, stop: Callable[[], bool] = lambda: False) -> Row:
        """Take the steps up to the next row, and return it."""
        began = time.perf_counter()
        for batch in self.batches():
            if stop():
                raise Stopped
            self.step(batch)
            self.seconds += time.perf_counter() - began
            began = time.perf_counter()
        self.history.append(row := self.look())
        return row

    def step(self, batch: Batch) -> None:
        """Take one step."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(), strict=True):
            group["lr"] = rate
        loss = self.loss(batch)
        (value,) = self.world.sums(loss.item())  # so that every process raises
        if not math.isfinite(value):
            raise FloatingPointError(f"training diverged: the loss became {value} in {self.place()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.world.average_gradients(each for group in self.optimizer.param_groups for each in group["params"])
        self.optimizer.step()
        self.steps += 1
        self.after_step(batch)

    # ---------------------------------------------------------------- checkpoints

    def save(self, path: Path) -> None:
        """Write the state; a crash in the middle leaves the last good file."""
        state = {
            "identity": json.dumps(self.identity()),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "history": [asdict(row) for row in self.history],
            **self.state(),
        }
        write_atomically(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same run."""
        state = self.world.from_first(read_tensors(path, "cpu") if self.world.first else None)
        wanted = json.loads(json.dumps(self.identity()))
        try:
            state = self.of_older(state)
            found = json.loads(state["identity"])
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            told = ", ".join(f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in differing)
            raise CheckpointError(f"{path}: belongs to another run: {told}; name another --out, or remove the file")
        try:
            self.restore(state)
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self.seconds = state["steps"], state["seconds"]
            self.history = [self.row_type(**row) for row in state["history"]]
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be continued ({error})") from error
