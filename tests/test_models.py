"""dg-models: what is kept here is listed by the name that finds it, and nothing else is ever removed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import click
import huggingface_hub.constants
import pytest
from gguf import GGUFWriter
from support.checkpoints import write_checkpoint
from support.commands import Inside
from support.hub_server import Hub, serving

import dgemma.hub.inventory
from dgemma.bench.synthetic import Synthetic, make
from dgemma.cli import models
from dgemma.convert import convert
from dgemma.errors import UsageError
from dgemma.hub.inventory import find, kept_models, removal
from dgemma.hub.models import local_model, local_source
from dgemma.model import bundled

REPOSITORY = "someone/sudoku-GGUF"
NAME = f"hf:{REPOSITORY}:Q8_0"
COMMAND = Inside(models.main, "dg-models")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's of the test's own, and one of dg-bench's."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    room = tmp_path_factory.mktemp("files")
    convert(bundled(), room / "split.gguf", "q4_0", split_max_size=600_000)
    parts = {f"Q4_0/{file.name}": file.read_bytes() for file in sorted(room.glob("*.gguf"))}
    writer = GGUFWriter(room / "other", "llama")
    writer.add_name("other")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"sudoku-Q8_0.gguf": Path(bundled()).read_bytes(), **parts, "llama-F16.gguf": (room / "other").read_bytes()}


@pytest.fixture
def hub(files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with serving(Hub({REPOSITORY: dict(files)})) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        yield hub


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    code, out, err = COMMAND.run(capsys, "list", "--json")
    assert code == 0, err
    return {told["name"]: told for told in json.loads(out)}


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file, link and folder below a folder, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = b"" if path.is_dir() else os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        found[path.relative_to(folder).as_posix()] = (os.lstat(path).st_mode, data)
    return found


def test_an_empty_machine_has_the_bundled_models(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(listed(capsys)) == ["sudoku", "tidy"]
    assert COMMAND.run(capsys, "path", "tidy")[1] == bundled("tidy") + "\n"
    assert "it comes with dgemma" in COMMAND.refused(capsys, 2, "rm", "tidy", "--yes")
    assert Path(bundled("tidy")).exists()


def test_what_was_fetched_is_listed_by_the_name_that_finds_it(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for type_ in ("Q8_0", "Q4_0", "llama-F16.gguf"):
        local_model(f"hf:{REPOSITORY}:{type_}")
    told = listed(capsys)
    assert list(told) == ["sudoku", "tidy", f"hf:{REPOSITORY}:Q4_0", NAME], "llama.cpp's models are none of ours"
    assert told[NAME]["bytes"] == len(hub.repositories[REPOSITORY]["sudoku-Q8_0.gguf"])
    parts = [data for name, data in hub.repositories[REPOSITORY].items() if name.startswith("Q4_0/")]
    assert len(parts) > 1 and told[f"hf:{REPOSITORY}:Q4_0"]["bytes"] == sum(map(len, parts))
    for name in (NAME, f"hf:{REPOSITORY}:Q4_0"):
        assert local_model(name) == told[name]["path"] == COMMAND.run(capsys, "path", name)[1].strip()
    out = COMMAND.run(capsys, "list")[1]
    assert NAME in out and "1.3 MiB" in out and told[NAME]["used"][:10] in out


def test_a_checkpoint_is_listed_and_removed_whole(
    hub: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, layers=2, shards=2, vocab=1024, hidden=128)
    hub.repositories["someone/else"] = {f.name: f.read_bytes() for f in folder.iterdir()}
    hub.repositories["someone/other"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(100)}
    for name in ("else", "other"):
        local_source(f"hf:someone/{name}")
    assert [name for name in listed(capsys) if name.startswith("hf:")] == ["hf:someone/else"]
    assert COMMAND.run(capsys, "rm", "hf:someone/else", "--yes")[0] == 0
    assert not (cache / "models--someone--else").exists() and (cache / "models--someone--other").exists()


def test_a_removal_names_what_goes_and_takes_no_more(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for type_ in ("Q8_0", "Q4_0", "llama-F16.gguf"):
        local_model(f"hf:{REPOSITORY}:{type_}")
    before = everything(cache)
    code, out, err = COMMAND.run(capsys, "rm", NAME, "--yes", "--json")
    assert code == 0, err
    gone = before.keys() - everything(cache).keys()
    told = json.loads(out)
    assert {str(cache / name) for name in gone} == set(told["removed"]) and len(gone) == 2
    assert all(file in err for file in told["removed"])
    assert told["freed"] == len(hub.repositories[REPOSITORY]["sudoku-Q8_0.gguf"])
    assert everything(cache) == {name: kept for name, kept in before.items() if name not in gone}
    assert NAME not in listed(capsys)
    assert "no model of that name is kept here" in COMMAND.refused(capsys, 2, "rm", NAME, "--yes")
    local_model(NAME)
    assert everything(cache) == before, "it is fetched again as it was"


def test_a_blob_that_another_commit_has_too_stays(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local_model(NAME)
    first = hub.commit(REPOSITORY)
    hub.repositories[REPOSITORY]["README.md"] = b"A newer one."
    there = Path(local_model(NAME))
    older = f"hf:{REPOSITORY}@{first}:Q8_0"
    assert set(listed(capsys)) == {"sudoku", "tidy", NAME, older}
    blob = there.resolve()
    code, _, err = COMMAND.run(capsys, "rm", NAME, "--yes")
    assert code == 0 and f"stays, as another commit has it too: {blob}" in err and "0 bytes are free again" in err
    assert blob.exists() and not there.exists() and list(listed(capsys)) == ["sudoku", "tidy", older]
    assert COMMAND.run(capsys, "rm", older, "--yes")[0] == 0
    assert not blob.exists() and not (cache / f"models--{REPOSITORY.replace('/', '--')}").exists()


@pytest.mark.parametrize("name", ["hf:someone/sudoku-GGUF", "../hub", "hf:../..:Q8_0", "", "/etc/passwd", NAME + "x"])
def test_what_is_no_name_of_the_list_is_refused(
    name: str, hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local_model(NAME)
    before = everything(cache)
    told = COMMAND.refused(capsys, 2, "rm", name, "--yes")
    begins = name == f"hf:{REPOSITORY}"
    assert "no model of that name is kept here" in told and (f"there are {NAME}\n" in told) == begins
    assert everything(cache) == before


def test_a_link_that_leads_out_of_the_cache_takes_nothing_with_it(
    hub: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Path(local_model(NAME))
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(there.read_bytes())
    (there.parent / "mine-Q6_K.gguf").symlink_to(mine)
    name = f"hf:{REPOSITORY}:Q6_K"
    assert removal(find(name)).files == [there.parent / "mine-Q6_K.gguf"] and removal(find(name)).bytes == 0
    assert COMMAND.run(capsys, "rm", name, "--yes")[0] == 0
    assert mine.exists() and there.exists() and not (there.parent / "mine-Q6_K.gguf").is_symlink()


def test_a_cache_without_links_gives_its_bytes_back(hub: Hub, cache: Path) -> None:
    there = Path(local_model(NAME))
    data = there.read_bytes()
    there.resolve().unlink()
    there.unlink()
    there.write_bytes(data)
    assert removal(find(NAME)).files == [there] and removal(find(NAME)).bytes == len(data)


def test_an_unfinished_download_is_listed_and_not_removed_while_it_goes_on(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}" / "blobs"
    folder.mkdir(parents=True)
    checksum = hashlib.sha256(hub.repositories[REPOSITORY]["sudoku-Q8_0.gguf"]).hexdigest()
    partial = folder / f"{checksum}.incomplete"
    partial.write_bytes(bytes(1000))
    name = f"hf:{REPOSITORY}:{partial.name}"
    assert listed(capsys)[name]["kind"] == "unfinished download"
    with partial.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        code, _, err = COMMAND.run(capsys, "rm", name, "--yes")
        assert code == 1 and "it is being fetched right now" in err and partial.exists()
    assert COMMAND.run(capsys, "rm", name, "--yes")[0] == 0 and not partial.exists()


def test_shapes_of_dg_bench_are_known_by_what_they_say(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "xdg/dgemma"
    shape = make(folder, Synthetic("tiny", 1, "q8_0"))
    for stranger in ("mine.gguf", "notes.txt", f"{shape.stem}-copy.gguf"):
        (folder / stranger).write_bytes(shape.read_bytes())
    (folder / "link.gguf").symlink_to(shape)
    (folder / "damaged.gguf").write_bytes(b"GGUF")
    assert list(listed(capsys)) == ["sudoku", "tidy", shape.stem]
    before = everything(folder)
    assert COMMAND.run(capsys, "rm", shape.stem, "--yes")[0] == 0
    before.pop(shape.name)
    assert everything(folder) == before


@pytest.mark.parametrize("answer", [True, False])
def test_a_terminal_is_asked_and_a_pipe_needs_yes(
    answer: bool, hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path(local_model(NAME))
    code, out, err = COMMAND.run(capsys, "rm", NAME)
    assert (code, out) == (1, "") and "nothing was removed: --yes" in err and there.exists()
    monkeypatch.setattr(models, "is_terminal", lambda stream: True)
    monkeypatch.setattr(click, "confirm", lambda text, **more: answer)
    code, _, err = COMMAND.run(capsys, "rm", NAME)
    assert (code, there.exists()) == ((0, False) if answer else (1, True)), err


def test_a_damaged_cache_is_listed_as_far_as_it_goes(hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = Path(local_model(NAME))
    root = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (root / "refs/main").write_bytes(b"\xff\xfe")
    (there.parent / "broken-Q4_0.gguf").symlink_to("nowhere")
    (there.parent / "empty-Q6_K.gguf").write_bytes(b"")
    (root / "snapshots/not-a-commit").mkdir()
    (cache / "models--a--b").write_bytes(b"no folder")
    (cache / "models--a--c").mkdir()
    (cache / "models--a--d").symlink_to(root)
    assert list(listed(capsys)) == ["sudoku", "tidy", f"hf:{REPOSITORY}@{there.parent.name}:Q8_0"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [([], "ACTION"), (["list", "x"], "list takes no NAME"), (["rm"], "needs a NAME"), (["purge"], "purge")],
)
def test_wrong_usage_is_told_in_a_line(
    arguments: list[str], complaint: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in COMMAND.refused(capsys, 2, *arguments)


def test_without_huggingface_hub_its_cache_is_found_too(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local_model(NAME)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub.constants", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert [each.name for each in kept_models()] == ["sudoku", "tidy", NAME]
    with pytest.raises(UsageError, match="no model of that name"):
        find("nobody")


def test_what_cannot_be_removed_is_told(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    local_model(NAME)
    monkeypatch.setattr(dgemma.hub.inventory.Path, "unlink", lambda *a, **b: (_ for _ in ()).throw(OSError(30, "Read")))
    code, _, err = COMMAND.run(capsys, "rm", NAME, "--yes")
    assert code == 1 and err.splitlines()[-1].endswith("sudoku-Q8_0.gguf: read")
