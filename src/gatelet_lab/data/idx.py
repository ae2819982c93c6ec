"""The four IDX files of a data set like MNIST: finding them in a folder, reading and parsing them."""

import gzip
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

# The names of the four files, without ".gz".
NAMES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}

MOST_BYTES = 1 << 33
"""Most bytes of a decompressed file, whatever its header promises."""


class DataError(Exception):
    """A data set is missing, damaged, or not what its name says."""


# Files come as (where from, decompressed content), so that every complaint can name its file.
Files = Mapping[str, tuple[str, bytes]]


def find(folder: Path) -> dict[str, Path]:
    """Return the four IDX files of a folder, or {} if it has none of them; if it has only some, that is an error."""
    found = {}
    for stem, usual in NAMES.items():
        dotted = usual.replace("-idx", ".idx")
        candidates = (folder / name for name in (usual, f"{usual}.gz", dotted, f"{dotted}.gz"))
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            found[stem] = path
    missing = [usual for stem, usual in NAMES.items() if stem not in found]
    if found and missing:
        raise DataError(f"{folder}: incomplete, lacks {', '.join(missing)} (also looked for .gz)")
    return found


def read(path: Path) -> bytes:
    """Return the decompressed content of a file."""
    try:
        blob = path.read_bytes()
        return gunzip(blob) if path.suffix == ".gz" else blob
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def gunzip(blob: bytes) -> bytes:
    """Decompress an IDX file, up to one byte more than its header promises, so that excess is noticed."""
    with gzip.GzipFile(fileobj=io.BytesIO(blob)) as file:
        head = file.read(4)
        sizes = file.read(4 * head[3]) if len(head) == 4 and head[3] <= 4 else b""
        promised = math.prod(np.frombuffer(sizes, ">u4").tolist()) if sizes and len(sizes) % 4 == 0 else 0
        return head + sizes + file.read(min(promised, MOST_BYTES) + 1)


def parse(origin: str, raw: bytes, dims: int) -> npt.NDArray[np.uint8]:
    """Return the array in an IDX file of unsigned bytes with ``dims`` dimensions; errors name the ``origin``."""
    header = 4 + 4 * dims
    expected = 0x0800 + dims  # 08 means uint8
    magic = int.from_bytes(raw[:4], "big")
    if len(raw) >= 4 and magic != expected:
        raise DataError(f"{origin}: magic number 0x{magic:08x}, not 0x{expected:08x} (uint8, {dims}-dimensional)")
    if len(raw) < header:
        raise DataError(f"{origin}: truncated: {len(raw)} bytes do not even hold the header of {header}")
    shape = [int(n) for n in np.frombuffer(raw, ">u4", count=dims, offset=4)]
    promised = header + math.prod(shape)
    if len(raw) != promised:
        state = "truncated" if len(raw) < promised else "too long"
        raise DataError(f"{origin}: {state}: {len(raw)} bytes, its header promises {promised}")
    if promised == header:
        raise DataError(f"{origin}: empty (shape {tuple(shape)})")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
