"""Source code: one document a file, with its language by extension; generated, minified, binary files are skipped."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pipelines import storage
from pipelines.documents import BadRecord, document_id
from pipelines.sources import Record, Source, whole_text

LANGUAGES = {
    ".ada": "ada", ".asm": "assembly", ".s": "assembly", ".sh": "shell", ".bash": "shell", ".zsh": "shell",
    ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".hh": "c++", ".hpp": "c++", ".cu": "cuda",
    ".clj": "clojure", ".cs": "c#", ".css": "css", ".scss": "css", ".d": "d", ".dart": "dart", ".elm": "elm",
    ".erl": "erlang", ".ex": "elixir", ".exs": "elixir", ".f90": "fortran", ".f": "fortran", ".fs": "f#", ".go": "go",
    ".groovy": "groovy", ".hs": "haskell", ".html": "html", ".java": "java", ".jl": "julia", ".js": "javascript",
    ".mjs": "javascript", ".jsx": "javascript", ".kt": "kotlin", ".lisp": "lisp", ".el": "lisp", ".lua": "lua",
    ".m": "objective-c", ".md": "markdown", ".ml": "ocaml", ".mli": "ocaml", ".pas": "pascal", ".php": "php",
    ".pl": "perl", ".pm": "perl", ".proto": "protobuf", ".ps1": "powershell", ".py": "python", ".pyi": "python",
    ".pyx": "cython", ".r": "r", ".rb": "ruby", ".rs": "rust", ".rst": "restructuredtext", ".scala": "scala",
    ".scm": "scheme", ".sql": "sql", ".sv": "verilog", ".swift": "swift", ".tcl": "tcl", ".tex": "tex",
    ".ts": "typescript", ".tsx": "typescript", ".v": "verilog", ".vhd": "vhdl", ".vim": "vim", ".zig": "zig",
}  # fmt: skip
"""Languages by extension (in lower case)."""

NAMES = {"makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake"}
"""Languages by file name (in lower case)."""

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "bower_components", "venv", "site-packages"}
"""Folders that hold no code of the tree's own; so do all whose name starts with a dot."""

_GENERATED = re.compile(r"@generated|auto-?generated|generated (?:automatically )?by|do not (?:edit|modify)", re.I)
_HEAD_LINES = 12
_MAX_MEAN_LINE = 100  # characters; Lozhkov et al. 2024 (The Stack v2), as in Kocetkov et al. 2022


def list_code(source: Source) -> list[storage.FileInfo]:
    """Files of a known language that the source's path (a file, a folder or a glob) names, sorted.

    Raises:
        FileNotFoundError: nothing is there.
    """
    root = storage.local_path(source.path)
    if root is None or not os.path.isdir(root):
        # Folders such as _internal are code too, so that hidden names are sorted out here, as in a local tree below.
        files = [file for file in storage.list_files(source.path, hidden=True) if language_of(file.uri)]
        return [file for file in files if not any(map(_is_skipped, source.relative(file.uri).split("/")))]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _is_skipped(name)]
        for name in names:
            file = os.path.join(folder, name)
            if language_of(name) and not name.startswith(".") and os.path.isfile(file):
                status = os.stat(file)
                found.append(storage.FileInfo(file, status.st_size, status.st_mtime))
    return sorted(found)


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED_FOLDERS


def language_of(uri: str) -> str | None:
    """The programming language of a file by its name, None when it is not known."""
    name = storage.file_name(uri).lower()
    return NAMES.get(name) or LANGUAGES.get(os.path.splitext(name)[1])


def read(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    """The file, unless it is binary, generated, minified or too long."""
    text = whole_text(uri, source.max_record_bytes, "code")
    if isinstance(text, BadRecord):
        yield text._replace(reason="code: binary") if text.reason == "code: bad UTF-8" else text
        return
    if not text.strip():
        return
    reason = why_skipped(text)
    if reason is not None:
        yield BadRecord(uri, 0, *reason)
        return
    path = source.relative(uri)
    yield {
        "id": document_id(source.label, path, 0),
        "text": text.replace("\r\n", "\n"),
        "path": uri,
        "language": language_of(uri),
        "offset": 0,
        "metadata": {"file": path},
    }


def why_skipped(text: str) -> tuple[str, str] | None:
    """Reason and detail for a file that nobody wrote by hand, or None."""
    at = text.find("\0")
    if at >= 0:
        return "code: binary", f"a NUL character at {at}"
    marker = _GENERATED.search("\n".join(text[:4000].split("\n", _HEAD_LINES)[:_HEAD_LINES]))
    if marker:
        return "code: generated", f"says {marker[0]!r}"
    mean = len(text) / (text.rstrip().count("\n") + 1)
    if mean > _MAX_MEAN_LINE:
        return "code: minified", f"{mean:.0f} characters a line"
    return None
