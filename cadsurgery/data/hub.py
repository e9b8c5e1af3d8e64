"""Files on the Hugging Face Hub, by an address: `hf:owner/name`, or `hf:owner/name@revision`.

The client, huggingface_hub, decides on the server (HF_ENDPOINT), the cache (HF_HOME), the token (HF_TOKEN, or what
`hf auth login` left) and whether there is a network (HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import cadsurgery
from cadsurgery.support.errors import (
    CadError,
    FileError,
    InvalidInput,
    describe_error,
    first_line,
    import_optional,
)

PREFIX = "hf:"
FILE = "model.safetensors"  # the name that the Hub knows: it shows what is in it and counts its downloads
_SIGN_IN = "set HF_TOKEN, or run hf auth login"


class Address(NamedTuple):
    """A repository on the Hub, and a branch, tag or commit of it; None for its main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}{f'@{self.revision}' if self.revision else ''}"


def is_address(name: object) -> bool:
    """True if a file is named by its address on the Hub."""
    return isinstance(name, (str, os.PathLike)) and str(name).startswith(PREFIX)


def read_address(text: str) -> Address:
    """Parse `hf:owner/name@revision`; `hf:` may be left out.

    Raises:
        InvalidInput: it is none.
        CadError: the client is not installed.
    """
    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    client()
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        reason = "" if "/" in repository else "it names no owner"
    except HFValidationError as error:
        reason = first_line(error)
    if reason or (at and not revision):
        raise InvalidInput(
            f"{text!r} is no address on the Hub.",
            why=reason or "it names no revision behind the @.",
            next=f"write {PREFIX}owner/name or {PREFIX}owner/name@revision.",
        )
    return Address(repository, revision or None)


def client() -> Any:
    """huggingface_hub's client, which names this package to the server.

    Raises:
        CadError: it is not installed.
    """
    hub = import_optional(
        "huggingface_hub", "the Hub is reached through huggingface_hub.", "pip install 'cadsurgery[hub]'"
    )
    return hub.HfApi(library_name="cadsurgery", library_version=cadsurgery.__version__)


def fetch(text: str) -> Path:
    """The converted network of an address, in the client's cache; what is there and new enough is not fetched again.

    Only this file is fetched, nothing of it is run. Without a network it is the one that was fetched last.

    Raises:
        InvalidInput: no address.
        FileError: no such repository, revision or file in it, it may not be read, or cannot be reached and is not in
            the cache.
        CadError: the client is not installed.
    """
    address = read_address(text)
    with offline_without_network(), refusing(address, "be fetched"):
        return Path(client().hf_hub_download(address.repository, FILE, revision=address.revision))


@contextmanager
def refusing(address: Address, what: str) -> Iterator[None]:
    """Errors of the client, of whatever kind, as ours.

    Args:
        address: what is asked for.
        what: `be fetched`, `be written`.

    Raises:
        FileError: in place of any other error.
    """
    try:
        yield
    except CadError:
        raise
    except Exception as error:  # of its HTTP library, too, which is another one in each of its versions
        why, next = _reason(error, address)
        raise FileError(f"{address} cannot {what}.", why=why, next=next) from error


def _reason(error: Exception, address: Address) -> tuple[str, str]:
    """Why the client failed, and the next step."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{address.repository}"
    absent = f"{constants.ENDPOINT} is not reached from here, and what is asked for is not in the cache"
    known: dict[Any, tuple[str, str]] = {  # those that are kinds of others first
        errors.GatedRepoError: (
            "its owner decides who may read it.",
            f"ask for it on {page}, then {_SIGN_IN}.",
        ),
        errors.RepositoryNotFoundError: (
            "there is no such repository, or it is private and you are not signed in as one who may read it.",
            f"check the name; of a private one {_SIGN_IN}.",
        ),
        errors.RevisionNotFoundError: (
            f"it has no branch, tag or commit {address.revision!r}.",
            f"see {page}/commits, or leave @{address.revision} out.",
        ),
        (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled): (
            f"{absent}: {first_line(error.__cause__ or error)}",
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or copy the file and give its path.",
        ),
        errors.EntryNotFoundError: (
            f"it holds no {FILE}.",
            "name a repository that was written by cs.push_to_hub or cadsurgery push.",
        ),
    }
    for kinds, reason in known.items():
        if isinstance(error, kinds):
            return reason
    answer = getattr(getattr(error, "response", None), "status_code", None)
    why = f"the Hub answers {answer}: {_said(error)}" if answer else describe_error(error)
    if answer in (401, 403):
        return why, f"{_SIGN_IN}, with a token that may do this."
    return why, f"check the connection and HF_ENDPOINT ({constants.ENDPOINT}), or try again later."


def _said(error: Exception) -> str:
    """Return the server's message in one line."""
    return first_line(getattr(error, "server_message", "") or " ".join(str(error).split()))


@contextmanager
def offline_without_network() -> Iterator[None]:
    """Spare the user a minute of the client's retries where the server's name is not even known."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():  # a proxy looks up names itself
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
