"""Jobs on a Dask cluster: the checks of its workers before anything is trained, and the link to them."""

import platform
import queue
import time
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatelet_lab.training.paper import Epoch
from gatelet_lab.training.workers import Work, Workers, check_device
from gatelet_lab.training.world import ALONE

if TYPE_CHECKING:
    from distributed import Client

PATIENCE = 10.0  # seconds to wait for the scheduler's answer, and for a first worker


class ClusterWorkers(Workers):
    """The workers of a Dask cluster. A job whose worker is lost runs again on another, from its last checkpoint.

    Epochs arrive as events of a topic of this run. A job asks its own worker whether it is still wanted, so it ends
    when the process that wanted it has ended, for whatever reason.

    Args:
        url: the scheduler's, such as tcp://host:8786.
        out: the directory of the run, which every worker must be able to read and write.
        device: of torch, which every worker must have.
        data: describes the data set by its content; called on every worker.

    Raises:
        ValueError: if the scheduler is not reachable, has no workers, or one of them has another version of gatelet,
            torch or Python, runs several jobs in one process, does not see ``out``, lacks the device, or reads other
            data.
    """

    def __init__(self, url: str, out: Path, device: str, data: Callable[[], str]) -> None:
        self._client = connect(url)
        try:
            self._look_again = 0.0
            self._places = len(check_versions(self._client, url))
            _everywhere(self._client, url, check_device, device)
            check_data(self._client, url, data)
            check_out(self._client, url, out)  # last, because it writes
        except BaseException:
            self._client.close()
            raise
        self._topic = f"gatelet-{uuid.uuid4().hex}"
        events: queue.Queue[tuple[str, Epoch | None]] = queue.Queue()

        def hear(event: tuple[float, dict[str, Any]]) -> None:
            told = event[1]
            events.put((told["name"], None if told["row"] is None else Epoch(**told["row"])))

        self._client.subscribe_topic(self._topic, hear)
        self._pool = self._client.get_executor(pure=False)
        super().__init__(events)

    @property
    def places(self) -> int:
        """One per worker."""
        return self._places

    def _submit(self, name: str, work: Work, *args: Any) -> Future[Any]:
        future: Future[Any] = self._pool.submit(_run, self._topic, name, work, *args, key=f"{name}-{uuid.uuid4().hex}")
        return future

    def lost(self, error: BaseException) -> str | None:
        """Return a message if the scheduler is gone. A lost worker needs none: another takes its place."""
        if isinstance(error, CancelledError):
            return "--scheduler: the scheduler is gone; --resume continues"
        return None

    def trouble(self) -> str | None:
        """Return a message when the last worker is gone. It may be called often: it rarely asks the scheduler."""
        if time.monotonic() < self._look_again:
            return None
        self._look_again = time.monotonic() + PATIENCE
        before, self._places = self._places, len(self._client.scheduler_info(n_workers=-1)["workers"])
        return (
            "--scheduler: it has no workers any more; runs wait for new ones" if before and not self._places else None
        )

    def _stop(self) -> None:
        self._pool.shutdown(wait=False)
        self._client.close()


def connect(url: str) -> "Client":
    """Return a client of the scheduler."""
    try:
        import distributed
    except ImportError as error:
        raise ValueError(f"--scheduler: needs the extra packages of gatelet[cluster] ({error})") from error
    try:
        client = distributed.Client(url, timeout=PATIENCE, set_as_default=False, name="gatelet")
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--scheduler {url}: no scheduler answers there within {PATIENCE:g} s ({reason})") from error
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError as error:
        client.close()
        raise ValueError(f"--scheduler {url}: has no workers; start some: dask worker {url} --nthreads 1") from error
    return client


def _everywhere(client: "Client", url: str, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Return what the function returns on each worker, by the worker's address."""
    found: dict[str, Any] = client.run(function, *args, on_error="return")
    for worker, result in found.items():
        if isinstance(result, BaseException):
            raise ValueError(f"--scheduler {url}: worker {worker}: {result}") from result
    return found


def check_versions(client: "Client", url: str) -> list[str]:
    """Check that every worker has our versions and runs one job at a time; return their addresses."""
    workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
    for address, told in workers.items():
        if told["nthreads"] != 1:  # jobs use the random state of the process
            raise ValueError(
                f"--scheduler {url}: worker {address} runs {told['nthreads']} jobs in one process, which share its "
                "random numbers; start it with --nthreads 1 (and --nworkers for several)"
            )
    for name, ours in versions().items():
        ask = (platform.python_version,) if name == "python" else (version, name)
        for address, theirs in _everywhere(client, url, *ask).items():
            if _release(name, theirs) != ours:
                raise ValueError(
                    f"--scheduler {url}: worker {address} has {name} {_release(name, theirs)}, and here is {ours}; "
                    "runs of one table must be of one version"
                )
    return list(workers)


def versions() -> dict[str, str]:
    """Return the versions that must be the same everywhere."""
    found = {"gatelet": version("gatelet"), "torch": version("torch"), "python": platform.python_version()}
    return {name: _release(name, each) for name, each in found.items()}


def _release(name: str, text: str) -> str:
    """Return a version without the kind of its build (+cpu), of Python without its last part."""
    return ".".join(text.split(".")[:2]) if name == "python" else text.partition("+")[0]


def check_out(client: "Client", url: str, out: Path) -> None:
    """Check that every worker reads what is written here, and can write."""
    probe, token, new = out / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex, not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_text(token)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    try:
        for address, found in _everywhere(client, url, _read_probe, probe).items():
            if found != token:
                raise ValueError(
                    f"--out {out}: worker {address} does not see it as this process does ({found}); name a directory "
                    "that all machines share, or an fsspec URL"
                )
    except ValueError:
        probe.unlink(missing_ok=True)
        if new:
            out.rmdir()
        raise
    probe.unlink(missing_ok=True)


def _read_probe(probe: Path) -> str:
    try:
        token = probe.read_text()
        own = probe.with_name(f"{probe.name}-{uuid.uuid4().hex}")
        own.write_text(token)
        own.unlink()
    except Exception as error:  # whatever error the file system raises
        return f"{type(error).__name__}: {error}"
    return token


def check_data(client: "Client", url: str, data: Callable[[], str]) -> None:
    """Check that every worker reads the data that is read here."""
    ours = data()
    for address, theirs in _everywhere(client, url, data).items():
        if theirs != ours:
            raise ValueError(f"--scheduler {url}: worker {address} reads {theirs}, and here is {ours}")


class _Topic:
    """The link of a job on a Dask worker."""

    world = ALONE

    def __init__(self, topic: str, name: str) -> None:
        from distributed import get_worker

        self._worker, self._topic, self._name = get_worker(), topic, name
        self._key = self._worker.get_current_task()

    def tell(self, row: Epoch | None) -> None:
        self._worker.log_event(self._topic, {"name": self._name, "row": None if row is None else asdict(row)})

    def stopped(self) -> bool:
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state not in ("executing", "long-running")


def _run(topic: str, name: str, work: Work, *args: Any) -> Any:
    return work(_Topic(topic, name), *args)
