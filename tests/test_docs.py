"""README and docs/ are current, and what they say to run runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from measure.solve_rate import puzzles

from dgemma.model import bundled
from dgemma_start import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, *sorted((ROOT / ".github").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "commands.md"]  # by hand, at least in part
BIN = Path(sys.executable).parent

spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands in a page's sh blocks and between its backticks, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [re.split(r"\s+#\s", line)[0].strip() for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]]


def test_pages_are_current():
    assert [name_of(page) for page in make.stale()] == [], "make docs"


def test_a_page_is_not_current_when_a_figure_changes(monkeypatch):
    load = make.load

    def slower(name: str) -> object:
        told = load(name)
        if name == "26b-a4b-30-layers-avx2":
            told["step"]["seconds"]["median"] *= 2
        return told

    monkeypatch.setattr(make, "load", slower)
    assert {name_of(page) for page in make.stale()} == {"README.md", "docs/performance.md"}


def test_every_block_of_figures_stands_in_a_page():
    named = {name for page in PAGES for name in re.findall(r"<!-- figures: ([a-z0-9-]+) -->", page.read_text())}
    assert named == set(make.BLOCKS)


def test_the_readme_is_short_and_tells_its_limits():
    text = README.read_text()
    assert len(text.splitlines()) <= 90
    assert "not measured" not in text
    assert "No AMD, Intel or Apple GPU" in text
    assert len(CONTRIBUTING.read_text().splitlines()) <= 100


def test_a_cell_of_the_readme_has_one_number():
    cells = [cell for line in README.read_text().splitlines() if line.startswith("|") for cell in line.split("|")]
    assert [cell for cell in cells if len(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])", cell)) > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_paths_of_contributing_exist():
    paths = re.findall(r"`([\w./-]*(?:/|\.(?:c|h|def|py|md|toml|yaml|txt|cu))[\w.-]*)`", CONTRIBUTING.read_text())
    paths = [path for path in paths if path.strip(".") not in ("c", "h", "def")]  # endings alone
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_flags_of_commands_exist(page):
    for line in commands(page):
        if found := re.match(r"(?:.*\| )?(?:\.venv/bin/)?(dg-[a-z]+)( .*)?$", line):
            command = importlib.import_module(COMMANDS[found[1]]).main
            known = {flag for param in command.params for flag in param.opts}
            given = re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", found[2] or "")
            assert set(given) <= {*known, "--help"}, line


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_field_that_it_lists(name):
    """Each in two columns or more: a name, and what it is."""
    command = importlib.import_module(COMMANDS[name]).main
    text = command.get_help(click.Context(command, info_name=name, **command.context_settings))
    assert text.count("\n") > 20
    assert [line for line in text.splitlines() if re.search(r"\s(None|Undefined)$", line)] == []
    assert [param.name for param in command.params if isinstance(param, click.Option) and not param.help] == []


def test_lines_have_at_most_120_columns():
    """In the files that no formatter lays out; a row of a table may be longer."""
    folder = ROOT / "runtime" / "dgemma" / "serve" / "page"
    files = [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run", ".pre-commit-config.yaml")]
    files += [*(ROOT / "tests").glob("*/rules.mk"), *(ROOT / ".github").rglob("*.y*ml"), *PAGES]
    files += [*(ROOT / "tests" / "models").glob("*/README.md")]
    files += [file for kind in ("html", "css", "js") for file in folder.glob(f"*.{kind}")]
    assert len(files) > 30
    lines = [(name_of(file), line) for file in files for line in file.read_text().splitlines()]
    assert [each for each in lines if len(each[1]) > 120 and not each[1].startswith("|")] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_targets_of_make_exist(page):
    rules = [ROOT / "Makefile", *(ROOT / "tests").glob("*/rules.mk")]
    targets = {name for file in rules for name in re.findall(r"^([a-z-]+):(?!=)", file.read_text(), re.MULTILINE)}
    for line in commands(page):
        if line == "make" or line.startswith("make "):
            asked = {word for word in line.split()[1:] if re.fullmatch(r"[a-z-]+", word)}
            assert asked <= targets, line


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "python.md"], ids=name_of)
def test_python_examples_run(page):
    program = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ant fig sea" in done.stdout and "| fig | 12 |\n|---|---|\n| sea | red |" in done.stdout


def test_what_the_readme_tries_without_a_download_runs():
    section = README.read_text().split("## Try it without a download")[1].split("\n## ")[0]
    found = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert found is not None
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    shell = ["sh", "-e", "-c", found[1]]
    done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("534678912\n") and done.stdout.endswith('{"fig": 12, "sea": "red"}')


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_c_program_compiles_and_solves(tmp_path):
    (tmp_path / "main.c").write_text(blocks(ROOT / "docs" / "c.md", "c")[0])
    subprocess.run(["make", "-s", "-C", ROOT, "lib", f"BUILD={ROOT / 'build'}"], check=True)
    flags = ["-std=c11", "-pthread", f"-I{ROOT / 'quants'}", f"-I{ROOT / 'runtime'}", "-Wall", "-Wextra", "-Werror"]
    library = ROOT / "build" / "libdgemma.a"
    subprocess.run(["cc", *flags, tmp_path / "main.c", library, "-lm", "-o", tmp_path / "main"], check=True)
    puzzle = puzzles(30, 1)[0]
    run = subprocess.run([tmp_path / "main", bundled(), puzzle.prompt], capture_output=True, text=True, check=True)
    assert run.stdout == puzzle.solution


def test_the_workflow_and_the_hooks_run_what_make_and_ci_run():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert any(step.get("run") == ".ci/run" for job in workflow["jobs"].values() for step in job["steps"])
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/").split()[0] for hook in repository["hooks"]}
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule is not None
    assert set(re.findall(r"\$\(BIN\)/([a-z-]+)", rule[1])) <= hooks
