"""NMS and box averaging, as in `utils.detection.nms`, as an ONNX graph; requires onnxscript."""

from collections.abc import Sequence

import onnx
from onnxscript import FLOAT, script
from onnxscript import opset18 as op

from utils.detection.nms import MIN_CONFIDENCE, VOTING_SIGMA

MAX_PER_CLASS = 1000  # maximum number of detections per class and image


def append_nms(network: onnx.ModelProto, confidences: Sequence[float], nms_iou: float) -> onnx.ModelProto:
    """Replace the outputs `boxes` and `scores` of a network with the `detections` of `build_nms`."""
    nms = onnx.compose.add_prefix(build_nms(confidences, nms_iou), "nms_", rename_inputs=False, rename_outputs=False)
    nms.ir_version = network.ir_version
    return onnx.compose.merge_models(network, nms, io_map=[("boxes", "boxes"), ("scores", "scores")])


def build_nms(confidences: Sequence[float], nms_iou: float) -> onnx.ModelProto:
    """A graph that maps boxes (B, N, 4) xyxy and scores (B, N, C) to detections (D, 7).

    A detection is (image index, x1, y1, x2, y2, score, class index); `confidences` are thresholds per class (C,).
    """
    thresholds, lowest = list(confidences), [min(confidences)]
    max_per_class, iou = [MAX_PER_CLASS], [nms_iou]

    @script(default_opset=op)
    def nms(boxes: FLOAT[None, None, 4], scores: FLOAT[None, None, None]) -> FLOAT[None, 7]:
        # scores below the threshold of their class become 0, so that one threshold is enough for NMS
        candidates = op.Transpose(op.Where(scores > thresholds, scores, 0.0), perm=[0, 2, 1])
        found = op.NonMaxSuppression(boxes, candidates, max_per_class, iou, lowest)
        image, label, index = op.Split(found, axis=1, num_outputs=3)
        own = op.GatherND(boxes, op.Concat(image, index, axis=1))  # (D, 4)
        score = op.Unsqueeze(op.GatherND(scores, op.Concat(image, index, label, axis=1)), [1])  # (D, 1)
        near = op.Gather(boxes, op.Squeeze(image, [1]), axis=0)  # (D, N, 4), all boxes in the same image
        votes = op.Transpose(op.Where(scores > MIN_CONFIDENCE, scores, 0.0), perm=[0, 2, 1])
        votes = op.GatherND(votes, op.Concat(image, label, axis=1))  # (D, N), their scores for the same class

        own_low, own_high = op.Split(op.Unsqueeze(own, [1]), axis=2, num_outputs=2)
        near_low, near_high = op.Split(near, axis=2, num_outputs=2)
        sides = op.Relu(op.Min(own_high, near_high) - op.Max(own_low, near_low))
        intersection = op.ReduceProd(sides, [2], keepdims=0)
        own_area = op.ReduceProd(own_high - own_low, [2], keepdims=0)
        near_area = op.ReduceProd(near_high - near_low, [2], keepdims=0)
        distance = 1.0 - intersection / (own_area + near_area - intersection)
        weights = votes * op.Exp(distance * distance / -VOTING_SIGMA)  # (D, N)
        total = op.ReduceSum(weights, [1])  # (D, 1)
        mean = op.Squeeze(op.MatMul(op.Unsqueeze(weights, [1]), near), [1]) / total
        has_votes = op.And(total > MIN_CONFIDENCE, score > MIN_CONFIDENCE)
        averaged = op.Where(has_votes, mean, own)
        detections = op.Concat(op.CastLike(image, score), averaged, score, op.CastLike(label, score), axis=1)
        return detections  # noqa: RET504, the variable names the output

    return nms.to_model_proto()
