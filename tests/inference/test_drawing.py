"""Drawing: boxes, labels and track IDs on images."""

import numpy as np
import supervision as sv

from tests.inference.fixtures import draw_frame
from utils.inference.drawing import draw_detections


def test_pictures_show_track_ids():
    image, box = draw_frame(0, (200, 200)), np.array([[20.0, 60, 180, 180]])
    pictures = []
    for track in (None, -1, 7, 8):
        tracker_id = None if track is None else np.array([track])
        detections = sv.Detections(box, confidence=np.array([0.5]), class_id=np.array([0]), tracker_id=tracker_id)
        pictures.append(draw_detections(image, detections, ("disc",)))
    assert (pictures[0] == pictures[1]).all()  # -1: no track yet
    assert (pictures[1] != pictures[2]).any() and (pictures[2] != pictures[3]).any()


def test_labels_are_readable_at_any_size():
    for height, width in ((40, 60), (480, 640), (3000, 4000)):
        box = sv.Detections(np.array([[2.0, height / 2, width / 2, height - 2]]), class_id=np.array([0]))
        picture = draw_detections(np.zeros((height, width, 3), np.uint8), box, ["cat"])
        rows = np.flatnonzero(picture[: height // 2 - 3].any(axis=(1, 2)))
        assert len(rows) >= min(10, 0.02 * height)


def test_labels_do_not_hide_small_objects():
    corners = np.stack(np.meshgrid(np.arange(10, 2500, 180.0), np.arange(40, 1400, 180.0)), axis=-1).reshape(-1, 2)
    shares = []
    for side in (100, 1000):
        boxes = np.hstack([corners, corners + side])
        found = sv.Detections(boxes, class_id=np.zeros(len(boxes), int), confidence=np.full(len(boxes), 0.5))
        picture = draw_detections(np.zeros((1440, 2560, 3), np.uint8), found, ["cell"])
        shares.append(picture.any(axis=-1).mean())
    assert shares[0] < shares[1] / 2
