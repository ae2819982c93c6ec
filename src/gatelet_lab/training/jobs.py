"""Training several recipes with several seeds side by side in worker processes, resumable, with a display."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gatelet._checks import check_count
from gatelet_lab import data, plots
from gatelet_lab.files import CheckpointError, Location, read_json, read_tensors, write_atomically, write_json
from gatelet_lab.output import check_output, make_output
from gatelet_lab.training import together
from gatelet_lab.training.fit import fit
from gatelet_lab.training.model import Ensemble, PaperNet, build
from gatelet_lab.training.paper import Epoch, PaperTrainer
from gatelet_lab.training.recipe import DEFAULTS, Recipe
from gatelet_lab.training.recipes import teacher
from gatelet_lab.training.workers import Link, LocalWorkers, Workers, check_device, cores, failure
from gatelet_lab.training.world import ALONE, World


@dataclass(frozen=True)
class Run:
    """The options of every command that trains jobs."""

    dataset: str = "mnist"
    """mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """Where to look for the data set's files first (or the environment variable GATELET_DATA)."""
    device: str = "cpu"
    """Torch device to train on."""
    out: Location = Path("runs/reproduce")
    """Directory for the table, the plots, the logs and the checkpoints, or an fsspec URL."""
    resume: bool = False
    """Continue what is in the output directory; finished runs are kept."""
    jobs: int | None = None
    """Runs trained side by side; by default one per core, or one on an accelerator."""
    scheduler: str | None = None
    """Train on the workers of this Dask scheduler (tcp://host:8786), which all see the output directory."""

    keeps_weights: ClassVar[bool] = False
    measures_here: ClassVar[bool] = False  # something on the device, in the process of the command itself

    def identity(self) -> dict[str, str]:
        """Return what must be the same for an output directory to be continued."""
        raise NotImplementedError

    def load(self) -> data.Split:
        """Return the data."""
        return data.load(self.dataset, self.data_dir)


@dataclass(frozen=True)
class Job:
    """One recipe with one seed."""

    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """The stem of the job's files."""
        return f"{self.recipe.row}-seed{self.seed}"

    @property
    def cost(self) -> int:
        """Multiply-adds, up to a constant; the longest jobs start first."""
        return self.recipe.optimiser.epochs * self.recipe.model.experts * self.recipe.model.members


def train(
    options: Run,
    jobs: Sequence[Job],
    console: Console,
    finish: Callable[[list[dict[str, Any]]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Train what is missing and return all results, in the jobs' order; call ``finish`` with the results so far."""
    options = _checked(options)
    check_output(options.out, options.resume, options.identity())
    split = options.load()  # fetched once, before the workers need it
    if options.scheduler is not None:
        with open_workers(options, 1):
            """Its checks come before anything is written."""
    make_output(options.out, options.identity(), "rows", "checkpoints")
    console.print(
        f"{split.name}: {len(split.train_labels)} / {len(split.valid_labels)} / {len(split.test_labels)} examples, "
        f"{len(jobs)} runs, output in {options.out}"
    )
    finished = {job.name: result for job in jobs if (result := read_result(options.out, job)) is not None}
    open_jobs = sorted((job for job in jobs if job.name not in finished), key=lambda job: -job.cost)
    teachers = {each.name: each for job in open_jobs if (each := teacher_of(job.recipe)) is not None}
    before = [job for job in teachers.values() if read_result(options.out, job) is None]
    if finished:
        console.print(f"{len(finished)} of them were finished before")

    def take(job: Job, result: dict[str, Any]) -> None:
        finished[job.name] = result
        finish([finished[each.name] for each in jobs if each.name in finished])

    if before:
        console.print(f"first {', '.join(job.name for job in before)}, which others learn from")
        train_all(options, before, console, lambda job, result: None)
    if open_jobs:
        train_all(options, open_jobs, console, take)
    return [finished[job.name] for job in jobs]


def _checked(options: Run) -> Run:
    """Check what can be checked without data; return the options as workers in other directories need them."""
    if options.jobs is not None:
        check_count(options.jobs, "--jobs")
        if options.scheduler is not None:
            raise ValueError("--jobs: with --scheduler the number of runs at once is that of its workers; leave it out")
    together.check(options.scheduler, options.jobs)
    if options.scheduler is None or options.measures_here:
        check_device(options.device)
    if options.scheduler is not None and isinstance(options.out, Path):
        return replace(options, out=options.out.absolute())
    return options


def read_result(out: Path, job: Job) -> dict[str, Any] | None:
    """Return the finished result of a job, None if there is none."""
    path = out / "rows" / f"{job.name}.json"
    if not path.is_file():
        return None
    result = read_json(path)
    wanted = json.loads(json.dumps(job.recipe.flat()))
    if not isinstance(result.get("config"), dict):
        raise CheckpointError(f"{path}: holds no result of a run; remove the file")
    found = DEFAULTS | result["config"]  # a field that an older result lacks had its default
    differing = [key for key in result["config"] | DEFAULTS if key in wanted and found[key] != wanted[key]]
    if differing:
        raise CheckpointError(
            f"{path}: was trained with another "
            + ", ".join(f"{key} ({found[key]}, not {wanted[key]})" for key in differing)
            + "; name another --out, or remove the file"
        )
    return result


# -------------------------------------------------------------------- the workers


def _work(link: Link, job: Job, options: Run) -> dict[str, Any]:
    """Train one job to its end in a worker process, with a checkpoint after every epoch; return its result."""
    world, split = link.world, options.load()
    device = world.device(options.device)
    teacher = read_teacher(options, job.recipe, split, world)
    trainer = PaperTrainer(job.recipe, job.seed, split, device, teacher, world)
    checkpoint = options.out / "checkpoints" / f"{job.name}.pt"
    with tensorboard(options.out / "tensorboard" / job.name, world) as note:

        def show(row: Epoch) -> None:
            note(row)
            link.tell(row)

        fit(trainer, checkpoint, show, link.stopped)
    link.tell(None)
    result = trainer.result()
    result["history"] = [asdict(row) for row in trainer.history]
    if world.first:
        _write(trainer, options, job, result)
        checkpoint.unlink(missing_ok=True)  # 30 MB that are no longer needed
    return result


def _write(trainer: PaperTrainer, options: Run, job: Job, result: dict[str, Any]) -> None:
    """Write a job's files; the result comes last, since it marks the job as finished."""
    if job.recipe.gated:
        by_class, result["probabilities"] = trainer.gates()
        plots.save_gates(by_class, options.out / "rows" / f"{job.name}.gates.npy")
    if options.keeps_weights or job.recipe.row == teacher.__name__:
        write_atomically(weights_file(options.out, job), lambda file: torch.save(trainer.best, file))
    write_json(options.out / "rows" / f"{job.name}.json", result)


@contextmanager
def tensorboard(folder: Path, world: World) -> Iterator[Callable[[Epoch], None]]:
    """Yield what notes an epoch in TensorBoard's log, by the first process; a checkpoint's epochs are noted again."""
    if not world.first:
        yield lambda row: None
        return
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(folder), purge_step=0) as log:

        def note(row: Epoch) -> None:
            for key, value in asdict(row).items():
                log.add_scalar(key, value, row.epoch)

        yield note


def teacher_of(recipe: Recipe) -> Job | None:
    """Return the run whose network a recipe learns from. It trains on the same images, to keep validation fair."""
    if not recipe.augmentation.teacher_share:
        return None
    return Job(teacher().but(more_training=recipe.optimiser.more_training), 0)


def read_teacher(options: Run, recipe: Recipe, split: data.Split, world: World = ALONE) -> PaperNet | Ensemble | None:
    """Return the trained network that a recipe learns from; the first process reads it."""
    job = teacher_of(recipe)
    if job is None:
        return None
    network = build(job.recipe, split.train_images.shape[1], split.classes).to(world.device(options.device))
    weights = read_tensors(weights_file(options.out, job), "cpu") if world.first else None
    network.load_state_dict(world.from_first(weights))
    return network.eval()


def weights_file(out: Path, job: Job) -> Path:
    """Return where a job's best weights are kept, for a command that needs them again."""
    return out / "rows" / f"{job.name}.weights.pt"


class Loads(Protocol):
    """What has data."""

    def load(self) -> data.Split:
        """Return the data."""


def describe(options: Loads) -> str:
    """Return which data set it is, by its content."""
    split = options.load()
    return f"{split.name} (content {split.content[:12]})"


def open_workers(options: Run, most: int) -> Workers:
    """Return the workers that the options ask for, at most ``most`` on this machine."""
    if together.started():
        return together.TogetherWorkers(together.world())
    if options.scheduler is not None:
        from gatelet_lab.training.cluster import ClusterWorkers

        return ClusterWorkers(options.scheduler, options.out, options.device, partial(describe, options))
    return LocalWorkers(min(options.jobs or (cores() if options.device == "cpu" else 1), most))


def train_all(options: Run, jobs: list[Job], console: Console, finish: Callable[[Job, dict[str, Any]], None]) -> None:
    """Train the jobs in worker processes, and call ``finish`` with each one's result."""
    failures: list[str] = []
    with _display(jobs, console) as show, open_workers(options, len(jobs)) as workers:
        pending: dict[Future[dict[str, Any]], Job] = {
            workers.submit(job.name, partial(show, job.name), _work, job, options): job for job in jobs
        }
        while pending:
            if (trouble := workers.trouble()) is not None:
                console.print(trouble)
            # A time limit, so that Ctrl-C is noticed on every platform.
            for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                if (error := failure(future)) is None:
                    finish(job, future.result())
                elif (why := workers.lost(error)) is not None:
                    raise RuntimeError(why)
                else:  # the other rows go on
                    failures.append(f"{job.name}: {error}")
    if failures:
        raise RuntimeError("runs that failed, all others are finished: " + "; ".join(failures))


@contextmanager
def _display(jobs: list[Job], console: Console) -> Iterator[Callable[[str, Epoch | None], None]]:
    """Show every job's progress: bars in a terminal, a line per epoch elsewhere. Yields a function to be told."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {
        job.name: progress.add_task(job.name, total=job.recipe.optimiser.epochs, state="waits", start=False)
        for job in jobs
    }

    def show(name: str, row: Epoch | None) -> None:
        if row is None:  # stopped early: the bar ends where the run did
            if console.is_terminal:
                progress.update(tasks[name], total=progress.tasks[tasks[name]].completed)
            return
        state = f"valid {row.valid_error:5.2f} %  open {100 * row.open_valid:5.1f} %  {row.seconds:4.1f} s/epoch"
        if not console.is_terminal:
            console.print(f"{name}: epoch {row.epoch + 1}: {state}", highlight=False, soft_wrap=True)
            return
        if row.epoch == 0:
            progress.start_task(tasks[name])
        progress.update(tasks[name], completed=row.epoch + 1, state=state)

    with progress:
        yield show
