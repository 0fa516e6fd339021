"""One door to files anywhere: local paths, ``s3://`` and ``gs://``, all through ``pyarrow.fs``.

Whatever is written appears whole or not at all: locally by renaming a finished temporary file, on object stores
because an upload becomes visible only when it completes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.documents import InputError


class FileInfo(NamedTuple):
    """A file's URI, its size in bytes, and when it was last changed (Unix seconds, 0 when unknown)."""

    uri: str
    size: int
    mtime: float


def is_remote(uri: str) -> bool:
    """Whether ``uri`` names an object store rather than a path of this machine."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str | None:
    """The path on this machine, or None for an object store."""
    return None if is_remote(uri) else os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """``uri`` with a relative local path made absolute, so that it means the same in every process of a machine."""
    return local_path(uri) or uri.rstrip("/")


def join(base: str, *names: str) -> str:
    """A file below ``base``: the parts joined with single slashes."""
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def file_name(uri: str) -> str:
    """The last part of ``uri``."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), path
    # Keys are written as they are: a space, % or ? in one is part of the name, which pyarrow would take for syntax.
    scheme, _, rest = uri.partition("://")
    return fs.FileSystem.from_uri(f"{scheme}://{quote(rest, safe='/@:')}")


def _prefix(uri: str) -> str:
    """What has to stand before a path of the file system of ``uri`` to make a URI of it again."""
    return uri[: uri.index("://") + 3] if is_remote(uri) else ""


def exists(uri: str) -> bool:
    """Whether ``uri`` is a file or a folder."""
    filesystem, path = _resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str, *, hidden: bool = False) -> list[FileInfo]:
    """The files that ``uri`` names, sorted by URI: one file, all below a folder, or all that a glob matches.

    ``*`` and ``?`` match within a folder's name, ``**`` across folders; a path that exists as it is written is no glob.
    Files that start with a dot, and folders that start with a dot or an underscore, below the given folder are left
    out, as unfinished or private, unless ``hidden`` is set.

    Raises:
        FileNotFoundError: nothing is there.
    """
    pattern = None
    folder = uri
    if any(c in uri for c in "*?[") and not exists(uri):
        first = min(uri.index(c) for c in "*?[" if c in uri)
        folder, pattern = uri[: uri.rindex("/", 0, first)] if "/" in uri[:first] else ".", uri
    filesystem, path = _resolve(folder)
    prefix = _prefix(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [FileInfo(prefix + info.path, info.size, _seconds(info))]
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{uri}: no such file or folder")
    found = []
    match = None
    if pattern is not None:
        match = _resolve(pattern)[1] if is_remote(pattern) else local_path(pattern)
    for item in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
        if item.type != fs.FileType.File:
            continue
        below = item.path[len(path) :].strip("/").split("/")
        private = any(part.startswith((".", "_")) for part in below[:-1]) or below[-1].startswith(".")
        if private and not hidden:
            continue
        if match is not None and not _glob(item.path, match):
            continue
        found.append(FileInfo(prefix + item.path, item.size, _seconds(item)))
    if not found:
        raise FileNotFoundError(f"{uri}: no file matches")
    return sorted(found)


def _glob(path: str, pattern: str) -> bool:
    """Shell matching in which only ``**`` crosses a slash."""
    parts, wanted = path.split("/"), pattern.split("/")

    def matches(i: int, j: int) -> bool:
        if j == len(wanted):
            return i == len(parts)
        if wanted[j] == "**":
            return any(matches(k, j + 1) for k in range(i, len(parts) + 1))
        return i < len(parts) and fnmatch.fnmatchcase(parts[i], wanted[j]) and matches(i + 1, j + 1)

    return matches(0, 0)


def _seconds(info: fs.FileInfo) -> float:
    return (info.mtime_ns or 0) / 1e9


def open_input(uri: str) -> pa.NativeFile:
    """A file opened for reading in bytes, with random access.

    Raises:
        FileNotFoundError: there is none.
    """
    filesystem, path = _resolve(uri)
    return filesystem.open_input_file(path)


@contextlib.contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """A file to write bytes into; it is there, whole, once the block ends without an error."""
    filesystem, path = _resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{uuid.uuid4().hex[:8]}"
        try:
            with open(temporary, "wb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return
    out = filesystem.open_output_stream(path)
    try:
        yield out
    except BaseException:
        # Closing a stream completes the upload: what was written so far must not become the file.
        with contextlib.suppress(Exception):
            out.close()
        with contextlib.suppress(Exception):
            filesystem.delete_file(path)
        raise
    out.close()


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with open_input(uri) as source:
        return source.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    with open_output(uri) as out:
        out.write(data)


def read_json(uri: str) -> Any:
    """A JSON file's content.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise InputError(f"{uri}: not a JSON file ({error}); delete it and run the step that writes it again") from None


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes(uri, (json.dumps(value, indent=1) + "\n").encode())


def append_line(uri: str, line: str) -> None:
    """Add one line to a small text file; object stores, which cannot append, get the file written anew."""
    path = local_path(uri)
    if path is not None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab+") as out:
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read(1) != b"\n":  # a line that a crash cut short must not swallow this one
                    line = f"\n{line}"
            out.write(line.encode() + b"\n")
        return
    before = read_bytes(uri) if exists(uri) else b""
    write_bytes(uri, before + line.encode() + b"\n")


def delete(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when it is not there."""
    filesystem, path = _resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem.delete_file(path)
    elif kind == fs.FileType.Directory:
        filesystem.delete_dir(path)


def delete_unfinished(folder: str) -> None:
    """Delete what writers that were killed left below a local folder; object stores keep no half files."""
    if local_path(folder) is None:
        return
    for file in list_files(folder, hidden=True):
        if file_name(file.uri).startswith("."):
            delete(file.uri)


def open_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file opened for reading; local files are mapped into memory.

    Raises:
        ValueError: the file is not Parquet; the message names it.
    """
    path = local_path(uri)
    try:
        return pq.ParquetFile(path, memory_map=True) if path is not None else pq.ParquetFile(open_input(uri))
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri}: not a readable Parquet file ({error})") from None


@contextlib.contextmanager
def parquet_writer(uri: str, schema: pa.Schema, compression: str = "zstd") -> Iterator[pq.ParquetWriter]:
    """A Parquet file to write tables into; it is there, whole, once the block ends without an error."""
    with open_output(uri) as out, pq.ParquetWriter(out, schema, compression=compression) as writer:
        yield writer
