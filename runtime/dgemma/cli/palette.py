"""Colours for levels of uncertainty, for terminals and recordings."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass

BOUNDS = (0.05, 0.3, 1.0, 2.0, 4.0)  # bounds between the levels: entropy in nats; level 0 is the most certain
LEVELS = len(BOUNDS) + 1


def level(entropy: float) -> int:
    """Return the level of an entropy in nats: 0 (certain) to LEVELS - 1."""
    return bisect_right(BOUNDS, entropy)


@dataclass(frozen=True)
class Palette:
    """A set of colours, "#rrggbb".

    The less certain a token is, the closer its colour is to the background, so lightness alone tells the levels apart.
    """

    ground: str  # background
    done: str  # finished text
    sure: str  # accepted tokens, which are bold
    mark: str  # marks, thoughts and figures
    levels: tuple[str, ...]  # uncertain tokens, by level

    def colour(self, look: str) -> str:
        """Return the colour for a Look of a frame."""
        return self.levels[int(look[1:])] if look.startswith("u") else str(getattr(self, look))


# Samples of the colour map viridis: its steps look even, and people with any kind of colour blindness see their order.
DARK = Palette(
    "#16181d", "#d5d9e0", "#ffffff", "#8b919e", ("#fde725", "#a8db34", "#58c765", "#25ab82", "#228b8d", "#2e6f8e")
)
LIGHT = Palette(
    "#ffffff", "#1d2026", "#000000", "#6a6f7a", ("#440154", "#472e7c", "#3a548c", "#2b758e", "#1f958b", "#2cb17e")
)


def of_terminal() -> Palette:
    """Return the palette for the terminal's background, by the variable COLORFGBG; without it, the dark palette."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return LIGHT if ground in ("7", "15") else DARK
