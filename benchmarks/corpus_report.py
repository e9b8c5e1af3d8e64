"""Write docs/data/corpus.md from the rows of full checks of the corpus and of the packages.

python -m benchmarks.zoo.check --corpus --output tests/corpus/rows.jsonl       # continues an interrupted check
pip install cadsurgery[corpus]
python -m benchmarks.zoo.check packages --corpus --output tests/corpus/packages/rows.jsonl
python -m benchmarks.corpus_report
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.zoo.corpus import read_corpus
from benchmarks.zoo_report import short, table
from cadsurgery.tasks.zoo_record import read_rows

Row = dict[str, Any]
LEAST_SHARE = 0.3


def converts(row: Row) -> bool:
    """True if a network converts and its outputs were compared."""
    return row["result"] == "converts" and row["outputs_compared"] > 0


def works(row: Row) -> bool:
    """True if enough of its work runs on elements."""
    return converts(row) and row["share_in_region"] >= LEAST_SHARE


def criteria(named: dict[str, list[Row]]) -> str:
    """Summarise the convolutional networks of the corpus and of the packages, one line each."""
    lines = []
    for name, rows in named.items():
        count = len(rows)
        done, enough = sum(map(converts, rows)), sum(map(works, rows))
        idle = sum(row["result"] == "converts" and not row["effect"] for row in rows)
        shares = (f"{done} ({done / count:.0%})", f"{enough} ({enough / count:.0%})") if count else ("", "")
        broken = sum(row["result"] == "broken" for row in rows)
        refused = sum(row["result"] not in ("converts", "broken") for row in rows)
        lines.append((name, count, *shares, idle, refused, broken))
    header = (
        *(
            "",
            "networks",
            "convert, outputs compared",
            f"at least {LEAST_SHARE:.0%} of the MACs in the region",
        ),
        *("of these without effect, announced", "refused", "broken or silent"),
    )
    return table(header, lines)


def outcome(row: Row) -> str:
    """Return the result in a word or two."""
    if row["result"] == "converts" and not row["effect"]:
        return "without effect"
    return f"converts ({row['part']})" if row.get("part") else row["result"]


def reason(row: Row) -> str:
    """Return why it is refused or broken; otherwise what ends the region, if much of the network is dense."""
    if row["result"] != "converts":
        return short(" ".join(row.get(part, "") for part in ("what", "where", "why")).strip(), 160)
    ends = [end for end in row["dense"] if end["share"] >= 0.005]
    return "; ".join(f"{end['operation']}: {short(end['why'], 70)} ({end['share']:.0%})" for end in ends[:1])


def networks(rows: list[Row]) -> str:
    """Return a line for each network of a family."""
    lines = []
    for row in rows:
        strides = "{} to {}".format(*row["output_stride"]) if "output_stride" in row else ""
        share = f"{row['share_in_region']:.0%}" if "share_in_region" in row else ""
        seconds = row.get("seconds_to") or {}
        took = " ".join(f"{seconds[part]:.1f}" for part in ("trace", "plan", "convert") if part in seconds)
        name = row["model"].partition(":")[2]
        lines.append((f"`{name}`", row.get("about", ""), outcome(row), strides, share, took, reason(row)))
    header = (
        "network",
        "stands for",
        "result",
        "strides",
        "in the region",
        "trace, plan, convert [s]",
        "why",
    )
    return table(header, lines)


def idioms(rows: list[Row], words: dict[str, str]) -> str:
    """Return a table of idioms against results."""
    lines = []
    for idiom, meaning in words.items():
        members = [row for row in rows if idiom in row.get("idioms", [])]
        lines.append((idiom, meaning, len(members), sum(map(converts, members)), sum(map(works, members))))
    return table(
        ("idiom", "what users write", "networks", "convert", f"{LEAST_SHARE:.0%} in the region"), lines
    )


def families(rows: list[Row]) -> str:
    """Return a section for each file."""
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[row["family"]].append(row)
    return "\n\n".join(f"### {name}\n\n{networks(found)}" for name, found in members.items())


def document(own: list[Row], packages: list[Row], words: dict[str, str], setting: Row) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    commits = ", ".join(sorted({row["commit"] for row in own + packages}))
    plain = [row for row in packages if row.get("kind") != "attention"]
    counted = criteria({"corpus": own, "packages": plain})
    return f"""# As users write them: figures

What to expect, in plain words: [Networks as users write them](../corpus.md).

[tests/corpus](../../tests/corpus) has {len(own)} small networks of our own writing, each standing for ways in
which people write networks for dense prediction: it is the description of what is supported, and this page is
what a check of each found. Below are {len(packages)} networks of packages, at their real widths. This page is
generated; nothing in it is written by hand.

Each network gets random weights and random statistics, is converted as a user would (`cs.adaptify(net)`, on the
built-in images; what takes more than an image gets an example of its call), and compared, batches of two: the outputs
of the call at the network's own level are the original's (law 1), at the example's size, at one of the other parity,
and at an odd and an even size more if it takes them; the other uniform levels are the dense networks of their strides
(law 2); a batch with a level map per image is its images one by one (law 5); law 1 again with other weights loaded into
both by `load_state_dict`; `optimize()` at random levels; to 1e-4 in float32, or to 1e-9 in float64 where float32
amplifies rounding. A network converts *without effect* if no mask can change what comes out, or less than 1 % of its
work is in the region; that is said by a warning, and counted as broken if it is not. The weights are random, which
hides effects: in some untrained decoders the deepest maps reach the output only as rounding.

`python -m benchmarks.zoo.check --corpus --output tests/corpus/rows.jsonl`, `python -m benchmarks.zoo.check packages
--corpus --output tests/corpus/packages/rows.jsonl` (with `pip install cadsurgery[corpus]`), then
`python -m benchmarks.corpus_report`.
{versions}; {setting["machine"]}; commits {commits}.

{counted}

Of the packages, {len(packages) - len(plain)} networks with attention between positions are not counted here.

## Idioms

{idioms(own, words)}

## The corpus

{families(own)}

## Packages

{families(packages)}
"""


def main() -> None:
    """Write the page."""
    root = Path(__file__).parents[1]
    corpus = root / "tests" / "corpus"
    own = corpus / "rows.jsonl"
    order = {subject.name: place for place, subject in enumerate(read_corpus(corpus))}
    rows = sorted(read_rows(own), key=lambda row: order[row["model"]])
    foreign = sorted(read_rows(corpus / "packages" / "rows.jsonl"), key=lambda row: row["model"])
    words = sys.modules["corpus_blocks"].IDIOMS
    setting = json.loads(own.read_text(encoding="utf-8").splitlines()[0])
    (root / "docs" / "data" / "corpus.md").write_text(
        document(rows, foreign, words, setting), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
