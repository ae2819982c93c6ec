"""Finding a model's feed-forward blocks: by class, by structure, and by trying what a module computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatelet.convert.block import KNOWN, NATIVE, Block, affine_at, affine_of
from gatelet.convert.run import Swapped
from gatelet.nn.conditional_ffn import ACTIVATIONS, hidden_layer

PAIRS = (("fc1", "fc2", "activation_fn"), ("ffn", "ffn_output", "activation"))
"""W1, W2 and the activation of layers that call them themselves, by name: OPT's, BART's and Whisper's, and ALBERT's."""
CONVERTED = "already converted: revert it first"


def is_affine(module: Any) -> bool:
    """Whether this is a Linear, or a Conv1D as GPT-2 has it, that nothing was built upon."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    weight = getattr(module, "weight", None)
    return hasattr(module, "nf") and hasattr(module, "nx") and isinstance(weight, Tensor) and weight.dim() == 2


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return N and D of an affine map."""
    units, width = affine_of(module).weight.shape
    return units, width


def _inputs(*shape: int) -> Tensor:
    """Return inputs that show what a module computes: always the same, whatever torch's default device is."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def which_activation(function: Callable[[Tensor], Any]) -> str | None:
    """Return the name of the activation that a function or module computes, None if it is unknown."""
    grid = torch.linspace(-6, 6, 241)
    try:
        with torch.no_grad():
            found = function(grid.clone())
    except Exception:  # it is not an activation
        return None
    if not isinstance(found, Tensor) or found.shape != grid.shape:
        return None
    fits = (name for name, act in ACTIVATIONS.items() if torch.allclose(found, act(grid), rtol=0, atol=2e-6))
    return next(fits, None)


def _elementwise(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters()) and not any(True for _ in module.children())


def find(name: str, module: nn.Module) -> list[tuple[str, nn.Module, Block | str]]:
    """Return the blocks that this module owns: name, the module that gets the gating, and the block or why not."""
    dense_class = module.dense_class if isinstance(module, Swapped) else type(module)
    if isinstance(module, nn.Sequential):
        return list(_sequential(name, module)) if dense_class.forward is nn.Sequential.forward else []
    if isinstance(module, Swapped):
        return [] if module.kind in ("up", "down") else [(name, module, CONVERTED)]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        own = (
            nn.TransformerEncoderLayer if isinstance(module, nn.TransformerEncoderLayer) else nn.TransformerDecoderLayer
        )
        activation = which_activation(module.activation)
        if type(module)._ff_block is not own._ff_block:
            return [(name, module, "its class computes the feed-forward block in its own way")]
        if activation is None:
            return [(name, module, f"its activation {module.activation} is unknown ({KNOWN})")]
        outer = "dropout2" if own is nn.TransformerEncoderLayer else "dropout3"
        return [(name, module, Block("transformer", "linear1", "linear2", activation, None, "dropout", outer))]
    if hasattr(module, "feed_forward_chunk") and hasattr(module, "intermediate") and hasattr(module, "output"):
        return [(name, module, _bert(cast(Any, module)))]
    for names in PAIRS:
        if all(key in module._modules for key in names[:2]) and hasattr(module, names[2]):
            return [(name, module, _pair(module, *names))]
    affine = {key: child for key, child in module.named_children() if is_affine(child)}
    if len(affine) not in (2, 3):
        return []
    found = _by_structure(module, affine)
    return [] if found is None else [(name, module, found)]


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Set the module to ``eval()``, without gradients, inside the block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad():
            module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _pair(module: nn.Module, up: str, down: str, activation: str) -> Block | str:
    """Recognise a layer that calls W1, its activation and W2 among other things (OPT, BART, Whisper, ALBERT)."""
    first, last = module._modules[up], module._modules[down]
    affine = is_affine(first) and is_affine(last)
    if not affine or _shape(cast(nn.Module, first))[0] != _shape(cast(nn.Module, last))[1]:
        return f"its {up} and {down} are no two affine maps that fit together"
    found = which_activation(getattr(module, activation))
    if found is None:
        return f"its activation {activation} is unknown ({KNOWN})"
    return Block("pair", up, down, found)


def _bert(module: Any) -> Block | str:
    first, last = getattr(module.intermediate, "dense", None), getattr(module.output, "dense", None)
    norm = getattr(module.output, "LayerNorm", None)
    if not (is_affine(first) and is_affine(last) and norm is not None):
        return "its feed-forward block is not made of intermediate.dense, output.dense and output.LayerNorm"
    activation = which_activation(getattr(module.intermediate, "intermediate_act_fn", lambda x: None))
    if activation is None:
        return f"its activation intermediate.intermediate_act_fn is unknown ({KNOWN})"
    first, last = affine_of(cast(nn.Module, first)), affine_of(cast(nn.Module, last))
    x = _inputs(1, 3, first.weight.shape[1]).to(last.weight)
    with _evaluated(module):
        try:
            have = module.feed_forward_chunk(x)
        except Exception as error:
            return f"its feed_forward_chunk does not take one tensor ({type(error).__name__}: {error})"
        want = norm(nn.functional.linear(hidden_layer(x, activation, first, None), *last) + x)
        same = torch.allclose(have, want, rtol=1e-4, atol=1e-5 if x.dtype in NATIVE else 5e-2)
    if not same:
        return "its feed_forward_chunk is not LayerNorm(W2 act(W1 x + b1) + b2 + x)"
    outer = "output.dropout" if isinstance(getattr(module.output, "dropout", None), nn.Dropout) else None
    return Block("bert", "intermediate.dense", "output.dense", activation, None, None, outer)


def _sequential(name: str, module: nn.Sequential) -> Iterator[tuple[str, nn.Module, Block | str]]:
    items, start = list(module._modules.items()), 0
    while start + 2 < len(items):
        (first_name, first), (_, act), *rest = items[start:]
        inner = rest[0][0] if isinstance(rest[0][1], nn.Dropout) else None
        last_name, last = rest[1] if inner is not None and len(rest) > 1 else rest[0]
        start += 1
        if not (is_affine(first) and is_affine(last) and act is not None and _elementwise(act)):
            continue
        activation = which_activation(act)
        label = join(name, first_name)
        if "gating" in first._modules:
            yield label, first, CONVERTED
        elif isinstance(act, nn.Dropout | nn.Identity):
            continue
        elif activation is None:
            yield label, first, f"its activation {act} is unknown ({KNOWN})"
        elif _shape(first)[0] != _shape(last)[1]:
            yield label, first, "W1 and W2 do not fit together"
        else:
            block = Block("sequential", first_name, last_name, activation, None, inner, None, last_name)
            yield label, first, block
        # W2 is not the next block's W1.
        start = next(at for at, (key, _) in enumerate(items) if key == last_name) + 1


def _by_structure(module: nn.Module, affine: dict[str, nn.Module]) -> Block | str | None:
    """Recognise an MLP module by trying what it computes; None if it does not look like one."""
    shapes = {key: _shape(child) for key, child in affine.items()}
    downs = []
    for key, (_, hidden) in shapes.items():
        others = [shapes[other] for other in affine if other != key]
        if all(other == (hidden, others[0][1]) for other in others) and hidden > others[0][1]:
            downs.append(key)
    others_known = all(is_affine(child) or _elementwise(child) for child in module.children())
    if not others_known or any(True for _ in module.parameters(recurse=False)):
        return None
    if not downs:
        return _fused(module, shapes)
    reason = f"its forward computes neither W2 act(W1 x + b1) + b2 nor the gated form, by an activation that is {KNOWN}"
    for down in downs:
        ups = [key for key in affine if key != down]
        pairs = [(ups[0], None)] if len(ups) == 1 else [(ups[0], ups[1]), (ups[1], ups[0])]
        for up, glu in pairs:
            found = _probe(module, up, down, glu)
            if isinstance(found, Block):
                return found
            reason = found or reason
    return reason


def _fused(module: nn.Module, shapes: dict[str, tuple[int, int]]) -> Block | str | None:
    """Recognise an MLP whose W_g and W1 are one matrix (Phi-3, ModernBERT)."""
    if len(shapes) != 2:
        return None
    down, both = sorted(shapes, key=lambda key: shapes[key])
    (out, hidden), (wide, width) = shapes[down], shapes[both]
    if wide != 2 * hidden or out != width:
        return None
    reason = f"W1 and W_g seem to be one matrix, but its halves give no gated form by an activation that is {KNOWN}"
    for glu, up in ((0, 1), (1, 0)):
        found = _probe(module, f"{both}:{up}", down, f"{both}:{glu}")
        if isinstance(found, Block):
            return found
        reason = found or reason
    return reason


def _probe(module: nn.Module, up: str, down: str, glu: str | None) -> Block | str | None:
    """Return the block if the module computes one, whatever its code looks like; a reason if it cannot be tried."""
    first, last = affine_at(module, up), affine_at(module, down)
    gate = None if glu is None else affine_at(module, glu)
    if first.weight.is_meta:
        return "its weights are on the meta device"
    x = _inputs(2, 3, first.weight.shape[1]).to(first.weight)
    seen: dict[str, Tensor] = {}
    drops = {key: child for key, child in module.named_children() if isinstance(child, nn.Dropout)}
    hooks = [
        child.register_forward_hook(lambda _, args, __, key=key: seen.update({key: args[0]}))
        for key, child in drops.items()
    ]
    try:
        with _evaluated(module):
            probe = nn.functional.linear(x, *(first if gate is None else gate))
            x = x * (2 / probe.std().clamp_min(1e-6)).to(x)  # where activations differ
            have = module(x)
            for name in ACTIVATIONS:
                hidden = hidden_layer(x, name, first, gate)
                want = nn.functional.linear(hidden, *last)
                if not isinstance(have, Tensor) or have.shape != want.shape:
                    return None
                exact = x.dtype in NATIVE
                if not torch.allclose(have, want, rtol=0, atol=float(want.abs().max()) * (2e-6 if exact else 2e-2)):
                    continue
                if not exact:  # too coarse to tell two forms of gelu apart
                    name = next((n for n in map(which_activation, module.children()) if n is not None), name)
                inner = next((key for key, at in seen.items() if at.shape == hidden.shape and at is not have), None)
                outer = next((key for key, at in seen.items() if key != inner), None)
                return Block("module", up, down, name, glu, inner, outer)
    except Exception as error:
        return f"its forward does not take one tensor ({type(error).__name__}: {error})"
    finally:
        for hook in hooks:
            hook.remove()
    return None


def join(prefix: str, name: str) -> str:
    """Return the name of a submodule."""
    return f"{prefix}.{name}" if prefix else name
