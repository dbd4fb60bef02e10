"""What is shipped: an extension that shows no more than it must, and dependencies that are few and bounded."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.lowest_versions import pins, required

import dgemma
from dgemma import _native
from dgemma._native import ffi, lib

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def readelf(*what: str) -> str:
    if sys.platform != "linux" or shutil.which("readelf") is None:
        pytest.skip("needs readelf, of binutils")
    done = subprocess.run(["readelf", "--wide", *what, _native.__file__], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_extension_shows_its_beginning_alone():
    defined = [line.split() for line in readelf("--dyn-syms").splitlines() if " UND " not in line]
    shown = {words[-1] for words in defined if len(words) == 8 and words[4] in ("GLOBAL", "WEAK")}
    assert {name for name in shown if not name.startswith("_")} == {"PyInit__native"}


def test_relocations_are_read_only_and_nothing_that_is_written_can_run():
    segments = readelf("--segments")
    assert "GNU_RELRO" in segments
    flags = re.search(r"GNU_STACK.* ([RWE ]{3}) 0x", segments)
    assert flags is not None and "E" not in flags[1]
    assert not re.search(r"LOAD .* RWE ", segments)
    assert re.search(r"BIND_NOW|FLAGS_1.*NOW", readelf("--dynamic"))


def test_the_extension_needs_the_c_library_alone():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", readelf("--dynamic")))
    assert all(re.match(r"(libc|libm|libpthread|ld-linux.*)\.so", name) for name in needed), needed


def test_the_version_is_written_once():
    """In pyproject.toml: the library, the package, its metadata and the commands tell that one."""
    version = PROJECT["version"]
    told = [ffi.string(lib.dg_version()).decode(), dgemma.__version__, importlib.metadata.version("dgemma")]
    assert told == [version] * 3
    for command in PROJECT["scripts"]:
        path = Path(sys.executable).with_name(command)
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        assert said == f"{command} {version}\n"


def test_the_library_is_installed_where_it_is_asked_to_be(tmp_path):
    """`make install` obeys PREFIX and DESTDIR, and a program builds against it; `make uninstall` removes it alone."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    make = ["make", "-s", "-C", str(ROOT), f"DESTDIR={tmp_path}", "PREFIX=/opt/dgemma"]
    subprocess.run([*make, "install"], check=True)
    at = tmp_path / "opt" / "dgemma"
    (tmp_path / "main.c").write_text(
        "#include <dgemma/dg.h>\n#include <stdio.h>\nint main(void) { return puts(dg_version()) < 0; }\n"
    )
    flags = ["-std=c11", "-pthread", f"-I{at / 'include'}", f"-L{at / 'lib'}"]
    subprocess.run(["cc", *flags, "main.c", "-ldgemma", "-lm", "-o", "main"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    assert said == PROJECT["version"] + "\n"
    package = (at / "lib" / "pkgconfig" / "dgemma.pc").read_text()
    assert "prefix=/opt/dgemma\n" in package and f"Version: {said}" in package
    stranger = at / "include" / "dgemma" / "notes.txt"
    stranger.write_text("mine")
    subprocess.run([*make, "uninstall"], check=True)
    assert [path for path in at.rglob("*") if path.is_file()] == [stranger]
    stranger.unlink()
    subprocess.run([*make, "uninstall"], check=True)
    assert not stranger.parent.exists() and not [path for path in at.rglob("*") if path.is_file()]


def test_dependencies_are_few_and_have_lower_bounds():
    assert len(PROJECT["dependencies"]) <= 8
    for requirement in [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]:
        assert re.match(r"[A-Za-z0-9_.-]+(\[[a-z,]+\])?(>=|==)[0-9]", requirement), requirement


def test_a_package_has_one_lower_bound_and_tests_can_have_it():
    """make test-lowest installs these together; here they are found, one each, and no higher than what CI has."""
    found = dict(pin.split("==") for pin in pins(required()))
    lock = (ROOT / ".ci/requirements.txt").read_text().lower()
    for name, lowest in found.items():
        locked = re.search(rf"^{re.escape(name)}==([0-9.]+)", lock, re.MULTILINE)
        assert locked is None or numbers(lowest) <= numbers(locked[1]), (name, lowest)
    with pytest.raises(ValueError, match="a>=1 and for a>=2"):
        pins(["a>=1", "b==3", "a[x]>=2"])


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_the_lock_has_every_dependency():
    lines = (ROOT / ".ci" / "requirements.txt").read_text().splitlines()
    locked = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines if "==" in line}
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]:
        name, least = re.match(r"([A-Za-z0-9_.-]+?)>=([0-9.]+)", requirement).groups()
        assert name.lower().replace("_", "-") in locked, f"{name} is not in .ci/requirements.txt"
        assert parts(locked[name.lower().replace("_", "-")]) >= parts(least)


def parts(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]
