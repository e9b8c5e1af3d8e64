"""The signature that a converted network shows: the original's, with what the conversion adds behind it.

Libraries look at it to see which inputs a network takes; a trainer, for one, drops all others from its batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Forward:
    """A forward that takes any arguments and shows those of the original network, `net.original_signature`.

    A method of a class, by decoration; on an instance it is called as any method is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, net: nn.Module | None, kind: type | None = None) -> Any:
        return self.function if net is None else _BoundForward(self.function, net)


class _BoundForward:
    def __init__(self, function: Callable[..., Any], net: nn.Module) -> None:
        self.__func__, self.__self__, self.__doc__ = function, net, function.__doc__
        self.__name__, self.__code__ = (
            "forward",
            getattr(function, "__code__", None),
        )  # exporters read the code's place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self.__func__).parameters.values()
        original: Any = self.__self__.original_signature
        added = [one for one in own if one.kind is one.KEYWORD_ONLY and one.name not in original.parameters]
        named = [one for one in original.parameters.values() if one.kind is not one.VAR_KEYWORD]
        rest = [one for one in original.parameters.values() if one.kind is one.VAR_KEYWORD]
        return original.replace(parameters=[*named, *added, *rest])
