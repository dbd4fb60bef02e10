"""Build commands for setuptools that call make, so that there is one build recipe."""
# The classes have lower-case names because setuptools shows them as the names of commands.

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext
from setuptools.command.sdist import sdist as _sdist


class native:
    """A mixin that adds the extension module to a command of setuptools."""

    def initialize_options(self):
        self.distribution.ext_modules = [Extension("dgemma._native", [], py_limited_api=True)]
        super().initialize_options()


class build(native, _build):
    pass


class bdist_wheel(native, _bdist_wheel):
    def initialize_options(self):
        super().initialize_options()
        self.py_limited_api = "cp310"  # one wheel for this Python and all later ones


class sdist(native, _sdist):
    pass


class build_ext(_build_ext):
    """Builds the extension with `make native`, at the place where setuptools expects it."""

    def get_source_files(self):
        """Return the files that the source archive must carry so that make can build from it."""
        kinds = ("*.c", "*.h", "*.def", "*.cu", "*.cuh")
        folders = ("quants", "runtime", "cuda")
        return ["Makefile", *sorted(str(f) for folder in folders for kind in kinds for f in Path(folder).rglob(kind))]

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        include = sysconfig.get_path("include")
        command = ["make", "--no-print-directory", f"-j{self.parallel or os.cpu_count() or 1}", "native"]
        command += [f"NATIVE={target}", f"PYTHON={sys.executable}", f"PYTHON_INCLUDE=-I{include}"]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("building dgemma needs GNU make and a C compiler; 'make' was not found") from None
        except subprocess.CalledProcessError as failure:
            raise SystemExit(f"building dgemma failed: make ended with status {failure.returncode}") from None
