"""One door to files anywhere: local paths, ``s3://`` and ``gs://`` by ``pyarrow.fs``, and ``http(s)://`` to read from.

Whatever is written appears whole or not at all, and what was there before stays until then: locally by renaming a
finished temporary file, on object stores by uploading one. Throttling and broken connections are waited out.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fnmatch
import functools
import json
import mmap
import os
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.documents import InputError
from pipelines.download import Download, DownloadError

# Attempts of the AWS client at a request, waiting up to 1, 2, 4, … 20 seconds in between; how long Google's goes on.
_S3_ATTEMPTS, _GCS_SECONDS = 10, 120
_S3_SECONDS = 20  # without a byte; 3 are the client's own, too few for a busy network
_IN_MEMORY = 16 << 20  # a larger file for an object store is gathered in a temporary file first
_PART = 32 << 20  # bytes of a stream to an object store that are sent at a time; S3 takes 10,000 of them for a file

_PARTS = ".parts"  # behind the name of a file of lines on an object store
_appending = threading.Lock()


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


def is_web(uri: str) -> bool:
    """Whether ``uri`` names a file on a web server, which can only be read."""
    return uri.startswith(("http://", "https://"))


def failed(error: Exception) -> bool:
    """Whether the storage failed; pyarrow raises OSError for that and for damaged content alike."""
    known = isinstance(error, DownloadError) or "AWS Error" in str(error) or "google::cloud" in str(error)
    return known or (isinstance(error, OSError) and error.errno is not None)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a local path or an object store, and the path in it."""
    return _resolve(uri)


def _resolve(uri: str) -> tuple[fs.FileSystem, str]:
    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), path
    if is_web(uri):
        raise InputError(f"{uri}: a web server's files can be read one by one, but not listed, written or deleted")
    scheme, _, rest = uri.partition("://")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "AWS_ACCESS_KEY_ID")
    return _filesystem(scheme, rest.partition("/")[0], tuple(map(os.environ.get, names))), rest.rstrip("/")


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, environment: tuple[str | None, ...]) -> fs.FileSystem:
    """The file system of a bucket; asking for its region takes a request, so that it is kept for the process.

    Raises:
        InputError: nobody knows the scheme.
    """
    if scheme in ("gs", "gcs"):
        limit = dt.timedelta(seconds=_GCS_SECONDS)
        endpoint = environment[2]
        if endpoint is None:
            return fs.GcsFileSystem(retry_time_limit=limit)
        scheme, _, host = endpoint.partition("://")
        return fs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=host, retry_time_limit=limit)
    if scheme != "s3":
        raise InputError(f"{scheme}://{bucket}: paths may be local or start with s3://, gs://, http:// or https://")
    found, _ = fs.FileSystem.from_uri(f"s3://{quote(bucket)}")
    return fs.S3FileSystem(
        region=found.region,
        endpoint_override=environment[0] or environment[1],
        request_timeout=_S3_SECONDS,
        connect_timeout=_S3_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        background_writes=False,  # they would queue a whole file in memory
        allow_delayed_open=True,  # a small file takes one request
    )


def _prefix(uri: str) -> str:
    """What has to stand before a path of the file system of ``uri`` to make a URI of it again."""
    return uri[: uri.index("://") + 3] if is_remote(uri) else ""


def exists(uri: str) -> bool:
    """Whether ``uri`` is a file or a folder."""
    if is_web(uri):
        try:
            with open_input(uri):
                return True
        except FileNotFoundError:
            return False
    filesystem, path = _resolve(uri)
    with _naming(uri):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


@contextlib.contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Have errors name the file, which those of Google's client do not."""
    try:
        yield
    except OSError as error:
        if uri.partition("://")[2] in str(error):
            raise
        raise type(error)(*([error.errno] if error.errno else []), f"{uri}: {error}") from None


def list_files(uri: str, *, hidden: bool = False) -> list[FileInfo]:
    """The files that ``uri`` names, sorted by URI: one file, all below a folder, or all that a glob matches.

    ``*`` and ``?`` match within a folder's name, ``**`` across folders; a path that exists as it is written is no glob.
    Files that start with a dot, and folders that start with a dot or an underscore, below the given folder are left
    out, as unfinished or private, unless ``hidden`` is set. A web server's file is listed by its full address.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if is_web(uri):
        with open_input(uri) as file:
            return [FileInfo(uri, file.size(), file.changed)]
    pattern = None
    folder = uri
    if any(c in uri for c in "*?[") and not exists(uri):
        first = min(uri.index(c) for c in "*?[" if c in uri)
        folder, pattern = uri[: uri.rindex("/", 0, first)] if "/" in uri[:first] else ".", uri
    filesystem, path = _resolve(folder)
    prefix = _prefix(uri)
    with _naming(folder):
        info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        return [FileInfo(prefix + info.path, info.size, _seconds(info))]
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"{uri}: no such file or folder")
    found = []
    match = None
    if pattern is not None:
        match = _resolve(pattern)[1] if is_remote(pattern) else local_path(pattern)
    below = _local_files(path) if local_path(folder) else _objects(filesystem, path)
    for file in below:
        parts = file.uri[len(path) :].strip("/").split("/")
        private = any(part.startswith((".", "_")) for part in parts[:-1]) or parts[-1].startswith(".")
        if (hidden or not private) and (match is None or _glob(file.uri, match)):
            found.append(file._replace(uri=prefix + file.uri))
    if not found:
        raise FileNotFoundError(f"{uri}: no file matches")
    return sorted(found)


def _objects(filesystem: fs.FileSystem, path: str) -> Iterator[FileInfo]:
    with _naming(path):
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    for item in found:
        if item.type == fs.FileType.File:
            yield FileInfo(item.path, item.size, _seconds(item))


def _local_files(path: str) -> Iterator[FileInfo]:
    """All files below a folder of this machine; a name that is not UTF-8, at which pyarrow stops, has surrogates."""
    for folder, folders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(folder) + "/"
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            if here.startswith(os.path.realpath(os.path.join(folder, name)) + "/"):
                folders.remove(name)  # a link to a folder that it lies in
        for name in names:
            file = os.path.join(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a link to nowhere, or deleted meanwhile
                status = os.stat(file)
                if stat.S_ISREG(status.st_mode):
                    yield FileInfo(file, status.st_size, status.st_mtime_ns / 1e9)


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


def open_input(uri: str) -> pa.NativeFile | Download:
    """A file opened for reading in bytes, with random access.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_web(uri):
        return Download(uri)
    filesystem, path = _resolve(uri)
    with _naming(uri):
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
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
        yield spool
        size = spool.seek(0, os.SEEK_END)
        spool.seek(0)
        with contextlib.ExitStack() as opened:
            data = (
                spool.read()
                if size <= _IN_MEMORY
                else opened.enter_context(mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ))
            )
            # One call with all of it: a stream completes its upload even when it is dropped half written.
            with _naming(uri), filesystem.open_output_stream(path) as out:
                out.write(data)


@contextlib.contextmanager
def open_stream(uri: str) -> Iterator[BinaryIO]:
    """A file to write bytes into that is too large to be gathered before it is sent to an object store.

    A writer that fails or is killed may leave a part of it: something that is written later has to vouch for it.
    """
    filesystem, path = _resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        with open_output(uri) as out:
            yield out
        return
    with _naming(uri), filesystem.open_output_stream(path, buffer_size=_PART) as out:
        yield out


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    with _naming(uri), open_input(uri) as source:
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


def json_if_there(uri: str) -> Any | None:
    """A JSON file's content, None without the file; on object stores without a request just to find out.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return read_json(uri)
    except FileNotFoundError:
        return None


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes(uri, (json.dumps(value, indent=1) + "\n").encode())


def append_line(uri: str, line: str) -> None:
    """Add one line to a small text file, which ``read_lines`` reads.

    Object stores cannot append, and of a file that several write anew lines would be lost: there each process has a
    part of its own, below ``<uri>.parts``.
    """
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
    part = f"{uri}{_PARTS}/{_writer(os.getpid())}"
    with _appending:
        before = b""
        with contextlib.suppress(FileNotFoundError):
            before = read_bytes(part)
        write_bytes(part, before + line.encode() + b"\n")


@functools.lru_cache(maxsize=1)
def _writer(_pid: int) -> str:
    """This process among those that write, in the order in which they began to; a forked one is another."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def read_lines(uri: str) -> list[list[str]]:
    """What ``append_line`` has written: on object stores a list for each process, else one; none without a file."""
    try:
        files = list_files(f"{uri}{_PARTS}" if is_remote(uri) else uri)
    except FileNotFoundError:
        return []
    return [read_bytes(file.uri).decode().splitlines() for file in files]


def delete(uri: str) -> None:
    """Delete a file or a folder with all it holds; nothing happens when it is not there."""
    filesystem, path = _resolve(uri)
    with _naming(uri):
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.File:
            filesystem.delete_file(path)
        elif kind == fs.FileType.Directory:
            # Object stores have no folders: Google's client misses, at the end, the object that would stand for it.
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_dir(path)


def delete_unfinished(folder: str) -> None:
    """Delete what writers that were killed left below a local folder; object stores keep no half files."""
    if local_path(folder) is None:
        return
    for file in list_files(folder, hidden=True):
        if file_name(file.uri).startswith("."):
            delete(file.uri)


def open_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file opened for reading; local ones are mapped into memory, checksums are compared where there are any.

    Raises:
        ValueError: the file is not Parquet; the message names it.
    """
    path = local_path(uri)
    try:
        return pq.ParquetFile(
            open_input(uri) if path is None else path,
            memory_map=path is not None,
            page_checksum_verification=True,
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri}: not a readable Parquet file ({error})") from None


@contextlib.contextmanager
def parquet_writer(
    uri: str, schema: pa.Schema, compression: str = "zstd", **options: Any
) -> Iterator[pq.ParquetWriter]:
    """A Parquet file with checksums to write tables into; it is there, whole, once the block ends without an error.

    ``options`` are further ones of ``pyarrow.parquet.ParquetWriter``.
    """
    with (
        open_output(uri) as out,
        pq.ParquetWriter(out, schema, compression=compression, write_page_checksum=True, **options) as writer,
    ):
        yield writer
