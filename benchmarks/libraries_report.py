"""Write docs/data/libraries.md from the rows of a check of other libraries' networks.

python -m benchmarks.zoo.libraries --out benchmarks/zoo/libraries.jsonl    # continues an interrupted check
python -m benchmarks.libraries_report
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from benchmarks.zoo.as_they_are import COMPARISONS, FLOOR, USEFUL_SHARE
from benchmarks.zoo_report import short, table, write_page

Row = dict[str, Any]
ROWS = Path(__file__).parent / "zoo" / "libraries.jsonl"
LIMIT = "150 to 400"  # seconds for one network on a busy machine

# Names under which the libraries are known, in the order of the table.
TITLES = {
    "transformers": "transformers",
    "ultralytics": "ultralytics",
    "smp": "segmentation_models_pytorch",
    "monai": "MONAI",
    "nnunet": "nnU-Net's architectures",
    "doctr": "docTR",
    "easyocr": "EasyOCR",
    "kornia": "kornia",
    "spandrel": "spandrel",
    "torchgeo": "torchgeo",
    "controlnet_aux": "controlnet-aux",
}


def is_exact(row: Row, comparison: str) -> bool | None:
    """True if a comparison was made and within its tolerance, False if not within; None if it was not made."""
    value = row.get("compared", {}).get(comparison)
    if value is None or (isinstance(value, str) and not value.startswith(("fails", "inf"))):
        return None
    wrong = row.get("why", "") if row["result"] == "broken" else ""
    return not (f"{comparison} is not exact" in wrong or str(value).startswith(("fails", "inf")))


def is_useful(row: Row) -> bool:
    """True if everything at the floor takes clearly less work than the network as given, or if that is dense at an
    output stride of 8 or less from where its own map is high on."""
    share = row.get("floor_share")
    return (isinstance(share, float) and share < USEFUL_SHARE) or (
        row.get("given_stride") == 8 and row.get("output_stride", [0])[0] == 8
    )


def libraries(rows: list[Row]) -> str:
    """Return a line for each library."""
    lines = []
    for name, members in _by_library(rows).items():
        checked = [row for row in members if row["result"] != "not built"]
        done = [row for row in checked if row["result"] in ("converts", "broken") and "compared" in row]
        exact = []
        for comparison in COMPARISONS:
            found = [outcome for row in done if (outcome := is_exact(row, comparison)) is not None]
            exact.append(f"{sum(found)} of {len(found)}" if found else "")
        files = [row["file"] for row in done if "file" in row]
        written = sum(file == "written" for file in files)
        package, version = next(iter(next(row for row in members if row.get("versions"))["versions"].items()))
        lines.append(
            (
                f"{TITLES[name]} ({package} {version})"
                if package != TITLES[name]
                else f"{package} {version}",
                len(checked),
                len(done),
                sum("needs_example" in row for row in done),
                *exact,
                sum(map(is_useful, done)),
                f"{written} of {len(files)}" if files else "",
            )
        )
    header = ("library", "tried", "converted", "with an example", *COMPARISONS, "useful", "file")
    return table(header, lines)


def not_converted(rows: list[Row]) -> str:
    """Return a line for each network that was not converted, or is not exact, with the reason."""
    lines = []
    for name, members in _by_library(rows).items():
        for row in members:
            if row["result"] != "converts":
                why = " ".join(filter(None, (row.get("what", ""), row.get("where", ""), row.get("why", ""))))
                network = row["model"].partition(":")[2]
                lines.append(
                    (TITLES[name], f"`{network}`", row["result"], short(why.replace("\n", " "), 220))
                )
    return table(("library", "network", "result", "why"), lines) if lines else "None."


def networks(rows: list[Row]) -> str:
    """Return a section for each library with a line for each network that was converted."""
    sections = []
    for name, members in _by_library(rows).items():
        lines = []
        for row in members:
            if "compared" not in row:
                continue
            strides = "{} to {}".format(*row["output_stride"])
            share = row.get("floor_share", "")
            compared = [_in_words(row["compared"].get(comparison, "")) for comparison in COMPARISONS]
            notes = [f"converts its {row['part']}"] if row.get("part") else []
            notes += ["with floors alone"] if row.get("floors_alone") else []
            notes += ["with attention"] if row.get("kind") == "attention" else []
            notes += [f"example: {short(row['needs_example'], 60)}"] if row.get("needs_example") else []
            lines.append((f"`{row['model'].partition(':')[2]}`", strides, *compared, share, ", ".join(notes)))
        if lines:
            header = ("network", "strides", *COMPARISONS, "at the floor", "notes")
            sections.append(f"### {TITLES[name]}\n\n{table(header, lines)}")
    return "\n\n".join(sections)


def _in_words(value: float | str) -> str:
    return f"{value:.0e}" if isinstance(value, float) else short(value, 60)


def _by_library(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["family"]].append(row)
    return {name: sorted(found[name], key=lambda row: row["model"]) for name in TITLES if name in found}


def document(rows: list[Row], setting: Row) -> str:
    """Return the page."""
    checked = [row for row in rows if row["result"] != "not built"]
    plain = [row for row in checked if row.get("kind") != "attention"]
    done = [row for row in checked if "compared" in row]
    counts = Counter(row["result"] for row in rows)
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    unbuilt = sorted(row["model"] for row in rows if row["result"] == "not built")
    exact = sum(row["result"] == "converts" for row in plain)
    by_part = sum(bool(row.get("part")) for row in done)
    listed = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    return f"""# Other libraries: figures

What to expect, in plain words: [Networks of other libraries](../libraries.md).

{len(checked)} networks of {len(_by_library(rows))} libraries were built by their libraries' own classes, with random
weights and few channels, and converted without a wrapper: `cs.adaptify(model, "edges", outputs="native")`, on the
built-in images. {len(done)} were converted, {by_part} of them by a part inside them that reads the image, such as their
encoder: torch.fx cannot follow these whole. {len(plain)} are convolutional ([the zoo](zoo.md) has the criterion) or
could not be traced; {exact} of these ({exact / len(plain):.0%}) converted with every comparison exact. Networks of the
list of builders without a row were not tried. This page is generated; nothing in it is written by hand.

`python -m benchmarks.zoo.libraries --out benchmarks/zoo/libraries.jsonl` (of the libraries that are installed; it
continues an interrupted check), then `python -m benchmarks.libraries_report`.
{versions}; {setting["machine"]}; commits {commits}.

{libraries(rows)}

- *tried*: built and given to the conversion, which had {LIMIT} seconds for it and all comparisons. *converted*: a
  network came back, whose laws the conversion had verified. *with an example*: only after an `example_input`.
- The comparisons count the networks for which they are exact, of those for which they could be made: to 1e-4 in
  float32, or in float64 where a deep random network amplifies rounding.
- *own*: the call's outputs at the network's own level, in the type that the library returns. *high*: everything high
  is the dense network of that output stride. *floors*: with `coarsest={FLOOR}`, everything high is the network as
  given, and everything at the floor its dense emulation. *odd*: *own* at an odd size; many decoders take none. *batch*:
  two images after a conversion on one. *float64*: *own* in float64, to 1e-9. A network without strides converts with
  `coarsest={FLOOR}` alone.
- *useful*: everything at the floor takes less than {USEFUL_SHARE} of the work of the network as given, or the network
  is given at output stride 8. The others gain little by a conversion.
- *file*: an ONNX file was written and compared in ONNX Runtime, of one or two networks of each library.

Results: {listed}.
{"Not built here: " + ", ".join(f"`{name}`" for name in unbuilt) + "." if unbuilt else ""}

## Not converted, or not exact

{not_converted([row for row in rows if row["result"] != "not built"])}

## Networks

Errors are relative to the largest value of the output. *at the floor*: the work of everything at the floor, relative
to the network as given.

{networks(rows)}
"""


def main() -> None:
    """Write the page."""
    write_page(ROWS, "libraries.md", document)


if __name__ == "__main__":
    main()
