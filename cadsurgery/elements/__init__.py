"""Elements: the geometry of level maps, and the operations of a network on the remaining cells.

In come level maps, weights and dense maps; out go lattices, kernel maps and `Elements`. This package knows neither
graphs nor model libraries. `functional` has the operations; `backends` has their implementations.
"""

from cadsurgery.elements import functional
from cadsurgery.elements.backends.table import BACKENDS
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.lattice import Geometry, Lattice
