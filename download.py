"""Fetch a zip over HTTP, in as many goes as it takes, and unpack it without trusting it."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from config import Download
from files import replacing

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
N_TRIES = 5  # goes without a new byte before giving up


def file_name(url: str) -> str:
    """Name of the file that an address points to.

    Raises
    ------
    ValueError
        It is no address of a zip over HTTP.
    """
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not parts.netloc or not re.fullmatch(r"\w[\w.+ -]*\.zip", name, re.I):
        raise ValueError(f"[download] url = {url}: wanted http or https, and a name that ends in .zip")
    return name


def fetch(options: Download, folder: Path, wait: float = 2.0) -> tuple[Path, str, bool]:
    """Bring the zip into `folder`; what an earlier call began is continued, what is there already is only checked.

    Parameters
    ----------
    wait
        Seconds before the second go; twice as many before each further one.

    Returns
    -------
    path
        The file.
    sha256 : str
        Its checksum, which is kept beside it.
    fresh : bool
        Whether it came now.

    Raises
    ------
    OSError
        The server cannot be reached, or breaks off again and again; what came is kept for the next call.
    ValueError
        The address is none, or the file has another checksum than the settings, or the note beside it, say.
    """
    path = folder / file_name(options.url)
    note = path.with_name(f"{path.name}.sha256")
    wanted = options.sha256.lower() or (note.read_text(encoding="ascii").split()[0] if note.is_file() else "")
    if fresh := not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        _transfer(options.url, part, wait)
        found = checksum(part)
        if wanted and found != wanted:
            part.unlink()  # it is whole and wrong: there is nothing to continue
            raise ValueError(
                f"{options.url}: SHA-256 {found}, wanted {wanted}; damaged, or another version of the file"
            )
        part.rename(path)
        _state_file(part).unlink(missing_ok=True)
    else:
        found = checksum(path)
        if wanted and found != wanted:
            raise ValueError(f"{path}: SHA-256 {found}, wanted {wanted}; move it away and download it again")
    with replacing(note) as stage:
        stage.write_text(f"{found}  {path.name}\n", encoding="ascii")
    return path, found, fresh


def checksum(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(path: Path, target: Path, options: Download) -> tuple[int, int]:
    """Unpack a zip into a new folder, which appears complete or not at all.

    A folder that holds everything else, or everything but what a Mac adds, is left out of the names.

    Returns
    -------
    Number of files, and of bytes.

    Raises
    ------
    FileExistsError
        `target` is there and not empty.
    ValueError
        The file is no zip, is damaged, has a name that would lie outside of `target`, a link, a password, two files of
        one name, or more, larger or more tightly packed files than the settings allow.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target}: is not empty; move it away first")
    try:
        with zipfile.ZipFile(path) as archive:
            names = _checked_names(path, archive, options)
            for left in target.parent.glob(f".{target.name}.*.part"):  # of a call that was killed while it unpacked
                shutil.rmtree(left)
            with replacing(target) as stage:
                stage.mkdir()
                limit = int(options.max_gigabytes * 1e9)
                n_bytes = 0
                for info, name in tqdm(names, "unpacking", unit="file", disable=None):
                    n_bytes += _extract(archive, info, stage / name, path)
                    if n_bytes > limit:
                        raise ValueError(f"{path}: unpacks to more than {options.max_gigabytes:g} GB (max_gigabytes)")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path}: not a zip that can be unpacked: {error}; delete it and download it again") from None
    return len(names), n_bytes


# Transfer


def _transfer(url: str, part: Path, wait: float) -> None:
    """Append to `part` until it is whole."""
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _go(url, part):
                return
            error: Exception = OSError("the server closed the connection before the end")
        except urllib.error.HTTPError as problem:
            if problem.code < 500 and problem.code not in (408, 429):
                raise OSError(f"{url}: the server answers {problem.code} {problem.reason}") from None
            error = problem
        except (OSError, http.client.HTTPException) as problem:
            error = problem
        now = part.stat().st_size if part.is_file() else 0
        failures = 0 if now > before else failures + 1
        if failures >= N_TRIES:
            raise OSError(f"{url}: {error}; {now} bytes are kept in {part}, the same command goes on from there")
        logger.warning("%s: %s after %d bytes; trying again", url, error, now)
        time.sleep(wait * 2**failures if failures else 0)


def _go(url: str, part: Path) -> bool:
    """One request, for what is missing; whether `part` is whole now."""
    have = part.stat().st_size if part.is_file() else 0
    mark = _read_mark(part, url)
    headers = {"User-Agent": "nuclei-toolkit"}
    if have and mark:
        # If the file has changed since, the server sends the new one whole instead of its end.
        headers |= {"Range": f"bytes={have}-", "If-Range": mark}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _is_whole(error.headers.get("Content-Range"), have, part)
        raise
    with response:
        begin = 0
        total = int(response.headers["Content-Length"]) if response.headers.get("Content-Length") else None
        if response.status == http.client.PARTIAL_CONTENT:
            begin, total = _span(response.headers.get("Content-Range"), have)
        else:
            _write_mark(part, url, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        with open(part, "r+b" if begin else "wb") as file:
            file.seek(begin)
            bar = tqdm(total=total, initial=begin, desc="downloading", unit="B", unit_scale=True, disable=None)
            with bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            return total is None or file.tell() == total


def _span(header: str | None, have: int) -> tuple[int, int]:
    """Begin and total of what a server sends; the begin must be what was asked for."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", header or "")
    if not match or int(match[1]) != have:
        raise OSError(f"the server sends '{header}', wanted the bytes from {have} on")
    return int(match[1]), int(match[2])


def _is_whole(header: str | None, have: int, part: Path) -> bool:
    """Nothing is left to send: because all is here, or because what is here is not of that file."""
    if header == f"bytes */{have}":
        return True
    part.unlink()
    return False


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _write_mark(part: Path, url: str, mark: str) -> None:
    part.unlink(missing_ok=True)  # first: never may a new mark stand beside an old beginning
    mark = "" if mark.startswith("W/") else mark  # a weak one does not promise the same bytes
    _state_file(part).write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")


def _read_mark(part: Path, url: str) -> str:
    """What tells whether the file on the server is still the one that `part` is the beginning of."""
    try:
        state = json.loads(_state_file(part).read_text(encoding="utf-8"))
        return state["mark"] if state["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# Unpacking


def _checked_names(
    path: Path, archive: zipfile.ZipFile, options: Download
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of a zip and where they go, once it is sure that all of them may."""
    infos = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    if not 0 < len(infos) <= options.max_files:
        raise ValueError(f"{path}: holds {len(infos)} files, wanted 1 to {options.max_files} ([download] max_files)")
    size = sum(info.file_size for info in infos)
    if size > options.max_gigabytes * 1e9:
        raise ValueError(
            f"{path}: unpacks to {size / 1e9:.1f} GB, [download] max_gigabytes = {options.max_gigabytes:g}"
        )
    names = []
    for info in infos:
        name = PurePosixPath(info.filename)
        parts = info.filename.split("/")
        if name.is_absolute() or set(parts) & {"", ".", ".."} or re.search(r'[\\:\0<>|"?*]', info.filename):
            raise ValueError(f"{path}: '{info.filename}' would lie outside of the folder, or is no name; refused")
        if info.create_system == 3 and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{path}: '{info.filename}' is a link or device; refused")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: '{info.filename}' wants a password; refused")
        if info.file_size > CHUNK and info.file_size > options.max_ratio * max(info.compress_size, 1):
            raise ValueError(f"{path}: '{info.filename}' is packed beyond [download] max_ratio = {options.max_ratio:g}")
        names.append(name)
    if len({str(name).lower() for name in names}) < len(names):
        raise ValueError(f"{path}: two of its files have one name; refused")
    # "stage1_train/<id>/images/..." goes to "<id>/images/...", as the folder is named after the zip already.
    wrapped = len({name.parts[0] for name in names}) == 1 and all(len(name.parts) > 3 for name in names)
    return [(i, PurePosixPath(*n.parts[1:]) if wrapped else n) for i, n in zip(infos, names, strict=True)]


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, path: Path) -> int:
    """Unpack one file; zipfile reads no more than the size it announces, and checks its sum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, CHUNK)
        n_bytes = file.tell()
    if n_bytes != info.file_size:
        raise ValueError(f"{path}: '{info.filename}' has {n_bytes} bytes, announced were {info.file_size}; refused")
    return n_bytes
