"""What the processes of torch.distributed tell each other about their parts of a batch.

In a group of their own: a backward pass may then ask while DistributedDataParallel sends gradients, in whatever order.
"""

from typing import Any

import torch
from torch import Tensor

from gatelet.estimators._distributed import is_distributed

_groups: dict[Any, Any] = {}


def prepare() -> None:
    """Make the group; every process calls this once in a forward pass, before anything else here."""
    if is_distributed():
        world = torch.distributed.group.WORLD
        if world not in _groups:
            _groups[world] = torch.distributed.new_group()


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    return _reduced(values, torch.distributed.ReduceOp.SUM)


def least(values: Tensor) -> Tensor:
    """Return the minimum over all processes."""
    return _reduced(values, torch.distributed.ReduceOp.MIN)


def gathered(values: Tensor) -> Tensor:
    """Return all processes' values, of one shape, one after the other."""
    if not is_distributed():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous(), group=_groups[torch.distributed.group.WORLD])
    return torch.cat(parts)


def _reduced(values: Tensor, how: Any) -> Tensor:
    if not is_distributed():
        return values
    found = values.clone()
    torch.distributed.all_reduce(found, how, group=_groups[torch.distributed.group.WORLD])
    return found
