"""What was converted with which options, as plain data that is saved beside the weights."""

import dataclasses
import inspect
from importlib.metadata import version
from typing import Any

from torch import nn

from gatelet import estimators, sparsity
from gatelet.convert.block import Block, BlockGating, Options, module_path
from gatelet.convert.place import blocks, is_hugging_face, put, without_nested_tensors
from gatelet.nn.conditional_layer import ConditionalLayer

PLAIN = (bool, int, float, str, type(None))


FORMAT = 1


def note(model: nn.Module) -> None:
    """Write what is converted into a Hugging Face model's configuration, so that ``save_pretrained`` does too."""
    if not is_hugging_face(model):
        return
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", "")
    if getattr(method, "value", method) == "gguf":  # its weights are plain numbers again, and are saved as such
        model.hf_quantizer.remove_quantization_config(model)
    try:
        described: dict[str, Any] = {"blocks": describe(model)}
    except ValueError as error:  # from_pretrained will say so
        described = {"why_not": str(error)}
    if described.get("blocks") == {}:
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    else:
        about = {"quant_method": "gatelet", "format": FORMAT, "gatelet": version("gatelet")}
        model.config.quantization_config = about | described


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return block's name -> where its parts lie and the options of its conversion, in types that JSON has.

    Raises:
        ValueError: for an option that cannot be made again from a description, for example an estimator of your own.
    """
    return {
        name: {"block": dataclasses.asdict(gating.block), "options": _options(gating.options)}
        for name, (_, gating) in blocks(model).items()
    }


def _options(options: Options) -> dict[str, Any]:
    if not isinstance(options.gater, str):
        raise ValueError(
            f"gater: a {type(options.gater).__name__} of your own cannot be described; give a gater by name"
        )
    found = {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    further = dict(options.further)
    if further.get("sparsity") is not None:
        further["sparsity"] = [_made(each, "sparsity", vars(sparsity)) for each in further["sparsity"]]
    unknown = [name for name, value in further.items() if name != "sparsity" and not isinstance(value, PLAIN)]
    if unknown:
        raise ValueError(f"{unknown[0]}: a {type(further[unknown[0]]).__name__} cannot be described")
    estimator = options.estimator
    named = estimator if isinstance(estimator, str) else _made(estimator, "estimator", estimators.ALL)
    return found | {"estimator": named, "further": further}


def _made(value: object, argument: str, known: Any) -> dict[str, Any]:
    """Return an object's class, by its name among the known ones, and the arguments it was made with."""
    name = next((name for name, each in known.items() if each is type(value)), None)
    if name is None:
        raise ValueError(f"{argument}: {type(value).__name__} is not a class of gatelet's and cannot be described")
    arguments = {}
    for parameter in inspect.signature(type(value)).parameters.values():
        held = getattr(value, parameter.name, inspect.Parameter.empty)
        if not isinstance(held, PLAIN):
            raise ValueError(f"{argument}: {parameter.name} of {type(value).__name__} cannot be described")
        arguments[parameter.name] = held
    return {"name": name, "arguments": arguments}


def options_of(described: dict[str, Any]) -> Options:
    """Return the options that were described."""
    values = dict(described)
    if not isinstance(values["estimator"], str):
        made = values["estimator"]
        values["estimator"] = estimators.ALL[made["name"]](**made["arguments"])
    further = dict(values["further"])
    if further.get("sparsity") is not None:
        further["sparsity"] = [getattr(sparsity, each["name"])(**each["arguments"]) for each in further["sparsity"]]
    return Options(**values | {"further": further})


def restore(model: nn.Module, described: dict[str, dict[str, Any]]) -> None:
    """Convert the blocks that were described, in place; their weights may be on the meta device.

    Raises:
        ValueError: for a model without such a block, or whose block was converted with other options.
    """
    present = {name: gating for name, (_, gating) in blocks(model).items()}
    missing = [name for name in present if name not in described]
    if missing:
        raise ValueError(f"model: its block {missing[0]} is converted, and was not when it was saved")
    for name, each in described.items():
        if name in present:
            _compare(name, present[name], each["options"])
            continue
        block = Block(**each["block"])
        try:
            holder = model.get_submodule(name.removesuffix("gating").rstrip("."))
            path = name.removesuffix("gating").rstrip(".")
            inside = path.removesuffix(block.up).rstrip(".") if block.kind == "sequential" else path
            owner = model.get_submodule(inside)
            for part in (block.up, block.down, block.glu):
                if part is not None:
                    owner.get_submodule(module_path(part))
        except AttributeError as error:
            raise ValueError(f"model: has no block for {name}, which was saved ({error})") from error
        put(owner, holder, block, options_of(each["options"]))
    without_nested_tensors(model)
    note(model)


def _compare(name: str, gating: BlockGating, saved: dict[str, Any]) -> None:
    """Raise if the gates were made with other options than the saved ones."""
    have = _options(gating.options)
    other = [key for key in saved if have[key] != saved[key]]
    if other:
        key = other[0]
        raise ValueError(
            f"model: {key} of the block {name} is {have[key]!r}, but {saved[key]!r} was saved; "
            "load into the dense model, or convert with the same options"
        )


def rates(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return conditional layer's name -> its rate, estimator and gater, of all that the model holds."""
    return {
        name: {
            "target_rate": layer.unit.target_rate,
            "estimator": type(layer.unit.estimator).__name__,
            "gater": type(layer.gater).__name__,
        }
        for name, layer in model.named_modules()
        if isinstance(layer, ConditionalLayer)
    }
