"""Whether the maps of a network fit into this machine's memory for a picture, before it is computed whole."""

from __future__ import annotations

from torch import Tensor, nn

from cadsurgery.network.adaptify import adaptify
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.support.memory import free_memory, in_mebibytes

_SMALLER = 2_000_000  # pixels of pictures whose maps are taken to fit
_SIDE = 256  # of the example by which the network is read


def refuse_what_does_not_fit(model: nn.Module, image: Tensor) -> None:
    """Refuse pictures (1, C, H, W) whose maps take more memory than is free, and name what computes them.

    Raises:
        InvalidInput: they do.
    """
    free = free_memory()
    if image.shape[2] * image.shape[3] < _SMALLER or free is None:
        return
    try:
        example = image[..., :_SIDE, :_SIDE].contiguous()
        net = adaptify(model, "all", coarsest=32, example_input=example, verify_laws=False)
        walks = net.optimize(memory=free).plan_memory(image)
        is_whole, why = walks.band >= image.shape[2], f"{in_mebibytes(free)} are free."
    except InvalidInput as refusal:  # not even in bands, or not at all
        is_whole, why = "too little" not in refusal.what, f"{in_mebibytes(free)} are free, and {refusal.why}"
    except CadError:  # what cannot be planned is tried
        return
    if not is_whole:
        size = f"{image.shape[2]}x{image.shape[3]}"
        raise InvalidInput(
            f"the maps of the network do not fit into memory for a picture of {size}.",
            why=why,
            next='compute it in bands of rows: net.optimize(memory="1.5GiB") or cadsurgery run --memory 1.5GiB; '
            "or compare settings on smaller pictures: --size HxW.",
        )
