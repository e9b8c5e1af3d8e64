"""Files of other people: they run nothing, allocate nothing large, and what is damaged is found."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, images, rewritten, thorough
from networks import made_once, randomise, strided, unverified
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import cadsurgery as cs
import cadsurgery.support.provenance
from cadsurgery.data.networks import Source
from cadsurgery.masks.spec import parse
from cadsurgery.network.storage import checksum, encode_with_checksum, read_metadata
from cadsurgery.surgery.plan import Plan


def trunk() -> nn.Module:
    parts = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)]
    return randomise(nn.Sequential(*parts, nn.Conv2d(4, 2, 1)))


def corners(image: Tensor) -> Tensor:
    return image[:, :1, ::8, ::8]


def corner_points(image: Tensor) -> list[Tensor]:
    return [torch.zeros(1, 2) for _ in image]


@made_once
def adapted(mask: object = "edges:threshold=0.9,dilation=3") -> cs.AdaptiveModel:
    torch.manual_seed(0)
    return unverified(trunk(), mask, example_input=torch.zeros(1, 3, 32, 32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cs.save(adapted(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that names ask for; none is imported."""
    asked: list[str] = []

    def refuse(name: str) -> None:
        asked.append(name)
        raise ImportError(name)

    monkeypatch.setattr(cadsurgery.support.provenance, "importlib", SimpleNamespace(import_module=refuse))
    return asked


def sourced(path: Path, **source: Any) -> Path:
    stated = {"kwargs": {}, "weights": "own", "note": "", "mean": [0, 0, 0], "std": [1, 1, 1], **source}
    return rewritten(path, lambda metadata: metadata.update(source=stated))


# -- code ----------------------------------------------------------------------------------------------


def test_a_network_that_a_file_names_is_not_called(saved: Path, imported: list[str], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    sourced(saved, name="subprocess:getoutput", kwargs={"cmd": f"touch {proof}"})
    with pytest.raises(cs.FileError) as caught:
        cs.load(saved)
    for word in ("subprocess:getoutput", f"cmd='touch {proof}'", "trust=True", "--trust", "model="):
        assert word in str(caught.value)
    assert not imported and not proof.exists()
    net = cs.load(saved, trunk())  # what it names is not needed
    assert not imported and net.source.untrusted == str(saved)


def test_a_source_that_was_not_needed_is_not_called_later(saved: Path, imported: list[str]) -> None:
    sourced(saved, name="subprocess:getoutput", kwargs={"cmd": "true"})
    net = cs.load(saved, trunk())
    with pytest.raises(cs.FileError, match="subprocess:getoutput"):
        cs.evaluate(net, "scene:1", output_stride=[(2, 4)], rounds=0)
    assert not imported


@pytest.mark.parametrize("given", [False, True], ids=["by name", "model="])
@pytest.mark.parametrize(
    "mask",
    [
        "os:system",
        "keypoints:detector=os:system",
        "edges + (os:system | budget) | dilate",
        "cadsurgery.support.files:make_folder",
    ],
)
def test_a_mask_that_a_file_names_is_not_imported(
    saved: Path, imported: list[str], mask: str, given: bool
) -> None:
    if not given:
        sourced(saved, name="torchvision:resnet18")
    rewritten(saved, lambda metadata: metadata.update(mask=mask))
    with pytest.raises(cs.FileError) as caught:
        cs.load(saved, trunk() if given else None)
    for word in ("cadsurgery" if "cadsurgery" in mask else "os", "--trust", "trust=True", "mask="):
        assert word in str(caught.value)
    assert not imported


def test_a_mask_that_is_gone_says_what_to_use_instead(saved: Path) -> None:
    for mask in (
        "saliency",
        "edges + saliency:function=cadsurgery.masks.saliency:spectral_residual | budget",
    ):
        rewritten(saved, lambda metadata, mask=mask: metadata.update(mask=mask))
        with pytest.raises(cs.FileError, match=r'(?s)saliency.*"detail"'):
            cs.load(saved, trunk())
        assert cs.load(saved, trunk(), mask="detail").mask.spec().startswith("detail")


def test_a_mask_of_the_user_needs_no_trust(saved: Path) -> None:
    for mask in ("test_files:corners", "keypoints:detector=test_files:corner_points"):
        assert cs.load(saved, trunk(), mask=mask).mask.spec().startswith(mask)
        cs.save(adapted(mask), saved)
        with pytest.raises(cs.FileError, match="test_files"):
            cs.load(saved, trunk())
        assert cs.load(saved, trunk(), trust=True).mask.spec().startswith(mask)
        assert cs.load(saved, trunk(), mask="edges").mask.spec().startswith("edges")


NOT_OF_A_SHAPE: list[dict[str, Any]] = [
    *({name: "DEFAULT"} for name in ("weights_backbone", "weights")),
    *({"pretrained": True}, {"progress": True}, {"cache_dir": "/tmp"}, {"checkpoint_path": "/tmp/evil.pth"}),
    {"pretrained_cfg": {"url": "http://localhost/evil.pth"}},
    {"pretrained_cfg_overlay": {"file": "/tmp/evil.pth"}},
    *({"num_classes": 10**9}, {"norm_layer": {"a": 1}}, {"out_indices": [[1]]}),
]
LARGE = ("torchvision:regnet_y_128gf", "torchvision:vgg19", "timm:convnextv2_huge")
NOT_HERE = ("timm:nosuch", "torchvision:nosuch", "nosuch", "", ":", "timm:", "x" * 10**5)
SOURCES: list[tuple[str, dict[str, Any], str | None]] = [
    *(
        (f"{of}:resnet18", given, next(iter(given)))
        for of in ("torchvision", "timm")
        for given in NOT_OF_A_SHAPE
    ),
    *((name, {}, "larger than the tensors it holds") for name in LARGE),
    ("torchvision:mobilenet_v2", {"width_mult": 100.0}, "larger than the tensors it holds"),
    ("torchvision:resnet50", {"width_per_group": 4096}, "larger than the tensors it holds"),
    *((name, {}, None) for name in NOT_HERE),
]


@pytest.mark.parametrize(("name", "kwargs", "words"), SOURCES)
def test_a_source_of_more_than_a_shape_of_the_files_size_is_refused(
    saved: Path, name: str, kwargs: dict[str, Any], words: str | None
) -> None:
    with pytest.raises(cs.FileError, match=words):
        cs.load(sourced(saved, name=name, kwargs=kwargs))
    if name == "torchvision:vgg19":  # the limit ends with the call
        assert cs.build_model("torchvision:resnet50", "none") is not None


@pytest.mark.slow
def test_commands_take_trust(command_line: Run, tmp_path: Path) -> None:
    """Every command that opens a converted file refuses what it names, and says how to go on; --trust does."""
    usernets = "import torch.nn as nn\n\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), "
    usernets += "nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 6, 1))\n"
    (tmp_path / "usernets.py").write_text(usernets)
    made = command_line(
        "convert", "-m", "usernets:net", "--size", "32x32", "--rounds", 0, "-o", "net.safetensors"
    )
    assert made.code == 0, made.err
    file, scene = "net.safetensors", ("--data", "scene:1", "--rounds", 0, "--mask", "none")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    calls: list[tuple[object, ...]] = [
        ("macs", "-m", file, "--size", "32x32"),
        ("mask", "-m", file, "--size", "32x32"),
        ("export", file, "--size", "32x32", "--mask", "none"),
        ("eval", file, *scene),
        ("keypoints", "extract", file, "image.png"),
        ("finetune", file, "--data", "scene:1", "--set", "validation_split=", "-o", "run"),
        ("run", file, "image.png"),
    ]
    for call in calls:
        refused = command_line(*call)
        assert refused.code == 1 and "usernets:net()" in refused.err and "--trust" in refused.err, call
    for call in calls[:4]:
        allowed = command_line(*call, "--trust")
        assert "usernets:net()" not in allowed.err and allowed.code == 0, (call, allowed.err)


# -- damage --------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


CHANGED: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "exchanged": lambda tensors, _: tensors.update(
        {"0.bias": tensors["3.bias"], "3.bias": tensors["0.bias"]}
    ),
    "of another shape": lambda tensors, _: tensors.update({"0.bias": tensors["0.bias"].reshape(2, 2)}),
    "of another type": lambda tensors, _: tensors.update({"0.bias": tensors["0.bias"].view(torch.int32)}),
    "other metadata": lambda _, metadata: metadata.update(fill="nearest", geometry="another"),
    "without a checksum": lambda _, metadata: metadata.pop("sha256"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_not_what_was_written_is_found(saved: Path, change: str) -> None:
    """Entries of the same bytes; and metadata without reading tensors."""
    tensors, header = parts_of(saved)
    metadata = json.loads(header["cadsurgery"])
    CHANGED[change](tensors, metadata)
    save_file(tensors, saved, {"cadsurgery": json.dumps(metadata)})
    reads = [lambda: cs.load(saved, trunk())]
    for read in (*reads, lambda: read_metadata(saved)) if change.startswith(("other", "without")) else reads:
        with pytest.raises(cs.FileError, match="checksum"):
            read()


# -- malformed metadata --------------------------------------------------------------------------------


def test_masks_of_the_user_are_not_endless_either() -> None:
    parse("edges" + " | dilate" * 60)
    for mask in ("(" * 100_000, "edges" + " | dilate" * 2000):
        with pytest.raises(cs.InvalidInput, match="at most 64"):
            parse(mask)


@pytest.mark.parametrize("mask", ["random:block={}", "edges:dilation={}", "none | dilate:size={}"])
def test_a_mask_of_huge_windows_asks_for_no_memory(saved: Path, mask: str) -> None:
    """Nor another map than windows that just hold the image."""
    found = []
    for side in (127, 10**17 + 1):
        rewritten(saved, lambda metadata, side=side: metadata.update(mask=mask.format(side)))
        torch.manual_seed(0)
        net = cs.load(saved, trunk())
        net(example())
        found.append(net.levels)
    assert torch.equal(*found)
    with pytest.raises(cs.FileError, match="sigma"):
        cs.load(rewritten(saved, lambda metadata: metadata.update(mask="confidence:sigma=1e9")), trunk())


def stated(**values: Any) -> Change:
    """Other values in the metadata."""
    return lambda tensors, metadata: metadata.update(values)


def with_example(*shape: int) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        metadata["plan"] = json.dumps({**json.loads(metadata["plan"]), "example_shape": shape})

    return change


def holding(name: str, value: Tensor) -> Change:
    return lambda tensors, metadata: tensors.update({name: value})


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
EDGES, LEVELS, WIDE = "edges:threshold=0.9,dilation=3", torch.zeros(8, 8, dtype=torch.int64), "4096/4096/4096"
DEEP_MASKS = ("(" * 100_000, "(" * 100_000 + "edges" + ")" * 100_000, "x" * 100_000, "smooth")
LONG_MASKS = ("edges" + " | budget" * 2000, "edges + " * 2000, "learned:channels=900000/900000/900000")
SHAPES = ([1, 3, 20_000, 20_000], [0, 3, 32, 32], [3, 32, 32], [1, 3, -1, 32], [2**62] * 4)
# A mask of the network that is saved, what somebody who knows how to sign changes, and words of the refusal.
SIGNED: list[tuple[Any, Change, str]] = [
    *((EDGES, stated(mask=mask), "") for mask in (*DEEP_MASKS, *LONG_MASKS)),
    *((EDGES, with_example(*shape), "example") for shape in SHAPES),
    (EDGES, holding("1.running_var", torch.ones(4, dtype=torch.int64)), r"1\.running_var"),
    (LEVELS, holding("cadsurgery.mask.levels", torch.zeros(8, 8)), "level"),
    (LEVELS, holding("cadsurgery.mask.levels", torch.zeros(8, dtype=torch.int64)), "level"),
    ("learned:channels=8/6/4", stated(mask=f"learned:channels={WIDE}"), "do not fit"),
]


@pytest.mark.parametrize(("mask", "change", "words"), SIGNED)
def test_signed_metadata_that_contradict_the_file_are_refused(
    mask: Any, change: Change, words: str, tmp_path: Path
) -> None:
    """Nothing large is made."""
    net, path = adapted(mask), tmp_path / "net.safetensors"
    if isinstance(mask, str):
        net(images(1, 32, 32))
    cs.save(net, path)
    tensors, header = parts_of(path)
    metadata = json.loads(header["cadsurgery"])
    change(tensors, metadata)
    signed(path, {**metadata, "tensors": checksum(tensors)}, tensors)
    with pytest.raises(cs.FileError, match=words or None):
        cs.load(path, trunk())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()

    def forward(self, image: Tensor, shift: Tensor) -> Tensor:
        return self.trunk(image) + shift.mean()


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"shift": {"tensor": [20_000, 40_000], "dtype": "float32"}}, "800003072 values is too large"),
        (
            {"shift": {"list": [{"tensor": [2**13, 2**11], "dtype": "int8"}] * 3}},
            "50334720 values is too large",
        ),
        ({"shift": {"tensor": [2**62, 2**62], "dtype": "float32"}}, "damaged"),
        ({"shift": {"tensor": [4], "dtype": "Tensor"}}, "damaged"),
        ({"shift": {"nothing": [4]}}, "damaged"),
    ],
)
def test_arguments_of_a_call_that_are_none_or_too_large_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], why: str
) -> None:
    path, model = tmp_path / "net.safetensors", Two().eval()
    example = {"image": torch.zeros(1, 3, 32, 32), "shift": torch.zeros(2)}
    cs.save(unverified(model, "none", example_input=example), path)

    def change(metadata: dict[str, Any]) -> None:
        plan = json.loads(metadata["plan"])
        metadata["plan"] = json.dumps({**plan, "call": json.dumps({**json.loads(plan["call"]), **call})})

    made, zeros = [], torch.zeros

    def note(*args: Any, **options: Any) -> Tensor:
        made.extend([args] if options.get("device") != "meta" else [])
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", note)
    with pytest.raises(cs.FileError, match=why):
        cs.load(rewritten(path, change), model)
    assert not made


@pytest.mark.parametrize("option", ["hidden", "classes"])
def test_heads_wider_than_all_tensors_of_the_file_are_not_made(tmp_path: Path, option: str) -> None:
    path, model = tmp_path / "net.safetensors", deep_trunk()
    cs.save(cs.anytime(model, classes=2, example_input=torch.zeros(1, 3, 64, 64)), path)

    def change(metadata: dict[str, Any]) -> None:
        metadata["options"][option] = 2**40

    with pytest.raises(cs.FileError, match=f"layers of {2**40} channels"):
        cs.load(rewritten(path, change), model)


def deep_trunk() -> nn.Module:
    return randomise(strided(4, norm=True, outputs=2))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"format": 2, "plan": ' + DEEP + "}", '{"format": 1e400}', '{"format": true}', "[]"]
)
def test_metadata_that_are_no_metadata_are_refused(saved: Path, text: str) -> None:
    save_file(load_file(saved), saved, {"cadsurgery": text})
    for read in (lambda: cs.load(saved, trunk()), lambda: read_metadata(saved)):
        with pytest.raises(cs.FileError, match="damaged"):
            read()


def with_region(path: Path, **values: Any) -> Path:
    """The same file, whose first decision that makes an operation adaptive has other values."""

    def change(metadata: dict[str, Any]) -> None:
        plan = json.loads(metadata["plan"])
        next(one for one in plan["decisions"] if one["action"] == "adapt").update(values)
        metadata["plan"] = json.dumps(plan)

    return rewritten(path, change)


def test_a_plan_is_held_against_the_network_and_refused_before_it_is_printed(
    saved: Path, command_line: Run
) -> None:
    with pytest.raises(cs.FileError, match="another plan"):
        cs.load(with_region(saved, reason="in other words"), trunk())
    found = command_line("plan", "-m", with_region(saved, stages=[0, 9]))
    assert found.code == 1 and "FileError" in found.err and "stages" in found.err


def test_a_plan_from_before_a_field_with_a_default_reads() -> None:
    plan = adapted().plan
    values = json.loads(plan.to_json())
    del values["matters"], values["part"]
    assert Plan.from_json(json.dumps(values)) == plan
    del values["strides"]
    with pytest.raises(TypeError):
        Plan.from_json(json.dumps(values))


def test_a_source_goes_through_plain_values() -> None:
    source = Source("timm:resnet18", {"num_classes": 3, "out_indices": [1, 2]}, untrusted="net.safetensors")
    again = Source.from_dict(json.loads(json.dumps(source.to_dict())))
    assert again == source and not again.untrusted
    for values in (
        {"untrusted": ""},
        {"std": [0.0, 1.0, 1.0]},
        {"mean": [float("inf")]},
        {"kwargs": []},
        {"name": 3},
    ):
        with pytest.raises(ValueError):
            Source.from_dict({**source.to_dict(), **values})


# -- mutations -----------------------------------------------------------------------------------------

EXTREMES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**4000, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "all", "none", "(" * 5000, "edges" + " | dilate" * 300),
    *("os:system", "timm:resnet18", "\0\ud7ff", "saliency:function=os:system", "torchvision:resnet18"),
    *("torchvision:regnet_y_128gf", "random:block=99999999999"),
    *([], {}, [[]], [0], [1, 2], [None] * 1000, {"a": {"b": [1]}}, [2**40] * 4, [1, 3, 20_000, 20_000]),
)


@cache
def original() -> tuple[bytes, dict[str, Any], dict[str, Tensor], Tensor]:
    """A file, its metadata and tensors, and what its network gives."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        net = adapted(torch.randint(0, 2, (32, 32)))
        net.source = Source("torchvision:squeezenet1_1", {"num_classes": 2})
        cs.save(net, path)
        tensors, header = parts_of(path)
        with torch.no_grad():
            return path.read_bytes(), json.loads(header["cadsurgery"]), tensors, net(example())


def example() -> Tensor:
    return torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values within plain values."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield from places(entry, (*path, key))


def with_changed_value(draw: random.Random, values: Any) -> Any:
    """The same, one value removed, doubled or replaced by another type or an extreme."""
    where = draw.choice([path for path in places(values) if path])
    parent = values
    for key in where[:-1]:
        parent = parent[key]
    way = draw.randrange(8)
    if way == 0 or (way == 1 and isinstance(parent, list)):
        del parent[where[-1]]
    elif way == 1:
        parent[f"{where[-1]}_"] = parent[where[-1]]
    elif way == 2 and isinstance(parent[where[-1]], (int, str)):
        value = parent[where[-1]]
        parent[where[-1]] = len(value) if isinstance(value, str) else str(value)
    elif way == 3:
        parent[where[-1]] = [parent[where[-1]]]
    else:
        parent[where[-1]] = copy.deepcopy(draw.choice(EXTREMES))
    return values


def damaged_bytes(draw: random.Random, path: Path) -> None:
    """The file with bits flipped, a part cut out, repeated or overwritten; nothing is signed anew."""
    data = bytearray(original()[0])
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(header + 64, len(data)))
        way = draw.randrange(6)
        if way < 3:
            data[at] ^= 1 << draw.randrange(8)
        elif way == 3:
            data[at] = draw.choice(b'0129"{}[]:,\\- \x00\xff')
        elif way == 4:
            del data[at : at + draw.choice((1, 4, 64))]
        else:
            data[at:at] = data[at : at + draw.choice((1, 4, 64))]
        if not data:
            break
    path.write_bytes(bytes(data))


def signed(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    metadata.pop("sha256", None)
    save_file(tensors, path, {"cadsurgery": encode_with_checksum(metadata)})


def malicious_metadata(draw: random.Random, path: Path) -> None:
    """Metadata, plan or source changed by somebody who knows how to sign them."""
    _, metadata, tensors, _ = original()
    metadata = copy.deepcopy(metadata)
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.5:
            metadata["plan"] = (
                json.dumps(with_changed_value(draw, json.loads(metadata["plan"])))
                if isinstance(metadata.get("plan"), str) and metadata["plan"].startswith("{")
                else ""
            )
        else:
            metadata = with_changed_value(draw, metadata)
    signed(path, metadata, tensors)


def malicious_tensors(draw: random.Random, path: Path) -> None:
    """Tensors swapped, dropped, of another type or shape, and signed."""
    _, metadata, tensors, _ = original()
    tensors = dict(tensors)
    a, b = draw.sample(sorted(tensors), 2)
    way = draw.randrange(6)
    if way == 0:
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    elif way == 1:
        del tensors[a]
    elif way == 2:
        kinds = (
            torch.int8,
            torch.int64,
            torch.bool,
            torch.float64,
            torch.bfloat16,
            torch.uint16,
            torch.float8_e4m3fn,
        )
        tensors[a] = tensors[a].to(draw.choice((*kinds, torch.complex64)))
    elif way == 3:
        tensors[a] = tensors[a].reshape(-1).repeat(draw.choice((0, 1, 2)))
    elif way == 4:
        tensors[a] = torch.zeros(draw.choice(((0, 2**40), (1, 0), (), (1,) * 9)))
    else:
        tensors[f"{a}{draw.choice('._0x')}"] = tensors.pop(a)
    signed(path, {**metadata, "tensors": checksum(tensors)}, tensors)


WAYS = (damaged_bytes, damaged_bytes, malicious_metadata, malicious_metadata, malicious_tensors)


def check_mutation(seed: int, path: Path) -> str:
    """What became of a mutated file: refused, the same network, or, if it was signed, another one that works."""
    draw = random.Random(seed)
    way = WAYS[seed % len(WAYS)]
    way(draw, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cs.CadWarning)
        try:
            net = cs.load(path, trunk() if seed % 20 else None)
        except cs.FileError:
            return "refused"
        except cs.CadWarning:
            assert way is not damaged_bytes, seed
            return "refused"
    if way is damaged_bytes:
        with torch.no_grad():
            assert torch.equal(net(example()), original()[3]), seed
        return "the same"
    return "another"


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, thorough(1)])
def test_mutated_files_are_refused_or_the_same(part: int, tmp_path: Path, imported: list[str]) -> None:
    """One thousand, 500 a part: nothing but FileError, nothing imported, no large allocation."""
    original()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    modules = set(sys.modules)
    found = [
        check_mutation(seed, tmp_path / "net.safetensors") for seed in range(500 * part, 500 * (part + 1))
    ]
    assert found.count("refused") > 400
    assert not imported and not {"nt", "antigravity"} & (set(sys.modules) - modules)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a gigabyte"  # counts KiB


# -- files that releases wrote: today's loader reads them, and what they compute is what the release computed


# `tests/data/of_0_2_0` was written by version 0.2.0 (commit d9365690, torch 2.14.1, without compiled kernels).
# `outputs.safetensors` has the images in 8 bits and what each network gave then.
FOLDER = ROOT / "tests" / "data" / "of_0_2_0"


def released_trunk() -> nn.Module:
    """A classifier's trunk: batch norm, a pooling, a grouped convolution."""
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    second = [nn.Conv2d(8, 8, 3, 2, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Conv2d(12, 5, 1))


class Dilated(nn.Module):
    """A segmentation network with a dilated branch, a head and a resize to the image; it returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        self.stem = nn.Sequential(*first, nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        wide = nn.Conv2d(8, 8, 3, 1, 4, dilation=4)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 2, dilation=2), nn.ReLU(), wide)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        y = self.head(torch.relu(y + self.body(y)))
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


MAKE: dict[str, Callable[[], nn.Module]] = {
    "strided": released_trunk,
    "dilated": Dilated,
    "own_mask": released_trunk,
}


@pytest.mark.parametrize("name", MAKE)
def test_a_file_of_a_release_loads_and_computes_what_it_did(name: str) -> None:
    path, known = FOLDER / f"{name}.safetensors", load_file(FOLDER / "outputs.safetensors")
    assert read_metadata(path)["versions"]["cadsurgery"] == "0.2.0"
    net = cs.load(path, MAKE[name]().eval())
    found = net(known["image"] / 255)
    scores = found["out"][..., ::4, ::4] if isinstance(found, dict) else found
    torch.testing.assert_close(scores, known[name])
    assert net.macs(known["image"] / 255).of_given != 1


def test_every_file_of_a_release_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*MAKE, "outputs"}
