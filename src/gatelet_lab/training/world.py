"""The processes of one training: each takes its part of every batch, and the numbers are those of one process."""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class World:
    """Which of how many processes this one is. A single process sends nothing and computes as usual."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, kind: str) -> str:
        """Return this process's own device of a kind."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and kind == "cuda" else kind

    # ---------------------------------------------------------------- batches

    def part(self, count: int, among: int | None = None) -> slice:
        """Return which rows are this process's: of a batch of ``among`` rows, as far as they are its first ``count``.

        The first processes have one more where the size does not divide.
        """
        each, left = divmod(count if among is None else among, self.size)
        start = self.rank * each + min(self.rank, left)
        stop = start + each + (self.rank < left)
        return slice(min(start, count), min(stop, count))

    def mean(self, values: Tensor, count: int) -> Tensor:
        """Return this process's part of a batch's mean loss; the processes' mean is the mean over all ``count``."""
        return values.mean() if self.size == 1 else values.sum() * (self.size / count)

    def noise(self, rows: slice, count: int) -> AbstractContextManager[object]:
        """Inside the block, draw for these rows what one process would draw when it draws for all ``count`` rows."""
        return nullcontext() if self.size == 1 else WholeNoise(rows, count)

    # ---------------------------------------------------------------- messages

    def sums(self, *values: float) -> list[float]:
        """Return the sums of numbers over the processes."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(summed)
        return summed.tolist()

    def from_first(self, value: Any) -> Any:
        """Return what the first process has."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients over the processes: dense ones in one message, sparse ones as sparse ones."""
        if self.size == 1:
            return
        dense = []
        for each in parameters:
            if each.grad is not None and each.grad.is_sparse:
                grad = each.grad.coalesce()
                dist.all_reduce(grad)
                each.grad = grad.coalesce() / self.size
            elif each.grad is not None:
                dense.append(each.grad)
        if dense:
            flat = torch.cat([each.flatten() for each in dense])
            dist.all_reduce(flat)
            for each, mean in zip(dense, (flat / self.size).split([each.numel() for each in dense]), strict=True):
                each.copy_(mean.view_as(each))


ALONE = World()


SHAPED = {
    *("aten::rand", "aten::rand.generator", "aten::rand_like", "aten::uniform_", "aten::exponential_"),
    *("aten::randn", "aten::randn.generator", "aten::randn_like", "aten::normal_"),
    *("aten::bernoulli_.float", "aten::native_dropout"),
}
"""The random operators that use the shape of a tensor and not its numbers."""


class WholeNoise(TorchDispatchMode):
    """Inside the block every random tensor (..., rows, N) consists of these rows of one drawn for the whole batch.

    All processes draw for the whole batch, from generators in the same state, and keep their rows. So a training has
    the same noise as in one process, and any number of processes can continue it. The price: each draws all noise.
    Replicas, (K·rows, N) one after the other, are recognised by their number of rows.
    """

    def __init__(self, rows: slice, count: int) -> None:
        super().__init__()
        self.rows, self.own, self.count = rows, rows.stop - rows.start, count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Enlarge a random operator's arguments to the whole batch, and return this process's rows of the result."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func.name() not in SHAPED:
            raise RuntimeError(f"{func}: draws what depends on other processes' rows")
        found = func(*(self._widened(func, each) for each in args), **kwargs)
        if isinstance(found, tuple):  # dropout as one operator: its output follows from its mask
            mask = self._narrowed(found[1])
            return args[0] * mask / (1 - args[1]), mask
        return args[0].copy_(self._narrowed(found)) if func._schema.is_mutable else self._narrowed(found)

    def _widened(self, func: Any, given: Any) -> Any:
        if not isinstance(given, Tensor | list | tuple):
            return given
        size = list(given.shape if isinstance(given, Tensor) else given)
        if len(size) < 2 or size[-2] % max(1, self.own):
            raise RuntimeError(f"{func}: draws {size}; its last dimension but one must be the batch of {self.own} rows")
        size[-2] = self.count * (size[-2] // self.own if self.own else 1)
        return given.new_empty(size) if isinstance(given, Tensor) else size

    def _narrowed(self, whole: Tensor) -> Tensor:
        replicas = whole.unflatten(-2, (-1, self.count))
        own: Tensor = replicas[..., self.rows, :].flatten(-3, -2)
        return own.contiguous()
