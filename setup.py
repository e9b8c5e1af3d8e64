"""Compile the kernels when a wheel is built or the package is installed from source; all else is in pyproject.toml.

Without a C compiler, or with CADSURGERY_NATIVE=0, the wheel is one for every platform and has no kernels.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def builder() -> ModuleType:
    """The module kernels/build.py, without the package: that imports torch, which need not be here."""
    path = ROOT / "cadsurgery" / "kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("cadsurgery_kernels_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Copies the package and puts the compiled kernels into it; into the source tree for an editable installation."""

    def library(self) -> Path:
        """The file of the compiled kernels in what is built."""
        base = ROOT if self.editable_mode else Path(self.build_lib)
        return base / builder().LIBRARY.relative_to(ROOT)

    def run(self) -> None:
        """Copy and compile. A failure to compile is printed and does not end the installation."""
        super().run()
        build, target = builder(), self.library()
        target.unlink(missing_ok=True)
        compiler = build.find_compiler()
        if compiler is None or os.environ.get("CADSURGERY_NATIVE", "1") == "0":
            self.say("installed without compiled kernels: there is no C compiler, or CADSURGERY_NATIVE=0")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            built = build.build(compiler, target)
        except (build.BuildError, OSError) as error:
            self.say(f"installed without kernels, which could not be compiled: {error}")
            return
        self.say(build.describe(built))

    def say(self, text: str) -> None:
        """Print a line of the installation's report."""
        self.announce(f"cadsurgery: {text}", level=3)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """All files that are built, the library among them."""
        library = [] if self.editable_mode or not self.library().exists() else [str(self.library())]
        return [*super().get_outputs(include_bytecode), *library]


class WheelOfPlatform(bdist_wheel):
    """A wheel for this platform if it holds compiled kernels, for every Python 3."""

    def has_library(self) -> bool:
        """True if the kernels have been compiled."""
        return self.get_finalized_command("build_py").library().exists()

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag: Python 3 of any ABI, the platform of the library or any."""
        if not self.has_library():
            return "py3", "none", "any"
        if self.plat_name_supplied:
            return "py3", "none", self.plat_name.replace("-", "_").replace(".", "_")
        if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
            # The library asks for no version of any symbol. The C library is the oldest that torch's wheels take.
            return "py3", "none", f"manylinux_2_28_{platform.machine()}"
        name = sysconfig.get_platform()  # on macOS with the version that MACOSX_DEPLOYMENT_TARGET names
        return "py3", "none", name.replace("-", "_").replace(".", "_")

    def write_wheelfile(self, *arguments: object, **options: object) -> None:
        """Write the wheel's own file, which says that the wheel belongs to a platform."""
        self.root_is_pure = not self.has_library()
        super().write_wheelfile(*arguments, **options)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfPlatform})
