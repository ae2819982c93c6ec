"""Fitting the gaters of a converted model to the dense model that it came from."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatelet._checks import check_count, check_positive
from gatelet.convert.block import BlockGating
from gatelet.convert.place import blocks
from gatelet.convert.progress import Progress
from gatelet.convert.student import Student, recording
from gatelet.nn.conditional_layer import masking
from gatelet.sparsity import calibrate_thresholds

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]


@dataclass
class Distillation:
    """What :func:`distil` returns; it prints as a table."""

    errors: dict[str, float] = field(default_factory=dict)
    """Block -> its held-out error: ‖FFN − teacher's‖² over the teacher's variance."""
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


def distil(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    steps: int = 1000,
    weights: bool = False,
    lr: float = 3e-3,
    weights_lr: float = 3e-4,
    held_out: int = 4,
    every: int = 100,
    patience: int = 5,
    calibration: int = 32,
    checkpoint: str | Path | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Distillation:
    """Fit a converted model's gaters (and, on request, its blocks' weights) to the dense model, then calibrate.

    Every block is fitted by itself, on the inputs x that it has in the teacher. The gater learns which units matter:
    closing unit n costs about c_n = (hidden_n · ‖W2 column n‖)² of the output; the units of highest cost should be
    open, as many as the target rate says over the batch's tokens. With t the cost at that limit, the loss is

        mean √|c_n − t| · softplus(∓ logit_n) / mean √|c − t|,

    a logistic regression in which mistakes weigh by what they cost (a middle layer of MiniLM, half open, a gater of 64:
    held-out error 0.029; 0.034 with |c_n − t| itself, 0.044 without weights, 0.012 if the gater knew). With ``weights``
    the block's W1, W2 (and W_g) and biases are trained too, so that the block gives the teacher's output through the
    gates that are open now, by ‖FFN(x) − FFN_teacher(x)‖² / variance.

    Fitting begins at the gater that least squares give for the targets sign(c − t) √|c − t|, an affine map of rank M
    (:class:`gatelet.convert.gater_regression.GaterRegression`), where that is better than the present gater.

    The first ``held_out`` batches are kept for the held-out error, which decides about early stopping and about which
    state is kept. At the end the thresholds are calibrated, on the model's own inputs to its blocks.

    Args:
        model: from :func:`gatelet.convert`; fitted in place; its mode stays as it was.
        teacher: the dense model, of the same structure and names.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        steps: the most steps; the learning rates fall to 0 along a cosine over them.
        weights: fit the blocks' weights too.
        lr, weights_lr: Adam's learning rates of gaters and of weights.
        held_out: this many of the loader's first batches are not trained on.
        every: steps between two measurements of the held-out error.
        patience: stop after this many measurements without a better one.
        calibration: this many of the loader's first batches serve to calibrate the thresholds, in a few passes.
        checkpoint: file to write the state to at every measurement, atomically, and to continue from if it exists.
        forward: runs a model on a batch; by default ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple
            or list, otherwise ``model(batch)``.
        mask: gives a batch's padding mask (true at tokens); by default its ``"attention_mask"`` if it is a mapping
            that has one. Padding is not trained on.
        progress: show phases and time left: a line on a terminal, elsewhere one every 30 seconds.

    Returns:
        held-out errors and open shares; print it.

    Raises:
        ValueError: for a model without converted blocks, a teacher that does not run a block of that name, a loader
            that is an iterator, yields nothing, too few batches, or one without a token.
        FloatingPointError: for a loss, a held-out error, or an input or output of the teacher's block that is NaN or
            infinite; the model then has the best state so far, which is also what the checkpoint holds.

    >>> import copy, torch, gatelet
    >>> teacher = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    >>> model = copy.deepcopy(teacher)
    >>> _ = gatelet.convert(model, target_rate=0.25, bottleneck=8)
    >>> found = gatelet.distil(model, teacher, torch.randn(20, 64, 16).unbind(), steps=100)
    >>> found.errors["0.gating"] < found.first_errors["0.gating"]
    True
    """
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    check_count(calibration, "calibration")
    plan = _Plan(
        steps=steps,
        weights=weights,
        lr=lr,
        weights_lr=weights_lr,
        held_out=held_out,
        every=every,
        patience=patience,
    )
    run, masked = forward or _default_forward, mask or _default_mask
    students = [Student(name, owner, gating, teacher) for name, (owner, gating) in _blocks(model).items()]
    modes = [(module, module.training) for each in (model, teacher) for module in each.modules()]
    shown, begin = Progress(progress), time.perf_counter()
    try:
        model.eval()
        teacher.eval()
        batches = _Batches(teacher, students, loader, run, masked)
        found = _Fit(students, batches, plan, None if checkpoint is None else Path(checkpoint), shown).run()
        found.open_share = _calibrate(model, students, list(_first(loader, calibration)), run, masked, shown)
    finally:
        for module, mode in modes:
            module.training = mode
    found.seconds = time.perf_counter() - begin
    return found


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The options of :func:`distil`."""

    steps: int
    weights: bool
    lr: float
    weights_lr: float
    held_out: int
    every: int
    patience: int

    def __post_init__(self) -> None:
        for name in ("steps", "held_out", "every", "patience"):
            check_count(getattr(self, name), name)
        check_positive(self.lr, "lr")
        check_positive(self.weights_lr, "weights_lr")


def _blocks(model: nn.Module) -> dict[str, tuple[nn.Module, BlockGating]]:
    found = blocks(model)
    if not found:
        raise ValueError("model: holds no converted block; call gatelet.convert(model) first")
    return found


def _default_forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _default_mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


class _Batches:
    """The loader's batches as the teacher's blocks see them."""

    def __init__(
        self, teacher: nn.Module, students: list[Student], loader: Iterable[Any], run: Forward, mask: Mask
    ) -> None:
        self.teacher, self.students, self.loader, self.run, self.mask = teacher, students, loader, run, mask

    def examples(self, batch: Any) -> Iterator[tuple[Student, Tensor, Tensor]]:
        """Yield each student with its twin's inputs and outputs on this batch."""
        with torch.no_grad(), recording(self.students):
            self.run(self.teacher, batch)
        for student in self.students:
            yield (student, *student.examples(self.mask(batch)))

    def held_out_errors(self, count: int) -> dict[str, float]:
        """Return each student's error on the loader's first batches."""
        sums = dict.fromkeys((student.name for student in self.students), 0.0)
        batches = 0
        for batch in _first(self.loader, count):
            batches += 1
            for student, x, y in self.examples(batch):
                with torch.no_grad():
                    found = student.losses(x, y, gater=False, error=True, weights=False)
                sums[student.name] += found["error"].item()
        if not batches:
            raise ValueError("loader: yielded no batch")
        for name, value in sums.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the held-out error of {name} is {value}")
        return {name: value / batches for name, value in sums.items()}


class _Fit:
    """Steps towards the teacher, with measurements of the held-out error, early stopping and checkpoints."""

    def __init__(
        self, students: list[Student], batches: _Batches, plan: _Plan, checkpoint: Path | None, progress: Progress
    ) -> None:
        self.students, self.batches, self.plan = students, batches, plan
        self.checkpoint, self.progress = checkpoint, progress
        gaters = [p for student in students for p in student.gater()]
        others = [p for student in students for p in student.weights()] if plan.weights else []
        self.trained = gaters + others
        groups = [{"params": gaters, "lr": plan.lr}, {"params": others, "lr": plan.weights_lr}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]] or groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * min(1, t / plan.steps)))
        )
        self.found = Distillation(why_stopped="all steps done")
        self.step, self.looks = 0, 0
        self.best: list[Tensor] = []

    def run(self) -> Distillation:
        """Return the errors; the model is then at its best state."""
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
                f"distil: {error} at step {self.step + 1}; the model is back at its best state"
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
        """Start at what least squares give, or where a checkpoint stopped."""
        self.found.first_errors = self.found.errors = self.batches.held_out_errors(self.plan.held_out)
        resumed = self.checkpoint is not None and self.checkpoint.exists()
        if not resumed:
            self.found.errors = self._begin_gaters()
        self.best = self._state()
        if resumed:
            self._resume()

    def _steps(self) -> None:
        plan, batches = self.plan, _endless(self.batches.loader, self.plan.held_out)
        if not self.trained:
            self.found.why_stopped = "no steps: these gates have no weights"
            return
        self.progress.start("distil", plan.steps)
        loss = math.nan
        while self.step < plan.steps and self.looks < plan.patience:
            loss = self._one_step(next(batches))
            self.step += 1
            self.progress.step(self.step, f"loss {loss:.4f}")
            if self.step % plan.every == 0 or self.step == plan.steps:
                self._look()
        self.progress.end(self.step, f"loss {loss:.4f}")

    def _one_step(self, batch: Any) -> float:
        """Return the mean loss of the blocks."""
        total, weights = 0.0, self.plan.weights
        for student, x, y in self.batches.examples(batch):
            terms = student.losses(x, y, gater=bool(student.gater()), error=weights, weights=weights)
            loss = torch.stack(list(terms.values())).sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"the loss of {student.name} is {loss.item()}")
            loss.backward()
            total += loss.item() / len(self.students)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def _look(self) -> None:
        """Keep the state if it is the best so far, and write the checkpoint."""
        errors = self.batches.held_out_errors(self.plan.held_out)
        self.looks += 1
        if sum(errors.values()) < sum(self.found.errors.values()):
            self.best, self.found.errors, self.looks = self._state(), errors, 0
        if self.checkpoint is not None:
            saved: dict[str, Any] = {"step": self.step, "steps": self.plan.steps, "looks": self.looks}
            saved |= {"now": self._state(), "best": self.best}
            saved |= {"errors": self.found.errors, "first_errors": self.found.first_errors}
            saved |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
            write_atomically(saved, self.checkpoint)

    def _resume(self) -> None:
        assert self.checkpoint is not None
        saved = torch.load(self.checkpoint, map_location=self.trained[0].device)
        shapes = [tuple(p.shape) for p in self.trained]
        if [tuple(p.shape) for p in saved["best"]] != shapes or saved["steps"] != self.plan.steps:
            raise ValueError(f"checkpoint: {self.checkpoint} is of another model or of other options; remove it")
        self._load(saved["now"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step, self.looks, self.best = saved["step"], saved["looks"], saved["best"]
        self.found.errors, self.found.first_errors = saved["errors"], saved["first_errors"]

    def _begin_gaters(self) -> dict[str, float]:
        """Start each gater at its regression, if that is better than its present state; return the errors then."""
        first, held_out = self.found.first_errors, self.plan.held_out
        beginnings = {student: student.beginning() for student in self.students}
        fits = {student: fit for student, fit in beginnings.items() if fit is not None}
        if not fits:
            return dict(first)
        for batch in self.progress.phase("begin", _but_first(self.batches.loader, held_out)):
            for student, x, _ in self.batches.examples(batch):
                if student in fits:
                    student.add_to(fits[student], x)
            if all(fit.enough for fit in fits.values()):
                break
        written = [(student, fit) for student, fit in fits.items() if fit.write()]
        errors = self.batches.held_out_errors(held_out)
        for student, fit in written:
            if not errors[student.name] < first[student.name]:
                fit.undo()
        return {name: min(error, first[name]) for name, error in errors.items()}

    def _state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    def _load(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.trained, values, strict=True):
                p.copy_(value)


def _calibrate(
    model: nn.Module, students: list[Student], loader: list[Any], run: Forward, mask: Mask, progress: Progress
) -> dict[str, float]:
    """Calibrate on the student's own inputs, then count what is open, for :func:`gatelet.report`."""

    def masked(module: nn.Module, batch: Any) -> Any:
        with masking(module, mask(batch)):
            return run(module, batch)

    shares = {}
    if any(student.gating.unit.target_rate is not None for student in students):
        calibrate_thresholds(model, _Shown(loader, progress), forward=masked)
    for student in students:
        student.gating.reset_statistics()
    with torch.no_grad():
        for batch in progress.phase("count open gates", loader):
            masked(model, batch)
    for student in students:
        gating = student.gating
        shares[student.name] = float(gating.opened.sum()) / max(1, int(gating.tokens) * gating.opened.numel())
    return shares


class _Shown:
    """A list of batches whose passes are shown."""

    def __init__(self, loader: list[Any], progress: Progress) -> None:
        self.loader, self.progress = loader, progress

    def __iter__(self) -> Iterator[Any]:
        return self.progress.phase("calibrate", self.loader)


def _first(loader: Iterable[Any], count: int) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index == count:
            return
        yield batch


def _but_first(loader: Iterable[Any], count: int) -> Iterator[Any]:
    return (batch for index, batch in enumerate(loader) if index >= count)


def _endless(loader: Iterable[Any], skip: int) -> Iterator[Any]:
    """Yield the loader's batches again and again, without the first ``skip``."""
    while True:
        any_left = False
        for batch in _but_first(loader, skip):
            any_left = True
            yield batch
        if not any_left:
            raise ValueError(f"loader: must yield more than the {skip} batches that are held out")


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
