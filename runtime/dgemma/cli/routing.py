"""dg-info --routing: shows how often each expert was chosen, by the counts in FILE.routing.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgemma.errors import Error
from dgemma.files.routing import load_routing, routing_path

HOT = 8  # the hottest experts are this part of all: one in eight
NAMED = 4  # the most experts of a layer that the table names


def routing_facts(model: Path) -> dict[str, Any]:
    """Return the counts, and figures of each layer, as --json prints them."""
    path = routing_path(model)
    try:
        counts = load_routing(path)
    except FileNotFoundError:
        raise Error(f"{path}: there is none yet; dg-run {model} --save-routing makes it") from None
    layers = []
    for tokens in counts:
        order = sorted(range(len(tokens)), key=lambda e: (-int(tokens[e]), e))
        hot = order[: max(1, len(order) // HOT)]
        total = int(tokens.sum())
        layers.append(
            {
                "tokens": [int(n) for n in tokens],
                "total": total,
                "hottest": hot,
                "share": sum(int(tokens[e]) for e in hot) / total if total else 0.0,
                "never": [e for e in range(len(tokens)) if not tokens[e]],
            }
        )
    return {"path": str(model), "counts": path, "layers": layers}


def routing_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per layer: choices, the share of the hottest experts, their numbers, experts never chosen."""
    rows: list[tuple[str, ...]] = []
    for i, layer in enumerate(found["layers"]):
        hot = " ".join(map(str, layer["hottest"][:NAMED])) + (" ..." if len(layer["hottest"]) > NAMED else "")
        never = len(layer["never"])
        rows.append((str(i), f"{layer['total']:,}", f"{layer['share']:.0%}", hot, f"{never:,}" if never else ""))
    return rows


def routing_columns(found: dict[str, Any]) -> tuple[str, ...]:
    hot = max((len(layer["hottest"]) for layer in found["layers"]), default=1)
    return ("layer", ">choices", f">share of the hottest {hot}", "which", ">never chosen")
