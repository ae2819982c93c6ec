"""Sparse autoencoders in the format of SAELens: ``cfg.json`` and ``sae_weights.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gatelet.estimators import JumpReLU

if TYPE_CHECKING:
    from gatelet.nn.sparse_autoencoder import SparseAutoencoder

ARCHITECTURES = {
    "top_k": "topk",
    "batch_top_k": "jumprelu",
    "jump_relu": "jumprelu",
    "relu": "standard",
    "gated": "gated",
}


def _safetensors() -> Any:
    try:
        from safetensors import torch as found
    except ImportError as error:
        raise RuntimeError(f"the format of SAELens needs the package safetensors ({error})") from error
    return found


@torch.no_grad()
def save(sae: "SparseAutoencoder", directory: Path | str, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder; the input's scale goes into the weights, which keeps codes and outputs."""
    if sae.groups > 1:
        raise ValueError(
            "groups: SAELens has no architecture with a router, so this one cannot be written in its format"
        )
    folder, scale = Path(directory), sae.input_scale
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        "W_enc": (sae.encoder_weight * scale).t(),
        "W_dec": sae.decoder_weight / scale,
        "b_dec": sae.decoder_bias / scale,
    }
    if sae.activation == "gated":
        weights |= {"b_gate": sae.encoder_bias, "b_mag": sae.magnitude_bias, "r_mag": sae.log_magnitude}
    else:
        weights["b_enc"] = sae.encoder_bias
    if isinstance(sae.estimator, JumpReLU):
        weights["threshold"] = sae.estimator.theta
    elif sae.activation == "batch_top_k":
        weights["threshold"] = sae.threshold.clamp(min=0).expand(sae.d_sae)
    _safetensors().save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, folder / FILES[1])
    told = {
        "architecture": ARCHITECTURES[sae.activation],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.encoder_weight.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"trained_with": "gatelet", "activation": sae.activation, **(metadata or {})},
    }
    told |= {"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.activation == "top_k" else {}
    (folder / FILES[0]).write_text(json.dumps(told, indent=1) + "\n")


FILES = ("cfg.json", "sae_weights.safetensors")


@torch.no_grad()
def load_sae_lens(directory: Path | str) -> "SparseAutoencoder":
    """Return the sparse autoencoder of a directory in the format of SAELens.

    Args:
        directory: with ``cfg.json`` and ``sae_weights.safetensors``, of the architectures ``topk``, ``jumprelu``,
            ``standard`` and ``gated``, without run-time normalisation.

    Returns:
        the layer, in ``train()``; its codes and outputs are SAELens'. The decoder's rows are held at unit length only
        if they have it.

    Raises:
        ValueError: naming the file, for another architecture, a normalisation, or weights that do not fit.

    >>> import tempfile, torch
    >>> from gatelet.nn import SparseAutoencoder
    >>> sae = SparseAutoencoder(8, 32, k=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.save_sae_lens(folder)
    ...     other = load_sae_lens(folder)
    >>> x = torch.randn(3, 8)
    >>> bool(torch.allclose(other(x), sae(x)))
    True
    """
    from gatelet.nn.sparse_autoencoder import SparseAutoencoder

    folder = Path(directory)
    try:
        told, found = json.loads((folder / FILES[0]).read_text()), _safetensors().load_file(folder / FILES[1])
    except (OSError, ValueError) as error:
        raise ValueError(f"directory {folder}: holds no autoencoder in the format of SAELens ({error})") from error
    kinds = {"topk": "top_k", "jumprelu": "jump_relu", "standard": "relu", "gated": "gated"}
    architecture = told.get("architecture", "standard")
    if architecture not in kinds:
        raise ValueError(f"{folder / FILES[0]}: the architecture {architecture!r} is none of {', '.join(kinds)}")
    for key in ("normalize_activations", "reshape_activations"):
        if told.get(key, "none") != "none":
            raise ValueError(f"{folder / FILES[0]}: {key} = {told[key]!r} has no counterpart here")
    wanted = {"W_enc", "W_dec", "b_dec", *NEEDED[architecture]}
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"{folder / FILES[1]}: lacks {', '.join(missing)}")
    weights = {key: found[key].float() for key in wanted}
    lengths = torch.linalg.vector_norm(weights["W_dec"], dim=1)
    if told.get("rescale_acts_by_decoder_norm", False):  # as SAELens folds it
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * lengths, weights["b_enc"] * lengths
        weights["W_dec"], lengths = weights["W_dec"] / lengths[:, None], torch.ones_like(lengths)
    if not told.get("apply_b_dec_to_input", True):
        shift = weights["b_dec"] @ weights["W_enc"]
        for key in ("b_enc", "b_gate"):
            if key in weights:
                weights[key] = weights[key] + shift
        if "b_mag" in weights:
            weights["b_mag"] = weights["b_mag"] + weights["r_mag"].exp() * shift
    unit = bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5))
    d_in, d_sae = weights["W_enc"].shape
    sae = SparseAutoencoder(d_in, d_sae, kinds[architecture], int(told.get("k") or min(32, d_sae)), unit_decoder=unit)
    sae.encoder_weight.copy_(weights["W_enc"].t())
    sae.decoder_weight.copy_(weights["W_dec"])
    sae.decoder_bias.copy_(weights["b_dec"])
    _rest(sae, weights)
    return sae


NEEDED = {
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""The weights that each architecture has beside those of all."""


def _rest(sae: "SparseAutoencoder", weights: dict[str, Tensor]) -> None:
    if sae.activation == "gated":
        sae.encoder_bias.copy_(weights["b_gate"])
        sae.magnitude_bias.copy_(weights["b_mag"])
        sae.log_magnitude.copy_(weights["r_mag"])
        return
    sae.encoder_bias.copy_(weights["b_enc"])
    if isinstance(sae.estimator, JumpReLU):
        # SAELens allows a threshold of zero, which has no logarithm: take the smallest number above it.
        smallest = torch.finfo(torch.float32).tiny
        sae.estimator.log_threshold.copy_(weights["threshold"].clamp(min=smallest).log())
