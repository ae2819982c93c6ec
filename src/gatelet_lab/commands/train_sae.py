"""`gatelet train sae`: its options, and the steps from text to page."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gatelet._checks import check_count, check_positive
from gatelet.nn import SparseAutoencoder
from gatelet_lab.output import check_output, make_output
from gatelet_lab.sae import activations, report
from gatelet_lab.sae.training import Row, SAETrainer
from gatelet_lab.training.fit import fit
from gatelet_lab.training.together import join, several


@dataclass(frozen=True)
class TrainSAE:
    """Train a sparse autoencoder on a language model's residual stream, and write a page that shows its latents."""

    model: Path
    """A causal language model: a directory of transformers, or a GGUF file."""
    layer: int
    """Take the residual stream after this layer, counted from 1."""
    text: tuple[str, ...]
    """Patterns of text files to train on, such as 'docs/**/*.txt'."""
    held_out: tuple[str, ...] = ()
    """Patterns of the files to test on; by default every 20th of the text's."""
    latents: int = 32768
    """Latents of the autoencoder."""
    k: int = 32
    """Open latents per token."""
    activation: Literal["top_k", "batch_top_k", "jump_relu", "relu", "gated"] = "top_k"
    """Which latents open."""
    sparsity: float | None = None
    """Weight of the sparsity penalty, for the last three activations; by default the layer's own."""
    groups: int = 1
    """Groups of latents, of which a router opens some (top_k only)."""
    open_groups: int = 1
    """Groups that are open per token."""
    tokens: int = 4_000_000
    """Tokens to train on; if the text has fewer, it is read again."""
    collect: int = 1_000_000
    """Collect the activations of at most this many tokens."""
    context: int = 256
    """Tokens that the model reads at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The model's number format."""
    batch: int = 1024
    """Tokens per step."""
    rate: float = 2e-3
    """Adam's learning rate."""
    warm_up: int = 100
    """Steps over which the learning rate and the sparsity penalty grow to their values."""
    dead_after: int = 500_000
    """A latent counts as dead if none of the last this many tokens opened it."""
    seed: int = 0
    """Seed of the autoencoder's first weights and of the order of the text."""
    every: int = 50
    """Steps between two rows of the log; a checkpoint is kept at each."""
    test: int = 8192
    """Held-out tokens to test on."""
    shown: int = 300
    """Latents on the page."""
    cache: Path | None = None
    """Directory of the activations; by default in the output directory."""
    out: Path = Path("runs/sae")
    """Directory for page, report, autoencoder, logs and checkpoints."""
    resume: bool = False
    """Continue what is in the output directory; --tokens may be larger."""


FREE = ("tokens", "every", "test", "shown", "cache", "out", "resume")
"""Options in which a continued run may differ."""


@several
def run(options: TrainSAE, console: Console) -> None:
    """Collect, train, test, and write the page."""
    check(options)
    with join("cpu") as world:
        if options.batch % world.size:
            raise ValueError(f"--batch {options.batch}: must be a multiple of the {world.size} processes")
        quiet = not world.first
        say = Console(quiet=True) if quiet else console
        if not quiet:
            check_output(options.out, options.resume, identity(options))
        source = activations.load_model(options.model, options.precision)
        source.block(options.layer)
        text = activations.find_text(options.text, options.held_out)
        if not quiet:
            make_output(options.out, identity(options), "checkpoints")
        cache, held = collect(options, source, text, say, quiet)
        trainer = SAETrainer(options, cache, world)
        train(trainer, options, say)
        if not quiet:
            finish(options, source, text, trainer, cache, held, say)


def check(options: TrainSAE) -> None:
    """Raise for impossible options, before anything is loaded."""
    counts = ("layer", "latents", "k", "groups", "open_groups", "tokens", "collect", "batch", "every", "test", "shown")
    for name in (*counts, "dead_after"):
        check_count(getattr(options, name), f"--{name.replace('_', '-')}")
    check_positive(options.rate, "--rate")
    if options.warm_up < 0:
        raise ValueError(f"--warm-up must be at least 0, not {options.warm_up}")
    if check_count(options.context, "--context") <= activations.SKIPPED:
        raise ValueError(f"--context must be more than {activations.SKIPPED}: the first token gives no activation")
    if options.k > options.latents:
        raise ValueError(f"--k {options.k}: more than the {options.latents} latents")
    SparseAutoencoder(
        1, options.latents, options.activation, options.k, groups=options.groups, open_groups=options.open_groups
    )


def identity(options: TrainSAE) -> dict[str, Any]:
    """Return what must be the same for an output directory to be continued."""
    told = {key: value for key, value in asdict(options).items() if key not in FREE}
    told |= {"model": str(options.model), "text": list(options.text), "held_out": list(options.held_out)}
    return {"command": "train sae", "version": version("gatelet"), **told}


def collect(
    options: TrainSAE, source: activations.Source, text: activations.Text, console: Console, waits: bool
) -> tuple[activations.Cache, activations.Cache]:
    """Return the activations to train and to test on; the first process collects what is missing."""
    folder = options.cache or options.out / "activations"
    found = []
    for name, files, count, seed in (
        ("training", text.training, options.collect, options.seed),
        ("held-out", text.held_out, options.test, None),
    ):
        where = folder / name
        if not waits:
            tokens = activations.contexts(source, files, options.context, -(-count // options.context), seed)
            with bar(f"activations, {name}", len(tokens), console) as step:
                activations.collect(source, tokens, options.layer, where, step)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        found.append(activations.Cache(where))
    return found[0], found[1]


def train(trainer: SAETrainer, options: TrainSAE, console: Console) -> None:
    """Train to the end, with a row, a checkpoint and a line of TensorBoard every few steps."""
    if trainer.total < 1:
        raise ValueError(f"--tokens {options.tokens}: are less than a --batch of {options.batch}")
    with tensorboard(options, trainer) as log, bar("training", trainer.total, console) as show:

        def take(row: Row) -> None:
            show(row.step, told(row))
            if trainer.world.first:
                for key, value in asdict(row).items():
                    log.add_scalar(key, value, row.step)

        fit(trainer, options.out / "checkpoints" / "sae.pt", take)


def told(row: Row) -> str:
    """Return a row in words."""
    return f"loss {row.loss:.1f}, explained {row.explained:.3f}, L0 {row.l0:.1f}, dead {row.dead}"


def tensorboard(options: TrainSAE, trainer: SAETrainer) -> Any:
    """Return a writer of TensorBoard's logs, in the first process only."""
    if not trainer.world.first:
        return nullcontext()
    from torch.utils.tensorboard.writer import SummaryWriter

    # the rows of a checkpoint are reported again
    return SummaryWriter(options.out / "tensorboard", purge_step=0)


@contextmanager
def bar(name: str, total: int, console: Console) -> Iterator[Any]:
    """Show progress: a bar in a terminal, a line every half minute elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    rest = (TextColumn("{task.fields[state]}"), TimeRemainingColumn(compact=True))
    shown = console.is_terminal and not console.quiet
    last = -math.inf
    with Progress(*columns, *rest, console=console, disable=not shown) as progress:
        task = progress.add_task(name, total=total, state="")

        def step(done: int, state: object) -> None:
            nonlocal last
            progress.update(task, completed=done, state=state if isinstance(state, str) else "")
            if not shown and (time.monotonic() - last > 30 or done == total):
                last = time.monotonic()
                console.print(
                    f"{name}: {done} of {total}{', ' + state if isinstance(state, str) else ''}", highlight=False
                )

        yield step


def finish(
    options: TrainSAE,
    source: activations.Source,
    text: activations.Text,
    trainer: SAETrainer,
    cache: activations.Cache,
    held: activations.Cache,
    console: Console,
) -> None:
    """Test the autoencoder, save it in SAELens' format, and write report, pictures and page."""
    sae = trainer.sae.eval()
    console.print("testing on the held-out text, and looking for what opens the latents", highlight=False)
    name = f"blocks.{options.layer - 1}.hook_resid_post"
    sae.save_sae_lens(options.out / "sae", {"model_name": source.name, "hook_name": name})
    found = report.measure(sae, source, options.layer, held)
    found |= {"settings": identity(options), "tokens": trainer.steps * options.batch, "seconds": trainer.seconds}
    found |= {"collected": len(cache.rows), "held_out_files": [str(file) for file in text.held_out]}
    found |= {"history": [asdict(row) for row in trainer.history], "dead": sae.dead}
    found["frequencies"], found["latents"] = report.contexts(sae, source, cache, options.shown)
    report.write(options.out, found)
    console.print(
        f"explained variance {found['explained']:.3f}, L0 {found['l0']:.1f}, loss recovered "
        f"{found['loss_recovered']:.3f}, dead latents {found['dead']} of {options.latents}; "
        f"look at {options.out / 'report.html'}",
        highlight=False,
    )
