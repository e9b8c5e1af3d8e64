"""What is installed: with the base packages alone all but files of engines works, and what needs more says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"

# Modules that only functions import, after they have looked whether the packages are there.
OF_EXTRAS = {"cadsurgery.network.export.translate": "onnx_ir"}

IMPORT_ALL = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import environments
environments.show()
import importlib, json, pkgutil
import cadsurgery
missing = {{}}
for _, name, _ in pkgutil.walk_packages(cadsurgery.__path__, "cadsurgery."):
    try:
        importlib.import_module(name) if not name.endswith("__main__") else None
    except ModuleNotFoundError as error:
        missing[name] = error.name
names = [name for name in sys.modules if name.startswith("torch.onnx._internal.exporter._registration")]
print(json.dumps([missing, names]))
"""


def test_every_module_is_imported_with_the_base_packages_alone() -> None:
    code = IMPORT_ALL.format(root=str(ROOT), tests=str(TESTS))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    missing, exporters = json.loads(done.stdout)
    assert missing == OF_EXTRAS and exporters == []
