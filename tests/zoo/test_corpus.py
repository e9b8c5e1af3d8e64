"""The corpus: networks as users write them convert, and whatever is wrong with one is told by its row."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, some, thorough
from torch import nn

import cadsurgery as cs
from benchmarks.zoo import corpus, network_check
from benchmarks.zoo.check import Limits, check_networks
from benchmarks.zoo.corpus import Subject, find_corpus, read_corpus, subject
from benchmarks.zoo.network_check import check_network
from cadsurgery.support.divergence import tensors_of
from cadsurgery.tasks.zoo_record import outlook, read_rows

CORPUS = ROOT / "tests" / "corpus"
SUBJECTS = {one.name: one for one in read_corpus(CORPUS)}
IDIOMS = sys.modules["corpus_blocks"].IDIOMS
# One each for growing back, dilations, asking for sizes and being configured.
QUICK = ("pythonic:SizesInLoops", "pythonic:Configured")

SMALL = '''
from torch import nn
from benchmarks.zoo.corpus import network

@network("norms")
def plain():
    """Three strides."""
    return nn.Sequential(*[nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8)], nn.Conv2d(8, 2, 1))
'''


def test_every_idiom_has_networks_and_every_network_says_what_it_stands_for() -> None:
    assert len(SUBJECTS) > 30
    counts = Counter(idiom for one in SUBJECTS.values() for idiom in one.idioms)
    assert counts.keys() == IDIOMS.keys() and min(counts.values()) > 0, counts
    assert all(one.about and one.idioms for one in SUBJECTS.values())


@pytest.mark.parametrize("name", [name if name in QUICK else thorough(name, few=3) for name in SUBJECTS])
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_the_corpus_is_what_its_row_says(name: str) -> None:
    """Law 1 at sizes of its own, other weights, `optimize()`; and nothing is wrong or silent. It is small, and what it
    returns is not constant, so that there is something to compare."""
    one = SUBJECTS[name]
    model = one.build()
    row = check_network(dataclasses.replace(one, build=lambda: model))
    assert row["result"] != "broken" and row["parameters"] < 1_000_000, row
    first = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    sizes = ((64, 96), (128, 160))  # it may rearrange pixels first, or be too deep for the smaller one
    images = (torch.randn(2, channels, *size).to(first) for size in sizes for channels in (first.shape[1], 3))
    image = next(x for x in images if network_check.takes(model, one.arguments(x)))
    with torch.no_grad():
        outputs = tensors_of(network_check.call_network(model.eval(), one.arguments(image)))
    assert any(float(output.double().std()) > 1e-4 for output in outputs)
    if row["result"] == "converts":
        limit = 1e-9 if row.get("dtype") == "float64" else 1e-4
        assert max(row["errors"].values()) < limit, row
        own = row["identity_level"] is not None  # else its own strides are not among those of its lattices
        assert not own or (row["outputs_compared"] > 0 and len(row["sizes"]) >= 2), row
        assert row["effect"] or row["warned"], row
    else:
        assert row["what"] and row["next"], row
    if name in QUICK:
        assert row["result"] == "converts" and row["effect"] and row["share_in_region"] >= 0.3, row


# -- files of networks -------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with one network, which no module has the name of."""
    path = tmp_path / f"nets_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(SMALL)
    return path


def test_a_file_or_folder_of_networks_is_read_once(small: Path) -> None:
    (one,) = read_corpus(small)
    assert one.name == f"{small.stem}:plain" and one.idioms == ("norms",) and one.about == "Three strides."
    (small.parent / f"._{small.name}").write_bytes(b"a file of the system's")
    assert read_corpus(small.parent) == [one] and subject(one.name, small) is one
    assert read_corpus(small, "*:other") == []
    assert check_network(one)["result"] == "converts"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package", "does not run"),
        (SMALL + SMALL, "twice"),
        ("1 +", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_run_is_refused(small: Path, text: str, words: str) -> None:
    small.write_text(text)
    with pytest.raises(cs.FileError, match=words):
        read_corpus(small)
    small.write_text(SMALL)
    assert len(read_corpus(small)) == 1  # nothing is left of the first try


def test_what_is_no_corpus_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cs.FileError, match="no corpus"):
        find_corpus(str(small.parent / "missing.py"))
    with pytest.raises(cs.FileError, match="there is no"):
        read_corpus(small.parent / "missing")
    with pytest.raises(cs.UnknownName, match="plain"):
        subject(f"{small.stem}:plane", small)
    with pytest.raises(cs.UnknownName, match=small.stem):
        subject("other:plain", small)
    clash = small.with_name("json.py")
    clash.write_text(SMALL)
    with pytest.raises(cs.FileError, match="name of another module"):
        read_corpus(clash)
    monkeypatch.setattr(corpus, "CHECKOUT", small.parent / "tests" / "corpus")
    with pytest.raises(cs.FileError, match="without tests/corpus"):
        find_corpus("*")


@pytest.mark.slow
def test_a_network_that_ends_its_process_is_a_broken_row(small: Path) -> None:
    small.write_text(SMALL.replace('"""Three strides."""', "import os; os.abort()"))
    (row,) = check_networks(
        [f"{small.stem}:plain"], small.with_suffix(".jsonl"), corpus=small, limits=Limits(60)
    )
    assert row["result"] == "broken" and "signal 6" in row["why"]


# -- what a row tells --------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(*[nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8)], nn.Upsample(scale_factor=4))


@pytest.mark.parametrize("name", some(["_identity_error", "_batch_error", "_optimized_error"]))
def test_what_differs_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 too; what went wrong is named."""
    worse = {"_identity_error": (0.5, 1)}.get(name, 0.5)
    monkeypatch.setattr(network_check, name, lambda *_: worse)
    row = check_network(Subject("plain", "", plain))
    assert row["result"] == "broken" and row["dtype"] == "float64" and row["why"], row


def test_a_refusal_is_a_row_with_reason_and_next_step() -> None:
    row = check_network(Subject("flat", "", lambda: nn.Conv2d(3, 4, 3)))
    assert row["result"] == "refused" and row["what"] and row["next"]
    assert outlook(row).startswith("refused: ")
    lost = check_network(Subject("lost", "", lambda: 1 / 0))  # type: ignore[arg-type,return-value]
    assert lost["result"] == "not built" and "ZeroDivisionError" in lost["why"]


# -- the recorded run --------------------------------------------------------------------------------------

ROWS = [path for path in (CORPUS / "rows.jsonl",) if path.exists()]  # of packages docs/data/corpus.md tells


@pytest.mark.parametrize("path", ROWS, ids=lambda path: path.parent.name)
def test_the_recorded_run_meets_the_criteria(path: Path) -> None:
    """95 % convert, 85 % with at least 30 % of their MACs in the region, none wrong or silently without effect."""
    rows = [row for row in read_rows(path) if row.get("kind") != "attention"]
    done = [row for row in rows if row["result"] == "converts" and row["outputs_compared"]]
    assert [row["model"] for row in rows if row["result"] == "broken"] == []
    assert all(row["effect"] or row["warned"] for row in rows if row["result"] == "converts")
    assert len(done) >= 0.95 * len(rows)
    assert sum(row["share_in_region"] >= 0.3 for row in done) >= 0.85 * len(rows)
