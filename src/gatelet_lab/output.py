"""The output directory of a run: free, or with --resume that of the same run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatelet_lab.files import read_json, write_json

_RUN = "run.json"


def check_output(out: Path, resume: bool, identity: Mapping[str, Any]) -> None:
    """Check that the directory is free, or with ``resume`` that it holds the run of this identity.

    Raises:
        ValueError: if it is neither; it names --out.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: exists and is not a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not resume:
        raise ValueError(f"--out {out}: is not empty; continue it with --resume, or name another directory")
    if not (out / _RUN).is_file():
        raise ValueError(f"--out {out}: is not the output of this command; name another directory")
    found = read_json(out / _RUN)
    for key, value in identity.items():
        before, now = (None if each == "" else each for each in (found.get(key), value))
        if before != now:
            told = ["nothing" if each is None else each for each in (before, now)]
            raise ValueError(f"--out {out}: holds a run of {key} {told[0]}, not {told[1]}; name another directory")


def make_output(out: Path, identity: Mapping[str, Any], *folders: str) -> None:
    """Make the directory and its folders, and note in it which run it holds."""
    try:
        for folder in folders:
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_json(out / _RUN, identity)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror or error})") from error
