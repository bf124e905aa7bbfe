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
