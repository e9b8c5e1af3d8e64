"""The Hugging Face Hub: what is written there comes back the same; what cannot be had or may not be done says why."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from conftest import images, rewritten
from huggingface_hub import CommitOperationAdd, ModelCard, constants, errors
from networks import PooledSegmenter, adapted
from safetensors.torch import save_file

import cadsurgery as cs
from cadsurgery.data.hub import FILE
from cadsurgery.tasks.open import at_strides, open_converted, weights_in_words

# What a card without a licence says is the matter of one test.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no licence")

TOKEN, OWNER = "hf_of_this_test", "someone"
NAME = f"{OWNER}/small-net"
HOME = f"hf:{NAME}"


@dataclass
class Repository:
    """Commits, each with all its files; branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def write(self, branch: str, files: dict[str, bytes]) -> str:
        new = {**self.commits[self.branches[branch]], **files}
        self.branches[branch] = hashlib.sha1(
            repr((len(self.commits), sorted(new.items()))).encode()
        ).hexdigest()
        self.commits[self.branches[branch]] = new
        return self.branches[branch]


@dataclass
class Hub:
    """What `HfApi` does in these tests: repositories in memory; it raises what the client raises."""

    folder: Path
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: Exception | None = None

    def __call__(self, *, library_name: str, library_version: str) -> Hub:
        assert library_name == "cadsurgery"
        return self

    def create_repo(self, name: str, *, exist_ok: bool) -> None:
        self._ask("create")
        if os.environ["HF_TOKEN"] != TOKEN:
            raise refusal(errors.HfHubHTTPError, "Invalid username or password.", 401)
        if not name.startswith(f"{OWNER}/"):
            raise refusal(errors.HfHubHTTPError, "You don't have the rights to create a model there", 403)
        self.repositories.setdefault(name, Repository())

    def create_branch(self, name: str, *, branch: str, exist_ok: bool) -> None:
        branches = self.repositories[name].branches
        branches.setdefault(branch, branches["main"])

    def create_commit(
        self, name: str, files: list[CommitOperationAdd], *, commit_message: str, revision: str | None
    ) -> Any:
        self._ask("commit")
        content = {}
        for one in files:
            with one.as_file() as file:
                content[one.path_in_repo] = file.read()
        return SimpleNamespace(oid=self.repositories[name].write(revision or "main", content))

    def hf_hub_download(self, name: str, file: str, *, revision: str | None) -> str:
        self._ask(f"get {file}")
        found = self.repositories.get(name)
        if found is None or (found.private and os.environ["HF_TOKEN"] != TOKEN):
            raise refusal(errors.RepositoryNotFoundError, "Repository not found", 401)
        if found.gated:
            raise refusal(errors.GatedRepoError, "restricted", 403)
        commit = found.branches.get(revision or "main", revision)
        if commit not in found.commits:
            raise refusal(errors.RevisionNotFoundError, "Invalid rev id", 404)
        if file not in found.commits[commit]:
            raise refusal(errors.RemoteEntryNotFoundError, "Entry not found", 404)
        path = self.folder / commit / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(found.commits[commit][file])
        return str(path)

    def _ask(self, what: str) -> None:
        if self.broken is not None:
            raise self.broken
        self.asked.append(what)


def refusal(kind: Any, message: str, status: int) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(message, response=response, server_message=message)  # type: ignore[no-any-return]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub of this test's own, that the client is signed in at."""
    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@contextmanager
def refused(kind: type[cs.CadError], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as raised:
        yield
    for word in words:
        assert word in str(raised.value)


def by_name(mask: str = "edges") -> cs.AdaptiveModel:
    return cs.adaptify(cs.build_model("squeezenet1_1", "none"), mask, verify_laws=False)


def test_what_is_pushed_comes_back_bit_for_bit(hub: Hub, tmp_path: Path) -> None:
    net, image = adapted(), images(2, 97, 129)
    pushed = cs.push(net, NAME)
    cs.save(net, tmp_path / "net.safetensors")
    assert pushed == f"{HOME}@{hub.repositories[NAME].branches['main']}"
    assert written(hub)[FILE] == (tmp_path / "net.safetensors").read_bytes()
    back = cs.load(HOME, PooledSegmenter())
    assert back.plan == net.plan and back.mask.spec() == net.mask.spec()
    assert torch.equal(back(image)["out"], net(image)["out"])


def test_a_commit_or_branch_is_loaded_by_its_name(hub: Hub) -> None:
    first, second = adapted(), adapted("edges:threshold=0.5,dilation=5")
    pushed = cs.push(first, NAME)
    cs.push(second, NAME)
    cs.push(adapted("all"), f"{NAME}@other")
    specs = {
        where: cs.load(where, PooledSegmenter()).mask.spec() for where in (pushed, HOME, f"{HOME}@other")
    }
    assert list(specs.values()) == [first.mask.spec(), second.mask.spec(), "all"]


def put(hub: Hub, content: bytes | None) -> Repository:
    """A repository that somebody else wrote."""
    repository = hub.repositories[NAME] = Repository()
    if content is not None:
        repository.write("main", {FILE: content})
    return repository


def written(hub: Hub) -> dict[str, bytes]:
    repository = hub.repositories[NAME]
    return repository.commits[repository.branches["main"]]


def test_the_card_says_what_was_converted_and_how_it_is_loaded(hub: Hub) -> None:
    net = by_name("edges | budget:fraction=0.3")
    cs.push(net, NAME, license="mit")
    text = written(hub)["README.md"].decode()
    about = ModelCard(text).data.to_dict()
    assert about["license"] == "mit" and about["library_name"] == "cadsurgery"
    for told in ("torchvision:squeezenet1_1, weights are random", net.mask.spec(), f'cs.load("{HOME}")'):
        assert told in text
    assert net.plan.summary() in text
    with pytest.warns(cs.CadWarning, match="has no licence"):
        cs.push(adapted(), NAME)
    text = written(hub)["README.md"].decode()
    assert f'cs.load("{HOME}", model)' in text and "license" not in ModelCard(text).data.to_dict()


def _by_timm(tmp_path: Path) -> torch.nn.Module:
    model = timm.create_model("test_convnext.r160_in1k")
    model.pretrained_cfg["license"] = "cc-by-nc-4.0"
    return model


def _from_a_file(tmp_path: Path) -> torch.nn.Module:
    state = cs.build_model("timm:test_convnext", "none").state_dict()
    save_file(state, tmp_path / "weights.safetensors", {"license": "cc-by-nc-4.0"})
    return cs.build_model("timm:test_convnext", str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("make", "again"),
    [(_by_timm, True), (_from_a_file, False)],
)
def test_the_licence_of_weights_is_in_the_file_and_on_the_card(
    make: Callable[[Path], torch.nn.Module], again: bool, hub: Hub, tmp_path: Path
) -> None:
    model = make(tmp_path).eval()
    net = cs.adaptify(model, "edges", verify_laws=False)
    assert net.license == "cc-by-nc-4.0"
    if again:
        cs.save(net, tmp_path / "net.safetensors")
        net = cs.load(tmp_path / "net.safetensors", timm_without_licence(make, tmp_path))
    cs.push(net, NAME)
    assert ModelCard(written(hub)["README.md"].decode()).data.to_dict()["license"] == "cc-by-nc-4.0"
    header = written(hub)[FILE]
    assert b"cc-by-nc-4.0" in header[: 8 + int.from_bytes(header[:8], "little")]
    cs.push(net, NAME, license="mit")
    assert ModelCard(written(hub)["README.md"].decode()).data.to_dict()["license"] == "mit"


def timm_without_licence(make: Callable[[Path], torch.nn.Module], tmp_path: Path) -> torch.nn.Module:
    """The same network by a library that states no licence: the file's is what counts."""
    model = make(tmp_path).eval()
    for part in model.modules():
        vars(part).pop("pretrained_cfg", None)
    vars(model).pop("cad_source", None)
    return model


def test_a_licence_without_a_name_on_the_hub_is_another(hub: Hub) -> None:
    address = "https://github.com/facebookresearch/SWAG/blob/main/LICENSE"
    cs.push(adapted(), NAME, license=address)
    about = ModelCard(written(hub)["README.md"].decode()).data.to_dict()
    assert about["license"] == "other" and about["license_link"] == address


@pytest.mark.parametrize("name", ["net", "", "someone/..", "someone/net@"])
def test_what_is_no_address_is_refused_before_anything_is_asked(hub: Hub, name: str) -> None:
    with refused(cs.InvalidInput, "no address on the Hub", "hf:owner/name"):
        cs.load(f"hf:{name}")
    with refused(cs.InvalidInput, "no address on the Hub"):
        cs.push(adapted(), name)
    assert not hub.asked


def foreign(hub: Hub) -> None:
    """A file that names code of its own."""
    path = hub.folder / "net.safetensors"
    cs.save(by_name(), path)
    rewritten(path, lambda told: told.update(source={"name": "os:getcwd", "kwargs": {}}))
    put(hub, path.read_bytes())


OFFLINE, NOBODY = errors.OfflineModeIsEnabled("offline"), ConnectionError("nobody answers")
NOT_FETCHED: dict[str, tuple[Callable[[Hub], object], str, tuple[str, ...]]] = {
    "not there": (lambda hub: None, HOME, ("no such repository, or it is private", "HF_TOKEN")),
    "no branch": (
        lambda hub: put(hub, b""),
        f"{HOME}@v2",
        ("no branch, tag or commit 'v2'", "leave @v2 out"),
    ),
    "no file": (lambda hub: put(hub, None), HOME, (f"it holds no {FILE}", "cs.push")),
    "gated": (
        lambda hub: setattr(put(hub, b""), "gated", True),
        HOME,
        ("its owner decides", "ask for it on https://", NAME),
    ),
    "offline": (
        lambda hub: setattr(hub, "broken", OFFLINE),
        HOME,
        ("is not reached", "not in the cache", "HF_HUB_OFFLINE"),
    ),
    "nobody": (
        lambda hub: setattr(hub, "broken", NOBODY),
        HOME,
        ("nobody answers", "HF_ENDPOINT", constants.ENDPOINT),
    ),
    "foreign": (foreign, HOME, ("code of its own, which was not run", "trust=True")),
}


@pytest.mark.parametrize("case", NOT_FETCHED)
def test_what_cannot_be_fetched_says_why(hub: Hub, case: str) -> None:
    make, address, words = NOT_FETCHED[case]
    make(hub)
    cannot = () if case == "foreign" else (f"{address} cannot be fetched",)
    with refused(cs.FileError, HOME, *cannot, *words):
        cs.load(address)
    if hub.broken is not None:
        with refused(cs.FileError, f"{HOME} cannot be written", words[-1]):
            cs.push(adapted(), NAME)


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        (NAME, "hf_that_is_wrong", ("401", "Invalid username or password", "HF_TOKEN")),
        ("somebody-else/net", TOKEN, ("403", "rights", "HF_TOKEN")),
    ],
)
def test_who_may_not_write_is_told_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, token: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with refused(cs.FileError, name, "cannot be written", *words):
        cs.push(adapted(), name)
    assert not hub.repositories


def test_without_the_client_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: cs.load(HOME), lambda: cs.push(adapted(), NAME)):
        with refused(cs.CadError, "pip install 'cadsurgery[hub]'"):
            call()


def test_tasks_open_an_address_as_they_open_a_file(hub: Hub) -> None:
    cs.push(by_name(), NAME)
    (net,), source = at_strides(HOME, (), {})
    assert net.mask.spec() == by_name().mask.spec() and weights_in_words(HOME, source).startswith(
        f"weights in {HOME}"
    )
    assert open_converted(HOME, "none").mask.spec() == "none"
    with refused(cs.InvalidInput, HOME, "converted already"):
        open_converted(HOME, options={"fill": "nearest"})
