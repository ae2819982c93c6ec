"""The subcommands of `gatelet`, one file each.

A command is a module with ``run(options, console)``; the type of ``options`` is a frozen dataclass, whose fields and
their docstrings are the command line. To add a command, add a file here and a line in ``NAMES``.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

NAMES = (
    "reproduce",
    "sweep",
    "claims",
    "frontier",
    "convert",
    "diagnose",
    "train_vae",
    "train_sae",
    "bench_estimators",
    "bench_kernels",
    "bench_ffn",
)
"""The names of the files; an underscore separates the name of a group from the command's."""

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "train": "Train a binary-latent VAE, or a sparse autoencoder of a language model.",
        "bench": "Time estimators, the kernels that skip closed units, or a conditional feed-forward layer.",
    }
)
"""The groups' help texts."""


class Command(NamedTuple):
    """A subcommand: its name in words, the dataclass of its options, and its function."""

    words: tuple[str, ...]
    options: type
    run: Callable[[Any, Any], None]


def commands() -> list[Command]:
    """Import the files and return the commands, in the order of ``NAMES``."""
    found = []
    for name in NAMES:
        run = import_module(f"gatelet_lab.commands.{name}").run
        group, _, rest = name.partition("_")
        words = (group, rest) if group in GROUPS else (name,)
        found.append(Command(words, get_type_hints(run)["options"], run))
    return found
