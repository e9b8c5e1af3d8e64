"""Write the figures of README.md and docs/index.md: each is in docs/figures.json, and stands in no other way there.

    python -m benchmarks.front_pages [--example]

Collects what the benchmarks recorded into docs/figures.json, and replaces the text between `<!-- figures: NAME -->` and
`<!-- end -->` on both pages. With --example the README's six lines run, too, for the work that they print.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cadsurgery.tasks.zoo_record import RECORDED, read_rows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures.json"
PAGES = (ROOT / "README.md", DOCS / "index.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KEPT = 0.34  # of the picture has fine maps
_CAMVID = {
    "as_given": "everything high",
    "detail_13": "detail, budget 0.13",
    "detail_10": "detail, budget 0.1",
    "coarse": "everything low",
}
_EMPTY_COMMIT, _EMPTY_DATE = "4ffedf7", "2026-11-27"

Figures = dict[str, Any]


def collect(example: float) -> Figures:
    """Return the figures of both pages, rounded as they are shown, with what they are from.

    Args:
        example: the work that the README's six lines print.
    """
    return {
        "times": _times(),
        "empty": _empty(),
        "camvid": _camvid(),
        "hero": _hero(),
        "zoo": _zoo(),
        "libraries": _libraries(),
        "example": {"from": "README.md, six lines", "work": example},
    }


def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _times() -> Figures:
    """Times of whole networks with a third of the picture fine, by docs/bench/both.json with AVX-512."""
    report = _read("docs/bench/both.json")
    networks: Figures = {}
    for one in report["networks"]:
        if one["isa"] != "avx512" or one["model"] not in ("deeplabv3_resnet101", "resnet50"):
            continue
        twins = (one["dense_high"], one["dense_low"])
        given = min(twins, key=lambda twin: abs(twin["macs"] - one["given"]["macs"]))
        row = next(row for row in one["rows"] if row["fraction"] == KEPT)
        networks[one["model"]] = {
            "given": round(given["milliseconds"]),
            "converted": round(row["milliseconds"]),
            "of_given": round(row["milliseconds"] / given["milliseconds"], 2),
            "times_as_fast": round(given["milliseconds"] / row["milliseconds"], 1),
            "work": round(row["macs"] / given["macs"], 2),
        }
    machine = f"AMD EPYC ({report['processor']['family'].removeprefix('AuthenticAMD ')}, AVX-512)"
    return {
        "from": "docs/bench/both.json",
        "machine": machine,
        "threads": report["threads"],
        "date": report["date"][:10],
        "commit": report["commit"][:7],
        "pixels": report["image"][2:],
        "kept": KEPT,
        "networks": networks,
    }


def _empty() -> Figures:
    """A U-Net with .3 of a picture kept and 32 pixels elsewhere, from the page's table."""
    places = (DOCS / "data" / "empty-pictures.md", DOCS / "howto" / "empty-pictures.md")
    text = next(path for path in places if path.is_file()).read_text(encoding="utf-8")
    given, table = re.search(
        r"batch norm folded, channels_last\): ([\d,]+) and(.*?)\n\n[^|]", text, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    work, time = re.search(r"^\| \.3 \| (\.\d+) \| (\.\d+) \|", table, re.MULTILINE).groups()  # type: ignore[union-attr]
    return {
        "from": "the page on mostly empty pictures, benchmarks/floor_speed.py",
        "machine": "Intel Xeon (family 6 model 167, AVX-512)",
        "date": _EMPTY_DATE,
        "commit": _EMPTY_COMMIT,
        "kept": 0.3,
        "given": int(given.replace(",", "")),
        "of_given": float(time),
        "times_as_fast": round(1 / float(time), 1),
        "work": float(work),
    }


def _camvid() -> Figures:
    """Accuracy and work of the network of recipes/camvid_mobilenetv2 on all test pictures."""
    folder = "recipes/camvid_mobilenetv2"
    report = _read(f"{folder}/results.json")
    rows = {row["label"]: row for row in report["rows"]["guided 8-16 given"]}
    dense = next(row for row in report["rows"]["dense"] if row["label"] == "dense network, output stride 16")
    page = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    (work,) = re.findall(
        r"^\| given +\| dense network, output stride 16 \|.* (0\.\d+) \|", page, re.MULTILINE
    )
    found = {
        key: {"miou": round(100 * rows[label]["miou"], 2), "work": round(rows[label]["macs_of_high"], 2)}
        for key, label in _CAMVID.items()
    }
    found["dense_16"] = {"miou": round(100 * dense["miou"], 2), "work": round(float(work), 2)}
    for row in found.values():
        row["lost"] = round(found["as_given"]["miou"] - row["miou"], 1)
    return {"from": f"{folder}/results.json", "pictures": report["images"], "commit": "a4f7c33", **found}


def _hero() -> Figures:
    report = _read("docs/pictures/hero.json")
    return {
        "from": "docs/pictures/hero.json",
        "machine": "Intel Xeon (family 6 model 106, AVX-512)",
        "date": report["date"][:10],
        "commit": report["commit"],
        **{name: round(number) for name, number in report["milliseconds"].items()},
    }


def _zoo() -> Figures:
    rows = [row for row in read_rows(RECORDED) if row.get("kind") in ("cnn", "attention")]
    checked = [row for row in rows if row["result"] in ("converts", "refused", "broken")]
    found: Figures = {"from": "cadsurgery/tasks/zoo.jsonl"}
    for kind, name in (("cnn", "convolutional"), ("attention", "with_attention")):
        results = [row["result"] for row in checked if row["kind"] == kind]
        found[name] = {"checked": len(results), "converted": results.count("converts")}
    return found


def _libraries() -> Figures:
    path = ROOT / "benchmarks" / "zoo" / "libraries.jsonl"
    results = [json.loads(line).get("result") for line in path.read_text(encoding="utf-8").splitlines()]
    tried = [one for one in results if one in ("converts", "refused", "not checked")]
    return {
        "from": "benchmarks/zoo/libraries.jsonl",
        "tried": len(tried),
        "converted": tried.count("converts"),
    }


def run_example() -> float:
    """Run the README's six lines, and return the work that they print."""
    code = re.search(r"## Six lines\n\n```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    if code is None:
        raise SystemExit("README.md has no code below its heading Six lines.")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code[1], "README.md", "exec"), {"__name__": "readme"})
    return float(printed.getvalue().split()[0])


# -- the blocks ----------------------------------------------------------------------------------------


def _first(figures: Figures, _: str) -> str:
    fast = figures["times"]["networks"]["deeplabv3_resnet101"]["times_as_fast"]
    hero = figures["hero"]
    return (
        f"**Is it for you?** A dilated segmentation network on a CPU: {fast} times as fast (DeepLabv3-ResNet101), "
        f"for about {figures['camvid']['detail_10']['lost']} points of mIoU (CamVid);\nwide networks on mostly empty "
        f"pictures: {figures['empty']['times_as_fast']} times as fast (U-Net); pictures that do not fit into memory: "
        'any size, with the same\nresult; otherwise `cadsurgery recommend` says "do not convert".\n\n'
        '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="docs/pictures/hero-dark.jpg">\n'
        '  <img src="docs/pictures/hero.jpg" alt="A photo; the cells of its map, small where there is detail; the '
        f"person found by the network as it was ({hero['dense']} ms) and by the converted one "
        f'({hero["adaptive"]} ms)">\n</picture>'
    )


def _caption(figures: Figures, _: str) -> str:
    hero = figures["hero"]
    return (
        f"DeepLabv3 on MobileNetV2, trained on VOC: {hero['dense']} ms as given at output stride 8, "
        f"{hero['adaptive']} ms converted to 8 and 16. {hero['machine']}, {hero['date']}."
    )


def _example(figures: Figures, _: str) -> str:
    work = figures["example"]["work"]
    return f"It prints `{work:.2f} of the work of the network as it was`."


def _times_table(figures: Figures, docs: str) -> str:
    times, empty = figures["times"], figures["empty"]
    deeplab, resnet = (times["networks"][name] for name in ("deeplabv3_resnet101", "resnet50"))
    size = " x ".join(map(str, times["pixels"]))
    rows = [
        "| network, picture | as it was | converted | what it computes then |",
        "|---|---|---|---|",
        f"| DeepLabv3-ResNet101, {size} | {deeplab['given']} ms | {deeplab['of_given']:.2f} of the time "
        "| output stride 8 in a third of the picture, 32 elsewhere |",
        f"| U-Net (64 to 1024 channels), 512 x 512, mostly empty | {empty['given']} ms "
        f"| {empty['of_given']:.2f} of the time | its own maps in {empty['kept']:.1f} of the picture, "
        "output stride 32 elsewhere |",
        f"| ResNet-50, output stride 32, {size} | {resnet['given']} ms | {resnet['of_given']:.2f} of the time "
        "| *finer* maps, output stride 8 in a third: slower |",
    ]
    conditions = f"{_machines(figures)} ([how this was measured, and other processors]({docs}speed.md))."
    return "\n".join(rows) + "\n\n" + conditions


def _costs(figures: Figures, docs: str) -> str:
    camvid = figures["camvid"]
    return (
        f"{_times_table(figures, docs)}\n"
        f"Accuracy without retraining, MobileNetV2 on CamVid's {camvid['pictures']} test pictures: "
        f"{camvid['as_given']['miou']} mIoU as it was, {camvid['detail_10']['miou']} at "
        f"{camvid['detail_10']['work']:.2f} of the work ([results]({docs}results.md))."
    )


def _machines(figures: Figures) -> str:
    times, empty = figures["times"], figures["empty"]
    return (
        f"{times['threads']} threads, float32, `net.optimize()`: {times['machine']}, {times['date']}; the U-Net:\n"
        f"{empty['machine']}, {empty['date']}"
    )


def _accuracies(figures: Figures, docs: str) -> str:
    camvid = figures["camvid"]
    named = {
        "network as given, output stride 8": "as_given",
        "mask `detail`, 13 % of the patches fine": "detail_13",
        "mask `detail`, 10 % of the patches fine": "detail_10",
        "no mask, everything at output stride 16": "coarse",
        "dense network at output stride 16, without cadsurgery": "dense_16",
    }
    rows = [
        f"| {words} | {camvid[key]['miou']:.2f} | {camvid[key]['work']:.2f} |" for words, key in named.items()
    ]
    note = (
        f"All {camvid['pictures']} test pictures, commit {camvid['commit']} ([how this was measured]"
        f"({docs}results.md))."
    )
    return "\n".join(["| setting | mIoU | work |", "|---|---|---|", *rows]) + "\n\n" + note


def _converted(figures: Figures, docs: str) -> str:
    zoo, libraries = figures["zoo"], figures["libraries"]
    cnn, mixed = zoo["convolutional"], zoo["with_attention"]
    every = "All" if cnn["checked"] == cnn["converted"] else f"{cnn['converted']} of"
    return (
        f"{every} {cnn['checked']} convolutional networks of torchvision and timm convert, and so do "
        f"{mixed['converted']} of {mixed['checked']} that also have attention\n"
        f"([the zoo]({docs}zoo.md)), and {libraries['converted']} of {libraries['tried']} networks of "
        f"[other libraries]({docs}libraries.md)."
    )


BLOCKS: dict[str, Callable[[Figures, str], str]] = {
    "first": _first,
    "caption": _caption,
    "example": _example,
    "times": _times_table,
    "costs": _costs,
    "accuracies": _accuracies,
    "converted": _converted,
}


def with_figures(text: str, figures: Figures, docs: str) -> str:
    """Return a page with the text of its blocks.

    Args:
        text: the page.
        figures: what docs/figures.json holds.
        docs: where the documentation is, for links of the page: `docs/`, or nothing on a page there.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](figures, docs)}\n{found[3]}", text)


def main() -> None:
    """Write docs/figures.json and the blocks of both pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--example", action="store_true", help="run the README's six lines for their work")
    work = run_example() if parser.parse_args().example else _read("docs/figures.json")["example"]["work"]
    figures = collect(work)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_figures(text, figures, "" if page.parent == DOCS else "docs/"), encoding="utf-8")


if __name__ == "__main__":
    main()
