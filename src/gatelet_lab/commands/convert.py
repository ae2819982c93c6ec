"""`gatelet convert`: a language model whose feed-forward blocks compute, per token, the units that matter."""

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional, UseAppendAction

import gatelet
from gatelet.convert import Distillation, Report, blocks, distil_output, keep_rows, spread_rate
from gatelet.convert.progress import Progress
from gatelet_lab.language import Language, Text, decoding, load_language, perplexity, read_text

CHECKPOINTS = ("distil.pt", "output.pt")
"""Of the gaters, and of the weights."""
REQUEST, REPORT = "convert.json", "report.md"
NOT_IN_REQUEST = ("resume", "out")


@dataclass(frozen=True)
class Convert:
    """Convert a causal language model, fit its gates, calibrate them, and report what that cost and gave."""

    model: Positional[Path]
    """A Hugging Face directory, or a .gguf file."""
    text: Annotated[tuple[tuple[str, ...], ...], UseAppendAction]
    """Files to fit and to measure on, or globs of them; needed. Every fifth file is held out."""
    out: Path
    """Directory for the model and the report."""
    rate: float = 0.5
    """Share of units to be open."""
    spread: bool = False
    """Measure where the output suffers least from closed units, and close more there; the rate is then the mean."""
    gater: Literal["mlp", "two_stage", "self", "preview"] = "preview"
    """What opens the units: a network (mlp), one in two stages (two_stage), the block's own activation (self), or what
    the units add to its output (preview)."""
    weights: Literal["float32", "bf16", "int8"] = "float32"
    """How weights are kept to decode when that is measured; the model in OUT stays float32, the report says how."""
    bottleneck: int = 64
    """Width of the network's hidden layer."""
    where: str | None = None
    """Which blocks, a pattern of names; all by default."""
    steps: int = 200
    """Steps of fitting, at most."""
    fit_weights: bool = False
    """Then let the blocks' own weights learn, as many steps, towards the dense model's output."""
    tokens: int = 32768
    """Tokens to fit and calibrate on."""
    held_out: int = 8192
    """Tokens to measure perplexity on."""
    length: int = 256
    """Tokens in a window of text."""
    batch: int = 1
    """The report gives expected times for this many tokens at once."""
    resume: bool = False
    """Continue an interrupted run in OUT."""

    def __post_init__(self) -> None:
        for name in ("bottleneck", "steps", "tokens", "held_out", "batch"):
            gatelet._checks.check_count(getattr(self, name), name)
        gatelet._checks.check_rate(self.rate, "rate")
        if not any(self.text):
            raise ValueError("text: give files to fit and to measure on, as --text 'src/*.py'")
        if self.length < 8:
            raise ValueError(f"length: a window has at least 8 tokens, not {self.length}")
        if self.spread and self.where is not None:
            raise ValueError("spread: spreads the rate over all blocks; leave where out")


@dataclass
class Outcome:
    """What the report shows."""

    perplexity: dict[str, float]
    """Of the dense model and the one with gates; of both with their rows kept to decode, if the blocks allow it."""
    ms_per_token: dict[str, float]
    layers: Report
    errors: dict[str, tuple[float, float]]
    """Block -> held-out error of its output before and after the fitting."""


def run(options: Convert, console: Console) -> None:
    """Convert, fit, measure, save and report."""
    _check_out(options, console)
    language = load_language(options.model)
    patterns = [pattern for given in options.text for pattern in given]
    text = read_text(language.tokenizer, patterns, options.length, options.tokens, options.held_out)
    _begin_in_out(options)
    console.print(f"{text.fit.numel():,} tokens of {text.files[0]} files to fit, "
                  f"{text.held_out.numel():,} of {text.files[1]} held out", highlight=False)  # fmt: skip
    teacher = copy.deepcopy(language.model)
    choice: dict[str, Any] = {"where": options.where, "gater": options.gater, "batch": options.batch}
    rate = spread_rate(teacher, [text.fit[:2]], options.rate) if options.spread else options.rate
    console.print(repr(gatelet.convert(language.model, rate, options.bottleneck, **choice)), highlight=False)
    outcome = fit_and_measure(options, language, teacher, text, Progress())
    gatelet.save(language.model, options.out)
    language.tokenizer.save_pretrained(options.out)
    for name in CHECKPOINTS:
        (options.out / name).unlink(missing_ok=True)
    lines = table(options, outcome)
    (options.out / REPORT).write_text("\n".join(lines) + "\n")
    draw(outcome, options.out / "report.png")
    console.print("\n".join(lines), highlight=False, markup=False)
    console.print(f"model and report: {options.out}", highlight=False)


def fit(options: Convert, model: Any, teacher: Any, text: Text) -> Distillation:
    """Fit the gaters and calibrate; on request let the weights learn. Return the blocks' errors, of the gaters."""
    loader = _batches(text.fit)
    how: dict[str, Any] = {"steps": options.steps, "every": max(1, min(50, options.steps // 4))}
    how |= {"held_out": 1, "calibration": 1}
    first, second = (options.out / name for name in CHECKPOINTS)
    found = gatelet.distil(model, teacher, loader, checkpoint=first, **how)
    if options.fit_weights:
        learned = distil_output(model, teacher, loader, checkpoint=second, **how)
        found.errors |= learned.errors
        found.first_errors |= learned.first_errors
    return found


def _batches(windows: torch.Tensor) -> list[torch.Tensor]:
    """Return one batch of windows from all over the text, and the others in pairs.

    The first is to be held out and to set the thresholds: those of a single batch are found in one pass.
    """
    count = max(1, min(8, len(windows) // 4))
    chosen = torch.zeros(len(windows), dtype=torch.bool)
    chosen[torch.arange(count) * (len(windows) // count)] = True
    return [windows[chosen], *(pair for pair in windows[~chosen].split(2) if len(pair))]


def fit_and_measure(options: Convert, language: Language, teacher: Any, text: Text, progress: Progress) -> Outcome:
    """Distil, calibrate; return perplexity and speed of both models, and each block's numbers."""
    model = language.model
    found = fit(options, model, teacher, text)
    prompt = text.held_out[:1, :64]
    measured = {"dense": teacher, "gates": model}
    if any(gating.block.kind == "module" for _, gating in blocks(model).values()):
        measured["open"] = keep_rows(copy.deepcopy(teacher), options.weights, rest=True)
        measured["rows"] = keep_rows(copy.deepcopy(model), options.weights, rest=True)
    seen = {name: perplexity(each, text.held_out, progress.phase) for name, each in measured.items()}
    speeds = decoding(measured, prompt)
    layers = gatelet.report(model, prompt[:, : options.batch], seconds=0.05)
    errors = {name: (found.first_errors[name], error) for name, error in found.errors.items()}
    return Outcome(seen, speeds, layers, errors)


def _asked(options: Convert) -> dict[str, str]:
    return {name: str(value) for name, value in dataclasses.asdict(options).items() if name not in NOT_IN_REQUEST}


def _check_out(options: Convert, console: Console) -> None:
    """Look at what is in OUT: an interrupted run of something else, or nothing to go on from, is an error."""
    asked, path, report = _asked(options), options.out / REQUEST, options.out / REPORT
    saved = [options.out / name for name in CHECKPOINTS if (options.out / name).exists()]
    if saved and not options.resume:
        raise ValueError(f"out: an interrupted run left its checkpoint there; --resume, or remove {saved[0]}")
    if not options.resume:
        return
    if not path.exists():
        raise ValueError(f"resume: no run was begun in {options.out}")
    before = json.loads(path.read_text())
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        raise ValueError(f"{other[0]}: was {before.get(other[0])} and is {asked[other[0]]}; a resumed run keeps it")
    if report.exists() and not saved:
        raise ValueError(f"resume: the run in {options.out} has ended; its report is {report}")
    if not saved:
        console.print("nothing had been saved yet: it begins anew")


def _begin_in_out(options: Convert) -> None:
    """Note what was asked for, now that model and text are there."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / REPORT).unlink(missing_ok=True)
    (options.out / REQUEST).write_text(json.dumps(_asked(options), indent=1) + "\n")


def table(options: Convert, outcome: Outcome) -> list[str]:
    """Return the report's lines, Markdown."""
    dense, slow = outcome.perplexity["dense"], outcome.ms_per_token["dense"]
    names = {
        "open": f"all units open, rows kept to decode, {options.weights}",
        "gates": "with gates",
        "rows": f"with gates, rows kept to decode, {options.weights}",
    }
    threads = torch.get_num_threads()
    lines = [
        f"# {options.model.name}: gater {options.gater}, {options.rate:.0%} open{' on average' * options.spread}",
        "",
        f"| | perplexity | tokens/s, one at a time, {threads} thread{'s' * (threads > 1)} |",
        "|---|---|---|",
        f"| dense | {dense:.2f} | {1e3 / slow:.1f} |",
        *(
            f"| {names[key]} | {value:.2f} ({value / dense - 1:+.1%}) | {1e3 / outcome.ms_per_token[key]:.1f} "
            f"({slow / outcome.ms_per_token[key]:.2f} times) |"
            for key, value in outcome.perplexity.items()
            if key in names
        ),
        "",
        *_how_to_load(options, outcome),
        *_what_weights_learned(outcome),
        "",
        f"| block | open | error before | after | gater, of dense FLOPs | ms for {options.batch} | dense ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in outcome.layers.layers:
        before, after = outcome.errors.get(layer.name, (float("nan"), float("nan")))
        share = "–" if layer.open_share is None else f"{layer.open_share:.1%}"
        times = "– | –" if layer.ms is None or layer.dense_ms is None else f"{layer.ms:.3f} | {layer.dense_ms:.3f}"
        cost = layer.flops_gater / layer.flops_dense
        lines.append(f"| {layer.name} | {share} | {before:.4f} | {after:.4f} | {cost:.1%} | {times} |")
    speeds = outcome.ms_per_token
    if min(speeds[key] for key in ("gates", "rows") if key in speeds) >= min(slow, speeds.get("open", slow)):
        lines += ["", "The gates save no time here: with all units open it is as fast. See the times of the blocks."]
    return lines


def _how_to_load(options: Convert, outcome: Outcome) -> list[str]:
    """Say how the fastest of the models is made from what was saved."""
    if "rows" not in outcome.perplexity:
        return ["Its blocks are no modules of their own, so their rows cannot be kept to decode (`keep_rows`)."]
    made = f"keep_rows(gatelet.load({options.out.name!r}), {options.weights!r}, rest=True)"
    return [f"To decode: `from gatelet.convert import keep_rows; {made}`."]


def _what_weights_learned(outcome: Outcome) -> list[str]:
    if "output" not in outcome.errors:
        return []
    before, after = outcome.errors["output"]
    if not after < before:
        said = (
            f"The blocks' weights are as they were: no step came nearer to the dense model's output than {before:.4f}."
        )
    else:
        said = f"The blocks' weights were trained: divergence from the dense model's output {before:.4f} → {after:.4f}."
    return ["", said]


def draw(outcome: Outcome, path: Path) -> None:
    """Draw each block's time beside dense, and its open share."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [layer for layer in outcome.layers.layers if layer.ms is not None and layer.dense_ms is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    places = range(len(rows))
    left.plot(places, [layer.dense_ms or 0 for layer in rows], "o-", color="0.6", label="dense")
    left.plot(places, [layer.ms or 0 for layer in rows], "o-", label="with gates")
    left.set(xlabel="block", ylabel="ms", ylim=(0, None))
    left.legend(frameon=False)
    right.bar(places, [layer.open_share or 0 for layer in rows], color="tab:blue", alpha=0.5)
    right.set(xlabel="block", ylabel="open", ylim=(0, 1))
    beside = right.twinx()  # errors are far smaller than shares
    errors = [outcome.errors.get(layer.name, (0.0, 0.0))[1] for layer in rows]
    beside.plot(places, errors, "o-", color="tab:red", markersize=4)
    beside.set_ylim(0, None)
    beside.set_ylabel("held-out error", color="tab:red")
    for axes in (left, right, beside):
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
