"""The file system that Ray Train and Tune keep their own accounts on: the run's storage, waited for while it fails."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
from pyarrow import fs

from models.training.run_folder import patiently
from pipelines import storage


class PatientStorage(fs.FileSystemHandler):
    """For ``pyarrow.fs.PyFileSystem``; takes the paths of the file system that it stands before.

    Ray Train ends a run when it cannot write down that a checkpoint was reported. What both write is small, so a file
    is gathered in memory and written when it is closed, as often as it takes.

    Args:
        uri: anything on that storage.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.inner, _ = storage.filesystem(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientStorage, (self.uri,)

    def __eq__(self, other: object) -> bool:
        return self.inner == other.inner if isinstance(other, PatientStorage) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.inner.type_name)

    def get_type_name(self) -> str:
        """Of the storage itself."""
        return self.inner.type_name

    def normalize_path(self, path: str) -> str:
        """The path as the storage has it."""
        return self.inner.normalize_path(path)

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """What is there, for each path."""
        return patiently(self.inner.get_file_info, paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """What is in a folder."""
        return patiently(self.inner.get_file_info, selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Make a folder."""
        patiently(self.inner.create_dir, path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        """Delete a folder with what it holds."""
        patiently(self.inner.delete_dir, path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """Delete what a folder holds."""
        patiently(self.inner.delete_dir_contents, path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        """Refused: nobody means that.

        Raises:
            ValueError: always.
        """
        raise ValueError("the whole of a storage is never deleted")

    def delete_file(self, path: str) -> None:
        """Delete a file."""
        patiently(self.inner.delete_file, path)

    def move(self, src: str, dest: str) -> None:
        """Give a file or folder another name."""
        patiently(self.inner.move, src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        """Copy a file."""
        patiently(self.inner.copy_file, src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """A file to read from its beginning."""
        return patiently(self.inner.open_input_stream, path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file to read anywhere in it."""
        return patiently(self.inner.open_input_file, path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """A file to write, which is there once it is closed."""
        return pa.PythonFile(_Gathered(self.inner, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """A file to write on at its end."""
        return patiently(self.inner.open_append_stream, path)


class _Gathered(io.BytesIO):
    """What is written to it goes to a file at the end."""

    def __init__(self, filesystem: fs.FileSystem, path: str) -> None:
        super().__init__()
        self.filesystem, self.path = filesystem, path

    def close(self) -> None:
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        patiently(self._write, content)

    def _write(self, content: bytes) -> None:
        with self.filesystem.open_output_stream(self.path) as out:
            out.write(content)
