"""Publish converted networks on the Hugging Face Hub: the file of `save`, and a short model card."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cadsurgery.data.hub import FILE, Address, client, read_address, refusing
from cadsurgery.data.networks import license_of
from cadsurgery.methods.method_files import Converted, save
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import warn

_CARD = """---
{about}
---

# {name}

Converted by cadsurgery; {network}. `pip install 'cadsurgery[hub]'`, then:

```python
import cadsurgery as cs

net = cs.load("{address}"{model})
```

```text
{plan}
```
"""


def _licence_on_the_card(license: str) -> dict[str, Any]:
    """Return the fields of a card: licences that have no name on the Hub, such as an address, are its `other`."""
    if not license:
        return {}
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        return {"license": license}
    link = {"license_link": license} if license.startswith("http") else {}
    return {"license": "other", "license_name": license, **link}


def push(net: Converted, repository: str, *, license: str | None = None) -> str:
    """Write a converted network to the Hugging Face Hub, in one commit, and return its address, for `load`.

    The account is that of HF_TOKEN or `hf auth login`. A missing repository is created, with your account's default
    visibility; a model card that is there already is replaced.

    Args:
        net: a network that `save` takes.
        repository: `owner/name` or `owner/name@branch`.
        license: licence for the card, by its name on the Hub, such as `"apache-2.0"`; default: that of the weights, as
            far as it is stated, see `data.networks.license_of`.

    Warns:
        CadWarning: nothing states a licence.

    Raises:
        InvalidInput: `repository` is not `owner/name`, or the network cannot be saved.
        FileError: you may not write there, or the Hub cannot be reached.
        NotInstalled: huggingface_hub is not installed.
    """
    address, hub = read_address(repository), client()
    from huggingface_hub import CommitOperationAdd, ModelCardData

    with TemporaryDirectory() as folder, refusing(address, "be written"):
        save(net, file := Path(folder) / FILE)
        license = license or license_of(net)
        by_name = net.source is not None and net.source.name.startswith(("torchvision:", "timm:"))
        card = _CARD.format(
            about=ModelCardData(
                **_licence_on_the_card(license), library_name="cadsurgery", tags=["cadsurgery"]
            ).to_yaml(),
            name=address.repository,
            network=f"network {net.source.name}, {net.source.note}"
            if net.source
            else "`model` is its network",
            address=address,
            model="" if by_name else ", model",
            plan=f"mask {net.mask.spec()}\n{net.plan.summary()}"
            if isinstance(net, AdaptiveModel)
            else net.plan,
        )
        hub.create_repo(address.repository, exist_ok=True)
        if address.revision is not None:
            hub.create_branch(address.repository, branch=address.revision, exist_ok=True)
        files = [CommitOperationAdd("README.md", card.encode()), CommitOperationAdd(FILE, str(file))]
        told = {"commit_message": "Network and card, by cadsurgery", "revision": address.revision}
        written = Address(address.repository, hub.create_commit(address.repository, files, **told).oid)
    if not license:
        warn(
            f"{written} has no licence: nothing states that of the weights. Without one others may not use them: "
            'cs.push(net, "owner/name", license="apache-2.0").'
        )
    return str(written)
