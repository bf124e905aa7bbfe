"""Train YOLOv4-tiny on VOC data: change the constants of `Config`, or give them as flags, and run it.

python train.py --train-sets VOC2007/trainval --phi 2 --epochs 50
"""

import math
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.optim.lr_scheduler import LambdaLR

from nets.attention import ATTENTION, describe_phi
from nets.spec import MAX_SIDE, ModelSpec
from nets.yolo import build_model, summary
from utils.data.augment import AugmentSettings
from utils.data.cache import PLACES, ImageCache, build_cache
from utils.data.loader import Batches
from utils.data.sample_checks import check_once, check_overlap
from utils.data.statistics import describe_samples
from utils.data.voc import Sample, load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.detection.loss import LossSettings, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate
from utils.inference.detector import Detector
from utils.reports.evaluation_report import Report
from utils.reports.explain import gains_of
from utils.reports.plots import draw_batch
from utils.system.cli import run_script
from utils.system.device import choose_compile, choose_device, choose_precision, keep_freed_memory
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup, join_process_group
from utils.system.errors import UserError, check_choice, check_range, make_folder
from utils.system.files import CACHE_FOLDER
from utils.system.signals import Stopped, StopSignals
from utils.training.batch_size import is_out_of_memory, largest_batch, too_large, try_largest
from utils.training.engine import VALIDATION_BATCH, log_gates, mean_losses, train_one_epoch, validate
from utils.training.optim import accumulation_steps, build_ema, build_optimizer, lr_factor
from utils.training.run_folder import RunLog, keep_fingerprints, load_settings, save_settings
from utils.training.trainer import COLUMNS, Progress, Trainer, TrainingState, read_progress, restore_training
from utils.weights.checkpoint import BEST, LAST, Checkpoint, is_resumable, load_last, newest_run
from utils.weights.pretrained import fits_plain_attention, read_weights, start_from

PLACE_WORDS = {"device": "on the GPU", "ram": "in RAM", "disk": f"in {CACHE_FOLDER}"}
VALIDATION_COST = 0.5  # of an image, as a share of a training step's, for the estimate of time


@dataclass(frozen=True)
class Config:
    """Train YOLOv4-tiny on data in VOC layout."""

    # data
    devkit: str = "VOCdevkit"  # folder of the data sets
    train_sets: tuple[str, ...] = ("VOC2007/train",)  # sets to train on, folder/split, any number
    val_sets: tuple[str, ...] = ("VOC2007/val",)  # sets to choose the best checkpoint on
    classes: str = "model_data/voc_classes.txt"  # file with a class name on each line
    anchors: str = "model_data/yolo_anchors.txt"  # file with six width, height pairs in input pixels
    train_difficult: bool = False  # train on objects marked difficult too
    strict: bool = False  # stop at images and objects that would be skipped or repaired

    # network
    phi: int = 0  # attention: 0 none, 1 SE, 2 CBAM, 3 ECA, 4 CA, 5 SimAM, 6 EMA, 7 ELA, 8 MLCA, 9 Triplet
    attention_args: dict[str, int | float] = field(default_factory=dict)  # the block's arguments, such as: ratio 8
    attention_places: tuple[str, ...] = ModelSpec.places  # where it stands: feat1, feat2, upsample
    identity_start: bool = True  # let attention begin as the identity, so that it cannot harm the first steps
    input_size: tuple[int, int] = (416, 416)  # height and width of the network's input, multiples of 32
    letterbox: bool = False  # keep the aspect ratio of images with gray bars instead of stretching them
    weights: str = ""  # start from a checkpoint, a published .pth or Darknet's .weights; empty: from nothing

    # run
    run_dir: str = ""  # folder of the run; empty: logs/ and the time
    resume: bool = False  # continue the run in run_dir with that run's settings; without run_dir the newest one
    extend: int = 0  # with resume: epochs to add to a run that has finished
    epochs: int = 100  # passes over the training sets
    freeze_epochs: int = 0  # of these, how many train with the backbone frozen
    batch_size: int = 8  # images in memory at a time, over all GPUs; 0: as many as fit into them
    nominal_batch: int = 8  # images per step of the optimizer; smaller batches are accumulated up to it
    eval_every: int = 5  # epochs between validations; the last epoch always has one
    patience: int = 0  # stop after so many validations without a better AP; 0: never
    checkpoint_every: int = 0  # steps between checkpoints within an epoch; 0: only at its end
    cache: str = "auto"  # where the decoded images are: auto, device, ram or disk
    seed: int = 0  # of initialisation, order and augmentation
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of training: auto, bf16, fp16 or fp32
    compile: str = "auto"  # torch.compile: on, off, or auto: on a GPU
    sync_bn: bool = False  # batch norm over the batches of all GPUs; for few images per GPU

    # optimisation
    lr: float = 0.014  # peak learning rate of Muon, which falls along a cosine; AdamW's is a share of it
    weight_decay: float = 0.1  # of weights, not of norms and biases
    warmup: float = 0.1  # share of the run in which the learning rate rises
    ema: float = 0.05  # horizon of the weight average as a share of the run

    # augmentation
    mosaic: float = 1.0  # probability of four images in one
    mosaic_until: float = 0.5  # share of the run after which mosaics stop
    scale: float = 0.3  # size times 1 - scale to 1 + scale
    aspect: float = 0.1  # width / height times 1 / (1 + aspect) to 1 + aspect
    translate: float = 0.1  # shift as a share of the side
    flip: float = 0.5  # probability of mirroring left to right
    hue: float = 0.015  # turn of the colour circle, as a share of it
    saturation: float = 0.5  # saturation times 1 - saturation to 1 + saturation
    value: float = 0.3  # brightness times 1 - value to 1 + value

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        if self.phi not in ATTENTION:
            raise UserError(f"phi is {self.phi}, but must be one of {describe_phi()}")
        if not all(32 <= side <= MAX_SIDE and side % 32 == 0 for side in self.input_size):
            raise UserError(
                f"input_size is {self.input_size}, but both sides must be multiples of 32, up to {MAX_SIDE}"
            )
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
            raise UserError("extend adds epochs to a run that has finished; it needs --resume")

    def augment_settings(self, share: float) -> AugmentSettings:
        """The strengths after a share of the run: mosaics stop for the last part."""
        settings = AugmentSettings(**{item.name: getattr(self, item.name) for item in fields(AugmentSettings)})
        return settings if share < self.mosaic_until else replace(settings, mosaic=0.0)

    def compiles(self, device: torch.device) -> bool:
        """Whether to compile, which batch norm over several processes breaks into parts."""
        return choose_compile(self.compile, device) and not self.sync_bn


def build_trainer(
    config: Config, spec: ModelSpec, num_train: int, device: torch.device, group: ProcessGroup, progress: Progress
) -> Trainer:
    """A fresh network with its optimizer, schedule, average and loss, for epochs from `progress.start` on."""
    batches = num_train // config.batch_size
    accumulate = min(accumulation_steps(config.batch_size, config.nominal_batch), batches)
    steps = math.ceil(batches / accumulate) * (progress.end - progress.start)
    dtype = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)
    model = build_model(spec)
    if config.sync_bn and group.size > 1:
        model = SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.lr, config.weight_decay)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, lr_factor(steps, round(config.warmup * steps))),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ema=build_ema(model, steps, config.ema),
        progress=progress,
        losses=torch.zeros(batches, len(COLUMNS), device=device),
    )
    loss = YoloLoss(spec, LossSettings(), device, group)
    if config.compiles(device):
        model.compile(dynamic=False)
        loss.sums = torch.compile(loss.sums, dynamic=False)
    return Trainer(state, spec, loss, device, dtype, accumulate)


def epoch_batches(config: Config, cache: ImageCache, progress: Progress, group: ProcessGroup) -> Batches:
    """The batches of the epoch under way."""
    share = (progress.epoch - progress.start) / (progress.end - progress.start)
    settings = config.augment_settings(share)
    return Batches(cache, config.batch_size, config.seed, progress.epoch, settings, group)


def run_epoch(
    trainer: Trainer, config: Config, caches: tuple[ImageCache, ImageCache | None], log: RunLog, stop: StopSignals
) -> None:
    """Train, validate when it is time, log, save."""
    train, val = caches
    progress = trainer.state.progress
    started, first = time.perf_counter(), progress.batch
    batches = epoch_batches(config, train, progress, trainer.group)
    frozen = progress.epoch < config.freeze_epochs
    train_one_epoch(trainer, batches, frozen, config.checkpoint_every, log, stop)
    values = mean_losses(trainer)
    seconds = time.perf_counter() - started
    if first < len(batches):
        values["train/images_per_second"] = (len(batches) - first) * config.batch_size / seconds
    values["train/lr"] = trainer.state.scheduler.get_last_lr()[0]
    metrics: dict[str, Any] = {}
    values |= {f"gain/{place}": gain for place, gain in gains_of(trainer.state.ema.module).items()}
    epoch = progress.epoch + 1
    due = epoch % config.eval_every == 0 or epoch == progress.end
    if val and due:
        found, metrics = validate(trainer, val, log, stop)
        values |= found
    if due:
        log_gates(trainer, val or train, log)
    is_best = values.get("val/AP", -2.0) >= progress.best if val else epoch == progress.end
    if "val/AP" in values:
        progress.stale = 0 if values["val/AP"] > progress.best else progress.stale + 1
        progress.best = max(progress.best, values["val/AP"])
        progress.thresholds = [best["threshold"] for best in metrics["best"].values()]
    progress.epoch, progress.batch = epoch, 0
    values["seconds"] = time.perf_counter() - trainer.started
    log.epoch(epoch, values)
    trainer.kept = replace(trainer.kept, info=trainer.kept.info | asdict(progress) | {"metrics": metrics})
    best = Checkpoint(trainer.spec, trainer.kept.weights, trainer.kept.info, {}) if is_best else None
    log.save(trainer.kept, best)
    shown = ("train/loss", "val/loss", "val/AP", "val/AP50", "train/images_per_second")
    line = " ".join(f"{name} {values[name]:.4g}" for name in shown if name in values)
    trainer.group.print_once(f"epoch {epoch}/{progress.end} {line}")


def load_data(
    config: Config, spec: ModelSpec, device: torch.device, group: ProcessGroup, diagnostics: Diagnostics
) -> tuple[ImageCache, ImageCache | None]:
    """The training and, when there are validation sets, the validation images, in memory; says what is wrong in them.

    Only of the training images may some be left out, since that would change what a validation measures.
    """
    val_diagnostics = Diagnostics(config.strict, skips=False)
    samples = load_samples(config.devkit, config.train_sets, spec.class_names, diagnostics)
    val_samples: list[Sample] = []
    if config.val_sets:
        val_samples = load_samples(config.devkit, config.val_sets, spec.class_names, val_diagnostics)
        check_once(val_samples, config.val_sets, val_diagnostics)
    check_overlap(samples, val_samples, diagnostics)
    if config.train_difficult:
        samples = [replace(sample, difficult=np.zeros_like(sample.difficult)) for sample in samples]
    train = build_cache(samples, spec, device, config.cache, group, diagnostics)
    val = build_cache(val_samples, spec, device, config.cache, group, val_diagnostics) if val_samples else None
    diagnostics.check_skip_limit(len(samples), sum(len(sample.labels) for sample in samples))
    diagnostics.print_summary("training", group.print_once)
    val_diagnostics.print_summary("validation", group.print_once)
    group.print_once(f"training: {describe_samples(train.samples, spec.class_names)}")
    return train, val


def new_spec(config: Config, weights: dict[str, Tensor], diagnostics: Diagnostics) -> ModelSpec:
    """What to build for a new run; published weights of the same attention need its plain gate."""
    spec = ModelSpec(
        class_names=load_classes(config.classes, diagnostics),
        anchors=load_anchors(config.anchors),
        phi=config.phi,
        attention_args=config.attention_args,
        places=config.attention_places,
        identity_start=config.identity_start and config.phi > 0,
        input_size=config.input_size,
        letterbox=config.letterbox,
    )
    try:
        spec.check()
        model = build_model(spec)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(spec, identity_start=False) if fits_plain_attention(model, weights) else spec


def open_run(config: Config, group: ProcessGroup) -> tuple[Config, Checkpoint | None, RunLog]:
    """The settings of the run, its last checkpoint when it resumes, and its folder, locked."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.run_dir:
        raise UserError("with torchrun --max-restarts give --run-dir, so that a restarted run finds its folder")
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    name = config.run_dir or (newest_run() if config.resume else f"logs/{now}")
    folder = Path(group.broadcast(name))
    log = RunLog(folder, quiet=not group.is_main)
    own = group.broadcast(group.restarted and log.read_owner() == group.agent)  # torchrun began the run that is there
    if is_resumable(folder) and not (config.resume or own):
        raise UserError(f"{folder} already holds a run; add --resume to continue it, or choose another --run-dir")
    log.write_owner(group.agent)
    if not config.resume and not is_resumable(folder):
        return config, None, log
    checkpoint = load_last(folder, group.print_once)
    free = ("run_dir", "resume", "extend", "device", "cache", "compile", "checkpoint_every", "patience")
    if group.restarted:  # by the command that began the run, whose batch size `share_batch` has replaced
        config = replace(config, batch_size=Config.batch_size)
    return load_settings(folder, config, free), checkpoint, log


def find_progress(config: Config, checkpoint: Checkpoint | None, group: ProcessGroup) -> Progress:
    """Where to begin, and how far to go."""
    if checkpoint is None:
        return Progress(end=config.epochs)
    progress = read_progress(checkpoint)
    if not progress.is_finished(config.patience):
        if config.extend and not group.restarted:
            raise UserError(
                f"the run has {progress.epoch} of {progress.end} epochs; --resume without --extend continues it, and "
                "more can be added when it has finished"
            )
        within = f", batch {progress.batch} of the next" if progress.batch else ""
        group.print_once(f"resuming after epoch {progress.epoch}{within}, with the run's settings")
        return progress
    if config.extend:
        return replace(progress, start=progress.epoch, end=progress.epoch + config.extend, stale=0)
    return progress


def share_batch(
    config: Config, spec: ModelSpec, cache: ImageCache, device: torch.device, group: ProcessGroup
) -> Config:
    """The settings with a batch size that all processes have an equal share of; 0 becomes the largest that fits."""
    size = config.batch_size
    if size == 0:
        if device.type != "cuda":
            raise UserError("batch_size 0 picks what fits into a GPU; on the CPU give a number, such as 8")
        alone = replace(config, batch_size=1, nominal_batch=1, compile="off")
        probe = build_trainer(alone, spec, len(cache), device, ProcessGroup(), Progress(end=1))
        fits = largest_batch(probe, 2 * cache.labels.shape[1], len(cache) // group.size)
        size = group.size * min(group.all_gather(fits))
        group.print_once(
            f"batch size {size} fits; an epoch then has {len(cache) // size} batches, which should not be too few"
        )
    if size % group.size or len(cache) < group.size:
        raise UserError(
            f"{len(cache)} images in batches of {size} cannot be shared by {group.size} processes; give a multiple of "
            f"{group.size} as --batch-size, and no fewer images"
        )
    return replace(config, batch_size=min(size, len(cache)) // group.size * group.size)


def rehearse(trainer: Trainer, config: Config, caches: tuple[ImageCache, ImageCache | None]) -> None:
    """Try the largest batch, also to compile it, and say what it takes; the state stays as it was."""
    (train, val), progress = caches, trainer.state.progress
    height, width = trainer.spec.input_size
    compiled = config.compiles(trainer.device)
    modes = (False, True) if compiled and progress.epoch < config.freeze_epochs else (False,)
    objects = 2 * train.labels.shape[1]
    trial = try_largest(trainer, config.batch_size, objects, modes)
    epochs = progress.end - progress.epoch
    validated = len(val) * math.ceil(epochs / config.eval_every) * VALIDATION_COST if val else 0
    seconds = trial.seconds / config.batch_size * (epochs * len(train) + validated)
    trainer.group.print_once(
        f"a step of {config.batch_size} images at {height}x{width} takes {trial.seconds:.3f} s and "
        f"{trial.memory / 1e9:.1f} GB; {epochs} epochs about {timedelta(seconds=round(seconds))} h"
    )


def prepare(
    config: Config, checkpoint: Checkpoint | None, progress: Progress, log: RunLog, group: ProcessGroup
) -> tuple[Config, Trainer, tuple[ImageCache, ImageCache | None]]:
    """Read the data, build the network or restore it, begin or reopen the log."""
    device = choose_device(config.device)
    if device.type == "cpu":
        if config.sync_bn:
            raise UserError("sync_bn needs GPUs; leave it out on the CPU")
        keep_freed_memory()
    diagnostics = Diagnostics(config.strict)
    weights = read_weights(config.weights, diagnostics) if config.weights and checkpoint is None else {}
    spec = checkpoint.spec if checkpoint else new_spec(config, weights, diagnostics)
    caches = load_data(config, spec, device, group, diagnostics)
    if group.is_main:
        found = {split: cache.fingerprints() for split, cache in zip(("train", "val"), caches, strict=True) if cache}
        keep_fingerprints(log.folder, found, resumed=checkpoint is not None)
    config = share_batch(config, spec, caches[0], device, group)
    trainer = build_trainer(config, spec, len(caches[0]), device, group, progress)
    group.print_once(f"YOLOv4-tiny phi {spec.phi}: {summary(trainer.state.model, spec.input_size)}")
    place = PLACE_WORDS[caches[0].place]
    group.print_once(
        f"{len(caches[0])} images {place}, batches of {config.batch_size}, {device}, {trainer.dtype}"
        f"{f', {group.size} processes' if group.size > 1 else ''}; run folder {log.folder}"
    )
    if checkpoint:
        if progress.start != checkpoint.info["start"]:  # extended: its schedule begins anew
            fresh = {"scheduler": trainer.state.scheduler.state_dict()}
            checkpoint = replace(checkpoint, info=checkpoint.info | asdict(progress) | fresh)
        restore_training(trainer.state, checkpoint)
        trainer.keep(progress.batch)
    elif weights:
        group.print_once(start_from(trainer.state.model, weights, config.weights))
        trainer.keep(progress.batch)  # what `rehearse` goes back to
    if checkpoint is None and group.is_main:
        save_settings(log.folder, config)
    log.open(progress.epoch)
    return config, trainer, caches


def train_epochs(
    config: Config,
    checkpoint: Checkpoint | None,
    progress: Progress,
    log: RunLog,
    stop: StopSignals,
    group: ProcessGroup,
) -> tuple[Progress, ImageCache | None]:
    """From `progress` on to the end of the run; returns where it then stands, and the validation images."""
    config, trainer, caches = prepare(config, checkpoint, progress, log, group)
    if progress.epoch == progress.batch == 0:
        batches = epoch_batches(config, caches[0], progress, group)
        for number in range(min(2, len(batches))):
            log.picture(f"batch_{number}", partial(draw_batch, batches, number, trainer.spec.class_names), 0)
    rehearse(trainer, config, caches)
    try:
        with stop.defer():
            while not trainer.state.progress.is_finished(config.patience):
                run_epoch(trainer, config, caches, log, stop)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(config.batch_size, trainer.spec.input_size) from None
    log.finish_saving()
    return trainer.state.progress, caches[1]


def report(config: Config, cache: ImageCache, run: Path, group: ProcessGroup) -> None:
    """What `eval.py` writes, of the best checkpoint on the validation sets."""
    device, weights, folder = choose_device(config.device), group.broadcast(run / BEST), run / "val"
    detector = Detector.load(weights, device, thresholds=EVALUATION_THRESHOLDS)
    detections = detector.detect_cached(cache, VALIDATION_BATCH, group)
    if group.is_main:
        make_folder(folder)
        evaluation = evaluate(cache.samples, detections, cache.sizes, detector.spec.class_names)
        Report(weights, config.devkit, config.val_sets, detector, cache, detections, evaluation).write(folder)


def train(config: Config, stop: StopSignals, group: ProcessGroup) -> Path:
    """A run from its beginning, or from where it stopped, to its end."""
    config, checkpoint, log = open_run(config, group)
    with closing(log):
        progress = find_progress(config, checkpoint, group)
        if progress.is_finished(config.patience):
            group.print_once(f"the run is finished after {progress.epoch} epochs; --resume --extend 20 would add 20")
            return log.folder
        try:
            progress, val = train_epochs(config, checkpoint, progress, log, stop, group)
        except Stopped:
            log.finish_saving()
            resume = f"--resume --run-dir {log.folder} continues as if it had not"
            again = "there is no checkpoint yet, and the same command begins anew"
            group.print_once(f"stopped; {resume if is_resumable(log.folder) else again}")
            raise
    if progress.epoch < progress.end:
        group.print_once(f"stopped early, since {config.patience} validations in a row brought nothing better")
    best_of = f"the best on {', '.join(config.val_sets)}" if config.val_sets else "the same, without validation"
    group.print_once(f"done: {log.folder / LAST} is the last checkpoint, {BEST} {best_of}")
    if group.any_rank(stop.requested):
        stop.raise_stopped()
    if val is not None:
        report(config, val, log.folder, group)
        group.print_once(f"what the best one finds, and misses: {log.folder / 'val' / 'report.html'}")
    return log.folder


def main(config: Config) -> Path:
    """Train, and return the run's folder; processes that torchrun started train together."""
    with StopSignals() as stop, join_process_group(choose_device(config.device)) as group:
        return train(config, stop, group)


if __name__ == "__main__":
    run_script(main, Config)
