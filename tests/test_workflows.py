"""What runs in continuous integration: on which systems and Pythons, and how a release is published."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT

yaml = pytest.importorskip("yaml")
FOLDER = ROOT / ".github" / "workflows"


def jobs(name: str) -> dict[str, Any]:
    """The jobs of a workflow by name."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yml").read_text())["jobs"]
    return found


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yml")))
def test_a_workflow_has_steps_and_may_write_nothing(name: str) -> None:
    read = yaml.safe_load((FOLDER / f"{name}.yml").read_text())
    assert read["permissions"] == {"contents": "read"} and read[True]  # YAML reads the key `on` as True
    assert all(job["steps"] and job["runs-on"] for job in read["jobs"].values())


def test_tests_run_on_the_first_and_last_python_and_on_three_systems() -> None:
    rows = jobs("tests")["default"]["strategy"]["matrix"]["include"]
    assert {(row["python"], row["runner"].split("-")[0]) for row in rows} == {
        ("3.11", "ubuntu"),
        ("3.14", "ubuntu"),
        ("3.13", "macos"),
        ("3.13", "windows"),
    }
    stated = (ROOT / "pyproject.toml").read_text()
    assert all(f"Python :: {row['python']}" in stated for row in rows)


def test_a_tag_publishes_every_wheel_and_the_sources_without_a_secret() -> None:
    made = jobs("wheels")
    publish = made.pop("publish")
    assert set(publish["needs"]) == set(made) and "refs/tags/v" in publish["if"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"]["name"]
    *_, last = publish["steps"]
    assert last["uses"].startswith("pypa/gh-action-pypi-publish@") and "with" not in last
    assert "secrets." not in (FOLDER / "wheels.yml").read_text()
