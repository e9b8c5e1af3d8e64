"""The text form of masks, and `resolve_mask`, which turns what a user passes into a mask.

    mask   = sum { "|" wrapper }             a wrapper works on everything before it
    sum    = term { "+" term }               the finest level of several masks; binds tighter than the pipe
    term   = name [":" options] | module ":" function | "(" mask ")"
    options = option "=" value {"," option "=" value}

`module:function` names a function of the user, from images to a map; what reads files of other people forbids it.
For example, `edges + gradient:threshold=1 | budget:fraction=0.3` is a budget of both masks together, while
`edges + (gradient | budget:fraction=0.1)` is edges plus a tenth of the patches by gradient.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadsurgery.masks.basic import TENSOR, FixedMask, FunctionMask
from cadsurgery.masks.mask_options import format_options, options_of, read_option
from cadsurgery.masks.provider import PROVIDERS, MaskProvider
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.plain import split_options

PIPE, PLUS = "|", "+"
_MARKS = re.compile(r"([|()]|\+(?!\s*[\d.]))")  # the plus of 1e+16 belongs to a number
_END = ""
_GONE = {  # what to use instead of masks that were here, which files may name
    "saliency": '"detail", or module:function for a function of your own',
    **dict.fromkeys(
        ("gain", "oracle"), '"detail", or a mask of recipes/voc_deeplab/gain.py, which is imported first'
    ),
}
_MAX_MARKS = 64  # masks are read, written and evaluated recursively


def resolve_mask(mask: object) -> MaskProvider:
    """Return a provider for a text (see above), a provider, a callable image -> map, or a tensor.

    Raises:
        UnknownName: there is no such mask or option; the closest names are listed.
        InvalidInput: the text cannot be read, or `mask` has another type.
    """
    if isinstance(mask, MaskProvider):
        return mask
    if isinstance(mask, str):
        return parse(mask)
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biu":
        mask = torch.from_numpy(mask.astype(np.int64) if mask.dtype.kind == "u" else mask.copy())
    if isinstance(mask, Tensor):
        return FixedMask(mask)
    if callable(mask):
        return FunctionMask(mask)
    raise InvalidInput(
        f"{describe(mask)} is not a mask.",
        next='give a name such as "edges", a tensor or an array of levels, a provider or a function image -> map.',
    )


def parse(text: str, *, tensors: bool = False) -> MaskProvider:
    """Parse the text form of a mask.

    Args:
        text: the text form.
        tensors: accept the placeholder that files contain for a tensor, as a mask whose tensor is loaded later;
            otherwise the placeholder is an unknown name.

    Raises:
        UnknownName: there is no such mask, wrapper or option; the closest names are listed.
        InvalidInput: a value cannot be read, a part is missing, or a wrapper is used as a mask or the other way
            round.
    """
    reader = _Reader(text, tensors)
    if (marks := len(_MARKS.findall(text))) > _MAX_MARKS:
        raise InvalidInput(
            f"the mask {text[:40]!r}... has {marks} pipes, pluses and parentheses.",
            next=f"write one with at most {_MAX_MARKS}.",
        )
    mask = reader.mask()
    if reader.next() != _END:
        raise _unfinished(text, f"{reader.next()!r} is not expected here")
    return mask


def join(masks: list[str]) -> str:
    """Return the text form of a union of masks, each in text form."""
    return f" {PLUS} ".join(f"({mask})" if _MARKS.search(mask) else mask for mask in masks)


class _Reader:
    """Reads the text form from left to right."""

    def __init__(self, text: str, tensors: bool) -> None:
        self.text, self.tensors = text, tensors
        self.pieces = [piece.strip() for piece in _MARKS.split(text) if piece.strip()]

    def next(self) -> str:
        return self.pieces[0] if self.pieces else _END

    def accept(self, mark: str) -> bool:
        """Consume the mark if it comes next; True if it did."""
        follows = self.next() == mark
        if follows:
            self.pieces.pop(0)
        return follows

    def words(self) -> str:
        """Consume and return the text before the next mark."""
        return self.pieces.pop(0) if self.next() not in (_END, PIPE, PLUS, "(", ")") else ""

    def mask(self) -> MaskProvider:
        mask = self.sum()
        while self.accept(PIPE):
            mask = _named(self.words(), mask)
        return mask

    def sum(self) -> MaskProvider:
        terms = [self.term()]
        while self.accept(PLUS):
            terms.append(self.term())
        return PROVIDERS["union"](*terms) if len(terms) > 1 else terms[0]

    def term(self) -> MaskProvider:
        if self.accept("("):
            mask = self.mask()
            if not self.accept(")"):
                raise _unfinished(self.text, "a parenthesis is not closed")
            return mask
        words = self.words()
        if self.tensors and words == TENSOR:
            return FixedMask(torch.zeros(1, 1))
        if not words and self.next() == PIPE:
            self.pieces.pop(0)
            raise InvalidInput(
                f"nothing stands before the pipe in {self.text!r}.",
                next=f"write a mask there: {_example_of_a_pipe(wrapper=self.words() or 'budget')}.",
            )
        if not words and (self.next() != _END or self.text.strip()):
            raise _unfinished(
                self.text, f"a mask is missing before {repr(self.next()) if self.pieces else 'the end'}"
            )
        return _named(words)


def _unfinished(text: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"the mask {text!r} cannot be read: {what}.",
        next='write masks as "edges", "edges + gradient" or "(edges | dilate) + gradient | budget:fraction=0.3".',
    )


def _named(text: str, *inner: MaskProvider) -> MaskProvider:
    """Create the mask with this name and these options; `inner` is the mask before the pipe, for a wrapper."""
    name = text.partition(":")[0].strip()
    provider: Any = PROVIDERS.get(name)
    if provider is not None and provider.takes == ("one" if inner else "none"):
        return provider(*inner, **_options(name, text))
    if provider is None and inner:
        known = [known for known, wrapper in PROVIDERS.items() if wrapper.takes == "one"]
        raise UnknownName("mask wrapper", name, known, next=f"write {_example_of_a_pipe()}.")
    if provider is None and ":" in text and "=" not in text:
        return FunctionMask(text.strip())
    if provider is None and name in _GONE:
        raise InvalidInput(f"mask {name!r} is gone; instead: {_GONE[name]}.", next="give such a mask.")
    if provider is None:
        raise UnknownName("mask", name, PROVIDERS)
    needed = "other masks" if provider.takes == "many" else "another mask"
    problem = f"mask {name!r} " + ("cannot stand behind a pipe." if inner else f"needs {needed} to work on.")
    if provider.takes == "many":
        raise InvalidInput(
            problem, why="it is made of several masks.", next='write a plus between them: "edges + gradient".'
        )
    if provider.takes == "one":
        raise InvalidInput(
            problem, next=f"write that before it and a pipe: {_example_of_a_pipe(wrapper=text)}."
        )
    raise InvalidInput(
        problem,
        why="it is a mask of its own and takes no other.",
        next=f"write only {text!r}, a wrapper behind it: {_example_of_a_pipe(text)}, "
        f'or a plus between both: "edges {PLUS} {text}".',
    )


def _example_of_a_pipe(mask: str = DEFAULT_MASK, wrapper: str = "budget:fraction=0.3") -> str:
    return f'"{mask.strip()} {PIPE} {wrapper.strip()}"'


def _options(name: str, text: str) -> dict[str, Any]:
    """Parse the options that follow the name of a mask."""
    defaults = options_of(PROVIDERS[name])
    example = f"e.g. {name}:{format_options(defaults)}" if defaults else f"mask {name!r} takes no options."
    texts = split_options(text.partition(":")[2], defaults, f"mask {name!r}", next=example)
    return {option: read_option(name, option, value, defaults[option]) for option, value in texts.items()}
