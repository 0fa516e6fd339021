"""HTML to text: the main content of a page, decoded as a browser would (WHATWG), by a parser that may hang or die.

resiliparse is the default: on the pages of tests/benchmarks/extraction.py it finds more of the main content than
trafilatura, some twenty times as fast. Whatever parses runs in a helper process with a limit of time and memory a page,
so that a page that makes it hang, run out of memory or crash costs that page alone.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import json
import logging
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO, Literal, NamedTuple, Self

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_HEADER_CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s\"';,]+)", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta\b[^>]{0,300}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)
# Control characters other than tab and newline carry nothing in a page and upset later readers.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")

_BATCH_BYTES = 4_000_000  # sent to the helper at a time
_WALL_CLOCK = 10  # times timeout_s: a helper that sleeps, which a limit on its CPU time does not end
_START_S = 120.0  # for a helper to import its parser, on a machine that may be busy
_LAST_WORDS = 1000
_LENGTH = struct.Struct("<q")


@dataclass
class ExtractSettings:
    """How HTML becomes text."""

    extractor: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """What reads the page; trafilatura, which is slower and more cautious, is an extra: `pip install
    'ingot[trafilatura]'`."""
    main_content: bool = True
    """Leave out navigation, headers, footers and forms; false keeps all visible text."""
    links: bool = False
    """Write the address behind each link."""
    comments: bool = False
    """Keep what readers wrote below an article as part of the main content."""
    timeout_s: float = 5.0
    """CPU seconds that a page may take; one that takes longer is set aside."""
    memory_bytes: int = 1_000_000_000
    """Memory that reading a page may take beyond the parser's own; a page that needs more is set aside."""

    def validate(self) -> None:
        """Raise ValueError for what cannot work."""
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, must be above 0")
        if self.memory_bytes < 1_000_000:
            raise ValueError(f"memory_bytes is {self.memory_bytes}, must be at least 1000000")
        if self.extractor == "trafilatura":
            if importlib.util.find_spec("trafilatura") is None:
                raise ValueError("extractor is trafilatura, which is not installed: pip install 'ingot[trafilatura]'")
            if not self.main_content and (self.links or self.comments):
                raise ValueError("links and comments need main_content when extractor is trafilatura")


class ExtractionError(NamedTuple):
    """Why a page has no text.

    Attributes:
        reason: short and countable, such as ``html: too slow``.
        detail: the error's own words.
    """

    reason: str
    detail: str


def extract_text(html: bytes, content_type: str | None = None, settings: ExtractSettings | None = None) -> str:
    """A page as text; paragraphs are parted by blank lines. Runs here, without the guard of ``Extractor``.

    Scripts and hidden elements are left out. Damaged markup is read as a browser reads it; bytes that the charset does
    not know become U+FFFD.

    Args:
        html: the page as it came.
        content_type: the HTTP header of that name, for its charset.
        settings: what to keep, by what parser.

    Returns:
        The text, empty when the page has none.
    """
    from resiliparse.parse.encoding import bytes_to_str

    settings = settings or ExtractSettings()
    page = bytes_to_str(html, charset(html, content_type), errors="replace", fallback_encodings=())
    text = _PARSERS[settings.extractor](page, settings)
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    return _BLANK_LINES.sub("\n\n", text).strip()


def charset(html: bytes, content_type: str | None = None) -> str:
    """The charset of a page: its byte order mark, else the HTTP header, else its meta element, else by its bytes."""
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for bom, name in _BOMS:
        if html.startswith(bom):
            return name
    declared = _HEADER_CHARSET.search(content_type or "")
    if declared and (name := map_encoding_to_html5(declared[1], fallback_utf8=False)):
        return name
    meta = _META_CHARSET.search(html, 0, 4096)
    if meta and (name := map_encoding_to_html5(meta[1].decode("ascii"), fallback_utf8=False)):
        # A meta element that could be read as ASCII cannot be in UTF-16 (WHATWG, 13.2.3.2).
        return "utf-8" if name.startswith("utf-16") else name
    return detect_encoding(html) or "utf-8"


def _resiliparse(page: str, settings: ExtractSettings) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLParserException, HTMLTree

    try:
        tree = HTMLTree.parse(page)
    except HTMLParserException:  # HTML5 gives every text a tree: it ran out of memory
        raise MemoryError from None
    return extract_plain_text(
        tree,
        main_content=settings.main_content,
        alt_texts=False,
        links=settings.links,
        comments=settings.comments,
    )


def _trafilatura(page: str, settings: ExtractSettings) -> str:
    import trafilatura

    if not settings.main_content:
        return trafilatura.html2txt(page)
    # Not its deduplicate: that remembers earlier pages, so that the text would depend on the order they come in.
    text = trafilatura.extract(page, include_comments=settings.comments, include_links=settings.links)
    return (text or "").replace("\n", "\n\n")  # its paragraphs are lines


_PARSERS: dict[str, Callable[[str, ExtractSettings], str]] = {"resiliparse": _resiliparse, "trafilatura": _trafilatura}


class Extractor:
    """Turns pages into text in a helper process, which is started with the first page and anew when one killed it.

    A page may take ``timeout_s`` of CPU time, so that a busy machine sets no page aside, and a multiple of that by the
    clock. A page whose helper dies otherwise is tried once more on its own, as the death may have come from outside.
    """

    def __init__(self, settings: ExtractSettings) -> None:
        self.settings = settings
        self._helper: _Helper | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def __call__(self, pages: Sequence[tuple[bytes, str | None]]) -> list[str | ExtractionError]:
        """Text of each page (its bytes and its Content-Type header), or why there is none.

        Raises:
            RuntimeError: the helper does not start.
        """
        results: list[str | ExtractionError] = []
        tried = -1
        while len(results) < len(pages):
            at = len(results)
            end = at + 1 if tried == at else _batch_end(pages, at)
            error = self._send(pages[at:end], results)
            if error is None:
                continue
            if error.reason == "html: parser died" and tried != len(results):
                tried = len(results)
            else:
                results.append(error)
        return results

    def _send(
        self, pages: Sequence[tuple[bytes, str | None]], results: list[str | ExtractionError]
    ) -> ExtractionError | None:
        """Append the results of ``pages``; when the helper goes before the last of them, why."""
        if self._helper is None:
            self._helper = _Helper(self.settings)
        try:
            self._helper.send(pages)
            # What came before the helper went stays in results.
            results.extend(self._helper.receive(_WALL_CLOCK * self.settings.timeout_s) for _ in pages)
        except TimeoutError:
            return ExtractionError("html: too slow", f"no answer after {self._stop():.0f} s")
        except (EOFError, BrokenPipeError):
            return self._cause()
        except BaseException:  # such as an interrupt: half an answer may lie in the pipe
            self._stop()
            raise
        return None

    def _cause(self) -> ExtractionError:
        helper, self._helper = self._helper, None
        status, words = helper.wait()
        if status == -signal.SIGPROF:
            return ExtractionError("html: too slow", f"more than {self.settings.timeout_s:g} s of CPU time")
        if status == _OUT_OF_MEMORY or (status == -signal.SIGABRT and "memory allocation" in words):  # as Rust ends
            return ExtractionError("html: too large", f"more than {self.settings.memory_bytes:,} bytes of memory")
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return ExtractionError("html: parser died", f"helper process ended with {how}: {words}".rstrip(": "))

    def _stop(self) -> float:
        """End the helper, if there is one; returns the seconds since it was last given pages."""
        helper, self._helper = self._helper, None
        if helper is None:
            return 0.0
        helper.kill()
        return time.monotonic() - helper.sent


def _batch_end(pages: Sequence[tuple[bytes, str | None]], at: int) -> int:
    """One past the last page that is sent together with page ``at``."""
    size = len(pages[at][0])
    end = at + 1
    while end < len(pages) and size + len(pages[end][0]) <= _BATCH_BYTES:
        size += len(pages[end][0])
        end += 1
    return end


class _Helper:
    """The other process, and the pipes to it."""

    def __init__(self, settings: ExtractSettings) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        self.sent = time.monotonic()
        try:
            # A fresh interpreter, not a fork: this process may have threads that hold locks.
            command = "import sys; from pipelines.extract import _serve; _serve(sys.argv[1], *map(int, sys.argv[2:]))"
            arguments = [json.dumps(asdict(settings)), str(theirs_in), str(theirs_out)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", command, *arguments],
                pass_fds=(theirs_in, theirs_out),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RUST_BACKTRACE": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        try:
            self.receive(_START_S)
        except (EOFError, TimeoutError) as error:
            status, words = self.kill()
            raise RuntimeError(
                f"the helper process that runs {settings.extractor} does not start (status {status}): {words}"
            ) from error

    def send(self, pages: Sequence[tuple[bytes, str | None]]) -> None:
        """Give the helper pages to read."""
        self.sent = time.monotonic()
        parts = [_LENGTH.pack(len(pages))]
        for html, content_type in pages:
            header = (content_type or "").encode("utf-8", "replace")
            parts += [_LENGTH.pack(len(header)), header, _LENGTH.pack(len(html)), html]
        data = memoryview(b"".join(parts))
        while data:
            data = data[os.write(self._out, data) :]

    def receive(self, timeout: float) -> str | ExtractionError:
        """The helper's next answer.

        Raises:
            TimeoutError: none came in that many seconds.
            EOFError: the helper is gone.
        """
        deadline = time.monotonic() + timeout
        length = _LENGTH.unpack(self._read(_LENGTH.size, deadline))[0]
        text = self._read(abs(length), deadline).decode("utf-8", "replace")
        return text if length >= 0 else ExtractionError("html: not extracted", text)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            if not select.select([self._in], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            piece = os.read(self._in, min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def wait(self) -> tuple[int, str]:
        """Close the pipes and wait for the end of the process; its exit status and its last words."""
        os.close(self._out)
        os.close(self._in)
        try:
            status = self._process.wait(timeout=_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        with self._errors:
            self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - _LAST_WORDS, 0))
            return status, self._errors.read(_LAST_WORDS).decode("utf-8", "replace").strip()

    def kill(self) -> tuple[int, str]:
        """End the process at once; see ``wait``."""
        self._process.kill()
        return self.wait()


# in the helper process

_OUT_OF_MEMORY = 71


def _serve(settings: str, source: int, sink: int) -> None:
    """Read batches of pages from ``source`` and write an answer for each to ``sink``, until ``source`` ends."""
    logging.disable()  # parsers comment on every other page
    chosen = ExtractSettings(**json.loads(settings))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it, by closing the pipe
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    extract_text(b"<p>ready</p>", None, chosen)  # imports the parser before limits are set
    _limit_memory(chosen.memory_bytes)
    with open(source, "rb") as pages, open(sink, "wb") as answers:
        _answer(answers, "")
        while count := pages.read(_LENGTH.size):
            # The whole batch before the first answer: both sides would wait for each other with full pipes.
            batch = [(_field(pages), _field(pages)) for _ in range(_LENGTH.unpack(count)[0])]
            for content_type, html in batch:
                try:
                    with _cpu_limit(chosen.timeout_s):
                        text = extract_text(html, content_type.decode(), chosen)
                except MemoryError:
                    os._exit(_OUT_OF_MEMORY)
                except Exception as error:
                    _answer(answers, repr(error)[:2000] or "error", failed=True)
                else:
                    _answer(answers, text)


def _field(pages: BinaryIO) -> bytes:
    return pages.read(_LENGTH.unpack(pages.read(_LENGTH.size))[0])


def _answer(answers: BinaryIO, text: str, *, failed: bool = False) -> None:
    data = text.encode("utf-8", "replace")
    answers.write(_LENGTH.pack(-len(data) if failed else len(data)) + data)
    answers.flush()


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """The kernel ends this process when the block takes more CPU time than that."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory(size: int) -> None:
    """Let the address space grow by at most ``size`` bytes."""
    with contextlib.suppress(OSError):  # no /proc: a system that does not heed the limit either
        with open("/proc/self/statm") as status:
            now = int(status.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + size, resource.getrlimit(resource.RLIMIT_AS)[1]))
