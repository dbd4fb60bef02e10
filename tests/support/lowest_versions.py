"""The lowest versions that pyproject.toml allows (make test-lowest).

    python tests/support/lowest_versions.py pins       a line "name==version" for each requirement of the tests
    python tests/support/lowest_versions.py imports    imports every module of the package

A bound is what comes behind >=; what is asked for with == is left to pip.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import dgemma
import dgemma.convert

ROOT = Path(__file__).parents[2]
BOUND = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?>=([0-9.]+)")
LARGE = {"lm_eval", "llama_cpp"}  # packages of extras that are too large, or are compiled: not installed by the tests


def pins(requirements: Iterable[str]) -> list[str]:
    """Each bound as a pin. Raises ValueError where one package has two bounds: one of them says too little."""
    found: dict[str, str] = {}
    for name, version in (match.groups() for each in requirements if (match := BOUND.match(each))):
        if found.setdefault(name.lower(), version) != version:
            raise ValueError(f"pyproject.toml asks for {name}>={found[name.lower()]} and for {name}>={version}")
    return [f"{name}=={version}" for name, version in found.items()]


def required(extras: Iterable[str] | None = None) -> list[str]:
    """The package's requirements with those of some extras; None: of all."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    more = project["optional-dependencies"]
    return [*project["dependencies"], *(each for extra in extras or more for each in more[extra])]


def imports() -> list[str]:
    """Imports every module; the names of those that need a large package."""
    left_out = []
    packages = (dgemma, dgemma.convert)
    names = [module.name for p in packages for module in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    for name in names:
        try:
            if name != "dgemma._build":  # a part of setuptools
                importlib.import_module(name)
        except ImportError as missing:
            if not {getattr(missing, "name", None), getattr(missing.__cause__, "name", None)} & LARGE:
                raise
            left_out.append(name)
    return left_out


if __name__ == "__main__":
    if sys.argv[1:] == ["pins"]:
        print("\n".join(pins(required(["test"]))))
    elif sys.argv[1:] == ["imports"]:
        print(f"imported all modules but {', '.join(imports()) or 'none'}")
    else:
        sys.exit(__doc__)
