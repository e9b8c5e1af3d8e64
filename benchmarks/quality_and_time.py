"""Measure quality against time of whole networks, trained, with each instruction set.

    python -m benchmarks.quality_and_time DATA FOLDER [--pictures 20] [--minutes 3] [--isa avx2,avx512vnni]
    python -m benchmarks.quality_and_time --table

DATA is the folder with the data and weights that the recipes name. Each network, instruction set and precision gets a
run of `recommend` in a process of its own, in FOLDER; an interrupted one goes on. What they measured is written to
docs/quality.json, and the tables of docs/data/results.md are made from it, as with --table alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.instruction_sets import environment_of

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "quality.json", DOCS / "data" / "results.md"
NETWORKS, PRECISIONS = ("camvid-8", "espnet-8", "voc-8", "voc-16"), ("float32",)


def measure(data: Path, folder: Path, name: str, precision: str, pictures: int, minutes: float) -> None:
    """Run `recommend` for one network in this process."""
    from benchmarks.trained import NETWORKS as TRAINED
    from benchmarks.trained import spread
    from cadsurgery.tasks.recommend import recommend

    model, pictures_of = TRAINED[name](data)
    recommend(
        model,
        spread(pictures_of, pictures),
        limit=pictures,
        minutes=minutes,
        precision=precision,
        output=folder,
        step=lambda text, *_: print(name, precision, text, flush=True),
    )


def condensed(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the tables need of a report."""
    kept = (
        "commit",
        "device",
        "threads",
        "versions",
        "instruction_sets",
        "images",
        "image",
        "precision",
        "measure",
    )
    rows = [
        {
            "name": row["setting"]["name"],
            "kind": row["setting"]["kind"],
            "value": row["quality"]["value"],
            "change": row["quality"]["change"],
            "error": row["quality"]["error"],
            "images": row["quality"]["images"],
            "milliseconds": row["milliseconds"],
            "macs": row["macs"],
            "front": row["is_on_front"],
            "complete": row["is_complete"],
        }
        for row in report["rows"]
    ]
    return {name: report[name] for name in kept if name in report} | {
        "rows": rows,
        "chosen": report["chosen"],
    }


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Return the table of one network: settings on the front of a run, the network as given, all conversions."""
    known: dict[str, dict[str, dict[str, Any]]] = {}
    for key, run in runs.items():
        for row in run["rows"]:
            known.setdefault(row["name"], {})[key] = row
    kept = {
        name: rows
        for name, rows in known.items()
        if any(row["front"] or row["kind"] in ("given", "adaptive") for row in rows.values())
    }
    first = next(iter(runs.values()))
    lines = [
        f"| setting | MACs | {' | '.join(f'{key}: mIoU, ms' for key in runs)} |",
        f"|---|---|{'---|' * len(runs)}",
    ]
    given = first["rows"][0]["macs"]
    for name, rows in kept.items():
        macs = next(iter(rows.values()))["macs"] / given
        cells = [_cell(rows.get(key), runs[key]) for key in runs]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {macs:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, run: dict[str, Any]) -> str:
    if row is None:
        return ""
    time = f"{row['milliseconds']:.0f}"
    if row["kind"] == "given":
        quality = f"{100 * row['value']:.1f}"
    else:
        quality = f"{100 * row['change']:+.1f}" + (f" ({100 * row['error']:.1f})" if row["error"] else "")
    if not row["complete"]:
        return f"{quality}, {time}, dropped"
    marked = f"**{quality}, {time}**" if row["front"] else f"{quality}, {time}"
    return f"{marked} ←" if row["name"] == run["chosen"] else marked


def write_page() -> None:
    """Replace the tables in docs/data/results.md by those of docs/quality.json."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts: list[str] = []
    for name, runs in found.items():
        one = next(iter(runs.values()))
        size = "x".join(map(str, one["image"][1:]))
        conditions = "\n".join(
            textwrap.fill(
                f"- {key}: {run['device']}; {run['images']} pictures, commit `{run['commit']}`",
                100,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
            for key, run in runs.items()
        )
        parts.append(f"### {name}, pictures of {size}\n\n{table(runs)}\n\n{conditions}")
    text = PAGE.read_text(encoding="utf-8")
    block = "<!-- quality -->\n\n" + "\n\n".join(parts) + "\n\n<!-- end -->"
    PAGE.write_text(
        re.sub("<!-- quality -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL), "utf-8"
    )


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--isa", default="avx2,avx512vnni")
    parser.add_argument("--table", action="store_true", help="make the tables from docs/quality.json alone")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "PRECISION"), help="one run in this process")
    options = parser.parse_args()
    if options.one:
        measure(options.data, options.folder, *options.one, options.pictures, options.minutes)
        return
    if not options.table:
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        for name in NETWORKS:
            for precision in PRECISIONS:
                for cap in options.isa.split(","):
                    folder = options.folder / f"{name}-{cap}-{precision}"
                    asked = [str(options.data), str(folder), "--one", name, precision]
                    limits = ["--pictures", str(options.pictures), "--minutes", str(options.minutes)]
                    subprocess.run(
                        [sys.executable, "-m", "benchmarks.quality_and_time", *asked, *limits],
                        env={**os.environ, **environment_of(cap)},
                        check=True,
                    )
                    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
                    found.setdefault(name, {})[f"{cap}, {precision}"] = condensed(report)
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page()


if __name__ == "__main__":
    main()
