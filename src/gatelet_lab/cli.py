"""The command line: the commands of `gatelet_lab.commands`. A user's error is shown as one line, not as a traceback."""

import io
import operator
import os
import sys
from dataclasses import make_dataclass
from functools import reduce
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

from gatelet_lab.commands import GROUPS, Command, commands

if TYPE_CHECKING:
    from rich.console import Console

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tensorboard's noise


def main() -> None:
    """Run the command; a user's error is shown as one line, not as a traceback."""
    try:
        import tyro
        from rich.console import Console
    except ImportError as error:
        sys.exit(f"gatelet: the command line needs the extra packages of gatelet[lab] ({error})")
    from gatelet_lab.data import DataError
    from gatelet_lab.files import CheckpointError

    if sys.argv[1:] == ["--version"]:
        print(version("gatelet"))
        return
    known = commands()
    run = {each.options: each.run for each in known}
    console = _console()
    options: Any = None
    try:
        options = tyro.cli(
            _tree(known),
            prog="gatelet",
            description="gatelet: networks that decide which of their units to compute.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        options = options if type(options) in run else options.command
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not hasattr(run[type(options)], "several"):
            raise ValueError("torchrun: this command is for one process; start it without torchrun")
        run[type(options)](options, console)
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError, DataError, CheckpointError) as error:
        Console(stderr=True, emoji=False).print(f"gatelet: {error}", style="bold red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        goes_on = ""  # measurements begin anew
        if hasattr(options, "resume"):
            goes_on = "; the same command with --resume continues"
        elif hasattr(options, "storage"):  # a study in a database
            goes_on = "; the same command continues"
        Console(stderr=True).print(f"interrupted{goes_on}")
        sys.exit(130)


def _tree(known: list[Command]) -> Any:
    """Return the commands as a union of types, each group of commands a dataclass of one field."""
    from tyro.conf import subcommand

    def union(found: list[Command]) -> Any:
        return reduce(operator.or_, (Annotated[each.options, subcommand(each.words[-1])] for each in found))

    groups = []
    for name, says in GROUPS.items():
        own = [each for each in known if each.words[0] == name]
        made = make_dataclass(name.title(), [("command", union(own))], frozen=True, namespace={"__doc__": says})
        groups.append(Annotated[made, subcommand(name)])
    return reduce(operator.or_, groups, union([each for each in known if len(each.words) == 1]))


def _console() -> "Console":
    """Return the console; a character that a terminal cannot show must not end a long run."""
    from rich.console import Console

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    console = Console(markup=False, emoji=False)  # a path may hold brackets, and a setting :b:
    # a file has no width
    return console if console.is_terminal else Console(width=120, markup=False, emoji=False)


if __name__ == "__main__":
    main()
