"""A wide layer's units over several processes: each holds N/P of them, and all see the same tokens."""

from typing import TYPE_CHECKING

from torch import nn

from gatelet.nn._units import ALL_HERE
from gatelet.nn.conditional_ffn import ConditionalFFN
from gatelet.nn.gaters import Gater, SelfGater
from gatelet.nn.parts import more_than_affine
from gatelet.nn.sparse_autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread(module: nn.Module, mesh: "DeviceMesh") -> nn.Module:
    """Spread the units of a module's ConditionalFFNs and SparseAutoencoders over the processes of a mesh, in place.

    y = Σ_p W2[:, p] (act(W1[p] x + b1[p]) ∘ h[p]) + b2, p the units of process p. Every process is given the same
    tokens and returns the same numbers as one process with all units: outputs are summed over the processes, the
    gater's last layer is spread as well and its logits gathered, so that gates, controllers, statistics, thresholds and
    top-k see all units. Noise is that of the mesh's first process, whose random state the others take.

    It calls ``torch.distributed.tensor.parallel.parallelize_module`` with one style for these layers. Parameters become
    DTensors, which torch's optimisers, gradient clipping and distributed checkpoints accept. Per process they are 1/P
    as large, except for the gater's first layer and the biases of width D. If the mesh has two dimensions, pass one of
    them (``mesh["units"]``); the other may be data-parallel.

    Bias and variance are the layer's.

    Args:
        module: holds at least one ConditionalFFN or SparseAutoencoder, or is one. Call :meth:`SparseAutoencoder.
            start_from` before.
        mesh: of one dimension, P processes.

    Returns:
        the module.

    Raises:
        ValueError: if there is no such layer; P does not divide its gates or latents; it has what is not spread
            (``gater="self"`` or ``"preview"``, dropout, groups, ``sparse_grad``, an adapter or hook on a Linear); the
            mesh has several dimensions; a layer is spread already.

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
    from torch.distributed.tensor.parallel import parallelize_module

    from gatelet.nn._spread import ByUnits

    if module in found.values():
        return parallelize_module(module, mesh, ByUnits())
    return parallelize_module(module, mesh, {name: ByUnits() for name in found})


def _refusal(layer: ConditionalFFN | SparseAutoencoder, processes: int) -> str | None:
    """Return why a layer cannot be spread over this many processes, or None if it can."""
    if layer.split is not ALL_HERE:
        return "is spread already"
    if isinstance(layer, SparseAutoencoder):
        if layer.groups > 1:
            return "groups: an example opens few of them, which would lie on few processes; spread a layer without"
        if layer.sparse_grad:
            return "sparse_grad: DTensors have no sparse gradients; build it with sparse_grad=False"
        return _division(layer.d_sae, "latents", processes)
    if isinstance(layer.gater, SelfGater):
        return "gater: it decides by the units themselves, so there are no logits to gather before they are computed"
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
