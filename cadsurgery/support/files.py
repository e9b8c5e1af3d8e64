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
from collections.abc import Iterable, Iterator
from pathlib import Path

import platformdirs

from cadsurgery.support.errors import CadError, FileError, closest


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a path with the name of `path` in a temporary folder beside it; if the block succeeds, all files of that
    folder are moved beside `path`, the file named as `path`, which replaces it, last.

    Raises:
        FileError: the files cannot be written, see `check_writable`.
    """
    target = check_writable(path)
    try:
        # Short enough for files with the longest possible names.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:40]}.") as folder:
            yield Path(folder) / path.name
            made = sorted(Path(folder).iterdir(), key=lambda entry: entry.name == path.name)
            targets = [check_writable(path.parent / entry.name) for entry in made]
            umask = os.umask(0)
            os.umask(umask)
            for entry, target in zip(made, targets, strict=True):
                entry.chmod(0o666 & ~umask)  # as an ordinary new file; safetensors writes private ones
                try:
                    entry.replace(target)
                except OSError:  # a link may point to another file system
                    shutil.move(entry, target)
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
        why, advice = "it is a folder.", "name a file in it."
    elif not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
        why, advice = f"it is {kind}, and writing a file would replace it.", "choose another path."
    elif not status.st_mode & 0o222 or not os.access(target, os.W_OK):
        why, advice = "it is read-only.", f"choose another path, or allow writing: chmod u+w {path}."
    else:
        return target
    raise FileError(f"{path} cannot be written.", why=why, next=advice)


_KINDS = (
    *((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket")),
    *((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device")),
)


def _unwritable(path: Path, error: OSError | ValueError) -> FileError:
    shown = f"{str(path)!r:.80}" if isinstance(error, ValueError) else str(path)
    return FileError(
        f"{shown} cannot be written.",
        why=f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}",
        next="choose an existing folder you may write to.",
    )


# These are False for an impossible path, too long or with a NUL byte.
is_file, is_folder, exists = os.path.isfile, os.path.isdir, os.path.exists


def absent(path: Path | str, what: str = "file") -> FileError:
    """Return the error for a path that does not exist; it names similar or other entries of the same folder, or the
    target of a link that leads nowhere."""
    if os.path.islink(path):
        return FileError(
            f"{path} is a link to {os.readlink(path)}, which does not exist.",
            next="let the link lead to what is there, or give that itself.",
        )
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
    meant = [name for name in names if Path(name).stem in close]
    listed = ", ".join(str(folder / name) for name in sorted(meant or alike)[:3])
    if meant:
        hint = f"did you mean {listed}?"
    elif alike:
        more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        hint = f"check the path; there are {listed}{more}."
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
    with as_file_error(f"{folder} cannot be created.", "choose another --output."):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def as_file_error(what: str, next: str, where: str = "") -> Iterator[None]:
    """Turn every error in the block into a `FileError`, for code that opens a file or builds something from its
    content."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, CadError):
            why = f"{error.what} {error.why}"
        elif isinstance(error, (OSError, ValueError, RuntimeError)):
            why = str(error)
        raise FileError(what, where=where, why=" ".join(why.split())[:400], next=next) from error


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file, all or none; create the file if it does not exist.

    Raises:
        FileError: the file cannot be read as text, or cannot be written, see `check_writable`.
    """
    check_writable(path)
    with as_file_error(f"{path} cannot be read.", "choose another file to append to."):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
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
    """Return this machine's folder in the user's cache folder; None if it cannot be written.

    A folder that another user owns or can write to is not used, because code from the cache is run.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, no permission
        folder = platformdirs.user_cache_path("cadsurgery") / machine()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_private(folder.lstat()) and os.access(folder, os.W_OK):
            return folder
    return None


def is_private(status: os.stat_result) -> bool:
    """True if a file or folder is no link, belongs to this user and cannot be written by anybody else."""
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return mine and not stat.S_ISLNK(status.st_mode) and not (status.st_mode & 0o022 and os.name == "posix")
