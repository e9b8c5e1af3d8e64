"""The page of `cadsurgery explore` in a browser: it shows what `explore` found, and asks no other host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cadsurgery.data.images import street_scene
from cadsurgery.tasks.explore_page import HOST, launch, make_page
from cadsurgery.tasks.explorer import open_subject

pytestmark = pytest.mark.skipif(
    find_spec("gradio") is None, reason="Gradio is not installed: pip install 'cadsurgery[explore]'"
)


SHOW = ("a photo.png", "street 1", "edges", "threshold", 0.2, 0.3, "8 to 16", "linear")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = make_page(open_subject("networks:segmenter"), rounds=0)
    _, address, _ = launch(page)
    yield address
    page.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray((255 * street_scene(61, 101).permute(1, 2, 0)).byte().numpy()).save(
        tmp_path / "a photo.png"
    )
    return tmp_path / "a photo.png"


def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


def test_the_page_is_served_to_this_machine_alone(address: str) -> None:
    import httpx

    assert address.startswith(f"http://{HOST}:")
    answer = httpx.get(address)
    assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith(
        "default-src 'self'"
    )
    assert httpx.get(address, headers={"host": "example.org"}).status_code == 400


@pytest.mark.parametrize(
    ("name", "hint"), [("photo.png", "cannot be read as an image"), ("photo.txt", "Invalid file")]
)
def test_what_is_no_image_is_refused_in_plain_words(
    address: str, tmp_path: Path, name: str, hint: str
) -> None:
    from gradio_client import handle_file

    (tmp_path / name).write_text("no image")
    with pytest.raises(Exception, match=hint):
        client(address).predict(handle_file(tmp_path / name), *SHOW[1:], api_name="/show")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_uploads_are_deleted_when_the_command_is_ended(
    tmp_path: Path, photo: Path, number: signal.Signals
) -> None:
    from gradio_client import handle_file

    cache, tests = tmp_path / "cache", Path(__file__).parents[1]
    cache.mkdir()
    command = [sys.executable, "-m", "cadsurgery.cli", "explore", "networks:segmenter", "--weights", "none"]
    variables = {**os.environ, "GRADIO_TEMP_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tests, env=variables) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if HOST in line)
        client(line.split()[0]).predict(handle_file(photo), *SHOW[1:], api_name="/show")
        assert [file for file in cache.rglob("*.png") if file.stat().st_size == photo.stat().st_size]
        process.send_signal(number)
        assert process.wait(60) == 130
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_an_image_is_dropped_settings_are_chosen_and_no_other_host_is_asked(
    browser: Any, address: str, photo: Path
) -> None:
    page, asked, errors = browser.new_page(), list[str](), list[str]()
    page.set_default_timeout(120_000)  # the first page of a browser takes long on a busy machine
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.get_by_role("button", name="Show").wait_for()
    page.locator("input[type=file]").first.set_input_files(photo)
    results = page.get_by_label("results")
    page.wait_for_function("document.querySelector('textarea').value.includes('active fraction')")
    before = results.input_value()
    page.get_by_label("threshold", exact=True).check()
    page.get_by_role("button", name="Show").click()
    page.wait_for_function("before => document.querySelector('textarea').value != before", arg=before)
    assert page.get_by_text("edges:threshold=0.35").count() > 0
    # The two predictions under the slider, level map and lattice.
    shown = "[...document.querySelectorAll('img')].filter(image => image.naturalWidth == 101).length == 4"
    page.wait_for_function(shown)
    strangers = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert strangers == [] and [one for one in errors if "Content Security Policy" in one] == []
    photo.write_text("no image")
    page.goto(address)
    page.get_by_role("button", name="Show").wait_for()
    page.locator("input[type=file]").first.set_input_files(photo)
    page.get_by_text("cannot be read as an image").wait_for()
    page.close()
