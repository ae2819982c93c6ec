"""Fitting the gaters of a converted model to the dense model that it came from."""

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatelet._checks import check_count, check_positive
from gatelet.convert.block import BlockGating, affine_at
from gatelet.convert.gater_regression import GaterRegression
from gatelet.convert.swap import blocks
from gatelet.nn.conditional_ffn import hidden_layer
from gatelet.nn.gating import masking
from gatelet.sparsity import calibrate_thresholds

TOKENS = 32
"""Tokens per input feature that the regression looks at, if the loader has so many."""

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
    of unit n, closing it costs about c_n = (hidden_n · ‖W2 column n‖)² of the output; open should be the units of
    highest cost, as many as the target rate says over the batch's tokens. With t the cost at that limit, the loss is

        mean √|c_n − t| · softplus(∓ logit_n) / mean √|c − t|,

    a logistic regression in which mistakes weigh by what they cost (a middle layer of MiniLM, half open, a gater of 64:
    held-out error 0.029; 0.034 with |c_n − t| itself, 0.044 without weights, 0.012 if the gater knew). With
    ``weights`` the block's W1, W2 (and W_g) and biases learn besides to give the teacher's output through the gates
    that are open now, by
    ‖FFN(x) − FFN_teacher(x)‖² / variance.

    It begins at the gater that least squares give to the targets sign(c − t) √|c − t|, an affine map of rank M
    (:class:`gatelet.convert.gater_regression.GaterRegression`), where that is better than the gater that is there.

    The first ``held_out`` batches are kept for the held-out error, which decides about early stopping and about which
    state is kept. At the end the thresholds are calibrated, on the model's own inputs to its blocks.

    Args:
        model: from :func:`gatelet.convert`; fitted in place, left in the mode in which it was.
        teacher: the dense model, of the same structure and names.
        loader: yields batches; must allow several passes (a list or a DataLoader, no generator).
        steps: the most steps; the learning rates fall to 0 along a cosine over them.
        weights: fit the blocks' weights too.
        lr, weights_lr: Adam's learning rates of gaters and of weights.
        held_out: so many of the loader's first batches are not trained on.
        every: steps between two looks at the held-out error.
        patience: stop after so many looks without a better one.
        calibration: so many of the loader's first batches serve to calibrate the thresholds, one pass per block.
        checkpoint: file to write the state to at every look, atomically, and to continue from if it exists.
        forward: runs a model on a batch; by default ``model(**batch)`` for a mapping, ``model(batch[0])`` for a tuple
            or list, otherwise ``model(batch)``.
        mask: gives a batch's padding mask (true at tokens); by default its ``"attention_mask"`` if it is a mapping
            that has one. Padding is not trained on.
        progress: show a line of progress on the terminal (none where stderr is not one).

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
    check_count(steps, "steps")
    check_count(held_out, "held_out")
    check_count(every, "every")
    check_count(patience, "patience")
    check_count(calibration, "calibration")
    check_positive(lr, "lr")
    check_positive(weights_lr, "weights_lr")
    if isinstance(loader, Iterator):
        raise ValueError("loader: must allow several passes; give a list or a DataLoader, not a generator")
    run, masked = forward or _default_forward, mask or _default_mask
    students = [_Student(name, owner, gating, teacher) for name, (owner, gating) in _blocks(model).items()]
    modes = [(module, module.training) for each in (model, teacher) for module in each.modules()]
    begin = time.perf_counter()
    try:
        model.eval()
        teacher.eval()
        found = _fit(
            students, teacher, loader, run, masked, (steps, weights, lr, weights_lr, held_out, every, patience),
            None if checkpoint is None else Path(checkpoint), progress,
        )  # fmt: skip
        found.open_share = _calibrate(model, students, list(_first(loader, calibration)), run, masked)
    finally:
        for module, mode in modes:
            module.training = mode
    found.seconds = time.perf_counter() - begin
    return found


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


class _Student:
    """A converted block, and its dense twin in the teacher, whose inputs and outputs it records."""

    def __init__(self, name: str, owner: nn.Module, gating: BlockGating, teacher: nn.Module) -> None:
        self.name, self.owner, self.gating, self.block = name, owner, gating, gating.block
        path = name.removesuffix("gating").rstrip(".")
        if self.block.kind == "sequential":
            path = path.removesuffix(self.block.up).rstrip(".")
        try:
            twin = teacher.get_submodule(path)
            self.first = twin.get_submodule(self.block.up)
            self.last = twin.get_submodule(self.block.down)
        except AttributeError as error:
            raise ValueError(f"teacher: has no block {path or '(the model)'!r} as the model has ({error})") from error
        if blocks(twin):
            raise ValueError(f"teacher: its block {path or '(the model)'!r} is converted too; give the dense model")
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def weights(self) -> list[nn.Parameter]:
        paths = (self.block.up, self.block.down, self.block.glu)
        return [p for path in paths if path is not None for p in self.owner.get_submodule(path).parameters(False)]

    def hear(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.x = args[0].detach()

    def see(self, _: nn.Module, __: Any, out: Tensor) -> None:
        self.y = out.detach()

    def examples(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the recorded inputs (T, D) and outputs (T, O) of tokens that are not padding, and forget them."""
        if self.x is None or self.y is None:
            raise ValueError(f"teacher: did not run the block {self.name!r} when it is run on a batch")
        x, y, self.x, self.y = self.x, self.y, None, None
        if mask is not None and mask.shape == x.shape[:-1]:
            keep = mask.bool()
            x, y = x[keep], y[keep]
        else:
            x, y = (each.flatten(0, -2) if each.dim() > 1 else each[None] for each in (x, y))
        if not len(x):
            raise ValueError(f"loader: a batch holds no token for the block {self.name!r} (or padding only)")
        if not bool(torch.stack([x.sum(), y.sum()]).isfinite().all()):
            raise FloatingPointError(f"what the teacher's block of {self.name} takes or gives is not finite")
        return x, y

    @torch.no_grad()
    def margin(self, hidden: Tensor, w_down: Tensor) -> Tensor:
        """Return c − t: what closing each gate costs of the output, over the cost at the limit of what may be open."""
        gating, target = self.gating, self.gating.unit.target_rate
        cost: Tensor = (hidden * w_down.norm(dim=0)).square()
        if gating.group_size > 1:
            cost = cost.unflatten(-1, (-1, gating.group_size)).sum(-1)
        return cost - _top(cost, 0.5 if target is None else target)

    def add_to(self, regression: GaterRegression, x: Tensor) -> None:
        """Give the regression these inputs, and as targets of the logits sign(c − t) √|c − t|."""
        up, down = affine_at(self.owner, self.block.up), affine_at(self.owner, self.block.down)
        glu = None if self.block.glu is None else affine_at(self.owner, self.block.glu)
        with torch.no_grad():
            margin = self.margin(hidden_layer(x, self.block.activation, up, glu), down.weight)
        regression.add(x, margin.sign() * margin.abs().sqrt())

    def losses(self, x: Tensor, y: Tensor, *, gater: bool, error: bool, weights: bool) -> dict[str, Tensor]:
        """Return the gater's loss and the block's normalised error with the gates that it opens now, as asked for."""
        gating, found = self.gating, {}
        up, down = affine_at(self.owner, self.block.up), affine_at(self.owner, self.block.down)
        glu = None if self.block.glu is None else affine_at(self.owner, self.block.glu)
        target = gating.unit.target_rate
        with torch.set_grad_enabled(gater and torch.is_grad_enabled()):
            logits = gating.gater(x)
            for controller in gating.sparsity:
                logits = controller.shift(logits)  # type: ignore[operator]
        with torch.set_grad_enabled(weights and torch.is_grad_enabled()):
            hidden = hidden_layer(x, self.block.activation, up, glu)
        if gater:
            margin = self.margin(hidden, down.weight)
            stake = margin.abs().sqrt()
            loss = (stake * F.softplus(-logits * margin.sign())).mean()
            found["gater"] = loss / stake.mean().clamp_min(torch.finfo(x.dtype).tiny)
        if error:
            gates = (logits > (0.0 if target is None else _top(logits, target))).to(x.dtype)
            if gating.group_size > 1:
                gates = gates.repeat_interleave(gating.group_size, dim=-1)
            with torch.set_grad_enabled(weights and torch.is_grad_enabled()):
                have = F.linear(hidden * gates, down.weight, down.bias)
                variance = y.var(0, correction=0).mean().clamp_min(torch.finfo(x.dtype).tiny)
                found["error"] = (have - y).square().mean() / variance
        return found


def _top(values: Tensor, share: float) -> Tensor:
    """Return the value above which this share of the values lies, from a sample of them."""
    # An odd step does not keep to the same few units.
    flat = values.detach().flatten()[:: max(1, values.numel() >> 16) | 1]
    return flat.kthvalue(min(flat.numel(), max(1, round((1 - share) * flat.numel())))).values


@contextlib.contextmanager
def _recording(students: list[_Student]) -> Iterator[None]:
    hooks = [student.first.register_forward_pre_hook(student.hear) for student in students]
    hooks += [student.last.register_forward_hook(student.see) for student in students]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fit(
    students: list[_Student],
    teacher: nn.Module,
    loader: Iterable[Any],
    run: Forward,
    mask: Mask,
    options: tuple[int, bool, float, float, int, int, int],
    checkpoint: Path | None,
    progress: bool,
) -> Distillation:
    steps, weights, lr, weights_lr, held_out, every, patience = options
    gaters = [p for student in students for p in student.gating.gater.parameters()]
    others = [p for student in students for p in student.weights()] if weights else []
    trained = gaters + others
    flags = [(p, p.requires_grad) for p in trained]
    groups = [{"params": gaters, "lr": lr}] + ([{"params": others, "lr": weights_lr}] if weights else [])
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * min(1, t / steps)))
    )
    found = Distillation(why_stopped="all steps done")

    def recorded(batch: Any) -> None:
        with torch.no_grad(), _recording(students):
            run(teacher, batch)

    def held_out_errors() -> dict[str, float]:
        sums = dict.fromkeys((student.name for student in students), 0.0)
        count = 0
        for batch in _first(loader, held_out):
            count += 1
            recorded(batch)
            for student in students:
                with torch.no_grad():
                    found = student.losses(*student.examples(mask(batch)), gater=False, error=True, weights=False)
                sums[student.name] += found["error"].item()
        if not count:
            raise ValueError("loader: yielded no batch")
        for name, value in sums.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the held-out error of {name} is {value}")
        return {name: value / count for name, value in sums.items()}

    def state() -> list[Tensor]:
        return [p.detach().clone() for p in trained]

    def load(values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(trained, values, strict=True):
                p.copy_(value)

    def begin_by_regression() -> dict[str, float]:
        """Start each gater from least squares where that is better than what it is, and return the errors then."""
        fits = [GaterRegression(student.gating.gater) for student in students]
        enough = [TOKENS * student.gating.gater.hidden.in_features for student in students]
        for index, batch in enumerate(loader):
            if index >= held_out:
                recorded(batch)
                for student, fit in zip(students, fits, strict=True):
                    student.add_to(fit, student.examples(mask(batch))[0])
            if all(fit.count >= count for fit, count in zip(fits, enough, strict=True)):
                break
        before = state()
        written = [fit.write() for fit in fits]
        errors = held_out_errors()
        better = {
            id(p)
            for student, done in zip(students, written, strict=True)
            if done and errors[student.name] < found.first_errors[student.name]
            for p in student.gating.gater.parameters()
        }
        load([p.detach().clone() if id(p) in better else old for p, old in zip(trained, before, strict=True)])
        return {name: min(error, found.first_errors[name]) for name, error in errors.items()}

    step, looks = 0, 0
    found.first_errors = found.errors = held_out_errors()
    resumed = checkpoint is not None and checkpoint.exists()
    if not resumed:
        found.errors = begin_by_regression()
    best = (sum(found.errors.values()), state(), found.errors)
    if checkpoint is not None and resumed:
        saved = torch.load(checkpoint, map_location=gaters[0].device)
        shapes = [tuple(p.shape) for p in trained]
        if [tuple(p.shape) for p in saved["best"]] != shapes or saved["steps"] != steps:
            raise ValueError(f"checkpoint: {checkpoint} is of another model or of other options; remove it")
        load(saved["now"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        step, looks, found.first_errors = saved["step"], saved["looks"], saved["first_errors"]
        best = (sum(saved["errors"].values()), saved["best"], saved["errors"])
    shown = _Progress(steps, progress)
    try:
        for p in trained:
            p.requires_grad_(True)
        batches = _endless(loader, held_out)
        while step < steps and looks < patience:
            batch = next(batches)
            recorded(batch)
            total = 0.0
            for student in students:
                terms = student.losses(*student.examples(mask(batch)), gater=True, error=weights, weights=weights)
                loss = torch.stack(list(terms.values())).sum()
                if not bool(loss.isfinite()):
                    raise FloatingPointError(f"the loss of {student.name} is {loss.item()}")
                loss.backward()
                total += loss.item() / len(students)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            shown(step, f"loss {total:.4f}")
            if step % every == 0 or step == steps:
                errors = held_out_errors()
                looks += 1
                if sum(errors.values()) < best[0]:
                    best, looks = (sum(errors.values()), state(), errors), 0
                if checkpoint is not None:
                    saved = {"step": step, "steps": steps, "looks": looks, "now": state(), "best": best[1]}
                    saved |= {"errors": best[2], "first_errors": found.first_errors}
                    saved |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
                    _write(saved, checkpoint)
    except FloatingPointError as error:
        load(best[1])
        kept = "" if checkpoint is None or not checkpoint.exists() else f", which {checkpoint} holds"
        raise FloatingPointError(
            f"distil: {error} at step {step + 1}; the model is back at its best state{kept}"
        ) from None
    finally:
        shown.close()
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
    load(best[1])
    found.errors, found.steps = best[2], step
    if looks >= patience:
        found.why_stopped = f"no better for {looks} looks"
    return found


def _calibrate(
    model: nn.Module, students: list[_Student], loader: Iterable[Any], run: Forward, mask: Mask
) -> dict[str, float]:
    """Calibrate on the student's own inputs, then count what is open, for :func:`gatelet.report`."""

    def masked(module: nn.Module, batch: Any) -> Any:
        with masking(module, mask(batch)):
            return run(module, batch)

    shares = {}
    if any(student.gating.unit.target_rate is not None for student in students):
        calibrate_thresholds(model, loader, forward=masked)
    for student in students:
        student.gating.reset_statistics()
    with torch.no_grad():
        for batch in loader:
            masked(model, batch)
    for student in students:
        gating = student.gating
        shares[student.name] = float(gating.opened.sum()) / max(1, int(gating.tokens) * gating.opened.numel())
    return shares


def _first(loader: Iterable[Any], count: int) -> Iterator[Any]:
    for index, batch in enumerate(loader):
        if index == count:
            return
        yield batch


def _endless(loader: Iterable[Any], skip: int) -> Iterator[Any]:
    """Yield the loader's batches again and again, without the first ``skip``."""
    while True:
        any_left = False
        for index, batch in enumerate(loader):
            if index >= skip:
                any_left = True
                yield batch
        if not any_left:
            raise ValueError(f"loader: must yield more than the {skip} batches that are held out")


def _write(saved: Any, path: Path) -> None:
    """Write a checkpoint so that a reader never sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(saved, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class _Progress:
    """A line on the terminal."""

    def __init__(self, steps: int, on: bool) -> None:
        self.steps, self.on, self.last = steps, on and sys.stderr.isatty(), 0.0
        self.begin = time.perf_counter()

    def __call__(self, step: int, what: str) -> None:
        now = time.perf_counter()
        if self.on and now - self.last > 0.2:
            left = (now - self.begin) / step * (self.steps - step)
            print(f"\rdistil {step}/{self.steps}  {what}  {left:.0f} s left ", end="", file=sys.stderr, flush=True)
            self.last = now

    def close(self) -> None:
        if self.on:
            print(file=sys.stderr)
