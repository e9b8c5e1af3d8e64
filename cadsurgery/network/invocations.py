"""A call of a converted network: its arguments, which of a program's graphs answers it, and what of it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadsurgery.elements.axes import in_order
from cadsurgery.elements.backends.choose import Misfit
from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.guards import GuardFailed
from cadsurgery.following.trace import evaluating
from cadsurgery.masks.context import call_context, sized, sizes_in
from cadsurgery.masks.masking import check_image
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.network.counters import calling_counters
from cadsurgery.network.input_refusals import misfit, wrong_for_weights, wrong_size
from cadsurgery.network.program import Masked, Program
from cadsurgery.support import device_checks
from cadsurgery.support.errors import CadError
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import tree_map_only


@dataclass(frozen=True)
class Invocation:
    """The arguments of a call by the original's parameter names, with defaults, for the program that was traced at the
    conversion."""

    program: Program
    arguments: dict[str, Any]
    given_sizes: Sequence[tuple[int, int]] | Tensor | None = None

    @property
    def sizes(self) -> Sequence[tuple[int, int]] | Tensor | None:
        """The sizes of the images of a padded batch: as they were given, else those of a `sized` block, else those that
        a `pixel_mask` among the arguments states."""
        if self.given_sizes is not None:
            return self.given_sizes
        outer = call_context().sizes
        return outer if outer is not None else sizes_in(self.arguments)

    @property
    def image(self) -> Any:
        """The image among the arguments, which the mask reads."""
        return self.program.image(self.arguments)

    def check(self) -> None:
        """Refuse an invalid image batch, see `check_image`, and one that does not fit weights that are fused: torch's
        operations say so themselves."""
        program = self.program
        check_image(self.image)
        if program.is_fused and (refusal := wrong_for_weights(program.net, program.graph, self.image)):
            raise refusal

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Check the image; in the block, masks know the sizes of the images, and an error about an image that does not
        fit says so.

        Raises:
            InvalidInput: the image is invalid, or does not fit the network.
        """
        with device_checks.together(), sized(self.sizes):
            self.check()
            try:
                yield
            except Exception as error:  # the network may raise any error; the cause is found afterwards
                if (refusal := self._refusal(error)) is None:
                    raise
                raise refusal from error

    def _refusal(self, error: Exception) -> Exception | None:
        program, image = self.program, self.image
        channels = program.plan.example_shape[1]
        checks_channels = isinstance(error, GuardFailed) and image.shape[1] != channels
        if isinstance(error, CadError) and not checks_channels and not isinstance(error, Misfit):
            return None
        return misfit(program.net, program.graph, image, error, channels) or wrong_size(
            image, program.plan.example_shape, program.plan.output_stride[1], error
        )

    def in_layout(self, outputs: Any) -> Any:
        """Return outputs with maps in the memory layout that the network as given returns: what follows, such as a head
        that flattens a map by `view`, may rely on it."""

        def as_given(value: Tensor) -> Tensor:
            is_repeated = 0 in value.stride()  # in no memory of its own, and stays so
            return value if is_repeated or value.is_contiguous() else in_order(value)

        if running.in_graph or not self.image.is_contiguous():
            return outputs
        return tree_map_only(Tensor, as_given, outputs)


def answer(program: Program, provider: MaskProvider, arguments: dict[str, Any]) -> Masked:
    """Return output and lattice of a call with a mask: by the network's own graph where that gives the same, and after
    a first pass where the mask reads one. Tools that count work are told of each layer."""
    if program.is_counted:
        program = calling_counters(program)
    level = provider.uniform_level(program.plan.max_level)
    if level is not None and level == program.own_level:
        return program.run_original(level, arguments)
    run = program.run_after_first_pass if provider.looks_ahead else program
    return run(program.masking(provider), arguments)


def find_lattice(program: Program, masking: Any, arguments: dict[str, Any]) -> Lattice:
    """Compute the lattice of a masking in evaluation mode, running the network only as far as needed."""
    with torch.no_grad(), evaluating(program.net), Invocation(program, arguments).explained():
        return program.ask(masking, program.before(arguments))
