"""What a console cannot show is replaced, never raised; what users read is there without docstrings, too."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import covering
from networks import unverified
from PIL import Image

import cadsurgery as cs
from cadsurgery.cli import screen
from cadsurgery.cli.main import main
from cadsurgery.finetune.objectives import OBJECTIVES, list_objectives
from cadsurgery.masks.provider import PROVIDERS, list_masks
from cadsurgery.surgery.treatment import _RULES, first_line

NETWORK = """
from torch import nn


def network():
    layers = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1), nn.Upsample(scale_factor=4)
    return nn.Sequential(*layers).eval()
"""


def _console(encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="\n")


def _printed(stream: Any) -> str:
    stream.flush()
    return bytes(stream.buffer.getvalue()).decode(stream.encoding)


COMMANDS = {
    "a plan": "plan network_of_consoles.py:network",
    "predictions": "run net.safetensors pictures -o out --trust",
    "a file that is not there": "plan \u4e00\u00b1.safetensors",
    "help": "recommend --help",
}


@pytest.mark.parametrize(
    ("words", "encoding", "errors"),
    covering([*COMMANDS.values()], ["ascii", "cp1252", "utf-8"], ["strict", "surrogateescape"]),
)
def test_a_console_replaces_what_it_cannot_show(
    words: str, encoding: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("network_of_consoles.py").write_text(NETWORK)
    model = cs.build_model("network_of_consoles.py:network")
    cs.save(unverified(model, "edges", coarsest=8), "net.safetensors")
    Path("pictures").mkdir()
    for name in ("\u00e9\u4e00", "plain"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"pictures/{name}.png")
    out, err = _console(encoding, errors), _console(encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["cadsurgery", *words.split()])
    screen._show_what_it_can()
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == ("\u4e00" in words)
    assert _printed(out) or _printed(err)
    if encoding == "utf-8":
        assert "?.png" not in _printed(out)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16"])
def test_reports_are_tables_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    table = Table("setting", "change \u00b1")
    table.add_row("\u4e00", "-0.38 \u00b10.01")
    stream = _console(encoding, "strict")
    monkeypatch.setattr(sys, "stdout", stream)
    screen._show_what_it_can()
    screen.out.print(table)
    assert "setting" in _printed(stream) and "0.38" in _printed(stream)


# -- without docstrings --------------------------------------------------------------------------------


def test_texts_for_users_are_there_without_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONOPTIMIZE=2 drops them: reasons of rules, summaries of masks and objectives."""
    rules = list(dict.fromkeys(_RULES.values()))

    def texts() -> list[Any]:
        return [list(map(first_line, rules)), list_masks(), list_objectives()]

    before = texts()
    for documented_one in (*rules, *PROVIDERS.values(), *OBJECTIVES.values()):
        monkeypatch.setattr(documented_one, "__doc__", None)
    assert texts() == before and all(before[0])
