"""Files that appear whole or not at all."""

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

_MAKING = ".making-"  # begins the names of folders in the cache in which something is being made
_SECONDS_TO_LOCK = 1.0  # between making such a folder and locking it


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and is removed when not.

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
            temporary.chmod(0o666 & ~umask)  # as an ordinary new file; temporary ones are private
            temporary.replace(check_writable(path))
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextlib.contextmanager
def write_together(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside `path`; what the block leaves in that folder takes its place
    beside `path` when it succeeds, the file of that name last.

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
    """The file that writing to a path replaces or makes: the path itself, or where the link leads that it is.

    Raises:
        FileError: there is a folder, device, FIFO or socket; a file that is read-only; or no file can have this name.
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
            why=f"it is {kind}, and a file that is written takes the place of what was there.",
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
    """How a temporary name beside a file begins; short enough where the file's own name is as long as names may be."""
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
    """True if there is such a file; a path that no file can have, too long or with a NUL byte, is none."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_file()
    return False


def is_folder(path: Path | str) -> bool:
    """True if there is such a folder; a path that none can have is none."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).is_dir()
    return False


def exists(path: Path | str) -> bool:
    """True if there is anything of that name; a path that nothing can have is nothing."""
    with contextlib.suppress(OSError, ValueError):
        return Path(path).exists()
    return False


def absent(path: Path | str, what: str = "file") -> FileError:
    """The refusal of a path where nothing is; it names the closest names of its folder, or what is there."""
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
    close = closest(path.stem[:_SHOWN], {Path(name).stem for name in names})  # endings alone are not alike
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


_SHOWN, _LOOKED_AT = 200, 1000  # characters of a path in a message; names that are compared


def check_folder(path: Path, option: str = "--output") -> None:
    """Refuse a file in a folder that does not exist, or a path that cannot be written, before work is done for it.

    Raises:
        FileError: there is no such folder, the path is one, or see `check_writable`.
    """
    if is_folder(path):
        raise FileError(f"{path} is a folder.", next=f"name a file in it: another {option}.")
    if not is_folder(path.parent):
        raise FileError(f"there is no folder {path.parent}.", next=f"create it or choose another {option}.")
    check_writable(path)


def make_folder(path: Path | str) -> Path:
    """A folder to write into, made if it is missing.

    Raises:
        FileError: it cannot be made.
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
    """Append lines to a file, all or none; it is made if it does not exist.

    Raises:
        FileError: it cannot be read as text, or cannot be written, see `check_writable`.
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


@functools.cache
def machine() -> str:
    """A name for this processor and the instructions it has."""
    described = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        wanted = ("model name", "flags", "Features")
        described += "".join(next((line for line in lines if line.startswith(name)), "") for name in wanted)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def cache_folder() -> Path | None:
    """Where this machine keeps what is made once: in the user's cache folder; if there is none or it cannot be written,
    in one temporary folder of this user; None if that cannot be used either.

    A folder of somebody else, or that others can write to, is not used: what is in it may be run.
    """
    return next(cache_folders(machine()), None)


def cache_folders(name: str) -> Iterator[Path]:
    """All folders of a name that can keep files: the one in the user's cache folder, then the temporary one.

    They are this user's, can be written, and nobody else can write to them.
    """
    for base in (_user_cache, _user_temporary):
        with contextlib.suppress(OSError, RuntimeError):  # no home, nothing temporary, no permission
            folder = base(name)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(folder.lstat()) and os.access(folder, os.W_OK):
                yield folder


def is_private(status: os.stat_result) -> bool:
    """True if a file or folder, and no link, is this user's and nobody else can write to it."""
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
    """A private temporary folder beside a file of the cache, to make its successor in: `successor` of that folder.

    It takes the file's place when the block succeeds, and is on the disk before, so that a machine that stops leaves no
    half. Folders of processes that were killed are removed first: whoever works in one holds a lock, which ends with
    the process.
    """
    for other in path.parent.glob(f"{_MAKING}*"):
        _remove_if_left(other)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_MAKING) as name:
        folder = Path(name)
        with (folder / "lock").open("w") as lock:
            _try_lock(lock)
            yield folder
            with (folder / "successor").open("rb+") as file:
                os.fsync(file.fileno())
            (folder / "successor").chmod(0o600)
            (folder / "successor").replace(path)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - folder.lstat().st_mtime > _SECONDS_TO_LOCK:
            with (folder / "lock").open("a") as lock:
                if _try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def only_one(path: Path, seconds: float) -> Iterator[None]:
    """Keep other processes out of such a block for the same lock file; they wait for their turn.

    The lock ends with the block and with the process. In a file system that knows no locks nobody is kept out.

    Raises:
        TimeoutError: another process was in its block for all of `seconds`.
        OSError: the lock file cannot be written.
    """
    end = time.monotonic() + seconds
    with path.open("a") as file:
        while _is_locked_by_another(file):
            if time.monotonic() > end:
                raise TimeoutError(f"another process kept {path} locked for {seconds:g} seconds")
            time.sleep(0.1)
        yield


def _is_locked_by_another(file: IO[str]) -> bool:
    """False if this process has locked the file, or if no file can be locked there."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):
        return False
    return False


def _try_lock(file: IO[str]) -> bool:
    """Lock a file until it is closed; False if another process did, or where there are no locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
