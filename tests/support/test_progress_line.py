"""Long calls in Python show a line on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
import torch
from rich.status import Status
from torch import nn

import cadsurgery as cs
from cadsurgery.support import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest replaces sys.stderr itself
    monkeypatch.setattr(progress, "_PATIENCE", 0.05)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def wait(stream: Terminal, text: str) -> None:
    end = time.monotonic() + 10
    while text not in stream.getvalue() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_long_call_shows_its_steps_on_a_line_that_disappears(terminal: Terminal) -> None:
    with progress.waiting() as step:
        step("tracing")
        wait(terminal, "tracing")
        step("verifying")
    shown = terminal.getvalue()
    assert "cadsurgery: tracing ..." in shown and "cadsurgery: verifying ..." in shown
    assert shown.endswith("\x1b[2K")


def test_a_short_call_and_one_on_a_screen_of_its_own_show_nothing(terminal: Terminal) -> None:
    with progress.waiting() as step:
        step("tracing")
    with progress.elsewhere(), progress.waiting() as step:
        step("tracing")
        time.sleep(0.1)
    time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_conversion_and_an_optimised_copy_say_what_they_do(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Status, "update", lambda status, text: texts.append(text))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)).eval()
    image = torch.rand(1, 3, 64, 64)
    net = cs.adaptify(model, "none", example_input=image)
    assert any("verifying" in text for text in texts)
    net.optimize()
    assert any("optimising" in text for text in texts)
