"""hf:owner/name: what it stands for, and that a download is whole or not there. Against a server of the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint
from support.hub_server import Hub, serving

import dgemma.hub.download
from dgemma.convert import convert
from dgemma.errors import Error, FormatError, SystemFailure, UsageError
from dgemma.hub.models import local_model
from dgemma.hub.names import of_type, parse
from dgemma.model import bundled

GGUF, FOLDER = "someone/sudoku-GGUF", "someone/sudoku"
FILE = "sudoku-Q8_0.gguf"
ASK = ("-p", "12", "--raw", "--steps", "1", "--seed", "1", "--quiet")  # an answer at once, for dg-run
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
    assert of_type(parse(f"hf:a/b:{type_}"), FILES)[0] == found


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
        of_type(parse(f"hf:a/b{type_}"), FILES)


TYPES = ["Q4_0", "Q4_0_4_4", "Q4_K", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_NL_XL", "UD-Q4_K_XL", "Q8_0", "F16", "BF16"]
BESIDE = [
    "mmproj-{}",
    "M.mmproj-{}",
    "M-{}-mmproj",
    "mmproj/M-{}",
    "M.imatrix-{}",
    "lora-{}",
    "M-adapter-{}",
    "M-vocab-{}",
]


@st.composite
def repositories_by_type(draw: st.DrawFn) -> dict[str, list[str]]:
    """Files of each of some types, named as people name them, among files that are no models."""
    out: dict[str, list[str]] = {}
    for type_ in draw(st.lists(st.sampled_from(TYPES), min_size=1, unique=True)):
        written = draw(st.sampled_from([type_, type_.lower(), type_.replace("_", "-"), type_.replace("-", ".")]))
        stem = draw(
            st.sampled_from(["M-{}", "M_{}", "M.{}", "{}", "x.y-1.5B_it-{}", "{}/model", "gguf_{}/M", "{}/M-{}"])
        )
        whole, parts = stem.format(written, written), draw(st.sampled_from([0, 0, 1, 3]))
        ending = draw(st.sampled_from([".gguf", ".GGUF"]))
        out[type_] = [f"{whole}-{i + 1:05}-of-{parts:05}{ending}" for i in range(parts)] or [whole + ending]
    return out


@given(repositories_by_type(), st.data())
def test_a_type_finds_its_files_and_nothing_else(models: dict[str, list[str]], data: st.DataObject) -> None:
    type_ = data.draw(st.sampled_from(TYPES))
    beside = [name.format(type_) + ".gguf" for name in data.draw(st.lists(st.sampled_from(BESIDE), unique=True))]
    files = data.draw(st.permutations([*(file for own in models.values() for file in own), *beside, "README.md"]))
    asked = data.draw(st.sampled_from([type_, type_.lower(), type_.replace("_", "-"), type_.replace("_", ".")]))
    if type_ in models:
        assert of_type(parse(f"hf:a/b:{asked}"), files) == models[type_]
    else:
        with pytest.raises(UsageError, match="no file is of that type"):
            of_type(parse(f"hf:a/b:{asked}"), files)


@given(repositories_by_type(), st.sampled_from(["-", "_", "."]))
def test_a_type_that_two_files_have_is_refused_with_both(models: dict[str, list[str]], sep: str) -> None:
    type_ = next(iter(models))
    files = [*(file for own in models.values() for file in own), f"other{sep}{type_}.gguf"]
    with pytest.raises(UsageError, match="several files fit") as refused:
        of_type(parse(f"hf:a/b:{type_}"), files)
    assert f"other{sep}{type_}.gguf" in str(refused.value)


@pytest.mark.parametrize(
    ("files", "type_", "found"),
    [
        (["M.mmproj-Q8_0.gguf", "M_Q4_K_M.gguf", "Q8_0/model.gguf"], "q8_0", ["Q8_0/model.gguf"]),
        (["M.mmproj-Q8_0.gguf", "M_Q4_K_M.gguf", "Q8_0/model.gguf"], "Q4_K_M", ["M_Q4_K_M.gguf"]),
        (["M-Q4_K_XL.gguf", "M-UD-Q4_K_XL.gguf"], "q4_k_xl", ["M-Q4_K_XL.gguf"]),
        (["M-UD-Q4_K_XL.gguf"], "q4_k_xl", ["M-UD-Q4_K_XL.gguf"]),
        (["M.i1-Q4_K_M.gguf"], "i1-Q4_K_M", ["M.i1-Q4_K_M.gguf"]),
        (["m-Q8_0.gguf", "other/m-Q8_0.gguf"], "m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        (["m-Q8_0.gguf", "m-Q8_0-00001-of-00001.gguf"], "m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        (["m-Q8_0.gguf", "m-lora-merged-Q8_0.gguf"], "m-lora-merged-Q8_0.gguf", ["m-lora-merged-Q8_0.gguf"]),
        (["mmproj-F16.gguf", "model.gguf"], "", ["model.gguf"]),
    ],
)
def test_a_file_is_found_among_others(files: list[str], type_: str, found: list[str]) -> None:
    assert of_type(parse(f"hf:a/b:{type_}" if type_ else "hf:a/b"), files) == found


@pytest.mark.parametrize(
    ("file", "type_"),
    [
        ("model-Q4_K_M-imat.gguf", "q4_k_m"),
        ("model.Q4_0_instruct.gguf", "q4_0"),
        ("model-Q8_0-v2.gguf", "q8_0"),
        ("model-q4_k_s-00001-of-00001.imat.gguf", "Q4_K_S"),
        ("model-IQ4_NL-2.gguf", "iq4_nl"),
        ("model-Q4_0_4_4-it.gguf", "q4_0_4_4"),
        ("model-UD-Q4_K_XL-fixed.gguf", "q4_k_xl"),
        ("model (Q6_K) new.gguf", "q6_k"),
        ("Q5_K_M-imat/model.gguf", "q5_k_m"),
        ("model-MXFP4_MOE-v1.1.gguf", "mxfp4_moe"),
        ("model-BF16-it.gguf", "bf16"),
        ("model-Q4_K_M-imat.gguf", "q4_k_m-imat"),
        ("model-Q4_K_M-imat.gguf", "model-q4_k_m"),
        ("model-Q4_K_M-f16.gguf", "q4_k_m-f16"),
    ],
)
def test_a_type_finds_a_file_with_words_behind_it(file: str, type_: str) -> None:
    files = ["model-Q2_K.gguf", "model-Q3_K_M-imat.gguf", "model-Q4_K_L.gguf", file]
    assert of_type(parse(f"hf:a/b:{type_}"), files) == [file]


TAILS = ["imat", "instruct", "v2", "it", "2", "v1.1", "fixed-2024", "4bit", "new"]


@given(st.sampled_from(TYPES), st.sampled_from(TYPES), st.sampled_from(TAILS), st.sampled_from("-_."))
def test_words_behind_a_type_never_make_it_another(type_: str, asked: str, tail: str, sep: str) -> None:
    """A file is found by its own type alone; where there is one without the words, that comes first."""
    file, plain = f"model-{type_}{sep}{tail}.gguf", f"model-{type_}.gguf"
    if asked == type_ or f"UD-{asked}" == type_:
        assert of_type(parse(f"hf:a/b:{asked}"), [file]) == [file]
        assert of_type(parse(f"hf:a/b:{asked}"), [file, plain]) == [plain]
        with pytest.raises(UsageError, match="several files fit"):
            of_type(parse(f"hf:a/b:{asked}"), [file, f"other-{type_}-x{tail}.gguf"])
    else:
        with pytest.raises(UsageError, match="no file is of that type") as refused:
            of_type(parse(f"hf:a/b:{asked}"), [file])
        assert file in str(refused.value)


@pytest.mark.parametrize(
    ("files", "type_", "complaint"),
    [
        (["M-Q4_K_M-f16.gguf"], "f16", "no file is of that type; there are M-Q4_K_M-f16.gguf"),
        (["M-Q4_K_M-f16-embed.gguf"], "q4_k_m", "no file is of that type; there are M-Q4_K_M-f16-embed.gguf"),
        (["M-Q4_K_M-imat.gguf"], "q4_k", "no file is of that type; there are M-Q4_K_M-imat.gguf"),
        (["M-Q4_K_M-a1.gguf", "M-Q4_K_M-b1.gguf"], "q4_k_m", "several files fit.*: M-Q4_K_M-a1.gguf, M-Q4_K_M-b1.gguf"),
        (["M-Q8_0.gguf", "M-Q4_K_M-imatrix.gguf"], "q4_k_m", "M-Q8_0.gguf; not taken for a model.*: M-Q4_K_M-imatrix"),
        (["M-Q8_0.gguf", "M-Q4_0-draft.gguf"], "q4_0", "M-Q8_0.gguf; not taken for a model.*: M-Q4_0-draft.gguf"),
        (["M-Q4_K_M.gguf", "M-Q5_K_M.gguf"], "k_m", "no file is of that type"),
        (["M-Q4_0.gguf", "M-Q8_0.gguf"], "0", "no file is of that type"),
        (["mmproj-F16.gguf"], "f16", "no GGUF file there is a model: mmproj-F16.gguf"),
        (["M-Q8_0.gguf", "M-Q8_0-00001-of-00001.gguf"], "q8_0", "several.*: M-Q8_0-00001-of-00001.gguf, M-Q8_0.gguf$"),
        (["M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00003-of-00002.gguf"], "q8_0", "has 2 parts, of which there are 2"),
        (["m/Q8_0/a.gguf", "m/Q8_0/b.gguf"], "q8_0", "several files fit.*: m/Q8_0/a.gguf, m/Q8_0/b.gguf"),
    ],
)
def test_a_type_that_is_no_ones_or_not_one_s_alone_is_refused(files: list[str], type_: str, complaint: str) -> None:
    with pytest.raises((UsageError, FormatError), match=complaint):
        of_type(parse(f"hf:a/b:{type_}"), files)


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
    assert "HF_HUB_OFFLINE" in failure(run("dg-run", name, *ASK, HF_HUB_OFFLINE="1"), 1)
    assert "cannot be fetched" in failure(run("dg-run", name, *ASK, HF_ENDPOINT="http://127.0.0.1:9"), 1)
    whole = run("dg-run", name, *ASK).stdout
    asked = len(hub.sent)
    assert run("dg-run", name, *ASK, HF_HUB_OFFLINE="1").stdout == whole
    assert run("dg-run", name, *ASK, HF_ENDPOINT="http://127.0.0.1:9").stdout == whole
    assert len(hub.sent) == asked
    assert "there are sudoku-Q8_0.gguf" in failure(run("dg-run", f"hf:{GGUF}:q4_0", *ASK, HF_HUB_OFFLINE="1"), 2)


def test_parts_are_fetched_together(run: Run, hub: Hub) -> None:
    done = run("dg-info", f"hf:{GGUF}:BF16/split.gguf")
    assert done.returncode == 0 and " in 3 files" in done.stdout, done.stderr
    assert not hub.bytes_of(FILE)


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("hf:someone/else", 1, "hf:someone/else: there is no such repository, or it is private"),
        (f"hf:{GGUF}@v2", 1, "the repository has no revision v2"),
        (f"hf:{GGUF}:q4_0", 2, "no file is of that type; there are BF16/split.gguf, sudoku-Q8_0.gguf"),
        (f"hf:{FOLDER}", 2, f"no GGUF file there, but a checkpoint: dg-convert hf:{FOLDER} -o FILE"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_line(name: str, code: int, complaint: str, run: Run) -> None:
    assert complaint in failure(run("dg-info", name), code)


def test_other_commands_and_python_refuse_several_files_with_the_list(run: Run, here: Hub) -> None:
    assert "several files fit" in failure(run("dg-eval", f"hf:{GGUF}"), 2)
    with pytest.raises(UsageError, match=r"several files fit.*: BF16/split.gguf, sudoku-Q8_0.gguf$"):
        local_model(f"hf:{GGUF}")


def test_without_huggingface_hub_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from dgemma.cli.info import main; main(['hf:a/b'], prog_name='dg-info')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failure(done, 2) == "dg-info: hf:a/b: needs huggingface_hub: pip install 'dgemma[hub]'\n"


# ---- A Hub that refuses ----

REFUSALS = {
    (401, ""): "hf auth login",
    (401, "GatedRepo"): "access has to be asked for",
    (403, ""): "access is refused",
    (403, "GatedRepo"): "access has to be asked for",
    (404, "RepoNotFound"): "there is no such repository",
    (404, "RevisionNotFound"): "no revision",
    (404, ""): "there is no such",
    (429, ""): "wait 7 s",
    (500, ""): "try again later",
    (503, ""): "try again later",
}


@pytest.mark.parametrize("where", ["api", FILE])
@pytest.mark.parametrize(("refusal", "helps"), REFUSALS.items())
def test_what_the_cache_has_is_used_where_the_hub_refuses_and_a_line_says_so(
    refusal: tuple[int, str], helps: str, where: str, here: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"hf:{GGUF}:q8_0"
    refused = (refusal[0], {"Retry-After": "7", **({"X-Error-Code": refusal[1]} if refusal[1] else {})})
    here.refuses[where] = refused
    with pytest.raises(SystemFailure, match=f"{helps}.*HTTP {refusal[0]}.*not in the cache"):
        local_model(name)

    here.refuses.clear()
    there = local_model(name)
    assert capsys.readouterr().err == ""
    here.repositories[GGUF] |= {FILE: here.repositories[GGUF][FILE] + b"more", "README.md": b"A newer one."}
    here.refuses[where] = refused
    assert local_model(name) == there
    told = capsys.readouterr().err
    assert told.startswith(name) and told.count("\n") == 1 and f"HTTP {refusal[0]}" in told and "cache" in told


def test_a_command_says_that_it_uses_the_cache(run: Run, hub: Hub) -> None:
    whole = run("dg-run", f"hf:{GGUF}:q8_0", *ASK).stdout
    hub.refuses["api"] = (429, {"Retry-After": "60"})
    again = run("dg-run", f"hf:{GGUF}:q8_0", *ASK)
    told = "too many requests: wait 60 s, or hf auth login (HTTP 429); what the cache has is used\n"
    assert (again.returncode, again.stdout, again.stderr) == (0, whole, f"hf:{GGUF}:q8_0: {told}")


@pytest.mark.parametrize("refusal", [(401, {}), "unreachable"])
def test_a_command_says_it_once_however_often_it_asks(
    refusal: tuple[int, dict[str, str]] | str, run: Run, hub: Hub, tmp_path: Path
) -> None:
    folder, file = f"hf:{FOLDER}", f"hf:{GGUF}:q8_0"
    convert_it = ("dg-convert", folder, "-o", tmp_path / "out.gguf", "--type", "q8_0", "--force")
    convert_file = ("dg-convert", file, "-o", tmp_path / "two.gguf", "--type", "q8_0", "--force")
    compare = ("dg-eval", file, "--against", file, "--prompts", "1")
    more = {}
    for command in (convert_it, convert_file):
        assert run(*command).returncode == 0
    if isinstance(refusal, tuple):
        hub.refuses["api"] = refusal
    else:
        more = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for command in (convert_it, convert_file, compare, ("dg-convert", folder, "--dry-run")):
        done = run(*command, **more)
        assert done.returncode == 0 and done.stderr.count("what the cache has is used") == 1, done.stderr


def test_a_conversion_in_python_says_it_once_and_the_next_one_again(
    here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(f"hf:{FOLDER}", tmp_path / "out.gguf", "q8_0")
    here.refuses["api"] = (503, {})
    for _ in range(2):
        capsys.readouterr()
        convert(f"hf:{FOLDER}", tmp_path / "out.gguf", "q8_0", force=True)
        assert capsys.readouterr().err.count("what the cache has is used") == 1


def test_a_file_of_an_earlier_commit_is_known_in_a_later_one(run: Run, hub: Hub) -> None:
    name = f"hf:{GGUF}:q8_0"
    assert run("dg-run", name, *ASK).returncode == 0
    hub.repositories[GGUF]["README.md"] = b"A newer one."
    assert run("dg-run", f"hf:{GGUF}:BF16/split.gguf", *ASK).returncode == 0  # now main is the newer commit
    assert run("dg-run", name, *ASK, HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.bytes_of(FILE)) == 1


def test_a_part_of_a_checkpoint_is_not_taken_for_all_of_it(run: Run, hub: Hub, tmp_path: Path) -> None:
    last = sorted(n for n in hub.repositories[FOLDER] if n.endswith(".safetensors"))[-1]
    hub.refuses[last] = (403, {})
    convert_it = ("dg-convert", f"hf:{FOLDER}", "-o", tmp_path / "out.gguf", "--type", "q8_0")
    assert "HTTP 403" in failure(run(*convert_it), 1)
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert "some of its weights are not in the cache" in failure(run(*convert_it, **more), 1)
    hub.refuses.clear()
    assert run(*convert_it).returncode == 0
    hub.refuses["api"] = (429, {})
    again = run(*convert_it, "--force")
    assert again.returncode == 0 and "too many requests" in again.stderr


def test_a_hub_that_does_not_answer_is_not_waited_for_long(here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    there = local_model(f"hf:{GGUF}:q8_0")
    silent = socket.create_server(("127.0.0.1", 0))
    for endpoint in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://no-such-host.invalid", "http://[::1]:9"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(dgemma.hub.download, "ASKED", 0.2)
        assert local_model(f"hf:{GGUF}:q8_0") == there
        with pytest.raises(SystemFailure, match="not in the cache"):
            local_model("hf:someone/else")
    silent.close()


# ---- A cache that is damaged ----


def ref_of(home: Path, repository: str = GGUF) -> Path:
    return home / f"models--{repository.replace('/', '--')}" / "refs/main"


def a_folder(ref: Path) -> None:
    ref.mkdir()


def a_folder_that_is_not_empty(ref: Path) -> None:
    ref.mkdir()
    (ref / "note.txt").write_text("mine")


def a_pipe(ref: Path) -> None:
    os.mkfifo(ref)


def a_link_to_nothing(ref: Path) -> None:
    ref.symlink_to("nowhere")


def an_endless_file(ref: Path) -> None:
    ref.symlink_to("/dev/zero")


def a_file_in_place_of_refs(ref: Path) -> None:
    ref.parent.rmdir()
    ref.parent.write_bytes(b"not a folder")


def bytes_that_are(data: bytes) -> Callable[[Path], None]:
    return lambda ref: (ref.write_bytes(data), None)[1]


DAMAGES = {
    "no UTF-8": bytes_that_are(b"\xff\xfe\x80"),
    "UTF-16": bytes_that_are(("a" * 40).encode("utf-16")),
    "empty": bytes_that_are(b""),
    "blank": bytes_that_are(b"\n\n"),
    "no commit": bytes_that_are(b"main"),
    "half a commit": bytes_that_are(b"a" * 39),
    "a way out": bytes_that_are(b"../../../evil"),
    "NUL": bytes_that_are(bytes(40)),
    "long": bytes_that_are(b"a" * 5_000_000),
} | {
    make.__name__: make
    for make in (
        a_folder, a_folder_that_is_not_empty, a_pipe, a_link_to_nothing, an_endless_file, a_file_in_place_of_refs,
    )
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ref_is_as_if_there_were_none_and_is_written_anew(damage: str, here: Hub, tmp_path: Path) -> None:
    name, cache = f"hf:{GGUF}:q8_0", tmp_path / "in/the/cache"
    there = Path(local_model(name))
    ref = ref_of(cache)
    assert ref.read_text() == here.commit(GGUF)
    ref.unlink()
    DAMAGES[damage](ref)

    here.refuses["api"] = (503, {})
    with pytest.raises(SystemFailure, match=r"try again later.*not in the cache"):
        local_model(name)
    here.refuses.clear()
    assert Path(local_model(name)) == there
    assert ref.read_text() == here.commit(GGUF) and not ref.is_symlink()
    here.refuses["api"] = (503, {})
    assert Path(local_model(name)) == there
    assert len(here.bytes_of(FILE)) == 1
    kept = {path.read_bytes() for path in cache.rglob("*") if path.is_file() and path.stat().st_size < 100}
    if damage == a_folder_that_is_not_empty.__name__:
        assert b"mine" in kept
    assert not [*cache.rglob("*.part")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.binary(max_size=80))
def test_whatever_a_ref_holds_a_hub_that_answers_is_used(here: Hub, tmp_path: Path, data: bytes) -> None:
    ref = ref_of(tmp_path / "in/the/cache")
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_bytes(data)
    assert Path(local_model(f"hf:{GGUF}:q8_0")).is_file()
    assert ref.read_text() == here.commit(GGUF)


@pytest.mark.parametrize("offline", [False, True])
def test_a_command_bears_a_damaged_ref(offline: bool, run: Run, hub: Hub, tmp_path: Path) -> None:
    name, ref = f"hf:{GGUF}:q8_0", ref_of(tmp_path / "home/hub")
    whole = run("dg-run", name, *ASK).stdout
    ref.write_bytes(b"\xff")
    if offline:
        told = failure(run("dg-run", name, *ASK, HF_HUB_OFFLINE="1"), 1)
        assert "HF_HUB_OFFLINE is set; and it is not in the cache" in told
    else:
        assert run("dg-run", name, *ASK).stdout == whole and ref.read_text() == hub.commit(GGUF)


def empty_it(path: Path) -> None:
    path.write_bytes(b"")


def cut_it(path: Path) -> None:
    os.truncate(path, 1000)


def lengthen_it(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize("damage", [empty_it, cut_it, lengthen_it, Path.unlink])
@pytest.mark.parametrize("link", [True, False])
def test_a_file_of_another_length_is_fetched_anew(
    damage: Callable[[Path], None], link: bool, here: Hub, tmp_path: Path
) -> None:
    name = f"hf:{GGUF}:q8_0"
    there = Path(local_model(name))
    whole = there.read_bytes()
    if not link:  # a file system without links
        data = there.read_bytes()
        there.unlink()
        there.write_bytes(data)
    damage(there if not link else there.resolve())
    again = Path(local_model(name))
    assert again == there and again.read_bytes() == whole


def test_a_folder_in_the_place_of_a_cached_file_is_told(here: Hub, tmp_path: Path) -> None:
    there = Path(local_model(f"hf:{GGUF}:q8_0"))
    there.unlink()
    (there / "x").mkdir(parents=True)
    with pytest.raises(SystemFailure, match=r"^hf:[^:]*:q8_0: .*sudoku-Q8_0.gguf: .*directory"):
        local_model(f"hf:{GGUF}:q8_0")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_cache_that_may_not_be_read_is_told_by_name(here: Hub, tmp_path: Path) -> None:
    there = Path(local_model(f"hf:{GGUF}:q8_0"))
    here.refuses["api"] = (503, {})
    there.parent.chmod(0)
    try:
        with pytest.raises(SystemFailure, match=f"^hf:.*{there.parent.name}"):
            local_model(f"hf:{GGUF}:q8_0")
    finally:
        there.parent.chmod(0o755)


# ---- A Hub that lies ----


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub of this process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "in/the/cache"))
    monkeypatch.setattr(dgemma.hub.download, "PAUSE", 0.001)
    return hub


SHA, ABSENT = "a" * 64, object()
BAD = {
    "no JSON": b"<html>Please sign in</html>",
    "no object": b"[1]",
    "nothing": b"",
    "deep": b"[" * 100_000,
    "no commit": b'{"siblings": []}',
    "a commit that leads out": {"sha": "../../../evil"},
    "no list": {"siblings": "m-Q8_0.gguf"},
    "null for a list": {"siblings": None},
    "an object for a list": {"siblings": {}},
    "zero for a list": {"siblings": 0},
    "false for a list": {"siblings": False},
    "no text for a list": {"siblings": ""},
    "an empty list": {"siblings": []},
    "null for an entry": {"siblings": [None]},
    "null for a name": {"siblings": [{"rfilename": None, "size": 4}]},
    "a list for a name": {"siblings": [{"rfilename": ["m-Q8_0.gguf"]}]},
    "null": b"null",
    "a text": b'"siblings"',
    "a number alone": b"7",
    "no UTF-8": b"\xff\xfe\x00",
    "an entry that is none": {"siblings": ["m-Q8_0.gguf"]},
    "an entry without a name": {"siblings": [{"size": 1}]},
    "a name that is none": {"siblings": [{"rfilename": 7}]},
    "a name that leads out": {"siblings": [{"rfilename": "../../../../m-Q8_0.gguf", "size": 4}]},
    "an absolute name": {"siblings": [{"rfilename": "/tmp/m-Q8_0.gguf", "size": 4}]},
    "backslashes": {"siblings": [{"rfilename": "..\\..\\m-Q8_0.gguf", "size": 4}]},
    "NUL": {"siblings": [{"rfilename": "m\0-Q8_0.gguf", "size": 4}]},
    "an endless name": {"siblings": [{"rfilename": "m" * 5000 + "-Q8_0.gguf", "size": 4}]},
    "a textual size": {"siblings": [{"rfilename": "m-Q8_0.gguf", "size": "4"}]},
    "a negative size": {"siblings": [{"rfilename": "m-Q8_0.gguf", "size": -4}]},
    "a real size": {"siblings": [{"rfilename": "m-Q8_0.gguf", "size": 4.5}]},
    "a huge size": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": SHA, "size": 10**30}}]},
    "a large size": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": SHA, "size": 10**18}}]},
    "lfs that is none": {"siblings": [{"rfilename": "m-Q8_0.gguf", "size": 4, "lfs": "yes"}]},
    "no checksum": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"size": 4}}]},
    "a checksum that leads out": {
        "siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": "../../../x", "size": 4}}]
    },
    "no list at all": {"siblings": ABSENT},
    "no commit at all": {"sha": ABSENT},
    "a list for lfs": {"siblings": [{"rfilename": "m-Q8_0.gguf", "size": 4, "lfs": []}]},
    "a textual size of lfs": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": SHA, "size": "4"}}]},
    "an absolute checksum": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": "/tmp/x", "size": 4}}]},
    "a short checksum": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": "a" * 63, "size": 4}}]},
    "a checksum and a newline": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": SHA + "\n", "size": 4}}]},
    "a number": {"siblings": [{"rfilename": "m-Q8_0.gguf", "lfs": {"sha256": 7, "size": 4}}]},
}


def listing(hub: Hub, told: dict[str, object] | bytes) -> bytes:
    if isinstance(told, bytes):
        return told
    answer = {"sha": hub.commit(GGUF), "siblings": [], **told}
    return json.dumps({name: value for name, value in answer.items() if value is not ABSENT}).encode()


@pytest.mark.parametrize("what", BAD)
def test_a_listing_that_makes_no_sense_is_refused_in_a_line(what: str, here: Hub, tmp_path: Path) -> None:
    here.listing = listing(here, BAD[what])
    before = {*tmp_path.rglob("*")}
    with pytest.raises(Error) as refused:
        local_model(f"hf:{GGUF}:q8_0")
    told = str(refused.value)
    assert told.startswith(f"hf:{GGUF}:q8_0: ") and ("cannot be used" in told or "no space left" in told), told
    assert all(path.is_relative_to(tmp_path / "in") for path in {*tmp_path.rglob("*")} - before)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("null for a list", "its siblings are None, not a list of files"),
        ("no list at all", "it has no siblings, the list of files"),
        ("an object for a list", "its siblings are {}, not a list of files"),
        ("no list", "its siblings are 'm-Q8_0.gguf', not a list of files"),
        ("an empty list", "its list of files is empty"),
        ("an entry that is none", "its list of files has 'm-Q8_0.gguf', which names no file"),
        ("a name that is none", "its list of files has {'rfilename': 7}, which names no file"),
        ("no object", "it is [1], not an object"),
        ("null", "it is None, not an object"),
        ("no JSON", "it is no JSON"),
        ("no UTF-8", "it is no JSON"),
        ("a commit that leads out", "its sha is '../../../evil', not a commit"),
        ("no commit at all", "its sha is None, not a commit"),
    ],
)
def test_what_is_wrong_with_a_listing_is_told_as_it_is(what: str, told: str, here: Hub) -> None:
    here.listing = listing(here, BAD[what])
    with pytest.raises(FormatError) as refused:
        local_model(f"hf:{GGUF}:q8_0")
    assert f"the Hub's answer cannot be used: {told}; and it is not in the cache" in str(refused.value)


@pytest.mark.parametrize("what", [what for what in BAD if what != "a large size"])
def test_what_the_cache_has_is_used_where_a_listing_makes_no_sense(
    what: str, here: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    there = local_model(f"hf:{GGUF}:q8_0")
    assert capsys.readouterr().err == ""
    here.listing = listing(here, BAD[what])
    assert local_model(f"hf:{GGUF}:q8_0") == there
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be used" in told and "what the cache has is used" in told


def test_a_command_uses_the_cache_where_a_listing_makes_no_sense(run: Run, hub: Hub) -> None:
    hub.listing = listing(hub, BAD["a checksum that leads out"])
    assert "not 64 hexadecimal digits" in failure(run("dg-run", f"hf:{GGUF}:q8_0", *ASK), 1)
    hub.listing = None
    whole = run("dg-run", f"hf:{GGUF}:q8_0", *ASK).stdout
    for said in ("no JSON", "null for a list"):
        hub.listing = listing(hub, BAD[said])
        again = run("dg-run", f"hf:{GGUF}:q8_0", *ASK)
        assert (again.returncode, again.stdout) == (0, whole) and again.stderr.count("\n") == 1


LOST = {
    "a loop": "{url}/api/models/" + GGUF + "/revision/main",
    "a page": "{url}/sign-in",
    "no web": "ftp://127.0.0.1/x",
    "a file of this machine": "file:///etc/passwd",
    "no address": "http://[",
    "a port that is none": "http://127.0.0.1:99999999/",
    "nobody": "http://127.0.0.1:9/",
}


@pytest.mark.parametrize("where", ["api", FILE])
@pytest.mark.parametrize("to", LOST)
def test_a_hub_that_sends_one_elsewhere_is_told_and_the_cache_used(
    to: str, where: str, here: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    name, address = f"hf:{GGUF}:q8_0", LOST[to].format(url=here.url)
    if where != "api" and to == "a loop":
        address = f"{here.url}/{GGUF}/resolve/main/{FILE}"
    here.refuses[where] = (302, {"Location": address})
    with pytest.raises((SystemFailure, FormatError), match="not in the cache"):
        local_model(name)
    here.refuses.clear()
    there = local_model(name)
    here.repositories[GGUF] |= {FILE: here.repositories[GGUF][FILE] + b"more"}
    here.refuses[where] = (302, {"Location": address})
    capsys.readouterr()
    assert local_model(name) == there
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "what the cache has is used" in told, told


def test_the_cache_is_used_where_a_file_comes_damaged(here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"hf:{GGUF}:q8_0"
    there = local_model(name)
    siblings = [{"rfilename": FILE, "lfs": {"sha256": SHA, "size": len(here.repositories[GGUF][FILE])}}]
    here.listing = listing(here, {"sha": "b" * 40, "siblings": siblings})
    here.commits.append("b" * 40)
    assert local_model(name) == there
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{FILE} came damaged" in told and "what the cache has is used" in told


def test_bytes_of_another_place_than_was_asked_for_are_not_taken(here: Hub) -> None:
    here.break_at[FILE], here.shift = 700_001, 5
    with pytest.raises(FormatError, match=r"it sent bytes 700006-.*instead of those from 700001"):
        local_model(f"hf:{GGUF}:q8_0")


@pytest.mark.parametrize("size", [None, 3, 5])
def test_a_small_file_of_another_size_is_refused_and_one_of_none_is_taken(size: int | None, here: Hub) -> None:
    here.repositories[GGUF] = {"m-Q8_0.gguf": b"data"}
    here.listing = listing(
        here, {"siblings": [{"rfilename": "m-Q8_0.gguf", **({} if size is None else {"size": size})}]}
    )
    if size is None:
        assert Path(local_model(f"hf:{GGUF}:q8_0")).read_bytes() == b"data"
    else:
        with pytest.raises((FormatError, SystemFailure), match=f"{size}"):
            local_model(f"hf:{GGUF}:q8_0")


NAMES = st.sampled_from(["m-Q8_0.gguf", "../m-Q8_0.gguf", "/tmp/m-Q8_0.gguf", "a/../../m-Q8_0.gguf", "m-Q8_0.gguf/x"])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(SHA) | st.just("../x")
ENTRIES = st.fixed_dictionaries(
    {"rfilename": NAMES | st.text().map(lambda text: f"{text}-Q8_0.gguf") | VALUES},
    optional={"size": VALUES, "lfs": VALUES | st.dictionaries(st.sampled_from(["sha256", "oid", "size"]), VALUES)},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.fixed_dictionaries({"sha": st.just("") | VALUES, "siblings": st.lists(ENTRIES, max_size=3) | VALUES}))
def test_nothing_is_written_outside_of_the_cache_whatever_the_hub_says(
    here: Hub, tmp_path: Path, told: dict[str, object]
) -> None:
    here.listing = json.dumps(told | {"sha": told["sha"] or here.commit(GGUF)}).encode()
    try:
        local_model(f"hf:{GGUF}:q8_0")
    except Error as refused:
        assert "\n" not in str(refused)
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "in")]
    assert outside == [] and sorted(p.name for p in tmp_path.glob("in/*/*")) in ([], ["cache"])
    if (kept := tmp_path / "in/the/cache").exists():
        assert [p.name for p in kept.iterdir()] == [f"models--{GGUF.replace('/', '--')}"]


# ---- Downloads that break off ----


def test_a_connection_that_ends_is_taken_up_where_it_ended(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FILE] = 700_001
    assert run("dg-run", f"hf:{GGUF}:q8_0", *ASK).returncode == 0
    size = len(hub.repositories[GGUF][FILE])
    assert hub.bytes_of(FILE) == [(0, 700_001), (700_001, size - 700_001)]


def test_a_process_that_dies_leaves_a_part_that_the_next_one_goes_on_from(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.stall_at[FILE] = 900_000
    command = [str(Path(sys.executable).with_name("dg-run")), f"hf:{GGUF}:q8_0", *ASK]
    with subprocess.Popen(command, env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE) as process:
        assert hub.stalled.wait(30)
        partial = tmp_path / "home/hub" / f"models--{GGUF.replace('/', '--')}/blobs"
        while not (partial.exists() and any(f.stat().st_size > 500_000 for f in partial.iterdir())):
            assert process.poll() is None
        process.kill()
    assert [name.rpartition(".")[2] for name in blobs(tmp_path)] == ["incomplete"]
    failure(run("dg-run", f"hf:{GGUF}:q8_0", *ASK, HF_HUB_OFFLINE="1"), 1)  # a part is not taken for the whole

    hub.stall_at.clear()
    assert run("dg-run", f"hf:{GGUF}:q8_0", *ASK).returncode == 0
    (_, first), (start, rest) = hub.bytes_of(FILE)
    assert first == 900_000 and 500_000 < start <= 900_000
    assert start + rest == len(hub.repositories[GGUF][FILE])
    assert blobs(tmp_path) == [hashlib.sha256(hub.repositories[GGUF][FILE]).hexdigest()]


def test_a_part_that_was_damaged_is_thrown_away(run: Run, hub: Hub, tmp_path: Path) -> None:
    data = hub.repositories[GGUF][FILE]
    folder = tmp_path / "home/hub" / f"models--{GGUF.replace('/', '--')}/blobs"
    folder.mkdir(parents=True)
    (folder / f"{hashlib.sha256(data).hexdigest()}.incomplete").write_bytes(bytes(1000))
    assert f"{FILE} came damaged" in failure(run("dg-run", f"hf:{GGUF}:q8_0", *ASK), 1)
    assert blobs(tmp_path) == []
    assert run("dg-run", f"hf:{GGUF}:q8_0", *ASK).returncode == 0


def test_a_server_without_ranges_sends_all_again(run: Run, hub: Hub, tmp_path: Path) -> None:
    hub.break_at[FILE], hub.ranges = 700_001, False
    assert run("dg-run", f"hf:{GGUF}:q8_0", *ASK).returncode == 0
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
