"""This package's kernels in ONNX files: functions of the domain `cadsurgery`, with standard operations as their bodies.

An engine in which the library of `kernels_for` is registered runs its kernels in place of the functions. Others run the
bodies, but for OpenVINO, which does not know functions and refuses the file.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from cadsurgery.kernels import openvino
from cadsurgery.kernels.library import find
from cadsurgery.kernels.openvino import Unusable
from cadsurgery.support.errors import CadError, check_name

DOMAIN = "cadsurgery"
CONVOLUTIONS = {2: "ConvolveDepthwise", 3: "Convolve", 4: "ConvolveGroups"}  # by the dimensions of the weight
PICK = "Pick"
CELLS, TAPS, NEAR_TAPS = "FindCells", "ReadTaps", "ReadNearTaps"
ERROR = "InterpolationError"
RESIZES = {  # by the coordinates of ONNX's operation
    "half_pixel": "ResizeLinear",
    "align_corners": "ResizeLinearAligned",
}
IN_8_BITS = (
    "In8Bits"  # suffix of functions whose rows, residual and result are uint8, and whose weight is int8
)
_INPUTS_OF_PICK = "rows, table, sources, shares"
_INPUTS = f"{_INPUTS_OF_PICK}, weight, bias, residual"
_INPUTS_IN_8_BITS = f"{_INPUTS_OF_PICK}, integer_weight, bias, residual, scales"
_INPUTS_OF_CELLS = "levels, sides"
_INPUTS_OF_TAPS = f"{_INPUTS_OF_CELLS}, anchors, index, targets, size, down, across"
_RESULTS = {CELLS: "anchors, index", TAPS: "table, sources, shares", NEAR_TAPS: "table"}
_NUMBERS = ("outside", "low", "high")
OF_8_BITS = tuple(f"{part}{of}" for of in ("", "_of_result", "_of_residual") for part in ("scale", "zero"))

# The rows that are read, `taps`: the elements, a row outside, and the halo.
_READ = """
    one = Constant <value_ints = [1]> ()
    channels = Shape <start = 1> (numbers)
    size = Concat <axis = 0> (one, channels)
    beyond = Expand (number, size)
    near = Gather (numbers, sources)
    share = Unsqueeze (shares, one)
    mixed = MatMul (share, near)
    halo = Squeeze (mixed, one){round}
    all = Concat <axis = 0> (numbers, beyond, {halo})
    {read} = Gather (all, table)"""
_TAKE = """
    numbers = Identity (rows)
    number = Constant <value_float: float = @outside> ()""" + _READ.format(round="", halo="halo", read="taps")
# In 8 bits the halo is rounded, as by the kernel.
_TAKE_8_BITS = (
    """
    s = Constant <value_float: float = @scale> ()
    z = Constant <value_float: float = @zero> ()
    least = Constant <value_float = 0.0> ()
    most = Constant <value_float = 255.0> ()
    numbers = Cast <to = 1> (rows)
    far = Constant <value_float: float = @outside> ()
    steps = Div (far, s)
    moved = Add (steps, z)
    inside = Clip (moved, least, most)
    number = Round (inside)"""
    + _READ.format(round="\n    whole_halo = Round (halo)", halo="whole_halo", read="read")
    + """
    from_zero = Sub (read, z)
    taps = Mul (from_zero, s)
    integers = Cast <to = 1> (integer_weight)
    weight = Mul (integers, scales)"""
)
_SUMS = {
    "Convolve": """
    flat = Flatten <axis = 1> (taps)
    rest = Constant <value_ints = [-1]> ()
    outputs = Shape (bias)
    sides = Concat <axis = 0> (rest, outputs)
    matrix = Reshape (weight, sides)
    sums = MatMul (flat, matrix)""",
    "ConvolveDepthwise": """
    products = Mul (taps, weight)
    sums = ReduceSum <keepdims = 0> (products, one)""",
    "ConvolveGroups": """
    same = Constant <value_ints = [0, 0]> ()
    groups = Shape <start = 1, end = 3> (weight)
    sides = Concat <axis = 0> (same, groups)
    split = Reshape (taps, sides)
    products = Einsum <equation = "ntgc,tgco->ngo"> (split, weight)
    sums = Flatten <axis = 1> (products)""",
}
_BOUND = """
    low = Constant <value_float: float = @low> ()
    high = Constant <value_float: float = @high> ()
    based = Add (sums, bias)
    added = Add (based, more)
    clipped = Clip (added, low, high)"""
_FINISH = f"""
    more = Identity (residual){_BOUND}
    out = Identity (clipped)"""
_FINISH_8_BITS = f"""
    step = Constant <value_float: float = @scale_of_result> ()
    origin = Constant <value_float: float = @zero_of_result> ()
    more_step = Constant <value_float: float = @scale_of_residual> ()
    more_origin = Constant <value_float: float = @zero_of_residual> ()
    more_number = Cast <to = 1> (residual)
    more_moved = Sub (more_number, more_origin)
    more = Mul (more_moved, more_step){_BOUND}
    scaled = Div (clipped, step)
    placed = Add (scaled, origin)
    bounded = Clip (placed, least, most)
    rounded = Round (bounded)
    out = Cast <to = 2> (rounded)"""
_BODY_OF_PICK = (
    """
    number = Constant <value_float = 0.0> ()
    numbers = Cast <to = 1> (rows)"""
    + _READ.format(round="", halo="halo", read="taken")
    + """
    picked = Squeeze (taken, one)"""
)
_FINISH_PICK = """
    out = Identity (picked)"""
_FINISH_PICK_8_BITS = """
    rounded = Round (picked)
    out = Cast <to = 2> (rounded)"""


# Number, height and width of the images, and the side of the cell of each pixel.
_SHAPE = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    all = Constant <value_ints = [-1]> ()
    shape = Shape (levels)
    batch, height, width = Split <num_outputs = 3> (shape)
    wide_sides = Cast <to = 7> (sides)
    side_map = Gather (wide_sides, levels)"""
_BODY_OF_CELLS = (
    _SHAPE
    + """
    batch_number = Squeeze (batch, first)
    height_number = Squeeze (height, first)
    width_number = Squeeze (width, first)
    images = Range (zero, batch_number, one)
    lines = Range (zero, height_number, one)
    columns = Range (zero, width_number, one)
    behind = Constant <value_ints = [1, 2]> ()
    image = Unsqueeze (images, behind)
    y = Unsqueeze (lines, second)
    up = Mod (y, side_map)
    back = Mod (columns, side_map)
    before = Mul (image, height)
    line = Add (before, y)
    start = Mul (line, width)
    pixel = Add (start, columns)
    first_line = Sub (line, up)
    first_start = Mul (first_line, width)
    first_column = Sub (columns, back)
    corner = Add (first_start, first_column)
    is_anchor = Equal (corner, pixel)
    flat = Reshape (is_anchor, all)
    counted = Cast <to = 7> (flat)
    number = CumSum (counted, zero)
    row = Sub (number, one)
    places = NonZero (flat)
    wide_anchors = Squeeze (places, first)
    anchors = Cast <to = 6> (wide_anchors)
    corners = Reshape (corner, all)
    cells = Gather (row, corners)
    index = Cast <to = 6> (cells)"""
)
# For each target and tap the pixel that is read, and the cell that it lies in.
_BODY_OF_NEAR_TAPS = (
    _SHAPE
    + """
    wide = Cast <to = 7> (targets)
    wide_size = Cast <to = 7> (size)
    target_height, target_width = Split <num_outputs = 2> (wide_size)
    x = Mod (wide, target_width)
    target_line = Div (wide, target_width)
    y = Mod (target_line, target_height)
    image = Div (target_line, target_height)
    wide_down = Cast <to = 7> (down)
    wide_across = Cast <to = 7> (across)
    behind = Constant <value_ints = [1, 2]> ()
    y_column = Unsqueeze (y, behind)
    x_column = Unsqueeze (x, behind)
    down_column = Unsqueeze (wide_down, second)
    line = Add (y_column, down_column)
    column = Add (x_column, wide_across)
    line_ends = Less (line, height)
    line_starts = GreaterOrEqual (line, zero)
    has_line = And (line_ends, line_starts)
    column_ends = Less (column, width)
    column_starts = GreaterOrEqual (column, zero)
    has_column = And (column_ends, column_starts)
    is_inside = And (has_line, has_column)
    image_column = Unsqueeze (image, behind)
    before = Mul (image_column, height)
    whole_line = Add (before, line)
    start = Mul (whole_line, width)
    any_pixel = Add (start, column)
    pixel = Where (is_inside, any_pixel, zero)
    cell = Gather (index, pixel)
    count = Shape (anchors)
    outside = Cast <to = 6> (count)"""
)
_FINISH_NEAR_TAPS = """
    entries = Where (is_inside, cell, outside)
    table = Flatten <axis = 1> (entries)"""
# Pixels that are read and are no anchors, in order; each is interpolated between the four cells around it.
_FINISH_TAPS = """
    anchor = Gather (anchors, cell)
    wide_anchor = Cast <to = 7> (anchor)
    is_at_anchor = Equal (wide_anchor, pixel)
    is_between = Not (is_at_anchor)
    is_mixed = And (is_inside, is_between)
    pixels = Shape (index)
    marked = Where (is_mixed, pixel, pixels)
    marks = Reshape (marked, all)
    size_of_marks = Shape (marks)
    ones = Expand (second, size_of_marks)
    more_pixels = Add (pixels, second)
    none = ConstantOfShape (more_pixels)
    with_last = Cast <to = 7> (none)
    written = ScatterElements (with_last, marks, ones)
    wanted = Slice (written, first, pixels)
    number = CumSum (wanted, zero)
    rank = Add (number, count)
    narrow_rank = Cast <to = 6> (rank)
    mixed = Gather (narrow_rank, pixel)
    rows = Where (is_mixed, mixed, cell)
    entries = Where (is_inside, rows, outside)
    table = Flatten <axis = 1> (entries)
    places = NonZero (wanted)
    point = Squeeze (places, first)
    flat_sides = Reshape (side_map, all)
    side = Gather (flat_sides, point)
    point_x = Mod (point, width)
    point_line = Div (point, width)
    point_y = Mod (point_line, height)
    first_line = Sub (point_line, point_y)
    up = Mod (point_y, side)
    back = Mod (point_x, side)
    top = Sub (point_y, up)
    left = Sub (point_x, back)
    below = Add (top, side)
    beside = Add (left, side)
    last_line = Sub (height, second)
    last_column = Sub (width, second)
    bottom = Min (below, last_line)
    right = Min (beside, last_column)
    real_side = Cast <to = 11> (side)
    real_up = Cast <to = 11> (up)
    real_back = Cast <to = 11> (back)
    share_down = Div (real_up, real_side)
    share_across = Div (real_back, real_side)
    whole = Constant <value_float = 1.0> ()
    whole_share = Cast <to = 11> (whole)
    rest_down = Sub (whole_share, share_down)
    rest_across = Sub (whole_share, share_across)
    share_0 = Mul (rest_down, rest_across)
    share_1 = Mul (rest_down, share_across)
    share_2 = Mul (share_down, rest_across)
    share_3 = Mul (share_down, share_across)
    top_line = Add (first_line, top)
    bottom_line = Add (first_line, bottom)
    top_start = Mul (top_line, width)
    bottom_start = Mul (bottom_line, width)
    corner_0 = Add (top_start, left)
    corner_1 = Add (top_start, right)
    corner_2 = Add (bottom_start, left)
    corner_3 = Add (bottom_start, right)
    column_0 = Unsqueeze (corner_0, second)
    column_1 = Unsqueeze (corner_1, second)
    column_2 = Unsqueeze (corner_2, second)
    column_3 = Unsqueeze (corner_3, second)
    of_0 = Unsqueeze (share_0, second)
    of_1 = Unsqueeze (share_1, second)
    of_2 = Unsqueeze (share_2, second)
    of_3 = Unsqueeze (share_3, second)
    corners = Concat <axis = 1> (column_0, column_1, column_2, column_3)
    mix = Concat <axis = 1> (of_0, of_1, of_2, of_3)
    shares = Cast <to = 1> (mix)
    nothing = Sub (whole_share, whole_share)
    is_read = Greater (mix, nothing)
    read = Where (is_read, corners, column_0)
    sources = Gather (index, read)"""
_FOUND = {
    CELLS: (_INPUTS_OF_CELLS, _BODY_OF_CELLS),
    TAPS: (_INPUTS_OF_TAPS, _BODY_OF_NEAR_TAPS + _FINISH_TAPS),
    NEAR_TAPS: (_INPUTS_OF_TAPS, _BODY_OF_NEAR_TAPS + _FINISH_NEAR_TAPS),
}


# Inputs and bodies of functions of maps (B, C, H, W); the error is that of maps whose samples are rows.
_OF_MAPS = {
    name: (
        "maps, sizes",
        f"""
    wide = Cast <to = 7> (sizes)
    out = Resize <mode = "linear", coordinate_transformation_mode = "{coordinates}"> (maps, , , wide)""",
    )
    for coordinates, name in RESIZES.items()
}
_OF_MAPS[ERROR] = (
    "rows, sizes",
    """
    wide = Cast <to = 7> (sizes)
    rest = Constant <value_ints = [-1]> ()
    shape = Concat <axis = 0> (wide, rest)
    maps = Reshape (rows, shape)
    start = Constant <value_ints = [0, 0]> ()
    end = Constant <value_ints = [2147483647, 2147483647]> ()
    axes = Constant <value_ints = [2, 3]> ()
    second = Constant <value_ints = [2, 2]> ()
    by_channel = Transpose <perm = [0, 3, 1, 2]> (maps)
    taken = Slice (by_channel, start, end, axes, second)
    batch = Shape <end = 2> (taken)
    count = Shape <start = 2> (taken)
    twice = Mul (count, second)
    last = Constant <value_ints = [1, 1]> ()
    size = Sub (twice, last)
    new = Concat <axis = 0> (batch, size)
    between = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (taken, , , new)
    own = Shape <start = 2> (by_channel)
    more = Sub (own, size)
    pads = Concat <axis = 0> (start, start, start, more)
    everywhere = Pad <mode = "edge"> (between, pads)
    missed = Sub (by_channel, everywhere)
    squares = Mul (missed, missed)
    channels = Constant <value_ints = [1]> ()
    out = ReduceSum <keepdims = 0> (squares, channels)""",
)


def function(name: str, opset: int) -> Any:
    """Return a function of the domain as an ONNX message."""
    import onnx.parser

    kind, is_in_8_bits = name.removesuffix(IN_8_BITS), name.endswith(IN_8_BITS)
    numbers: tuple[str, ...] = ()
    if kind in _FOUND:
        inputs, body = _FOUND[kind]
    elif kind in _OF_MAPS:
        inputs, body = _OF_MAPS[kind]
    elif kind == PICK:
        inputs, body = (
            _INPUTS_OF_PICK,
            _BODY_OF_PICK + (_FINISH_PICK_8_BITS if is_in_8_bits else _FINISH_PICK),
        )
    elif is_in_8_bits:
        inputs, numbers = _INPUTS_IN_8_BITS, _NUMBERS + OF_8_BITS
        body = _TAKE_8_BITS + _SUMS[kind] + _FINISH_8_BITS
    else:
        inputs, numbers = _INPUTS, _NUMBERS
        body = _TAKE + _SUMS[kind] + _FINISH
    attributes = f"<{', '.join(numbers)}>" if numbers else ""
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} {attributes} ({inputs}) => ({_RESULTS.get(kind, 'out')}) {{{body}\n}}"
    )


def schema(name: str) -> Any:
    """Return the ONNX schema of a function of floats, or of one that finds cells or taps."""
    from onnx.defs import OpSchema

    def named(names: str, integers: Container[str]) -> list[Any]:
        return [
            OpSchema.FormalParameter(one, f"tensor({'int32' if one in integers else 'float'})")
            for one in names.split(", ")
        ]

    attributes: tuple[str, ...] = ()
    if name in _FOUND:
        names = _FOUND[name][0]
        integers: Container[str] = [*names.split(", "), "table", "sources"]
    elif name in _OF_MAPS:
        names, integers = _OF_MAPS[name][0], ("sizes",)
    else:
        names, attributes = (_INPUTS_OF_PICK, ()) if name == PICK else (_INPUTS, _NUMBERS)
        integers = ("table", "sources")
    numbers = [OpSchema.Attribute(attribute, OpSchema.AttrType.FLOAT) for attribute in attributes]
    inputs, outputs = named(names, integers), named(_RESULTS.get(name, "out"), integers)
    return OpSchema(name, DOMAIN, 1, inputs=inputs, outputs=outputs, attributes=numbers)


def kernels_for(engine: str = "onnxruntime") -> str:
    """Return the path of the library that brings this package's kernels to an engine, on the CPU.

    For files of `export(..., with_kernels=True)`, in ONNX Runtime 1.20 or newer:

        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(cadsurgery.kernels_for("onnxruntime"))
        session = onnxruntime.InferenceSession("net.onnx", options)

    The library depends on nothing; a copy of it can be registered where this package is not installed.

    In OpenVINO, whose extension is compiled for the installed version, once, by a C++ compiler:

        core = openvino.Core()
        core.add_extension(cadsurgery.kernels_for("openvino"))
        model = core.read_model("net.onnx")

    It loads the library for ONNX Runtime from its own folder, if a copy is there.

    Args:
        engine: name of the engine's package: `onnxruntime` or `openvino`.

    Raises:
        UnknownName: there are no kernels for this engine.
        CadError: there is no compiled library; or the extension cannot be built.
        NotInstalled: OpenVINO is missing, for which an extension is built.
    """
    check_name("engine with kernels", engine, ("onnxruntime", "openvino"))
    path = find().path
    if path is None:
        raise CadError(
            "there is no library of compiled kernels.",
            where="cadsurgery.kernels_for",
            why=f"{find().reason}.",
            next="install a wheel, or from source with a C compiler; ONNX Runtime runs the file without it, too.",
        )
    if engine == "onnxruntime":
        return str(path)
    try:
        return str(openvino.extension(path))
    except Unusable as error:
        raise CadError(
            "there are no kernels for OpenVINO.",
            where="cadsurgery.kernels_for",
            why=f"{error}.",
            next=error.next,
        ) from error


def resize_by_kernels(model: Any) -> None:
    """Let the bilinear resizes of an ONNX model (onnx_ir) call functions.

    ONNX Runtime and OpenVINO take two to four times as long for them, which counts where the rest is in 8 bits.
    """
    import onnx_ir

    for node in [operation for operation in model.graph if operation.op_type == "Resize"]:
        maps, *_, sizes = [*node.inputs, None, None, None][:4]
        of = {name: attribute.value for name, attribute in node.attributes.items()}
        function = RESIZES.get(of.get("coordinate_transformation_mode", "half_pixel"))
        is_linear = of.get("mode") == "linear" and not of.get("antialias")
        is_known = maps is not None and maps.dtype == onnx_ir.DataType.FLOAT and len(maps.shape or ()) == 4
        if is_linear and is_known and function and sizes is not None:
            narrow = onnx_ir.node("Cast", [sizes], {"to": onnx_ir.DataType.INT32})
            model.graph.insert_before(node, narrow)
            node.domain, node.op_type = DOMAIN, function
            node.attributes.clear()
            node.resize_inputs(2)
            node.replace_input_with(1, narrow.outputs[0])


def add_functions(model: Any) -> None:
    """Add the functions that an ONNX model (onnx_ir) calls."""
    import onnx_ir

    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name in sorted(called):
        made = onnx_ir.serde.deserialize_function(function(name, model.graph.opset_imports[""]))
        model.functions[made.identifier()] = made
    if called:
        model.graph.opset_imports[DOMAIN] = 1
