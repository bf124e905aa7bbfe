"""Train YOLOv4-tiny on VOC data: change the constants of `Config`, or give them as flags, and run it.

python train.py --train-sets VOC2007/trainval --phi 2 --epochs 50
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from nets.attention import ATTENTION, describe_phi
from nets.yolo import ModelSpec, summary
from utils.anchors import load_anchors
from utils.augment import AugmentSettings, augment, epoch_order
from utils.cache import ImageCache, build_cache
from utils.checkpoint import (
    Checkpoint,
    TrainingState,
    load_checkpoint,
    newest_checkpoint,
    pack_training,
    restore_training,
    save_checkpoint,
)
from utils.detector import EVALUATION_THRESHOLDS, Detector, Thresholds
from utils.device import autocast, choose_device, choose_precision, keep_freed_memory
from utils.errors import UserError, check_choice, check_range, run_script
from utils.images import draw_sheet, draw_targets
from utils.loss import TERMS, LossSettings, YoloLoss, check_losses
from utils.metrics import evaluate
from utils.optim import (
    OPTIMIZERS,
    SCHEDULES,
    accumulation_steps,
    build_ema,
    build_optimizer,
    freeze_backbone,
    lr_factor,
)
from utils.runlog import RunLog, load_settings, save_settings
from utils.voc import load_classes, load_samples
from utils.weights import fits_plain_attention, read_weights, start_from

CHECK_EVERY = 20  # steps between two looks at the losses, which wait for the device
PICTURES = 8  # images drawn of a batch and of a validation


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

    # network
    phi: int = 0  # attention: 0 none, 1 SE, 2 CBAM, 3 ECA, 4 CA
    attention_args: dict[str, int] = field(default_factory=dict)  # the block's arguments, such as: ratio 8
    identity_start: bool = True  # let attention begin as the identity, so that it cannot harm the first steps
    input_size: tuple[int, int] = (416, 416)  # height and width of the network's input, multiples of 32
    letterbox: bool = False  # keep the aspect ratio of images with gray bars instead of stretching them
    weights: str = ""  # start from a checkpoint or a published .pth; empty: from nothing

    # run
    run_dir: str = ""  # folder of the run; empty: logs/ and the time
    resume: bool = False  # continue the run in run_dir with that run's settings; without run_dir the newest one
    epochs: int = 100  # passes over the training sets
    freeze_epochs: int = 0  # of these, how many train with the backbone frozen
    batch_size: int = 16  # images in memory at a time
    nominal_batch: int = 16  # images per step of the optimizer; smaller batches are accumulated up to it
    eval_every: int = 5  # epochs between validations; the last epoch always has one
    seed: int = 0  # of initialisation, order and augmentation
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of training: auto, bf16, fp16 or fp32

    # optimisation
    optimizer: str = "adamw"  # adamw or sgd
    lr: float = 0.004  # peak learning rate; about 0.1 for sgd
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.05  # of weights, not of norms and biases; about 0.0005 for sgd
    schedule: str = "cosine"  # cosine, or step: a tenth at 80 % and at 90 % of the run
    warmup: float = 0.1  # share of the run in which the learning rate rises
    ema: float = 0.05  # horizon of the weight average as a share of the run
    label_smoothing: float = 0.0  # share of the class target spread over all classes

    # augmentation
    mosaic: float = 0.3  # probability of four images in one
    mixup: float = 0.0  # probability of a second image on top
    mosaic_until: float = 0.5  # share of the run after which mosaic and mixup stop
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
        if min(self.input_size) < 32 or any(side % 32 for side in self.input_size):
            raise UserError(f"input_size is {self.input_size}, but both sides must be multiples of 32")
        check_range(self, 1, 1e9, "epochs", "batch_size", "nominal_batch", "eval_every")
        check_range(self, 0, self.epochs, "freeze_epochs")
        check_range(self, 1e-9, 1e3, "lr")
        check_range(self, 0, 1e3, "weight_decay", "aspect")
        check_range(self, 0, 2**63, "seed")
        check_range(self, 0, 1, "momentum", "warmup", "label_smoothing", "mosaic", "mixup", "mosaic_until", "flip")
        check_range(self, 0, 0.99, "scale", "translate", "hue", "saturation", "value")
        check_range(self, 1e-6, 1, "ema")
        check_choice(self, "optimizer", OPTIMIZERS)
        check_choice(self, "schedule", SCHEDULES)

    def augment_settings(self, epoch: int) -> AugmentSettings:
        """The strengths in an epoch: mosaic and mixup stop for the last part."""
        settings = AugmentSettings(**{item.name: getattr(self, item.name) for item in fields(AugmentSettings)})
        return settings if epoch < self.mosaic_until * self.epochs else replace(settings, mosaic=0.0, mixup=0.0)


class Trainer:
    """A network, what changes while it trains, and the settings of a step."""

    def __init__(self, config: Config, spec: ModelSpec, num_train: int, device: torch.device) -> None:
        self.config, self.spec, self.device = config, spec, device
        self.dtype = choose_precision(config.precision, device)
        self.started = time.perf_counter()
        self.batch_size = min(config.batch_size, num_train)
        self.batches = num_train // self.batch_size  # of an epoch; what does not fill one comes in another epoch
        self.accumulate = min(accumulation_steps(self.batch_size, config.nominal_batch), self.batches)
        steps = math.ceil(self.batches / self.accumulate) * config.epochs
        torch.manual_seed(config.seed)
        model = spec.build().to(device).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(model, config.optimizer, config.lr, config.momentum, config.weight_decay)
        self.state = TrainingState(
            model=model,
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, lr_factor(config.schedule, steps, round(config.warmup * steps))),
            scaler=torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16),
            ema=build_ema(model, steps, config.ema),
        )
        self.loss = YoloLoss(spec, LossSettings(label_smoothing=config.label_smoothing), device)

    def detector(self) -> Detector:
        """The averaged weights, as validation and prediction use them."""
        return Detector(self.state.ema.module, self.spec, self.device, thresholds=EVALUATION_THRESHOLDS)


def train_one_epoch(trainer: Trainer, cache: ImageCache, epoch: int) -> dict[str, float]:
    """One pass over the cache; returns the mean of each loss term.

    Raises UserError with the step and the images when a loss is not finite.
    """
    state, config = trainer.state, trainer.config
    order, random = epoch_order(config.seed, epoch, len(cache))
    settings = config.augment_settings(epoch)
    state.model.train()
    freeze_backbone(state.model, epoch < config.freeze_epochs)
    losses = torch.zeros(trainer.batches, len(TERMS), device=trainer.device)
    checked = 0
    progress = tqdm(range(trainer.batches), f"epoch {epoch + 1}/{config.epochs}", leave=False, disable=None)
    for i in progress:
        rows = slice(i * trainer.batch_size, (i + 1) * trainer.batch_size)
        images, boxes, labels = augment(cache, order[rows], random[rows], settings, trainer.device)
        with autocast(trainer.device, trainer.dtype):
            heads = state.model(images.contiguous(memory_format=torch.channels_last))
        terms = trainer.loss(heads, boxes, labels)
        state.scaler.scale(terms["loss"] / trainer.accumulate).backward()
        losses[i] = torch.stack([terms[name].detach() for name in TERMS])
        last = i == trainer.batches - 1
        if (i + 1) % trainer.accumulate == 0 or last:
            state.step()
        if (i + 1) % CHECK_EVERY == 0 or last:
            names = [cache.samples[k].name for k in order[checked * trainer.batch_size : rows.stop].tolist()]
            check_losses(losses[checked : i + 1], names, f"epoch {epoch + 1}", checked)
            progress.set_postfix(loss=f"{losses[checked : i + 1, 0].mean():.4f}")
            checked = i + 1
    means = dict(zip(TERMS, losses.mean(dim=0).tolist(), strict=True))
    return {f"train/{name}": value for name, value in means.items()}


@torch.inference_mode()
def validate(trainer: Trainer, cache: ImageCache, log: RunLog, epoch: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Loss and accuracy of the averaged weights on the validation split: values to log, and all the metrics."""
    detector = trainer.detector()
    detections: list[sv.Detections] = []
    losses = torch.zeros(len(TERMS))
    with tqdm(total=len(cache), desc="validating", leave=False, disable=None) as progress:
        for part, heads in detector.run_cached(cache, trainer.batch_size):
            terms = trainer.loss(heads, cache.boxes[part].to(trainer.device), cache.labels[part].to(trainer.device))
            images = part.stop - part.start
            losses += torch.stack([terms[name] for name in TERMS]).cpu() * images / len(cache)
            detections += detector.select(heads, cache.fits[part], cache.sizes[part])
            progress.update(images)
    class_names = trainer.spec.class_names
    metrics, _ = evaluate(cache.samples, detections, cache.sizes, class_names)
    log.picture("val_examples", draw_examples(detections, cache, class_names), epoch)
    values = {f"val/{name}": value for name, value in zip(TERMS, losses.tolist(), strict=True)}
    values |= {f"val/{name}": metrics["coco"][name] for name in ("AP", "AP50", "AP75")}
    values |= {f"val/{name}": metrics["voc"][name] for name in ("mAP_11point", "mAP_area")}
    return values, metrics


def draw_examples(detections: Sequence[sv.Detections], cache: ImageCache, class_names: Sequence[str]) -> np.ndarray:
    """The first validation images as the network sees them, with what prediction would show."""
    shown = []
    for found, fit in zip(detections[:PICTURES], cache.fits, strict=False):
        sure = found.confidence > Thresholds().confidence
        boxes = fit.to_input(found.xyxy[sure])
        shown.append(sv.Detections(boxes, confidence=found.confidence[sure], class_id=found.class_id[sure]))
    return draw_sheet(cache.images[:PICTURES], shown, class_names)


def draw_batch(trainer: Trainer, cache: ImageCache, batch: int) -> np.ndarray:
    """The first images of a batch of the first epoch as the network will see them, with their boxes."""
    order, random = epoch_order(trainer.config.seed, 0, len(cache))
    rows = slice(batch * trainer.batch_size, batch * trainer.batch_size + min(PICTURES, trainer.batch_size))
    settings = trainer.config.augment_settings(0)
    images, boxes, labels = augment(cache, order[rows], random[rows], settings, torch.device("cpu"))
    return draw_targets(images, boxes, labels, trainer.spec.class_names)


def run_epoch(
    trainer: Trainer, caches: tuple[ImageCache, ImageCache | None], log: RunLog, epoch: int, best: float
) -> float:
    """Train, validate when it is time, log, save; returns the best AP so far."""
    config, (train, val) = trainer.config, caches
    started = time.perf_counter()
    values = train_one_epoch(trainer, train, epoch)
    values["train/images_per_second"] = trainer.batches * trainer.batch_size / (time.perf_counter() - started)
    if not all(value.isfinite().all() for value in trainer.state.model.parameters()):
        raise UserError(
            f"the weights are not finite after epoch {epoch + 1}; the last checkpoint is still good, lower lr"
        )
    values["train/lr"] = trainer.state.scheduler.get_last_lr()[0]
    metrics: dict[str, Any] = {}
    if val and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs):
        found, metrics = validate(trainer, val, log, epoch + 1)
        values |= found
    is_best = values.get("val/AP", -2.0) >= best if val else epoch + 1 == config.epochs
    best = max(best, values.get("val/AP", -1.0))
    values["seconds"] = time.perf_counter() - trainer.started
    log.epoch(epoch + 1, values)
    info = {"epoch": epoch + 1, "best": best, "metrics": metrics}
    if is_best:
        weights = trainer.state.ema.module.state_dict()
        save_checkpoint(log.folder / "best.safetensors", Checkpoint(trainer.spec, weights, info, {}))
    save_checkpoint(log.folder / "last.safetensors", pack_training(trainer.state, trainer.spec, info))
    shown = ("train/loss", "val/loss", "val/AP", "val/AP50", "train/images_per_second")
    print(f"epoch {epoch + 1}/{config.epochs}", *(f"{name} {values[name]:.4g}" for name in shown if name in values))
    return best


def load_data(config: Config, spec: ModelSpec, device: torch.device) -> tuple[ImageCache, ImageCache | None]:
    """The training and, when there are validation sets, the validation images, in memory."""
    train_samples = load_samples(config.devkit, config.train_sets, spec.class_names)
    val_samples = load_samples(config.devkit, config.val_sets, spec.class_names) if config.val_sets else []
    train = build_cache(train_samples, spec.input_size, spec.letterbox, device, config.train_difficult)
    return train, build_cache(val_samples, spec.input_size, spec.letterbox, device) if val_samples else None


def new_spec(config: Config, weights: dict[str, Tensor]) -> ModelSpec:
    """What to build for a new run; published weights of the same attention need its plain gate."""
    spec = ModelSpec(
        class_names=load_classes(config.classes),
        anchors=load_anchors(config.anchors),
        phi=config.phi,
        attention_args=config.attention_args,
        identity_start=config.identity_start and config.phi > 0,
        input_size=config.input_size,
        letterbox=config.letterbox,
    )
    try:
        model = spec.build()
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(spec, identity_start=False) if fits_plain_attention(model, weights) else spec


def open_run(config: Config) -> tuple[Config, Path, Checkpoint | None]:
    """The settings and the folder of the run, and its last checkpoint when it resumes."""
    if not config.resume:
        folder = Path(config.run_dir or f"logs/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        if (folder / "last.safetensors").exists():
            raise UserError(f"{folder} already holds a run; add --resume to continue it, or choose another --run-dir")
        return config, folder, None
    folder = Path(config.run_dir) if config.run_dir else newest_checkpoint("last").parent
    checkpoint = load_checkpoint(folder / "last.safetensors")
    settings = load_settings(folder, config, free=("run_dir", "resume", "device"))
    device = settings.device if config.device == "auto" else config.device
    print(f"resuming {folder} after epoch {checkpoint.info['epoch']}, with the settings in its config.json")
    return replace(settings, device=device), folder, checkpoint


def main(config: Config) -> Path:
    """Train, and return the run's folder."""
    config, folder, checkpoint = open_run(config)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    weights = read_weights(config.weights) if config.weights and checkpoint is None else {}
    spec = checkpoint.spec if checkpoint else new_spec(config, weights)
    caches = load_data(config, spec, device)
    train = caches[0]
    trainer = Trainer(config, spec, len(train), device)
    print(f"YOLOv4-tiny phi {spec.phi}: {summary(trainer.state.model, spec.input_size)}")
    print(f"{len(train)} images, batches of {trainer.batch_size}, {device}, {trainer.dtype}; run folder {folder}")
    first_epoch, best = 0, -1.0
    if checkpoint:
        restore_training(trainer.state, checkpoint)
        first_epoch, best = checkpoint.info["epoch"], checkpoint.info["best"]
    else:
        if weights:
            print(start_from(trainer.state.model, weights, config.weights))
        save_settings(folder, config)
    log = RunLog(folder, first_epoch)
    if first_epoch == 0:
        for batch in range(min(2, trainer.batches)):
            log.picture(f"batch_{batch}", draw_batch(trainer, train, batch), 0)
    if first_epoch == config.epochs:
        print(f"this run is finished; to train longer, start a new one with --weights {folder}/last.safetensors")
    try:
        for epoch in range(first_epoch, config.epochs):
            best = run_epoch(trainer, caches, log, epoch, best)
    except KeyboardInterrupt:
        resume = f"python train.py --resume --run-dir {folder} continues at its beginning"
        how = resume if (folder / "last.safetensors").exists() else "nothing was saved yet"
        print(f"\nstopped in epoch {epoch + 1}; {how}")
        raise
    finally:
        log.close()
    best_of = f"the best on {', '.join(config.val_sets)}" if config.val_sets else "the same, without validation"
    print(f"done: {folder}/last.safetensors is the last checkpoint, best.safetensors {best_of}")
    return folder


if __name__ == "__main__":
    run_script(main, Config)
