"""Write files atomically: they appear complete or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from cadsurgery.support.errors import FileError, closest

_MAKING = ".making-"  # prefix of temporary folders in the cache in which a file is being made
_SECONDS_TO_LOCK = 1.0  # time allowed between creating such a folder and locking it


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file replaces `path` if the block succeeds and is removed if not.

    Raises:
        FileError: the path cannot be written, see `check_writable`.
    """
    target = check_writable(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=_temporary(target))
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # as an ordinary new file; temporary files are private
            temporary.replace(check_writable(path))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def write_together(path: Path) -> Iterator[Path]:
    """Yield a path with the name of `path` in a temporary folder; if the block succeeds, all files of that folder are
    moved beside `path`, the file named as `path` last.

    Raises:
        FileError: the files cannot be written, see `check_writable`.
    """
    check_writable(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_temporary(path)) as folder:
            yield Path(folder) / path.name
            made = sorted(Path(folder).iterdir(), key=lambda one: one.name == path.name)
            targets = [check_writable(path.parent / one.name) for one in made]
            for one, target in zip(made, targets, strict=True):
                shutil.move(one, target)  # a link may point to another file system
    except OSError as error:
        raise _unwritable(path, error) from error


def check_writable(path: Path) -> Path:
    """Return the file that writing to a path would create or replace: the path itself, or the target of a link.

    Raises:
        FileError: the path is a folder, device, FIFO, socket or read-only file, or no file can have this name.
    """
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        status = target.stat()
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # a name too long, a NUL byte, a link to itself
        raise _unwritable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise FileError(f"{path} cannot be written.", why="it is a folder.", next="name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
        raise FileError(
            f"{path} cannot be written.",
            why=f"it is {kind}, and writing a file would replace it.",
            next="choose another path.",
        )
    if not status.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise FileError(
            f"{path} cannot be written.",
            why="it is read-only.",
            next=f"choose another path, or allow writing: chmod u+w {path}.",
        )
    return target


_KINDS = (
    *((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")),
)


def _temporary(path: Path) -> str:
    """Return the prefix of temporary names beside a file, short enough for files with the longest possible names."""
    return f".{path.name[:40]}."


def _unwritable(path: Path, error: OSError | ValueError) -> FileError:
    return FileError(
        f"{str(path)!r:.80} cannot be written."
        if isinstance(error, ValueError)
        else f"{path} cannot be written.",
        why=f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}",
        next="choose an existing folder you may write to.",
    )


def is_file(path: Path | str) -> bool:
    """True if the file exists; False for an impossible path (too long, or with a NUL byte)."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_file()
    return False


def is_folder(path: Path | str) -> bool:
    """True if the folder exists; False for an impossible path."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


def exists(path: Path | str) -> bool:
    """True if a file, folder or device of that path exists; False for an impossible path."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def absent(path: Path | str, what: str = "file") -> FileError:
    """Return the error for a path that does not exist; it names similar or other entries of the same folder."""
    path = Path(path)
    shown = (
        str(path) if len(str(path)) <= _SHOWN and str(path).isprintable() else f"{str(path)[:_SHOWN]!r}..."
    )
    refusal = f"there is no {what} {shown}."
    folder = path.parent
    if not is_folder(folder):
        return FileError(refusal, next="check the path: there is no folder of that name either.")
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, _LOOKED_AT) if entry.name[0] != "."]
    alike = [name for name in names if Path(name).suffix.lower() == path.suffix.lower()] or names
    close = closest(path.stem[:_SHOWN], {Path(name).stem for name in names})  # an equal ending is no likeness
    if meant := [name for name in names if Path(name).stem in close]:
        hint = f"did you mean {', '.join(str(folder / name) for name in sorted(meant)[:3])}?"
    elif alike:
        more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        hint = (
            f"check the path; there are {', '.join(str(folder / name) for name in sorted(alike)[:3])}{more}."
        )
    else:
        hint = f"check the path; {folder.absolute()} is empty."
    return FileError(refusal, next=hint)


_SHOWN, _LOOKED_AT = 200, 1000  # characters of a path in a message; entries of a folder that are compared


def check_folder(path: Path, option: str = "--output") -> None:
    """Refuse, before any work is done, an output file that cannot be written or whose folder does not exist.

    Raises:
        FileError: the path is a folder, its folder does not exist, or it cannot be written, see `check_writable`.
    """
    if is_folder(path):
        raise FileError(f"{path} is a folder.", next=f"name a file in it: another {option}.")
    if not is_folder(path.parent):
        raise FileError(f"there is no folder {path.parent}.", next=f"create it or choose another {option}.")
    check_writable(path)


def make_folder(path: Path | str) -> Path:
    """Return a folder to write into; create it if it is missing.

    Raises:
        FileError: the folder cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a NUL byte
        raise FileError(
            f"{folder} cannot be created.", why=str(error), next="choose another --output."
        ) from error
    return folder


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file, all or none; create the file if it does not exist.

    Raises:
        FileError: the file cannot be read as text, or cannot be written, see `check_writable`.
    """
    check_writable(path)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read.", why=str(error), next="choose another file to append to."
        ) from error
    with write_whole(path) as temporary:
        separator = "" if before.endswith("\n") or not before else "\n"
        text = before + separator + "".join(f"{line}\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, which is not written anew; a process that is killed may leave a part without line break.

    Raises:
        FileError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise _unwritable(path, error) from error


@functools.cache
def machine() -> str:
    """Return a short hash of this processor's model and instruction sets."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = ("model name", "flags", "Features")
        described += "".join(next((line for line in lines if line.startswith(name)), "") for name in fields)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def cache_folder() -> Path | None:
    """Return this machine's folder for cached files: in the user's cache folder, else a temporary folder of this user;
    None if neither can be written.

    A folder that another user owns or can write to is not used, because code from the cache is run.
    """
    return next(cache_folders(machine()), None)


def cache_folders(name: str) -> Iterator[Path]:
    """Yield the usable cache folders of a name: the one in the user's cache folder, then the temporary one.

    Each belongs to this user, is writable, and cannot be written by anybody else.
    """
    for base in (_user_cache, _user_temporary):
        with contextlib.suppress(OSError, RuntimeError):  # no home folder, no temporary folder, no permission
            folder = base(name)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(folder.lstat()) and os.access(folder, os.W_OK):
                yield folder


def is_private(status: os.stat_result) -> bool:
    """True if a file or folder is no link, belongs to this user and cannot be written by anybody else."""
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return mine and not stat.S_ISLNK(status.st_mode) and not (status.st_mode & 0o022 and os.name == "posix")


def _user_cache(name: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path.home() / ".cache") / "cadsurgery" / name


def _user_temporary(name: str) -> Path:
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    return Path(tempfile.gettempdir()) / f"cadsurgery-{user}-{name}"


@contextlib.contextmanager
def keep_whole(path: Path) -> Iterator[Path]:
    """Yield a private temporary folder beside a cached file; the block writes the new version there as `successor`.

    When the block succeeds, `successor` is synced to disk and then replaces the file, so that a crash leaves no partial
    file. Folders left by killed processes are removed first: a process holds a lock on its folder, and the lock ends
    with the process.
    """
    for other in path.parent.glob(f"{_MAKING}*"):
        _remove_if_left(other)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_MAKING) as name:
        folder = Path(name)
        with (folder / "lock").open("w") as lock:
            _lock(lock)
            yield folder
            with (folder / "successor").open("rb+") as file:
                os.fsync(file.fileno())
            (folder / "successor").chmod(0o600)
            (folder / "successor").replace(path)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - folder.lstat().st_mtime > _SECONDS_TO_LOCK:
            with (folder / "lock").open("a") as lock:
                if _lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def only_one(path: Path, seconds: float) -> Iterator[None]:
    """Let one process at a time into the blocks of a lock file; the others wait.

    The lock ends with the block or the process. On a file system without locks every process enters.

    Raises:
        TimeoutError: another process held the lock for all of `seconds`.
        OSError: the lock file cannot be written.
    """
    end = time.monotonic() + seconds
    with path.open("a") as file:
        while _lock(file) is False:
            if time.monotonic() > end:
                raise TimeoutError(f"another process kept {path} locked for {seconds:g} seconds")
            time.sleep(0.1)
        yield


def _lock(file: IO[str]) -> bool | None:
    """Lock a file until it is closed; False if another process holds the lock, None if there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
    return True
