"""The zoo: a sample is built, converted and verified here; the recorded full run holds what the docs claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import slow, thorough

import cadsurgery as cs
from benchmarks.zoo.check import Limits, check_networks
from benchmarks.zoo.corpus import subject
from benchmarks.zoo.network_check import check_network
from cadsurgery.tasks.zoo_record import read_rows, recorded

# Networks whose structure no toy network has; their operations one by one: `laws/test_rule_table.py`. All of them are
# in the recorded run.
SAMPLE = {
    "convnextv2_atto": "channels-last blocks, global response norm",
    "densenet121": "dense blocks, average-pool transitions",
    "dla46_c": "aggregation of several stages",
    "focalnet_tiny_srf": "focal modulation",
    "gcresnet50t": "pooling by attention",
    "hrnet_w18_small": "parallel branches",
    "lcnet_050": "hard swish",
    "mixnet_s": "mixed kernels, same padding",
    "nf_resnet26": "weight standardisation",
    "regnetz_b16_evos": "evo norm",
    "res2net50_26w_4s": "hierarchical splits",
    "resnest14d": "split attention",
    "resnetblur18": "anti-aliased downsampling",
    "swiftformer_xs": "additive attention",
    "tf_efficientnet_cc_b0_4e": "kernels mixed per image, same padding",
    "tresnet_m": "space to depth in the stem",
    "googlenet": "inception branches",
    "shufflenet_v2_x0_5": "channel shuffle",
    "squeezenet1_1": "fire modules",
    "lraspp_mobilenet_v3_large": "resized branches",
}
KNOWN = {name: why for name, why in SAMPLE.items() if name in cs.list_models()}
QUICK = ("squeezenet1_1",)


def test_the_sample_exists() -> None:
    assert len(KNOWN) >= 0.9 * len(SAMPLE), sorted(SAMPLE.keys() - KNOWN.keys())


@pytest.mark.parametrize("name", [name if name in QUICK else thorough(name, few=3) for name in KNOWN])
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_the_zoo_keeps_the_laws(name: str) -> None:
    """Laws 1, 2 and 5, and nothing that ends the region early; the recorded run says what is found here."""
    row, told = check_network(subject(name)), recorded()[name]
    same = ("result", "kind", "output_stride", "strides", "identity_level", "share_in_region", "dense")
    assert row["result"] == "converts" and {key: row[key] for key in same} == {
        key: told[key] for key in same
    }, row
    assert all(error < 1e-4 for error in row["errors"].values()) and row["errors"].keys() >= {
        "1",
        "2",
        "5",
        "weights",
        "optimize",
    }
    assert row["share_after_first_stage"] > (0.3 if name in ("hrnet_w18_small", "googlenet") else 0.6), row


@pytest.mark.parametrize(
    ("name", "words"),
    [
        slow("vit_tiny_patch16_224", "join all positions"),
    ],
)
def test_what_does_not_convert_says_why(name: str, words: str) -> None:
    row = check_network(subject(name))
    assert row["result"] == "refused" and row["kind"] == "attention"
    assert words in f"{row['what']} {row['why']}"
    assert row["where"] and row["next"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("mobilevit_xxs", "MobileVitBlock"),
    ],
)
def test_stages_before_attention_convert_with_it_as_a_barrier(name: str, operation: str) -> None:
    row = check_network(subject(name))
    assert row["result"] == "converts" and row["kind"] == "attention", row
    assert any(operation in end["operation"] for end in row["dense"]), row["dense"]
    assert all(end["source"] and end["why"] for end in row["dense"])


# -- settled random networks -------------------------------------------------------------------------------


# -- many networks, a process each ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_a_line_each_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, seen = tmp_path / "zoo.jsonl", []
    check_networks(["lcnet_050", "no_such_network"], path, on_row=seen.append)
    assert sorted(row["model"] for row in seen) == ["lcnet_050", "no_such_network"]
    text = path.read_text()
    path.write_text(text + '{"model": "cut off', encoding="utf-8")
    seen.clear()
    rows = check_networks(["squeezenet1_1", "lcnet_050"], path, on_row=seen.append)
    assert [row["model"] for row in seen] == ["squeezenet1_1"]
    assert [row["model"] for row in rows] == ["squeezenet1_1", "lcnet_050"]
    assert path.read_text().startswith(text) and len(read_rows(path)) == 3
    assert json.loads(text.splitlines()[0])["versions"]["timm"] == timm.__version__


@pytest.mark.slow
def test_limits_are_kept_and_reported(tmp_path: Path) -> None:
    (late,) = check_networks(["resnet50"], tmp_path / "late.jsonl", limits=Limits(seconds=0.05))
    assert late["result"] == "not checked" and "took more than" in late["why"]
    (large,) = check_networks(["vgg19"], tmp_path / "large.jsonl", limits=Limits(memory_gib=0.5))
    assert large["result"] == "not checked" and "GiB" in large["why"]


def test_rows_of_other_versions_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    path.write_text(json.dumps({"versions": {"timm": "0.1"}}) + "\n")
    with pytest.raises(cs.FileError, match=r"0\.1"):
        check_networks(["resnet18"], path)
    with pytest.raises(cs.FileError, match="no folder"):
        check_networks(["resnet18"], tmp_path / "missing" / "zoo.jsonl")
    path.write_text("not json\nat all\n")
    with pytest.raises(cs.FileError, match=r"benchmarks\.zoo\.check"):
        read_rows(path)


# -- the recorded full run ---------------------------------------------------------------------------------


def rows(kind: str) -> list[dict[str, Any]]:
    return [row for row in recorded().values() if row.get("kind") == kind]


def test_no_network_of_the_recorded_run_breaks_a_law() -> None:
    found = recorded()
    assert len(found) > 800
    assert [row["model"] for row in found.values() if row["result"] == "broken"] == []
    for row in found.values():
        if row["result"] == "converts":
            assert max(row["errors"].values()) < (1e-9 if row.get("dtype") == "float64" else 1e-4), row[
                "model"
            ]


def test_every_refusal_of_the_recorded_run_has_reason_place_and_next_step() -> None:
    for row in recorded().values():
        if row["result"] == "refused":
            assert row["what"] and row["why"] and row["next"], row["model"]
        if row["result"] == "not checked":
            assert row["why"], row["model"]


def test_every_convolutional_network_converts() -> None:
    assert [row["model"] for row in rows("cnn") if row["result"] != "converts"] == []
