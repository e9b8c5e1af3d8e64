"""Sphinx extension: pages of the repository that lie outside of docs/, and reference pages made from the code.

Recipes, notebooks and the contributing guide stay where readers of the repository look for them. Before a build they
are copied to docs/generated (which git ignores), and links between all pages are rewritten to where a page is on the
site. The options of the commands, the table of masks and that of extras are written there, too, from the code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
MASK_COSTS = DOCS / "pictures" / "masks.json"
SINGLE_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/deploy/README.md": "examples/deploy.md",
}
# The public names in the order in which somebody needs them; what is in none of these groups follows last.
GROUPS = {
    "Convert": "adaptify plan Plan AdaptiveModel recommend Recommendation build_model list_models",
    "Save, load, export": "save load export kernels_for push",
    "Evaluate": "evaluate EvaluationReport SegmentationMetrics open_data data_kind SegmentationData Augment",
    "Masks": "list_masks mask_provider MaskProvider MaskWrapper Budget",
    "Values at points and in boxes": "read_at macs_at read_within",
    "Other methods": "anytime AnytimeModel sample SampledModel resample ResampledModel",
    "Extend": "rule Treatment Call Window operation Elements Lattice Geometry",
    "Errors": "CadError CannotConvert InvalidInput UnknownName FileError NotConverted NotInstalled TrainingStopped "
    "CadWarning",
}
# Text and target of a link or picture; the target without its anchor, and the anchor.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def setup(app: Any) -> dict[str, bool]:
    """Register the extension."""
    app.connect("config-inited", lambda app, config: write_pages())
    app.connect("source-read", rewrite_source)
    app.connect("autodoc-process-docstring", clean_docstring, priority=400)  # before napoleon, which has 500
    return {"parallel_read_safe": True}


def outside_pages() -> dict[Path, Path]:
    """Pages outside of docs/, each with its copy on the site."""
    pages = {ROOT / path: GENERATED / name for path, name in SINGLE_PAGES.items()}
    for path in sorted(ROOT.glob("recipes/*/README.md")):
        pages[path] = GENERATED / "recipes" / f"{path.parent.name}.md"
    for path in sorted(ROOT.glob("examples/*.ipynb")):
        pages[path] = GENERATED / "examples" / path.name
    return pages


def write_pages() -> None:
    """Write docs/generated. Files that stay the same are not touched, so that a second build is quick."""
    texts = {copy: path.read_text() for path, copy in outside_pages().items()}
    texts[GENERATED / "parts" / "commands.md"] = "\n".join(describe_commands())
    texts[GENERATED / "parts" / "masks.md"] = "\n".join(describe_masks())
    texts[GENERATED / "parts" / "extras.md"] = "\n".join(describe_extras())
    texts[GENERATED / "parts" / "zoo.md"] = "\n".join(describe_zoo())
    texts[GENERATED / "parts" / "names.md"] = "\n".join(describe_names())
    texts[GENERATED / "parts" / "modules.md"] = "\n".join(describe_modules())
    for old in GENERATED.rglob("*.*"):
        if old not in texts:
            old.unlink()
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def rewrite_source(app: Any, docname: str, source: list[str]) -> None:
    """Rewrite the links of a page as it is read; called by Sphinx."""
    copy = Path(app.env.doc2path(docname))
    original = {place: path for path, place in outside_pages().items()}.get(copy, copy)
    source[0] = by_theme(rewrite_links(source[0], original, copy), copy.parent)


def rewrite_links(text: str, original: Path, copy: Path) -> str:
    """Rewrite links relative to `original` so that they hold in `copy`.

    Links to pages lead to the pages of the site, and links to other files to these files, which the build copies. A
    folder has no page: of a link to it the text stays. Everything else is left as it is.
    """
    copies = outside_pages()

    def rewritten(link: re.Match[str]) -> str:
        picture, shown, target, anchor = link.groups()
        path = Path(os.path.normpath(original.parent / target))
        if re.match(r"[a-z]+:", target) or not path.exists() or not path.is_relative_to(ROOT):
            return link.group()
        if path.is_dir():
            path /= "README.md"
        if path == ROOT / "README.md":
            path = DOCS / "index.md"
        if not path.exists():
            return shown
        place = os.path.relpath(copies.get(path, path), copy.parent)
        return f"{picture}[{shown}]({place}{anchor or ''})"

    return LINK.sub(rewritten, text)


def by_theme(text: str, folder: Path) -> str:
    """Replace each picture on a line of its own that has a form for dark pages by both, of which a page shows one."""

    def both(picture: re.Match[str]) -> str:
        shown, light = picture.groups()
        dark = Path(light).with_stem(f"{Path(light).stem}-dark").as_posix()
        if not (folder / dark).is_file():
            return picture.group()
        forms = (("light", light), ("dark", dark))
        return "\n\n".join(
            f":::{{image}} {place}\n:alt: {shown}\n:class: only-{theme}\n:::" for theme, place in forms
        )

    return re.sub(r"^!\[([^\]]*)\]\(([^()\s]+)\)$", both, text, flags=re.MULTILINE)


def clean_docstring(app: Any, kind: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring reStructuredText where plain text is not: code after a colon, plurals of code, stars."""
    for number, line in enumerate(lines):
        line = re.sub(r"(`[^`]+`)(\w?)", lambda code: r"\ ".join(filter(None, code.groups())), line)
        line = re.sub(r"(?<=[ (])\*(?=\w[^*]*$)", r"\\*", line)
        following = next((other for other in lines[number + 2 :] if other.strip()), "")
        is_before_gap = line.endswith(":") and lines[number + 1 : number + 2] == [""]
        if is_before_gap and _indent(following) > _indent(line):
            line += ":"
        lines[number] = line


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def describe_commands() -> Iterator[str]:
    """Lines of Markdown: a section for each command, with its arguments and options."""
    import typer

    from cadsurgery.cli.main import make_app

    yield from _describe_group(typer.main.get_command(make_app()), "cadsurgery")


def _describe_group(group: Any, name: str) -> Iterator[str]:
    import typer

    for command_name, command in sorted(group.commands.items()):
        full_name = f"{name} {command_name}"
        if hasattr(command, "commands"):
            yield from _describe_group(command, full_name)
            continue
        context = typer.Context(command)
        yield f"## {full_name}\n"
        yield _as_markdown(command.help) + "\n"
        yield "| argument or option | meaning |\n|---|---|"
        for parameter in command.params:
            record = parameter.get_help_record(context)  # None for a hidden option
            if record:
                yield f"| `{record[0]}` | {_as_cell(record[1])} |"
        for setting, meaning in getattr(command.callback, "settable", {}).items():
            yield f"| `--set {setting}=VALUE` | {_as_cell(meaning)} |"
        yield ""


def _as_markdown(text: str) -> str:
    """Docstring of a command: its paragraphs, single line breaks are none."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())


def _as_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")


def describe_masks() -> Iterator[str]:
    """Lines of Markdown: the table of all masks that are registered, with the costs that `benchmarks.pictures --masks`
    counted."""
    from cadsurgery.masks import list_masks
    from cadsurgery.masks.mask_options import format_options

    counted = json.loads(MASK_COSTS.read_text())
    yield "| mask | keeps high | cost on the photo | options | source |\n|---|---|---|---|---|"
    for mask in list_masks():
        options = format_options(mask.options)  # each a span of its own, so that a line can end between them
        row = counted["masks"].get(mask.name)
        cost = f"{row['of_given']:.2f} with `{row['spec']}`" if row else ""
        spans = ", ".join(f"`{option}`" for option in options.split(",")) if options else ""
        cells = (f"`{mask.form}`", mask.summary, cost, spans, mask.source)
        yield "| " + " | ".join(_as_cell(cell) for cell in cells) + " |"
    height, width = counted["pixels"]
    yield (
        f"\nCosts are counted, not timed: multiply-accumulates of {counted['network']} "
        f"with {counted['weights']} weights on a photo of {height} x {width} pixels, the mask's own included, "
        "relative to the network as given. "
        f"Command: `python -m benchmarks.pictures --masks PHOTO`, commit {counted['commit']}, "
        "[figures](../pictures/masks.json)."
    )


def describe_extras() -> Iterator[str]:
    """Lines of Markdown: what each extra installs, and which commands and pages need one; the tests run them all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = tomllib.loads((DOCS / "extras.toml").read_text())
    used = {row["extra"] for row in needed["command"]}.union(*needed["pages"].values())
    yield "| command | needs |\n|---|---|"
    for row in needed["command"]:
        need = f"`pip install 'cadsurgery[{row['extra']}]'`" if row["extra"] else "nothing more"
        yield f"| {row['what']} | {need} |"
    yield "\n| page whose Python needs more | needs |\n|---|---|"
    for path, extras in needed["pages"].items():
        title = (ROOT / path).read_text().partition("\n")[0].removeprefix("# ")
        place = os.path.relpath(ROOT / path, DOCS / "reference")
        yield f"| [{title}]({place}) | `pip install 'cadsurgery[{','.join(extras)}]'` |"
    yield "\n| extra | brings |\n|---|---|"
    for extra, packages in project["optional-dependencies"].items():
        if extra in used:
            yield f"| `{extra}` | {', '.join(f'`{package}`' for package in packages)} |"


def describe_zoo() -> Iterator[str]:
    """Lines of Markdown: the networks of the zoo, each a row of a table that _static/filter.js can filter."""
    from cadsurgery.tasks.zoo_record import RECORDED, read_rows

    columns = ("network", "result", "output strides", "MACs in the region", "million parameters")
    yield f"| {' | '.join(columns)} | why refused, or why the region ends |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(read_rows(RECORDED), key=lambda row: row["model"]):
        ends = row.get("dense") or [{}]
        share = row.get("share_in_region")
        cells = (
            row["model"],
            row["result"],
            "{} to {}".format(*row["output_stride"]) if row["result"] == "converts" else "",
            f"{share:.2f}" if share is not None else "",
            f"{row.get('parameters', 0) / 1e6:.1f}",
            row.get("why") or ends[0].get("why", ""),
        )
        yield "| " + " | ".join(_as_cell(str(cell)) for cell in cells) + " |"


def describe_names() -> Iterator[str]:
    """Lines of Markdown: the public names of the package in groups, each documented by its docstring."""
    import cadsurgery

    groups = {title: group.split() for title, group in GROUPS.items()}
    names = {name for name in cadsurgery.__all__ if not inspect.ismodule(getattr(cadsurgery, name))}
    if others := sorted(names.difference(*groups.values())):
        groups["Others"] = others
    for title, group in groups.items():
        yield f"## {title}\n"
        yield from _document("cadsurgery", group)


def describe_modules() -> Iterator[str]:
    """Lines of Markdown: what the public modules define, without the names that the package itself has."""
    import cadsurgery

    values = {name: getattr(cadsurgery, name) for name in cadsurgery.__all__}
    top = {id(value) for value in values.values()}
    for name, module in values.items():
        if inspect.ismodule(module):
            defined = [one for one in _defined(module) if id(getattr(module, one)) not in top]
            yield f"### cadsurgery.{name}\n"
            yield (module.__doc__ or "").partition("\n")[0] + "\n"
            yield from _document(f"cadsurgery.{name}", defined)


def _defined(module: Any) -> list[str]:
    """Public functions and classes that a module, or the module that it stands for, defines."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]
    values = {name: getattr(module, name) for name in names}
    room = module.__name__
    if room.count(".") == 1 and not hasattr(module, "__path__"):  # stands for a module of a room
        room = re.search(r"`(cadsurgery\.[\w.]+)`", module.__doc__)[1]
    own = [name for name, value in values.items() if _is_of(value, room)]
    return own or [name for name, value in values.items() if _is_of(value, room.rpartition(".")[0])]


def _is_of(value: Any, place: str) -> bool:
    is_code = inspect.isclass(value) or inspect.isfunction(value)
    return is_code and bool(value.__doc__) and value.__module__.startswith(place)


def _document(module: str, names: Iterable[str]) -> Iterator[str]:
    """A block of reStructuredText, which is what the directives of autodoc write."""
    values = {name: getattr(importlib.import_module(module), name) for name in names}
    if not values:
        return
    yield "```{eval-rst}"
    for name, value in values.items():
        yield f".. auto{'class' if inspect.isclass(value) else 'function'}:: {module}.{name}"
        if inspect.isclass(value):
            yield "   :members:"
        yield ""
    yield "```\n"
