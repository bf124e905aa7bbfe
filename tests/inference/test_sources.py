"""Sources: lists, standard input, files and addresses."""

import io
import os
import sys
from dataclasses import replace

import pytest

import predict
from tests.inference.fixtures import draw_frame, read_jsonl
from utils.data.image_io import encode_image, write_image
from utils.inference.sources import input_files, open_sources
from utils.system.errors import UserError


def set_stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_reads_lists_from_file_and_stdin(config, video, tmp_path, monkeypatch):
    image = tmp_path / "ä b.png"
    write_image(image, draw_frame(0))
    (tmp_path / "list.txt").write_text(f"\ufeff{image}\r\n\r\n{video}\r\n", encoding="utf-8")
    for source, content in ((str(tmp_path / "list.txt"), b""), ("-", f"{image}\n{video}".encode())):
        set_stdin(monkeypatch, content)
        predict.main(replace(config, source=(source,), save=("jsonl",)))
        assert {line["image"] for line in read_jsonl(config)} == {str(image), str(video)}


def test_reads_image_from_stdin(config, monkeypatch):
    set_stdin(monkeypatch, encode_image(draw_frame(0), ".png"))
    predict.main(replace(config, source=("-",)))
    assert {line["image"] for line in read_jsonl(config)} == {"stdin.png"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n", "list.txt is empty"), ("no.jpg\n", r"list\.txt: there is no .*'no\.jpg'.*relative to /")],
)
def test_refuses_list_without_files(tmp_path, content, message):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        open_sources(str(tmp_path / "list.txt"), 0)


@pytest.mark.skipif(os.name == "nt", reason="named pipes of POSIX")
def test_refuses_pipes_and_devices(tmp_path):
    write_image(tmp_path / "good.png", draw_frame(0))
    for name in ("pipe.mp4", "pipe.png", "pipe.txt", "pipe"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "list.txt").write_text(str(tmp_path / "pipe.png"))
    pipes = [str(path) for path in tmp_path.glob("pipe*")]
    for source in (*pipes, *(f"file://{path}" for path in pipes), "/dev/zero", str(tmp_path / "list.txt")):
        with pytest.raises(UserError, match="is a pipe or device"):
            open_sources(source, 0)
    assert len(pipes) == 4
    assert input_files(open_sources(str(tmp_path), 0)) == [tmp_path / "good.png"]
