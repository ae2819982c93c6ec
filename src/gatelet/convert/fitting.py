"""What both ways of distilling share: steps, held-out errors, early stopping, checkpoints, calibration at the end."""

import math
import os
import pickle
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatelet._checks import check_count
from gatelet.convert.block import BlockGating
from gatelet.convert.place import blocks, holds_rows, why_no_block
from gatelet.convert.progress import Progress
from gatelet.nn.conditional_layer import masking
from gatelet.sparsity import calibrate_thresholds
from gatelet.sparsity.calibration import run_on as run_on

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]


@dataclass
class Distillation:
    """What :func:`distil` and :func:`distil_output` return; it prints as a table."""

    errors: dict[str, float] = field(default_factory=dict)
    """Block -> its held-out error: ‖FFN − teacher's‖² over the teacher's variance. Of the output: its divergence."""
    first_errors: dict[str, float] = field(default_factory=dict)
    """The same before the first step."""
    open_share: dict[str, float] = field(default_factory=dict)
    """Block -> share of open gates after calibration, on the batches of calibration."""
    steps: int = 0
    seconds: float = 0.0
    why_stopped: str = ""

    def __repr__(self) -> str:
        """Show the errors."""
        width = max([5, *map(len, self.errors)])
        lines = [f"{'block':<{width}}  error before  error now   open"]
        for name, error in self.errors.items():
            share = f"{self.open_share[name]:6.1%}" if name in self.open_share else "     –"
            lines.append(f"{name:<{width}}  {self.first_errors[name]:12.4f}  {error:9.4f}  {share}")
        return "\n".join([*lines, f"{self.steps} steps, {self.seconds:.0f} s; {self.why_stopped}"])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options that both ways have."""

    steps: int
    held_out: int
    every: int
    patience: int
    name: str = "distil"

    def __post_init__(self) -> None:
        for name in ("steps", "held_out", "every", "patience"):
            check_count(getattr(self, name), name)


def converted_blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockGating]]:
    """Return the converted blocks; raise if there is none."""
    found = blocks(model)
    if not found:
        told = why_no_block(model)
        raise ValueError(told if holds_rows(model) else f"{told}; call gatelet.convert(model) first")
    return found


def check_teacher(teacher: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Raise for a teacher that is converted, or that would be trained with the model."""
    if blocks(teacher):
        raise ValueError(f"teacher: its block {next(iter(blocks(teacher)))!r} is converted too; give the dense model")
    theirs = set(teacher.parameters())
    if any(each in theirs for each in trained):
        raise ValueError("teacher: shares weights with the model, which are to be trained; give it a deep copy of them")


def default_mask(batch: Any) -> Tensor | None:
    """Return which tokens are no padding, if the batch says so."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class Fit(ABC):
    """Steps towards the teacher, with measurements of the held-out error, early stopping and checkpoints.

    What is fitted, and to what, a subclass says.

    Args:
        groups: Adam's, each with its learning rate.
        others: tensors that belong to the state too, though no gradient changes them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        others: list[Tensor],
        loader: Iterable[Any],
        plan: Plan,
        checkpoint: str | Path | None,
        progress: Progress,
    ) -> None:
        self.loader, self.plan, self.progress = loader, plan, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():  # before the steps, not after them
            raise ValueError(f"checkpoint: there is no directory {self.checkpoint.parent}")
        self.trained = [p for group in groups for p in group["params"]]
        self.tensors = self.trained + others
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]] or groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * min(1, t / plan.steps)))
        )
        self.found = Distillation(why_stopped="all steps done")
        self.step, self.looks = 0, 0
        self.best: list[Tensor] = []

    @abstractmethod
    def errors(self) -> dict[str, float]:
        """Return the held-out errors now."""

    @abstractmethod
    def gradients(self, batch: Any) -> float:
        """Add the gradients of a batch; return its loss."""

    def begin(self) -> dict[str, float]:
        """Find a better state to begin at, where that is possible; return the held-out errors then."""
        return dict(self.found.first_errors)

    def run(self) -> Distillation:
        """Return the errors; the model is then at its best state."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.plan.name}: it trains; call it outside of torch.inference_mode()")
        with torch.enable_grad():
            return self._run()

    def _run(self) -> Distillation:
        flags = [(p, p.requires_grad) for p in self.trained]
        self._begin()
        try:
            for p in self.trained:
                p.requires_grad_(True)
            self._steps()
        except FloatingPointError as error:
            self._load(self.best)
            kept = self.checkpoint is not None and self.checkpoint.exists()
            raise FloatingPointError(
                f"{self.plan.name}: {error} at step {self.step + 1}; the model is back at its best state"
                f"{f', which {self.checkpoint} holds' if kept else ''}"
            ) from None
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
                p.grad = None
        self._load(self.best)
        self.found.steps = self.step
        if self.looks >= self.plan.patience:
            self.found.why_stopped = f"no better in {self.looks} measurements"
        return self.found

    def _begin(self) -> None:
        """Start at the beginning, or where a checkpoint stopped."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)
            return
        self.found.first_errors = self.found.errors = self.errors()
        self.found.errors = self.begin()
        self.best = self._state()

    def _steps(self) -> None:
        plan = self.plan
        batches = islice(endless(self.loader, plan.held_out), self.step, None)  # on from where a checkpoint stopped
        if not self.trained:
            self.found.why_stopped = "no steps: these gates have no weights"
            return
        self.progress.start(plan.name, plan.steps)
        loss = math.nan
        while self.step < plan.steps and self.looks < plan.patience:
            loss = self._one_step(next(batches))
            self.step += 1
            self.progress.step(self.step, f"loss {loss:.4f}")
            if self.step % plan.every == 0 or self.step == plan.steps:
                self._look()
        self.progress.end(self.step, f"loss {loss:.4f}")

    def _one_step(self, batch: Any) -> float:
        loss = self.gradients(batch)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss

    def _look(self) -> None:
        """Keep the state if it is the best so far, and write the checkpoint."""
        errors = self.errors()
        self.looks += 1
        if sum(errors.values()) < sum(self.found.errors.values()):
            self.best, self.found.errors, self.looks = self._state(), errors, 0
        if self.checkpoint is not None:
            saved: dict[str, Any] = {"step": self.step, "steps": self.plan.steps, "looks": self.looks}
            saved |= {"now": self._state(), "best": self.best}
            saved |= {"errors": self.found.errors, "first_errors": self.found.first_errors}
            saved |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
            write_atomically(saved, self.checkpoint)

    def _resume(self, path: Path) -> None:
        saved = _read(path, self.tensors[0].device)
        shapes = [tuple(tensor.shape) for tensor in self.tensors]
        if [tuple(tensor.shape) for tensor in saved["best"]] != shapes or saved["steps"] != self.plan.steps:
            raise ValueError(f"checkpoint: {path} is of another model or of other options; remove it")
        self._load(saved["now"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step, self.looks, self.best = saved["step"], saved["looks"], saved["best"]
        self.found.errors, self.found.first_errors = saved["errors"], saved["first_errors"]

    def _state(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors]

    def _load(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.tensors, values, strict=True):
                tensor.copy_(value)


def calibrate(model: nn.Module, loader: list[Any], run: Forward, mask: Mask, progress: Progress) -> dict[str, float]:
    """Calibrate on the model's own inputs to its blocks, then count what is open, for :func:`gatelet.report`."""

    def masked(module: nn.Module, batch: Any) -> Any:
        with masking(module, mask(batch)):
            return run(module, batch)

    gatings = {name: gating for name, (_, gating) in blocks(model).items()}
    if any(gating.unit.target_rate is not None for gating in gatings.values()):
        calibrate_thresholds(model, _Shown(loader, progress), forward=masked)
    for gating in gatings.values():
        gating.reset_statistics()
    with torch.no_grad():
        for batch in progress.phase("count open gates", loader):
            masked(model, batch)
    return {
        name: float(gating.opened.sum()) / max(1, int(gating.tokens) * gating.opened.numel())
        for name, gating in gatings.items()
    }


class _Shown:
    """A list of batches whose passes are shown."""

    def __init__(self, loader: list[Any], progress: Progress) -> None:
        self.loader, self.progress = loader, progress

    def __iter__(self) -> Iterator[Any]:
        return self.progress.phase("calibrate", self.loader)


@contextmanager
def in_eval(*models: nn.Module) -> Iterator[None]:
    """Let the models be in ``eval()`` inside the block; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_of(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield the loader's first batches."""
    for index, batch in enumerate(loader):
        if index == count:
            return
        yield batch


def but_first(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield all but the loader's first batches."""
    return (batch for index, batch in enumerate(loader) if index >= count)


def endless(loader: Iterable[Any], skip: int) -> Iterator[Any]:
    """Yield the loader's batches again and again, without the first ``skip``."""
    while True:
        any_left = False
        for batch in but_first(loader, skip):
            any_left = True
            yield batch
        if not any_left:
            raise ValueError(f"loader: must yield more than the {skip} batches that are held out")


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what a checkpoint holds; raise for a file that is none."""
    try:
        saved = torch.load(path, map_location=device)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read; remove it") from error
    if not isinstance(saved, dict) or not {"best", "now", "steps", "optimizer"} <= saved.keys():
        raise ValueError(f"checkpoint: {path} holds something else; name another file")
    return saved


def write_atomically(saved: Any, path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(saved, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
