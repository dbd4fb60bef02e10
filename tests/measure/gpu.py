"""What a GPU makes of the published shape: the table of figures that dgemma promises for one.

python tests/measure gpu [--shape 26b-a4b] [--layers N] [--types q4_k_m,q8_0,bf16] [--vram 8G] [--long 8192]
                            [--runs N] [--cache DIR] [--json FILE]

Every row is dg-bench on random weights of one type, in a process of its own: a recorded step beside its floor, the
bytes of the weights over the bandwidth of the GPU's memory as measured in the same run; a canvas of 16 steps and its
encoding; a step behind a long prompt, over one behind a short. Then the first type again within --vram: what
copies, GPU and CPU took of a step, and the step over the planner's prediction. Files that were not in DIR before are
removed when they were measured: they are large.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dgemma.bench.report import table
from dgemma.bench.synthetic import Synthetic, cache_folder


def bench(options: argparse.Namespace, kind: str, more: list[str]) -> dict[str, Any]:
    """dg-bench's figures, and its tables on the way."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "dgemma.cli.bench", "--shape", options.shape, "--type", kind]
        command += ["--backend", "cuda", "--cache", str(options.cache), "--runs", str(options.runs), "-o", str(out)]
        command += ["--layers", str(options.layers)] if options.layers else []
        subprocess.run([*command, *more], check=True)
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def steps_table(figures: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for kind, each in figures.items():
        told, long = each["device"], each["behind"]
        canvas = [ms(told["canvas"]), f"{told['tokens_per_second']:.4g}"] if told["canvas"] else ["–", "–"]
        share = f"{told['floor'] / told['seconds']:.1%}"
        rows.append([kind, ms(told["seconds"]), ms(told["floor"]), share, *canvas, f"{long['ratio']:.3f}"])
    lengths = next(iter(figures.values()))["behind"]["lengths"]
    head = ["weights", "a step, ms", "its floor, ms", "share of the floor", "a canvas, ms", "tokens/s"]
    return table([*head, f"a step behind {lengths[1]} over {lengths[0]} tokens"], rows)


def budget_table(figures: dict[str, Any], vram: str) -> list[str]:
    told = figures["device"]
    longest = max(told["copying"], told["gpu"], told["cpu"])
    head = [f"within {vram}", "copies, ms", "GPU, ms", "CPU, ms", "all together, ms", "over the longest"]
    row = [figures["model"]["type"], *(ms(told[name]) for name in ("copying", "gpu", "cpu", "wall"))]
    row += [f"{told['wall'] / longest:.2f}" if longest else "–"]
    row += [ms(told["seconds"]), ms(told["predicted"]), f"{told['seconds'] / told['predicted']:.2f}"]
    return table([*head, "a step, ms", "predicted, ms", "over the prediction"], [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="26b-a4b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--types", default="q4_k_m,q8_0,bf16")
    parser.add_argument("--vram", default="8G")
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds, figures, budget = options.types.split(","), {}, None
    for kind in kinds:
        file = options.cache / f"{Synthetic(options.shape, options.layers, kind).name}.gguf"
        there = file.exists()
        figures[kind] = bench(options, kind, ["--long", str(options.long)])
        if kind == kinds[0]:
            budget = bench(options, kind, ["--vram", options.vram])
        if not there:
            file.unlink()
    assert budget is not None
    if options.json:
        options.json.write_text(json.dumps({"whole": figures, "budget": budget}, indent=1) + "\n")
    print(
        "\n".join(
            ["", f"# {budget['model']['backend']}", "", *steps_table(figures), "", *budget_table(budget, options.vram)]
        )
    )


if __name__ == "__main__":
    main()
