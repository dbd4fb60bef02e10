"""Lets setuptools build the extension with make, so that there is one build recipe."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext


class make(build_ext):
    """`make native` into the place where setuptools expects each extension."""

    def get_source_files(self):
        """What the source distribution must carry so that make can build from it."""
        kinds = ("*.c", "*.h", "*.def", "*.cu", "*.cuh")
        rooms = ("quants", "runtime", "cuda")
        return ["Makefile", *sorted(str(f) for r in rooms for k in kinds for f in Path(r).rglob(k))]

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            "make",
            "--no-print-directory",
            "native",
            f"NATIVE={target}",
            f"PYTHON={sys.executable}",
            f"PYTHON_INCLUDE=-I{sysconfig.get_path('include')}",
        ]
        command.insert(1, f"-j{self.parallel or os.cpu_count() or 1}")
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("building dgemma needs GNU make and a C compiler; 'make' was not found") from None
        except subprocess.CalledProcessError as failure:
            raise SystemExit(f"building dgemma failed: make ended with status {failure.returncode}") from None
