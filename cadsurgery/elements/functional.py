"""The operations of a convolutional network on elements: the counterpart of `torch.nn.functional` for dense maps.

Every function takes and returns `Elements`, computes only the elements of its output lattice, is
differentiable, and treats the images of a batch independently. Pointwise functions need no entry
here, because they act on `rows` directly.
"""

from cadsurgery.elements.backends.weights import transpose_weight
from cadsurgery.elements.borders import check_same_padding, crop, pad
from cadsurgery.elements.elements import (
    Elements,
    common_lattice,
    fine_map,
    native_shape,
    one_sample,
    rows_on,
    small_map,
    to_dense,
    to_elements,
)
from cadsurgery.elements.gaps import fill_gaps, gaussian_fill
from cadsurgery.elements.mean_shift import shift_vector
from cadsurgery.elements.on_rows import OnRows, keep
from cadsurgery.elements.refinement import refine, refine_resized
from cadsurgery.elements.resizing import interpolate, pixel_shuffle, resize, resize_to_dense
from cadsurgery.elements.unpooling import dense_indices, max_pool2d_with_indices
from cadsurgery.elements.whole_image import (
    batch_norm,
    contiguous_gradient,
    drop_channels,
    drop_per_image,
    exact_layout,
    global_max,
    global_mean,
    global_reduce,
    group_deviation,
    group_norm,
    matrix_on_rows,
    norm_of_batch,
    normalize_over_image,
    pool_to_bins,
    scale_and_shift,
    softmax_over_image,
    sum_of_products,
)
from cadsurgery.elements.windows import (
    avg_pool2d,
    conv2d,
    conv2d_per_image,
    fused_conv2d,
    max_pool2d,
    pixel_unshuffle,
)
