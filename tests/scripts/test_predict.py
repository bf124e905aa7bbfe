"""predict.py: messages, exit codes, interruption and flags."""

import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import predict
from tests.conftest import ROOT
from tests.inference.fixtures import FRAMES, draw_frame, read_jsonl, read_video, write_video
from utils.data.image_io import write_image
from utils.inference.sinks import SINKS, Sink
from utils.system.cli import run_script


def test_summary_counts_frames_detections_and_tracks(config, video, capsys):
    config = replace(config, source=(str(video),), save=("jsonl",))
    found = predict.main(replace(config, frame_stride=10))
    assert f"{found} detections in {FRAMES} frames, of which 3 were processed; the results" in capsys.readouterr().out
    found = predict.main(replace(config, track=True))
    tracks = {line["track"] for line in read_jsonl(config) if "track" in line}
    assert f"{found} detections in {FRAMES} frames, {len(tracks)} tracks; the results" in capsys.readouterr().out
    assert predict.main(replace(config, confidence=1.0)) == 0
    assert "0 detections in 23 frames; the results" in capsys.readouterr().out


def test_old_flags_work_with_a_notice(config, video, monkeypatch, capsys):
    flags = ["--write", "jsonl", "--only=disc", "--every", "5", "--no-flip", "--patience", "3", "--agnostic"]
    arguments = [str(video), "--weights", config.weights, "--out", config.out, "--device", "cpu", "--confidence", "0.1"]
    seen = []
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments, *flags])
    run_script(lambda config: seen.append(config) or predict.main(config), predict.Config, predict.RENAMED_FLAGS)
    (parsed,) = seen
    assert (parsed.save, parsed.class_filter, parsed.frame_stride) == (("jsonl",), ("disc",), 5)
    assert (parsed.tta, parsed.reconnect_timeout, parsed.agnostic_nms) == (False, 3, True)
    assert {line["class"] for line in read_jsonl(config)} == {"disc"}
    errors = capsys.readouterr().err
    for old, new in predict.RENAMED_FLAGS.items():
        assert f"--{old} is now called --{new}" in errors


def test_help_names_all_sinks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_script(predict.main, predict.Config)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SINKS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_shows_rate_and_remaining_time(config, video, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    predict.main(replace(config, source=(str(video),), save=("jsonl",)))
    shown = terminal.getvalue()
    assert re.search(rf"predicting: +100%.* {FRAMES}/{FRAMES} \[\d+:\d+<\d+:\d+, +\d+\.\d+ frames/s\]", shown), shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["good.png", "--weights", "a.onnx", "--compile", "on"], ["a.onnx", "leave out --compile on"]),
        (["missing.jpg"], ["no image, video, folder or match for 'missing.jpg'"]),
        ([""], ["no image, video, folder or match for ''"]),
        (["a" * 300], ["cannot read aaa", "File name too long"]),
        (["99999999999"], ["match for '99999999999'"]),
        (["7"], ["camera 7"]),
        (["empty"], ["empty contains no images or videos"]),
        (["broken"], ["broken/a.jpg is not a readable image", "(and 1 more)"]),
        (["good.png", "--save"], ["save is empty"]),
        (["good.png", "--save", "pdf"], ["pdf", "pictures"]),
        (["good.png", "--confidence", "2"], ["confidence is 2"]),
        (["good.png", "--class-confidence", "cat", "0.5"], ["no class 'cat'"]),
        (["good.png", "--class-filter", "cat"], ["'cat'", "disc, square"]),
        (["good.png", "--frame-stride", "0"], ["frame_stride is 0"]),
        (["good.png", "--out", "good.png"], ["cannot write to good.png"]),
        (["good.png", "--out", "."], ["would overwrite the input"]),
        (["good.png", "--weights", "weights.pth"], ["weights.pth is not a checkpoint"]),
        (["good.png", "--weights", "empty"], ["empty is a folder without a checkpoint"]),
        (["good.png", "--weights", "none.onnx"], ["none.onnx does not exist"]),
    ],
)
def test_explains_errors(weights, tmp_path, monkeypatch, expect_failure, arguments, words):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    for name in ("broken/a.jpg", "broken/b.png", "weights.pth"):
        (tmp_path / name).write_text("hello")
    write_image(tmp_path / "good.png", draw_frame(0))
    monkeypatch.chdir(tmp_path)
    given = [*arguments, *([] if "--weights" in arguments else ["--weights", weights]), "--device", "cpu"]
    expect_failure(predict, given, *words)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_a_complete_video(config, tmp_path, monkeypatch, capsys):
    class Interrupt(Sink):
        def write(self, frame, detections):
            if frame.number == 10:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setitem(SINKS, "interrupt", Interrupt)
    long = write_video(tmp_path / "long.mp4", 200)
    arguments = [long, "--weights", config.weights, "--out", config.out, "--confidence", 0.1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments), "--save", "pictures", "interrupt"])
    with pytest.raises(SystemExit) as stop:
        run_script(predict.main, predict.Config)
    assert stop.value.code == 130
    output, errors = capsys.readouterr()
    assert "stopped by SIGINT" in errors
    assert re.search(r"\d+ detections in \d+ frames; the results", output)
    assert 5 < len(read_video(Path(config.out) / "long.mp4")) < 200


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_closed_output_pipe_is_not_a_bug(config, video):
    arguments = ["--weights", config.weights, "--device", "cpu", "--save", "counts", "jsonl"]
    reader, writer = os.pipe()
    os.close(reader)
    processes = [
        subprocess.Popen(
            [sys.executable, "predict.py", video, *arguments, "--out", config.out + unbuffered],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
        for unbuffered in ("", "1")
    ]
    os.close(writer)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (141, "stopped: the output pipe was closed\n")


def test_benchmark_prints_a_row_per_batch_size(config, video, capsys, monkeypatch):
    monkeypatch.setattr(predict, "TIMED_CALLS", 10)
    predict.main(replace(config, source=(str(video),), benchmark=(1, 3)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["1", "3"]
    for size, median, slow, whole, slow_whole, rate in (map(float, row) for row in rows):
        assert 0 < median <= slow and 0 < whole <= slow_whole
        assert rate == pytest.approx(1000 * size / whole, rel=0.01)
    assert not Path(config.out).exists()
