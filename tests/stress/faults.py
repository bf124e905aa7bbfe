"""What can go wrong while a network trains, done on purpose: `python tests/stress/faults.py` does it all and prints a table.

A run is a process of its own, forked from one that has imported everything. A `Plan` says what happens to it at which
point; points have names, such as "last.safetensors: half written" or "batch 2.1". A row of the table is a function that
has a short form too, for tests/stress/test_faults.py.
"""

import errno
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from multiprocessing import forkserver, get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import train
import utils.data.cache
import utils.system.files
import utils.training.batch_size
import utils.training.run_folder
from nets.spec import ModelSpec
from tests.conftest import small_run
from tools import make_demo_data
from utils.data.augment import epoch_order
from utils.data.image_io import read_image, write_image
from utils.data.loader import Batches
from utils.system.cli import run_script
from utils.system.errors import UserError
from utils.system.signals import Stopped
from utils.training.run_folder import RunLog
from utils.training.trainer import Progress, Trainer
from utils.weights.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpoint,
    digest,
    is_resumable,
    load_checkpoint,
    load_last,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
DONE, MISTAKE, INTERRUPTED, TERMINATED = 0, 2, 130, 143  # exit codes
NOBODY = 65534  # a user without rights
LIMIT = 10  # seconds that a signal may take
TIMEOUT = 120  # seconds that a run may take
WORKERS = 2  # runs at a time, of one thread each
SAVING = (  # what writing a file whole or not at all is made of, in this order
    "opened", "half written", "written", "fsync", "fsynced", "rename", "renamed", "folder fsync", "folder fsynced",
)  # fmt: skip
KEEPING = ("keep the one before", "kept the one before")  # between fsynced and rename
Item, Result = TypeVar("Item"), TypeVar("Result")


class NotHere(Exception):
    """This machine does not allow this fault."""


@dataclass(frozen=True)
class Plan:
    """What goes wrong in a run."""

    at: str = ""  # the point
    nth: int = 1  # which time that the run comes there
    action: str = ""  # kill, full, wait, SIGTERM or SIGINT
    bad: dict[tuple[int, int], str] = field(default_factory=dict)  # epoch and batch: what is not finite there
    left_out: tuple[tuple[int, int], ...] = ()  # epoch and batch that are left out from the start
    broken: str = ""  # what raises: add_scalar, draw_training, write_image or decode
    pictures: bool = False  # with TensorBoard, curves and pictures, which take time
    user: int = 0  # whose rights the run has


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int  # exit code, or minus the signal that killed it
    out: str
    err: str
    points: list[str]
    left_after: float  # seconds from the signal to the end

    def expect(self, code: int, *words: str) -> "Outcome":
        """Raise AssertionError unless it ended so, said these words, and what went wrong in at most one sentence."""
        said = f"\n{self.out}\n{self.err}"
        assert self.code == code, f"exit code {self.code}, not {code}{said}"
        assert "Traceback" not in self.err, said
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == MISTAKE), said
        for word in words:
            assert word in self.out + self.err, f"{word!r} was not said{said}"
        return self


# --- within a run ---


class Faults:
    """Carries out a plan in the process that it is made in."""

    def __init__(self, plan: Plan, points: Path) -> None:
        self.plan = plan
        self.file = os.open(points, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.counts: Counter[str] = Counter()
        self.full = False
        self.target = ""  # of the last rename
        self.batch: tuple[int, int] | None = None  # epoch and number of the batch that was handed out
        self.watch_files()
        self.watch_phases()
        self.watch_batches()
        self.watch_leaving()
        if not plan.pictures:
            RunLog.attempt = lambda *_: None
        if plan.left_out:
            fresh = partial(Progress, skipped=list(plan.left_out))
            train.Progress = fresh
        self.break_things()

    def reach(self, point: str) -> None:
        """The run is at a point: note it, and do what is planned there."""
        os.write(self.file, f"{point}\n".encode())
        self.counts[point] += 1
        if self.full and ": " in point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if point != self.plan.at or self.counts[point] != self.plan.nth:
            return
        match self.plan.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "full":
                self.full = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "wait":
                time.sleep(TIMEOUT)
            case name:
                os.write(self.file, f"signal {time.monotonic()}\n".encode())
                os.kill(os.getpid(), signal.Signals[name])

    def watch_files(self) -> None:
        fsync, rename = os.fsync, os.replace

        def watched_fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            what = f"{self.target}: folder fsync" if path.is_dir() else f"{plain_name(path)}: fsync"
            self.reach(what)
            fsync(descriptor)
            self.reach(f"{what}ed")

        def watched_rename(source: Path, target: Path) -> None:
            backup = Path(target).name == PREVIOUS
            points = KEEPING if backup else SAVING[5:7]
            self.target = plain_name(source)
            self.reach(f"{self.target}: {points[0]}")
            rename(source, target)
            self.reach(f"{self.target}: {points[1]}")

        def watched_open(path: Path, mode: str = "r", **options: Any) -> Any:
            file = open(path, mode, **options)  # noqa: SIM115, the caller closes it
            return file if mode in ("r", "a+b") else WatchedFile(self, file, plain_name(path))

        os.fsync, os.replace = watched_fsync, watched_rename
        utils.system.files.open = utils.training.run_folder.open = watched_open

    def watch_phases(self) -> None:
        def watch(owner: object, name: str, point: str) -> None:
            real = getattr(owner, name)

            def watched(*arguments: Any, **named: Any) -> Any:
                self.reach(point)
                if self.plan.broken == point:
                    raise RuntimeError(f"{point} does not work")
                return real(*arguments, **named)

            setattr(owner, name, watched)

        watch(utils.data.cache, "load_sample", "decode")
        watch(utils.training.batch_size, "try_steps", "rehearse")
        watch(train, "validate", "validate")
        watch(train, "evaluate", "evaluate")

    def watch_batches(self) -> None:
        load, backward = Batches.load, Trainer.backward

        def watched_load(batches: Batches, numbers: Sequence[int], device: torch.device) -> Iterator:
            with closing(load(batches, iter(numbers), device)) as loaded:
                for number, batch in zip(numbers, loaded, strict=False):
                    self.batch = batches.epoch, number
                    self.reach(f"batch {batches.epoch + 1}.{number + 1}")
                    yield batch

        def spoiled_backward(trainer: Trainer, images: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            kind, self.batch = self.plan.bad.get(self.batch), None
            value = math.inf if kind and "inf" in kind else math.nan
            first = next(trainer.state.model.parameters())
            hook = first.register_hook(lambda gradient: gradient + value) if kind and "gradient" in kind else None
            loss = trainer.loss
            if kind and "loss" in kind:
                trainer.loss = lambda *arguments: {name: term * value for name, term in loss(*arguments).items()}
            try:
                return backward(trainer, images + value if kind == "images" else images, *rest, **named)
            finally:
                trainer.loss = loss
                if hook is not None:
                    hook.remove()

        Batches.load, Trainer.backward = watched_load, spoiled_backward

    def watch_leaving(self) -> None:
        """A second signal while the run leaves because of the first."""
        close = RunLog.close

        def watched_close(log: RunLog) -> None:
            if isinstance(sys.exc_info()[1], Stopped):
                os.kill(os.getpid(), signal.Signals[self.plan.action])
            close(log)

        RunLog.close = watched_close

    def break_things(self) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        match self.plan.broken:
            case "add_scalar":
                SummaryWriter.add_scalar = fail
            case "draw_training":
                utils.training.run_folder.draw_training = fail
            case "write_image":
                utils.training.run_folder.write_image = fail


class WatchedFile:
    """A file whose writes have a middle."""

    def __init__(self, faults: Faults, file: Any, name: str) -> None:
        self.faults, self.file, self.name = faults, file, name
        faults.reach(f"{name}: opened")

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> None:
        data = data if isinstance(data, str) else memoryview(data).cast("B")
        middle = len(data) // 2
        self.file.write(data[:middle])
        self.file.flush()
        self.faults.reach(f"{self.name}: half written")
        self.file.write(data[middle:])
        self.faults.reach(f"{self.name}: written")


def plain_name(path: str | Path) -> str:
    """The name of a file, finished or not; of the image cache without its fingerprint."""
    name = Path(path).name.removesuffix(utils.system.files.TEMPORARY)
    return "images" if name.endswith(".images") else name


@dataclass
class NoFlags:
    """No flags."""


def child(config: train.Config, plan: Plan, folder: Path, name: str) -> None:
    """A run, in a process of its own."""
    for number, suffix in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own one is shared with processes, and a killed one leaves it behind
    Faults(plan, folder / f"{name}.points")
    if plan.user:
        os.setuid(plan.user)
    sys.argv = ["train.py"]
    run_script(lambda _: train.main(config), NoFlags)


# --- around runs ---


class Running:
    """A run under way."""

    starting = threading.Lock()  # two threads must not both fetch an exit code
    numbers = itertools.count()

    def __init__(self, config: train.Config, plan: Plan, folder: Path) -> None:
        self.folder, self.name = folder, f"run{next(self.numbers)}"
        with self.starting:
            self.process = context().Process(target=child, args=(config, plan, folder, self.name))
            self.process.start()

    def points(self) -> list[str]:
        path = self.folder / f"{self.name}.points"
        return path.read_text().splitlines() if path.exists() else []

    def synchronize(self, point: str) -> None:
        end = time.monotonic() + TIMEOUT
        while point not in self.points():
            assert time.monotonic() < end, f"{point} was not reached"
            assert self.process.is_alive(), f"it ended before {point}"
            time.sleep(0.02)

    def end(self, timeout: float = TIMEOUT) -> Outcome:
        """Wait for the end, or kill it after the timeout."""
        if not wait([self.process.sentinel], timeout):
            self.process.kill()
            wait([self.process.sentinel])
        ended = time.monotonic()
        with self.starting:
            self.process.join()
        texts = [path.read_text() if path.exists() else "" for path in self.paths("out", "err")]
        points = self.points()
        signals = [float(point.split()[1]) for point in points if point.startswith("signal ")]
        for path in self.paths("out", "err", "points"):
            path.unlink(missing_ok=True)
        return Outcome(self.process.exitcode, *texts, points, ended - signals[0] if signals else 0.0)

    def paths(self, *suffixes: str) -> list[Path]:
        return [self.folder / f"{self.name}.{suffix}" for suffix in suffixes]


def context() -> Any:
    """Processes forked from one that has imported this module and has computed nothing."""
    found = get_context("forkserver")
    found.set_forkserver_preload(["tests.stress.faults"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return found


def together(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Some runs at a time."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, items))


def result(folder: Path) -> dict[str, Any]:
    """What a run left, without times: equal for equal runs."""
    last, best = load_checkpoint(folder / LAST), load_checkpoint(folder / BEST)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = {"weights": last.weights, "training": last.training, "best": best.weights}
    for name, tensors in kept.items():
        assert all(np.isfinite(values.numpy()).all() for values in tensors.values()), f"{name} is not finite"
    assert [line["epoch"] for line in lines] == list(range(1, last.info["epoch"] + 1)), lines
    assert not list(folder.glob(f"*{utils.system.files.TEMPORARY}")), "a temporary file was left"
    records = [{name: value for name, value in line.items() if "second" not in name} for line in lines]
    return {name: digest(tensors) for name, tensors in kept.items()} | {"info": last.info, "metrics": records}


def assert_equal(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Raise AssertionError that says what differs."""
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{what}: {', '.join(different)} differ from a run that nothing happened to"


class Work:
    """A folder with a data set and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = itertools.count()
        self.references: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()
        self.kit = folder / "kit"
        with redirect_stdout(io.StringIO()):
            make_demo_data.main(make_demo_data.Config(str(self.kit / "Demo"), train=25, val=4, test=1))
        sets = self.kit / "Demo" / "ImageSets" / "Main"
        few = (sets / "train.txt").read_text().splitlines()[:12]
        (sets / "few.txt").write_text("\n".join(few) + "\n")
        self.base = small_run(
            self.kit, train_sets=("Demo/few",), epochs=3, batch_size=4, nominal_batch=4, eval_every=2, cache="ram"
        )

    def new(self, **changes: Any) -> train.Config:
        """Settings of a small run, 3 epochs of 3 batches, in a folder of its own."""
        return replace(self.base, run_dir=str(self.folder / f"logs{next(self.numbers)}"), **changes)

    def long(self, **changes: Any) -> train.Config:
        """Settings of a run whose epochs have 25 batches, which are looked at after 20."""
        return self.new(train_sets=("Demo/train",), batch_size=1, nominal_batch=1, **{"epochs": 2} | changes)

    def start(self, config: train.Config, **plan: Any) -> Running:
        return Running(config, Plan(**plan), self.folder)

    def run(self, config: train.Config, **plan: Any) -> Outcome:
        return self.start(config, **plan).end()

    def reference(self, config: train.Config, **plan: Any) -> dict[str, Any]:
        """What a run leaves that nothing happens to; found once for all runs of these settings."""
        key = str((replace(config, run_dir=""), plan))
        with self.lock:
            if key not in self.references:
                own = replace(config, run_dir=self.new().run_dir)
                self.run(own, **plan).expect(DONE)
                self.references[key] = result(Path(own.run_dir))
                shutil.rmtree(own.run_dir)
        return self.references[key]

    def resume(self, config: train.Config, *words: str, **plan: Any) -> None:
        """Go on to the end, or begin again where there was no checkpoint yet."""
        again = replace(config, resume=is_resumable(Path(config.run_dir)))
        self.run(again, **plan).expect(DONE, *words)

    def compare(self, config: train.Config, what: str, expected: dict[str, Any] | None = None) -> None:
        """The run, now at its end, equals one that nothing happened to."""
        assert_equal(result(Path(config.run_dir)), expected or self.reference(config), what)
        shutil.rmtree(config.run_dir)

    @cached_property
    def points(self) -> list[str]:
        """Where a small run comes by, in order."""
        config = self.new()
        outcome = self.run(config).expect(DONE)
        shutil.rmtree(config.run_dir)
        return outcome.points


@contextmanager
def workshop() -> Iterator[Work]:
    """A folder in memory where there is room, so that the disk's speed does not count."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4e9
    with tempfile.TemporaryDirectory(prefix="faults", dir=memory if roomy else None) as folder:
        Path(folder).chmod(0o755)  # for the user without rights
        yield Work(Path(folder))


# --- rows of the table: each raises AssertionError where the promise is broken, and returns how many cases it had ---


def stop_and_resume(work: Work, short: bool) -> int:
    """A run stopped after an epoch, or within one, with and without accumulation, equals one that went through."""
    accumulated = {"batch_size": 2, "nominal_batch": 4, "epochs": 2}
    cases = [("batch 3.1", {"epochs": 4}), ("batch 2.2", {}), ("batch 2.3", accumulated)]
    if not short:
        cases += [("batch 1.1", {}), ("batch 3.3", {}), ("batch 1.2", accumulated), ("batch 1.6", accumulated)]
        cases += [("batch 2.2", {"checkpoint_every": 1, "freeze_epochs": 1, "phi": 2})]

    def case(item: tuple[str, dict[str, Any]]) -> None:
        at, changes = item
        config = work.new(**changes)
        work.run(config, at=at, action="SIGTERM").expect(TERMINATED, "--resume")
        work.resume(config, "resuming after epoch")
        work.compare(config, f"stopped at {at} {changes}")

    together(case, cases)
    return len(cases) + extend(work)


def extend(work: Work) -> int:
    """A finished run goes on with a schedule of its own, and can be stopped there too."""
    configs = [work.new(epochs=2, eval_every=4) for _ in range(2)]
    more = [replace(config, resume=True, extend=2) for config in configs]

    def case(number: int) -> dict[str, Any]:
        work.run(configs[number]).expect(DONE)
        if number:
            work.run(more[1], at="batch 4.2", action="SIGTERM").expect(TERMINATED)
            work.run(more[1]).expect(MISTAKE, "--extend")
            work.resume(configs[1], "resuming after epoch 3, batch 2")
        else:
            work.run(more[0]).expect(DONE)
            work.run(replace(more[0], extend=0)).expect(DONE, "finished after 4 epochs")
        return result(Path(configs[number].run_dir))

    whole, stopped = together(case, (0, 1))
    assert_equal(stopped, whole, "stopped in an extension")
    rates = [record["train/lr"] for record in whole["metrics"]]
    assert rates[:2] == rates[2:], f"the schedule did not begin anew: {rates}"
    for config in configs:
        shutil.rmtree(config.run_dir)
    return 2


def save_points(points: Sequence[str]) -> list[tuple[str, int]]:
    """Each point of saving each file, the second time where there is one, so that something was there before."""
    counts = Counter(point for point in points if ": " in point)
    return [(point, min(count, 2)) for point, count in counts.items()]


def order_of_saving(work: Work) -> None:
    """A file is on the disk before it gets its name, and only then is its name."""
    points = work.points
    for name in ("config.json", "data.json", BEST, LAST):
        found = [point.removeprefix(f"{name}: ") for point in points if point.startswith(f"{name}: ")]
        keeping = KEEPING if KEEPING[0] in found else ()
        first = [*SAVING]
        later = [*SAVING[:5], *keeping, *SAVING[5:]]
        assert found[: len(first)] == first, f"{name}: {found}"
        rest = found[len(first) :]
        assert rest == later * (len(rest) // len(later)), f"{name}: {found}"
        assert (name == LAST) == bool(keeping), found
    lines = [point.removeprefix("metrics.jsonl: ") for point in points if point.startswith("metrics.jsonl: ")]
    assert lines == [*SAVING, *SAVING[:5] * 3], lines


def kill_at_points(work: Work, short: bool) -> int:
    """kill -9 at each point of saving."""
    order_of_saving(work)
    cases = save_points(work.points)
    if short:
        chosen = [f"{LAST}: half written", f"{LAST}: fsync", f"{LAST}: kept the one before", f"{BEST}: renamed"]
        chosen += ["metrics.jsonl: half written"]
        cases = [case for case in cases if case[0] in chosen]
        assert len(cases) == len(chosen), cases

    def case(item: tuple[str, int]) -> None:
        point, nth = item
        config = work.new()
        work.run(config, at=point, nth=nth, action="kill").expect(-signal.SIGKILL)
        Path(
            config.run_dir, f"batch_1.jpg{utils.system.files.TEMPORARY}"
        ).touch()  # which is drawn in the first epoch only
        work.resume(config)
        work.compare(config, f"killed at {point}")

    together(case, cases)
    return len(cases)


def kill_at_random(work: Work, short: bool) -> int:
    """kill -9 at random moments, also of the run that goes on after the first kill."""
    wanted, rng = (3 if short else 40), random.Random(0)
    config = work.new(cache="disk")
    started = time.monotonic()
    expected = work.reference(config, pictures=True)
    seconds = time.monotonic() - started

    def case(moments: tuple[float, float]) -> int:
        config, kills = work.new(cache="disk"), 0
        for moment in moments:
            again = replace(config, resume=is_resumable(Path(config.run_dir)))
            kills += work.start(again, pictures=True).end(moment).code == -signal.SIGKILL
        work.resume(config, pictures=True)
        work.compare(config, f"killed after {moments} seconds", expected)
        return kills

    kills = 0
    while kills < wanted:
        runs = math.ceil((wanted - kills) / 2)
        kills += sum(together(case, [(rng.uniform(0, seconds), rng.uniform(0, seconds)) for _ in range(runs)]))
    return kills


def signals(work: Work, short: bool) -> int:
    """SIGTERM and SIGINT, each sent twice, in every part of a run."""
    places = ("decode", "rehearse", "batch 2.2", "evaluate", f"{LAST}: half written")
    names = {"SIGINT": INTERRUPTED, "SIGTERM": TERMINATED}
    cases = [
        (place, name) for i, place in enumerate(places) for j, name in enumerate(names) if not short or (i + j) % 2
    ]

    def case(item: tuple[str, str]) -> None:
        place, name = item
        config = work.new()
        outcome = work.run(config, at=place, action=name).expect(names[name], f"stopped by {name}")
        assert outcome.left_after < LIMIT, f"{name} at {place} took {outcome.left_after:.1f} s"
        assert is_resumable(Path(config.run_dir)) == (place not in places[:2]), place
        assert not list(Path(config.run_dir).glob("*.tmp")), place
        if short and place in places[:2]:
            shutil.rmtree(config.run_dir, ignore_errors=True)  # the folder goes with a run that has left nothing in it
            return
        work.resume(config)
        work.compare(config, f"{name} at {place}")

    together(case, cases)
    return len(cases)


def disk_full(work: Work, short: bool) -> int:
    """Writes that find no room, at points of saving."""
    cases = [(f"{LAST}: half written", 2), (f"{LAST}: fsync", 2), (f"{BEST}: half written", 1)]
    if not short:
        cases = [case for case in save_points(work.points) if case[0].endswith((": half written", ": fsync"))]
        cases += [(f"{LAST}: rename", 2), (f"{LAST}: folder fsync", 2)]

    def case(item: tuple[str, int]) -> None:
        point, nth = item
        config = work.new()
        folder = Path(config.run_dir)
        work.run(config, at=point, nth=nth, action="full").expect(MISTAKE, "No space left on device", "error: cannot")
        assert not list(folder.glob("*.tmp")), f"a temporary file was left at {point}"
        if is_resumable(folder):
            load_last(folder)
        work.resume(config)
        work.compare(config, f"full at {point}")

    together(case, cases)
    return len(cases)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own, in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "faults", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotHere(f"mount does not run here: {error}") from None
    if done.returncode:
        raise NotHere(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def small_disk(work: Work, _: bool) -> int:
    """A disk with room for one checkpoint and the half of a second, which is made larger afterwards."""
    disk = work.folder / "disk"
    with mounted(disk, "size=125m"):
        config = replace(work.new(), run_dir=str(disk / "run"))
        work.run(config, pictures=True).expect(MISTAKE, "No space left on device", "error: cannot write", LAST)
        assert not list(Path(config.run_dir).glob("*.tmp"))
        kept = load_last(Path(config.run_dir)).info["epoch"]
        assert kept == 1, kept
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        work.resume(config, pictures=True)
        work.compare(config, "a full disk")
    return 1


def not_writable(work: Work, _: bool) -> int:
    """A folder that is a file, or lies in one, or belongs to another user: found before anything else is done."""
    (work.folder / "file").touch()
    guarded = work.folder / "guarded"
    (guarded / "run").mkdir(parents=True)
    guarded.chmod(0o755)
    cases = [("file", 0), ("file/run", 0)]
    cases += [("guarded/new", NOBODY), ("guarded/run", NOBODY)] if os.getuid() == 0 else []

    def case(item: tuple[str, int]) -> None:
        name, user = item
        config = replace(work.new(), run_dir=str(work.folder / name))
        outcome = work.run(config, user=user).expect(MISTAKE, "cannot write to", name)
        assert not outcome.points, f"{name}: {outcome.points}"

    together(case, cases)
    return len(cases)


def read_only_disk(work: Work, _: bool) -> int:
    """A file system that cannot be written to."""
    disk = work.folder / "readonly"
    with mounted(disk, "ro,size=1m"):
        config = replace(work.new(), run_dir=str(disk / "run"))
        assert not work.run(config).expect(MISTAKE, "cannot write to", "Read-only").points
    return 1


def damage(work: Work, _: bool) -> int:
    """Cuts and single flipped bits of a checkpoint, in every part of the file."""
    folder, rng = work.folder / "damaged", random.Random(0)
    folder.mkdir()
    spec = ModelSpec(("cat", "dog"), ((10.0, 14.0),) * 6)
    weights = {f"layer{i}.weight": torch.full((i, 7), float(i)) for i in range(9)} | {"count": torch.tensor(3)}
    training = {f"model/{name}": value.clone() for name, value in weights.items()}
    for epoch in (1, 2):
        save_checkpoint(folder / LAST, Checkpoint(spec, weights, {"epoch": epoch}, training), folder / PREVIOUS)
    whole = (folder / LAST).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    metadata = whole.index(b"__metadata__"), whole.index(b"sha256") + 70
    regions = [(0, 8), (8, header), metadata, (header, len(whole)), (0, len(whole))]
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(48)] + [b"", whole[:-1]]
    for i in range(50):
        content = bytearray(whole)
        content[rng.randrange(*regions[i % len(regions)])] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        (folder / LAST).write_bytes(content)
        try:
            load_checkpoint(folder / LAST)
        except UserError:
            continue
        raise AssertionError("a damaged checkpoint was taken for whole")
    for content in damaged:
        (folder / LAST).write_bytes(content)
        said = io.StringIO()
        with redirect_stdout(said):
            assert load_last(folder).info["epoch"] == 1
        assert f"going on from {folder / PREVIOUS}, the one before" in said.getvalue(), said.getvalue()
    shutil.rmtree(folder)
    return len(damaged)


def damaged_run(work: Work, short: bool) -> int:
    """A run whose last checkpoint is damaged goes on from the one before, which is kept until the next is written."""
    places = (f"{LAST}: kept the one before", f"{LAST}: half written")

    def case(place: str) -> None:
        config = work.new()
        last = Path(config.run_dir) / LAST
        work.run(config, at="batch 3.2", action="SIGTERM").expect(TERMINATED)
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
        again = replace(config, resume=True)
        outcome = work.run(again, at=place, action="kill")
        assert outcome.code in (-signal.SIGKILL, DONE), outcome
        for word in ("damaged", PREVIOUS, "the one before"):
            assert word in outcome.out, outcome
        work.resume(config)
        work.compare(config, "a damaged checkpoint")

    cases = places[: 1 if short else 2]
    together(case, cases)
    return len(cases)


def not_finite(work: Work, short: bool) -> int:
    """Losses and gradients that are not finite: the run equals one without those batches."""
    small, kinds = {(0, 1): "loss nan"}, ("loss inf", "gradient nan", "gradient inf", "images")
    cases: list[tuple[train.Config, dict[tuple[int, int], str], str]] = [
        (work.new(), {(0, 0): "gradient nan", (1, 1): "loss inf", (1, 2): "images"}, ""),
        (work.new(batch_size=2, nominal_batch=4, epochs=2), {(1, 2): "images"}, ""),
        (work.long(epochs=1), {(0, 10): "images"}, "batch 1.23"),
    ]
    if not short:
        cases += [(work.new(), {(1, 1): kind}, "") for kind in kinds]
        cases += [(work.new(), small, "batch 2.1"), (work.new(checkpoint_every=1), {(1, 1): "images"}, "batch 2.3")]
        cases += [(work.long(), {(0, 10): "images"}, "batch 1.15"), (work.long(), {(1, 22): "gradient nan"}, "")]
        cases += [(work.long(), {(0, 3): "images", (0, 5): "loss nan", (1, 19): "gradient inf"}, "batch 2.22")]

    def case(item: tuple[train.Config, dict[tuple[int, int], str], str]) -> None:
        config, bad, stop = item
        expected = work.reference(config, left_out=tuple(sorted(bad)))
        said = ""
        if stop:
            said = work.run(config, bad=bad, at=stop, action="SIGTERM").expect(TERMINATED).out
        said += work.run(replace(config, resume=bool(stop)), bad=bad).expect(DONE).out
        for epoch, batch in bad:
            assert f"epoch {epoch + 1}, batch {batch + 1} is not finite" in said, said
            assert ", ".join(batch_names(work, config, epoch, batch)) in said, said
        assert said.count("is not finite") == len(bad), said
        work.compare(config, f"not finite {bad} {stop}", expected)

    together(case, cases)
    return len(cases) + too_often(work)


def batch_names(work: Work, config: train.Config, epoch: int, batch: int) -> list[str]:
    """The images of a batch."""
    path = work.kit / "Demo" / "ImageSets" / "Main" / f"{config.train_sets[0].split('/')[1]}.txt"
    names = path.read_text().split()
    order, _ = epoch_order(config.seed, epoch, len(names))
    return [names[i] for i in order[batch * config.batch_size :][: config.batch_size]]


def too_often(work: Work) -> int:
    """The fourth time is the last; what was saved is good."""
    config = work.new(epochs=2)
    bad = {(0, 0): "images", (0, 2): "loss nan", (1, 0): "gradient nan", (1, 1): "images"}
    work.run(config, bad=bad).expect(MISTAKE, "epoch 2, batch 2", "4th time", "lower lr")
    kept = load_checkpoint(Path(config.run_dir) / LAST)
    assert kept.info["epoch"] == 1
    assert all(np.isfinite(values.numpy()).all() for values in (kept.weights | kept.training).values())
    shutil.rmtree(config.run_dir)
    return 1


def broken_writers(work: Work, short: bool) -> int:
    """TensorBoard, curves or pictures that cannot be written: one warning, and the same weights."""

    def case(broken: str) -> None:
        config = work.new()
        if broken == "folder":
            Path(config.run_dir).mkdir()
            (Path(config.run_dir) / "tensorboard").touch()
        outcome = work.run(config, broken=broken, pictures=True).expect(DONE)
        lines = outcome.err.splitlines()
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("warning: TensorBoard, curves or pictures cannot be written"), outcome.err
        work.compare(config, f"{broken} is broken")

    cases = ("add_scalar", "draw_training", "write_image", "folder")[: 3 if short else 4]
    together(case, cases)
    return len(cases)


def two_runs(work: Work, _: bool) -> int:
    """A second run on a folder is refused, also while the first is resumed; a killed one leaves it free."""
    config = work.new()
    resumed = replace(config, resume=True)
    for first, place in ((config, "batch 3.1"), (resumed, "batch 3.2")):
        running = work.start(first, at=place, action="wait")
        try:
            running.synchronize(place)
            for other in (config, resumed):
                outcome = work.run(other).expect(MISTAKE, "another process is training in", config.run_dir)
                assert not outcome.points, outcome.points
        finally:
            running.end(0)
    with closing(RunLog(Path(config.run_dir))) as log:
        log.write_owner("this one")
        assert log.read_owner() == "this one"
        work.run(resumed).expect(MISTAKE, "another process is training in")
    work.resume(config)
    work.compare(config, "two runs on one folder")
    return 5


def changed_data(work: Work, _: bool) -> int:
    """Data that changed between stop and resume: refused, with the names; a touched image is no change."""
    kit = work.folder / "changing"
    shutil.copytree(work.kit, kit)
    demo, split = kit / "Demo", kit / "Demo" / "ImageSets" / "Main" / "few.txt"
    config = work.new(devkit=str(kit))
    work.run(config, at="batch 2.2", action="SIGTERM").expect(TERMINATED)
    names = split.read_text().split()
    image, annotation = demo / "JPEGImages" / f"{names[3]}.jpg", demo / "Annotations" / f"{names[4]}.xml"
    objects = annotation.read_text()
    moved = objects.replace("<xmin>", "<xmin>1", 1).replace("<xmax>", "<xmax>1", 1)
    difficult = objects.replace("<difficult>0", "<difficult>1", 1)
    cases: list[tuple[Path, bytes, str]] = [
        (image, (demo / "JPEGImages" / f"{names[5]}.jpg").read_bytes(), f"image of {names[3]} changed"),
        (annotation, difficult.encode(), f"annotation of {names[4]} changed"),
        (split, "\n".join(names[1:]).encode(), f"{names[0]} is gone"),
        (split, "\n".join([*names, "test_0000"]).encode(), "test_0000 is new"),
        (split, "\n".join(names[::-1]).encode(), "the order in the split files changed"),
    ]
    assert difficult != objects != moved
    for path, content, words in cases:
        before = path.read_bytes()
        path.write_bytes(content)
        work.run(replace(config, resume=True)).expect(MISTAKE, "data of this run changed", words)
        path.write_bytes(before)
    os.utime(image)
    work.resume(config)
    work.compare(config, "a touched image", work.reference(work.new()))
    return len(cases) + 1


def same_seed(work: Work, short: bool) -> int:
    """Runs of 200 steps as a user starts them, each in a Python of its own."""
    times, config = (1, work.new(epochs=1)) if short else (3, work.long(epochs=8))
    expected = work.reference(config)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in asdict(config).items()]
    given = [item for item in flags if getattr(train.Config(), item[0][2:].replace("-", "_")) != item[1]]

    def case(_: int) -> None:
        own = work.new()
        words = [str(word) for name, value in given if name != "--run-dir" for word in (name, *as_words(value))]
        command = [sys.executable, str(ROOT / "train.py"), *words, "--run-dir", own.run_dir]
        done = subprocess.run(
            command, cwd=work.folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert done.returncode == DONE, done.stderr
        work.compare(own, "the same seed", expected)

    together(case, range(times))
    return times


def as_words(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def disk_cache(work: Work, short: bool) -> int:
    """The file of decoded images: made once, made anew when an image changed or the file is cut, never half."""
    kit = work.folder / "cached"
    shutil.copytree(work.kit, kit)
    expected = work.reference(work.new())
    images = 12 + 4

    def use(decoded: int, what: str, expected: dict[str, Any] | None, **plan: Any) -> None:
        config = work.new(devkit=str(kit), cache="disk", epochs=3)
        outcome = work.run(config, **plan).expect(DONE, "images in logs/cache")
        assert outcome.points.count("decode") == decoded, f"{what}: {outcome.points.count('decode')} were decoded"
        work.compare(config, what, expected)

    for place in ("decode", "images: half written", "images: fsync")[: 1 if short else 3]:
        config = work.new(devkit=str(kit), cache="disk")
        work.run(config, at=place, nth=1, action="kill").expect(-signal.SIGKILL)
    if not short:
        config = work.new(devkit=str(kit), cache="disk")
        work.run(config, at="decode", action="SIGTERM").expect(TERMINATED)
        assert not list((work.folder / "logs" / "cache").glob("*.tmp"))
    use(images, "a cache built after a kill", expected)
    use(0, "a cache that is there", expected, broken="decode")
    for path in (work.folder / "logs" / "cache").glob("*.images"):
        os.truncate(path, path.stat().st_size - 1)
    use(images, "a cache that was cut", expected)
    first = kit / "Demo" / "JPEGImages" / f"{(kit / 'Demo/ImageSets/Main/few.txt').read_text().split()[0]}.jpg"
    write_image(first, np.ascontiguousarray(read_image(first)[::-1]))
    changed = work.reference(work.new(devkit=str(kit)))
    assert changed["weights"] != expected["weights"]
    use(12, "a cache of an image that changed", changed)
    return 4 + (1 if short else 4)


Row = Callable[[Work, bool], int]
ROWS: dict[str, Row] = {
    "stopped and resumed, also extended": stop_and_resume,
    "kill -9 at each point of saving": kill_at_points,
    "kill -9 at random": kill_at_random,
    "SIGTERM and SIGINT, twice": signals,
    "disk full": disk_full,
    "disk full, a real one": small_disk,
    "folder not writable": not_writable,
    "read-only disk": read_only_disk,
    "checkpoint cut or a bit flipped": damage,
    "damaged checkpoint resumed": damaged_run,
    "NaN or Inf in loss or gradient": not_finite,
    "TensorBoard or pictures fail": broken_writers,
    "two runs on one folder": two_runs,
    "data changed before a resume": changed_data,
    "same seed, same result": same_seed,
    "cache of decoded images on disk": disk_cache,
}


def main() -> int:
    """All rows in full; returns an exit code."""
    failed = 0
    print("| fault | cases | seconds | result |\n|---|---|---|---|", flush=True)
    with workshop() as work:
        for name, row in ROWS.items():
            started, cases = time.monotonic(), 0
            try:
                cases, verdict = row(work, False), "passed"
            except NotHere as reason:
                verdict = f"not done: {reason}"
            except AssertionError as error:
                failed, verdict = failed + 1, f"FAILED: {error}"
            print(f"| {name} | {cases} | {time.monotonic() - started:.0f} | {verdict} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    from tests.stress.faults import main as imported_main  # so that processes know the classes by one name

    sys.exit(imported_main())
