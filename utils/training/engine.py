"""What an epoch consists of: its batches, the checks and checkpoints between them, and its validation."""

from contextlib import closing
from functools import partial
from math import ceil
from typing import Any

import supervision as sv
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.cache import ImageCache
from utils.data.loader import Batches
from utils.detection.loss import TERMS, YoloLoss
from utils.evaluation.metrics import evaluate
from utils.reports.explain import attend
from utils.reports.plots import draw_examples
from utils.system.signals import StopSignals
from utils.training.run_folder import RunLog
from utils.training.trainer import COLUMNS, Trainer

CHECK_EVERY = 20  # batches between two looks at the losses, which wait for the device
VALIDATION_BATCH = 16  # images at a time; eval.py's default too, and several processes share them evenly
GATE_IMAGES = 4  # that the distribution of the attention's gates is taken of


def train_one_epoch(
    trainer: Trainer, batches: Batches, frozen: bool, checkpoint_every: int, log: RunLog, stop: StopSignals
) -> None:
    """The batches of an epoch, from where it stands to its end; a checkpoint every so many steps, 0 for none.

    Raises Stopped, after a checkpoint, when a signal came.
    """
    state, last = trainer.state, len(batches)
    trainer.set_mode(frozen)
    title = f"epoch {batches.epoch + 1}/{state.progress.end}"
    with tqdm(total=last, desc=title, leave=False, disable=log.quiet or None) as bar:
        while state.progress.batch < last:  # once, and again for each time that it goes back
            skips = state.progress.skips(batches.epoch)
            numbers = range(state.progress.batch, last)
            gathered = 0  # batches whose gradients wait for the step
            with closing(batches.load([n for n in numbers if n not in skips], trainer.device)) as loaded:
                for done, number in enumerate(numbers, numbers.start + 1):
                    at_step = done % trainer.accumulate == 0 or done == last
                    if number not in skips:
                        state.losses[number] = trainer.backward(*next(loaded), joins=at_step or bool(skips))
                        gathered += 1
                    if at_step and gathered:
                        state.step()
                        gathered = 0
                    bar.update(done - bar.n)
                    if at_step and not check_and_save(trainer, batches, done, checkpoint_every, log, stop):
                        break


def check_and_save(
    trainer: Trainer, batches: Batches, done: int, checkpoint_every: int, log: RunLog, stop: StopSignals
) -> bool:
    """After a step: check, save and stop where it is time; False when the state went back to an earlier batch."""
    stopping = trainer.group.any_rank(stop.requested)
    saving = checkpoint_every and ceil(done / trainer.accumulate) % checkpoint_every == 0
    unchecked = done - trainer.state.progress.batch
    if not (stopping or saving or unchecked >= CHECK_EVERY or done == len(batches)):
        return True
    if not trainer.goes_well(batches, done):
        return False
    if saving or stopping:
        log.save(trainer.kept)
    if stopping:
        stop.raise_stopped()
    return True


def mean_losses(trainer: Trainer) -> dict[str, float]:
    """Of the epoch under way, without the batches left out."""
    progress = trainer.state.progress
    skips = progress.skips(progress.epoch)
    used = [number for number in range(len(trainer.state.losses)) if number not in skips]
    means = trainer.state.losses[used].mean(dim=0).tolist()
    return {f"train/{name}": value for name, value in zip(COLUMNS, means, strict=True)}


@torch.inference_mode()
def validate(
    trainer: Trainer, cache: ImageCache, log: RunLog, stop: StopSignals
) -> tuple[dict[str, float], dict[str, Any]]:
    """Loss and accuracy of the averaged weights on the validation split: values to log, and all the metrics."""
    group, spec = trainer.group, trainer.spec
    group.broadcast_module(trainer.state.ema.module)
    detector = trainer.detector()
    loss = YoloLoss(spec, trainer.loss.settings, trainer.device)  # of this process alone
    found: dict[int, tuple[Tensor, list[sv.Detections]]] = {}
    with tqdm(total=len(cache), desc="validating", leave=False, disable=log.quiet or None) as bar:
        for part, heads in detector.run_cached(cache, VALIDATION_BATCH, group):
            if stop.requested:
                break
            terms = loss(heads, cache.boxes[part].to(trainer.device), cache.labels[part].to(trainer.device))
            losses = torch.stack([terms[name] for name in TERMS]).cpu() * (part.stop - part.start) / len(cache)
            found[part.start] = losses, detector.select(heads, cache.fits[part], cache.sizes[part])
            bar.update(group.size * (part.stop - part.start))
    if group.any_rank(stop.requested):
        log.save(trainer.kept)
        stop.raise_stopped()
    parts = list(group.gather(found).values())
    if not group.is_main:
        return group.broadcast(None)
    detections = [item for _, batch in parts for item in batch]
    evaluation = evaluate(cache.samples, detections, cache.sizes, spec.class_names)
    metrics, epoch = evaluation.metrics, trainer.state.progress.epoch + 1
    draw = partial(draw_examples, detections, evaluation.thresholds, cache, spec.class_names)
    log.picture("val_examples", draw, epoch)
    losses = sum(losses for losses, _ in parts).tolist()
    values = {f"val/{name}": value for name, value in zip(TERMS, losses, strict=True)}
    values |= {f"val/{name}": metrics["coco"][name] for name in ("AP", "AP50", "AP75")}
    values |= {f"val/{name}": metrics["voc"][name] for name in ("mAP_11point", "mAP_area")}
    return group.broadcast((values, metrics))


def log_gates(trainer: Trainer, cache: ImageCache, log: RunLog) -> None:
    """For TensorBoard, the distribution of the averaged network's gates at each place, on a few images."""
    if trainer.spec.phi and not log.quiet:
        pixels = cache.images[:GATE_IMAGES].to(trainer.device).float() / 255
        attention = attend(trainer.detector().network.model, pixels)
        gates = {f"gate/{place}": attended.gate.cpu().numpy() for place, attended in attention.items()}
        log.histograms(gates, trainer.state.progress.epoch + 1)
