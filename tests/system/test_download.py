"""Downloads from a local server that also breaks off, truncates and alters; extraction of hostile archives."""

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
from utils.system import download as download_module
from utils.system.download import PARTIAL, RemoteFile, download, extract_tar
from utils.system.errors import UserError
from utils.weights.darknet import write_darknet

CONTENT = bytes(range(256)) * 400
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` by name; the folder in the path selects the behavior."""

    def do_GET(self):
        _, behavior, name = self.path.split("/")
        self.server.requests[behavior] += 1
        if name not in self.server.files or behavior == "error":
            self.send_error(503 if behavior == "error" else 404)
            return
        content = self.server.files[name]
        if behavior == "altered":
            content = content[:-1] + b"?"
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if behavior != "no_ranges" else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            shift = behavior == "shifted"
            self.send_header("Content-Range", f"bytes {start + shift}-{len(content) - 1}/{len(content)}")
        if behavior != "no_length":
            length = len(content) - start + {"too_long": 100, "too_short": -100}.get(behavior, 0)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if behavior == "stalling" and self.server.requests[behavior] == 1:
            self.wfile.write(content[:5000])
            time.sleep(1)
            return
        limit = {"breaking": len(content) // 3 + 1, "dead": 0}.get(behavior, len(content))
        self.wfile.write(content[start : start + limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "RETRY_DELAY", 0)
    monkeypatch.setattr(download_module, "TIMEOUT", 0.3)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests = {"file": CONTENT}, Counter()
    server.root = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("behavior", "requests"), [("good", 1), ("no_ranges", 1), ("breaking", 3), ("stalling", 2)])
@pytest.mark.parametrize("checksum", [MD5, ""])
def test_downloads_once_and_retries_broken_connections(server, tmp_path, behavior, requests, checksum):
    for _ in range(2):  # the second time the file exists
        path = download(RemoteFile(f"{server.root}/{behavior}/file", checksum), tmp_path / "new")
        assert path.read_bytes() == CONTENT
        assert [item.name for item in path.parent.iterdir()] == ["file"]
        assert server.requests[behavior] == requests


@pytest.mark.parametrize(("behavior", "requests"), [("good", 1), ("no_ranges", 1), ("shifted", 2)])
def test_resumes_an_earlier_download(server, tmp_path, behavior, requests):
    (tmp_path / f"{PARTIAL}file").write_bytes(CONTENT[:777])
    assert download(RemoteFile(f"{server.root}/{behavior}/file", MD5), tmp_path).read_bytes() == CONTENT
    assert server.requests[behavior] == requests
    (tmp_path / "file").rename(tmp_path / f"{PARTIAL}file")  # complete, but not renamed yet
    assert download(RemoteFile(f"{server.root}/good/file", MD5), tmp_path).read_bytes() == CONTENT


def test_starts_again_without_a_checksum(server, tmp_path):
    (tmp_path / f"{PARTIAL}file").write_bytes(b"of another version")
    assert download(RemoteFile(f"{server.root}/good/file"), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("behavior", "message", "keeps_partial"),
    [
        ("altered", "returned an unexpected file, which was deleted: .* has the md5 checksum", False),
        ("too_short", "returned an unexpected file, which was deleted: .* has the md5 checksum", False),
        ("no_length", "has no Content-Length", False),
        ("dead", r"closed 102,400 bytes before the end \(after 0 bytes\); run the same command", True),
        ("error", r"HTTP Error 503: .* \(after 0 bytes\)", False),
    ],
)
def test_rejects_a_wrong_or_incomplete_file(server, tmp_path, behavior, message, keeps_partial):
    with pytest.raises(UserError, match=message):
        download(RemoteFile(f"{server.root}/{behavior}/file", MD5), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{PARTIAL}file"] * keeps_partial


def test_accepts_a_complete_file_with_a_wrong_length(server, tmp_path):
    assert download(RemoteFile(f"{server.root}/too_long/file", MD5), tmp_path).read_bytes() == CONTENT


def test_keeps_an_existing_file_with_another_checksum(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"has the md5 checksum .* delete it"):
        download(RemoteFile(f"{server.root}/good/file", MD5), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_reports_a_missing_file_and_an_unreachable_host(server, tmp_path):
    with pytest.raises(UserError, match="HTTP Error 404: Not Found"):
        download(RemoteFile(f"{server.root}/good/none"), tmp_path)
    assert server.requests["good"] == 1  # no retries
    for host in ("127.0.0.1:9", "there.is.no.such.host.invalid"):
        with pytest.raises(UserError, match=rf"cannot download http://{host}/file: .*, or copy the file to"):
            download(RemoteFile(f"http://{host}/file"), tmp_path)


def test_get_weights_lists_downloads_and_verifies(server, expect_failure, monkeypatch, tmp_path, capsys):
    write_darknet(tmp_path / "small.weights", build_model(ModelSpec(("cat",), ANCHORS)))
    content = (tmp_path / "small.weights").read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "good.pth")
    server.files |= {"small.weights": content, "good.pth": (tmp_path / "good.pth").read_bytes()}
    server.files["page.pth"] = b"<html>Sorry, no more</html>"
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    files = RemoteFile("x/small.weights", checksum), RemoteFile("x/good.pth"), RemoteFile("x/page.pth")
    monkeypatch.setattr(get_weights, "FILES", files)
    folder, mirror = tmp_path / "model_data", f"{server.root}/breaking/"
    get_weights.main(get_weights.Config())
    assert not server.requests
    assert "good.pth" in capsys.readouterr().out
    get_weights.main(get_weights.Config(("small.weights", "good.pth"), str(folder), mirror))
    printed = capsys.readouterr().out
    assert "checksum verified" in printed
    assert "no checksum" in printed
    assert (folder / "small.weights").read_bytes() == content
    flags = ["--mirror", mirror, "--folder", folder]
    expect_failure(get_weights, ["page.pth", *flags], "page.pth returned an unexpected file, which was deleted")
    expect_failure(get_weights, ["yolo.pth", *flags], "no published weights named yolo.pth; choose from small.weights")
    assert sorted(path.name for path in folder.iterdir()) == ["good.pth", "small.weights"]


def write_tar(path, *members):
    """A tar file of (name, content) members; a content of type bytes of tarfile makes a member of that kind."""
    with tarfile.open(path, "w") as tar:
        for name, content, *kind in members:
            member = tarfile.TarInfo(name)
            if kind:
                member.type, member.linkname = kind[0], "VOC/good.txt"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_get_voc_downloads_and_extracts_into_one_folder(server, expect_failure, monkeypatch, tmp_path, capsys):
    about = {}
    for part, split, image in (("2007", "trainval", "000001"), ("2007-test", "test", "000002")):
        path = write_tar(
            tmp_path / f"VOC{part}.tar",
            ("VOCdevkit", b"", tarfile.DIRTYPE),
            (f"VOCdevkit/VOC2007/ImageSets/Main/{split}.txt", image.encode()),
            (f"VOCdevkit/VOC2007/JPEGImages/{image}.jpg", CONTENT),
        )
        server.files[path.name] = path.read_bytes()
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        about[part] = {"url": f"http://voc/{path.name}", "md5": md5, "base_dir": "VOCdevkit/VOC2007"}
    monkeypatch.setattr(get_voc, "DATASET_YEAR_DICT", about)
    devkit, parts = tmp_path / "devkit", ("2007", "2007-test")
    flags = ["--devkit", devkit, "--parts", "2007", "--mirror"]
    expect_failure(get_voc, [*flags, f"{server.root}/altered"], "returned an unexpected file, which was deleted")
    get_voc.main(get_voc.Config(parts, str(devkit), f"{server.root}/breaking"))
    files = sorted(str(path.relative_to(devkit / "VOC2007")) for path in devkit.rglob("*") if path.is_file())
    splits, images = "ImageSets/Main", "JPEGImages"
    assert files == [f"{splits}/test.txt", f"{splits}/trainval.txt", f"{images}/000001.jpg", f"{images}/000002.jpg"]
    assert [path.name for path in devkit.iterdir()] == ["VOC2007"]
    requests = server.requests["breaking"]
    get_voc.main(get_voc.Config(parts, str(devkit), f"{server.root}/breaking"))
    assert server.requests["breaking"] == requests
    assert capsys.readouterr().out.count("already exists") == 2


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("VOC/../../evil.txt", b"evil"), "cannot be extracted"),
        (("VOC/link", b"", tarfile.SYMTYPE), "'VOC/link', which is not a regular file"),
        (("VOC/link", b"", tarfile.LNKTYPE), "not a regular file"),
        (("VOC/device", b"", tarfile.CHRTYPE), "not a regular file"),
        (("VOC/pipe", b"", tarfile.FIFOTYPE), "not a regular file"),
        (("VOC/sparse", b"", tarfile.GNUTYPE_SPARSE), "not a regular file"),
        (("other/a.txt", b"a"), "does not contain the folder VOCdevkit"),
    ],
)
def test_extracts_nothing_from_a_hostile_archive(tmp_path, member, message):
    path = write_tar(tmp_path / "trap.tar", ("VOC/good.txt", b"good"), member)
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError, match=message):
        extract_tar(path, tmp_path / "inside" / "folder", "VOCdevkit" if "other" in member[0] else "VOC", "ImageSets")
    assert {item.name for item in tmp_path.rglob("*")} == {"inside", "trap.tar", "folder"}


@pytest.mark.parametrize("name", ["{}/evil.txt", "C:/evil.txt", "VOC\\..\\..\\evil.txt"])
def test_writes_nothing_outside_the_folder(tmp_path, name):
    path = write_tar(tmp_path / "trap.tar", ("VOC/good.txt", b"good"), (name.format(tmp_path), b"evil"))
    extract_tar(path, tmp_path / "inside" / "folder", "VOC", "ImageSets")
    assert {item.name for item in tmp_path.rglob("*")} == {"inside", "trap.tar", "folder", "good.txt"}


def test_reports_a_file_that_is_not_a_complete_archive(tmp_path):
    whole = write_tar(tmp_path / "a.tar", ("VOC/a", CONTENT)).read_bytes()
    for content in (b"", b"hello", whole[:5000], b"\x1f\x8b" + whole):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be extracted|does not contain the folder VOC"):
            extract_tar(tmp_path / "a.tar", tmp_path / "folder", "VOC", "ImageSets")
        assert list((tmp_path / "folder").iterdir()) == []
