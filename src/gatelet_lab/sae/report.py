"""How good a trained autoencoder is, which contexts open its latents, and the page that shows both."""

import html
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatelet.nn import SparseAutoencoder
from gatelet_lab.files import write_atomically, write_json
from gatelet_lab.sae.activations import SKIPPED, Cache, Source

_CONTEXTS = 8  # run through the model at once
_ROWS = 100_000  # of the training text, searched for the strongest contexts
_STRONGEST, _AROUND = 6, 12


@torch.no_grad()
def measure(sae: SparseAutoencoder, source: Source, layer: int, held: Cache) -> dict[str, Any]:
    """Return explained variance, L0 and the share of latents never open on held-out text, and the loss recovered.

    The loss recovered is (L₀ − L) / (L₀ − L*): L* the model's cross-entropy, L with the reconstruction in place of the
    layer's activations, L₀ with zeros there. A context's first token keeps its activations, and so do tokens whose
    activations are so long that no cache holds them.
    """
    rows, parts = held.rows, [part.float() for part in held.rows.split(4096)]
    mean = torch.stack([part.sum(0) for part in parts]).sum(0) / len(rows)
    spread = sum((part - mean).square().sum().item() for part in parts)
    left, l0, opened = 0.0, 0.0, torch.zeros(sae.d_sae, dtype=torch.bool)
    for part in parts:
        code = sae.encode(part)
        left += (sae.decode(code) - part).square().sum().item()
        l0 += code.l0.sum().item()
        opened |= code.opened()

    def reconstructed(x: Tensor) -> Tensor:
        found: Tensor = sae(x.float()).to(x.dtype)
        return found

    changes = (None, torch.zeros_like, reconstructed)
    clean, zero, spliced = losses(source, layer, held.tokens[: held.done], held.limit, changes)
    return {
        "explained": 1 - left / spread,
        "l0": l0 / len(rows),
        "closed_on_held_out": 1 - opened.float().mean().item(),
        "held_out_tokens": len(rows),
        "loss": clean,
        "loss_zero": zero,
        "loss_spliced": spliced,
        "loss_recovered": (zero - spliced) / (zero - clean),
    }


Change = Callable[[Tensor], Tensor]
"""Takes a layer's activations (contexts, length − SKIPPED, D) and returns their replacement."""


@torch.no_grad()
def losses(source: Source, layer: int, tokens: Tensor, limit: float, changes: Sequence[Change | None]) -> list[float]:
    """Return the model's mean cross-entropy with each of these changes of a layer's activations, None for none."""
    found = []
    for change in changes:
        total, count = 0.0, 0

        def replace(module: nn.Module, args: Any, output: Any, change: Any = change) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            rest = stream[:, SKIPPED:]
            long = torch.linalg.vector_norm(rest.float(), dim=-1, keepdim=True) > limit
            stream = torch.cat([stream[:, :SKIPPED], torch.where(long, rest, change(rest))], 1)
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        handle = None if change is None else source.block(layer).register_forward_hook(replace)
        try:
            for part in tokens.split(_CONTEXTS):
                logits = source.model(part, use_cache=False).logits[:, :-1].float()
                total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
                count += part[:, 1:].numel()
        finally:
            if handle is not None:
                handle.remove()
        found.append(total / count)
    return found


def in_turn(rows: Tensor) -> Change:
    """Return a change that puts these rows (contexts, length − SKIPPED, D) in place, in the order of the contexts."""
    parts = iter(rows.split(_CONTEXTS))
    return lambda x: next(parts).to(x.dtype)


@torch.no_grad()
def contexts(sae: SparseAutoencoder, source: Source, cache: Cache, shown: int) -> tuple[list[float], list[Any]]:
    """Return how often each latent opens, and for some of them their strongest contexts.

    Shown are latents that open at least ``_STRONGEST`` times, spread evenly over the ranks of their frequency.
    """
    length = cache.tokens.shape[1] - SKIPPED
    picked = torch.linspace(0, cache.done - 1, min(cache.done, max(1, _ROWS // length))).long()
    examples, latents, values = [], [], []
    for start in range(0, len(picked), _CONTEXTS):
        part = picked[start : start + _CONTEXTS]
        rows = cache.rows.view(cache.done, length, cache.width)[part].flatten(0, 1).float()
        code = sae.encode(rows)
        kept = code.values.flatten() > 0
        examples.append((code.lists().examples() + start * length)[kept].int())
        latents.append(code.indices.flatten()[kept].int())
        values.append(code.values.flatten()[kept])
    example, latent, value = torch.cat(examples), torch.cat(latents), torch.cat(values)
    counts = torch.bincount(latent, minlength=sae.d_sae)
    order = latent.argsort(stable=True)
    ends = counts.cumsum(0)
    able = (counts >= _STRONGEST).nonzero().squeeze(1)
    able = able[counts[able].argsort(descending=True)]
    chosen = able[torch.linspace(0, max(0, len(able) - 1), min(shown, len(able))).long()] if len(able) else able
    seen = Seen(source, cache.tokens[picked], len(picked) * length)
    told = []
    for index in chosen.tolist():
        mine = order[int(ends[index] - counts[index]) : int(ends[index])]
        told.append(
            {"id": index, "frequency": counts[index].item() / seen.rows} | seen.told(example[mine], value[mine])
        )
    return (counts / seen.rows).tolist(), told


class Seen:
    """The text that was searched: tokens as words, and windows of them around strong activations."""

    def __init__(self, source: Source, tokens: Tensor, rows: int) -> None:
        self.tokenizer, self.tokens, self.rows = source.tokenizer, tokens, rows
        self.words: dict[int, str] = {}

    def word(self, token: int) -> str:
        """Return a token as text."""
        if token not in self.words:
            self.words[token] = self.tokenizer.decode([token])
        return self.words[token]

    def told(self, rows: Tensor, values: Tensor) -> dict[str, Any]:
        """Return the strongest value and windows of tokens with the latent's value at each."""
        length = self.tokens.shape[1]
        place = dict(zip(rows.tolist(), values.tolist(), strict=True))
        windows: list[dict[str, Any]] = []
        used = set()
        for at in values.argsort(descending=True).tolist():
            context, position = divmod(int(rows[at]), length - SKIPPED)
            position += SKIPPED
            if (context, position // _AROUND) in used:
                continue  # a window of the same sentence shows nothing new
            used.add((context, position // _AROUND))
            span = range(max(0, position - _AROUND), min(length, position + _AROUND + 1))
            words = [self.word(int(self.tokens[context, i])) for i in span]
            if words in (window["tokens"] for window in windows):
                continue  # the same sentence of another file
            row = context * (length - SKIPPED) - SKIPPED
            strong = [round(place.get(row + i, 0.0), 3) if i >= SKIPPED else 0.0 for i in span]
            windows.append({"tokens": words, "values": strong, "peak": position - span.start})
            if len(windows) == _STRONGEST:
                break
        return {"strongest": round(float(values.max()), 3), "contexts": windows}


# -------------------------------------------------------------------- files


def write(out: Path, found: dict[str, Any]) -> None:
    """Write ``report.json``, ``report.html``, ``curves.png`` and ``histogram.png``."""
    write_json(out / "report.json", {key: value for key, value in found.items() if key != "latents"})
    write_atomically(out / "report.html", lambda file: file.write(page(found).encode()))
    draw(out, found)


def page(found: dict[str, Any]) -> str:
    """Return the page: one file that needs no other, and no network."""
    counts, edges = histogram(found["frequencies"])
    told = {key: value for key, value in found.items() if key != "frequencies"}
    told["histogram"] = {"counts": counts, "edges": edges, "never": sum(each == 0 for each in found["frequencies"])}
    data = json.dumps(told, ensure_ascii=False).replace("</", "<\\/")
    settings = found["settings"]
    title = f"{settings['latents']:,} latents of layer {settings['layer']} of {Path(settings['model']).name}"
    text = files("gatelet_lab.sae").joinpath("page.html").read_text(encoding="utf-8")
    return text.replace("{{title}}", html.escape(title)).replace("{{data}}", data)


def histogram(frequencies: list[float]) -> tuple[list[int], list[float]]:
    """Return how many latents open how often: counts between edges, powers of ten of the share of tokens."""
    some = np.asarray([each for each in frequencies if each > 0])
    counts, edges = np.histogram(np.log10(some) if len(some) else some, bins=30, range=(-5.5, 0))
    return counts.tolist(), edges.tolist()


def draw(out: Path, found: dict[str, Any]) -> None:
    """Draw the curves and the histogram as PNGs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    history = found["history"]
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    names = {"explained": "explained variance", "l0": "open latents (L0)", "dead": "dead latents", "loss": "loss"}
    for axes, (key, name) in zip(panels, names.items(), strict=True):
        axes.plot([row["tokens"] for row in history], [row[key] for row in history], marker=".")
        axes.set(xlabel="tokens", title=name)
        axes.grid(alpha=0.3)
    write_atomically(out / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
    counts, edges = histogram(found["frequencies"])
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.stairs(counts, edges, fill=True)
    axes.set(xlabel="share of tokens that open a latent (power of ten)", ylabel="latents")
    write_atomically(out / "histogram.png", lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)
