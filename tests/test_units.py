"""Sizes of memory mean the same in every spelling and in every option, and a number without its unit is asked back."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dgemma
from dgemma.units import BARE, UNITS, parse_size, size, size_text

COUNTS = st.integers(0, 8000)
SPELLINGS = ["{n}{u}", "{n}{u}B", "{n}{u}iB", "{n} {u}", " {n}{u}b ", "{n}.0{u}"]


@given(n=COUNTS, unit=st.sampled_from("KMGT"), spelling=st.sampled_from(SPELLINGS), lower=st.booleans())
def test_all_spellings_are_the_same_size(n: int, unit: str, spelling: str, lower: bool) -> None:
    text = spelling.format(n=n, u=unit)
    assert parse_size(text.lower() if lower else text) == n * UNITS[unit]


@given(n=COUNTS, units=st.sampled_from(["KM", "MG", "GT"]))
def test_units_are_powers_of_1024(n: int, units: str) -> None:
    small, large = units
    assert parse_size(f"{1024 * n}{small}") == parse_size(f"{n}{large}")


@given(n=st.integers(BARE, 2**63 - 1))
def test_a_number_of_a_million_or_more_is_bytes(n: int) -> None:
    assert parse_size(n) == parse_size(str(n)) == parse_size(f" {n} ") == n


@given(n=st.integers(1, BARE - 1))
def test_a_smaller_number_is_asked_back(n: int) -> None:
    for value in (n, str(n)):
        with pytest.raises(ValueError, match=f"^{n} is {n} bytes; write {n}[GM] or {n}[MK]$"):
            parse_size(value)


@given(text=st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 2**63
    except ValueError as reason:
        assert " is no size such as " in str(reason) or " bytes; write " in str(reason)


@given(half=st.integers(0, 10**6))
def test_fractions_are_exact(half: int) -> None:
    assert parse_size(f"{half / 2}M") == half * 2**19


def test_nothing_is_a_size_where_it_makes_sense() -> None:
    assert parse_size(0) == parse_size("0") == 0
    dgemma.Model(repack=0).close()


NONSENSE = ["", "G", "B", "8B", "4X", "-1", "1e9", "nan", "4GG", "4iB", "4 G 4", "9" * 19 + "G", "9" * 20, "٤G", -1]


@pytest.mark.parametrize("value", [*NONSENSE, 2**63, 1.5, True, None, b"4G"])
def test_what_is_no_size_is_refused_by_name(value: Any) -> None:
    with pytest.raises(dgemma.UsageError, match=r"^repack: .* is no size such as 512M or 8G$"):
        size(value, "repack")


@given(size=st.integers(0, 2**62))
def test_what_is_told_can_be_given_again(size: int) -> None:
    text = size_text(size)
    if not text.endswith("bytes"):
        assert abs(parse_size(text) - size) <= 0.06 * size


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("run", ["--ram", "--vram", "--repack"]),
        ("serve", ["--ram", "--vram", "--cache", "--max-body"]),
        ("bench", ["--ram", "--vram"]),
        ("eval", ["--ram", "--vram"]),
        ("info", ["--ram", "--vram"]),
    ],
)
def test_every_option_reads_sizes_the_same_way(command: str, flags: list[str]) -> None:
    main = import_module(f"dgemma.cli.{command}").main
    model = [dgemma.model.bundled()]
    for flag in flags:
        for value, reason in (("8", "8 is 8 bytes; write 8G or 8M"), ("lots", "'lots' is no size"), ("0", "no size")):
            done = CliRunner().invoke(main, [*model, flag, value])
            assert done.exit_code == 2 and flag in done.output and reason in done.output, done.output
