"""Whether 1, 2 and 4 processes train to the same losses, and if not, at which gate they first differ.

    python benchmarks/processes.py --row straight_through --dataset digits
    python benchmarks/processes.py --row straight_through --dataset mnist              # a table of docs/machines.md
    python benchmarks/processes.py --row straight_through --dataset mnist --float64 --set rate=0.1

Every number of processes trains the same recipe for an epoch, with the same seed and the same batches. The sums over a
batch have another order in each, so numbers differ by rounding. A gate is drawn as 1[u < p] from its probability p and
a uniform number u. Where p − u is as small as the rounding, the gate may open in one run and stay closed in the other.
Printed are the epoch's mean loss; the first step with a gate that differs, with p − u of that gate in both runs; and
how much p − u of all gates differed at most in the steps before.
"""

import argparse
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatelet_lab import data
from gatelet_lab.data import Split
from gatelet_lab.training import together
from gatelet_lab.training.fit import fit
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipe import Recipe
from gatelet_lab.training.recipes import recipe
from gatelet_lab.training.settings import override
from gatelet_lab.training.world import ALONE, World

SIZE = {"epochs": 1, "experts": 400, "bottleneck": 80}


def in_float64(split: Split) -> Split:
    """Return the data set in double precision."""
    parts = ("train_images", "valid_images", "test_images")
    return replace(split, **{part: getattr(split, part).double() for part in parts})


def trained(chosen: Recipe, split: Split, world: World, precise: bool) -> tuple[float, Tensor | None]:
    """Return the mean loss of an epoch, and p − u of the gates (steps, rows, gates) of this process's examples."""
    torch.set_default_dtype(torch.float64 if precise else torch.float32)
    margins: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        logits, noise = (each.detach() for each in args)
        if module.training:
            margins.append((logits.sigmoid() - noise).flatten(0, -2))

    trainer = PaperTrainer(chosen, 0, in_float64(split) if precise else split, world=world)
    if chosen.gated:
        trainer.model.layer.unit.estimator.register_forward_pre_hook(note)
    fit(trainer, None)
    torch.set_default_dtype(torch.float32)
    steps = [each for each in margins if len(each) == len(margins[0])]  # all but a last, smaller batch
    return trainer.history[0].train_loss, torch.stack(steps) if steps else None


def child(rank: int, size: int, port: int, folder: Path, chosen: Recipe, split: Split, precise: bool) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with together.join("cpu") as world:
        torch.save(trained(chosen, split, world, precise), folder / f"{rank}.pt")


def side_by_side(size: int, *args: Any) -> tuple[float, Tensor | None]:
    """Train in so many processes; return the loss and all examples' margins."""
    if size == 1:
        return trained(args[0], args[1], ALONE, args[2])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=child, args=(rank, size, port, folder, *args)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process of {size} failed")
        found = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    return found[0][0], None if found[0][1] is None else torch.cat([margins for _, margins in found], dim=1)


def parting(one: Tensor, other: Tensor) -> str:
    """Say at which step a gate first differs between two runs, and how near to its draw its probability was."""
    differs = (one > 0) != (other > 0)
    steps = differs.flatten(1).any(1).nonzero()
    first = int(steps[0]) if len(steps) else len(one)
    before = float((one[:first] - other[:first]).abs().max()) if first else 0.0
    if first == len(one):
        return f"no gate differs in {first} steps; p − u differs by at most {before:.1e}"
    row, gate = differs[first].nonzero()[0].tolist()
    count = int(differs[first].sum())
    return (
        f"step {first + 1}: {count} of {one[first].numel()} gates; p − u is {one[first, row, gate]:+.1e} and "
        f"{other[first, row, gate]:+.1e}; before, it differs by at most {before:.1e}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="straight_through")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[])
    options = parser.parse_args(arguments)
    chosen = override(recipe(options.row, "quick").but(**SIZE), options.settings)
    split = data.load(options.dataset, options.data_dir)
    first: Tensor | None = None
    for size in options.processes:
        loss, margins = side_by_side(size, chosen, split, options.float64)
        first = margins if first is None else first
        told = "" if first is None or margins is None or margins is first else f"   {parting(first, margins)}"
        print(f"{options.row} on {options.dataset}, {size} processes: loss {loss:.10f}{told}", flush=True)


if __name__ == "__main__":
    main()
