"""Update the tables of docs/speed.md from the output of `cadsurgery bench --json`.

    python benchmarks/speed_report.py

A report of `cadsurgery bench --isa avx2,avx512` gets a table for each instruction set, below its name and caps.

Reads docs/bench/*.json and docs/bench/*.txt (output of the other benchmarks, with their conditions first), and
replaces the text between `<!-- NAME -->` and `<!-- end -->` in docs/speed.md, where NAME is the name of a file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cadsurgery.support.processor import sets_in_words

DOCS = Path(__file__).parents[1] / "docs"


def tables(report: dict[str, Any]) -> str:
    """Return the conditions as text, then a table of all networks; one table for each instruction set."""
    parts = [f"{setting(report)}."]
    caps = report.get("caps") or {"": {}}
    for name, sets in caps.items():
        if name:
            parts.append(f"**{name}**: {sets_in_words(sets)}.")
        parts.append(table([one for one in report["networks"] if not name or one["isa"] == name]))
    return "\n\n".join([*parts, *report.get("notes", ())])


def setting(report: dict[str, Any]) -> str:
    """Describe what was measured, with which processor, instruction sets, threads and versions."""
    height, width = report["image"][2:]
    numbers = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"{height} x {width}, {report['dtype']}, mask `{report['mask']}`, "
        f"best of {report['rounds']} interleaved rounds, "
        f"{report['device']}; {report['threads']} threads; {numbers}; commit {report.get('commit', '')[:7]}, "
        f"{report['date'][:10]}"
    )


def table(networks: list[dict[str, Any]]) -> str:
    """Return one table of all networks."""
    remembers = networks[0]["dense_high"]["memory_mib"] is not None
    columns = [
        "network",
        "fill",
        "active",
        "of high's MACs",
        "ms (median)",
        "of the line",
        "MACs ratio realised",
    ]
    columns += ["faster than high", *(["memory, of high"] if remembers else [])]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for network in networks:
        high, low = network["dense_high"], network["dense_low"]
        name = f"{network['model']} {network['output_stride'][0]} -> {network['output_stride'][1]}"
        twins = f"dense high {high['milliseconds']:.0f} ms, dense low {low['milliseconds']:.0f} ms"
        blank = " |" * (len(columns) - 2)
        lines.append(f"| **{name}** | {twins} |{blank}")
        for row in network["rows"]:
            cells = [
                "",
                network["fill"],
                f"{row['active_fraction']:.2f}",
                f"{row['macs'] / high['macs']:.2f}",
                f"{row['milliseconds']:.0f} ({row['milliseconds_median']:.0f})",
                f"{row['law_ratio']:.2f}",
                f"{row['realised']:.2f}",
                f"{row['speedup']:.2f}x",
                *([f"{row['memory_ratio']:.2f}"] if remembers else []),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace each table."""
    page = DOCS / "speed.md"
    text = page.read_text(encoding="utf-8")
    for path in sorted([*(DOCS / "bench").glob("*.json"), *(DOCS / "bench").glob("*.txt")]):
        content = path.read_text(encoding="utf-8")
        made = tables(json.loads(content)) if path.suffix == ".json" else f"```text\n{content.rstrip()}\n```"
        pattern = re.compile(rf"(<!-- {path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if count != 1:
            raise SystemExit(
                f"docs/speed.md has no place for {path.name}: <!-- {path.stem} --> ... <!-- end -->"
            )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
