"""Checkpoints as training scripts leave them: what fits is found, and nothing that a file names is executed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import Segmenter, seeded
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.networks import Source
from cadsurgery.data.weight_files import load_weights
from cadsurgery.support.provenance import find_function

USERS = "from networks import Segmenter, seeded\n\ndef net(): return seeded(Segmenter)\n"


def state(seed: int = 1) -> dict[str, Tensor]:
    return seeded(Segmenter, torch.float32, seed).state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state().items()}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a network with the weights of an object that torch.save writes; returns its state dict and its note."""
    (tmp_path / "usersnet.py").write_text(
        USERS.replace("Segmenter)", "Segmenter, __import__('torch').float32)")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def built(content: Any, name: str = "net.pth", entry: str = "", **options: Any) -> tuple[Any, str]:
        torch.save(content, name, **options)
        net = cs.build_model("usersnet:net", name + entry)
        assert isinstance(net.cad_source, Source)
        return net.state_dict(), net.cad_source.note

    return built


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    different = [name for name, value in theirs.items() if not torch.equal(ours[name], value)]
    assert (ours.keys(), different) == (theirs.keys(), [])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.model."])
def test_a_prefix_that_all_names_share_is_taken_off_with_a_line(build: Any, prefix: str) -> None:
    with pytest.warns(cs.CadWarning, match=f"without the prefix '{prefix}' of all names"):
        loaded, note = build(prefixed(prefix))
    assert_same(loaded, state())
    assert prefix in note


@pytest.mark.parametrize("entry", ["ema", "run.weights"])
def test_a_dictionary_that_fits_is_found(build: Any, entry: str) -> None:
    content: Any = state()
    for name in reversed(entry.split(".")):
        content = {"optimizer": {"state": {0: {"step": torch.zeros(1)}}}, name: content, "epoch": 3}
    loaded, note = build(content)
    assert_same(loaded, state())
    assert f"entry {entry}" in note


def test_of_several_that_fit_one_is_taken_and_the_reply_says_how_to_take_the_other(build: Any) -> None:
    content = {"model": state(1), "model_ema": state(2)}
    with pytest.warns(cs.CadWarning, match=r"entry model; model_ema .* net\.pth:model_ema"):
        assert_same(build(content)[0], state(1))
    assert_same(build(content, entry=":model_ema")[0], state(2))
    with pytest.raises(cs.UnknownName, match="model_ema"):
        build(content, entry=":ema")


class Hyperparameters(dict[str, Any]):
    """As Lightning's: a dictionary of a class of its own."""


class Trap:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_hyperparameters_loads_and_runs_nothing_of_them(build: Any, zipped: bool) -> None:
    hyperparameters = Hyperparameters(
        folder=Path("data"), options=argparse.Namespace(lr=0.1), score=np.float64(0.7), draws=np.ones(3),
        groups=defaultdict(dict), **({"loss": nn.CrossEntropyLoss()} if zipped else {}),
    )  # fmt: skip
    content = {"hyper_parameters": hyperparameters, "state_dict": prefixed("model.")}
    with pytest.warns(cs.CadWarning, match=r"entry state_dict, without the prefix 'model\.'"):
        loaded, _ = build(content, "last.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(loaded, state())


@pytest.mark.parametrize("zipped", [True, False])
def test_no_function_that_a_file_names_is_called(build: Any, tmp_path: Path, zipped: bool) -> None:
    with suppress(cs.FileError):
        build({"state_dict": state(), "trap": Trap()}, _use_new_zipfile_serialization=zipped)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize(
    ("entry", "index", "zipped"), [("", "", True), ("ema", "['ema']", True), ("", "", False)]
)
def test_a_pickled_network_is_refused_with_the_two_lines_that_help(
    build: Any, entry: str, index: str, zipped: bool
) -> None:
    net = seeded(Segmenter, torch.float32)
    with pytest.raises(cs.FileError, match=r"a pickled network of class networks\.Segmenter") as refusal:
        build({entry: net} if entry else net, _use_new_zipfile_serialization=zipped)
    lines = [line.strip() for line in refusal.value.next.splitlines()[1:]]
    assert lines == [
        f"model = torch.load('net.pth', weights_only=False){index}",
        "torch.save(model.state_dict(), 'net-weights.pth')",
    ]
    exec("\n".join(lines), {"torch": torch})
    loaded = cs.build_model("usersnet:net", "net-weights.pth")
    assert_same(loaded.state_dict(), net.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_archive_of_torchscript_is_refused_as_such(build: Any) -> None:
    torch.jit.script(nn.Conv2d(3, 4, 3)).save("script.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(cs.FileError, match="compiled by TorchScript") as refusal:
        cs.build_model("usersnet:net", "script.pt")
    assert "torch.jit.load('script.pt')" in refusal.value.next


# -- more than the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("module.net.", {"metric.confusion": torch.zeros(3, 3), "log_scale": torch.zeros(())}),
        ("net._orig_mod.", {"epoch": 3, "best": None}),
    ],
)
def test_what_a_script_keeps_beside_its_network_is_left_out_in_a_line(
    build: Any, prefix: str, beside: dict[str, Any]
) -> None:
    first = prefix.partition("net.")[0]
    content = {"state_dict": {**{first + name: value for name, value in beside.items()}, **prefixed(prefix)}}
    with pytest.warns(cs.CadWarning, match="left out: ") as caught:
        loaded, note = build(content, "last.ckpt")
    assert_same(loaded, state())
    assert repr(prefix) in note and len(note.splitlines()) == 1
    assert any(str(warning.message).startswith(note) for warning in caught)
    for name in {name.partition(".")[0] for name in beside}:
        assert f"{first}{name}".partition(".")[0] in note


def test_of_two_networks_in_one_state_dict_the_first_is_taken_and_the_other_can_be(build: Any) -> None:
    content = {"state_dict": {**prefixed("student."), **{f"teacher.{n}": v for n, v in state(2).items()}}}
    with pytest.warns(
        cs.CadWarning, match=r"state_dict\.teacher would fit .* last\.ckpt:state_dict\.teacher"
    ):
        assert_same(build(content, "last.ckpt")[0], state(1))
    with pytest.warns(cs.CadWarning, match=r"left out: student\.\* \(\d+ names\)"):
        assert_same(build(content, "last.ckpt", ":state_dict.teacher")[0], state(2))


def test_values_between_the_names_of_the_network_are_left_out(build: Any) -> None:
    extra = {"epoch": 3, "backbone.0._extra_state": {"scale": 1.0}, "criterion.weight": torch.ones(4)}
    with pytest.warns(cs.CadWarning, match="left out: epoch, backbone.0._extra_state, criterion.weight"):
        assert_same(build({**state(), **extra})[0], state())


@pytest.mark.parametrize("more", ["backbone.9.weight", "9.weight"])
def test_weights_of_a_deeper_network_are_refused(build: Any, more: str, tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))\n"
    )
    given = state() if more[0] == "b" else nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).state_dict()
    torch.save({**given, more: torch.zeros(2, 4, 3, 3)}, "deep.pth")
    with pytest.raises(cs.FileError, match=f"do not fit(.|\n)*{more}"):
        cs.build_model("usersnet:net" if more[0] == "b" else "chain:net", "deep.pth")


class Shared(nn.Module):
    """Layers under two names, as encoders are held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1))
        self.first, self.last = self.encoder[0], self.encoder[2]
        self.head = nn.Conv2d(8, 2, 1)


def test_weights_that_are_stored_under_one_of_their_names_are_whole(tmp_path: Path) -> None:
    torch.manual_seed(1)
    given, path = Shared(), tmp_path / "net.safetensors"
    save_model(given, str(path))
    assert len(load_file(path)) < len(given.state_dict())
    torch.manual_seed(2)
    taken = Shared()
    load_weights(taken, path)
    assert_same(taken.state_dict(), given.state_dict())
    assert taken.first is taken.encoder[0]
    stored = {name: value for name, value in load_file(path).items() if not name.startswith("head")}
    torch.save(stored, tmp_path / "part.pth")
    with pytest.raises(cs.FileError, match="head"):
        load_weights(Shared(), tmp_path / "part.pth")


# -- several files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["a part is gone", "a part lacks a name", "elsewhere", "no map"])
def test_weights_in_several_files_are_read_by_their_index_if_they_are_whole(
    build: Any, tmp_path: Path, harm: str
) -> None:
    values = state()
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(values)}
    for place in {*places.values()}:
        save_file({name: value for name, value in values.items() if places[name] == place}, tmp_path / place)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    assert_same(cs.build_model("usersnet:net", path.name).state_dict(), state())
    index = json.loads(path.read_text())
    name, place = next(iter(index["weight_map"].items()))
    if harm == "a part is gone":
        (tmp_path / place).unlink()
    elif harm == "a part lacks a name":
        save_file({"other": torch.zeros(1)}, tmp_path / place)
    else:
        index["weight_map"][name] = f"../{tmp_path.name}/{place}"
        path.write_text({"elsewhere": json.dumps(index), "no map": "[]"}[harm])
    with pytest.raises(cs.FileError) as refusal:
        load_weights(seeded(Segmenter, torch.float32), path)
    assert refusal.value.next and (place if harm.startswith("a part") else path.name) in str(refusal.value)


class OfClient(Exception):
    """An error of a client of HTTP, whose classes are its own."""


@pytest.mark.parametrize(
    ("error", "weights"),
    [(OfClient("403 Forbidden"), "auto"), (OSError("no route"), "auto"), (EOFError("cut short"), "a1_in1k")],
)
def test_weights_that_cannot_be_fetched_are_random_or_refused_in_words(
    error: Exception, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a connection `auto` is random, with a note; a proxy that refuses, or a connection that closes, is an
    error that users can mend."""
    create = timm.create_model

    def refuse(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if pretrained:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", refuse)
    if weights == "auto" and not isinstance(error, OfClient):
        note = cs.build_model("timm:resnet18", weights).cad_source.note
        assert "RANDOM" in note and str(error) in note
    else:
        with pytest.raises(cs.FileError, match=str(error)):
            cs.build_model("timm:resnet18", weights)


# -- networks that a Python file holds, by the path of the file ----------------------------------------


NET_OF_A_FILE = """
from torch import nn
from {beside} import WIDTH

def net():
    print("built")
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.ReLU(), nn.Conv2d(WIDTH, 8, 3, 2, 1))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A file with a network, and one beside it that it imports, in a folder that is not the current one."""
    known, path = {*sys.modules}, list(sys.path)
    inside = tmp_path / "my networks"
    inside.mkdir()
    (inside / "width_beside.py").write_text("WIDTH = 6\n")
    for name in ("network", "json"):  # a module of Python has the second name
        (inside / f"{name}.py").write_text(NET_OF_A_FILE.format(beside="width_beside"))
    yield inside
    assert sys.path == path
    for name in {*sys.modules} - known:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["network", "json"])
def test_a_network_is_built_by_the_path_of_its_file(folder: Path, name: str) -> None:
    import json

    model = cs.build_model(f"{folder / name}.py:net")
    assert model[0].out_channels == 6 and json is sys.modules["json"]
    source = model.cad_source
    assert isinstance(source, Source) and source.name == f"{name}.py:net"  # without the folder
    assert find_function(str(folder / f"{name}.py"), "net") is find_function(
        str(folder / f"{name}.py"), "net"
    )


def test_what_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(cs.UnknownName, match="there is no file"):
        cs.build_model(f"{folder / 'none'}.py:net")
    with pytest.raises(cs.UnknownName, match="did you mean net"):
        cs.build_model(f"{folder / 'network'}.py:nett")
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(cs.UnknownName, match="nothing_of_this_name"):
        cs.build_model(f"{folder / 'broken'}.py:net")
    assert "broken" not in sys.modules


def test_a_converted_file_that_names_one_runs_nothing_without_the_users_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = cs.adaptify(
        cs.build_model(f"{folder / 'network'}.py:net"), "edges", example_input=torch.rand(1, 3, 64, 64)
    )
    cs.save(net, folder / "net.safetensors")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    with pytest.raises(cs.FileError, match=r"network\.py:net"):
        cs.load(folder / "net.safetensors")
    assert "built" not in capsys.readouterr().out
    loaded = cs.load(folder / "net.safetensors", trust=True)
    image = torch.rand(2, 3, 65, 70)
    assert torch.equal(loaded(image), net(image))
