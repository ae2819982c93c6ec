"""The command line. A command is a frozen dataclass; its options follow from the fields."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard's noise


def main() -> None:
    """Run the command; errors of the user's making end in one line, not in a traceback."""
    try:
        import tyro
        from rich.console import Console
    except ImportError as error:
        sys.exit(f"gatelet: the command line needs the extra packages of gatelet[lab] ({error})")
    from gatelet_lab import (
        bench_estimators,
        bench_ffn,
        bench_kernels,
        claims,
        convert,
        diagnose,
        frontier,
        reproduce,
        sweep,
        vae,
    )
    from gatelet_lab.data import DataError
    from gatelet_lab.files import CheckpointError
    from gatelet_lab.sae import command as sae

    if sys.argv[1:] == ["--version"]:
        print(version("gatelet"))
        return
    named = tyro.conf.subcommand

    @dataclass(frozen=True)
    class Train:
        """Train a binary-latent VAE, or a sparse autoencoder of a language model."""

        subject: Annotated[vae.TrainVAE, named("vae")] | Annotated[sae.TrainSAE, named("sae")]

    @dataclass(frozen=True)
    class Bench:
        """Time estimators, the kernels that skip closed units, or a conditional feed-forward layer."""

        subject: (
            Annotated[bench_estimators.BenchEstimators, named("estimators")]
            | Annotated[bench_kernels.BenchKernels, named("kernels")]
            | Annotated[bench_ffn.BenchFFN, named("ffn")]
        )

    run: dict[type, Callable[[Any, Console], None]] = {
        reproduce.Reproduce: reproduce.run,
        sweep.Sweep: sweep.run,
        claims.Claims: claims.run,
        frontier.Frontier: frontier.run,
        convert.Convert: convert.run,
        diagnose.Diagnose: diagnose.run,
        vae.TrainVAE: vae.run,
        sae.TrainSAE: sae.run,
        bench_estimators.BenchEstimators: bench_estimators.run,
        bench_kernels.BenchKernels: bench_kernels.run,
        bench_ffn.BenchFFN: bench_ffn.run,
    }
    command = (
        Annotated[reproduce.Reproduce, named("reproduce")]
        | Annotated[sweep.Sweep, named("sweep")]
        | Annotated[claims.Claims, named("claims")]
        | Annotated[frontier.Frontier, named("frontier")]
        | Annotated[convert.Convert, named("convert")]
        | Annotated[diagnose.Diagnose, named("diagnose")]
        | Annotated[Train, named("train")]
        | Annotated[Bench, named("bench")]
    )
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show must not end a run of hours
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    console = Console(markup=False)  # a path may hold brackets
    if not console.is_terminal:
        console = Console(width=120, markup=False)  # a file has no width of its own
    try:
        options: Any = tyro.cli(
            command,
            prog="gatelet",
            description="gatelet: networks that decide which of their units to compute.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        options = options.subject if isinstance(options, Bench | Train) else options
        run[type(options)](options, console)
    except (ValueError, OSError, RuntimeError, OverflowError, MemoryError, DataError, CheckpointError) as error:
        Console(stderr=True).print(f"gatelet: {error}", style="bold red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        how = " with --resume" if hasattr(options, "resume") else ""
        Console(stderr=True).print(f"interrupted; the same command{how} continues")
        sys.exit(130)
