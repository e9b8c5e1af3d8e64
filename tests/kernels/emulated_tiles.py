"""A plugin of pytest: the kernels are those of the library that the variable EMULATED_TILES names."""

from __future__ import annotations

import os
from pathlib import Path

from cadsurgery.kernels import build, library

build.LIBRARY = Path(os.environ["EMULATED_TILES"])
library._why_unusable = lambda path: ""  # its flags are not those of the package's library
