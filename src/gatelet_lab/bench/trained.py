"""`gatelet bench kernels --trained DIR`: gates that networks have learned, beside gates drawn at random.

Units of a trained network open together, and they differ in how often they open. To tell which of the two matters,
gates are drawn again in two ways: each unit as often as before, but independently of the others; and all units equally
often.
"""

import functools
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import gatelet
from gatelet.convert import blocks
from gatelet.kernels import gated_linear
from gatelet.nn import ConditionalLinear
from gatelet_lab import data
from gatelet_lab.bench.kernels import forward_only, with_gradients
from gatelet_lab.bench.timing import Ways
from gatelet_lab.files import write_atomically
from gatelet_lab.language import load_language, read_text
from gatelet_lab.training.paper import PaperTrainer
from gatelet_lab.training.recipes import recipe

ROWS = ("noisy_rectifier", "score_function")
"""Rows of the paper's table whose gates are looked at."""
RATES = (0.1, 0.35)
"""Shares of open units of the language model's block."""
BATCHES = (32, 256)
EXAMPLES = 2048
WINDOW = 256
"""Tokens of the language model's text in a window; a batch is consecutive ones."""
COMMON = 0.5
"""A unit that is open for more than this share of a batch is computed for all of it in the way called that."""
COLUMNS = {
    "trained": "trained",
    "as often": "as often",
    "random": "random",
    "alike": "alike together",
    "split": "common units dense",
}
"""Head of the column of each way."""
Measure = Callable[[Ways], dict[Any, float]]


@dataclass(frozen=True)
class Learnt:
    """A layer with inputs and the gates that a trained network opens for them."""

    title: str
    x: Tensor
    """(examples, D)."""
    weight: Tensor
    """(N, D)."""
    bias: Tensor | None
    gate: Tensor
    """(examples, N)."""


def show_trained(
    folder: Path, epochs: int, model: Path | None, measure: Measure, console: Console
) -> list[dict[str, Any]]:
    """Print and return time / dense of each network's gates and of both kinds drawn again."""
    makers: dict[str, Callable[[], list[Learnt]]] = {
        f"{row}-{epochs}": functools.partial(of_paper, row, epochs) for row in ROWS
    }
    if model is not None:
        makers |= {f"{model.stem}-{rate}": functools.partial(of_language, model, rate) for rate in RATES}
    found = []
    console.print(head(), highlight=False)
    for name, make in makers.items():
        for learnt in kept(folder / f"{name}.pt", make):
            console.print(learnt.title, highlight=False)
            for batch in BATCHES:
                for backward in (False, True):
                    found.append(compare(learnt, batch, backward, measure))
                    console.print(line(found[-1]), highlight=False)
    console.print(
        "time / dense; as often: each unit's gates of other examples; random: all gates in any order; alike: examples "
        "in the order of their gates; split: common units, open for over half of the batch, by a dense product",
        highlight=False,
    )
    return found


def kept(path: Path, make: Callable[[], list[Learnt]]) -> list[Learnt]:
    """Return what is in the file; where there is none, make it first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [asdict(each) for each in make()]
        write_atomically(path, lambda file: torch.save(made, file))
    return [Learnt(**each) for each in torch.load(path)]


def of_paper(row: str, epochs: int) -> list[Learnt]:
    """Train the paper's network on MNIST; return the gates of test images, and those that training draws."""
    split = data.load("mnist")
    trainer = PaperTrainer(recipe(row, "paper"), 0, split)
    for _ in range(epochs):
        trainer.advance()
    trainer.calibrate()
    layer = cast(ConditionalLinear, trainer.model.layer)
    weights = (layer.expert.weight.detach(), layer.expert.bias.detach())
    found = []
    for title, images in (("test images", split.test_images), ("in training", split.train_images)):
        layer.train(title == "in training")
        x = images[:EXAMPLES].clone()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found.append(Learnt(f"{row}, {epochs} epochs, {title}", x, *weights, layer.decide(x)[0]))
    return found


def of_language(path: Path, rate: float) -> list[Learnt]:
    """Convert the middle block of a language model; return the gates of consecutive tokens of the standard library."""
    language = load_language(path)
    text = sysconfig.get_path("stdlib") + "/*.py"
    read = read_text(language.tokenizer, [text], WINDOW, 8 * WINDOW, EXAMPLES)
    model = language.model
    name = f"model.layers.{model.config.num_hidden_layers // 2}.mlp"
    gatelet.convert(model, rate, gater="preview", where=name)
    gatelet.sparsity.calibrate_thresholds(model, list(read.fit.split(2)))
    owner, gating = next(iter(blocks(model).values()))
    seen: list[Tensor] = []
    hook = owner.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(read.held_out)
        hook.remove()
        x, mlp = torch.cat(seen), cast(Any, owner)
        hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        gate = gating.decide(x, activation=hidden)[0]
    title = f"{path.stem}, {name}, {rate:.0%} open"
    return [Learnt(title, x, mlp.up_proj.weight.detach(), None, gate.float())]


def drawn_again(gate: Tensor, batch: int) -> dict[str, Tensor]:
    """Return the gates of the first ``batch`` examples, and as many that were drawn again in two ways."""
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(gate.shape, generator=draw).argsort(0)
    alone = gate.gather(0, order)  # each unit's gates go to other examples
    everywhere = gate.flatten()[torch.randperm(gate.numel(), generator=draw)].view(gate.shape)
    return {"trained": gate[:batch], "as often": alone[:batch], "random": everywhere[:batch]}


def compare(learnt: Learnt, batch: int, backward: bool, measure: Measure) -> dict[str, Any]:
    """Return time / dense for the first ``batch`` examples: of each kind of gates, and of other ways for the learnt."""
    x, weight, bias = learnt.x[:batch], learnt.weight, learnt.bias
    gates = drawn_again(learnt.gate, batch)
    own, order = gates["trained"], alike(gates["trained"])
    pairs: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {"dense": (dense, x, own)}
    pairs |= {kind: (ours, x, gate) for kind, gate in gates.items()}
    pairs |= {"alike together": (ours, x[order], own[order])}
    if not backward:
        pairs |= {"common units dense": (common_dense, x, own)}
    upper = torch.randn(batch, len(weight), generator=torch.Generator().manual_seed(0))
    prepared: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {}
    for name, (way, inputs, gate) in pairs.items():
        given = [
            None if each is None else each.detach().clone().requires_grad_(backward)
            for each in (inputs, weight, bias, gate)
        ]
        prepared[name] = functools.partial(way, *given), [each for each in given if each is not None]
    with torch.set_grad_enabled(backward):
        want = dense(x, weight, bias, own)
        for name in ("trained", "common units dense"):
            if name in prepared and not torch.allclose(prepared[name][0](), want, rtol=1e-3, atol=1e-4):
                raise RuntimeError(f"{learnt.title}: {name} computes something else and is not timed")
        seconds = measure(with_gradients(prepared, upper) if backward else forward_only(prepared))
    return {
        "title": learnt.title,
        "batch": batch,
        "backward": backward,
        "ms": {name: 1e3 * took for name, took in seconds.items()},
        "ratio": {name: took / seconds["dense"] for name, took in seconds.items()},
        "open": float((own != 0).float().mean()),
        "read": float((own != 0).any(0).float().mean()),
        "common": float((own != 0)[:, often(own)].sum() / (own != 0).sum().clamp(min=1)),
    }


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Everything is computed."""
    return F.linear(x, weight, bias) * gate


def ours(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """The kernels."""
    return gated_linear(x, weight, bias, gate, backend="numba")


def often(gate: Tensor) -> Tensor:
    """Return which units are open for most of the examples, (N,)."""
    return gate.count_nonzero(0) > COMMON * len(gate)


def common_dense(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """A dense product for units that are open for most of the examples, the kernels for the others."""
    common = often(gate)
    units = common.nonzero().flatten()
    out = ours(x, weight, bias, gate * ~common)
    out[:, units] = F.linear(x, weight[units], None if bias is None else bias[units]) * gate[:, units]
    return out


def alike(gate: Tensor) -> Tensor:
    """Return an order of the examples in which neighbours have similar gates: along their first principal component."""
    return torch.pca_lowrank(gate, q=1)[0][:, 0].argsort()


def head() -> str:
    """Return the head of the table's columns."""
    return f"{'  B':6}{'':9}{'open':>7}{'read':>7}{'common':>8}{'dense ms':>10}" + "".join(
        f"{name:>10}" for name in COLUMNS
    )


def line(found: Mapping[str, Any]) -> str:
    """Return a line of the table: shares of open gates, rows read and open gates of common units; times over dense."""
    ratios = "".join(
        f"{found['ratio'][way]:10.3f}" if way in found["ratio"] else f"{'':10}" for way in COLUMNS.values()
    )
    shares = f"{found['open']:7.1%}{found['read']:7.0%}{found['common']:8.0%}"
    how = "f+b" if found["backward"] else "forward"
    return f"  {found['batch']:<4}{how:9}{shares}{found['ms']['dense']:10.2f}{ratios}"
