"""Video files: times, sizes and orientation are kept, and damage is reported."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import predict
from tests.inference.fixtures import FRAMES, RATE, draw_frame, read_jsonl, read_video, write_video
from utils.data.image_io import write_image


def test_keeps_length_and_frame_rate(config, video):
    found = predict.main(replace(config, source=(str(video),), batch_size=4))
    written = read_video(Path(config.out) / "a disc.mp4")
    assert [time for time, _ in written] == pytest.approx([n / float(RATE) for n in range(FRAMES)], abs=1e-3)
    with av.open(str(Path(config.out) / "a disc.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", RATE)
        assert float(stream.duration * stream.time_base) == pytest.approx(FRAMES / RATE, abs=0.01)
    for (_, drawn), (_, original) in zip(written, read_video(video), strict=True):
        assert drawn.shape == original.shape
        assert (np.abs(drawn.astype(int) - original) > 60).any()  # boxes
    lines = read_jsonl(config)
    assert len(lines) == found
    assert {line["frame"] for line in lines} == set(range(FRAMES))
    assert lines[-1]["time"] == pytest.approx((FRAMES - 1) / float(RATE), abs=1e-3)


@pytest.mark.parametrize(
    ("length", "message"),
    [(400, r"1 frames of \S+damaged.mp4 are damaged"), (1500, r"corrupt packets of \S+damaged.mp4 were skipped")],
)
def test_skips_damaged_parts(config, video, tmp_path, capsys, length, message):
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + len(content) // 3
    content[start : start + length] = np.random.default_rng(0).bytes(length)
    (tmp_path / "damaged.mp4").write_bytes(content)
    predict.main(replace(config, source=(str(tmp_path / "damaged.mp4"),)))
    assert re.search(message, capsys.readouterr().err)
    frames = read_video(Path(config.out) / "damaged.mp4")
    assert len(frames) > 2
    assert all(image.mean() > 40 for _, image in frames)  # no black frames in between


def test_reports_truncated_file(config, tmp_path, capsys):
    long = write_video(tmp_path / "long.mkv", 100).read_bytes()
    (tmp_path / "half.mkv").write_bytes(long[: len(long) // 2])  # FFmpeg reads it without an error
    predict.main(replace(config, source=(str(tmp_path / "half.mkv"), str(tmp_path / "long.mkv")), save=("jsonl",)))
    errors = capsys.readouterr().err
    assert re.search(r"warning: \S+half.mkv has no frames after \d\.\d of 8\.0 s; it may be truncated\n", errors)


def test_fails_for_unreadable_files_after_the_others(config, video, tmp_path, expect_failure):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:100])
    write_image(tmp_path / "good.png", draw_frame(0))
    arguments = ["--weights", config.weights, "--out", config.out]
    expect_failure(predict, [tmp_path / "text.mp4", tmp_path / "good.png", *arguments], "text.mp4: Invalid data")
    assert (Path(config.out) / "good.png").exists()
    expect_failure(predict, [tmp_path / "cut.mp4", *arguments], "cut.mp4 contains no video stream")
    (tmp_path / "taken" / video.name).mkdir(parents=True)
    expect_failure(predict, [video, "--weights", config.weights, "--out", tmp_path / "taken"], "cannot write the video")


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_rotates_video_upright(config, video, tmp_path, matrix, turns):
    """Phones store the orientation as a matrix in QuickTime's track header."""
    content = bytearray(video.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (number << 16 for number in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mov").write_bytes(content)
    predict.main(replace(config, source=(str(tmp_path / "phone.mov"),), confidence=1.0))
    written, stored = read_video(Path(config.out) / "phone.mp4"), read_video(video)
    assert len(written) == FRAMES
    upright = np.rot90(stored[0][1], turns).astype(int)
    assert np.abs(written[0][1] - upright).mean() < 5


def test_reads_animated_gif_as_video(config, tmp_path):
    pictures = [Image.fromarray(draw_frame(number)) for number in range(7)]
    pictures[0].save(tmp_path / "disc.gif", save_all=True, append_images=pictures[1:], duration=80)
    predict.main(replace(config, source=(str(tmp_path / "disc.gif"),)))
    assert {line["frame"] for line in read_jsonl(config)} == set(range(7))
    times = [time for time, _ in read_video(Path(config.out) / "disc.mp4")]
    assert times == pytest.approx([number * 0.08 for number in range(7)], abs=1e-3)


def test_ends_where_the_frame_size_changes(config, tmp_path, expect_failure):
    parts = [write_video(tmp_path / f"{side}.ts", 7, (64, side)).read_bytes() for side in (96, 128)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    arguments = [tmp_path / "both.ts", "--weights", config.weights, "--out", config.out]
    expect_failure(predict, arguments, "changes from 96x64 to 128x64 at frame 7")
    assert len(read_video(Path(config.out) / "both.mp4")) == 7  # the last batch is not full
