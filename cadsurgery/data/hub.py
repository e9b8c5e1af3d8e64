"""Download files from the Hugging Face Hub by address: `hf:owner/name`, or `hf:owner/name@revision`.

The client, huggingface_hub, reads the server from HF_ENDPOINT, the cache folder from HF_HOME, the token from HF_TOKEN
(or from `hf auth login`) and the offline mode from HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import getproxies

import cadsurgery
from cadsurgery.support.errors import (
    FileError,
    InvalidInput,
    as_refusal,
    describe_error,
    first_line,
    import_optional,
)

PREFIX = "hf:"
FILE = "model.safetensors"  # the Hub shows the tensors of a file of this name and counts its downloads
_SIGN_IN = "set HF_TOKEN, or run hf auth login"


class Address(NamedTuple):
    """A repository on the Hub, and its branch, tag or commit; None for the main branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}{f'@{self.revision}' if self.revision else ''}"


def is_address(name: object) -> bool:
    """True if the name is an address on the Hub."""
    return isinstance(name, (str, os.PathLike)) and str(name).startswith(PREFIX)


def read_address(text: str) -> Address:
    """Parse `hf:owner/name@revision`; `hf:` may be left out.

    Raises:
        InvalidInput: the text is not an address.
        NotInstalled: the client is not installed.
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
    """Return huggingface_hub's client, which reports this package's name to the server.

    Raises:
        NotInstalled: the client is not installed.
    """
    hub = import_optional(
        "huggingface_hub", "the Hub is reached through huggingface_hub.", "pip install 'cadsurgery[hub]'"
    )
    return hub.HfApi(library_name="cadsurgery", library_version=cadsurgery.__version__)


def fetch(text: str) -> Path:
    """Download the converted network of an address, unless the client's cache has its newest version; return the path.

    Only this file is downloaded, and no code in it is run. Without a network the last downloaded version is used.

    Raises:
        InvalidInput: the text is not an address.
        FileError: the repository, revision or file does not exist or may not be read, or the server cannot be reached
            and the file is not in the cache.
        NotInstalled: the client is not installed.
    """
    address = read_address(text)
    with offline_without_network(), refusing(address, "be fetched"):
        return Path(client().hf_hub_download(address.repository, FILE, revision=address.revision))


def refusing(address: Address, what: str) -> AbstractContextManager[None]:
    """Turn every error of the client into a `FileError`.

    Args:
        address: the address that the client works on.
        what: end of the sentence "... cannot": `be fetched`, `be written`.

    Raises:
        FileError: in place of any other error.
    """

    def refuse(error: Exception) -> FileError:
        why, next = _reason(error, address)
        return FileError(f"{address} cannot {what}.", why=why, next=next)

    return as_refusal(refuse)


def _reason(error: Exception, address: Address) -> tuple[str, str]:
    """Return why the client failed, and the next step."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{address.repository}"
    absent = f"{constants.ENDPOINT} is not reached from here, and the file is not in the cache"
    reasons: dict[Any, tuple[str, str]] = {  # subclasses before their base classes
        errors.GatedRepoError: (
            "its owner decides who may read it.",
            f"ask for it on {page}, then {_SIGN_IN}.",
        ),
        errors.RepositoryNotFoundError: (
            "there is no such repository, or it is private and you are not signed in with an account that may read it.",
            f"check the name; for a private repository {_SIGN_IN}.",
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
            "name a repository that was written by cs.push.",
        ),
    }
    for kinds, reason in reasons.items():
        if isinstance(error, kinds):
            return reason
    answer = getattr(getattr(error, "response", None), "status_code", None)
    told = first_line(getattr(error, "server_message", "") or " ".join(str(error).split()))
    why = f"the Hub answers {answer}: {told}" if answer else describe_error(error)
    if answer in (401, 403):
        return why, f"{_SIGN_IN}, with a token that may do this."
    return why, f"check the connection and HF_ENDPOINT ({constants.ENDPOINT}), or try again later."


@contextmanager
def offline_without_network() -> Iterator[None]:
    """Set the client to offline mode if the server's name cannot be resolved, which saves a minute of retries."""
    from huggingface_hub import constants

    is_offline = constants.HF_HUB_OFFLINE
    try:
        if not getproxies():  # a proxy resolves names itself
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        is_offline = True
    with mock.patch.object(constants, "HF_HUB_OFFLINE", is_offline):
        yield
