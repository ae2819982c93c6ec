"""A converted model on disk: weights, and what was converted with which options."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from gatelet.convert.describe import FORMAT, describe, rates, restore
from gatelet.convert.place import REPLACED, holds_rows, is_hugging_face
from gatelet.nn.conditional_layer import conditional_layers

DESCRIPTION, WEIGHTS, CONFIGURATION = "gatelet.json", "model.safetensors", "config.json"


def save(model: nn.Module, directory: str | Path) -> None:
    """Write a model with conditional layers to a directory: weights, and what was converted with which options.

    The weights are ``model.safetensors``; the options, thresholds' target rates among them, ``gatelet.json``. A Hugging
    Face model is written by its own ``save_pretrained``, whose ``config.json`` holds the options too.

    Args:
        model: converted, or built of conditional layers.
        directory: created if it is missing; files of these names in it are replaced.

    Raises:
        ValueError: for a model without conditional layers, or after :func:`gatelet.convert.keep_rows`; an estimator,
            controller or gater of your own, which cannot be made again from a description.

    >>> import copy, tempfile, torch, gatelet
    >>> dense = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    >>> model = copy.deepcopy(dense)
    >>> _ = gatelet.convert(model, target_rate=0.25, bottleneck=2)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     gatelet.save(model, directory)
    ...     again = gatelet.load(directory, dense)
    >>> torch.equal(again[0].gating.gater.gates.weight, model[0].gating.gater.gates.weight)
    True
    """
    if holds_rows(model):
        raise ValueError(f"model: cannot be saved, because {REPLACED}; save it before")
    conditional_layers(model)
    directory = Path(directory)
    described = {"format": FORMAT, "gatelet": version("gatelet"), "blocks": describe(model), "layers": rates(model)}
    directory.mkdir(parents=True, exist_ok=True)
    if is_hugging_face(model):
        model.save_pretrained(directory)
        described["model"] = type(model).__name__
    else:
        from safetensors.torch import save_model

        save_model(model, str(directory / WEIGHTS))
    (directory / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that :func:`save` wrote, with its gates, thresholds and weights.

    Args:
        directory: what :func:`save`, or ``save_pretrained`` of a converted Hugging Face model, wrote.
        model: the dense model, of the same structure, which is converted in place and takes the weights; or one that
            is converted already, with the same options. Not needed for a Hugging Face model.

    Returns:
        the model; a Hugging Face model that was built here is in ``eval()``.

    Raises:
        FileNotFoundError: for a directory that holds no such model.
        ValueError: for one that another version wrote in another format; a model that does not fit, or whose
            estimator, rate or gater differs from what was saved.
    """
    directory = Path(directory)
    described = read(directory)
    if model is None:
        if "model" not in described:
            raise ValueError(
                f"model: must be given, because {directory} holds no Hugging Face model, which describes itself"
            )
        return _hugging_face(directory, described["model"])
    restore(model, described["blocks"])
    _same_layers(model, described["layers"])
    from safetensors.torch import load_model

    load_model(model, str(directory / WEIGHTS))
    return model


def read(directory: Path) -> dict[str, Any]:
    """Return the description in a directory, of a format that this version reads."""
    path = directory / DESCRIPTION
    if path.exists():
        found: dict[str, Any] = _json(path)
    else:  # written by save_pretrained alone
        config = directory / CONFIGURATION
        held = _json(config) if config.exists() else {}
        found = held.get("quantization_config") or {}
        if found.get("quant_method") != "gatelet":
            raise FileNotFoundError(f"directory: {directory} holds no model of gatelet ({DESCRIPTION} is missing)")
        found = found | {"model": held["architectures"][0], "layers": {}}
    check_format(found, directory)
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"directory: {path} cannot be read ({error})") from error


def check_format(described: dict[str, Any], directory: object) -> None:
    """Raise for a description of another format."""
    if described.get("format") != FORMAT:
        raise ValueError(
            f"directory: {directory} was written by gatelet {described.get('gatelet', '(unknown)')} in format "
            f"{described.get('format')}; this is gatelet {version('gatelet')}, which reads format {FORMAT}"
        )


def _same_layers(model: nn.Module, saved: dict[str, dict[str, Any]]) -> None:
    have = rates(model)
    for name, layer in saved.items():
        if name not in have:
            raise ValueError(f"model: has no conditional layer {name}, which was saved")
        for key, value in layer.items():
            if have[name][key] != value:
                raise ValueError(f"model: {key} of the layer {name} is {have[name][key]!r}, but {value!r} was saved")


def _hugging_face(directory: Path, name: str) -> nn.Module:
    import transformers

    import gatelet.convert.hugging_face  # noqa: F401  (teaches from_pretrained what gatelet is)

    found: nn.Module = getattr(transformers, name).from_pretrained(directory)
    return found
