"""Publish converted networks on the Hugging Face Hub: the file of `save`, and a short model card."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cadsurgery.data.hub import FILE, Address, client, read_address, refusing
from cadsurgery.methods.storage import Converted, save
from cadsurgery.network.model import AdaptiveModel

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


def push(net: Converted, repository: str, *, license: str | None = None) -> str:
    """Write a converted network to the Hugging Face Hub, in one commit, and return its address, for `load`.

    The account is that of HF_TOKEN or `hf auth login`. A missing repository is created, with your account's default
    visibility; a model card that is there already is replaced.

    Args:
        net: a network that `save` takes.
        repository: `owner/name` or `owner/name@branch`.
        license: licence for the card, by its name on the Hub, such as `"apache-2.0"`.

    Raises:
        InvalidInput: `repository` is not `owner/name`, or the network cannot be saved.
        FileError: you may not write there, or the Hub cannot be reached.
        NotInstalled: huggingface_hub is not installed.
    """
    address, hub = read_address(repository), client()
    from huggingface_hub import CommitOperationAdd, ModelCardData

    with TemporaryDirectory() as folder, refusing(address, "be written"):
        save(net, file := Path(folder) / FILE)
        by_name = net.source is not None and net.source.name.startswith(("torchvision:", "timm:"))
        card = _CARD.format(
            about=ModelCardData(license=license, library_name="cadsurgery", tags=["cadsurgery"]).to_yaml(),
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
        return str(Address(address.repository, hub.create_commit(address.repository, files, **told).oid))
