"""Files that are either whole or absent: atomic writes, hashes, folder locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl_ext.core.errors import DiskError, UserError

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk failed",
    errno.ESTALE: "the network disk lost the folder",
}


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure nothing is left.

    The data are on the disk (fsync of file and folder) before the old file is replaced, so that a crash at any
    instant leaves either the old or the new file.

    Raises:
        DiskError: the disk is full, read-only or failing; `path` keeps its former content.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{_owner()}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise DiskError(
                f"could not write: {_DISK_ERRORS[error.errno]}", path, "free or change the disk and run the same command again; files already written are valid"
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _owner() -> str:
    """This process, in the name of an unfinished file: hash of the host, process number."""
    return f"{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-{os.getpid()}"


def _remove_abandoned(folder: Path) -> None:
    """Unfinished files whose process is gone; those of other hosts may be in work and stay."""
    host = _owner().partition("-")[0]
    for leftover in folder.glob(".*.tmp"):
        owner = leftover.name.rsplit(".", 3)[1].partition("-")
        if owner[0] == host and owner[2].isdigit() and not _alive(int(owner[2])):
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any) -> None:
    """Write `content` atomically as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file does not exist or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file not found", path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: {error}", path, "restore the file or run the step that writes it again") from None


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_stream(file)


def _sha256_stream(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(content: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


class FolderLock:
    """Keeps a second process out of a folder; a lock whose process is gone is taken over, its unfinished files are removed.

    Args:
        folder: what to lock.
        part: (k, n) locks part k of n: the other parts may be in use at the same time, the folder as a whole may not.

    Raises:
        UserError: the folder is in use by a live process of this host, or by any process of another host; it can't be used at all.
        DiskError: the disk is full, read-only or failing.
    """

    def __init__(self, folder: Path | str, part: tuple[int, int] | None = None) -> None:
        self.path = Path(folder) / (".lock" if part is None else f".lock_{part[0]}_of_{part[1]}")
        self._compatible = "" if part is None else f"_of_{part[1]}"  # ending of the locks that may be held beside this one

    def __enter__(self) -> FolderLock:
        try:
            return self._take()
        except OSError as error:
            reason = _DISK_ERRORS.get(error.errno or 0)
            if reason:
                raise DiskError(f"could not write: {reason}", self.path.parent, "free or change the disk and run the same command again") from error
            raise UserError(f"the folder can't be used: {error.strerror or error}", self.path.parent, "check the path and its permissions") from error

    def _take(self) -> FolderLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                _remove_if_stale(self.path)
                continue
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"pid": os.getpid(), "host": socket.gethostname(), **_job()}, file)
            except OSError:
                self.path.unlink(missing_ok=True)  # a lock without owner would keep everyone out
                raise
            try:
                for other in self.path.parent.glob(".lock*"):
                    if other != self.path and not (self._compatible and other.name.endswith(self._compatible)):
                        _remove_if_stale(other)
                        if other.exists():
                            raise UserError("the folder is in use by another process", other, "wait for that process to end")
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise
            _remove_abandoned(self.path.parent)
            return self
        raise UserError("the folder is in use by another process", self.path.parent, "wait for that process to end")

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)


def _remove_if_stale(lock: Path) -> None:
    """Remove a lock whose process is gone.

    Raises:
        UserError: it is in use.
    """
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of several that find it stale, one removes it; the others see it gone or renewed
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return
            owner = _parsed(file.read())
            if owner and (_is_earlier(owner) or owner["host"] == socket.gethostname() and not _alive(owner["pid"])):
                lock.unlink()
                return
    except FileNotFoundError:
        return
    if owner is None:
        fix = f"make sure that no process uses the folder, then delete {lock}"
        raise UserError("the folder is locked, its lock is unreadable", lock.parent, fix)
    fix = f"wait for it to end; if it is certainly gone, delete {lock}"
    raise UserError(f"the folder is in use by process {owner['pid']} on {owner['host']}", lock.parent, fix)


def _parsed(text: str) -> dict[str, Any] | None:
    """Process and host of a lock; None when they can't be read."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    valid = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and isinstance(owner.get("host"), str)
    return owner if valid else None


def _job() -> dict[str, Any]:
    """Number of the SLURM job and how often it was put back into the queue; empty outside of SLURM."""
    number = os.environ.get("SLURM_JOB_ID")
    return {} if number is None else {"job": [number, int(os.environ.get("SLURM_RESTART_COUNT", 0))]}


def _is_earlier(owner: dict[str, Any]) -> bool:
    """Whether a lock is of this very SLURM job before it was put back into the queue: SLURM has ended all its processes, on whatever host."""
    here, there = _job().get("job"), owner.get("job")
    return here is not None and isinstance(there, list) and len(there) == 2 and there[0] == here[0] and there[1] < here[1]


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for (in containers often for ever) does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
