"""Files behind http:// and https://, read as if they were here: throttling is waited out, broken connections resumed.

A connection that breaks is taken up again by Range at the byte where it broke; a server that ignores ranges costs
reading up to there once more. 408, 425, 429 and 5xx are tried again after the time that Retry-After names, else after
waits that double (RFC 9110, sections 10.2.3 and 14.2).
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import io
import random
import ssl
import time
import urllib.error
import urllib.request

USER_AGENT = "ingot (reads public archives to train language models; one connection a task)"

_ATTEMPTS = 9  # in a row without a new byte; with the waits below some two minutes
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_LONGEST_RETRY_AFTER = 600.0
_TIMEOUT = 60.0  # seconds without a byte
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_BLOCK = 1 << 18
_SKIP = 1 << 20  # a shorter way forward is read rather than asked for anew


class DownloadError(OSError):
    """A file that the server does not give, however often it is asked."""


class Download(io.RawIOBase):
    """A file on a server, opened for reading in bytes; may be moved in, which costs a request.

    Raises:
        FileNotFoundError: the server says that there is none (404, 410).
        DownloadError: it refuses, cannot be reached, or the file changed while it was read.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri
        self.changed = 0.0  # Unix seconds, 0 when the server does not say
        self._response: http.client.HTTPResponse | None = None
        self._stream_at = 0  # position of the open response
        self._block, self._block_at = b"", 0
        self._at = 0  # position of the reader
        self._size: int | None = None
        self._version: str | None = None
        self._fetch(_BLOCK)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position of the next byte that is read."""
        return self._at

    def size(self) -> int:
        """Bytes of the file."""
        if self._size is None:  # the server did not say
            at = self._at
            while self.read(_BLOCK):
                pass
            self._size, self._at = self._at, at
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; nothing is asked of the server before the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = offset + (self.size() if base is None else base)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, fewer only at the end of the file; all that is left when ``size`` is negative."""
        parts, left = [], size if size is not None and size >= 0 else 1 << 62
        while left > 0:
            if not self._block_at <= self._at < self._block_at + len(self._block):
                self._fetch(max(_BLOCK, min(left, 1 << 22)))
                if not self._block:
                    break
            start = self._at - self._block_at
            parts.append(self._block[start : start + left])
            self._at += len(parts[-1])
            left -= len(parts[-1])
        return b"".join(parts)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` with the next bytes; how many there were."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def _fetch(self, size: int) -> None:
        """Make the block what stands at the reader's position: up to ``size`` bytes, none at the end of the file."""
        failures = 0
        while True:
            try:
                self._block, self._block_at = self._more(size), self._at
            except FileNotFoundError:
                raise
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                failures += 1
                if failures >= _ATTEMPTS or not _passing(error):
                    tries = f" after {failures} attempts" if failures > 1 else ""
                    raise DownloadError(errno.EIO, f"{_words(error)}{tries}", self.uri) from error
                time.sleep(_wait(error, failures))
            else:
                return

    def _more(self, size: int) -> bytes:
        if self._size is not None and self._at >= self._size:
            return b""
        if self._response is not None and not 0 <= self._at - self._stream_at <= _SKIP:
            self._drop()
        if self._response is None and not self._connect():
            return b""
        while self._stream_at < self._at:
            if not self._take(min(_BLOCK, self._at - self._stream_at)):
                return b""
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = self._response.read(size)
        self._stream_at += len(data)
        # Python's client takes a connection that ends early for the end of the file.
        if not data and self._size is not None and self._stream_at < self._size:
            raise ConnectionError(f"the connection ended at byte {self._stream_at} of {self._size}")
        return data

    def _connect(self) -> bool:
        """Ask for the file from the reader's position on; False when that lies at its end."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
        request = urllib.request.Request(self.uri, headers=headers)  # noqa: S310 (only http(s) comes here)
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(errno.ENOENT, "no such file on the server", self.uri) from None
            if error.code == 416 and self._size is None:
                return False
            raise
        self._response, self._stream_at = response, 0
        length = response.headers.get("Content-Length")
        size = int(length) if length and length.isdigit() else None
        if response.status == 206:
            span, _, total = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("/")
            if span.partition("-")[0] != str(self._at):
                raise ConnectionError(f"asked for bytes from {self._at} on, got {span or 'no Content-Range'}")
            self._stream_at, size = self._at, int(total) if total.isdigit() else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self._version not in (None, version) or (None not in (self._size, size) and self._size != size):
            raise DownloadError(errno.EIO, "the file changed while it was read", self.uri)
        self._version, self._size = version, self._size if size is None else size
        if stamp := response.headers.get("Last-Modified"):
            self.changed = _seconds(stamp)
        return True

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _passing(error: Exception) -> bool:
    """Whether it makes sense to try again."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _AGAIN
    reason = getattr(error, "reason", error)
    return not isinstance(reason, (ssl.SSLCertVerificationError, DownloadError, http.client.InvalidURL))


def _wait(error: Exception, failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    headers = getattr(error, "headers", None)
    wanted = headers.get("Retry-After") if headers is not None else None
    if wanted:
        seconds = float(wanted) if wanted.strip().isdigit() else _seconds(wanted) - time.time()
        if seconds > 0:
            return min(seconds, _LONGEST_RETRY_AFTER) + random.uniform(0, _FIRST_WAIT)
    return min(_FIRST_WAIT * 2 ** (failures - 1), _LONGEST_WAIT) * random.uniform(0.5, 1)


def _seconds(date: str) -> float:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return 0.0


def _words(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error or type(error).__name__)
