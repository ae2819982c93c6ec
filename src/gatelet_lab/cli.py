"""The command line. A command is a frozen dataclass; its options follow from the fields."""

import os
import sys
from importlib.metadata import version

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard's noise


def main() -> None:
    """Run the command; errors of the user's making end in one line, not in a traceback."""
    try:
        import tyro
        from rich.console import Console
    except ImportError as error:
        sys.exit(f"gatelet: the command line needs the extra packages of gatelet[lab] ({error})")
    from gatelet_lab import reproduce
    from gatelet_lab.data import DataError

    if sys.argv[1:] == ["--version"]:
        print(version("gatelet"))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width of its own
    app = tyro.extras.SubcommandApp()

    @app.command(name="reproduce")
    def _reproduce(options: tyro.conf.OmitArgPrefixes[reproduce.Reproduce]) -> None:
        reproduce.run(options, console)

    try:
        app.cli(prog="gatelet", description="gatelet: networks that decide which of their units to compute.")
    except (ValueError, OSError, RuntimeError, DataError, reproduce.CheckpointError) as error:
        Console(stderr=True).print(f"gatelet: {error}", style="bold red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command with --resume continues")
        sys.exit(130)
