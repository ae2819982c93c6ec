"""Training a sparse autoencoder on cached activations, resumable, in one process or several."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gatelet import RowAdam
from gatelet.nn import SparseAutoencoder
from gatelet_lab.files import CheckpointError, read_tensors, write_atomically
from gatelet_lab.sae.activations import Cache

if TYPE_CHECKING:
    from gatelet_lab.sae.command import TrainSAE

VERSION = 1
SAMPLE = 20_000
"""Activations that scale, mean and thresholds start from."""
COOL = 0.2
"""The last share of the steps, over which the learning rate falls to zero."""


@dataclass
class Row:
    """What the steps since the last row showed, of the batches that were trained on."""

    step: int
    tokens: int
    loss: float
    explained: float
    l0: float
    dead: int
    seconds: float


class Trainer:
    """An autoencoder and its optimiser. What a step does follows from the state and the step's number.

    Of several processes each sees its part of every batch; gradients are averaged, rows without one stay untouched.
    """

    def __init__(self, options: "TrainSAE", cache: Cache, rank: int = 0, world: int = 1) -> None:
        self.options, self.cache, self.rank, self.world = options, cache, rank, world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.sae = SparseAutoencoder(
                cache.width,
                options.latents,
                options.activation,
                options.k,
                sparsity_weight=options.sparsity,
                dead_after=options.dead_after,
                groups=options.groups,
                open_groups=options.open_groups,
                sparse_grad=True,
            )
        self.sae.start_from(cache.sample(SAMPLE))
        self.optimizer = RowAdam(self.sae.parameter_groups(options.rate))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.seconds = 0, 0.0
        self.history: list[Row] = []
        self._sums = torch.zeros(5, dtype=torch.float64)

    def batches(self) -> Iterator[Tensor]:
        """Yield this process's part of each batch, from the next step on."""
        for batch in self.cache.batches(self.options.batch, self.options.seed, self.steps):
            yield batch[self.rank :: self.world]

    def share(self) -> float:
        """Return the next step's share of the learning rate: it grows in the warm-up and falls in the last fifth."""
        total = max(1, self.options.tokens // self.options.batch)
        rise = min(1.0, (self.steps + 1) / max(1, self.options.warm_up))
        return rise * min(1.0, (total - self.steps) / max(1.0, COOL * total))

    def step(self, x: Tensor) -> None:
        """Take a step."""
        began = time.perf_counter()
        self.sae.train()
        found = self.sae.loss(x, sparsity=min(1.0, (self.steps + 1) / max(1, self.options.warm_up)))
        value = found.total.item()
        if not math.isfinite(value):
            raise RuntimeError(
                f"training diverged: the loss became {value} in step {self.steps + 1}; the last checkpoint is kept"
            )
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.share()
        self.optimizer.zero_grad()
        found.total.backward()
        self._average()
        self.optimizer.step()
        self.steps += 1
        left, spread = (x - found.output).square().sum(), (x - x.mean(0)).square().sum()
        l0 = found.code.l0.float().mean()
        self._sums += torch.stack([torch.tensor(value), left, spread, l0, torch.ones(())]).double()
        self.seconds += time.perf_counter() - began

    def _average(self) -> None:
        """Average the gradients over the processes, sparse ones as sparse ones."""
        if self.world == 1:
            return
        for parameter in self.sae.parameters():
            if parameter.grad is not None:
                grad = parameter.grad.coalesce() if parameter.grad.is_sparse else parameter.grad
                torch.distributed.all_reduce(grad)
                parameter.grad = grad.coalesce() / self.world if grad.is_sparse else grad / self.world

    def row(self) -> Row:
        """Close a row of the history and return it."""
        sums = self._sums.clone()
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        loss, left, spread, l0, count = sums.tolist()
        self._sums.zero_()
        tokens = self.steps * self.options.batch
        explained = 1 - left / max(spread, 1e-30)
        self.history.append(Row(self.steps, tokens, loss / count, explained, l0 / count, self.sae.dead, self.seconds))
        return self.history[-1]

    # ---------------------------------------------------------------- checkpoints

    def _identity(self) -> str:
        from gatelet_lab.sae.command import FREE

        told = {key: str(value) for key, value in asdict(self.options).items() if key not in FREE}
        return json.dumps({"version": VERSION, "activations": self.cache.identity, **told})

    def save(self, path: Path) -> None:
        """Write the state; a crash in the middle leaves the last good file."""
        state = {
            "identity": self._identity(),
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "history": [asdict(row) for row in self.history],
        }
        write_atomically(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same settings and activations."""
        state = read_tensors(path, "cpu")
        found = json.loads(state["identity"])
        wanted = json.loads(self._identity())
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            told = ", ".join(f"{key} was {found.get(key)!r}, is {wanted[key]!r}" for key in differing)
            raise CheckpointError(f"{path}: belongs to another run: {told}; name another --out, or remove the file")
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.history = [Row(**row) for row in state["history"]]
