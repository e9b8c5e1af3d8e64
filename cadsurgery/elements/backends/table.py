"""The table of backends, in the order in which they are tried."""

from __future__ import annotations

from cadsurgery.elements.backends.choose import BACKENDS
from cadsurgery.elements.backends.dense import Uniform
from cadsurgery.elements.backends.floors import WithoutOverlap
from cadsurgery.elements.backends.graph import GraphOperation
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.onednn import OneDNN
from cadsurgery.elements.backends.portable import Portable
from cadsurgery.elements.backends.products import Products
from cadsurgery.elements.backends.reference import Expression, Torch
from cadsurgery.elements.backends.triton_backend import Triton, TritonSamples

BACKENDS[:] = [
    Uniform(),  # uniform lattices, as an ordinary operation on a dense map
    WithoutOverlap(),  # transposed convolutions without overlap under floors, as one product
    Portable(),  # graphs for engines other than torch
    GraphOperation(),  # graphs compiled for the CPU: one custom operation, which uses this table again when it runs
    TritonSamples(),  # the same kernels where floors put all taps on the network's own grid
    Triton(),  # GPUs, gathering and multiplying in one kernel
    Native(),  # compiled C that reads rows in place
    Products(),  # products of rows, in place or gathered block by block
    OneDNN(),  # dense maps
    Expression(),  # any other graph, as an expression that compilers optimise
    Torch(),  # the reference, which supports every work, with gradients
]
