"""Walk over and copy torch.fx graphs."""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cadsurgery.elements.on_rows import OnRows
from cadsurgery.elements.operations import operation_of
from cadsurgery.following.guards import is_of_library
from cadsurgery.support import torch_operations
from cadsurgery.support.torch_operations import asks, is_in_place, name_of

# The name of the file that code made from graphs seems to come from, in tracebacks.
GRAPH_FILE = "<cadsurgery graph>"
_CALLS = ("call_function", "call_method")  # calls that read no module


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph with its output; also return the copy of each node."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph, copies))
    return copied, copies


def upwards(
    node: fx.Node, sources: Callable[[fx.Node], list[fx.Node]] = attrgetter("all_input_nodes")
) -> Iterator[fx.Node]:
    """Yield a node and its ancestors, nearest first; `sources` returns the nodes that a node is followed to."""
    waiting, seen = [node], {node}
    for one in waiting:
        yield one
        waiting += (new := [source for source in sources(one) if source not in seen])
        seen.update(new)


def follows_from(node: fx.Node, is_first: Callable[[fx.Node], bool]) -> bool:
    """True if a node, or all that it is computed from, is first. It takes no recursion: networks are deep."""
    above = upwards(node, lambda one: [] if is_first(one) else one.all_input_nodes)
    return all(is_first(one) or one.all_input_nodes for one in above)


def and_after(*nodes: fx.Node, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return nodes and all their descendants, except nodes of `without` and what is reached only through these."""
    reached, pending = set[fx.Node](), list(nodes)
    while pending:
        if (last := pending.pop()) not in reached and last not in without:
            reached.add(last)
            pending.extend(last.users)
    return reached


def upstream(*nodes: fx.Node) -> set[fx.Node]:
    """Return nodes and all their ancestors."""
    return {source for node in nodes for source in upwards(node)}


def downstream(
    nodes: Iterable[fx.Node], is_first: Callable[[fx.Node], Any], only: bool = False
) -> set[fx.Node]:
    """Return the nodes that are first, and those computed from any of them; with `only`, the calls computed from these
    alone."""
    found = set[fx.Node]()
    for node in nodes:
        sources = node.all_input_nodes
        behind = sources and node.op in _CALLS and found.issuperset(sources)
        if is_first(node) or (behind if only else not found.isdisjoint(sources)):
            found.add(node)
    return found


def gives(node: Any, kind: str) -> bool:
    """True if a node is an operation on elements with results of a kind, see `Operation.gives`."""
    operation = operation_of(node.target) if isinstance(node, fx.Node) else None
    return operation is not None and operation.gives == kind


def called_modules(graph: fx.Graph) -> set[str]:
    """Return the names of the modules that a graph calls on maps or rows."""
    held = (node.args[0].target for node in graph.nodes if torch_target(node) is None)
    return {str(node.target) for node in graph.nodes if node.op == "call_module"} | set(map(str, held))


def parts_read(root: nn.Module, *graphs: fx.Graph) -> nn.Module:
    """Return a module that holds what graphs call and read of a network alone, under the same names.

    A `torch.fx.GraphModule` holds it, too, beside attributes of its own, such as `code`, `graph` and `meta`.
    """
    held = nn.Module()
    named = (node for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr"))
    for path in dict.fromkeys(str(node.target) for node in named):
        source, part = root, held
        *holders, name = path.split(".")
        for holder in holders:
            if holder not in part._modules:
                part.add_module(holder, nn.Module())
            source, part = getattr(source, holder), getattr(part, holder)
        value = getattr(source, name)
        if source is not part:  # which is there as a whole
            is_buffer = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            part.register_buffer(name, value) if is_buffer else setattr(part, name, value)
    return held


def torch_target(node: fx.Node) -> Any:
    """Return what a node calls: for an operation on rows, the operation."""
    return node.target.operation if isinstance(node.target, OnRows) else node.target


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the only user of a value; None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def changes_in_place(node: fx.Node, called: Callable[[fx.Node], Any]) -> bool:
    """True if a node changes its first operand in place; `called` gives the module, function or method of a node."""
    operand = _first_operand(node)
    return operand is not None and is_in_place(called(node), node.args, node.kwargs)


def read_elsewhere(node: fx.Node, called: Callable[[fx.Node], Any]) -> set[fx.Node]:
    """Return what reads the memory that a node changes in place, through the same value or another view of it, but not
    through the node."""

    def is_view(one: fx.Node) -> bool:
        target = called(one)
        stated = torch_operations.operation_of(target)
        is_same = stated is not None and (stated.kind in _VIEWS or stated.keeps_values)
        return (is_same or target is operator.getitem) and name_of(target) != "clone"

    whole: Any = _first_operand(node)
    while _first_operand(whole) is not None and is_view(whole):
        whole = _first_operand(whole)
    sharing = [whole]
    for one in sharing:
        views = (user for user in one.users if _first_operand(user) is one and is_view(user))
        sharing += [user for user in views if user is not node]
    return {user for one in sharing for user in one.users} - {*sharing, node}


_VIEWS = ("copies", "converts", "reshapes", "permutes", "splits", "selects")  # kinds of operations


def _first_operand(node: fx.Node) -> fx.Node | None:
    operands = node.args[torch_target(node) is None :]
    return operands[0] if operands and isinstance(operands[0], fx.Node) else None


def axes_order(node: fx.Node, rank: int) -> list[int] | None:
    """Return the order in which a transposition or permutation puts the axes; None for any other node, or if its axes
    are not written out."""
    stated: Any = (*node.args[1:], *node.kwargs.values())
    if name_of(node.target) == "permute":
        order = list(stated[0] if isinstance(stated[0], (tuple, list)) else stated)
        return order if all(isinstance(axis, int) for axis in order) else None
    if name_of(node.target) in ("movedim", "moveaxis") and len(stated) == 2:
        return _moved(rank, *stated)
    is_swap = name_of(node.target) in ("transpose", "swapaxes", "swapdims")
    if not is_swap or len(stated) != 2 or not all(isinstance(axis, int) for axis in stated):
        return None
    order = list(range(rank))
    first, second = stated
    order[first], order[second] = order[second], order[first]
    return order


def _moved(rank: int, sources: Any, places: Any) -> list[int] | None:
    """Return the order in which `torch.movedim` puts the axes; None if they are not written out."""
    pairs = [value if isinstance(value, (tuple, list)) else (value,) for value in (sources, places)]
    if not all(isinstance(axis, int) for axis in (*pairs[0], *pairs[1])):
        return None
    moved = torch.empty(tuple(range(rank)), device="cpu").movedim(*(tuple(axes) for axes in pairs))
    return list(moved.shape)  # the lengths of the axes are their numbers


class Interpreter(fx.Interpreter):
    """torch.fx's interpreter with the errors of operations as they are: torch.fx adds a node, and advice on its own
    tools, to messages that users read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what torch.fx's takes."""
        super().__init__(*args, **kwargs)
        self.extra_traceback = False


# Operations whose arguments behind the first are sizes, and calls that read numbers of a tensor.
_TAKE_SIZES = frozenset(
    ("interpolate", "pad", "view", "reshape", "expand", "repeat", "narrow", "adaptive_avg_pool2d", "roll")
)
_READ_NUMBERS = frozenset(
    ("tolist", "item", "int", "float", "bool", "numpy", "__int__", "__float__", "__index__", "check_branch")
)


def takes_sizes(node: fx.Node) -> bool:
    """True if the arguments of a node behind its first are sizes."""
    return name_of(node.target) in _TAKE_SIZES


def sizes_in_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes from sizes, held in tensors such as `torch.tensor(x.shape)`, to where numbers are read of them:
    where a graph runs on shapes alone these have values all the same."""

    def is_size(node: fx.Node) -> bool:
        is_made = node.op == "call_function" and not node.all_input_nodes
        return asks(node) or name_of(node.target) == "native_shape" or is_made

    read = {node for node in graph.nodes if name_of(node.target) in _READ_NUMBERS}
    read |= {one for node in graph.nodes if takes_sizes(node) for one in node.all_input_nodes[1:]}
    found = set[fx.Node]()
    for node in read:
        if follows_from(node, is_size):
            found.update(upwards(node, lambda one: [] if is_size(one) else one.all_input_nodes))
    return found


class Constants:
    """Values of nodes that are computed only from modules and parameters, each computed on first use."""

    def __init__(self, interpreter: fx.Interpreter) -> None:
        """Take the interpreter that runs the nodes of a graph."""
        self._interpreter, self._values = interpreter, dict[fx.Node, Any]()
        self._fixed = downstream(interpreter.graph.nodes, lambda node: node.op == "get_attr", only=True)

    def get(self, node: Any) -> Any:
        """Return the detached value of a node; None if it is not constant, or computed from constants that are neither
        tensors nor modules."""
        if node not in self._fixed:
            return None
        if node not in self._values:
            known = {source: self.get(source) for source in node.all_input_nodes}
            value = None
            if all(isinstance(part, (Tensor, nn.Module)) for part in known.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                with torch.no_grad():
                    value = getattr(self._interpreter, node.op)(node.target, args, kwargs)
            self._values[node] = value.detach() if isinstance(value, Tensor) else value
        return self._values[node]


def raised_by(error: BaseException, graph: fx.Graph) -> fx.Node | None:
    """Return the node of a graph, compiled by `program.runnable`, in which an error was raised; None if it was none."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == GRAPH_FILE
    ]
    nodes = [node for line in lines if (node := written_at(line, graph)) is not None]
    return nodes[-1] if nodes else None


def written_at(line: int, graph: fx.Graph) -> fx.Node | None:
    """Return the node whose Python code stands on a line, counted from 1, of the code of a graph."""
    lines, names = graph.python_code("self").src.splitlines(), {node.name: node for node in graph.nodes}
    return names.get(lines[line - 1].split("=")[0].split(":")[0].strip()) if line <= len(lines) else None


def line_that_runs() -> int | None:
    """Return the line of a graph's code, compiled by `program.runnable`, that is running; None if none is."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != GRAPH_FILE:
        frame = frame.f_back
    return frame.f_lineno if frame is not None else None


def pads(operation: Any) -> bool:
    """True for torch's function and modules that pad a map."""
    return operation is F.pad or type(operation).__module__ == "torch.nn.modules.padding"


def module_of(node: fx.Node) -> str:
    """Return the qualified name of the module in whose forward a node was traced; empty for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(stack.values())), "") if stack else ""


def source_line(node: fx.Node) -> str:
    """Return the line of the network's own code that a node comes from, e.g. `resnet.py:148`."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    places = [line.removeprefix('File "').split('", line ') for line in lines if line.startswith('File "')]
    own = [(file, rest) for file, rest in places if not is_of_library(file)]
    if not own:
        return ""
    file, rest = own[-1]
    return f"{Path(file).name}:{rest.partition(',')[0]}"
