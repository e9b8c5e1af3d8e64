"""Write docs/data/zoo.md from the rows of a full check of the zoo.

python -m benchmarks.zoo.check --output cadsurgery/tasks/zoo.jsonl      # the full run; continues an interrupted run
python benchmarks/zoo_report.py
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.zoo.corpus import family_of
from cadsurgery.data.networks import list_models
from cadsurgery.tasks.zoo_record import RECORDED, read_rows

Row = dict[str, Any]
DOCS = Path(__file__).parents[1] / "docs" / "data"
RESULTS = ("converts", "refused", "not checked", "not built", "broken")
KINDS = {
    "cnn": "convolutional",
    "attention": "with attention or another mixing of positions",
    "not traced": "not traced by torch.fx",
    "": "not built or not checked",
}


def by_family(rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by library and module, in alphabetical order."""
    found = defaultdict(list)
    for row in rows:
        found[row["family"]].append(row)
    return dict(sorted(found.items()))


def table(header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """Format a Markdown table."""
    cells = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in cells)


def outcomes(rows: list[Row]) -> str:
    """Return a table of kinds of networks against results."""
    lines = []
    for kind, words in KINDS.items():
        counts = Counter(row["result"] for row in rows if row.get("kind", "") == kind)
        if counts:
            lines.append((words, sum(counts.values()), *(counts[result] for result in RESULTS)))
    return table(("kind", "networks", *RESULTS), lines)


def families_table(rows: list[Row]) -> str:
    """Return a line per family: how many convert, their usual strides, the share of the work in the region."""
    lines = []
    for family, members in by_family(rows).items():
        done = [row for row in members if row["result"] == "converts"]
        strides = Counter("{} to {}".format(*row["output_stride"]) for row in done)
        share = f"{statistics.median(row['share_after_first_stage'] for row in done):.0%}" if done else ""
        why = Counter(row.get("why", "").partition(";")[0] for row in members if row["result"] != "converts")
        reason = why.most_common(1)[0][0] if why else ""
        lines.append(
            (
                family,
                len(members),
                len(done),
                ", ".join(s for s, _ in strides.most_common(2)),
                share,
                short(reason),
            )
        )
    return table(
        ("family", "networks", "convert", "output strides", "in the region", "why the others do not"), lines
    )


def short(text: str, length: int = 110) -> str:
    """Shorten a reason."""
    return text if len(text) <= length else f"{text[:length].rstrip()}..."


def exceptions(rows: list[Row]) -> str:
    """List every convolutional network that does not convert, with the reason."""
    found = [row for row in rows if row.get("kind") == "cnn" and row["result"] != "converts"]
    lines = [
        (row["model"], row["result"], row.get("where", ""), short(row.get("why", ""), 200)) for row in found
    ]
    return table(("network", "result", "where", "why"), lines) if lines else "None."


def unchecked(rows: list[Row]) -> str:
    """List networks that were not checked or built, with the reason."""
    why = defaultdict(list)
    for row in rows:
        if row["result"] in ("not checked", "not built"):
            why[short(row["why"], 90)].append(row["model"])
    lines = [f"- {reason}: {', '.join(names)}" for reason, names in sorted(why.items())]
    missing = Counter(family_of(name) for name in set(list_models()) - {row["model"] for row in rows})
    if missing:
        named = ", ".join(f"{family} ({count})" for family, count in sorted(missing.items()))
        lines.append(f"- not part of this run, {sum(missing.values())} names: {named}")
    return "\n".join(lines) or "None."


def ends(rows: list[Row]) -> str:
    """List the operations that end the region in networks that convert."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        for end in row.get("dense", [])[:1]:
            found[(end["operation"].partition(" ")[0], end["why"])].append(row)
    ranked = sorted(found.items(), key=lambda item: -len(item[1]))[:15]
    lines = [
        (
            operation,
            short(why),
            len(members),
            members[0]["model"],
            f"{statistics.median(r['dense'][0]['share'] for r in members):.0%}",
        )
        for (operation, why), members in ranked
    ]
    return table(("operation", "why", "networks", "for example", "MACs dense from there, median"), lines)


def parity(rows: list[Row]) -> str:
    """Count the networks compared at sizes of both parities; some accept few sizes."""
    compared = [row["sizes"] for row in rows if row.get("sizes")]
    both = sum({length % 2 for size in sizes for length in size} == {0, 1} for sizes in compared)
    older = sum(row["result"] == "converts" and "sizes" not in row for row in rows)
    text = f"{both} of {len(compared)} at odd and even sizes, the others at the sizes they take"
    return text + (f"; {older} rows are of an earlier run, without resized outputs" if older else "")


def document(rows: list[Row], setting: Row) -> str:
    """Return the page."""
    networks = [row for row in rows if row.get("kind") == "cnn"]
    done = [row for row in networks if row["result"] == "converts"]
    hybrids = [row for row in rows if row.get("kind") == "attention"]
    median = statistics.median(row["share_after_first_stage"] for row in done)
    double = sum(row.get("dtype") == "float64" for row in rows)
    broken = sum(row["result"] == "broken" for row in rows)
    commits = ", ".join(
        f"{name} ({count} rows)" for name, count in Counter(row["commit"] for row in rows).most_common()
    )
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    exact = sum(row["result"] == "converts" for row in hybrids)
    return f"""# The zoo: figures

What to expect, in plain words: [Will a known network convert?](../zoo.md)

{len(rows)} networks of torchvision and timm were built with random weights and random statistics, converted with their
default output strides, and compared, batches of two: law 1 (at the network's own level the outputs of the call are the
original's, a map that is returned at the fine size at the network's own samples; {parity(rows)}), law 2 (every
other uniform level is the dense network at that stride; everything high, read at the network's own positions,
is the original where no global operation mixes positions) and law 5 (a batch with a level map per image is its images
one by one), to 1e-4 in float32, or to 1e-9 in float64 where a deep random network amplifies rounding
({double} networks). Families that were not part of the run are named below. A name that both libraries have is
torchvision's. This page is generated; nothing in it is written by hand.

`python -m benchmarks.zoo.check --output cadsurgery/tasks/zoo.jsonl`, then `python benchmarks/zoo_report.py`.
{versions}; {setting["machine"]}; commits {commits}.

**{len(done)} of {len(networks)} convolutional networks convert ({len(done) / len(networks):.1%});
{broken} rows break a law.**
In the median of them {median:.0%} of the multiply-accumulates from the first adaptive operation on are in the region.

*Criterion.* A network is convolutional if, traced by torch.fx, none of its operations joins positions of the image
otherwise than by a window, a mean or maximum over the image, or resizing: no matrix product, attention, recurrence,
roll, unfold or Fourier transform on values of more than two axes, no linear layer over positions, no leaf module of a
library that torch.fx cannot look into. Detectors count by the backbone that is converted. {exact} of the
{len(hybrids)} networks with such operations convert all the same, with these as barriers or, where they are sums over
positions (attention between channels, pooling by attention), exactly.

{outcomes(rows)}

![Every network as a square, by family; those that do not convert in orange](../pictures/zoo.png)

## Convolutional networks that do not convert

{exceptions(rows)}

## What ends the region in networks that convert

{ends([row for row in rows if row["result"] == "converts"])}

## Not checked

{unchecked(rows)}

## Families

In the region: of the multiply-accumulates from the first adaptive operation on, the median over the family's networks
that convert. `cadsurgery list PATTERN` shows each network; `--json` with errors, strides, reasons and seconds.

{families_table(rows)}
"""


def write_page(recorded: Path, page: str, document: Callable[[list[Row], Row], str]) -> None:
    """Write a page of `docs/data` from recorded rows.

    Args:
        recorded: JSON Lines file of the rows; its first line contains versions and machine.
        page: the page's file name.
        document: makes the page of the rows, by name, and of the first line.
    """
    rows = sorted(read_rows(recorded), key=lambda row: row["model"])
    setting = json.loads(recorded.read_text(encoding="utf-8").splitlines()[0])
    (DOCS / page).write_text(document(rows, setting), encoding="utf-8")


def main() -> None:
    """Write the page."""
    write_page(RECORDED, "zoo.md", document)


if __name__ == "__main__":
    main()
