"""Validation during training, and the report on the best checkpoint at the end."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.cache import ImageCache
from utils.detection.loss import TERMS, YoloLoss
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.evaluation.metrics import evaluate, filter_confident
from utils.inference.detector import Detector
from utils.inference.drawing import draw_sheet
from utils.reports.evaluation_report import EvaluationReport
from utils.reports.explain import compute_attention
from utils.system.distributed import ProcessGroup
from utils.system.errors import make_folder
from utils.system.signals import StopSignals
from utils.training.run_folder import RunFolder
from utils.training.trainer import Trainer
from utils.weights.checkpoint import BEST

BATCH_SIZE = 16  # images per batch, also the default of eval.py
PREVIEW_IMAGES = 8  # images per picture of a batch or of a validation
GATE_IMAGES = 4  # images whose attention gates are logged


@torch.inference_mode()
def validate(
    trainer: Trainer, cache: ImageCache, run: RunFolder, stop: StopSignals
) -> tuple[dict[str, float], dict[str, Any]]:
    """Validate the averaged weights; returns the values to log and all metrics. Raises Stopped after a signal."""
    group, spec = trainer.group, trainer.spec
    group.broadcast_module(trainer.state.ema.module)
    detector = trainer.detector()
    loss = YoloLoss(spec, trainer.loss.settings, trainer.device)  # over the images of this process
    batches: dict[int, tuple[Tensor, list[sv.Detections]]] = {}
    with tqdm(total=len(cache), desc="validating", leave=False, disable=run.read_only or None) as bar:
        for part, heads in detector.run_cached(cache, BATCH_SIZE, group):
            if stop.requested:
                break
            terms = loss(heads, cache.boxes[part].to(trainer.device), cache.labels[part].to(trainer.device))
            losses = torch.stack([terms[name] for name in TERMS]).cpu() * (part.stop - part.start) / len(cache)
            batches[part.start] = losses, detector.select(heads, cache.fits[part], cache.sizes[part])
            bar.update(group.size * (part.stop - part.start))
    if group.any_rank(stop.requested):
        run.save_checkpoints(trainer.snapshot)
        stop.raise_stopped()
    gathered = list(group.gather(batches).values())
    if not group.is_main:
        return group.broadcast(None)
    detections = [item for _, batch in gathered for item in batch]
    evaluation = evaluate(cache.samples, detections, cache.sizes, spec.class_names)
    metrics = evaluation.metrics
    draw = partial(draw_examples, detections, evaluation.thresholds, cache, spec.class_names)
    run.save_picture("val_examples", draw, trainer.state.progress.epoch + 1)
    losses = sum(losses for losses, _ in gathered).tolist()
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
        attention = compute_attention(trainer.detector().network.model, pixels)
        gates = {f"gate/{place}": attended.gate.cpu().numpy() for place, attended in attention.items()}
        run.log_histograms(gates, trainer.state.progress.epoch + 1)


def write_report(
    run: RunFolder, devkit: str, val_sets: tuple[str, ...], cache: ImageCache, device: torch.device, group: ProcessGroup
) -> Path:
    """Write the report of `eval.py` on the best checkpoint and the validation sets; returns its folder."""
    weights, folder = group.broadcast(run.path / BEST), run.path / "val"
    detector = Detector.load(weights, device, thresholds=EVALUATION_THRESHOLDS)
    detections = detector.detect_cached(cache, BATCH_SIZE, group)
    if group.is_main:
        make_folder(folder)
        evaluation = evaluate(cache.samples, detections, cache.sizes, detector.spec.class_names)
        EvaluationReport(weights, devkit, val_sets, detector, cache, detections, evaluation).write(folder)
    return folder
