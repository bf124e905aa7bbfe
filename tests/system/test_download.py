"""Downloads from a server on this machine that also cuts off, lies and sends wrong bytes; archives that are traps."""

import hashlib
import io
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from tools import get_voc, get_weights
from utils.system import download
from utils.system.download import PARTIAL, Remote, fetch, unpack
from utils.system.errors import UserError
from utils.weights.darknet import write_darknet

KINDS = {
    "VOCdevkit": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
}
CONTENT = bytes(range(256)) * 400
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` by name; the folder before it says how."""

    def do_GET(self):
        _, way, name = self.path.split("/")
        self.server.asked[way] += 1
        if name not in self.server.files or way == "error":
            self.send_error(503 if way == "error" else 404)
            return
        content = self.server.files[name]
        if way == "wrong":
            content = content[:-1] + b"?"
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if way != "whole" else 0
        if begin and begin >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        if begin:
            shift = way == "shifted"
            self.send_header("Content-Range", f"bytes {begin + shift}-{len(content) - 1}/{len(content)}")
        length = len(content) - begin + {"long": 100, "short": -100}.get(way, 0)
        if way != "silent":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if way == "stall" and self.server.asked[way] == 1:
            self.wfile.write(content[:5000])
            time.sleep(1)
            return
        limit = {"cut": len(content) // 3 + 1, "dead": 0}.get(way, len(content))
        self.wfile.write(content[begin : begin + limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "PATIENCE", 0.5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked = {"file": CONTENT}, Counter()
    server.root = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("way", "times"), [("good", 1), ("whole", 1), ("cut", 3), ("stall", 2)])
@pytest.mark.parametrize("checksum", [MD5, ""])
def test_what_comes_is_the_file(server, tmp_path, way, times, checksum):
    path = fetch(Remote(f"{server.root}/{way}/file", len(CONTENT), checksum), tmp_path / "new")
    assert path.read_bytes() == CONTENT
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    assert server.asked[way] == times
    fetch(Remote(f"{server.root}/{way}/file", len(CONTENT), checksum), tmp_path / "new")
    assert server.asked[way] == times  # it is there


@pytest.mark.parametrize(("way", "times"), [("good", 1), ("whole", 1), ("shifted", 2)])
def test_an_earlier_download_goes_on(server, tmp_path, way, times):
    (tmp_path / f"{PARTIAL}file").write_bytes(CONTENT[:777])
    assert fetch(Remote(f"{server.root}/{way}/file", checksum=MD5), tmp_path).read_bytes() == CONTENT
    assert server.asked[way] == times
    (tmp_path / "file").rename(tmp_path / f"{PARTIAL}file")  # stopped before it got its name
    assert fetch(Remote(f"{server.root}/good/file", checksum=MD5), tmp_path).read_bytes() == CONTENT


def test_without_a_checksum_parts_are_not_joined(server, tmp_path):
    (tmp_path / f"{PARTIAL}file").write_bytes(b"of another version")
    assert fetch(Remote(f"{server.root}/good/file"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("wrong", "is not the file, and was removed: the md5 of"),
        ("long", "the server offers 102,500 bytes, but it has 102,400"),
        ("short", "the server offers 102,300 bytes, but it has 102,400"),
        ("silent", "does not say how long the file is"),
        ("dead", "broke off after 0 bytes, and 4 more times there"),
        ("error", "broke off after 0 bytes, and 4 more times there .the server answers 503"),
    ],
)
def test_what_is_not_the_file(server, tmp_path, way, words):
    with pytest.raises(UserError, match=words):
        fetch(Remote(f"{server.root}/{way}/file", len(CONTENT), MD5), tmp_path)
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / f"{PARTIAL}file").exists() or way in ("dead", "error")


def test_lengths_that_lie_of_a_file_without_known_size(server, tmp_path):
    with pytest.raises(UserError, match="is not the file, and was removed"):
        fetch(Remote(f"{server.root}/short/file", checksum=MD5), tmp_path)
    assert not list(tmp_path.iterdir())
    path = fetch(Remote(f"{server.root}/long/file", checksum=MD5), tmp_path)  # the checksum tells that it is whole
    assert path.read_bytes() == CONTENT


def test_what_is_there_and_wrong_stays(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="has 4 bytes instead of 102,400"):
        fetch(Remote(f"{server.root}/good/file", len(CONTENT)), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_no_server_and_no_file(server, tmp_path):
    with pytest.raises(UserError, match="the server answers 404"):
        fetch(Remote(f"{server.root}/good/none"), tmp_path)
    with pytest.raises(UserError, match=r"127\.0\.0\.1 cannot be reached .* is there a network\?"):
        fetch(Remote("http://127.0.0.1:9/file"), tmp_path)
    with pytest.raises(UserError, match="cannot be reached"):
        fetch(Remote("http://there.is.no.such.host.invalid/file"), tmp_path)


def test_weights_are_fetched_when_asked_for(server, expect_failure, monkeypatch, tmp_path, capsys):
    write_darknet(tmp_path / "small.weights", build_model(ModelSpec(("cat",), ANCHORS)))
    content = (tmp_path / "small.weights").read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "good.pth")
    server.files |= {"small.weights": content, "good.pth": (tmp_path / "good.pth").read_bytes()}
    server.files["page.pth"] = b"<html>Sorry, no more</html>"
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    remotes = Remote("x/small.weights", len(content), checksum), Remote("x/good.pth"), Remote("x/page.pth")
    monkeypatch.setattr(get_weights, "REMOTES", remotes)
    folder, flags = tmp_path / "model_data", ["--mirror", f"{server.root}/cut/", "--folder", tmp_path / "model_data"]
    assert get_weights.main(get_weights.Config()) == []
    assert not server.asked
    assert "good.pth" in capsys.readouterr().out
    get_weights.main(get_weights.Config(("small.weights", "good.pth"), str(folder), f"{server.root}/cut/"))
    assert "size and checksum are right" in capsys.readouterr().out
    assert (folder / "small.weights").read_bytes() == content
    expect_failure(get_weights, ["page.pth", *flags], "what http", "page.pth sent is not the file, and was removed")
    expect_failure(get_weights, ["yolo.pth", *flags], "no published weights yolo.pth; there are small.weights")
    assert sorted(path.name for path in folder.iterdir()) == ["good.pth", "small.weights"]


def test_the_published_sizes():
    sizes = {remote.name: remote.size for remote in get_weights.REMOTES}
    assert sizes["yolov4-tiny.weights"] == 24_251_276
    assert sizes["yolov4-tiny.conv.29"] == 19_789_716


def archive(path, *members):
    """A tar file of members (name, content); those named in KINDS are of that kind."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if name not in KINDS:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = KINDS[name], "VOCdevkit"
                tar.addfile(member)
    return path


def test_voc_is_unpacked(server, expect_failure, monkeypatch, tmp_path, capsys):
    """Two archives that fill one folder; what the splits say is there is not fetched again."""
    about = {}
    for part, split, image in (("2007", "trainval", "000001"), ("2007-test", "test", "000002")):
        path = archive(
            tmp_path / f"VOC{part}.tar",
            ("VOCdevkit", b""),
            (f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt", image.encode()),
            (f"VOCdevkit/VOC2007/JPEGImages/{image}.jpg", CONTENT),
        )
        server.files[path.name] = path.read_bytes()
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        about[part] = {"url": f"http://voc/{path.name}", "md5": md5, "base_dir": "VOCdevkit/VOC2007"}
    monkeypatch.setattr(get_voc, "DATASET_YEAR_DICT", about)
    devkit, parts = tmp_path / "devkit", ("2007", "2007-test")
    flags = ["--devkit", devkit, "--parts", "2007", "--mirror"]
    expect_failure(get_voc, [*flags, f"{server.root}/wrong"], "is not the file, and was removed: the md5")
    get_voc.main(get_voc.Config(parts, str(devkit), f"{server.root}/cut"))
    files = sorted(str(path.relative_to(devkit)) for path in devkit.rglob("*") if path.is_file())
    folder = "VOC2007"
    assert files == [
        f"{folder}/ImageSets/Main/test.txt",
        f"{folder}/ImageSets/Main/trainval.txt",
        f"{folder}/JPEGImages/000001.jpg",
        f"{folder}/JPEGImages/000002.jpg",
    ]
    assert [path.name for path in devkit.iterdir()] == [folder]
    asked = server.asked["cut"]
    get_voc.main(get_voc.Config(parts, str(devkit), f"{server.root}/cut"))
    assert server.asked["cut"] == asked
    assert capsys.readouterr().out.count("is there already") == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("VOC/../../evil.txt", b"evil", "would write outside"),
        ("/tmp/evil.txt", b"evil", "would write outside"),
        ("C:/evil.txt", b"evil", "would write outside"),
        ("VOC\\..\\..\\evil.txt", b"evil", "would write outside"),
        ("symlink", b"", "no plain file"),
        ("hardlink", b"", "no plain file"),
        ("device", b"", "no plain file"),
        ("pipe", b"", "no plain file"),
        ("other/a.txt", b"a", "has no folder VOCdevkit"),
    ],
)
def test_archives_that_are_traps(tmp_path, name, content, words):
    path = archive(tmp_path / "trap.tar", ("VOC/good.txt", b"good"), (name, content))
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match=words):
        unpack(path, tmp_path / "inside" / "folder", "VOCdevkit", "ImageSets")
    assert {item.name for item in tmp_path.rglob("*")} == {"inside", "trap.tar", "folder"}


def test_archives_that_are_none(tmp_path):
    whole = archive(tmp_path / "a.tar", ("VOC/a", CONTENT)).read_bytes()
    for content in (b"", b"hello", whole[:5000], b"\x1f\x8b" + whole):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be unpacked|has no folder VOC"):
            unpack(tmp_path / "a.tar", tmp_path / "folder", "VOC", "ImageSets")
        assert list((tmp_path / "folder").iterdir()) == []
