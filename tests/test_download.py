"""The download room, against a server that breaks off, and against zips that mean harm."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import prepare
from config import Download
from download import checksum, fetch, file_name, unpack
from synthetic import write_dataset


class Server(ThreadingHTTPServer):
    """Serves `content` under every name, and notes what it was asked for."""

    content = b""
    etag = '"one"'
    breaks: list[int]  # after how many bytes of an answer it breaks off, an entry an answer
    ranges = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.breaks = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/sets/some.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, body, begin = self.server, self.server.content, 0
        server.asked.append(self.headers.get("Range", "all"))
        if server.status != 200:
            return self.send_error(server.status)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if server.ranges and wanted and self.headers.get("If-Range") == server.etag:
            begin = int(wanted[1])
        if begin >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - begin))
        self.send_header("ETag", server.etag)
        self.end_headers()
        end = begin + server.breaks.pop(0) if server.breaks else len(body)
        self.wfile.write(body[begin:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.content = bytes(range(256)) * 5000
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(server: Server, folder: Path, **options):
    return fetch(Download(url=server.url, **options), folder, wait=0)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Transfer


def test_a_file_comes_whole_with_its_checksum(server, tmp_path):
    path, digest, fresh = get(server, tmp_path / "data")
    assert path == tmp_path / "data" / "some.zip" and path.read_bytes() == server.content
    assert fresh and digest == sha(server.content) == checksum(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["some.zip", "some.zip.sha256"]


def test_a_broken_transfer_goes_on_where_it_broke(server, tmp_path):
    server.breaks = [400_000, 300_000]
    path, _, _ = get(server, tmp_path)
    assert path.read_bytes() == server.content
    assert server.asked == ["all", "bytes=400000-", "bytes=700000-"]


def test_a_later_call_goes_on_too(server, tmp_path):
    server.breaks = [400_000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError, match="400000 bytes are kept in .*some.zip.part, the same command goes on"):
        get(server, tmp_path)
    server.breaks, server.asked = [], []
    path, _, _ = get(server, tmp_path)
    assert path.read_bytes() == server.content and server.asked == ["bytes=400000-"]


def test_a_file_that_changed_in_between_starts_anew(server, tmp_path):
    server.breaks = [400_000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError):
        get(server, tmp_path)
    server.breaks, server.content, server.etag = [], server.content[::-1], '"two"'
    assert get(server, tmp_path)[0].read_bytes() == server.content


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.breaks, server.ranges = [400_000], False
    assert get(server, tmp_path)[0].read_bytes() == server.content


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    server.breaks = [400_000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError):
        get(server, tmp_path)
    (tmp_path / "some.zip.part").write_bytes(server.content)
    assert get(server, tmp_path)[0].read_bytes() == server.content


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    get(server, tmp_path)
    server.asked.clear()
    assert get(server, tmp_path)[1:] == (sha(server.content), False) and not server.asked


def test_a_wrong_checksum_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="SHA-256 .*wanted 0000"):
        get(server, tmp_path, sha256="0" * 64)
    assert not (tmp_path / "some.zip").exists() and not (tmp_path / "some.zip.part").exists()
    path, _, _ = get(server, tmp_path, sha256=sha(server.content).upper())
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match="move it away"):
        get(server, tmp_path)
    assert path.read_bytes() == b"changed"


def test_no_such_file_and_no_server(server, tmp_path):
    server.status = 404
    with pytest.raises(OSError, match="answers 404"):
        get(server, tmp_path)
    assert len(server.asked) == 1
    with pytest.raises(OSError, match="refused"):
        fetch(Download(url="http://127.0.0.1:9/some.zip"), tmp_path, wait=0)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/some.zip", "ftp://host/some.zip", "http://host/", "http://host/x.tar", "http://host/%2e%2e.zip"],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="wanted http"):
        file_name(url)


# Unpacking


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, content)
    return path


def test_files_land_where_they_say(tmp_path):
    path = write_zip(tmp_path / "some.zip", {"a/images/a.png": b"1", "b/images/b.png": b"22", "__MACOSX/x": b"m"})
    assert unpack(path, tmp_path / "some", Download()) == (2, 3)
    assert (tmp_path / "some" / "b" / "images" / "b.png").read_bytes() == b"22"
    with pytest.raises(FileExistsError):
        unpack(path, tmp_path / "some", Download())


def test_a_folder_around_everything_is_left_out(tmp_path):
    path = write_zip(tmp_path / "some.zip", {"top/a/images/a.png": b"1", "top/b/images/b.png": b"2"})
    unpack(path, tmp_path / "some", Download())
    assert (tmp_path / "some" / "a" / "images" / "a.png").is_file()


def link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("a/link")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc")
    return path


def twice(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/x", "1")
        archive.writestr("A/x", "2")
    return path


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (lambda path: write_zip(path, {"../x": b"1"}), {}, "outside"),
        (lambda path: write_zip(path, {"a/../../x": b"1"}), {}, "outside"),
        (lambda path: write_zip(path, {"/x": b"1"}), {}, "outside"),
        (lambda path: write_zip(path, {"C:/x": b"1"}), {}, "outside"),
        (lambda path: write_zip(path, {"..\\x": b"1"}), {}, "outside"),
        (link, {}, "link"),
        (twice, {}, "one name"),
        (lambda path: write_zip(path, {}), {}, "holds 0 files"),
        (lambda path: write_zip(path, {f"{i}": b"1" for i in range(9)}), {"max_files": 8}, "holds 9 files"),
        (lambda path: write_zip(path, {"x": bytes(3000)}), {"max_gigabytes": 2e-6}, "max_gigabytes"),
        (lambda path: write_zip(path, {"x": bytes(1 << 23)}, zipfile.ZIP_DEFLATED), {}, "max_ratio"),
    ],
)
def test_a_zip_that_means_harm_is_refused_whole(tmp_path, make, options, why):
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in" / "some.zip")
    with pytest.raises(ValueError, match=why):
        unpack(path, tmp_path / "in" / "some", Download(**options))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "some.zip"]


def test_a_damaged_zip_leaves_nothing(tmp_path):
    path = write_zip(tmp_path / "some.zip", {"a": b"first", "b": b"second"})
    path.write_bytes(path.read_bytes().replace(b"second", b"secomd"))
    with pytest.raises(ValueError, match="CRC"):
        unpack(path, tmp_path / "some", Download())
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not a zip"):
        unpack(path, tmp_path / "some", Download())
    assert [p.name for p in tmp_path.iterdir()] == ["some.zip"]


def test_a_size_that_lies_is_found_out(tmp_path):
    path = write_zip(tmp_path / "some.zip", {"x": bytes(5000)}, zipfile.ZIP_DEFLATED)
    size = (5000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(ValueError):
        unpack(path, tmp_path / "some", Download())
    assert not (tmp_path / "some").exists()


# The command


def test_download_twice(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "set", 2, shape=(32, 32))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path in sorted((tmp_path / "set").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "set"))
    server.content, server.breaks = stream.getvalue(), [700]
    command = ["download", "--data", "data", "--set", f"download.url={server.url}"]
    assert prepare.main([*command, "--dry-run"]) == 0 and not (tmp_path / "data").exists()
    assert prepare.main(command) == 0
    assert "2 images" in capsys.readouterr().out
    assert prepare.main(command) == 0
    assert "was there already" in capsys.readouterr().out and server.asked == ["all", "bytes=700-"]
    server.status = 404
    assert prepare.main([*command[:-1], f"download.url={server.url}x.zip"]) == 2
    assert "404" in capsys.readouterr().err
