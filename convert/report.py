"""Format the output of dg-convert: the plan, a summary, and how close the file is to its source."""

from __future__ import annotations

from typing import Any

from dgemma.convert import Conversion
from dgemma.convert.plan import Plan
from dgemma.units import size_text

WORST = 10  # how many tensors are listed


def describe(todo: Plan) -> str:
    """Return the plan as text: a line per tensor, then the totals."""
    width = max(len(tensor.want.gguf) for tensor in todo.tensors)
    lines = [f"{'tensor':<{width}}  {'dims':<20}  {'from':<6}  {'to':<6}  {'bytes':>14}"]
    for tensor in todo.tensors:
        dims = " x ".join(map(str, tensor.want.dims))
        source, name = tensor.source_format, tensor.want.gguf
        lines.append(f"{name:<{width}}  {dims:<20}  {source:<6}  {tensor.format.name:<6}  {tensor.bytes:>14,}")
    lines += ["", f"{'type':<6}  {'tensors':>7}  {'bytes':>14}"]
    lines += [f"{name:<6}  {count:>7}  {size:>14,}" for name, (count, size) in todo.histogram().items()]
    lines += [
        "",
        f"tensors       {len(todo.tensors):>14,}  (and {todo.left_out} of the source left out)",
        *([f"tied copies   {len(todo.copies):>14,}  (compared before anything is written)"] if todo.copies else []),
        f"header bytes  {todo.header_bytes:>14,}",
        f"data bytes    {todo.data_bytes:>14,}",
        f"file bytes    {todo.file_bytes:>14,}  ({size_text(todo.file_bytes)})",
    ]
    if len(todo.parts) > 1:
        lines += ["", f"{'part':<6}  {'tensors':>7}  {'file bytes':>14}"]
        lines += [f"{i:<6}  {len(p.tensors):>7}  {p.file_bytes:>14,}" for i, p in enumerate(todo.parts, 1)]
    lines += [f"note: {note}" for note in todo.notes]
    return "\n".join(lines)


def summary(done: Plan) -> str:
    formats = ", ".join(f"{count} {name}" for name, (count, _) in done.histogram().items())
    left_out = f"; {done.left_out} tensors left out (vision tower)" if done.left_out else ""
    left_out += f"; {len(done.copies)} tied copies, all equal" if done.copies else ""
    parts = f" in {len(done.parts)} files" if len(done.parts) > 1 else ""
    return f"{done.type}, {size_text(done.file_bytes)}{parts}, {len(done.tensors)} tensors ({formats}){left_out}"


def deviations(done: Conversion) -> str:
    """Return a table of the tensors with the largest errors, and the number of tensors without errors."""
    lossy = [d for d in done.deviations if d.max_error > 0]
    exact = f"{len(done.deviations) - len(lossy)} of {len(done.deviations)} tensors hold exactly the source's values"
    if not lossy:
        return "\n".join([exact, *_fidelity(done)])
    lossy.sort(key=lambda d: d.relative_rmse, reverse=True)
    width = max(len(d.name) for d in lossy[:WORST])
    lines = [f"{'worst tensors':<{width}}  {'from':<6}  {'to':<6}  {'relative RMSE':>13}  {'max error':>9}"]
    for d in lossy[:WORST]:
        figures = f"{d.relative_rmse:>13.5f}  {d.max_error:>9.3g}"
        lines.append(f"{d.name:<{width}}  {d.source_format:<6}  {d.format:<6}  {figures}")
    return "\n".join([*lines, "", exact, *_fidelity(done)])


def _fidelity(done: Conversion) -> list[str]:
    """Return a line with the result of dg-eval's comparison of the file and its source."""
    f = done.fidelity
    if f is None or isinstance(f, str):
        return [f"what it says was not compared: {f}"] if f else []
    shares = f"{100 * f.top1:.2f} % with the same likeliest token, {100 * f.committed:.2f} % in the answers"
    return [f"of {f.prompts} prompts, {f.rows} positions: KL {f.kl_mean:.2g} nats, p99 {f.kl_p99:.2g}; {shares}"]


def few(done: Conversion) -> str:
    """Return one line with the experts that few tokens were routed to, by layer."""
    names: dict[str, list[str]] = {}
    for name, expert, tokens in done.few:
        names.setdefault(name.removesuffix(".weight"), []).append(f"{expert} ({tokens})")
    listed = "; ".join(f"{name}: {', '.join(experts)}" for name, experts in names.items())
    return f"filled up with their layer's mean, for they saw few tokens: {listed}"


def as_json(done: Conversion) -> dict[str, Any]:
    sizes = {tensor.want.gguf: tensor.bytes for tensor in done.plan.tensors}
    return {
        "type": done.plan.type,
        "files": [str(path) for path in done.paths],
        "bytes": done.plan.file_bytes,
        "seconds": done.seconds,
        "fidelity": done.fidelity if done.fidelity is None or isinstance(done.fidelity, str) else done.fidelity.told(),
        "tensors": [
            {
                "name": d.name,
                "source_format": d.source_format,
                "format": d.format,
                "bytes": sizes[d.name],
                "relative_rmse": d.relative_rmse,
                "max_error": d.max_error,
            }
            for d in done.deviations
        ],
    }
