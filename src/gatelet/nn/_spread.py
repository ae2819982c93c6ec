"""How :func:`gatelet.nn.spread` changes a layer; a file of its own, as torch's tensor parallelism imports slowly."""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from gatelet.estimators import JumpReLU
from gatelet.nn._units import Units
from gatelet.nn.conditional_ffn import ConditionalFFN
from gatelet.nn.gaters import Gater
from gatelet.nn.sparse_autoencoder import SparseAutoencoder
from gatelet.nn.sparse_code import SparseCode


class Spread(Units):
    """The units of one process among those of a mesh.

    All processes must call a method that communicates, in the same order. Its gradient is right for a loss that all
    processes compute in the same way.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.processes, self.rank = mesh, mesh.size(), mesh.get_local_rank()

    def own(self, parameter: Tensor) -> Tensor:
        """Return this process's part of a parameter."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def enter(self, x: Tensor) -> Tensor:
        """Return what all processes have, for this process's units; its gradient is summed over the processes."""
        if not x.requires_grad:
            return x
        return self._as(x, Replicate()).to_local(grad_placements=[Partial()])

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of all processes' parts."""
        return self._whole(part, Partial())

    def gather(self, part: Tensor, dim: int = -1) -> Tensor:
        """Return all processes' parts, one after the other."""
        return self._whole(part, Shard(dim % part.dim()))

    def slice(self, whole: Tensor) -> Tensor:
        """Return this process's part of what all have, along the last dimension."""
        width = whole.shape[-1] // self.processes
        return self.enter(whole).narrow(-1, self.rank * width, width)

    def same_noise(self, device: torch.device) -> None:
        """Give every process the random state of the first one."""
        on_cpu = device.type == "cpu"
        state = torch.get_rng_state() if on_cpu else torch.get_device_module(device).get_rng_state(device)
        sent = state.to(device)
        dist.broadcast(sent, group_src=0, group=self.mesh.get_group())
        if on_cpu:
            torch.set_rng_state(sent)
        else:
            torch.get_device_module(device).set_rng_state(sent.cpu(), device)

    def largest(self, values: Tensor, k: int) -> Tensor:
        """Return which of this process's values (B, k') are among the k largest of all processes', per example."""
        width = values.shape[-1]
        at = self.gather(values).topk(k, dim=-1, sorted=False).indices
        chosen = torch.zeros(len(values), width * self.processes, dtype=torch.bool, device=values.device)
        return chosen.scatter_(1, at, True).narrow(1, self.rank * width, width)

    def place(self, part: Tensor) -> Tensor:
        """Return numbers of this process's units among zeros for all others."""
        found = part.new_zeros(len(part) * self.processes)
        found[self.rank * len(part) : (self.rank + 1) * len(part)] = part
        return found

    def whole(self, code: SparseCode) -> SparseCode:
        """Return the code of all latents, sorted by example; each process's own values carry the gradient."""
        if code.dense is not None:
            return SparseCode.from_dense(self.gather(code.dense), code.lead)
        lists, values = code.lists(), code.values.reshape(-1)
        counts = self.gather(torch.tensor([len(values)], device=values.device), 0)
        pad = (0, int(counts.max()) - len(values))
        numbers = torch.stack([lists.examples(), lists.units + self.rank * code.latents])
        every = self.gather(F.pad(numbers, pad, value=-1), 1)
        there = every[0] >= 0
        order = every[0][there].argsort(stable=True)
        examples, indices = every[:, there][:, order]
        values = self.gather(F.pad(values, pad), 0)[there][order]
        offsets = F.pad(torch.bincount(examples, minlength=lists.batch).cumsum(0), (1, 0))
        return SparseCode(indices, values, code.latents * self.processes, code.lead, offsets)

    def part(self, code: SparseCode) -> SparseCode:
        """Return the part of a code that belongs to this process's latents."""
        width = code.latents // self.processes
        if code.dense is not None:
            return SparseCode.from_dense(code.dense.narrow(1, self.rank * width, width), code.lead)
        lists = code.lists()
        here = lists.units // width == self.rank
        offsets = F.pad(torch.bincount(lists.examples()[here], minlength=lists.batch).cumsum(0), (1, 0))
        indices = lists.units[here] - self.rank * width
        return SparseCode(indices, code.values.reshape(-1)[here], width, code.lead, offsets)

    def _as(self, part: Tensor, placement: Placement) -> DTensor:
        return DTensor.from_local(part.contiguous(), self.mesh, [placement], run_check=False)

    def _whole(self, part: Tensor, placement: Placement) -> Tensor:
        return self._as(part, placement).redistribute(placements=[Replicate()]).to_local()

    def __deepcopy__(self, memo: Any) -> "Spread":
        return self  # a mesh is of this process, not of a model


class ByUnits(ParallelStyle):
    """The style of both layers."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        split = Spread(device_mesh)
        if isinstance(module, ConditionalFFN):
            for part in (module.up, module.glu):
                if part is not None:
                    _shard(part, split, weight=0, bias=0)
            _shard(module.down, split, weight=1)
            if isinstance(module.gater, Gater):
                module.gater.gates = _Gathered(module.gater.gates, split)
        elif isinstance(module, SparseAutoencoder):
            rows = ("encoder_weight", "decoder_weight", "encoder_bias", "log_magnitude", "magnitude_bias")
            _shard(module, split, **{name: 0 for name in rows if hasattr(module, name)})
            if isinstance(module.estimator, JumpReLU):
                _shard(module.estimator, split, log_threshold=0)
        _alike(module, split)
        cast(ConditionalFFN | SparseAutoencoder, module).split = split
        return module


class _Gathered(nn.Linear):
    """A gater's last layer: each process computes its part, and the output is all parts together."""

    def __init__(self, linear: nn.Linear, split: Spread) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        _shard(self, split, weight=0, bias=0)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        """Return all logits."""
        own = self.split.own
        bias = None if self.bias is None else own(self.bias)
        return self.split.gather(F.linear(self.split.enter(x), own(self.weight), bias))


def _shard(module: nn.Module, split: Spread, **dims: int) -> None:
    """Leave each process its part of these parameters, along these dimensions, of the first process's numbers."""
    for name, dim in dims.items():
        parameter = getattr(module, name)
        if parameter is not None:
            part = distribute_tensor(parameter.detach(), split.mesh, [Shard(dim)])
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))


@torch.no_grad()
def _alike(module: nn.Module, split: Spread) -> None:
    """Copy the first process's numbers into the tensors that every process holds whole."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor, group_src=0, group=split.mesh.get_group())
