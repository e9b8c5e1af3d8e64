"""The documentation site: what its pages promise, and that it builds without a warning or a broken link."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import commands
import drawn
import matplotlib
import pytest
import torch
from commands import code_of, faults
from conftest import ROOT
from matplotlib.figure import Figure
from prose import PAGES as TOLD
from prose import faults_of, prose_of, public_docstrings, texts_of

import cadsurgery as cs
from benchmarks import front_pages
from cadsurgery.data.images import street_scene
from cadsurgery.elements.lattice import Geometry
from cadsurgery.masks.provider import PROVIDERS

DOCS = ROOT / "docs"
START = (DOCS / "index.md").read_text()
CHANGES = (ROOT / "CHANGELOG.md").read_text()
HOW_TO = sorted((DOCS / "howto").glob("*.md"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
ROOMS = ("tutorials", "howto", "concepts", "reference", "methods")  # folders of pages
PAGES = [DOCS / "index.md", *sorted(path for room in ROOMS for path in (DOCS / room).glob("*.md"))]
PUBLIC = {*cs.__all__}  # names, and modules
OTHER_HOST = re.compile(r"https?://|[\"']//\w")


@pytest.fixture(scope="module")
def site_pages() -> ModuleType:
    """The extension of the site; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_contents() -> None:
    listed = set(
        re.findall(
            r"^(?:.*<)?([\w/*-]+)>?$", "\n".join(re.findall(r"{toctree}\n(.*?)```", START, re.DOTALL)), re.M
        )
    )
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    pages = {page for page in pages if not page.startswith("generated/")} - {"index"}
    assert len(HOW_TO) >= 8 and pages <= listed, pages - listed


def cards() -> set[str]:
    return set(re.findall(r"^:link: (\S+)$", START, re.MULTILINE))


def test_every_tutorial_has_a_card_on_the_start_page_and_every_card_leads_to_a_page() -> None:
    tutorials = {f"tutorials/{path.stem}" for path in TUTORIALS}
    assert len(tutorials) == 8 and tutorials | {"methods/index"} <= cards()
    assert all((DOCS / f"{card}.md").is_file() for card in cards())


def test_pages_that_the_code_names_exist() -> None:
    """In error messages, next steps and docstrings."""
    named = {
        page
        for folder in ("cadsurgery", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
    }
    assert "docs/extending.md" in named and all((ROOT / page).is_file() for page in named), named


def headings(path: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", commands.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere_in_the_repository(page: Path) -> None:
    """The site has no README, and its build says nothing of links between files of the repository."""
    missing = list[str]()
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?![a-z]+:)([^()\s#]*)#?([^()\s]*)\)", text)
    for target, anchor in links:
        path = page.parent / target if target else page
        is_whole = (
            path.suffix == ".md" and "{include}" not in path.read_text()
        )  # others get headings when built
        is_there = path.exists() and (not is_whole or not anchor or anchor in headings(path))
        missing += [f"{target}#{anchor}"] * (not is_there)
    assert missing == []


PROVING = DOCS / "data"  # pages of tables, with commands, commits and processors
MACHINE = re.compile(r"\bfamily \d+|\bmodel \d+\b|\bcommits? `?[0-9a-f]{7,}")  # of a measurement
EXPECTED = (
    "speed",
    "results",
    "deploy",
    "zoo",
    "libraries",
    "corpus",
)  # pages that say what these tables mean


@pytest.mark.parametrize("page", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_that_tell_name_no_commits_and_no_models_of_processors(page: Path) -> None:
    is_first = page.name in ("README.md", "index.md")  # these have the figures of one run
    assert is_first or MACHINE.findall(page.read_text()) == []


def length(path: Path) -> int:
    """Words of a page, its code among them; the lines of a table are none."""
    return sum(any(map(str.isalnum, word)) for word in path.read_text().split())


def test_pages_that_tell_are_short() -> None:
    told = [path for path in TOLD if path.is_relative_to(DOCS)]
    assert length(DOCS / "index.md") <= 900
    assert {
        name: length(DOCS / f"{name}.md") for name in EXPECTED if length(DOCS / f"{name}.md") > 1200
    } == {}
    assert sum(map(length, told)) <= 45_000


@pytest.mark.parametrize("name", EXPECTED)
def test_a_page_of_figures_and_the_page_that_says_what_to_expect_lead_to_each_other(name: str) -> None:
    assert f"](data/{name}.md)" in (DOCS / f"{name}.md").read_text()
    assert f"](../{name}.md)" in (PROVING / f"{name}.md").read_text()


@pytest.mark.parametrize("name", EXPECTED)
def test_figures_that_a_page_tells_stand_on_its_page_of_figures(name: str) -> None:
    """Numbers with a decimal point or of three digits and more; names such as ResNet-101 are no figures."""
    figure = re.compile(r"(?<![\w.,/-])(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d{3,})(?![\w-])")

    def numbers(text: str) -> set[str]:
        return {number.replace(",", "").lstrip("0") for number in figure.findall(text)}

    told = numbers(re.sub(r"```.*?```|`[^`]*`", "", (DOCS / f"{name}.md").read_text(), flags=re.DOTALL))
    proved = set().union(*(numbers(path.read_text()) for path in PROVING.glob("*.md")))
    assert told <= proved, sorted(told - proved)


def test_the_list_of_versions_has_this_one_and_those_of_the_changelog() -> None:
    released = re.findall(r"^## (\d+\.\d+\.\d+) - (\S+)$", CHANGES, re.MULTILINE)
    rows = re.findall(r"^\| (\d\S*) \| (\d\S*) \|", (DOCS / "versions.md").read_text(), re.MULTILINE)
    cited = re.search(
        r"^version: (\S+)\ndate-released: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )
    assert rows == released and released[0][0] == cs.__version__
    assert cited is not None and cited.groups() == released[0]


def too_long(changes: str) -> list[str]:
    """Sections and entries of a changelog that nobody reads to the end.

    A section has at most 120 lines, that of the first release 60; an entry at most three lines, two while it is not
    released; a line at most 160 characters outside tables.
    """
    sections = re.split(r"^## ", changes, flags=re.MULTILINE)[1:]
    found = list[str]()
    for number, part in enumerate(sections, 1):
        title = part.split("\n", 1)[0]
        if part.strip().count("\n") + 1 > (60 if number == len(sections) > 1 else 120):
            found.append(title)
        lines = 2 if title == "Unreleased" else 3
        for entry in re.split(r"^(?=- )", part, flags=re.MULTILINE)[1:]:
            own = re.split(r"\n\n|\n(?=#)", entry)[0].strip().splitlines()
            found += [own[0]] * (len(own) > lines or max(map(len, own)) > 160)
    return found


def test_the_changelog_is_what_a_user_reads() -> None:
    assert too_long(CHANGES) == []
    highlights = CHANGES.partition("### Highlights")[2].partition("###")[0]
    entries = re.split(r"^- ", highlights, flags=re.MULTILINE)[1:]
    assert len(entries) == 5 and all("](" in entry for entry in entries)


# Numbers with `of`, a decimal, three digits or a unit, and words such as `twice`.
A_FIGURE = re.compile(
    r"\b\d[\d,]* of \d+|(?<![\w.-])\d[\d,]*\.\d+\b|(?<![\w.])\.\d+\b|(?<![\w.-])\d[\d,]{2,}\b"
    r"|\b\d[\d,]*(?= ?(?:%|(?:ms|s|seconds|minutes|hours|times|points|networks|pictures|threads|[KMGT]i?B|mIoU|fps)\b))"
    r"|\b(?:twice|thrice|half the|(?:two|three|four|five|ten) times)\b"
)
DEFINED = {"3.11", "2023", "512 x 1024"}  # no measurement: the Python, a year, the picture of an example
FRONT = {"README.md": "docs/", "docs/index.md": ""}  # where the documentation is, for links of each page


def stray_figures(text: str) -> list[str]:
    """Figures of a page that are in none of its blocks; code, links' targets and what is defined aside."""
    text = front_pages.BLOCK.sub("", text)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|<[^>]*>|^:::.*$", " ", text, flags=re.MULTILINE)
    for known in DEFINED:
        text = text.replace(known, " ")
    return [found[0] for found in A_FIGURE.finditer(text)]


@pytest.mark.parametrize("name", FRONT)
def test_every_figure_of_the_first_pages_is_in_one_file(name: str) -> None:
    """The blocks are what the script writes, and beside them there is none."""
    text, known = (ROOT / name).read_text(), json.loads(front_pages.FIGURES.read_text())
    assert front_pages.with_figures(text, known, FRONT[name]) == text
    assert stray_figures(text) == []
    assert (
        "how this was measured" in text
        and known["times"]["date"] in text
        and known["times"]["machine"] in text
    )


def test_figures_of_the_first_pages_are_those_that_were_recorded() -> None:
    known = json.loads(front_pages.FIGURES.read_text())
    assert front_pages.collect(known["example"]["work"]) == known


@pytest.mark.parametrize("page", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_words_that_readers_stumble_over(page: Path) -> None:
    assert faults_of(prose_of(page)) == []


def test_messages_have_no_words_that_readers_stumble_over() -> None:
    """Nor has any other text of the package that is shown: helps of options, reports, warnings."""
    files = sorted((ROOT / "cadsurgery").rglob("*.py"))
    texts = [(path.relative_to(ROOT), line, text) for path in files for line, text in texts_of(path)]
    found = [f"{path}:{line}: {fault}" for path, line, text in texts for fault in faults_of(text)]
    assert len(texts) > 3000 and not found, "\n".join(found)


def test_public_docstrings_have_no_words_that_readers_stumble_over() -> None:
    found = [f"{name}: {fault}" for name, text in public_docstrings() for fault in faults_of(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_that_a_page_uses_exist(path: Path) -> None:
    """In its Python, and in its text: `cs.NAME`; blocks of Python are whole statements."""
    text = path.read_text()
    ast.parse("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    assert {*re.findall(r"\bcs\.(\w+)", text)} <= PUBLIC


@pytest.mark.parametrize("page", commands.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_options_and_paths_that_a_page_names_exist(page: Path) -> None:
    found = [f"{page.name}:{named.line}: {fault}" for named in code_of(page) for fault in faults(named)]
    assert not found, "\n".join(found)


def test_pictures_are_drawn_for_light_and_dark_pages_and_their_figures_stand_on_the_pages() -> None:
    from benchmarks.pictures import speeds

    names = {path.name for path in (DOCS / "pictures").iterdir() if path.suffix != ".json"}
    light = {name for name in names if "-dark." not in name}
    assert light and names - light == {name.replace(".", "-dark.") for name in light}
    hero = json.loads((DOCS / "pictures" / "hero.json").read_text())["milliseconds"]
    readme = (ROOT / "README.md").read_text()
    assert f"as it was ({hero['dense']:.0f} ms)" in readme and f"one ({hero['adaptive']:.0f} ms)" in readme
    found, text = speeds(), (DOCS / "data" / "speed.md").read_text()
    assert len(found) >= 6 and sum("AVX2" in sets and "AVX-512" in sets for sets in found.values()) >= 5
    for name, sets in found.items():
        assert f"**{name}" in text or f":{name}" in text
        assert all(0 < work < 1 and 0 < time < 1 for work, time in sets.values())


def _drawn_figures() -> dict[str, Callable[[], Figure]]:
    """Every figure of the pages, from recorded data; those of photos with a generated scene in their place."""
    from benchmarks import mask_pictures, pictures

    scene = street_scene(256, 320)
    lattice = Geometry((2, 2)).uniform(1, 1, (32, 40))
    rows = json.loads((DOCS / "pictures" / "masks.json").read_text())["masks"]
    classes = dict.fromkeys(("dense", "adaptive"), torch.zeros(scene.shape[1:], dtype=torch.long))
    recorded = json.loads((DOCS / "pictures" / "hero.json").read_text())
    runs = json.loads((DOCS / "quality.json").read_text())
    return {
        "hero": partial(pictures.hero_figure, scene, lattice, classes, recorded),
        "concept": pictures.concept,
        **{f"quality, {side}": partial(pictures.quality, side) for one in runs.values() for side in one},
        "speed": pictures.speed,
        "zoo": pictures.zoo,
        **{
            f"masks-{group}": partial(mask_pictures._figure, scene, dict.fromkeys(names, lattice), rows, 8)
            for group, names in mask_pictures.MASKS.items()
        },
        **pictures.WORDS,
    }


FIGURES = _drawn_figures()


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_texts_of_a_figure_can_be_read(name: str) -> None:
    with matplotlib.rc_context({"font.size": 10}):
        assert drawn.faults_of(FIGURES[name]()) == []


def test_every_mask_has_a_picture_and_a_cost(site_pages: ModuleType) -> None:
    from benchmarks.mask_pictures import MASKS

    counted = json.loads((DOCS / "pictures" / "masks.json").read_text())["masks"]
    page = (DOCS / "reference" / "masks.md").read_text()
    drawn = {name: spec for group in MASKS.values() for name, spec in group.items()}
    # Recipes that other tests import have masks of their own.
    own = {name for name, kind in PROVIDERS.items() if kind.__module__.startswith("cadsurgery.")}
    assert {*drawn} == own, (
        f"without a picture: {sorted(own - {*drawn})}; add each to MASKS in benchmarks/mask_pictures.py, and run "
        "python -m benchmarks.pictures --masks PHOTO, which draws them and counts their costs"
    )
    assert drawn == {name: row["spec"] for name, row in counted.items()}
    assert all(f"../pictures/masks-{group}.jpg" in page for group in MASKS)
    lines = [line.split(" | ")[0] for line in site_pages.describe_masks() if " with `" in line]
    assert len(lines) == len(drawn) - len(cs.list_masks(of_recipes=True))


def test_the_reference_has_every_command_mask_and_public_name(site_pages: ModuleType) -> None:
    commands, masks = (
        "\n".join(part()) for part in (site_pages.describe_commands, site_pages.describe_masks)
    )
    assert "## cadsurgery keypoints extract" in commands and "`--output-stride HIGH,LOW`" in commands
    assert all(
        f"| `{mask.form}` |".replace("| b", r"\| b") in masks
        for mask in cs.list_masks()
        if "|" not in mask.form
    )
    names = "\n".join(site_pages.describe_names())
    grouped = " ".join(site_pages.GROUPS.values()).split()
    assert len(grouped) == len(set(grouped)) and "## Others" not in names  # a new name belongs into a group
    documented = re.findall(r"^.. auto\w+:: cadsurgery\.(\w+)$", names, re.MULTILINE)
    assert not any(inspect.ismodule(getattr(cs, name)) for name in documented)
    modules = re.findall(r"^### cadsurgery\.(\w+)$", "\n".join(site_pages.describe_modules()), re.MULTILINE)
    assert {*modules} == {*cs.__all__} - {*documented}


def test_the_configuration_takes_nothing_from_other_hosts() -> None:
    settings = (DOCS / "conf.py").read_text() + (DOCS / "_static" / "site.css").read_text()
    assert not OTHER_HOST.search(settings) and "nb_ipywidgets_js = {}" in settings
    assert not {"sphinx.ext.mathjax", "sphinx.ext.intersphinx"} & {*re.findall(r'"([\w.]+)"', settings)}


class _Page(HTMLParser):
    """Anchors, and what a page refers to: tag, attribute, address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.references.append((tag, value))


def broken(pages: dict[Path, _Page]) -> list[str]:
    """References to files or anchors that do not exist, and whatever is loaded from another host."""
    found = []
    for path, page in pages.items():
        for tag, address in page.references:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag != "a":
                    found.append(f"{path.name} loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_there = target.is_file() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            if not is_there:
                found.append(f"{path.name} refers to {address}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for name in ("sphinx", "furo", "myst_nb", "sphinx_design"):
        pytest.importorskip(name, reason="the site needs pip install 'cadsurgery[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_broken_link(site: Path) -> None:
    pages = {path.resolve(): _Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 40 and broken(pages) == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"@import\s+(url\()?[\"']?https?:|url\([\"']?https?:", styles)
    # Search from file://: the index is a script, and nothing is fetched.
    search = (site / "search.html").read_text()
    assert 'src="searchindex.js"' in search and (site / "searchindex.js").is_file()
    options = (site / "_static" / "documentation_options.js").read_text()
    assert "SHOW_SEARCH_SUMMARY: false" in options


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_pages_fit_a_window_and_load_without_an_error(
    browser: Any, site: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong = context.new_page(), list[str]()
    page.on("console", lambda one: wrong.append(f"{page.url}: {one.text}") if one.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("request", lambda one: wrong.append(one.url) if not one.url.startswith(("file:", "data:")) else 0)
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for path in pages:
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wrong.append(f"{path.name} is wider than {width} pixels")
    page.goto((site / "index.html").as_uri())
    hero = page.locator(f"img[src*='hero'].only-{scheme}")
    assert hero.is_visible() and page.locator("img[src*='hero']:visible").count() == 1
    assert wrong == []
    context.close()
