"""Plans where the parts of a model are kept on this or another machine, and predicts the time of a step.

>>> from dgemma.model import Model
>>> with Model() as model:
...     print(plan(model, machines()["rtx4060-laptop"]).tokens_per_second > 1)
True
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import Any

from dgemma._native import ffi, lib
from dgemma.bench.device import rates_of
from dgemma.bench.flops import condition_mlp, step_operations
from dgemma.bench.machine import measure_disk, measure_machine, processor
from dgemma.bench.profile import Profile, steps_of
from dgemma.errors import Error, MemoryBudgetError, UsageError, check, new_error
from dgemma.files.regular import opener
from dgemma.model import Model

STEPS = 16  # steps of a canvas, for tokens per second
CONTEXT = 1024  # tokens whose keys and values are held, by default
DISK = 3e9  # bytes per second of an NVMe disk, used where the disk cannot be measured
SMALL = 1 << 20  # bytes of a budget that no model can keep
LARGEST = 1e12  # the largest number that is accepted in a machine's file
SHARP = 0.05  # a temperature at which random logits leave as few likely tokens as those of a trained model
PROMPT = 64  # tokens of the prompt when speed is measured
RUNS = 5  # steps that are timed when speed is measured


@dataclass(frozen=True, slots=True)
class Rate:
    """One number that describes a machine."""

    field: str
    unit: str
    scale: float  # the value of one unit in bytes, bytes per second or operations per second
    optional: bool
    help: str


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that a plan is made for."""

    name: str
    about: str
    source: str  # where the numbers come from
    rates: dict[str, float]  # by field of rates(), in bytes, bytes per second and operations per second
    layers: float = 1.0  # time of an operation in the layers but outside of experts, over one inside experts
    top: float = 1.0  # time of an operation in the output head or self-conditioning, over one inside experts


@dataclass(frozen=True, slots=True)
class Queue:
    """Work of a step that runs at the same time as other queues."""

    name: str
    covers: str  # what is done in the queue
    amount: float  # bytes or operations
    seconds: float


@dataclass(frozen=True, slots=True)
class Way:
    """One way to handle expert blocks: where they are kept, and what computes them."""

    lives: str  # the memory that they are kept in
    computed: str  # the processor that computes them
    how: str  # how they get there
    blocks: tuple[int, ...]  # the number of blocks of each layer
    bytes: int  # bytes of all these blocks


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan: the memory for each part of a model on a machine, and the predicted time of a step."""

    machine: Machine
    gpu: bool  # whether the GPU computes everything but experts
    context: int  # tokens whose keys and values are held
    ways: list[Way]
    ram: dict[str, int]  # bytes of main memory, by their use
    vram: dict[str, int]  # bytes of GPU memory, by their use
    ram_budget: int  # bytes
    vram_budget: int  # bytes
    gpu_least: int  # the least bytes of GPU memory with which the GPU can be used
    queues: list[Queue]
    serial: float  # seconds of work that runs before the experts of a layer, not at the same time as them
    seconds: float  # predicted seconds of a step
    tokens: int  # tokens of a canvas

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second for canvases of STEPS steps, without the time of encoding."""
        return self.tokens / (STEPS * self.seconds)

    @property
    def bound(self) -> list[str]:
        """The names of the queues that limit the speed: those that take at least 90 % of the slowest one's time.

        The GPU's serial work is added to the CPU's queue, because the CPU waits for it.
        """
        times = {
            q.name: q.seconds + (self.serial if self.gpu and q.name == "CPU" and q.amount else 0) for q in self.queues
        }
        return [name for name, seconds in times.items() if seconds >= 0.9 * max(times.values())]


# ---- Machines ----


@cache
def rates() -> dict[str, Rate]:
    """Return the library's list of the numbers that describe a machine."""
    table: dict[str, Rate] = {}
    while entry := lib.dg_rate_at(len(table)):
        field, unit, text = (ffi.string(item).decode() for item in (entry.field, entry.unit, entry.help))
        table[field] = Rate(field, unit, entry.scale, entry.optional, text)
    return table


@cache
def machines() -> dict[str, Machine]:
    """Return the library's list of known machines."""
    table: dict[str, Machine] = {}
    while entry := lib.dg_machine_at(len(table)):
        name, about, source = (ffi.string(item).decode() for item in (entry.name, entry.about, entry.source))
        table[name] = Machine(name, about, source, {field: getattr(entry, field) for field in rates()})
    return table


def find_machine(text: str) -> Machine:
    """Return a known machine by its name, or a machine that a JSON file describes.

    The file has the fields of rates(), in their units.
    """
    if text in machines():
        return machines()[text]
    try:
        with open(text, encoding="utf-8", opener=opener) as file:
            told = json.load(file)
    except FileNotFoundError:
        raise UsageError(f"{text}: neither a file nor one of the machines {', '.join(machines())}") from None
    except ValueError as problem:
        raise Error(f"{text}: no JSON: {problem}") from None
    return described(told, text)


def described(told: Any, path: str) -> Machine:
    """Return the machine that a file's JSON describes. Raises Error for wrong or missing fields."""
    if not isinstance(told, dict):
        raise Error(f"{path}: expected an object with the fields {', '.join(rates())}")
    texts = ("name", "about", "source")
    for field, value in told.items():
        if field not in rates() and field not in texts:
            raise Error(f"{path}: there is no field {field!r}; the fields are {', '.join((*texts, *rates()))}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
        if field in rates() and not number:
            raise Error(f"{path}: {field}: expected a number of {rates()[field].unit}, not {value!r}")
    for rate in rates().values():
        if not rate.optional and rate.field not in told:
            raise Error(f"{path}: {rate.field} is missing: {rate.help}, in {rate.unit}")
    name, about, source = (
        str(told.get(field, default)) for field, default in zip(texts, (path, "", path), strict=True)
    )
    return Machine(name, about, source, {r.field: told.get(r.field, 0) * r.scale for r in rates().values()})


def this_machine(path: str | os.PathLike[str], has_weights: bool = True, **options: Any) -> Machine:
    """Measure this machine for some seconds.

    Measured are memory, the disk that the model lies on, and how fast the model's first layer and its head are
    computed. options: Model's. The machine has no GPU: see with_device. has_weights: otherwise the file is a header,
    the disk is assumed, and what is computed are random weights of its shapes and types.
    """
    memory = measure_machine(0).best("memory")
    if not memory:
        raise Error("the memory of this machine cannot be measured: describe it with --machine FILE")
    ram = free_memory()
    if ram is None:
        raise Error("this system does not tell how much memory is free: describe it with --machine FILE")
    disk = measure_disk(path) if has_weights else None
    if has_weights:
        try:  # as under a budget of all that is free, where weights are in memory of the process's own
            speed = measure_speed(path, budget=max(ram - int(lib.dg_plan_margin(ram, False)), SMALL), **options)
        except MemoryBudgetError:  # so little is free that no budget can be kept
            speed = measure_speed(path, **options)
        source = (
            f"measured on the first layer{'' if disk else '; the disk is assumed, the file being too small to tell'}"
        )
    else:
        from dgemma.bench.sample import sample

        with sample(path) as measured:
            speed = measure_speed(measured, **options)
        source = "measured on a layer of random weights; the disk is assumed until the file is there"
    given = {"ram": ram, "disk": disk or DISK, "host": memory, "cpu_ops": speed["experts"]}
    return Machine(
        "this machine",
        processor(),
        source,
        {field: float(given.get(field, 0)) for field in rates()},
        layers=speed["experts"] / speed["layers"],
        top=speed["experts"] / speed["top"],
    )


def with_device(path: str | os.PathLike[str], vram: int, **options: Any) -> Machine:
    """Measure this machine and its GPU. vram: the bytes of GPU memory that a model may use.

    `layers` and `top` of the machine are those of the GPU, because it computes these parts.
    """
    machine = this_machine(path, **{**options, "backend": "auto"})
    speed = measure_speed(path, **options)
    with Model(path, layers=1, **options) as model:
        rates = rates_of(model)
    if rates is None:
        raise UsageError(f"{options.get('backend')} is no GPU")
    device = {"vram": float(vram), "pcie": rates["copies"], "gpu": rates["memory"], "gpu_ops": speed["experts"]}
    return replace(
        machine,
        rates={**machine.rates, **device},
        layers=speed["experts"] / speed["layers"],
        top=speed["experts"] / speed["top"],
    )


def measure_speed(path: str | os.PathLike[str], budget: int | str | None = None, **options: Any) -> dict[str, float]:
    """Measure operations per second of "experts", of the other parts of "layers", and of head and condition ("top").

    Operations are counted by dgemma.bench.flops; the time is the median of some steps through the model's first layer
    alone. budget: the argument `ram` of Model.
    """
    with Model(path, layers=1, **{**options, "ram": budget}) as model, Profile(model) as profile:
        work = {**step_operations(model.config, PROMPT), "condition": condition_mlp(model.config)}
        context = PROMPT + model.config.canvas_length
        with model.session(min(context, model.config.context_length)) as session:
            session.encode([5] * min(PROMPT, session.context))
            laps = [lap for _, lap in steps_of(session, profile, SHARP, RUNS + 2)][2:]
    taken = {part: median(lap[part] for lap in laps) for part in laps[0]}
    top = ("head", "condition")
    groups = {"experts": ("experts",), "top": top, "layers": tuple(p for p in taken if p not in ("experts", *top))}
    return {
        name: sum(work.get(part, 0) for part in parts) / max(sum(taken[part] for part in parts), 1e-9)
        for name, parts in groups.items()
    }


def free_memory() -> int | None:
    """Return the bytes of memory that are free for programs; None where the system does not tell."""
    return int(lib.dg_memory_free()) or None


# ---- Plans ----


def plan(
    model: Model,
    machine: Machine,
    ram: int | None = None,
    vram: int | None = None,
    context: int | None = None,
    scale: float = 1.0,
) -> Plan:
    """Return the fastest plan. ram, vram: budgets in bytes; None: the machine's memory, less a margin for other uses.

    context: tokens whose keys and values are kept. scale: the bytes of the weights over this file's, for one of
    another type. Raises MemoryBudgetError for a budget that cannot be kept.
    """
    config = model.config
    context = min(CONTEXT, config.context_length) if context is None else context
    error, demand, out = new_error(), _demand(model, machine, context), ffi.new("dg_plan *")
    _resize(demand, scale)
    name = ffi.new("char[]", machine.name.encode(errors="replace"))
    native = ffi.new("dg_machine *", {"name": name, **machine.rates})
    budgets = [-1 if size is None else min(size, 1 << 62) for size in (ram, vram)]
    try:
        check(lib.dg_plan_make(demand, native, *budgets, out, error), error)
    except MemoryBudgetError as refusal:
        raise MemoryBudgetError(f"{model.path}: {refusal}") from None
    return _read(out, demand, machine, config.canvas_length)


def placed(model: Model, machine: Machine, context: int) -> Plan:
    """Return the current placement of a model that runs under a budget, as a plan with its predicted time."""
    demand, out = _demand(model, machine, context), ffi.new("dg_plan *")
    if not lib.dg_model_placed(model._open_handle().pointer, out):
        raise UsageError(f"{model.path} was not opened with a budget")
    native = ffi.new("dg_machine *", machine.rates)
    lib.dg_plan_measure(demand, native, out)
    return _read(out, demand, machine, model.config.canvas_length)


def _demand(model: Model, machine: Machine, context: int) -> Any:
    """Return a `dg_demand *` of the model. Operations at which the machine is slower than at experts count more."""
    config, error, demand = model.config, new_error(), ffi.new("dg_demand *")
    device = machine.rates["vram"] > 0
    check(lib.dg_model_demand(model._open_handle().pointer, context, device, demand, error), error)
    work = {**step_operations(config, context), "condition": condition_mlp(config)}
    demand.block_ops = work.pop("experts") / (config.n_layer * config.n_expert)
    demand.top_ops = machine.top * (work.pop("head") + work.pop("condition"))
    demand.layer_ops = machine.layers * sum(work.values())
    return demand


def _resize(demand: Any, scale: float) -> None:
    """Give a demand the weights of a type that takes `scale` times as many bytes."""
    for layer in range(demand.n_layer):
        demand.block_bytes[layer] = round(demand.block_bytes[layer] * scale)
    demand.layer_bytes, demand.top_bytes = (round(size * scale) for size in (demand.layer_bytes, demand.top_bytes))


def _read(out: Any, demand: Any, machine: Machine, tokens: int) -> Plan:
    layers = range(demand.n_layer)
    ways, queues = [], []
    for i in range(lib.DG_WAYS):
        entry, blocks = lib.dg_way_at(i), tuple(out.blocks[i][0 : demand.n_layer])
        size = sum(blocks[layer] * demand.block_bytes[layer] for layer in layers)
        lives, computed, how = (ffi.string(text).decode() for text in (entry.lives, entry.computed, entry.how))
        ways.append(Way(lives, computed, how, blocks, size))
    for i in range(lib.DG_QUEUES):
        queue = lib.dg_queue_at(i)
        name, covers = (ffi.string(text).decode() for text in (queue.name, queue.covers))
        queues.append(Queue(name, covers, out.amount[i], out.busy[i]))
    weights = demand.layer_bytes + demand.top_bytes
    large = {"other weights": weights, "keys and values": demand.cache_bytes}
    work = {"work room": demand.work_bytes, "a canvas": 0 if out.gpu else demand.canvas_bytes}
    sides: list[dict[str, int]] = []
    for side, has in (("ram", not out.gpu), ("vram", out.gpu)):
        told = {"experts": getattr(out, f"{side}_experts"), **(large if has else {})}
        told |= work if side == "ram" or out.gpu else {}
        told |= {"stream buffers": getattr(out, f"{side}_ring"), "programs": getattr(out, f"{side}_process")}
        sides.append({what: int(size) for what, size in told.items() if size})
        assert sum(sides[-1].values()) == getattr(out, f"{side}_used")
    return Plan(
        machine=machine,
        gpu=bool(out.gpu),
        context=int(demand.context),
        ways=ways,
        ram=sides[0],
        vram=sides[1],
        ram_budget=int(out.ram),
        vram_budget=int(out.vram),
        gpu_least=int(out.gpu_least),
        queues=queues,
        serial=out.serial,
        seconds=out.seconds,
        tokens=tokens,
    )


def told(plan: Plan) -> dict[str, Any]:
    """Return a plan for JSON: bytes, seconds and operations."""
    budgets = {"ram": plan.ram_budget, "vram": plan.vram_budget}
    return {
        "machine": {
            "name": plan.machine.name,
            "about": plan.machine.about,
            "source": plan.machine.source,
            **plan.machine.rates,
        },
        "context": plan.context,
        "budgets": budgets,
        "used": {
            side: {"total": sum(sizes.values()), **sizes} for side, sizes in (("ram", plan.ram), ("vram", plan.vram))
        },
        "gpu": plan.gpu,
        "gpu_least": plan.gpu_least,
        "experts": [
            {"lives": way.lives, "computed": way.computed, "blocks": list(way.blocks), "bytes": way.bytes}
            for way in plan.ways
        ],
        "queues": [{"name": q.name, "amount": q.amount, "seconds": q.seconds} for q in plan.queues],
        "predicted": {
            "seconds": plan.seconds,
            "serial": plan.serial,
            "steps": STEPS,
            "tokens_per_second": plan.tokens_per_second,
            "bound": plan.bound,
        },
    }
