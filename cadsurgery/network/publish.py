"""Publish converted networks on the Hugging Face Hub: the file of `save`, and a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from cadsurgery.data.hub import FILE, Address, client, read_address, refusing
from cadsurgery.data.images import normalise, street_scene
from cadsurgery.data.networks import Source, source_of
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.storage import save
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.support.provenance import versions
from cadsurgery.surgery.plan import Plan

_LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"


@dataclass(frozen=True)
class Pushed:
    """Result of `push_to_hub`.

    Attributes:
        address: address of this commit, as `load` takes it.
        page: URL of the repository.
        commit: hash of the commit.
        private: true if only the owner can see the repository.
        bytes: size of the file.
    """

    address: str
    page: str
    commit: str
    private: bool
    bytes: int


def push_to_hub(
    net: AdaptiveModel,
    repository: str,
    *,
    license: str = "",
    private: bool | None = None,
    message: str = "",
    pipeline: str = "",
    image: Tensor | None = None,
) -> Pushed:
    """Write a converted network to the Hugging Face Hub, in one commit: `cs.load("hf:owner/name")` reads it.

    The commit has the file that `save` writes, and a model card, README.md, with the licence and the conversion: mask,
    output strides, fill, multiply-accumulates, versions, and how to load it. An existing card is replaced; the Hub
    keeps all versions. The account is that of HF_TOKEN or `hf auth login`.

    Args:
        net: a network from `adaptify` or `load`.
        repository: `owner/name` or `owner/name@branch`; repository and branch are created if missing.
        license: licence of the network, by its name on the Hub: `"apache-2.0"`, `"mit"`, `"cc-by-nc-4.0"`,
            `"other"`. You choose it within the limits of the weights' licence, so there is no default.
        private: true if only you, or your organisation, may see it; default: unchanged, or the Hub's default for a new
            repository.
        message: message of the commit.
        pipeline: task under which it is listed, such as `"depth-estimation"`; by default it follows from the outputs:
            segmentation for a map of the image's size, classification for scores, else features.
        image: batch on which its multiply-accumulates are counted; default: a generated street scene.

    Raises:
        InvalidInput: the licence is missing or unknown to the Hub; `repository` is not `owner/name`; the network is
            not converted, or is optimised; or `private` is asked for a public repository.
        FileError: you may not write there, or the Hub cannot be reached.
        NotInstalled: the client is not installed.
    """
    address = read_address(repository)
    if not license or not license.strip():
        raise InvalidInput(
            "the licence of the network is not named.",
            where=str(address),
            why="what others may do with it is for its owner to say.",
            next=f'license="apache-2.0", --license apache-2.0, or another of {_LICENCES}.',
        )
    hub = client()
    from huggingface_hub import CommitOperationAdd

    with TemporaryDirectory() as folder:
        file = Path(folder) / FILE
        save(net, file)
        size = file.stat().st_size
        card = make_card(net, address, license.strip(), pipeline, image)
        with refusing(address, "be written"):
            _check_card(hub, card)
            hub.create_repo(address.repository, private=private, exist_ok=True)
            is_private = bool(hub.model_info(address.repository).private)
            if private and not is_private:
                raise InvalidInput(
                    f"{address} is public.",
                    why="it was there before, and private=True was asked for.",
                    next="choose another name, or make it private in its settings on the Hub.",
                )
            if address.revision is not None:
                hub.create_branch(address.repository, branch=address.revision, exist_ok=True)
            commit = hub.create_commit(
                address.repository,
                [CommitOperationAdd("README.md", card.encode()), CommitOperationAdd(FILE, str(file))],
                commit_message=message or "Network and card, by cadsurgery",
                revision=address.revision,
            )
    pushed = Address(address.repository, commit.oid)
    return Pushed(str(pushed), f"{hub.endpoint}/{address.repository}", commit.oid, is_private, size)


def make_card(
    net: AdaptiveModel, address: Address, license: str, pipeline: str = "", image: Tensor | None = None
) -> str:
    """Return the model card README.md: metadata for the Hub, and a description of the conversion; see `push_to_hub`."""
    from huggingface_hub import ModelCardData

    plan, source = net.plan, net.source
    network, weights = "one of its owner's own", "as its owner made them"
    if source is not None:
        network, weights = f"`{source.name}`", source.note.removeprefix("weights ").removeprefix("are ")
    tags = ["cadsurgery", "content-adaptive-downsampling"]
    if source is not None and _is_listed(source):
        tags += source.name.split(":")
    about = ModelCardData(
        license=license,
        library_name="cadsurgery",
        tags=tags,
        pipeline_tag=pipeline or _pipeline(plan) or None,
    )
    rows = {
        "network": network,
        "weights": weights,
        "mask": f"`{net.mask.spec()}`" if net.mask.storable else "a function, which the file does not hold",
        "output stride": f"{plan.output_stride[0]} where the mask says so, {plan.output_stride[1]} elsewhere",
        "strides of its levels": ", ".join(map(str, plan.strides[: plan.max_level + 1])),
        "fill": net.geometry.fill,
        "work": _work(net, image),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    cells = {name: " ".join(text.split()).replace("|", "\\|") for name, text in rows.items()}
    table = "\n".join(f"| {name} | {cell} |" for name, cell in cells.items())
    return f"""---
{about.to_yaml()}
---

# {address.repository}

A network that keeps its resolution where a mask says it matters and downsamples the rest, in one pass and with the
same weights: content-adaptive downsampling (Hesse, Schaub-Meyer, Roth, CVPR Workshops 2023), by cadsurgery.

| | |
| --- | --- |
{table}

```bash
pip install 'cadsurgery[hub]'
```

```python
import cadsurgery as cs

{_loading(net, address)}
y = net(x)  # {_images(net)}
```

The plan that was made:

```text
{plan.summary()}
```
"""


def _loading(net: AdaptiveModel, address: Address) -> str:
    """Return the line of code that loads the network."""
    options, note = [f'"{address}"'], ""
    if net.source is None:
        options.append("model")
        note = "  # model: the architecture it was converted from, with any weights"
    elif not _is_listed(net.source):
        options.append("trust=True")
        note = f"  # runs {net.source.name}, which you must have and know"
    if not net.mask.storable:
        options.append('mask="edges"')
    return f"net = cs.load({', '.join(options)}){note}"


def _is_listed(source: Source) -> bool:
    return source.name.partition(":")[0] in ("torchvision", "timm")


def _images(net: AdaptiveModel) -> str:
    """Describe the input that the network expects."""
    normalisation = net.normalisation
    if net.source is None and not (normalisation and normalisation.mean):
        return "an image batch as its architecture expects it"
    source = source_of(net)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (source.mean, source.std))
    return f"images (B, C, H, W) of 0..1, minus the mean ({mean}), divided by the standard deviation ({std})"


def _work(net: AdaptiveModel, image: Tensor | None) -> str:
    """Describe the share of multiply-accumulates, counted on an image or a generated one."""
    origin = "an image of its owner's" if image is not None else "a generated street scene"
    if image is None:
        if net.plan.call or net.plan.example_shape[1] != 3:
            return "not counted: the network takes more than a picture"
        image = normalise(street_scene(), pictures_for(net)).unsqueeze(0)
    image = image.to(next(net.parameters(), image))  # the network's device and type
    try:
        counted = net.macs(image)
    except CadError as error:  # masks that need labels or keypoints
        return f"not counted: {error.what}"
    size, total = "x".join(map(str, counted.shape)), max(1, counted.high)
    high, low = net.plan.output_stride
    return (
        f"{counted.mask / total:.2f} of the {counted.high:.3g} multiply-accumulates that output stride {high} "
        f"everywhere takes ({low} everywhere takes {counted.low / total:.2f}), counted on {origin}, {size}, of which "
        f"the mask keeps {counted.active_fraction:.2f} high"
    )


def _pipeline(plan: Plan) -> str:
    """Guess the task of a network from its outputs: no map, a map of the image's size, or other maps."""
    if plan.part:
        return ""
    if not plan.outputs:
        return "image-classification"
    is_segmentation = any(stride == 1 for _, stride in plan.outputs)
    return "image-segmentation" if is_segmentation else "image-feature-extraction"


def _check_card(hub: Any, card: str) -> None:
    """Let the Hub validate a card before anything is created there.

    Raises:
        InvalidInput: the Hub refuses the card.
    """
    from huggingface_hub.utils import get_session

    request = {"repoType": "model", "content": card}
    answer = get_session().post(f"{hub.endpoint}/api/validate-yaml", json=request)
    if answer.status_code == 400:
        raise InvalidInput(
            "the Hub does not take the card of the network.",
            why="; ".join(error["message"] for error in answer.json()["errors"]),
            next=f"name a licence of {_LICENCES}, and a pipeline that the Hub knows.",
        )
