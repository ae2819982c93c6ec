"""A language model's residual activations on some text: collected once, kept on disk, read in shuffled order.

A cache is a directory: ``cache.json`` (what it holds, and how many contexts are done), ``tokens.npy`` (contexts ×
length) and ``activations.bin``, bfloat16, a row per token but each context's first. Collecting appends a block of
contexts and then raises the count, so it can be interrupted anywhere.

At the first token and at a few others, where models put unused attention, a row is a hundred times longer than the rest
and alone has more variance than a thousand of them. Rows longer than ``LONG`` medians are left out: when a cache is
opened, each is replaced by the row before it.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatelet_lab.data import DataError
from gatelet_lab.files import write_atomically, write_json

VERSION = 1
SKIPPED = 1
"""First tokens of a context that give no row."""
LONG = 10.0
"""Rows longer than this many medians are left out."""
_BLOCK = 32
_SHUFFLED = 256
"""Neighbouring rows that are read together; a buffer mixes many such runs."""


class Reached(Exception):  # noqa: N818
    """The layer has been computed; what lies above it is not needed."""


@dataclass(frozen=True)
class Source:
    """A causal language model of transformers and its tokenizer.

    Attributes:
        fingerprint: SHA-256 of the files the weights were read from.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return int(self.model.config.hidden_size)

    def block(self, layer: int) -> nn.Module:
        """Return the block after which the residual stream is taken: the ``layer``-th, counted from 1."""
        depth = int(self.model.config.num_hidden_layers)
        lists = [
            module
            for module in self.model.base_model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        ]
        if not 1 <= layer <= depth:
            raise ValueError(f"--layer {layer}: {self.name} has the layers 1 to {depth}")
        if len(lists) != 1:
            raise ValueError(f"--model: {self.name} has no single list of its {depth} layers")
        return lists[0][layer - 1]

    @torch.no_grad()
    def residual(self, tokens: Tensor, layer: int) -> Tensor:
        """Return the residual stream after a layer, (contexts, length, D), computing no further."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise Reached

        handle = self.block(layer).register_forward_hook(stop)
        try:
            self.model(tokens, use_cache=False)
        except Reached:
            pass
        finally:
            handle.remove()
        return found[0]


def load_model(path: Path, precision: str = "float32") -> Source:
    """Return the model of a directory of transformers, or of a GGUF file, to run in this dtype.

    Raises:
        ValueError: naming ``--model``, if there is none there or a package is missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"--model: loading a language model needs the package transformers ({error})") from error
    if not path.exists():
        raise ValueError(f"--model {path}: there is no such file or directory")
    single = path.is_file()
    where: dict[str, Any] = {"gguf_file": path.name} if single else {}
    folder = str(path.parent if single else path)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, precision), local_files_only=True, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        told = str(error).strip().splitlines()
        raise ValueError(f"--model {path}: cannot be loaded ({told[0] if told else type(error).__name__})") from error
    files = [path] if single else sorted(file for end in ("*.safetensors", "*.bin") for file in path.glob(end))
    return Source(model.eval(), tokenizer, path.name, _hash_files(files))


def _hash_files(files: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


@dataclass(frozen=True)
class Text:
    """Files of text, of which some are held out."""

    training: tuple[Path, ...]
    held_out: tuple[Path, ...]


def find_text(patterns: Sequence[str], held_out: Sequence[str], every: int = 20) -> Text:
    """Return the files that patterns name; held out are those of the second patterns, or every 20th file.

    A file that is reached twice counts once, and none that equals a held-out one is trained on.

    Raises:
        ValueError: naming the option, if a pattern names nothing or nothing is left to train on.
    """
    files = _matching(patterns, "--text")
    kept = set(_matching(held_out, "--held-out")) if held_out else set(files[every - 1 :: every]) or set(files[-1:])
    known = {hashlib.sha256(file.read_bytes()).digest() for file in kept}
    training = tuple(file for file in files if hashlib.sha256(file.read_bytes()).digest() not in known)
    if not training:
        raise ValueError("--text: names no file beside the held-out ones")
    return Text(training, tuple(sorted(kept)))


def _matching(patterns: Sequence[str], option: str) -> list[Path]:
    files: set[Path] = set()
    for pattern in patterns:
        found = {Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
        if not found:
            raise ValueError(f"{option} {pattern}: matches no file")
        files |= found
    return sorted({file.resolve(): file for file in sorted(files, reverse=True)}.values())


def contexts(source: Source, files: Sequence[Path], length: int, count: int, seed: int | None) -> Tensor:
    """Return ``count`` contexts of tokens (count, length): the files in random order (or theirs), end to end.

    Raises:
        ValueError: if the text is too short for one context.
    """
    order = torch.arange(len(files))
    if seed is not None:
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    between = source.tokenizer.eos_token_id
    tokens: list[int] = []
    for index in order.tolist():
        if len(tokens) >= count * length:
            break
        text = files[index].read_text(encoding="utf-8", errors="replace")
        tokens += [*source.tokenizer(text, verbose=False)["input_ids"], *([] if between is None else [between])]
    whole = min(count, len(tokens) // length)
    if whole < 1:
        raise ValueError(f"--text: {len(tokens)} tokens are too short a text for one context of {length}")
    return torch.tensor(tokens[: whole * length], dtype=torch.int64).view(whole, length)


# -------------------------------------------------------------------- the cache


class Cache:
    """Activations on disk. ``rows[i]`` belongs to token ``SKIPPED + i % (length − SKIPPED)`` of its context."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / "cache.json").read_text())
        self.identity: dict[str, Any] = told["identity"]
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
        self.width, self.done = int(told["width"]), int(told["done"])
        size = self.done * (self.tokens.shape[1] - SKIPPED) * self.width
        flat = torch.from_file(str(folder / "activations.bin"), shared=False, size=size, dtype=torch.bfloat16)
        self.rows = flat.view(-1, self.width)  # in memory of this process's own: the file stays as it is
        self.limit = LONG * torch.linalg.vector_norm(self.sample(4096), dim=1).median().item()
        lengths = torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in self.rows.split(1 << 16)])
        self.long = (lengths > self.limit).nonzero().squeeze(1)
        for index in self.long.tolist():
            self.rows[index] = self.rows[index - 1] if index else 0

    def sample(self, count: int) -> Tensor:
        """Return about ``count`` rows from all over the text, float32."""
        return self.rows[:: max(1, len(self.rows) // count)].float()

    def batches(self, batch: int, seed: int, start: int = 0, buffer: int = 1 << 17) -> Iterator[Tensor]:
        """Yield batches without end, from batch number ``start`` on, each row at most once per pass over the text.

        A buffer holds runs of neighbouring rows from all over the text and gives its rows in random order. What a
        batch holds follows from the seed and its number alone. Runs that do not fill a buffer are left out of that
        pass; which ones changes from pass to pass.
        """
        runs = len(self.rows) // _SHUFFLED
        if runs * _SHUFFLED < batch:
            raise ValueError(f"--batch {batch}: the text gives only {len(self.rows)} activations")
        per_buffer = max(1, min(runs, max(buffer, batch) // _SHUFFLED))
        size = per_buffer * _SHUFFLED // batch
        per_pass = runs // per_buffer * size
        while True:
            turn, within = divmod(start, per_pass)
            part, first = divmod(within, size)
            order = torch.randperm(runs, generator=torch.Generator().manual_seed(seed * 7919 + turn))
            mine = order[part * per_buffer : (part + 1) * per_buffer]
            held = self.rows.view(-1)[: runs * _SHUFFLED * self.width].view(runs, _SHUFFLED, self.width)[mine]
            held = held.view(-1, self.width)
            draw = torch.Generator().manual_seed((seed * 7919 + turn) * 104729 + part)
            mixed = torch.randperm(len(held), generator=draw)
            for index in range(first, size):
                yield held[mixed[index * batch : (index + 1) * batch]].float()
            start += size - first


def collect(
    source: Source,
    tokens: Tensor,
    layer: int,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Cache:
    """Fill the cache with what is missing of these contexts and open it.

    Raises:
        DataError: if it holds the activations of another model, layer or text, or cannot be read.
        RuntimeError: if the model gives NaN or infinity; the blocks before stay.
    """
    source.block(layer)
    identity = {
        "version": VERSION,
        "model": source.fingerprint,
        "precision": str(source.model.dtype),
        "layer": layer,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "contexts": list(tokens.shape),
    }
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder, identity)
    if done == 0:
        write_atomically(folder / "tokens.npy", lambda file: np.save(file, tokens.numpy()))
    path, bytes_each = folder / "activations.bin", (tokens.shape[1] - SKIPPED) * source.width * 2
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(done * bytes_each)  # a block that was cut short
        file.seek(done * bytes_each)
        for part in tokens[done:].split(_BLOCK) if done < len(tokens) else ():
            rows = source.residual(part, layer)[:, SKIPPED:]
            if not rows.isfinite().all():
                raise RuntimeError(
                    f"layer {layer} of {source.name} gives NaN or infinity at context {done}; those before are kept"
                )
            file.write(rows.bfloat16().contiguous().view(torch.int16).numpy().tobytes())
            file.flush()
            done += len(part)
            write_json(folder / "cache.json", {"identity": identity, "width": source.width, "done": done})
            progress(done, len(tokens))
    return Cache(folder)


def _done(folder: Path, identity: dict[str, Any]) -> int:
    """Return how many contexts of this identity the cache holds."""
    if not (folder / "cache.json").is_file():
        if any(folder.iterdir()) and not (folder / "tokens.npy").is_file():
            raise DataError(f"--cache {folder}: is not empty and no cache of activations; name another directory")
        return 0
    try:
        told = json.loads((folder / "cache.json").read_text())
        found, done = told["identity"], int(told["done"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"--cache {folder}: cannot be read ({error}); remove it, or name another") from error
    differing = [key for key, value in identity.items() if found.get(key) != value]
    if differing:
        raise DataError(
            f"--cache {folder}: holds activations of another {', '.join(differing)}; remove it, or name another"
        )
    return done
