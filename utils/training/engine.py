"""The training loop: the batches of an epoch, its validation, its row of metrics and its checkpoints."""

import time
from collections.abc import Sequence
from contextlib import closing
from math import ceil
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.data.augment import render_batch
from utils.data.loader import EpochBatches
from utils.inference.drawing import draw_targets
from utils.reports.explain import read_gains
from utils.system.signals import StopSignals
from utils.training.batch_size import explain_out_of_memory
from utils.training.run_data import RunData
from utils.training.run_folder import RunFolder
from utils.training.trainer import COLUMNS, Trainer
from utils.training.validation import PREVIEW_IMAGES, log_gates, validate
from utils.weights.checkpoint import Checkpoint

CHECK_INTERVAL = 20  # batches between two checks of the losses, which wait for the device
PRINTED = ("train/loss", "val/loss", "val/AP", "val/AP50", "train/images_per_second")


def train_epochs(trainer: Trainer, settings: Any, data: RunData, run: RunFolder, stop: StopSignals) -> None:
    """Train to the last epoch, or until validations bring no improvement; raises Stopped after a signal."""
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
    """The batches of the current epoch."""
    progress = trainer.state.progress
    share = (progress.epoch - progress.start) / (progress.end - progress.start)
    augment, batch_size = settings.augment_settings(share), trainer.batching.batch_size
    return EpochBatches(data.train, batch_size, settings.seed, progress.epoch, augment, trainer.group)


def draw_batch(batches: EpochBatches, number: int, class_names: Sequence[str]) -> np.ndarray:
    """The first images of a training batch with their boxes, as one RGB picture."""
    batch = batches.plan(number, PREVIEW_IMAGES)
    images = render_batch(batch._replace(images=batch.images.cpu()))
    return draw_targets(images, batch.boxes, batch.labels, class_names)


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
            with closing(batches.load([n for n in numbers if n not in skipped], trainer.device)) as loaded:
                for done, number in enumerate(numbers, numbers.start + 1):
                    at_step = done % trainer.batching.accumulate == 0 or done == total
                    if number not in skipped:
                        state.losses[number] = trainer.backward(*next(loaded), sync=at_step or bool(skipped))
                        accumulated += 1
                    if at_step and accumulated:
                        state.step()
                        accumulated = 0
                    bar.update(done - bar.n)
                    if at_step and not check_and_save(trainer, batches, done, settings, run, stop):
                        break


def check_and_save(
    trainer: Trainer, batches: EpochBatches, done: int, settings: Any, run: RunFolder, stop: StopSignals
) -> bool:
    """After a step: check, save and stop if it is time to; returns False after a rollback."""
    stopping = trainer.group.any_rank(stop.requested)
    steps, interval = ceil(done / trainer.batching.accumulate), settings.checkpoint_every
    saving = interval > 0 and steps % interval == 0
    unchecked = done - trainer.state.progress.batch
    if not (stopping or saving or unchecked >= CHECK_INTERVAL or done == len(batches)):
        return True
    if not trainer.check_batches(batches, done):
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
