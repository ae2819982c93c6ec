"""A wide layer's units over several processes: each holds N/P of them, and all see the same tokens."""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from gatelet.estimators import JumpReLU
from gatelet.nn._units import Units
from gatelet.nn.conditional_ffn import ConditionalFFN
from gatelet.nn.gaters import Gater, SelfGater
from gatelet.nn.parts import more_than_affine
from gatelet.nn.sparse_autoencoder import SparseAutoencoder
from gatelet.nn.sparse_code import SparseCode


def spread(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the units of a module's ConditionalFFNs and SparseAutoencoders over the processes of a mesh, in place.

    y = Σ_p W2[:, p] (act(W1[p] x + b1[p]) ∘ h[p]) + b2, p the units of process p. Every process is given the same
    tokens and returns the same numbers as one process with all units: outputs are summed over the processes, the
    gater's last layer is spread as well and its logits gathered, so that gates, controllers, statistics, thresholds and
    top-k see all units. Noise is that of the mesh's first process, whose random state the others take.

    It is ``torch.distributed.tensor.parallel.parallelize_module`` with one style for these layers; a function, as
    what is spread follows from the layer and leaves no choice. Parameters become DTensors, which torch's optimisers,
    gradient clipping and distributed checkpoints know; per process they are 1/P as large, but for the gater's first
    layer and the biases of width D. With a mesh of two dimensions hand over one (``mesh["units"]``); the other may be
    data-parallel.

    Bias and variance are the layer's.

    Args:
        module: holds at least one ConditionalFFN or SparseAutoencoder, or is one. Call :meth:`SparseAutoencoder.
            start_from` before.
        mesh: of one dimension, P processes.

    Returns:
        the module.

    Raises:
        ValueError: if there is no such layer; P does not divide its gates or latents; it has what is not spread
            (``gater="self"``, dropout, groups, ``sparse_grad``, something that hangs on a Linear); the mesh has several
            dimensions; a layer is spread already.

    >>> import torch, gatelet
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> ffn = gatelet.nn.ConditionalFFN(64, 256, bottleneck=8)
    >>> gatelet.nn.spread(ffn, init_device_mesh("cpu", (2,)))                 # doctest: +SKIP

    Reference: M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
    Parallelism", 2019, arXiv:1909.08053, section 3.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: must have one dimension, not {mesh.ndim}; hand over one of them, as mesh['units']")
    found = {
        name: each for name, each in module.named_modules() if isinstance(each, ConditionalFFN | SparseAutoencoder)
    }
    if not found:
        raise ValueError("module: holds no ConditionalFFN and no SparseAutoencoder")
    for name, each in found.items():
        if (why := _refusal(each, mesh.size())) is not None:
            raise ValueError(f"spread: {name or type(each).__name__}: {why}")
    if module in found.values():
        return parallelize_module(module, mesh, _ByUnits())
    return parallelize_module(module, mesh, {name: _ByUnits() for name in found})


def _refusal(layer: ConditionalFFN | SparseAutoencoder, processes: int) -> str | None:
    """Return why a layer cannot be spread over so many processes, None if it can."""
    if isinstance(layer.split, Spread):
        return "is spread already"
    if isinstance(layer, SparseAutoencoder):
        if layer.groups > 1:
            return "groups: an example opens few of them, which would lie on few processes; spread a layer without"
        if layer.sparse_grad:
            return "sparse_grad: DTensors have no sparse gradients; build it with sparse_grad=False"
        return _division(layer.d_sae, "latents", processes)
    if isinstance(layer.gater, SelfGater):
        return "gater='self' has no logits that could be gathered before the units are computed"
    if layer.dropout:
        return "dropout: each process would draw its own; set layer.dropout = 0"
    for name in ("up", "glu", "down"):
        part = getattr(layer, name)
        if part is not None and (why := more_than_affine(part)) is not None:
            return f"{name}: only affine maps are spread, and {why}"
    if isinstance(layer.gater, Gater) and (why := more_than_affine(layer.gater.gates)) is not None:
        return f"gater.gates: only affine maps are spread, and {why}"
    return _division(layer.num_gates, "gates", processes)


def _division(count: int, what: str, processes: int) -> str | None:
    return f"{count} {what} cannot be divided among {processes} processes" if count % processes else None


class Spread(Units):
    """The units of one process among those of a mesh.

    Every method that meets the other processes must be called by all, in the same order. Its gradient is right for a
    loss that all compute alike.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.processes, self.rank = mesh, mesh.size(), mesh.get_local_rank()

    def own(self, parameter: Tensor) -> Tensor:
        """Return this process's part of a parameter."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def enter(self, x: Tensor) -> Tensor:
        """Return what all have, for this process's units: the gradient of it is the sum of all processes'."""
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
        """Let every process go on with the first one's random state."""
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
        numbers = torch.stack([lists.examples, lists.indices + self.rank * code.latents])
        every = self.gather(F.pad(numbers, pad, value=-1), 1)
        there = every[0] >= 0
        order = every[0][there].argsort(stable=True)
        examples, indices = every[:, there][:, order]
        values = self.gather(F.pad(values, pad), 0)[there][order]
        offsets = F.pad(torch.bincount(examples, minlength=lists.batch).cumsum(0), (1, 0))
        return SparseCode(indices, values, code.latents * self.processes, code.lead, offsets)

    def part(self, code: SparseCode) -> SparseCode:
        """Return what of a code is of this process's latents."""
        width = code.latents // self.processes
        if code.dense is not None:
            return SparseCode.from_dense(code.dense.narrow(1, self.rank * width, width), code.lead)
        lists = code.lists()
        here = lists.indices // width == self.rank
        offsets = F.pad(torch.bincount(lists.examples[here], minlength=lists.batch).cumsum(0), (1, 0))
        indices = lists.indices[here] - self.rank * width
        return SparseCode(indices, code.values.reshape(-1)[here], width, code.lead, offsets)

    def _as(self, part: Tensor, placement: Placement) -> DTensor:
        return DTensor.from_local(part.contiguous(), self.mesh, [placement], run_check=False)

    def _whole(self, part: Tensor, placement: Placement) -> Tensor:
        return self._as(part, placement).redistribute(placements=[Replicate()]).to_local()

    def __deepcopy__(self, memo: Any) -> "Spread":
        return self  # a mesh is of this process, not of a model


class _ByUnits(ParallelStyle):
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
    """A gater's last layer, of which each process computes its part; its output is that of all."""

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
    """Give what every process has whole the first one's numbers."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor, group_src=0, group=split.mesh.get_group())
