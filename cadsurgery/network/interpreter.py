"""Running a rewritten graph node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx, nn

if TYPE_CHECKING:
    from cadsurgery.network.model import AdaptiveModel


class GraphInterpreter(fx.Interpreter):
    """Runs a graph of an adaptive network with the modules and parameters it names."""

    def __init__(self, net: AdaptiveModel, graph: fx.Graph) -> None:
        """Take the network and its rewritten graph, or a part of it."""
        super().__init__(nn.Module(), graph=graph)
        self.names = net.names()
        self.extra_traceback = False  # errors of masks are for users

    def fetch_attr(self, target: str) -> Any:
        """Parameters and modules by the names the graph uses."""
        value = self.names
        for part in target.split("."):
            value = getattr(value, part)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module of the network."""
        return self.fetch_attr(str(target))(*args, **kwargs)
