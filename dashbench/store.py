"""The store: finished rows as JSON lines, one fsynced line a row, safe against kill -9, torn lines, full
disks and second writers.

A store is one file. Rows of several environments may live in it; they carry their `environment_key` and are
never mixed: what is finished is asked per environment, and the newest row of a (key, environment_key)
counts.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import lzma
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dashbench.rows import ROW_VERSION, Row

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)

PACKED = {".gz": (gzip.open, "gzip -9n"), ".xz": (lzma.open, "xz -9e")}
"""How a packed store is opened, by its ending, and the command that packs one."""
"""What a file that cannot be read raises: no such right or disk, a packed file cut short, or damaged."""


class StoreError(Exception):
    """Something about the store that the user must know; the message is one sentence."""


class Store:
    """Rows in a file, open for appending by this process alone.

    Args:
        path: of the `.jsonl` file; its folder is made.

    Raises:
        StoreError: another run holds the store, a line is not a row, or rows are of a newer version.
    """

    def __init__(self, path: Path):
        self.path = path
        self.notices: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{path}.lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"another run is writing {path}; wait for it or use another --out") from None
        except OSError as problem:
            raise StoreError(f"cannot write to {path.parent}: {problem.strerror}") from None
        try:
            self._unpack()
            self._repair()
            self._rows = {(r["key"], r["environment_key"]): r for r in read_rows(path)}
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed in `close`)
        except BaseException:
            self._lock.release()
            raise

    def _unpack(self) -> None:
        """Puts a packed store back, so that a run goes on where it stopped."""
        there = [p for p in (self.path.with_name(self.path.name + end) for end in PACKED) if p.exists()]
        if self.path.exists() or not there:
            return
        packed = there[0]
        unpacked, command = PACKED[packed.suffix]
        whole = self.path.with_name(self.path.name + ".unpacking")
        try:
            with unpacked(packed) as source, open(whole, "wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
        except UNREADABLE as problem:
            whole.unlink(missing_ok=True)
            raise StoreError(f"cannot unpack {packed}: {problem}") from None
        whole.rename(self.path)
        packed.unlink()
        self.notices.append(f"{packed}: unpacked to go on; `{command} {self.path}` packs it again")

    def _repair(self) -> None:
        """Cuts off a last line without an end: the write that a crash interrupted."""
        if not self.path.exists():
            return
        with open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            data = self.path.read_bytes()
            keep = data.rfind(b"\n") + 1
            torn = data[keep : keep + 60].decode("utf-8", "replace")
            file.truncate(keep)
            file.flush()
            os.fsync(file.fileno())
        self.notices.append(f"{self.path}: cut off a torn last line of {size - keep} bytes ({torn!r} …)")

    def rows(self) -> list[dict[str, Any]]:
        """The newest row of every point and environment."""
        return list(self._rows.values())

    def find(self, key: str, environment_key: str) -> dict[str, Any] | None:
        """The newest row of a point, if it was measured in this environment."""
        return self._rows.get((key, environment_key))

    def append(self, row: Row) -> None:
        """Writes a row and returns once it is on the disk.

        Raises:
            StoreError: the disk is full or failing; the file is as it was before.
        """
        line = row.model_dump_json().encode() + b"\n"
        before = self.path.stat().st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as problem:
            with contextlib.suppress(
                OSError
            ):  # if even this fails, the torn line is cut off at the next start
                os.truncate(self.path, before)
            full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "the disk is full" if full else f"writing failed ({problem.strerror})"
            raise StoreError(
                f"{self.path}: {why}; every row finished before is safe, run again to go on"
            ) from None
        stored = json.loads(line)
        self._rows[stored["key"], stored["environment_key"]] = stored

    def close(self) -> None:
        """Lets the next run have the store."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with PACKED[path.suffix][0](path) if path.suffix in PACKED else open(path, "rb") as file:
            yield from enumerate(file, 1)
    except FileNotFoundError:
        return
    except UNREADABLE as problem:
        raise StoreError(f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file in order, a torn last line left out. A missing file has none.

    Raises:
        StoreError: a line is no row, or of a newer version.
    """
    rows = []
    for number, line in _lines(path):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            version, _, _ = row["row_version"], row["key"], row["environment_key"]
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{path}, line {number}: not a row of dashbench") from None
        if version > ROW_VERSION:
            raise StoreError(
                f"{path}, line {number}: row version {version} is newer than this dashbench ({ROW_VERSION})"
            )
        rows.append(row)
    return rows


def newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of every (key, environment_key), by time: several files may hold a point."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        point = row["key"], row["environment_key"]
        if point not in found or row["timestamp"] >= found[point]["timestamp"]:
            found[point] = row
    return list(found.values())


def store_files(path: Path) -> list[Path]:
    """The row files that a path given by a user means: a file, or the `.jsonl` files of a folder and those
    that were packed (`.jsonl.gz`, `.jsonl.xz`; a run that goes on with one unpacks it).

    Raises:
        StoreError: there is none.
    """
    if path.is_file():
        return [path]
    endings = ("", *PACKED)
    found = sorted(p for end in endings for p in path.glob(f"*.jsonl{end}")) if path.is_dir() else []
    if not found:
        raise StoreError(f"{path}: no rows here (expected a .jsonl file, or a folder that holds some)")
    return found


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The newest rows of each file that a path means; a point that is in several files is there for each.

    Raises:
        StoreError: see `store_files` and `read_rows`.
    """
    return [row for file in store_files(path) for row in newest(read_rows(file))]
