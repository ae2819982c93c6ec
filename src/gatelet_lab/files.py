"""Files that are written whole or not at all, and are checked for damage when they are read."""

import errno
import json
import os
import uuid
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro


class CheckpointError(Exception):
    """A file of results or a checkpoint is unreadable, or of another version, recipe or data set."""


def location(text: str) -> Path:
    """Return a path, or for an fsspec URL (s3://bucket/runs) an object with the methods of a path.

    Raises:
        ValueError: if the URL's kind is unknown, needs a package that is missing, or is visible to one process alone.
    """
    if "://" not in text:
        return Path(text)
    kind = text.partition("://")[0]
    if kind == "memory":
        raise ValueError(f"{text}: is in the memory of one process; name a place that every worker can read")
    try:
        from upath import UPath

        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of kinds that UPath cannot send to workers
            place = UPath(text)
            _ = place.fs  # loads the package of this kind
    except (ImportError, ValueError, UserWarning) as error:
        raise ValueError(
            f"{text}: cannot be used ({error}); URLs need gatelet[cluster] and fsspec's package"
        ) from error
    return cast(Path, place)  # not a Path by type, but it has all methods used here


Location = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda texts: location(texts[0]),
        is_instance=lambda value: hasattr(value, "iterdir"),
        str_from_instance=lambda place: [str(place)],
    ),
]


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Let ``write`` fill a file that appears whole or not at all, even if several processes write to the same path.

    Raises:
        OSError: if it cannot be written; it says whether the previous file is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # two writers must not share one
    try:
        with temporary.open("wb") as file:
            write(file)
            if isinstance(path, Path):
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path) if isinstance(path, Path) else temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # When the disk is full torch.save raises RuntimeError, sometimes with the system's error as its cause.
        if not isinstance(error, OSError) and not (isinstance(error, RuntimeError) and "writ" in str(error)):
            raise
        kept = "the last good file is still there" if path.exists() else "there was none before"
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(number, f"{reason}; {path} was not written, {kept}") from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that appears whole or not at all."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {json.dumps(found)[:40]}, not an object with results; remove the file")
    return found


def read_tensors(path: Path, device: torch.device | str) -> Any:
    """Return what ``torch.save`` wrote, after comparing its checksums, which ``torch.load`` does not look at."""
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as records:
                damaged = records.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} does not have its checksum")
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})") from error
