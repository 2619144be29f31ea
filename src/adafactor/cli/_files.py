"""Writing files so that a full disk or a killed process never costs what was there before.

Of several processes that train together only the first writes.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from adafactor.cli import _ranks
from adafactor.cli._errors import UserError


def write_error(path: Path, error: OSError, consequence: str) -> UserError:
    """The one line for a write the system refused."""
    return UserError(f"cannot write {path}: {error.strerror or error}; {consequence}")


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Replace ``path`` by ``content`` as a whole or leave it as it was, also across a kill or a power cut.

    Raises:
        UserError: the system refused (a full disk, a missing right); the previous file is unchanged.
    """
    if not _ranks.first():
        return
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # the same every time: what a kill leaves is used up
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        kept = "the previous file is unchanged" if path.exists() else "nothing was overwritten"
        raise write_error(path, error, kept) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a directory be opened."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """``write_atomic`` of readable JSON; numbers that JSON cannot hold (NaN, infinity) must already be None."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class JsonLines:
    """An append-only file of one JSON object per line, also after a kill in the middle of a line.

    Args:
        path: the file; created when missing.
        keep: with a number, lines whose ``step`` is beyond it (written after the checkpoint one resumes from) and a
            torn last line are dropped first; with None the file starts empty.
    """

    def __init__(self, path: Path, keep: int | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = (
            [] if keep is None else [r for r in read_json_lines(path) if r["step"] <= keep]
        )
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        try:
            self._file = (path if _ranks.first() else Path(os.devnull)).open("a", encoding="utf-8")
        except OSError as error:
            raise write_error(path, error, "nothing was overwritten") from error

    def append(self, row: dict[str, Any]) -> None:
        """Write one line and hand it to the system.

        Raises:
            UserError: the disk is full; the lines before this one are unharmed.
        """
        self.rows.append(row)
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error, "the lines before this one are unharmed") from error

    def sync(self) -> None:
        """Wait until every line is on the disk."""
        if not _ranks.first():
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error, "the lines already written are unharmed") from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # what the disk refused has been reported by append
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of ``path`` up to the first torn line; empty when there is no such file."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def new_run_directory(path: Path, hint: str) -> None:
    """Create ``path``, or accept it when it is empty.

    Raises:
        UserError: it holds something, is not a directory, or cannot be made. ``hint`` says what to do instead.
    """
    if not _ranks.first():
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        leftovers = [p for p in path.iterdir() if not (p.name.startswith(".") and p.name.endswith(".tmp"))]
    except OSError as error:
        raise UserError(f"cannot use --out {path}: {error.strerror or error}") from error
    if leftovers:
        raise UserError(f"--out {path} is not empty (it holds {leftovers[0].name}); {hint}")
