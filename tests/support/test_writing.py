"""Paths: what is written replaces regular files only, and no path or size makes anything but a refusal."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import find_images, read_image
from cadsurgery.data.sources import open_data
from cadsurgery.methods.resampling.locations import check_size
from cadsurgery.support.files import (
    append_lines,
    cache_folder,
    check_folder,
    make_folder,
    write_whole,
)
from cadsurgery.support.provenance import find_function
from cadsurgery.tasks.open import example_image, is_file, original


def write(path: Path) -> None:
    with write_whole(path) as temporary:
        temporary.write_text("new", encoding="utf-8")


def append(path: Path) -> None:
    append_lines(path, ["new"])


WRITERS: list[Callable[[Path], None]] = [write, append]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "socket": (make_socket, "is a socket"),
    "folder": (Path.mkdir, "is a folder"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is a device"),
    "read-only file": (lambda path: path.touch(0o444), "is read-only"),
    "link to itself": (lambda path: path.symlink_to(path), "cannot be written"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", [*WRITERS, check_folder])
def test_only_regular_files_that_may_be_written_are_replaced(
    writer: Callable[[Path], None], place: str, tmp_path: Path
) -> None:
    path = tmp_path / "here"
    make, refusal = PLACES[place]
    make(path)
    before = path.lstat()
    with pytest.raises(cs.FileError, match=refusal):
        writer(path)
    assert path.lstat().st_ino == before.st_ino and path.lstat().st_mode == before.st_mode
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("is_there", [True, False])
def test_the_target_of_a_link_is_written_and_the_link_stays(
    writer: Callable[[Path], None], is_there: bool, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if is_there:
        target.write_text("", encoding="utf-8")
    link.symlink_to(Path("elsewhere") / "target")
    writer(link)
    assert link.is_symlink() and not target.is_symlink()
    assert target.read_text(encoding="utf-8").strip() == "new"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"] and os.listdir(target.parent) == ["target"]


IMPOSSIBLE = {"NUL": "a\0b.png", "long": "x" * 300 + ".png", "long folder": "y" * 300 + "/a.png"}


@pytest.mark.parametrize("name", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize(
    "use",
    [
        *(write, append, check_folder, read_image),
        *(lambda path: make_folder(path), lambda path: find_images([path]), lambda path: cs.load(path)),
        lambda path: original(f"{path}.pth"),
        lambda path: cs.build_model("resnet18", f"{path}.safetensors"),
        lambda path: open_data(f"folder:{path},classes=3"),
    ],
)
def test_paths_that_no_file_can_have_are_refused(
    use: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    with pytest.raises(cs.CadError):
        use(tmp_path / name)
    assert not is_file(str(tmp_path / name))


SIZES: dict[str, Callable[[tuple[int, int]], object]] = {
    "scene": lambda size: example_image(None, size),
    "read": lambda size: read_image(Path("nosuch.png"), size),
    "generated data": lambda size: open_data("scene:1,height={},width={}".format(*size))[0],
    "resampling": check_size,
}


@pytest.mark.parametrize("size", [(10**9, 10**9), (16, 10**9)])
@pytest.mark.parametrize("use", SIZES)
def test_sizes_that_no_memory_holds_are_refused(use: str, size: tuple[int, int]) -> None:
    with pytest.raises(cs.InvalidInput, match="too large"):
        SIZES[use](size)


# -- finding images ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:left out of")
def test_folders_keep_their_order_and_endings_that_differ(tmp_path: Path) -> None:
    for name in ("b/c.png", "b.png", "a.b.JPG", "a.b.png", ".png", "text.txt", "b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to("nowhere")
    places, _ = find_images([tmp_path, tmp_path / "b" / "c.png"])
    assert {str(image.relative_to(tmp_path)): str(place) for image, place in places.items()} == {
        **{"a.b.JPG": "a.b.png", "a.b.png": "a.b_png.png"},
        **{"b/c.jpg": "b/c.png", "b/c.png": "b/c_png.png", "b.png": "b.png"},
    }
    assert [str(image.relative_to(tmp_path)) for image in places][:2] == ["a.b.JPG", "a.b.png"]


# -- hints ---------------------------------------------------------------------------------------------


def test_an_absent_picture_names_the_closest_or_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "street.png").touch()
    (tmp_path / "notes.txt").touch()
    for use in (read_image, lambda path: find_images([path])):
        with pytest.raises(cs.FileError, match=r"did you mean .*street\.png"):
            use(tmp_path / "stret.png")
        with pytest.raises(cs.FileError, match=r"there are .*street\.png\."):
            use(tmp_path / "qqq.png")
        with pytest.raises(cs.FileError, match="no folder of that name"):
            use(tmp_path / "none" / "street.png")


def test_a_module_without_the_function_names_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from os.path import join\nimport os\ndef build(): ...\nclass Net: ...\n_hidden = build\n"
    (tmp_path / "counting_nets.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cs.UnknownName, match=r"known: Net, build\."):
        find_function("counting_nets", "nofn")
    with pytest.raises(cs.UnknownName, match="did you mean build"):
        find_function("counting_nets", "buildd")
    with pytest.raises(cs.UnknownName, match="did you mean counting_nets"):
        find_function("countng_nets", "build")


def test_a_mask_option_given_twice_is_refused() -> None:
    with pytest.raises(cs.InvalidInput, match=r"'threshold' of mask 'edges' is given twice.*\n.*0\.1.*0\.2"):
        cs.adaptify(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)), "edges:threshold=0.1,threshold=0.2")


def strided(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1)).eval()


class Choosy(nn.Module):
    """Checks the channels of the image itself, and changes it before a convolution sees it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels, please")
        return x - torch.ones(1, 3, 1, 1, device=x.device)


def test_a_grey_image_for_a_network_that_checks_channels_itself_gets_the_hint() -> None:
    net = cs.adaptify(strided(Choosy()), "none", verify_laws=False)
    for call in (net, net.macs):
        with pytest.raises(
            cs.InvalidInput, match=r"1 channel, the network takes 3(.|\n)*expand\(-1, 3, -1, -1\)"
        ):
            call(torch.zeros(2, 1, 65, 97))


@pytest.mark.parametrize("threshold", [-1, (0.5, -0.1)])
def test_a_negative_threshold_of_exits_is_refused(threshold: float | tuple[float, ...]) -> None:
    model = strided(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU())
    with pytest.raises(cs.InvalidInput, match="negative"):
        cs.anytime(model, classes=2, threshold=threshold)


# -- the cache folder, which is whole and the user's own -----------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    if sys.platform != "linux":
        pytest.skip("permission bits are those of Linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_folder_is_the_users_alone(home: Path) -> None:
    found = cache_folder()
    assert found is not None and found.parent == home / "cache" / "cadsurgery"
    assert found.stat().st_mode & 0o777 == 0o700 and found == cache_folder()


@pytest.mark.parametrize("cache", ["file/below", "/proc/1/nothing"])
def test_a_cache_that_cannot_be_written_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / cache))
    assert cache_folder() is None


@pytest.mark.parametrize("harm", [0o777, 0o770, 0o702, "somebody else's", "a link"])
def test_a_folder_that_is_not_the_users_alone_is_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, harm: int | str
) -> None:
    folder = cache_folder()
    assert folder is not None
    if isinstance(harm, int):
        folder.chmod(harm)
    elif harm == "a link":
        folder.rename(home / "elsewhere")
        folder.symlink_to(home / "elsewhere")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache_folder() is None
