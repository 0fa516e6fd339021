"""Source code: one document a file, with its language by extension; from trees of files and from tar archives.

Tables of code, such as The Stack's, are read as any Parquet and JSON Lines, by their column mapping.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pipelines import storage
from pipelines.documents import BadRecord, document_id
from pipelines.sources import ARCHIVES, Record, Source, stem
from pipelines.sources.text import decode, whole_file

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


def list_code(source: Source) -> list[storage.FileInfo]:
    """Files of a known language that the source's path (a file, a folder or a glob) names, sorted.

    Archives and tables are taken where the path is one, or a glob that ends in their extension.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if stem(source.path).endswith(ARCHIVES):
        return storage.list_files(source.path)
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
    """The file, or those of a known language in a tar archive, unless it is binary, damaged or too long."""
    if stem(uri).endswith(".tar"):
        yield from _members(uri, source)
        return
    data = whole_file(uri, source.max_record_bytes, "code")
    if isinstance(data, BadRecord):
        yield data
        return
    path = source.relative(uri)
    found = _document(data, uri, 0, path, document_id(source.label, path, 0))
    if found is not None:
        yield found


def _members(uri: str, source: Source) -> Iterator[Record | BadRecord]:
    from pipelines.sources import tar

    for member in tar.members(uri, source.max_record_bytes, _of_tree):
        if isinstance(member, BadRecord):
            yield member
            continue
        key = document_id(source.label, source.relative(uri), f"{member.position} {member.name}")
        found = _document(member.data, uri, member.offset, member.name, key)
        if found is not None:
            yield found


def _of_tree(name: str) -> bool:
    folders = name.split("/")
    return language_of(name) is not None and not any(_is_skipped(part) for part in folders if part not in ("", "."))


def _document(data: bytes, uri: str, offset: int, name: str, key: str) -> Record | BadRecord | None:
    """The document of a file's content; None when there is nothing in it."""
    found = decode(data)
    if isinstance(found, str):
        return BadRecord(uri, offset, "code: binary", f"{name}: {found}")
    at = found.text.find("\0")
    if at >= 0:
        return BadRecord(uri, offset, "code: binary", f"{name}: a NUL character at {at}")
    if not found.text.strip():
        return None
    return {
        "id": key,
        "text": found.text.replace("\r\n", "\n"),
        "path": uri,
        "language": language_of(name),
        "offset": offset,
        "metadata": {"file": name} | found.facts,
    }
