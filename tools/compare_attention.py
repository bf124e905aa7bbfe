"""Does attention help on my data? Train several phis with several seeds, and say which differ by more than chance.

python tools/compare_attention.py --phis 0 2 3 --seeds 0 1 2 3 4 --train-sets MySet/trainval --test-sets MySet/test \
    --classes model_data/my_classes.txt --epochs 30 -- --batch-size 16

Settings of train.py may follow the --. With one seed all networks begin with the same weights in the layers that they
share, and see the same batches. What was stopped goes on with the same command; run it several times at once, or by
torchrun, and the processes share the runs.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.attention import ATTENTION, describe_phi
from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model, count_cost
from utils.data.voc import read_split
from utils.evaluation.timing import time_in_turns
from utils.inference.backends import CompiledNetwork, Network, TorchNetwork
from utils.reports.attention_report import Cost, Result, compare_phis, write_comparison
from utils.system.cli import run_script
from utils.system.device import choose_compile, choose_device, choose_precision
from utils.system.errors import UserError, check_range, make_folder
from utils.system.files import atomic_write, lock
from utils.system.signals import StopSignals
from utils.training.run_folder import CONFIG, DATA, METRICS, load_settings, read_records, save_settings
from utils.weights.checkpoint import LAST, is_resumable, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SPEEDS = "speeds.json"  # milliseconds of each phi on this device
TIMED = 30  # calls of each network
WAIT = 5.0  # seconds between two looks at what other processes do
TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # how it is known
LOCK = "comparison.lock"
FREE = ("phis", "seeds", "out", "device")  # settings that may change while a comparison grows


@dataclass(frozen=True)
class Config:
    """Train several phis with several seeds, and say which differ by more than chance."""

    flags: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="-- FLAGS", help="further settings of train.py, such as -- --batch-size 16 --lr 0.01"),
    ] = ()
    phis: tuple[int, ...] = tuple(ATTENTION)  # attention blocks; 0, none, is what the others are compared with
    seeds: tuple[int, ...] = (0, 1, 2)  # a training of each phi with each; five or more for small differences
    out: str = "logs/attention"  # folder of the trainings and of the comparison
    devkit: str = "VOCdevkit"  # folder of the data sets
    train_sets: tuple[str, ...] = ("VOC2007/trainval",)  # sets to train on
    test_sets: tuple[str, ...] = ("VOC2007/test",)  # sets to measure on, which are not trained on
    classes: str = "model_data/voc_classes.txt"  # file with a class name on each line
    epochs: int = 30  # of each training
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        unknown = [phi for phi in self.phis if phi not in ATTENTION]
        if unknown:
            raise UserError(f"phis has {', '.join(map(str, unknown))}, but each must be one of {describe_phi()}")
        if 0 not in self.phis or len(set(self.phis)) < 2:
            raise UserError("phis must have 0, which the others are compared with, and at least one other")
        if not self.seeds:
            raise UserError("seeds is empty, but needs at least one, and five or more for small differences")
        check_range(self, 1, 1e9, "epochs")


@dataclass(frozen=True)
class Run:
    """A training of one phi with one seed, and its measurement."""

    config: Config
    phi: int
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / f"phi{self.phi}_seed{self.seed}"

    @property
    def test(self) -> Path:
        return self.folder / "test"

    @property
    def is_done(self) -> bool:
        return (self.test / "metrics.json").is_file()

    def execute(self) -> None:
        """Train, or go on training, and measure."""
        config, common = self.config, ["--device", self.config.device]
        if is_resumable(self.folder):
            train = ["--resume", "--run-dir", self.folder]
        else:
            train = ["--phi", self.phi, "--seed", self.seed, "--run-dir", self.folder, "--epochs", config.epochs]
            train += ["--devkit", config.devkit, "--classes", config.classes, "--train-sets", *config.train_sets]
            train += ["--val-sets", *config.flags]
        test = ["--weights", self.folder / LAST, "--devkit", config.devkit, "--sets", *config.test_sets]
        self.call("train.py", *train, *common)
        self.call("eval.py", *test, "--out", self.test, *common)

    def call(self, script: str, *arguments: object) -> None:
        """Run a script of the project; its output goes to a file beside the folder. Raises UserError when it fails."""
        output = self.folder.with_suffix(".log")
        command = [sys.executable, ROOT / script, *arguments]
        with open(output, "a", encoding="utf-8") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=own_environment())
            try:
                code = process.wait()
            except BaseException:  # it saves its state, and takes no harm from a second signal
                process.terminate()
                process.wait()
                raise
        if code:
            reason = output.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise UserError(f"{script} failed for phi {self.phi} and seed {self.seed}, see {output}: {''.join(reason)}")

    def result(self) -> Result:
        coco = json.loads((self.test / "metrics.json").read_text(encoding="utf-8"))["coco"]
        images = len(json.loads((self.folder / DATA).read_text(encoding="utf-8"))["train"])
        records, name = read_records(self.folder / METRICS), "train/images_per_second"
        seconds = [images / record[name] for record in records if name in record]
        return Result(coco["AP"], coco["AP50"], len(records) * mean(seconds))


def own_environment() -> dict[str, str]:
    """That of a run: a process of its own, under torchrun on the GPU of this process's number."""
    own = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        own["CUDA_VISIBLE_DEVICES"] = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
    return own


def work(runs: Sequence[Run]) -> None:
    """Do every run that no other process does, and wait for those."""
    waiting = list(runs)
    while waiting:
        for run in list(waiting):
            held = lock(run.folder.with_suffix(".lock"))
            if held is None:
                continue
            with held:
                if not run.is_done:
                    print(f"phi {run.phi}, seed {run.seed}: training; see {run.folder.with_suffix('.log')}", flush=True)
                    run.execute()
                    print(f"phi {run.phi}, seed {run.seed}: AP {run.result().AP:.4f}", flush=True)
                    write_done(run.config, runs)
            waiting.remove(run)
        if waiting:
            time.sleep(WAIT)


def write_done(config: Config, runs: Sequence[Run]) -> str:
    """The comparison of the runs that are done; returns its text."""
    with lock(Path(config.out) / LOCK, wait=True):
        done = [run for run in runs if run.is_done]
        results: dict[int, dict[int, Result]] = {}
        for run in done:
            results.setdefault(run.phi, {})[run.seed] = run.result()
        device = choose_device(config.device)
        models = {run.phi: build_model(load_checkpoint(run.folder / LAST).spec) for run in done}
        spec = load_checkpoint(done[0].folder / LAST).spec
        speeds = measure_speeds(models, spec, device, Path(config.out) / SPEEDS) if len(done) == len(runs) else {}
        costs = {phi: Cost(*count_cost(model, spec.input_size), speeds.get(phi)) for phi, model in models.items()}
        about = [f"{len(done)} of {len(runs)} trainings are done.", *describe(config, spec, device)]
        return write_comparison(Path(config.out), compare_phis(results, costs), about)


def describe(config: Config, spec: ModelSpec, device: torch.device) -> list[str]:
    """How the figures come about, in sentences."""
    height, width = spec.input_size
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return [
        f"Trained on {', '.join(config.train_sets)}, {config.epochs} epochs, with "
        f"{shlex.join(config.flags) or 'the default settings'}; the last checkpoint measured on "
        f"{', '.join(config.test_sets)}.",
        f"ms: one image of {height}x{width} from pixels to boxes and scores, the median of {TIMED} calls in turns on "
        f"this device ({name}). Training: the median over the seeds, as it was beside whatever else ran.",
    ]


def measure_speeds(
    models: Mapping[int, YoloBody], spec: ModelSpec, device: torch.device, path: Path
) -> dict[int, float]:
    """Milliseconds of each phi, measured once, in turns, since machines drift; deleting the file measures again."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {str(phi) for phi in models} <= known.keys():
        kind = CompiledNetwork if choose_compile("auto", device) else TorchNetwork
        dtype = choose_precision("auto", device)
        image = torch.zeros(1, 3, *spec.input_size, dtype=torch.uint8)
        networks = {phi: kind(model, spec, device, dtype) for phi, model in models.items()}
        calls = {phi: partial(find_boxes, network, image) for phi, network in networks.items()}
        known = {str(phi): ms for phi, ms in time_in_turns(calls, TIMED, device).items()}
        with atomic_write(path) as file:
            file.write(json.dumps(known).encode())
    return {phi: known[str(phi)] for phi in models}


def find_boxes(network: Network, image: Tensor) -> None:
    network.decode(network(image))


def open_comparison(config: Config) -> Config:
    """The settings of the comparison in `out`, which a new one begins; raises UserError where they differ."""
    folder = Path(config.out)
    make_folder(folder)
    with lock(folder / LOCK, wait=True):
        if (folder / CONFIG).is_file() and any(folder.glob(f"phi*/{CONFIG}")):  # a run has begun
            return replace(load_settings(folder, config, FREE), out=config.out)
        save_settings(folder, config)
    return config


def check_sets(config: Config) -> None:
    """Raise UserError for a set that is not there, and for images both to train and to measure on."""
    trained, measured = (
        {(name.rpartition("/")[0], image) for name in sets for image in read_split(Path(config.devkit), name)}
        for sets in (config.train_sets, config.test_sets)
    )
    shared = sorted(trained & measured)
    if shared:
        raise UserError(
            f"{len(shared)} images are in the training and in the test sets, such as {shared[0][1]} of {shared[0][0]}; "
            "tools/make_splits.py can make sets apart"
        )


def main(config: Config) -> None:
    config = open_comparison(config)
    check_sets(config)
    runs = [Run(config, phi, seed) for seed in config.seeds for phi in sorted(config.phis)]
    with StopSignals():
        work(runs)
        text = write_done(config, runs)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes
        print(f"{text}\n\nwritten to {config.out}: look at {Path(config.out) / 'comparison.html'}")


if __name__ == "__main__":
    run_script(main, Config)
