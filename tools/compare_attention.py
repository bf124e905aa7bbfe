"""Train several phis with several seeds, and report which differences in AP are statistically significant:

python tools/compare_attention.py --phis 0 2 3 --seeds 0 1 2 3 4 --train-sets MySet/trainval --test-sets MySet/test \
    --classes model_data/my_classes.txt --epochs 30 -- --batch-size 16

Arguments after -- are passed to train.py. Runs with the same seed share the initial weights of common layers and see
the same batches. The same command continues an interrupted comparison.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.attention import ATTENTION, describe_phi
from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model, count_cost
from utils.data.voc import read_split
from utils.evaluation.timing import time_alternately
from utils.inference.backends import CompiledNetwork, TorchNetwork
from utils.reports.attention_report import PAGE, Cost, Result, compare_phis, write_attention_report
from utils.system.cli import run_script
from utils.system.device import choose_compile, choose_device, choose_precision
from utils.system.errors import UserError, check_range
from utils.system.files import make_folder, write_text
from utils.system.signals import StopSignals
from utils.training.run_folder import CONFIG, DATA, METRICS, load_settings, read_records, save_settings
from utils.weights.checkpoint import LAST, is_resumable, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SPEEDS = "speeds.json"  # latency of each phi in milliseconds
TIMED_CALLS = 30  # per network
CHANGEABLE = ("phis", "seeds", "out", "device")  # settings that may differ when a comparison is continued


@dataclass(frozen=True)
class Config:
    """Train several phis with several seeds, and report which differences in AP are statistically significant."""

    flags: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="-- FLAGS", help="arguments for train.py, such as -- --batch-size 16 --lr 0.01"),
    ] = ()
    phis: tuple[int, ...] = tuple(ATTENTION)  # attention blocks to compare, including 0 (no attention)
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds to train each phi with; use five or more for small differences
    out: str = "logs/attention"  # folder for the runs and the report
    devkit: str = "VOCdevkit"  # folder with the datasets
    train_sets: tuple[str, ...] = ("VOC2007/trainval",)  # training sets
    test_sets: tuple[str, ...] = ("VOC2007/test",)  # sets to evaluate on; may not share images with the training sets
    classes: str = "model_data/voc_classes.txt"  # file with one class name per line
    epochs: int = 30  # epochs per run
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)

    def __post_init__(self) -> None:
        unknown = [phi for phi in self.phis if phi not in ATTENTION]
        if unknown:
            raise UserError(f"phis contains {', '.join(map(str, unknown))}, but each must be one of {describe_phi()}")
        if 0 not in self.phis or len(set(self.phis)) < 2:
            raise UserError("phis must contain 0, the baseline, and at least one attention block")
        if not self.seeds:
            raise UserError("seeds is empty, but must contain at least one seed")
        check_range(self, 1, 1e9, "epochs")


@dataclass(frozen=True)
class Run:
    """Training and evaluation of one phi with one seed."""

    config: Config
    phi: int
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.config.out) / f"phi{self.phi}_seed{self.seed}"

    @property
    def metrics(self) -> Path:
        return self.folder / "test" / "metrics.json"

    def execute(self) -> None:
        config, common = self.config, ["--device", self.config.device]
        if is_resumable(self.folder):
            train = ["--resume", "--run-dir", self.folder]
        else:
            train = ["--phi", self.phi, "--seed", self.seed, "--run-dir", self.folder, "--epochs", config.epochs]
            train += ["--devkit", config.devkit, "--classes", config.classes, "--train-sets", *config.train_sets]
            train += ["--val-sets", *config.flags]
        test = ["--weights", self.folder / LAST, "--devkit", config.devkit, "--sets", *config.test_sets]
        self.call("train.py", *train, *common)
        self.call("eval.py", *test, "--out", self.metrics.parent, *common)

    def call(self, script: str, *arguments: object) -> None:
        """Run a script of the project, with its output in a log file; raises UserError if it fails."""
        output = self.folder.with_suffix(".log")
        command = [sys.executable, ROOT / script, *arguments]
        with open(output, "a", encoding="utf-8") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
            try:
                code = process.wait()
            except BaseException:  # let the script save its state
                process.terminate()
                process.wait()
                raise
        if code:
            reason = output.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise UserError(f"{script} failed for phi {self.phi} and seed {self.seed}; see {output}: {''.join(reason)}")

    def read_result(self) -> Result:
        coco = json.loads(self.metrics.read_text(encoding="utf-8"))["coco"]
        images = len(json.loads((self.folder / DATA).read_text(encoding="utf-8"))["train"])
        records, name = read_records(self.folder / METRICS), "train/images_per_second"
        seconds = [images / record[name] for record in records if name in record]
        return Result(coco["AP"], coco["AP50"], len(records) * mean(seconds))


def main(config: Config) -> None:
    config = open_comparison(config)
    check_sets(config)
    runs = [Run(config, phi, seed) for seed in config.seeds for phi in sorted(config.phis)]
    with StopSignals():
        for run in runs:
            if not run.metrics.is_file():
                print(f"phi {run.phi}, seed {run.seed}: training; see {run.folder.with_suffix('.log')}", flush=True)
                run.execute()
                print(f"phi {run.phi}, seed {run.seed}: AP {run.read_result().AP:.4f}", flush=True)
                write_report(config, runs)
        print(f"{write_report(config, runs)}\n\nreport: {Path(config.out) / PAGE}")


def open_comparison(config: Config) -> Config:
    """Start or continue the comparison in `out`; raises UserError for changed settings."""
    folder = Path(config.out)
    make_folder(folder)
    if (folder / CONFIG).is_file() and any(folder.glob(f"phi*/{CONFIG}")):  # a run has started
        return replace(load_settings(folder, config, CHANGEABLE), out=config.out)
    save_settings(folder, config)
    return config


def check_sets(config: Config) -> None:
    """Raise UserError for missing sets, and for images in both the training and the test sets."""
    trained, tested = (
        {(name.rpartition("/")[0], image) for name in sets for image in read_split(Path(config.devkit), name)}
        for sets in (config.train_sets, config.test_sets)
    )
    shared = sorted(trained & tested)
    if shared:
        raise UserError(
            f"{len(shared)} images are in both the training and the test sets, such as {shared[0][1]} of "
            f"{shared[0][0]}; use tools/make_splits.py to create disjoint sets"
        )


def write_report(config: Config, runs: Sequence[Run]) -> str:
    """Write the report on the finished runs, and return its text."""
    finished = [run for run in runs if run.metrics.is_file()]
    results: dict[int, dict[int, Result]] = {}
    for run in finished:
        results.setdefault(run.phi, {})[run.seed] = run.read_result()
    device = choose_device(config.device)
    specs = {run.phi: load_checkpoint(run.folder / LAST).spec for run in finished}
    models, spec = {phi: build_model(spec) for phi, spec in specs.items()}, specs[finished[0].phi]
    latency = measure_latency(models, spec, device, Path(config.out) / SPEEDS) if len(finished) == len(runs) else {}
    costs = {phi: Cost(*count_cost(model, spec.input_size), latency.get(phi)) for phi, model in models.items()}
    about = [f"{len(finished)} of {len(runs)} runs are finished.", *describe_methods(config, spec, device)]
    return write_attention_report(Path(config.out), compare_phis(results, costs), about)


def describe_methods(config: Config, spec: ModelSpec, device: torch.device) -> list[str]:
    """Sentences about how the results were obtained."""
    height, width = spec.input_size
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    settings = shlex.join(config.flags) or "the default settings"
    return [
        f"Trained on {', '.join(config.train_sets)} for {config.epochs} epochs with {settings}; the last checkpoint is "
        f"evaluated on {', '.join(config.test_sets)}.",
        f"Latency: from the pixels of one {height}x{width} image to boxes and scores, median of {TIMED_CALLS} calls on "
        f"this device ({name}). Training time: median over the seeds.",
    ]


def measure_latency(
    models: Mapping[int, YoloBody], spec: ModelSpec, device: torch.device, path: Path
) -> dict[int, float]:
    """Latency of each phi in milliseconds, measured together and stored in `path`; delete it to measure again."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not {str(phi) for phi in models} <= known.keys():
        dtype = choose_precision("auto", device)
        image = torch.zeros(1, 3, *spec.input_size, dtype=torch.uint8)
        networks = {phi: TorchNetwork(model, spec, device, dtype) for phi, model in models.items()}
        if choose_compile("auto", device):
            networks = {phi: CompiledNetwork(network) for phi, network in networks.items()}
        calls = {phi: lambda run=run: run.to_boxes(run(image)) for phi, run in networks.items()}
        known = {str(phi): ms for phi, ms in time_alternately(calls, TIMED_CALLS, device).items()}
        write_text(path, json.dumps(known))
    return {phi: known[str(phi)] for phi in models}


if __name__ == "__main__":
    run_script(main, Config)
