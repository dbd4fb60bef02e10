"""What several rooms' tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def bundled():
    """The bundled Sudoku model."""
    import dgemma

    with dgemma.Model() as model:
        yield model
