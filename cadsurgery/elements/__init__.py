"""Elements: the geometry of level maps, and the operations of a network on the cells they leave.

In come level maps, weights and dense maps; out go lattices, kernel maps and `Elements`. It knows neither graphs nor
libraries of networks; `functional` has the operations, `backends` what computes them.
"""

from cadsurgery.elements import functional
from cadsurgery.elements.backends.table import BACKENDS
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry, Lattice
