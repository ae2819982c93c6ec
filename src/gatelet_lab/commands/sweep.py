"""`gatelet sweep`: search a recipe's numbers by validation error, with Optuna; trials get no test set."""

import json
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import optuna
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from gatelet._checks import check_choice, check_count
from gatelet_lab import data, table
from gatelet_lab.files import Location
from gatelet_lab.training.cluster import ClusterWorkers
from gatelet_lab.training.fit import Stopped, fit
from gatelet_lab.training.jobs import describe
from gatelet_lab.training.paper import Epoch, PaperTrainer
from gatelet_lab.training.recipe import DEFAULTS, Recipe
from gatelet_lab.training.recipes import Preset, recipe, rows
from gatelet_lab.training.settings import number, override, value
from gatelet_lab.training.together import TogetherWorkers, check, led, started, world
from gatelet_lab.training.workers import Link, Workers, check_device, failure

STORAGE = "sqlite:///runs/sweep.db"
HEARTBEAT, GRACE = 30, 300  # seconds; a trial that reports nothing for longer than GRACE counts as killed
RETRIES = 3  # of a trial that was killed
Show = Callable[[int, Epoch | None], None]
"""Takes a trial's number and an epoch of it, or None when it has ended."""
Space = Mapping[str, BaseDistribution]


@dataclass(frozen=True)
class Sweep:
    """Search a row's hyper-parameters by validation error; the same command again continues the search."""

    row: tyro.conf.Positional[str]
    """The row, by name."""
    preset: Preset = "quick"
    """The preset whose recipe to start from, with its epochs and schedule."""
    trials: int = 30
    """How many finished trials (complete or pruned) the study should have at the end, including other processes'."""
    epochs: int | None = None
    """Train each trial for at most this many epochs, instead of the recipe's number."""
    space: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=RANGE"), tyro.conf.UseAppendAction] = ()
    """What to search, instead of the row's own space: rate=0.03:1:log, gate_bias=-6:0, batch=32,64; may be repeated."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction] = ()
    """Fix a field of the recipe at this value; may be repeated."""
    seed: int = 0
    """Seed of every trial's training."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, digits (needs no download), or a directory of IDX files."""
    data_dir: Path | None = None
    """Where to look for the data set's files first (or the environment variable GATELET_DATA)."""
    device: str = "cpu"
    """Torch device to train on."""
    storage: str = STORAGE
    """Database of the study, as an SQLAlchemy URL; all processes and machines that name it work on one search."""
    study: str | None = None
    """The study's name in the database; by default made from row, preset and data set."""
    out: Location = Path("runs/sweep")
    """Directory (or fsspec URL) for the checkpoints of trials; machines that share it continue each other's trials."""
    scheduler: str | None = None
    """Train trials on the workers of this Dask scheduler (tcp://host:8786), which all see the output directory."""

    def load(self) -> data.Split:
        """Return the data without its test set."""
        return data.load(self.dataset, self.data_dir).without_test()

    @property
    def name(self) -> str:
        """The study's."""
        return self.study or f"{self.row}-{self.preset}-{Path(self.dataset).name}"


@led
def run(options: Sweep, console: Console) -> None:
    """Run trials until the study holds enough of them, then print the best settings."""
    base, space = plan(options)
    split = options.load()
    with ExitStack() as stack:
        workers: Workers | None = None
        check(options.scheduler)
        if started():
            workers = stack.enter_context(TogetherWorkers(world()))
        elif (url := options.scheduler) is not None:
            if isinstance(options.out, Path):
                options = replace(options, out=options.out.absolute())  # workers have other working directories
            cluster = ClusterWorkers(url, options.out, options.device, partial(describe, options))
            workers = stack.enter_context(cluster)
        storage = _storage(options.storage)
        stack.callback(storage.engine.dispose)  # a server counts open connections
        stack.callback(storage.remove_session)
        study = open_study(options, base, space, storage)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {options.out}: cannot be written ({error.strerror or error})") from error
        already = len(finished(study))
        console.print(f"study {study.study_name} in {options.storage}: {already} of {options.trials} trials are there")
        show = stack.enter_context(_display(options, study, base.optimiser.epochs, console))
        search = Search(options, base, space, study, split, show, console, workers)
        if workers is None:
            search.go()
        else:
            search.side_by_side(workers.places)
    report(options, study, console)


@dataclass(frozen=True)
class Search:
    """A search in progress: this process's share of its trials."""

    options: Sweep
    base: Recipe
    space: Space
    study: optuna.Study
    split: data.Split
    show: Show
    console: Console
    workers: Workers | None = None
    halt: threading.Event = field(default_factory=threading.Event)

    def go(self) -> None:
        """Run one trial after the other until the study holds enough."""
        while len(finished(self.study)) < self.options.trials and not self.halt.is_set():
            try:
                self.study.optimize(
                    self.objective, n_trials=1, callbacks=[lambda _, trial: self.show(trial.number, None)]
                )
            except ValueError as error:
                if "Cannot tell a" not in str(error):  # Optuna's message for a trial that has already ended otherwise
                    raise
                self.console.print(f"this process reported nothing for {GRACE} s, so another one continued its trial")

    def side_by_side(self, places: int) -> None:
        """Run as many trials at once, each followed by a thread."""
        with ThreadPoolExecutor(places) as pool:
            pending = {pool.submit(self.go) for _ in range(places)}
            try:
                while pending:
                    # A time limit, so that Ctrl-C is noticed on every platform.
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            finally:
                self.halt.set()

    def objective(self, trial: optuna.Trial) -> float:
        """Return the best validation error of a trial's settings; continue from its checkpoint if there is one."""
        settings = [f"{key}={_suggest(trial, key, each)}" for key, each in self.space.items()]
        trial.set_user_attr("settings", settings)
        recipe = override(self.base, settings)
        begun = _frozen(self.study, trial).system_attrs.get("failed_trial")  # the number that `retry` goes on with
        checkpoint = self.options.out / f"{self.options.name}-{trial.number if begun is None else begun}.pt"
        if begun is not None:
            how = "from its checkpoint" if checkpoint.is_file() else f"from its start: no checkpoint in {checkpoint}"
            self.console.print(f"trial {trial.number} goes on with trial {begun}, {how}")
        tell = partial(self.tell, trial)
        try:
            if self.workers is None:
                trainer = PaperTrainer(recipe, self.options.seed, self.split, self.options.device)
                found = train(trainer, checkpoint, tell)
            else:
                found = self.train_there(self.workers, f"{self.options.name}-{trial.number}", recipe, checkpoint, tell)
        except FloatingPointError as error:  # diverged: the worst error, so that it is not tried again
            trial.set_user_attr("diverged", str(error))
            checkpoint.unlink(missing_ok=True)
            raise optuna.TrialPruned(str(error)) from error
        except optuna.TrialPruned:
            checkpoint.unlink(missing_ok=True)
            raise
        except (KeyboardInterrupt, Stopped):  # the process that continues the search begins with this trial
            retry()(self.study, _frozen(self.study, trial))
            raise
        checkpoint.unlink(missing_ok=True)
        return found

    def tell(self, trial: optuna.Trial, row: Epoch) -> None:
        """Report an epoch of a trial, and stop it early if the other trials were better."""
        self.show(trial.number, row)
        trial.report(row.valid_error, row.epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    def train_there(
        self, workers: Workers, name: str, recipe: Recipe, checkpoint: Path, tell: Callable[[Epoch], None]
    ) -> float:
        """Train one trial on a worker. A worker that takes it over from a lost one reports all epochs again."""
        rows: queue.Queue[Epoch | None] = queue.Queue()
        future = workers.submit(name, rows.put, _work, recipe, self.options, checkpoint)
        told = 0

        def take(row: Epoch | None) -> None:
            nonlocal told
            if row is not None and row.epoch == told:
                told += 1
                tell(row)

        try:
            while not future.done():
                if self.halt.is_set():
                    raise Stopped
                try:
                    take(rows.get(timeout=0.2))
                except queue.Empty:
                    continue
            if (error := failure(future)) is not None:
                raise RuntimeError(why) if (why := workers.lost(error)) else error
            history, best = future.result()
            for row in history:
                take(row)
        finally:
            future.cancel()
        return float(best)


def _frozen(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[trial.number]


def _work(link: Link, recipe: Recipe, options: Sweep, checkpoint: Path) -> tuple[list[Epoch], float]:
    """Train one trial on a worker; return its epochs and the best validation error."""
    world = link.world
    trainer = PaperTrainer(recipe, options.seed, options.load(), world.device(options.device), world=world)
    best = train(trainer, checkpoint, link.tell, link.stopped)
    return trainer.history, best


def train(
    trainer: PaperTrainer,
    checkpoint: Path,
    tell: Callable[[Epoch], None],
    stopped: Callable[[], bool] = lambda: False,
) -> float:
    """Train from the checkpoint on, if there is one; return the best validation error. ``tell`` may raise to end it."""
    fit(trainer, checkpoint, tell, stopped)
    return trainer.best_error


def plan(options: Sweep) -> tuple[Recipe, Space]:
    """Check the options; return the recipe to start from and what to search."""
    check_choice(options.row, rows(options.preset), "row")
    check_count(options.trials, "--trials")
    if options.epochs is not None:
        check_count(options.epochs, "--epochs")
    if options.scheduler is None:  # else the workers must have it
        check_device(options.device)
    base = recipe(options.row, options.preset)
    if options.epochs is not None:
        base = base.but(epochs=options.epochs)
    base = override(base, options.settings)
    held = {setting.partition("=")[0] for setting in options.settings}
    texts = options.space or [text for text in default_space(base) if text.partition("=")[0] not in held]
    space: dict[str, BaseDistribution] = {}
    for text in texts:
        key, distribution = parse_range(text)
        if key in space or key in held:
            raise ValueError(f"--space {text}: names {key} twice")
        space[key] = distribution
        for end in _ends(distribution):  # the recipe's own checks come before hours of training
            override(base, [f"{key}={end}"])
    return base, space


def default_space(base: Recipe) -> list[str]:
    """Return the fields that matter most to a row and that the paper leaves open, in the form of ``--space``."""
    if base.optimiser.optimizer == "adamw":
        space = ["rate=0.0003:0.01:log", "weight_decay=0:0.1", "adversarial=0:2", "hidden_dropout=0:0.5"]
    else:
        space = ["rate=0.02:1:log", "momentum=0:0.9"]
        space += ["rate_decay=0.95:1" if base.optimiser.rate_decay > 0.95 else "rate_decay=0.6:0.99"]
        space += ["hidden_dropout=0:0.5"] if base.augmentation.hidden_dropout else []
    if base.optimiser.gater_rate != 1:
        space += ["gater_rate=0.001:1:log"]
    if base.sparsity.target_rate is not None:
        if base.optimiser.gater_max_norm is not None:
            space += ["gater_max_norm=1:10:log"]
        if base.sparsity.kl_weight is not None:
            space += [f"kl_weight={base.sparsity.kl_weight / 10:g}:{base.sparsity.kl_weight * 10:g}:log"]
        if base.gater.sparse_gates is None:
            space += ["gate_scale=1:30:log"] + (["gate_bias=-6:0"] if base.gater.gate_bias is not None else [])
    return space


def parse_range(text: str) -> tuple[str, BaseDistribution]:
    """Return the key and the distribution of ``key=low:high``, ``key=low:high:log`` or ``key=a,b,c``."""
    flag = f"--space {text}"
    key, sign, what = text.partition("=")
    if not sign or not what:
        raise ValueError(f"{flag}: must be key=low:high, key=low:high:log or key=a,b,c")
    option = key.startswith("options.")
    if ":" not in what:
        choices = what.split(",")
        if not option:
            for each in choices:
                value(key, each, "--space")
        return key, CategoricalDistribution(choices)
    low, high, *log = what.split(":")
    if log not in ([], ["log"]):
        raise ValueError(f"{flag}: after low:high only :log may follow")
    if not option:
        value(key, low, "--space")
    kind = float if option else number(key)
    if kind is None:
        raise ValueError(f"{flag}: {key} is not a number; list choices, as {key}=a,b")
    try:
        ends = kind(low), kind(high)
    except ValueError as error:
        raise ValueError(f"{flag}: the ends must be {kind.__name__}") from error
    if not ends[0] < ends[1]:
        raise ValueError(f"{flag}: the low end must be below the high end")
    if log and ends[0] <= 0:
        raise ValueError(f"{flag}: a logarithmic range must start above 0")
    return key, (IntDistribution if kind is int else FloatDistribution)(*ends, log=bool(log))


def _suggest(trial: optuna.Trial, key: str, each: BaseDistribution) -> str:
    """Return a trial's value as text, which is what it trains with and what is printed: four digits are enough."""
    if isinstance(each, FloatDistribution):
        return f"{trial.suggest_float(key, each.low, each.high, log=each.log):.4g}"
    if isinstance(each, IntDistribution):
        return str(trial.suggest_int(key, each.low, each.high, log=each.log))
    assert isinstance(each, CategoricalDistribution)
    return str(trial.suggest_categorical(key, each.choices))


def _ends(each: BaseDistribution) -> Sequence[Any]:
    if isinstance(each, FloatDistribution | IntDistribution):
        return each.low, each.high
    assert isinstance(each, CategoricalDistribution)
    return each.choices


def open_study(options: Sweep, base: Recipe, space: Space, storage: optuna.storages.RDBStorage) -> optuna.Study:
    """Make the study, or continue it if it is the same search."""
    name = options.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        make = partial(
            optuna.create_study,
            storage=storage,
            study_name=name,
            direction="minimize",
            sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=max(1, base.optimiser.epochs // 4)),
        )
        try:
            study, new = make(), True
        except optuna.exceptions.DuplicatedStudyError:
            study, new = make(load_if_exists=True), False
    wanted = _identity(options, base, space)
    if found := study.user_attrs.get("search"):
        found = DEFAULTS | found  # a field that an older study does not know had its default
        for key, now in wanted.items():
            if found.get(key) != now:
                raise ValueError(
                    f"study {name}: its {key} was {found.get(key)!r}, is {now!r}; name another study with --study"
                )
    study.set_user_attr("search", wanted)
    if new:  # the recipe itself comes first, so that the result is no worse
        study.enqueue_trial(
            {key: number for key, each in space.items() if (number := _own(base, key, each)) is not None}
        )
    return study


@cache
def retry() -> optuna.storages.RetryHeartbeatStaleTrialCallback:
    """Return the callback that queues an unfinished trial again."""
    return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Open the study's database; a process that begins a trial first queues silent ones again."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url == STORAGE:
        Path("runs").mkdir(exist_ok=True)
    # Processes take turns in an SQLite file; its default limit of 5 s is too short for a busy disk.
    waiting = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for left in reversed(range(5)):
            try:
                return optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=waiting,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=retry(),
                )
            except (SQLAlchemyError, ImportError, ValueError) as error:
                # Another process is making the same tables or rows; they will be there at the next attempt.
                made = isinstance(error, IntegrityError) or "already exists" in str(error)
                if not left or not made:
                    raise ValueError(f"--storage {url}: {str(error).splitlines()[0]}") from error
                time.sleep(1)
    raise AssertionError("the last attempt raises")


def _own(base: Recipe, key: str, each: BaseDistribution) -> Any:
    """Return the recipe's own value, None if it lies outside of the range."""
    own = base.model.options.get(key.removeprefix("options.")) if key.startswith("options.") else base.flat()[key]
    if isinstance(each, CategoricalDistribution):
        return str(own) if str(own) in each.choices else None
    assert isinstance(each, FloatDistribution | IntDistribution)
    return own if own is not None and each.low <= own <= each.high else None


def _identity(options: Sweep, base: Recipe, space: Space) -> dict[str, Any]:
    ranges = {key: optuna.distributions.distribution_to_json(each) for key, each in space.items()}
    own = {key: each for key, each in base.flat().items() if key != "title"}
    search = {"preset": options.preset, "dataset": options.dataset, "seed": options.seed, "space": ranges, **own}
    identity: dict[str, Any] = json.loads(json.dumps(search))
    return identity


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ran to their end or were pruned."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials, best first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (trial.value if trial.value is not None else 100.0, trial.number))


def report(options: Sweep, study: optuna.Study, console: Console) -> None:
    """Print the best trials, and the best one's settings as `gatelet reproduce` takes them."""
    best = ranked(study)
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    console.print(", ".join(f"{states.count(each)} {each.name.lower()}" for each in TrialState if each in states))
    if not best:
        console.print("no trial ran to its end: there is nothing to recommend")
        return
    keys = [setting.partition("=")[0] for setting in best[0].user_attrs["settings"]]
    body = [
        [str(trial.number), f"{trial.value:.2f}", *(each.partition("=")[2] for each in trial.user_attrs["settings"])]
        for trial in best[:5]
    ]
    console.print(table.grid("the best trials", ["trial", "valid %", *keys], body))
    settings = " ".join(f"--set {setting}" for setting in (*options.settings, *best[0].user_attrs["settings"]))
    epochs = f" --epochs {options.epochs}" if options.epochs is not None else ""
    console.print(
        f"gatelet reproduce --preset {options.preset} --rows {options.row}{epochs} {settings}",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _display(options: Sweep, study: optuna.Study, epochs: int, console: Console) -> Iterator[Show]:
    """Show the search's progress: bars in a terminal, a line per trial elsewhere. Yields a function to be told."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
    )
    trials = progress.add_task("trials", total=options.trials, completed=len(finished(study)), state="")
    epoch = progress.add_task("epochs", total=epochs, state="")

    def show(number: int, row: Epoch | None) -> None:
        if row is not None:
            progress.update(epoch, completed=row.epoch + 1, state=f"valid {row.valid_error:5.2f} %")
            return
        best = ranked(study)[:1]
        state = f"best {best[0].value:.2f} % (trial {best[0].number})" if best else ""
        progress.update(trials, completed=len(finished(study)), state=state)
        if not console.is_terminal:
            trial = study.get_trials(deepcopy=False)[number]
            reached = min(trial.intermediate_values.values(), default=100.0)
            console.print(
                f"trial {trial.number}: valid {reached:.2f} % ({trial.state.name.lower()}), {state}: "
                + " ".join(trial.user_attrs.get("settings", ())),
                highlight=False,
                soft_wrap=True,
            )

    with progress:
        yield show
