"""Commands and options that there were, and what is typed in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

_EIGHT_BITS = "cadsurgery export: 8 bits run in ONNX files (docs/howto/int8.md)"
_ZOO = "python -m benchmarks.zoo.check, in a checkout"

# The line that replaces a command.
COMMANDS: Mapping[str, str] = {
    "push": 'cs.push(net, "owner/name"), in Python',
    "tune": "cadsurgery recommend",
}

# The line that replaces an option, by command. An option that became a setting needs none: see `replacement`.
REPLACED: Mapping[str, Mapping[str, str]] = {
    "convert": {
        **{f"--{name}": f"--published, or --set {name}=VALUE" for name in ("anchor", "pool", "patch")},
        **dict.fromkeys(("--precision", "--calibration", "--largest-error"), _EIGHT_BITS),
        "--outputs": "--set outputs=VALUE",
        "--no-verify": "nothing: verification takes seconds; in Python cs.adaptify(model, verify_laws=False)",
    },
    "plan": {"--trust": "nothing: the plan of a file is read without running its code"},
    "run": dict.fromkeys(("--calibration", "--largest-error"), _EIGHT_BITS),
    "macs": {
        "--total": "--json, whose field macs has the totals",
        "--rule": "the script of a recipe, such as recipes/deeplabv3_resnet101/published_macs.py",
    },
    "bench": {"--isa": "python -m benchmarks.instruction_sets, in a checkout"},
    "explore": {
        "--port": "nothing: a free port is taken, and the address is printed",
        "--browser": "nothing: open the address that is printed",
        "--rounds": "nothing: the page times three rounds",
    },
    "export": {
        "--float16": "--precision float16",
        "--int8": "--precision int8 --calibration IMAGES",
        "--level-map": "cs.export(net, x, FILE, level_map=True), in Python",
    },
    "finetune": {
        "--cache": "--set freeze=stem",
        "--objective-option": "--set objective_options.NAME=VALUE",
        **dict.fromkeys(
            ("--resume", "--no-resume"),
            "--output FOLDER: a run resumes in its folder, a new one takes another",
        ),
    },
    "list": {
        **dict.fromkeys(("--check", "--corpus", "--memory", "--output", "--seconds", "--workers"), _ZOO),
        "--library": 'cs.list_models("*", "timm"), in Python',
    },
}


def replacement(command: str, option: str, settable: Collection[str]) -> str | None:
    """Return what is typed in place of an option that a command had; None for one that never was.

    Args:
        command: name of the command, as it is typed after `cadsurgery`.
        option: the option, with its dashes.
        settable: names that `--set` of this command takes.
    """
    if line := REPLACED.get(command, {}).get(option):
        return line
    name = option.lstrip("-").replace("-", "_")
    if name in settable:
        return f"--set {name}=VALUE"
    return next(_of_methods(name), None) if command == "convert" else None


def _of_methods(name: str) -> Iterator[str]:
    from cadsurgery.methods.registry import KINDS

    for kind in KINDS:
        now = kind.renamed.get(name, name)
        if now in kind.settings and name not in kind.renamed.values():
            yield f"--method {kind.method} --set {now}=VALUE"
