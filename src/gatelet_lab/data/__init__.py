"""Data sets for the experiments: MNIST, Fashion-MNIST, scikit-learn's digits, any directory of IDX files.

MNIST and Fashion-MNIST are looked for in a directory the user names, then in the cache, then on the network. What the
network gives is verified before it is kept. `load("digits")` needs no file.
"""

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gatelet_lab.data.idx import NAMES, Files, find, parse, read
from gatelet_lab.data.idx import DataError as DataError
from gatelet_lab.data.sources import MIRRORS, obtain


@dataclass(frozen=True, eq=False)  # tensors cannot be compared for equality by ==
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
        """A hash of all images and labels, which tells apart two data sets of the same name and sizes."""
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
    if isinstance(dataset, str) and dataset in MIRRORS:
        return _split(dataset, obtain(dataset, data_dir))
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        names = ", ".join([*MIRRORS, "digits"])
        raise DataError(f"dataset: {str(dataset)!r} is neither one of {names} nor a directory")
    paths = find(folder)
    if not paths:
        raise DataError(f"dataset: {folder} holds no IDX files (such as {NAMES['train-images']}.gz)")
    return _split(folder.resolve().name, {stem: (str(path), read(path)) for stem, path in paths.items()})


def _digits() -> Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # NumPy froze this generator's stream: the split is the same under every version.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = torch.from_numpy((bunch.data[order] / 16).astype(np.float32))
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    a, b = len(labels) * 3 // 5, len(labels) * 4 // 5
    return Split("digits", 10, images[:a], labels[:a], images[a:b], labels[a:b], images[b:], labels[b:])


def _split(name: str, files: Files) -> Split:
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


def _pair(files: Files, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    images = parse(*files[f"{part}-images"], dims=3)
    labels = parse(*files[f"{part}-labels"], dims=1)
    if len(images) != len(labels):
        origin = files[f"{part}-labels"][0]
        raise DataError(f"{origin}: {len(labels)} labels for the {len(images)} images beside it")
    return images, labels


def _tensors(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat /= 255
    return torch.from_numpy(flat), torch.from_numpy(labels.astype(np.int64))
