"""A plugin of pytest: the kernels are those of the library that the variable EMULATED_TILES names."""

from __future__ import annotations

import os
from pathlib import Path

from cadsurgery.kernels import library

_PATH = Path(os.environ["EMULATED_TILES"])
library._of_package = lambda: (library.open_library(_PATH, is_own=False), _PATH)
