"""HTTP responses as archives keep them: status, headers, and the body without its transfer and content codings.

Archives are not always true to the headers they keep: some store bodies decoded and leave Content-Encoding or
Transfer-Encoding in place. A coding that the body does not begin like is taken for such a header and passed over.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import NamedTuple

import brotli
import zstandard

_STATUS = re.compile(rb"HTTP/[0-9](?:\.[0-9])? +([0-9]{3})\b")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]{0,1000})?\r?\n")
_OUT = 1 << 20


class Response(NamedTuple):
    """A response: status code, headers by their name in lower case (the first of each), and the body as it came."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse(block: bytes) -> Response | None:
    """The response in a block, None when it does not begin like one. A head that does not end has an empty body."""
    status = _STATUS.match(block)
    if not status:
        return None
    end = _HEAD_END.search(block)
    head, body = (block[: end.start()], block[end.end() :]) if end else (block, b"")
    return Response(int(status[1]), headers(head), body)


def headers(head: bytes) -> dict[str, str]:
    """Header lines after the first line; a name that comes again does not count, a folded line goes on."""
    out: dict[str, str] = {}
    name = None
    for line in head.splitlines()[1:]:
        if line[:1] in b" \t" and line:
            if name is not None:
                out[name] += " " + _word(line)
            continue
        key, colon, value = line.partition(b":")
        name = _word(key).lower() if colon and _word(key).lower() not in out else None
        if name is not None:
            out[name] = _word(value)
    return out


def _word(data: bytes) -> str:
    try:
        return data.decode().strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()


def decoded(response: Response, limit: int) -> bytes:
    """The body without its codings, up to one byte more than ``limit``; what was cut short is given as far as it goes.

    Raises:
        ValueError: the body is damaged, or in a coding that is not known.
    """
    body = response.body
    if "chunked" in response.headers.get("transfer-encoding", "").lower():
        body = _unchunked(body)
    for coding in reversed(response.headers.get("content-encoding", "").lower().split(",")):
        decode = _CODINGS.get(coding.strip())
        if decode is not None:
            try:
                body = decode(body, limit + 1)
            except (zlib.error, zstandard.ZstdError, brotli.error) as error:
                raise ValueError(f"{coding.strip()}: {error}") from None
        elif coding.strip() in ("compress", "x-compress", "dcb", "dcz", "sdch"):
            raise ValueError(f"{coding.strip()}: unknown coding")
    return body[: limit + 1]


def _unchunked(body: bytes) -> bytes:
    parts, at = [], 0
    while found := _CHUNK.match(body, at):
        start, size = found.end(), int(found[1], 16)
        if size == 0:
            break
        at = start + size
        parts.append(body[start:at])
        if at > len(body):
            break  # cut short
        if body[at : at + 2] == b"\r\n":
            at += 2
        elif body[at : at + 1] == b"\n":
            at += 1
        elif at < len(body):
            # Not the end of a chunk. The first number was a word of the page then, or the body is damaged from here.
            return body if len(parts) == 1 else b"".join(parts)
    else:
        if not parts:
            return body
    return b"".join(parts)


def _gzip(data: bytes, most: int) -> bytes:
    if not data.startswith(b"\x1f\x8b"):
        return data
    out = b""
    while data.startswith(b"\x1f\x8b") and len(out) < most:
        stream = zlib.decompressobj(31)
        out += stream.decompress(data, most - len(out))
        if not stream.eof:
            break
        data = stream.unused_data
    return out


def _deflate(data: bytes, most: int) -> bytes:
    if len(data) >= 2 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0:
        return zlib.decompressobj().decompress(data, most)
    try:
        return zlib.decompressobj(-15).decompress(data, most)  # as some servers understood it
    except zlib.error:
        if data.lstrip()[:1] == b"<":
            return data
        raise


def _brotli(data: bytes, most: int) -> bytes:
    if data.lstrip()[:1] == b"<":  # no stream of more than a few bytes begins so, but pages do
        return data
    stream, parts, size = brotli.Decompressor(), [], 0
    part = stream.process(data, output_buffer_limit=_OUT)
    while part and size < most:
        parts.append(part)
        size += len(part)
        part = b"" if stream.is_finished() else stream.process(b"", output_buffer_limit=_OUT)
    return b"".join(parts)


def _zstd(data: bytes, most: int) -> bytes:
    if not data.startswith(b"\x28\xb5\x2f\xfd"):
        return data
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    return decoder.stream_reader(io.BytesIO(data), read_across_frames=True).read(most)


_CODINGS = {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd}
