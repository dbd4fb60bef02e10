"""hf:owner/name: what it stands for, and that a download is whole or not there. Against a server of the test's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hub_server import Hub, serving

from dgemma.convert import convert
from dgemma.errors import FormatError, UsageError
from dgemma.hub import _of_type, parse
from dgemma.model import bundled

GGUF, FOLDER = "someone/sudoku-GGUF", "someone/sudoku"
FILE = "sudoku-Q8_0.gguf"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    room = tmp_path_factory.mktemp("repositories")
    data = Path(bundled()).read_bytes()
    convert(bundled(), room / "split.gguf", "q8_0", split_max_size=600_000)
    folder = room / "checkpoint"
    write_checkpoint(folder, layers=2, shards=3, vocab=1024, hidden=128)
    files = {f.name: f.read_bytes() for f in folder.iterdir()}
    parts = {f"BF16/{f.name}": f.read_bytes() for f in sorted(room.glob("split-*.gguf"))}
    assert len(parts) == 3
    return {GGUF: {"README.md": b"A model.", FILE: data, **parts}, FOLDER: files | {"README.md": b"A checkpoint."}}


@pytest.fixture
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with serving(Hub({name: dict(files) for name, files in repositories.items()})) as hub:
        yield hub


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """A command, or `python -c`, that knows this Hub alone and keeps its cache in tmp_path/home."""

    def run(command: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        binary = [sys.executable, "-c"] if command == "python" else [str(Path(sys.executable).with_name(command))]
        text = [*binary, *map(str, arguments)]
        return subprocess.run(
            text, env=environment(hub, tmp_path / "home", **more), capture_output=True, text=True, timeout=60
        )

    return run


def failure(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.count("\n") == 1 and "internal error" not in done.stderr, done.stderr
    return done.stderr


def blobs(tmp_path: Path, repository: str = GGUF) -> list[str]:
    return sorted(f.name for f in (tmp_path / "home/hub" / f"models--{repository.replace('/', '--')}/blobs").iterdir())


# ---- Names ----


@pytest.mark.parametrize("text", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a/b:q4 0", "hf:a/b:x:y"])
def test_a_name_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected hf:owner/name"):
        parse(text)


def test_a_name_has_a_revision_and_a_type() -> None:
    assert (parse("hf:a/b"), parse("hf:a.b/c-d@refs/pr/1:q4_k_m")) == (
        parse("hf:a/b"),
        type(parse("hf:a/b"))("a.b/c-d", "refs/pr/1", "q4_k_m"),
    )


FILES = [
    "m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf",
    "mmproj-F16.gguf", "imatrix_unsloth.gguf", "m-q6_k.gguf", "other/m-Q6_K.gguf", "m-BF16-00001-of-00002.gguf",
    "config.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("type_", "found"),
    [
        ("q4_k_m", FILES[0]),
        ("Q4_K_XL", FILES[1]),
        ("UD-Q4_K_XL", FILES[1]),
        ("q8_0", FILES[3]),
        ("m-Q4_K_M.gguf", FILES[0]),
        ("other/m-q6_k.gguf", FILES[7]),
    ],
)
def test_a_type_finds_its_file(type_: str, found: str) -> None:
    assert _of_type(parse(f"hf:a/b:{type_}"), FILES)[0] == found


@pytest.mark.parametrize(
    ("type_", "kind", "complaint"),
    [
        ("", UsageError, "several files fit.*m-BF16.gguf, m-Q4_K_M.gguf, m-UD-Q4_K_XL.gguf, m-q6_k.gguf, other/m-Q6_K"),
        (":q6_k", UsageError, "several files fit.*: m-q6_k.gguf, other/m-Q6_K.gguf$"),
        (":q4_k", UsageError, "no file is of that type; there are Q8_0/m-Q8_0.gguf, m-BF16.gguf"),
        (":f16", UsageError, "no file is of that type"),
        (":bf16", FormatError, "m-BF16.gguf has 2 parts, of which there are 1"),
    ],
)
def test_what_fits_no_file_or_several_is_told_what_there_is(type_: str, kind: type[Exception], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        _of_type(parse(f"hf:a/b{type_}"), FILES)


# ---- Fetching ----


def test_every_command_and_python_take_it_and_fetch_it_once(run: Run, hub: Hub, tmp_path: Path) -> None:
    puzzle = Path(__file__).parent / "models/sudoku/puzzle.txt"
    name = f"hf:{GGUF}:q8_0"
    first = run("dg-run", name, "-f", puzzle)
    assert first.returncode == 0 and first.stdout == run("dg-run", "-f", puzzle).stdout, first.stderr
    assert hub.bytes_of(FILE) == [(0, len(hub.repositories[GGUF][FILE]))]
    assert run("dg-info", name).stdout.splitlines()[0].endswith("tensors")
    assert run("dg-bench", name, "--runs", "1").returncode == 0
    told = run("dg-eval", name, "--against", name, "--prompts", "1")
    assert told.returncode == 0 and "sudoku-Q8_0.gguf" in told.stdout, told.stderr
    told = run("python", f"import dgemma; print(dgemma.Model({name!r}).config.n_layer)")
    assert told.returncode == 0 and int(told.stdout) > 0, told.stderr
    assert len(hub.bytes_of(FILE)) == 1


def test_the_second_use_needs_no_network(run: Run, hub: Hub, tmp_path: Path) -> None:
    name = f"hf:{GGUF}:q8_0"
    assert "HF_HUB_OFFLINE" in failure(run("dg-info", name, HF_HUB_OFFLINE="1"), 1)
    assert "cannot be fetched" in failure(run("dg-info", name, HF_ENDPOINT="http://127.0.0.1:9"), 1)
    whole = run("dg-info", name).stdout
    asked = len(hub.sent)
    assert run("dg-info", name, HF_HUB_OFFLINE="1").stdout == whole
    assert run("dg-info", name, HF_ENDPOINT="http://127.0.0.1:9").stdout == whole
    assert len(hub.sent) == asked
    assert "there are sudoku-Q8_0.gguf" in failure(run("dg-info", f"hf:{GGUF}:q4_0", HF_HUB_OFFLINE="1"), 2)


def test_parts_are_fetched_together(run: Run, hub: Hub) -> None:
    done = run("dg-info", f"hf:{GGUF}:BF16/split.gguf")
    assert done.returncode == 0 and " in 3 files" in done.stdout, done.stderr
    assert not hub.bytes_of(FILE)


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("hf:someone/else", 1, "hf:someone/else: there is no such repository, or it is private"),
        (f"hf:{GGUF}@v2", 1, "the repository has no revision v2"),
        (f"hf:{GGUF}", 2, "several files fit"),
        (f"hf:{GGUF}:q4_0", 2, "no file is of that type; there are BF16/split.gguf, sudoku-Q8_0.gguf"),
        (f"hf:{FOLDER}", 2, f"no GGUF file there, but a checkpoint: dg-convert hf:{FOLDER} -o FILE"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_line(name: str, code: int, complaint: str, run: Run) -> None:
    assert complaint in failure(run("dg-info", name), code)


def test_without_huggingface_hub_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from dgemma.cli.info import main; main(['hf:a/b'], prog_name='dg-info')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failure(done, 2) == "dg-info: hf:a/b: needs huggingface_hub: pip install 'dgemma[hub]'\n"


# ---- Downloads that break off ----


def test_a_connection_that_ends_is_taken_up_where_it_ended(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FILE] = 700_001
    assert run("dg-info", f"hf:{GGUF}:q8_0").returncode == 0
    size = len(hub.repositories[GGUF][FILE])
    assert hub.bytes_of(FILE) == [(0, 700_001), (700_001, size - 700_001)]


def test_a_process_that_dies_leaves_a_part_that_the_next_one_goes_on_from(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.stall_at[FILE] = 900_000
    command = [str(Path(sys.executable).with_name("dg-info")), f"hf:{GGUF}:q8_0"]
    with subprocess.Popen(command, env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE) as process:
        assert hub.stalled.wait(30)
        partial = tmp_path / "home/hub" / f"models--{GGUF.replace('/', '--')}/blobs"
        while not (partial.exists() and any(f.stat().st_size > 500_000 for f in partial.iterdir())):
            assert process.poll() is None
        process.kill()
    assert [name.rpartition(".")[2] for name in blobs(tmp_path)] == ["incomplete"]
    failure(run("dg-info", f"hf:{GGUF}:q8_0", HF_HUB_OFFLINE="1"), 1)  # a part is not taken for the whole

    hub.stall_at.clear()
    assert run("dg-info", f"hf:{GGUF}:q8_0").returncode == 0
    (_, first), (start, rest) = hub.bytes_of(FILE)
    assert first == 900_000 and 500_000 < start <= 900_000
    assert start + rest == len(hub.repositories[GGUF][FILE])
    assert blobs(tmp_path) == [hashlib.sha256(hub.repositories[GGUF][FILE]).hexdigest()]


def test_a_part_that_was_damaged_is_thrown_away(run: Run, hub: Hub, tmp_path: Path) -> None:
    data = hub.repositories[GGUF][FILE]
    folder = tmp_path / "home/hub" / f"models--{GGUF.replace('/', '--')}/blobs"
    folder.mkdir(parents=True)
    (folder / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(bytes(1000))
    assert f"{FILE} came damaged" in failure(run("dg-info", f"hf:{GGUF}:q8_0"), 1)
    assert blobs(tmp_path) == []
    assert run("dg-info", f"hf:{GGUF}:q8_0").returncode == 0


def test_a_server_without_ranges_sends_all_again(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FILE], hub.ranges = 700_001, False
    assert run("dg-info", f"hf:{GGUF}:q8_0").returncode == 0
    assert hub.bytes_of(FILE) == [(0, 700_001), (0, len(hub.repositories[GGUF][FILE]))]


# ---- Sources ----


def test_a_repository_converts_as_its_folder_does(run: Run, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "sudoku"
    folder.mkdir()
    for name, data in hub.repositories[FOLDER].items():
        (folder / name).write_bytes(data)
    convert(folder, tmp_path / "wanted.gguf", "q8_0")

    planned = run("dg-convert", f"hf:{FOLDER}", "--type", "q8_0", "--dry-run")
    assert planned.returncode == 0 and f"{(tmp_path / 'wanted.gguf').stat().st_size:,}" in planned.stdout
    weights = [n for n in hub.repositories[FOLDER] if n.endswith(".safetensors")]
    sizes = {n: sum(count for _, count in hub.bytes_of(n)) for n in weights}
    assert all(0 < size < len(hub.repositories[FOLDER][n]) / 4 for n, size in sizes.items()), sizes

    first = weights[0]
    hub.break_at[first] = len(hub.repositories[FOLDER][first]) // 2
    for out, more in (("one.gguf", {}), ("two.gguf", {"HF_HUB_OFFLINE": "1"})):
        done = run("dg-convert", f"hf:{FOLDER}@main", "-o", tmp_path / out, "--type", "q8_0", **more)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out).read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


def test_a_gguf_repository_converts_too(run: Run, hub: Hub, tmp_path: Path) -> None:
    assert run("dg-convert", f"hf:{GGUF}:q8_0", "-o", tmp_path / "out.gguf", "--type", "q8_0").returncode == 0
    assert (tmp_path / "out.gguf").read_bytes() == hub.repositories[GGUF][FILE]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--set", "nothing.*=q8_0"], "no tensor has a name like that"),
        (["--imatrix", "{texts}"], "texts.txt: not an imatrix"),
        (["--calibrate", "{texts}"], "texts.txt, line 3: a prompt of"),
        (["--split-max-size", "1K"], "--split-max-size"),
    ],
)
def test_what_is_wrong_is_told_before_the_weights_are_fetched(
    flags: list[str], complaint: str, run: Run, hub: Hub, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Hi\n\n" + "sky " * 2000)
    done = run("dg-convert", f"hf:{FOLDER}", "-o", tmp_path / "out.gguf", *(f.format(texts=texts) for f in flags))
    assert done.returncode in (1, 2) and complaint in done.stderr, done.stderr
    weights = [n for n in hub.repositories[FOLDER] if n.endswith(".safetensors")]
    assert all(sum(c for _, c in hub.bytes_of(n)) < len(hub.repositories[FOLDER][n]) / 4 for n in weights)
