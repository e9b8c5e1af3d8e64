"""The table of backends, in the order they are asked."""

from __future__ import annotations

from cadsurgery.elements.backends.choose import BACKENDS
from cadsurgery.elements.backends.dense import Uniform, WholeMap
from cadsurgery.elements.backends.gpu import Triton
from cadsurgery.elements.backends.graph import GraphOperation
from cadsurgery.elements.backends.integer import Integers
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.portable import Portable
from cadsurgery.elements.backends.products import Products
from cadsurgery.elements.backends.reference import Expression, Torch

BACKENDS[:] = [
    Uniform(),  # uniform lattices: an ordinary operation on a dense map
    Portable(),  # graphs for engines other than torch
    GraphOperation(),  # a graph that is compiled for the CPU: one operation in it, which comes here again when it runs
    Triton(),  # GPUs: gathers and multiplies in one
    WholeMap(),  # where the whole map is cheaper by the costs measured here
    Native(),  # compiled C that reads rows where they lie
    Integers(),  # compiled C for rows in 8 bits
    Products(),  # products of rows, as they are or gathered block by block
    Expression(),  # any other graph: an expression that compilers optimise
    Torch(),  # the reference: everything, with gradients
]
