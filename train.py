"""Train YOLOv4-tiny on VOC data. Edit the constants of `Config`, or override them on the command line:

python train.py --train-sets VOC2007/trainval --phi cbam --epochs 50
"""

import os
import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from nets.attention import parse_phi
from nets.spec import ModelSpec, check_input_size
from nets.yolo import build_model, count_cost
from utils.data.augment import AugmentSettings
from utils.data.cache import PLACES, build_cache
from utils.data.statistics import describe_samples
from utils.data.voc import Sample, check_overlap, check_unique, load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.system.cli import INPUT_SIZE, flag_parser, given_settings, run_script
from utils.system.device import choose_device, keep_freed_memory
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError, as_user_error, check_choice, check_range
from utils.system.files import CACHE_FOLDER
from utils.system.signals import Stopped, StopSignals
from utils.training.batch_size import dry_run, resolve_batch_size
from utils.training.engine import draw_batch, epoch_batches, train_epochs, write_report
from utils.training.run_folder import RunData, RunFolder, changed_settings, load_settings, save_settings, verify_data
from utils.training.trainer import Batching, Trainer, build_trainer
from utils.training.training_state import Progress, find_progress
from utils.weights.checkpoint import BEST, LAST, Checkpoint, is_resumable, load_last, newest_run
from utils.weights.pretrained import fits_plain_attention, read_weights, start_from

CHANGEABLE = ("run_dir", "resume", "extend", "device", "cache", "compile", "checkpoint_every", "patience")  # on resume
RESUME_HINTS = {"epochs": "to add epochs to a finished run, use --extend"}
PHI = flag_parser(lambda words: parse_phi(words[0]), "INT|NAME")
CACHE_PLACES = {"device": "on the GPU", "ram": "in RAM", "disk": f"in {CACHE_FOLDER}"}


@dataclass(frozen=True)
class Config:
    """Train YOLOv4-tiny on data in VOC layout."""

    # data
    devkit: str = "VOCdevkit"  # folder with the datasets
    train_sets: tuple[str, ...] = ("VOC2007/train",)  # sets to train on, as folder/split
    val_sets: tuple[str, ...] = ("VOC2007/val",)  # sets that select the best checkpoint; may be empty
    classes: str = "model_data/voc_classes.txt"  # file with one class name per line
    anchors: str = "model_data/yolo_anchors.txt"  # file with six width, height pairs in input pixels
    train_difficult: bool = False  # also train on objects marked as difficult
    strict: bool = False  # treat everything that would be skipped or repaired as an error

    # network
    phi: Annotated[int, PHI] = 0  # attention: 0 none 1 se 2 cbam 3 eca 4 ca 5 simam 6 ema 7 ela 8 mlca 9 triplet
    attention_args: dict[str, int | float] = field(default_factory=dict)  # arguments of the block, such as ratio 8
    attention_places: tuple[str, ...] = ModelSpec.places  # where blocks are inserted: feat1, feat2, upsample
    identity_start: bool = True  # start attention blocks as the identity, so that they cannot harm the first steps
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # input height and width, multiples of 32
    letterbox: bool = False  # pad images with gray bars to keep their aspect ratio, instead of stretching them
    weights: str = ""  # initial weights: a checkpoint, a published .pth or Darknet .weights; empty: random

    # run
    run_dir: str = ""  # folder of the run; empty: logs/ and the current time
    resume: bool = False  # continue the run in run_dir, or the newest one, with the settings of that run
    extend: int = 0  # with resume: epochs to add to a finished run
    epochs: int = 100  # passes over the training sets
    freeze_epochs: int = 0  # epochs with a frozen backbone at the start of the run
    batch_size: int = 8  # images per batch over all GPUs; 0: the largest that fits into memory
    nominal_batch: int = 8  # images per optimizer step; gradients of smaller batches are accumulated
    eval_every: int = 5  # epochs between validations; the last epoch is always validated
    patience: int = 0  # stop after this many validations without an AP improvement; 0: never
    checkpoint_every: int = 0  # optimizer steps between checkpoints within an epoch; 0: only at the end of epochs
    cache: str = "auto"  # where decoded images are kept: auto, device, ram or disk
    seed: int = 0  # random seed for initialization, sample order and augmentation
    device: str = "auto"  # auto, cpu, cuda or cuda:N (the GPU with index N)
    precision: str = "auto"  # precision of training: auto, bf16, fp16 or fp32
    compile: str = "auto"  # torch.compile: auto (on a GPU), on or off
    sync_bn: bool = False  # synchronize batch norm across GPUs; helps if each has few images

    # optimization
    lr: float = 0.014  # peak learning rate of Muon, with cosine decay; AdamW uses a fixed fraction of it
    weight_decay: float = 0.1  # weight decay, not applied to normalization layers and biases
    warmup: float = 0.1  # fraction of the run during which the learning rate rises
    ema: float = 0.05  # horizon of the moving average of the weights, as a fraction of the run

    # augmentation
    mosaic: float = 1.0  # probability of combining four images
    mosaic_until: float = 0.5  # fraction of the run after which mosaics stop
    scale: float = 0.3  # resize by a factor of 1 - scale to 1 + scale
    aspect: float = 0.1  # change width / height by a factor of 1 / (1 + aspect) to 1 + aspect
    translate: float = 0.1  # maximum shift, as a fraction of the width or height
    flip: float = 0.5  # probability of a horizontal flip
    hue: float = 0.015  # maximum hue rotation, as a fraction of the color circle
    saturation: float = 0.5  # scale saturation by a factor of 1 - saturation to 1 + saturation
    value: float = 0.3  # scale brightness by a factor of 1 - value to 1 + value

    def __post_init__(self) -> None:
        with as_user_error():
            parse_phi(str(self.phi))
            check_input_size(self.input_size)
        check_range(self, 1, 1e9, "epochs", "nominal_batch", "eval_every")
        check_range(self, 0, 1e9, "batch_size", "patience", "checkpoint_every", "extend")
        check_range(self, 0, self.epochs, "freeze_epochs")
        check_range(self, 1e-9, 1e3, "lr")
        check_range(self, 0, 1e3, "weight_decay", "aspect")
        check_range(self, 0, 2**63, "seed")
        check_range(self, 0, 1, "warmup", "mosaic", "mosaic_until", "flip")
        check_range(self, 0, 0.99, "scale", "translate", "hue", "saturation", "value")
        check_range(self, 1e-6, 1, "ema")
        check_choice(self, "cache", PLACES)
        check_choice(self, "compile", ("auto", "on", "off"))
        if self.extend and not self.resume:
            raise UserError("--extend adds epochs to a finished run and needs --resume")

    def augment_settings(self, fraction: float) -> AugmentSettings:
        """The augmentation after a fraction of the run."""
        settings = AugmentSettings(**{item.name: getattr(self, item.name) for item in fields(AugmentSettings)})
        return settings if fraction < self.mosaic_until else replace(settings, mosaic=0.0)


def main(config: Config, given: Collection[str] | None = None) -> Path:
    """Train, and return the run's folder; `given` names the settings that the user set, by default the changed ones."""
    with StopSignals() as stop, join_process_group(config.device) as group:
        return train(config, changed_settings(config) if given is None else given, stop, group)


def train(config: Config, given: Collection[str], stop: StopSignals, group: ProcessGroup) -> Path:
    """Start or resume a run, and train to its end; `config` is what the user gave, `settings` what the run uses."""
    if not config.resume:
        choose_device(config.device)  # fails before a folder is created; a resumed run may have another device
    with closing(open_run(config, group)) as run:
        settings, checkpoint = resume_settings(config, given, run, group)
        progress = Progress(end=settings.epochs)
        if checkpoint:
            progress = find_progress(checkpoint, settings.extend, settings.patience, group)
        if progress.is_finished(settings.patience):
            group.print_once(f"the run has finished after {progress.epoch} epochs; add 20 with --resume --extend 20")
            return run.path
        try:
            trainer, data = prepare(settings, checkpoint, progress, run, group)
            dry_run(trainer, settings, data, epoch_batches(trainer, settings, data))
            train_epochs(trainer, settings, data, run, stop)
        except Stopped:
            run.finish_saving()
            resume = f"resume from here with --resume --run-dir {run.path}"
            group.print_once(f"stopped; {resume if is_resumable(run.path) else 'there is no checkpoint yet'}")
            raise
    if trainer.state.progress.epoch < trainer.state.progress.end:
        group.print_once(f"stopped early after {settings.patience} validations without improvement")
    best_on = f"best on {', '.join(settings.val_sets)}" if settings.val_sets else "identical, without validation"
    group.print_once(f"done: {run.path / LAST} (last epoch) and {BEST} ({best_on})")
    if group.any_rank(stop.requested):  # also waits until the checkpoints are saved
        stop.raise_stopped()
    if data.val is not None:
        folder = write_report(run, settings.devkit, settings.val_sets, data.val, trainer.device, group)
        group.print_once(f"report on the best checkpoint: {folder / 'report.html'}")
    return run.path


def open_run(config: Config, group: ProcessGroup) -> RunFolder:
    """Lock the folder of the run; raises UserError if it contains another run."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.run_dir:
        raise UserError("torchrun --max-restarts needs --run-dir, so that a restarted run finds its folder")
    new = f"logs/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    path = Path(group.broadcast(config.run_dir or (newest_run() if config.resume else new)))
    run = RunFolder(path, read_only=not group.is_main)
    if is_resumable(path) and not (config.resume or group.restarted):
        raise UserError(f"{path} already contains a run; add --resume to continue it, or choose another --run-dir")
    return run


def resume_settings(
    config: Config, given: Collection[str], run: RunFolder, group: ProcessGroup
) -> tuple[Config, Checkpoint | None]:
    """The settings to train with, and the checkpoint to continue from, or None for a new run."""
    if not (config.resume or is_resumable(run.path)):
        return config, None
    checkpoint = load_last(run.path, group.print_once)
    if group.restarted:  # the run's own command, whose batch size was resolved when the run started
        given = set(given) - {"batch_size"}
    return load_settings(run.path, config, CHANGEABLE, given, RESUME_HINTS), checkpoint


def prepare(
    settings: Config, checkpoint: Checkpoint | None, progress: Progress, run: RunFolder, group: ProcessGroup
) -> tuple[Trainer, RunData]:
    """Load the data, build or restore the network, and start logging."""
    device = choose_device(settings.device)
    if device.type == "cpu":
        if settings.sync_bn:
            raise UserError("sync_bn needs GPUs; remove --sync-bn to train on the CPU")
        keep_freed_memory()
    diagnostics = Diagnostics(settings.strict)
    weights = read_weights(settings.weights, diagnostics) if settings.weights and checkpoint is None else {}
    spec = checkpoint.spec if checkpoint else new_spec(settings, weights, diagnostics)
    data = load_data(settings, spec, device, group, diagnostics)
    if group.is_main:
        verify_data(run.path, data, resumed=checkpoint is not None)
    batch_size = resolve_batch_size(settings, spec, data.train, device, group)
    batching = Batching.plan(len(data.train), batch_size, settings.nominal_batch)
    trainer = build_trainer(settings, spec, batching, progress, device, group)
    parameters, gflop = count_cost(trainer.state.model, spec.input_size)
    group.print_once(f"YOLOv4-tiny phi {spec.phi}: {parameters:,} parameters, {gflop:.2f} GFLOP per image")
    images = f"{len(data.train)} images {CACHE_PLACES[data.train.place]}, batches of {batch_size}"
    processes = f", {group.size} processes" if group.size > 1 else ""
    group.print_once(f"{images}, {device}, {trainer.dtype}{processes}; run folder {run.path}")
    if checkpoint:
        trainer.resume(checkpoint)
    elif weights:
        group.print_once(start_from(trainer.state.model, weights, settings.weights))
        trainer.take_snapshot()
    if checkpoint is None and group.is_main:
        save_settings(run.path, replace(settings, batch_size=batch_size))
    run.start_logging(progress.epoch)
    if progress.epoch == progress.batch == 0:
        batches = epoch_batches(trainer, settings, data)
        for number in range(min(2, len(batches))):
            draw = partial(draw_batch, batches, number, device, spec.class_names)
            run.attempt("pictures", run.write_picture, f"batch_{number}", draw, 0)
    return trainer, data


def new_spec(settings: Config, weights: dict[str, Tensor], diagnostics: Diagnostics) -> ModelSpec:
    """The specification of a new run; no identity start if the published weights include its attention block."""
    with as_user_error():
        spec = ModelSpec(
            class_names=load_classes(settings.classes, diagnostics),
            anchors=load_anchors(settings.anchors),
            phi=settings.phi,
            attention_args=settings.attention_args,
            places=settings.attention_places,
            identity_start=settings.identity_start and settings.phi > 0,
            input_size=settings.input_size,
            letterbox=settings.letterbox,
        )
        spec.check()
        model = build_model(spec)
    return replace(spec, identity_start=False) if fits_plain_attention(model, weights) else spec


def load_data(
    settings: Config, spec: ModelSpec, device: torch.device, group: ProcessGroup, diagnostics: Diagnostics
) -> RunData:
    """Read the annotations and decode the images."""
    val_diagnostics = Diagnostics(settings.strict, skips=False)  # skipping would change what is measured
    samples = load_samples(settings.devkit, settings.train_sets, spec.class_names, diagnostics)
    val_samples: list[Sample] = []
    if settings.val_sets:
        val_samples = load_samples(settings.devkit, settings.val_sets, spec.class_names, val_diagnostics)
        check_unique(val_samples, settings.val_sets, val_diagnostics)
    check_overlap(samples, val_samples, diagnostics)
    if settings.train_difficult:
        samples = [replace(sample, difficult=np.zeros_like(sample.difficult)) for sample in samples]
    train = build_cache(samples, spec, device, settings.cache, group, diagnostics)
    val = build_cache(val_samples, spec, device, settings.cache, group, val_diagnostics) if val_samples else None
    diagnostics.check_skip_limit(len(samples), sum(len(sample.labels) for sample in samples))
    diagnostics.print_summary("training", group.print_once)
    val_diagnostics.print_summary("validation", group.print_once)
    group.print_once(f"training: {describe_samples(train.samples, spec.class_names)}")
    return RunData(train, val)


if __name__ == "__main__":
    run_script(lambda config: main(config, given_settings(Config)), Config)
