"""A command in this process, as a test runs it."""

from __future__ import annotations

from dataclasses import dataclass

import click
import pytest


@dataclass(frozen=True)
class Inside:
    """A command under its name, such as "dg-info"."""

    main: click.Command
    name: str

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            self.main.main([str(a) for a in arguments], prog_name=self.name)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def refused(self, capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
        """Runs what must fail, so: this status, nothing on standard output, one line on standard error."""
        status, out, err = self.run(capsys, *arguments)
        assert (status, out) == (code, ""), err
        assert err.startswith(f"{self.name}: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "Traceback" not in err and "internal error" not in err
        return err
