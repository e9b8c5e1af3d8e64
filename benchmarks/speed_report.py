"""Update the tables of docs/data/speed.md from the output of `cadsurgery bench --json`.

    python benchmarks/speed_report.py

A report of `benchmarks.instruction_sets` gets a table for each instruction set, below its name and caps.

Reads docs/bench/*.json and docs/bench/*.txt (output of the other benchmarks, with their conditions first), and
replaces the text between `<!-- NAME -->` and `<!-- end -->` in docs/data/speed.md, where NAME is the name of a file.

Reports written before `given` was part of them get the work of the network as given counted here; networks of
benchmarks/networks.py are found with PYTHONPATH=benchmarks.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from cadsurgery.network.macs import dense_macs
from cadsurgery.support.processor import sets_in_words
from cadsurgery.tasks.open import original

DOCS = Path(__file__).parents[1] / "docs"


def tables(report: dict[str, Any]) -> str:
    """Return the conditions as text, then a table of all networks; one table for each instruction set."""
    parts = [textwrap.fill(f"{setting(report)}.", 100, break_on_hyphens=False, break_long_words=False)]
    caps = report.get("caps") or {"": {}}
    for name, sets in caps.items():
        if name:
            parts.append(f"**{name}**: {sets_in_words(sets)}.")
        networks = [one for one in report["networks"] if not name or one["isa"] == name]
        parts.append(table(networks, tuple(report["image"])))
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


def given(network: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, float, str]:
    """Return MACs, milliseconds and name of the dense network that is the network as given."""
    twins = {"dense high": network["dense_high"], "dense low": network["dense_low"]}
    macs = network.get("given", {}).get("macs")
    if macs is None:
        with torch.device("meta"):
            image = torch.empty(shape)
        macs = dense_macs(original(network["model"], "none")[0].eval(), image)
    name = next(name for name, twin in twins.items() if twin["macs"] == macs)
    return macs, twins[name]["milliseconds"], name


def table(networks: list[dict[str, Any]], shape: tuple[int, ...]) -> str:
    """Return one table of all networks, on images of a shape."""
    remembers = networks[0]["dense_high"].get("memory_mib") is not None
    columns = [
        "network",
        "fill",
        "active",
        "MACs of given",
        "ms (median)",
        "ms of given",
        "MACs of high",
        "of the line",
        "MACs ratio realised",
    ]
    columns += ["faster than high", *(["memory, of high"] if remembers else [])]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for network in networks:
        high, low = network["dense_high"], network["dense_low"]
        name = f"{network['model']} {network['output_stride'][0]} -> {network['output_stride'][1]}"
        macs, milliseconds, own = given(network, shape)
        twins = ", ".join(
            f"{key} {twin['milliseconds']:.0f} ms{' (as given)' * (key == own)}"
            for key, twin in (("dense high", high), ("dense low", low))
        )
        blank = " |" * (len(columns) - 2)
        lines.append(f"| **{name}** | {twins} |{blank}")
        for row in network["rows"]:
            cells = [
                "",
                network["fill"],
                f"{row['active_fraction']:.2f}",
                f"{row['macs'] / macs:.2f}",
                f"{row['milliseconds']:.0f} ({row['milliseconds_median']:.0f})",
                f"{row['milliseconds'] / milliseconds:.2f}",
                f"{row['macs'] / high['macs']:.2f}",
                f"{row['law_ratio']:.2f}",
                f"{row['realised']:.2f}",
                f"{row['speedup']:.2f}x",
                *([f"{row['memory_ratio']:.2f}"] if remembers else []),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Replace each table."""
    page = DOCS / "data" / "speed.md"
    text = page.read_text(encoding="utf-8")
    for path in sorted([*(DOCS / "bench").glob("*.json"), *(DOCS / "bench").glob("*.txt")]):
        content = path.read_text(encoding="utf-8")
        made = tables(json.loads(content)) if path.suffix == ".json" else f"```text\n{content.rstrip()}\n```"
        pattern = re.compile(rf"(<!-- {path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if count != 1:
            raise SystemExit(
                f"docs/data/speed.md has no place for {path.name}: <!-- {path.stem} --> ... <!-- end -->"
            )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
