"""Language models for the command line and the example: loading, text, perplexity, speed of decoding."""

import glob
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Language:
    """A model of transformers and its tokenizer."""

    model: Any
    tokenizer: Any


def load_language(path: Path) -> Language:
    """Return the causal language model in a Hugging Face directory or a GGUF file, in float32 and ``eval()``.

    Where there is no terminal, transformers' progress bars are off from then on: they would fill a log.

    Raises:
        ValueError: for a path that holds none, or a GGUF file of an architecture that transformers does not know.
        ImportError: without transformers (for a GGUF file: gguf).
    """
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if not path.exists():
        raise ValueError(f"model: {path} does not exist")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"model: {path} is neither a Hugging Face directory nor a .gguf file")
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = str(path.parent if path.is_file() else path)
    if path.is_dir():
        import gatelet.convert.hugging_face  # noqa: F401  (so that a converted model can be converted again)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"model: transformers cannot load {path}: {error}") from error
    return Language(model.eval(), tokenizer)


@dataclass(frozen=True)
class Text:
    """Windows of tokens, of disjoint files."""

    fit: Tensor
    """(windows, length), to fit gates and thresholds."""
    held_out: Tensor
    """(windows, length), to measure perplexity."""
    files: tuple[int, int]


def read_text(
    tokenizer: Any, patterns: Sequence[str], length: int, fit: int, held_out: int, most_per_file: int = 4096
) -> Text:
    """Return up to ``fit`` and ``held_out`` tokens of the files, in windows; every fifth file is held out.

    Raises:
        ValueError: if the patterns name fewer than two files, or their text yields no window of tokens.
    """
    files = sorted(
        {name for pattern in patterns for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
    )
    if len(files) < 2:
        raise ValueError(f"text: {' '.join(patterns)} names {len(files)} files; two are needed, one to hold out")
    random.Random(0).shuffle(files)
    kept: dict[bool, list[int]] = {True: [], False: []}
    wanted, used = {True: held_out, False: fit}, {True: 0, False: 0}
    for index, name in enumerate(files):
        role = index % 5 == 0
        if len(kept[role]) < wanted[role]:
            text = Path(name).read_text(encoding="utf-8", errors="ignore")[: 8 * most_per_file]
            kept[role] += tokenizer(text).input_ids[:most_per_file]
            used[role] += 1
    windows = {}
    for role, tokens in kept.items():
        count = min(len(tokens), wanted[role]) // length
        if not count:
            raise ValueError(
                f"text: the files {'held out' if role else 'to fit'} yield {len(tokens)} tokens, "
                f"not one window of {length}"
            )
        windows[role] = torch.tensor(tokens[: count * length]).view(count, length)
    return Text(windows[False], windows[True], (used[False], used[True]))


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, show: Callable[..., Any] = lambda name, items: items) -> float:
    """Return exp of the mean cross-entropy of the next token over all windows."""
    total = 0.0
    for window in show("perplexity", windows.split(1)):
        logits = model(window).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


class Decoder:
    """Decodes greedily, one token at a time, and times each token."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.times: list[float] = []

    @torch.no_grad()
    def turn(self, new: int) -> None:
        """Read the prompt, then decode this many tokens."""
        out = self.model(self.prompt, use_cache=True)
        for _ in range(new):
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            begin = time.perf_counter()
            out = self.model(token, past_key_values=cache, use_cache=True)
            self.times.append(time.perf_counter() - begin)

    def milliseconds(self) -> float:
        """Return the median over all tokens."""
        return 1e3 * statistics.median(self.times)


def decoding(models: dict[str, nn.Module], prompt: Tensor, new: int = 32, turns: int = 4) -> dict[str, float]:
    """Return milliseconds per token of each model: medians over turns, after a first turn that fills the caches."""
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    for turn in range(turns + 1):
        for decoder in decoders.values():
            if turn == 1:
                decoder.times.clear()
            decoder.turn(2 if turn == 0 else new)
    return {name: decoder.milliseconds() for name, decoder in decoders.items()}
