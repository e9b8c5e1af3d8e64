"""Networks that a Python file holds, by the path of the file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cadsurgery as cs
from cadsurgery.data.networks import Source
from cadsurgery.support.provenance import find_function

NETWORK = """
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
        (inside / f"{name}.py").write_text(NETWORK.format(beside="width_beside"))
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
