"""Put the tables of docs/speed.md in place from what `cadsurgery bench --json` wrote.

    python benchmarks/speed_report.py

Reads docs/bench/*.json and docs/bench/*.txt (what the other benchmarks print, their setting first), replaces
what stands between `<!-- NAME -->` and `<!-- end -->` in docs/speed.md, where NAME is a file's, and leaves the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def table(report: dict[str, Any]) -> str:
    """The setting in words, then one table with the networks below each other."""
    height, width = report["image"][2:]
    numbers = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    remembers = report["networks"][0]["dense_high"]["memory_mib"] is not None
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
    lines = [
        f"{height} x {width}, {report['dtype']}, mask `{report['mask']}`, "
        f"best of {report['rounds']} interleaved rounds, "
        f"{report['device']}, {report['threads']} threads; {numbers}; commit {report.get('commit', '')[:7]}, "
        f"{report['date'][:10]}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for network in report["networks"]:
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
    for path in sorted((DOCS / "bench").glob("*.*")):
        told = path.read_text(encoding="utf-8")
        made = table(json.loads(told)) if path.suffix == ".json" else f"```text\n{told.rstrip()}\n```"
        pattern = re.compile(rf"(<!-- {path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if count != 1:
            raise SystemExit(
                f"docs/speed.md has no place for {path.name}: <!-- {path.stem} --> ... <!-- end -->"
            )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
