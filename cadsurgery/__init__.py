"""cadsurgery: content-adaptive downsampling for any convolutional network, by model surgery.

import cadsurgery as cs
net = cs.adaptify(model, mask="edges")
y = net(x)

The public names stand in `__init__.pyi`. Each is imported on first use, so that `import cadsurgery` and the command
line start without waiting for torch.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_MODULE_OF = {
    alias.name: str(statement.module)
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}
__all__ = [name for name, module in _MODULE_OF.items() if module != __name__]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cadsurgery' has no attribute {name!r}")
    if _MODULE_OF[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
