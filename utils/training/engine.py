"""The training loop: the steps of an epoch, its validation, its row of metrics and its checkpoints.

`settings` is the `Config` of train.py that the run uses.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from tqdm import tqdm

from nets.yolo import read_gains
from utils.data.cache import ImageCache
from utils.data.loader import EpochBatches
from utils.detection.loss import TERMS, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate, filter_confident
from utils.inference.detector import Detector
from utils.inference.drawing import draw_sheet, draw_targets
from utils.reports.evaluation_report import EvaluationReport
from utils.reports.explain import compute_attention
from utils.system.device import to_device
from utils.system.distributed import ProcessGroup
from utils.system.files import make_folder
from utils.system.signals import StopSignals
from utils.training.batch_size import explain_out_of_memory
from utils.training.run_folder import RunData, RunFolder
from utils.training.trainer import COLUMNS, Trainer
from utils.weights.checkpoint import BEST, Checkpoint

VALIDATION_BATCH = 16  # images per batch, also the default of eval.py
PREVIEW_IMAGES = 8  # images per picture of a batch or of a validation
GATE_IMAGES = 4  # images whose attention gates are logged
SAVE_INTERVAL = 30.0  # minimum seconds between checkpoints of epochs; on a GPU, saving may take longer than an epoch
CHECK_INTERVAL = 20  # batches between two checks of the losses, which wait for the device
PRINTED = ("train/loss", "val/loss", "val/AP", "val/AP50", "train/images_per_second")


def train_epochs(trainer: Trainer, settings: Any, data: RunData, run: RunFolder, stop: StopSignals) -> None:
    """Train to the last epoch, or until early stopping; raises Stopped after a signal."""
    with explain_out_of_memory(trainer.batching.batch_size, trainer.spec.input_size), stop.defer():
        while not trainer.state.progress.is_finished(settings.patience):
            run_epoch(trainer, settings, data, run, stop)
    run.finish_saving()


def run_epoch(trainer: Trainer, settings: Any, data: RunData, run: RunFolder, stop: StopSignals) -> None:
    """Train one epoch, validate if it is due, log a row of metrics and save the checkpoints."""
    values = train_and_measure(trainer, settings, data, run, stop)
    values |= {f"gain/{place}": gain for place, gain in read_gains(trainer.state.ema.module).items()}
    progress = trainer.state.progress
    epoch = progress.epoch + 1
    due = epoch % settings.eval_every == 0 or epoch == progress.end
    is_best = data.val is None and epoch == progress.end
    metrics: dict[str, Any] = {}
    if due and data.val:
        validation_values, metrics = validate(trainer, data.val, run, stop)
        values |= validation_values
        thresholds = [best["threshold"] for best in metrics["best"].values()]
        is_best = progress.record_validation(values["val/AP"], thresholds)
    if due:
        log_gates(trainer, data.val or data.train, run)
    progress.epoch, progress.batch = epoch, 0
    values["seconds"] = time.perf_counter() - trainer.started
    run.log_epoch(epoch, values)
    trainer.update_snapshot(metrics=metrics)
    if is_best or progress.is_finished(settings.patience) or run.seconds_since_save() >= SAVE_INTERVAL:
        last = trainer.snapshot
        run.save_checkpoints(last, Checkpoint(trainer.spec, last.weights, last.info, {}) if is_best else None)
    printed = " ".join(f"{name} {values[name]:.4g}" for name in PRINTED if name in values)
    trainer.group.print_once(f"epoch {epoch}/{progress.end} {printed}")


def train_and_measure(
    trainer: Trainer, settings: Any, data: RunData, run: RunFolder, stop: StopSignals
) -> dict[str, float]:
    """Train the rest of the current epoch; returns its mean losses, its speed and the learning rate."""
    started, progress = time.perf_counter(), trainer.state.progress
    batches = epoch_batches(trainer, settings, data)
    remaining = len(batches) - progress.batch
    train_one_epoch(trainer, batches, settings, run, stop)
    values = mean_losses(trainer)
    if remaining:
        seconds = time.perf_counter() - started
        values["train/images_per_second"] = remaining * trainer.batching.batch_size / seconds
    return values | {"train/lr": trainer.state.scheduler.get_last_lr()[0]}


def epoch_batches(trainer: Trainer, settings: Any, data: RunData) -> EpochBatches:
    progress = trainer.state.progress
    fraction = (progress.epoch - progress.start) / (progress.end - progress.start)
    augment, batch_size = settings.augment_settings(fraction), trainer.batching.batch_size
    return EpochBatches(data.train, batch_size, settings.seed, progress.epoch, augment, trainer.group)


def draw_batch(batches: EpochBatches, number: int, device: torch.device, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a training batch with their boxes, as one RGB picture."""
    with closing(batches.load([number], device)) as loaded:
        images, boxes, labels = (values[:PREVIEW_IMAGES].cpu() for values in next(loaded))
    return draw_targets(images, boxes, labels, class_names)


def train_one_epoch(trainer: Trainer, batches: EpochBatches, settings: Any, run: RunFolder, stop: StopSignals) -> None:
    """Train on the remaining batches of the epoch; raises Stopped after a signal, once a checkpoint is saved."""
    state, total = trainer.state, len(batches)
    trainer.set_mode(frozen=batches.epoch < settings.freeze_epochs)
    title = f"epoch {batches.epoch + 1}/{state.progress.end}"
    with tqdm(total=total, desc=title, leave=False, disable=run.read_only or None) as bar:
        while state.progress.batch < total:  # once, and once more after each rollback
            skipped = state.progress.skipped_batches(batches.epoch)
            numbers = range(state.progress.batch, total)
            accumulated = 0  # batches since the last step
            remaining = [number for number in numbers if number not in skipped]
            with closing(batches.load(remaining, trainer.device, trainer.render)) as loaded:
                for number in numbers:
                    done = number + 1
                    at_step = done % trainer.batching.accumulate == 0 or done == total
                    if number not in skipped:
                        # if batches are skipped, the last of a step may be among them: synchronize after each
                        state.losses[number] = trainer.backward(*next(loaded), sync=at_step or bool(skipped))
                        accumulated += 1
                    if at_step and accumulated:
                        state.step()
                        accumulated = 0
                    bar.update(done - bar.n)
                    if at_step and not finish_step(trainer, batches, done, settings, run, stop):
                        break


def finish_step(
    trainer: Trainer, batches: EpochBatches, done: int, settings: Any, run: RunFolder, stop: StopSignals
) -> bool:
    """Commit or roll back, save a checkpoint and raise Stopped when these are due; returns False after a rollback."""
    stopping = trainer.group.any_rank(stop.requested)
    steps, interval = ceil(done / trainer.batching.accumulate), settings.checkpoint_every
    saving = interval > 0 and steps % interval == 0
    unchecked = done - trainer.state.progress.batch
    if not (stopping or saving or unchecked >= CHECK_INTERVAL or done == len(batches)):
        return True
    if not trainer.commit_or_roll_back(batches, done):
        return False
    if saving or stopping:
        run.save_checkpoints(trainer.snapshot)
    if stopping:
        stop.raise_stopped()
    return True


def mean_losses(trainer: Trainer) -> dict[str, float]:
    """The mean of each column over the batches of the current epoch that were not skipped."""
    progress = trainer.state.progress
    skipped = progress.skipped_batches(progress.epoch)
    used = [number for number in range(len(trainer.state.losses)) if number not in skipped]
    means = trainer.state.losses[used].mean(dim=0).tolist()
    return {f"train/{name}": value for name, value in zip(COLUMNS, means, strict=True)}


@torch.inference_mode()
def validate(
    trainer: Trainer, cache: ImageCache, run: RunFolder, stop: StopSignals
) -> tuple[dict[str, float], dict[str, Any]]:
    """Validate the averaged weights; returns the values to log and all metrics. Raises Stopped after a signal."""
    group, spec = trainer.group, trainer.spec
    group.broadcast_module(trainer.state.ema.module)
    detector = trainer.build_detector()
    loss = YoloLoss(spec, trainer.loss.settings, trainer.device)  # for the images of this process
    losses = torch.zeros(len(TERMS), device=trainer.device)
    found: dict[int, Tensor] = {}  # kept on the device, since each copy to the host would wait for a GPU
    with tqdm(total=len(cache), desc="validating", leave=False, disable=run.read_only or None) as bar:
        for part, heads in detector.run_cached(cache, VALIDATION_BATCH, group):
            if stop.requested:
                break
            terms = loss(heads, *(to_device(values[part], trainer.device) for values in (cache.boxes, cache.labels)))
            losses += torch.stack([terms[name] for name in TERMS]) * (part.stop - part.start) / len(cache)
            found[part.start] = detector.select_rows(heads)
            bar.update(group.size * (part.stop - part.start))
    if group.any_rank(stop.requested):
        run.save_checkpoints(trainer.snapshot)
        stop.raise_stopped()
    losses = group.all_reduce(losses).tolist()
    detections = detector.gather_detections(found, cache, group)
    if not group.is_main:
        return group.broadcast(None)
    evaluation = evaluate(cache.samples, detections, cache.sizes, spec.class_names)
    metrics = evaluation.metrics
    draw = partial(draw_examples, detections, evaluation.thresholds, cache, spec.class_names)
    run.attempt("pictures", run.write_picture, "val_examples", draw, trainer.state.progress.epoch + 1)
    values = {f"val/{name}": value for name, value in zip(TERMS, losses, strict=True)}
    values |= {f"val/{name}": metrics["coco"][name] for name in ("AP", "AP50", "AP75")}
    values |= {f"val/{name}": metrics["voc"][name] for name in ("mAP_11point", "mAP_area")}
    return group.broadcast((values, metrics))


def draw_examples(
    detections: Sequence[sv.Detections], thresholds: Sequence[float], cache: ImageCache, class_names: Sequence[str]
) -> np.ndarray:
    """The first validation images with the detections that prediction would show, as one RGB picture."""
    shown = []
    for detected, fit in zip(detections[:PREVIEW_IMAGES], cache.fits, strict=False):
        kept = filter_confident(detected, thresholds)
        boxes = fit.to_input(kept.xyxy)
        shown.append(sv.Detections(boxes, confidence=kept.confidence, class_id=kept.class_id))
    return draw_sheet(cache.images[:PREVIEW_IMAGES], shown, class_names)


def log_gates(trainer: Trainer, cache: ImageCache, run: RunFolder) -> None:
    """Log the distribution of the attention gates of the averaged network on a few images to TensorBoard."""
    if trainer.spec.phi and not run.read_only:
        pixels = cache.images[:GATE_IMAGES].to(trainer.device).float() / 255
        attention = compute_attention(trainer.build_detector().network.model, pixels)
        gates = {f"gate/{place}": attended.gate.cpu().numpy() for place, attended in attention.items()}
        run.attempt("TensorBoard events", run.write_histograms, gates, trainer.state.progress.epoch + 1)


def write_report(
    run: RunFolder, devkit: str, val_sets: tuple[str, ...], cache: ImageCache, device: torch.device, group: ProcessGroup
) -> Path:
    """Write the report of `eval.py` on the best checkpoint and the validation sets; returns its folder."""
    weights, folder = run.path / BEST, run.path / "val"
    detector = Detector.load(weights, device, thresholds=EVALUATION_THRESHOLDS)
    detections = detector.detect_cached(cache, VALIDATION_BATCH, group)
    if group.is_main:
        make_folder(folder)
        evaluation = evaluate(cache.samples, detections, cache.sizes, detector.spec.class_names)
        EvaluationReport(weights, devkit, val_sets, detector, cache, detections, evaluation).write(folder)
    return folder
