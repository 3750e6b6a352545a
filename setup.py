"""Everything is in pyproject.toml; here only: the optional C++ kernels are compiled at install, where a compiler is found."""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

SOURCES = Path(__file__).parent / "src" / "pellucid" / "ops" / "native"
spec = importlib.util.spec_from_file_location("native_build", SOURCES / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        folder = SOURCES if self.editable_mode else Path(self.build_lib) / "pellucid" / "ops" / "native"
        try:
            self.announce(f"compiled the C++ kernels: {native.build(folder)}", level=2)
        except OSError as error:  # everything works without them, slower: `pellucid serve` says which kernels run, and why
            self.warn(f"the optional C++ kernels were not compiled: {error}")


class BinaryWhereCompiled(Distribution):
    """A wheel that holds the library is one of this platform."""

    def has_ext_modules(self):
        return native.compiler() is not None


setup(cmdclass={"build_py": BuildWithKernels}, distclass=BinaryWhereCompiled)
