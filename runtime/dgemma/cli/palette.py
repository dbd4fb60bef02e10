"""Colours of uncertainty, for terminals and recordings alike."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass

BOUNDS = (0.05, 0.3, 1.0, 2.0, 4.0)  # entropy in nats: below the first is level 0, the most certain
LEVELS = len(BOUNDS) + 1


def level(entropy: float) -> int:
    """Return 0 (certain) to LEVELS - 1."""
    return bisect_right(BOUNDS, entropy)


@dataclass(frozen=True)
class Palette:
    """A colour per level, "#rrggbb", more like the background the less certain: told apart by lightness alone too."""

    ground: str
    done: str  # finished text
    sure: str  # accepted tokens, bold
    mark: str  # what is no text: marks, thoughts, figures
    levels: tuple[str, ...]

    def colour(self, look: str) -> str:
        """Return the colour of a frame's Look."""
        return self.levels[int(look[1:])] if look.startswith("u") else str(getattr(self, look))


# Samples of viridis, which is perceptually even and the same order to every kind of colour vision.
DARK = Palette(
    "#16181d", "#d5d9e0", "#ffffff", "#8b919e", ("#fde725", "#a8db34", "#58c765", "#25ab82", "#228b8d", "#2e6f8e")
)
LIGHT = Palette(
    "#ffffff", "#1d2026", "#000000", "#6a6f7a", ("#440154", "#472e7c", "#3a548c", "#2b758e", "#1f958b", "#2cb17e")
)


def of_terminal() -> Palette:
    """Return the palette for the terminal's background, as far as it tells (COLORFGBG); dark if it does not."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return LIGHT if ground in ("7", "15") else DARK
