"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cadsurgery.errors import FileError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and is removed when not.

    Raises:
        FileError: the path cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # as an ordinary new file; temporary ones are private
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"{path} cannot be written.",
            why=f"{type(error).__name__}: {error.strerror or error}",
            next="choose an existing folder you may write to.",
        ) from error


def check_folder(path: Path, option: str = "--output") -> None:
    """Refuse a file in a folder that does not exist, or a folder in place of a file, before work is done for it.

    Raises:
        FileError: there is no such folder, or the path is one.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder.", next=f"name a file in it: another {option}.")
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {path.parent}.", next=f"create it or choose another {option}.")


def made_folder(path: Path | str, option: str = "--output") -> Path:
    """A folder to write into, made if it is missing.

    Raises:
        FileError: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{folder} cannot be created.", why=str(error), next=f"choose another {option}."
        ) from error
    return folder


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file, all or none; it is made if it does not exist.

    Raises:
        FileError: it cannot be read as text, or cannot be written.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read.", why=str(error), next="choose another file to append to."
        ) from error
    with written_whole(path) as temporary:
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


def cache_folder() -> Path:
    """Where this machine keeps what is made once: in the user's cache folder, or a temporary one if there is none."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "cadsurgery" / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="cadsurgery-"))
    return folder
