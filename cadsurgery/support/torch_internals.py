"""All private names of torch that this package uses, each with its reason: what to look at for a new torch.

`from cadsurgery.support.torch_internals import tree_leaves` gives one. A name is looked up when it is first asked for:
those of torch's exporters and compilers lie in modules that `import torch` does not load, and are asked for where they
are used, as `torch_internals.min_of_sizes`. What torch may change while it runs is asked for by a function.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple
from unittest import mock

import torch

from cadsurgery.support.errors import CadError


class Internal(NamedTuple):
    """A private name of torch.

    Attributes:
        place: where it is, as it is written in Python.
        why: what it is needed for.
        since: the first version of torch that has it, where that is not the oldest one supported.
        part: the part of torch without which there is no such name, of `torch.backends`.
    """

    place: str
    why: str
    since: str = ""
    part: str = ""


_TREE, _NESTED = "torch.utils._pytree", "torch has no public functions for nested outputs and arguments"
_MODE, _SEES = "torch.utils._python_dispatch", "there is no public way to see each operation as it is run"
_PASSES = "torch.onnx._internal.fx.passes.type_promotion"
_PACKED = "weights in oneDNN's layout, which torch packs only in its own inference compiler"

NAMES: dict[str, Internal] = {
    "tree_flatten": Internal(f"{_TREE}.tree_flatten", _NESTED),
    "tree_flatten_with_path": Internal(f"{_TREE}.tree_flatten_with_path", _NESTED),
    "tree_leaves": Internal(f"{_TREE}.tree_leaves", _NESTED),
    "tree_map": Internal(f"{_TREE}.tree_map", _NESTED),
    "tree_map_only": Internal(f"{_TREE}.tree_map_only", _NESTED),
    "tree_unflatten": Internal(f"{_TREE}.tree_unflatten", _NESTED),
    "MappingKey": Internal(f"{_TREE}.MappingKey", "the kind of a step to a nested output"),
    "TorchDispatchMode": Internal(f"{_MODE}.TorchDispatchMode", _SEES),
    "current_dispatch_mode": Internal(
        f"{_MODE}._get_current_dispatch_mode", "compiled kernels are no operations that a mode would see"
    ),
    "OpOverload": Internal("torch._ops.OpOverload", "tells operations of torch from other functions"),
    "HigherOrderOperator": Internal("torch._ops.HigherOrderOperator", "counted by rules of their own"),
    "BatchNorm": Internal("torch.nn.modules.batchnorm._BatchNorm", "the base of all batch normalisations"),
    "is_profiled": Internal("torch.autograd._profiler_enabled", "names of backends cost time in every call"),
    "interpreters": Internal(
        "torch._C._functorch.peek_interpreter_stack", "torch.func would not see compiled kernels"
    ),
    "is_transformed": Internal(
        "torch._C._functorch.is_functorch_wrapped_tensor", "masks read values, which torch.func hides"
    ),
    "has_global_hooks": Internal(
        "torch.nn.modules.module._has_any_global_hook", "a recorded call calls no module, so no hook either"
    ),
    "tracing_state": Internal("torch._C._get_tracing_state", "torch.jit.trace is refused in words"),
    "traced_modules": Internal(
        "torch.jit._trace._trace_module_map", "torch.jit.trace reads attributes before it traces"
    ),
    "exporting_flag": Internal(
        "torch.compiler._is_exporting_flag",
        "torch.compiler.is_exporting is also True in torch.compile before torch 2.15",
    ),
    "add_and_activate": Internal("torch._addmm_activation", "product, bias and ReLU in one call on a GPU"),
    "packed_linear": Internal("torch.ops.mkldnn._reorder_linear_weight", _PACKED, part="mkldnn"),
    "packed_convolution": Internal("torch.ops.mkldnn._reorder_convolution_weight", _PACKED, part="mkldnn"),
    "multiply_packed": Internal("torch.ops.mkldnn._linear_pointwise", _PACKED, part="mkldnn"),
    "convolve_packed": Internal("torch.ops.mkldnn._convolution_pointwise", _PACKED, part="mkldnn"),
    "packs_bfloat16": Internal(
        "torch.ops.mkldnn._is_mkldnn_bf16_supported", "bfloat16 is packed where it is fast", part="mkldnn"
    ),
    "min_of_sizes": Internal(
        "torch.utils._sympy.functions.Min", "a size that is the smaller of two is at most each of them"
    ),
    # Of torch's compilers and exporters: network/export.
    "compiler_options": Internal("torch._dynamo.config", "assertions on sizes, which ONNX does not have"),
    "tracing_for_export": Internal("torch.export._trace", "it prints graphs of thousands of lines"),
    "sizes_options": Internal("torch.fx.experimental._config", "what torch proves of sizes as it exports"),
    "prove_less": Internal(
        "torch.fx.experimental._config.aggressive_guard_free_semantics",
        "proofs took a fifth of an export",
        since="2.12",
    ),
    "insert_assertions": Internal(
        "torch._export.utils.insert_deferred_runtime_asserts", "it cannot write those on quotients"
    ),
    "without_code": Internal(
        "torch.fx._lazy_graph_module._use_lazy_graph_module", "code of graphs that nobody reads"
    ),
    "note_formats": Internal(
        "torch.fx.experimental.proxy_tensor._extract_tensor_metadata", "memory formats that nobody reads"
    ),
    "promoter": Internal(f"{_PASSES}._TypePromotionInterpreter", "it computes values that are known"),
    "promotion_of": Internal(f"{_PASSES}.get_type_promotion_rule", "the types that an operation needs"),
    "decomposed_always": Internal(
        "torch._C.DispatchKey.CompositeImplicitAutograd", "operations that torch always takes apart"
    ),
}

# Private attributes of torch's objects: the class, its attributes, and the reason.
ATTRIBUTES: dict[str, tuple[tuple[str, ...], str]] = {
    "torch.nn.Module": (
        (
            *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
            *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
            *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
            *("_is_full_backward_hook", "_apply", "_load_from_state_dict", "_save_to_state_dict"),
            *("_version", "_get_name"),
        ),
        "converted networks share parameters and hooks with the original, and refuse what would be lost",
    ),
    "torch.nn.BatchNorm2d": (("_check_input_dim",), "classes that override only it compute the same"),
    "torch.fx.Graph": (("_codegen", "_tracer_cls"), "a graph that is written again is called as before"),
    "torch.ops.aten.add.Tensor": (
        ("_schema", "_overloadname", "_overloadpacket"),
        "what an operation changes, and its other forms",
    ),
    "torch.ops.aten": (
        ("_unsafe_view", "_to_copy", "_adaptive_avg_pool2d"),
        "operations as torch.export writes them",
    ),
    "torch.nn.utils.prune.L1Unstructured": (("_tensor_name",), "the weight that is pruned"),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _look_up(NAMES[name].place)
    return found


def find(name: str) -> Any:
    """Return what has this name, None where torch was built without the part that it belongs to."""
    part = getattr(torch.backends, NAMES[name].part, None)
    return __getattr__(name) if part is not None and part.is_available() else None


def is_here(name: str) -> bool:
    """True if this version of torch has a name that older ones lack."""
    with suppress(CadError):
        _look_up(NAMES[name].place)
        return True
    return False


def put(name: str, value: Any) -> AbstractContextManager[Any]:
    """Put something in the place of what has this name, in a `with` block."""
    owner, _, attribute = NAMES[name].place.rpartition(".")
    return mock.patch.object(_look_up(owner), attribute, value)


def is_exporting() -> bool:
    """Return True inside torch.export; before torch 2.15 torch's own function is True in torch.compile, too."""
    return torch.compiler._is_exporting_flag


def is_traced_by_jit() -> bool:
    """True while torch.jit traces a network, or looks through its attributes before."""
    return torch._C._get_tracing_state() is not None or bool(torch.jit._trace._trace_module_map)


def _look_up(place: str) -> Any:
    """Return what is at a place.

    Raises:
        CadError: this version of torch does not have it.
    """
    value, path = torch, "torch"
    for part in place.split(".")[1:]:
        path = f"{path}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            value = _module(path)
    return value


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torch"):
            raise  # the module is there, and a package that it needs is not
        why = next(row.why for row in NAMES.values() if row.place.startswith(path))
        raise CadError(
            f"torch {torch.__version__} has no {path}.",
            why=f"{why}.",
            next="install versions that go together: pip install --upgrade cadsurgery.",
        ) from error
