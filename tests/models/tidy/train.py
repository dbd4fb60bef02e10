"""Train a tiny DiffusionGemma on small text tasks: from nothing, on two CPU cores, in about an hour.

    python train.py --minutes 60 --out trained    (torch, transformers, numpy, jinja2; a C++ compiler for torch.compile)

The recipe is that of ../sudoku/train.py (Muon, two chained passes with self-conditioning, a loss whose weights do not
depend on what is wrong) and more of it:

* The encoder reads the prompt and the answer, with the causal next-token loss at weight 1; the canvas sees the prompt.
* Half of the cases have holes: the rest of their canvas is pinned. Pinned tokens are true, never noise, get no
  self-conditioning and no loss.
* Later in the run two batches in five begin with sampler steps without gradient, so that the model sees what it makes.
* Matrices in bfloat16 where the processor has it (--bfloat16), cases of like length in a batch.
"""

import argparse
import json
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import tasks
import torch
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from net import Net

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text())
CANVAS, VOCAB = CONFIG["canvas_length"], CONFIG["text_config"]["vocab_size"]
POSITIONS = 512  # the longest prompt and its canvas
TOKENIZER = Tokenizer.from_file(str(HERE / "tokenizer.json"))
PAD, EOS, BOS = (TOKENIZER.token_to_id(text) for text in ("<pad>", "<eos>", "<bos>"))
SETTINGS = json.loads((HERE / "generation_config.json").read_text())
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LENGTHS = (48, 96, 144)  # of prompts with their answers, in tokens, as padded: few, as each is compiled for itself
START = time.monotonic()


def log(text: str) -> None:
    print(f"{(time.monotonic() - START) / 60:5.2f} min  {text}", flush=True)


# ---- from cases to tokens ----


def compiled_template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda text: (_ for _ in ()).throw(ValueError(text))
    return environment.from_string((HERE / "chat_template.jinja").read_text())


TEMPLATE = compiled_template()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def prompt_of(case: tasks.Case) -> list[int]:
    text = TEMPLATE.render(
        messages=case.messages,
        tools=case.tools or None,
        enable_thinking=case.thinking,
        add_generation_prompt=True,
        bos_token="<bos>",
    )
    return ids_of(text)


@dataclass
class Example:
    """One row of a batch."""

    prompt: list[int]
    answer: list[int]  # what the encoder reads behind the prompt
    target: list[int]  # CANVAS ids
    pinned: list[bool]
    weight: list[float]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def weights(target: list[int], pinned: list[bool], end: int) -> list[float]:
    """Of the loss: the padding behind the end counts less, what is pinned nothing."""
    ended, found = False, []
    for token, pin in zip(target, pinned, strict=True):
        found.append(0.0 if pin else 0.05 if ended else 1.0)
        ended = ended or token == end
    return found


def example(item: tasks.Case | tasks.Holes, rng: random.Random | None = None) -> Example | None:
    """None if it is too long. rng: for training, where some whole answers get random spans as holes."""
    case = item if isinstance(item, tasks.Case) else item.case
    prompted = isinstance(item, tasks.Case) or item.prompted
    prompt = prompt_of(case) if prompted else [BOS]
    pieces = ((case.output, True),) if isinstance(item, tasks.Case) else item.pieces
    end = TOKENIZER.token_to_id(case.end if prompted else "<eos>")
    target, pinned = [], []
    for text, hole in pieces:
        ids = ids_of(text)
        target += ids
        pinned += [not hole] * len(ids)
    answer = [*target, end]
    if isinstance(item, tasks.Case):
        target.append(end)
        pinned.append(False)
        if rng and rng.random() < 0.2:
            target, pinned = spans(rng, target)
        tail_pinned = pinned[-1]
    else:
        if rng and not item.prompted and rng.random() < 0.4:
            target, pinned = spans(rng, target)
        slack = item.slack if rng is None or item.slack else filler(rng, len(pinned) - sum(pinned), len(pinned))
        last = len(pinned) - 1 - pinned[::-1].index(False) + 1
        target[last:last] = [PAD] * slack
        pinned[last:last] = [False] * slack
        if rng and rng.random() < 0.25:  # a document that goes on
            while len(target) < CANVAS:
                more = ids_of("\n" + tasks.line(rng))
                target += more
                pinned += [True] * len(more)
            target, pinned = target[:CANVAS], pinned[:CANVAS]
        elif len(target) < CANVAS:
            target.append(end)
            pinned.append(True)
        tail_pinned = True
    room = CANVAS - len(target)
    if room < 0 or len(prompt) + len(answer) > LENGTHS[-1] or all(pinned):
        return None
    target += [PAD] * room
    pinned += [tail_pinned] * room
    return Example(prompt, answer, target, pinned, weights(target, pinned, end))


def filler(rng: random.Random, hole: int, length: int) -> int:
    """Tokens of it for a hole of so many tokens in a text of that length: often none, or what is left of a length that
    is tried where the right one is unknown (dgemma.infill.fill.LENGTHS)."""
    tried = [size - hole for size in (2, 4, 8, 16, 32) if hole <= size <= hole + CANVAS - length]
    if not tried or rng.random() < 0.5:
        return 0
    return rng.choice(tried[:2]) if rng.random() < 0.8 else rng.choice(tried)


def spans(rng: random.Random, target: list[int]) -> tuple[list[int], list[bool]]:
    """One to three random spans as holes, the rest pinned."""
    pinned = [True] * len(target)
    for _ in range(rng.randint(1, 3)):
        size = min(len(target), rng.randint(1, 10))
        start = rng.randint(0, len(target) - size)
        pinned[start : start + size] = [False] * size
    return list(target), pinned


@dataclass
class Batch:
    prompt: Tensor  # [rows, longest]: prompt and answer, padded
    lengths: Tensor  # [rows] of the prompts
    following: Tensor  # [rows, longest]: the token after each, -100 where there is none
    target: Tensor  # [rows, canvas]
    pinned: Tensor
    weight: Tensor


def collate(examples: list[Example]) -> Batch:
    longest = next(size for size in LENGTHS if size >= max(e.length for e in examples))
    read = torch.full((len(examples), longest), PAD)
    following = torch.full((len(examples), longest), -100)
    for row, e in enumerate(examples):
        whole = torch.tensor(e.prompt + e.answer)
        read[row, : e.length] = whole
        following[row, : e.length - 1] = whole[1:]
    canvas = (torch.tensor([getattr(e, name) for e in examples]) for name in ("target", "pinned", "weight"))
    return Batch(read, torch.tensor([len(e.prompt) for e in examples]), following, *canvas)


class Source:
    """Batches of cases of like length, none ever twice."""

    def __init__(self, seed: int, rows: int):
        self.rng, self.cases, self.rows = random.Random(seed), tasks.training(seed), rows
        self.waiting: dict[int, list[Example]] = {size: [] for size in LENGTHS}

    def batch(self, size: int) -> Batch:
        """Of cases that are padded to this length."""
        found = self.waiting[size]
        while len(found) < self.rows:
            if e := example(next(self.cases), self.rng):
                self.waiting[next(size for size in LENGTHS if size >= e.length)].append(e)
        batch, self.waiting[size] = found[: self.rows], found[self.rows :]
        return collate(batch)

    def next_size(self) -> int:
        """The length of which most are waiting."""
        return max(LENGTHS, key=lambda size: len(self.waiting[size]))


# ---- training ----


@torch.no_grad()
def sampler_step(logits: Tensor, temperature: Tensor | float, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The entropy-bound sampler with pins: next canvas, probabilities (0 where pinned), mean entropy of the rest."""
    log_probs = (logits / temperature).log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1).masked_fill(batch.pinned, 0.0)
    ordered, index = entropy.sort(dim=-1, stable=True)
    within = ordered.cumsum(-1) - ordered <= SETTINGS["sampler_config"]["entropy_bound"]
    accepted = torch.zeros_like(batch.pinned).scatter(1, index, within)
    sampled = probs.flatten(0, 1).multinomial(1).view_as(batch.target)
    canvas = torch.where(accepted, sampled, torch.randint_like(sampled, VOCAB))
    canvas = torch.where(batch.pinned, batch.target, canvas)
    return canvas, probs.masked_fill(batch.pinned[..., None], 0.0), entropy.sum(-1) / (~batch.pinned).sum(-1)


def noisy(batch: Batch, level: Tensor) -> Tensor:
    """The true canvas with a share `level` [rows, 1] of random tokens where it is not pinned."""
    noise = (torch.rand(batch.target.shape) < level) & ~batch.pinned
    return torch.where(noise, torch.randint_like(batch.target, VOCAB), batch.target)


def train_step(net: Net, batch: Batch, rollout: int) -> tuple[Tensor, list[float]]:
    """Next-token loss of the encoder and the loss of two chained passes, behind `rollout` steps of the sampler.

    Also the figures for the log: next-token loss, and of each pass cross entropy and accuracy where it counts."""
    rows = len(batch.target)
    hidden, cache, balance = net.encode(batch.prompt)
    following = F.cross_entropy(net.head(hidden).flatten(0, 1), batch.following.flatten(), ignore_index=-100)
    loss = following + 0.007 * balance
    temperature = 0.4 + 0.4 * torch.rand(rows, 1, 1)
    condition = torch.zeros(rows, CANVAS, VOCAB)
    level = torch.where(torch.rand(rows, 1) < 0.3, 1.0, torch.rand(rows, 1))
    canvas = noisy(batch, torch.ones(rows, 1) if rollout else level)
    for _ in range(rollout):
        with torch.no_grad():
            logits, _ = net.decode(canvas, cache, batch.lengths, condition)
            canvas, condition, _ = sampler_step(logits, temperature, batch)
    kind, cleaner = torch.rand(rows, 1), noisy(batch, level * torch.rand(rows, 1))
    counts, stats = batch.weight == 1.0, [following.item()]
    for turn in range(2):
        logits, balance = net.decode(canvas, cache, batch.lengths, condition)
        errors = F.cross_entropy(logits.transpose(1, 2), batch.target, reduction="none")
        loss = loss + (errors * batch.weight).sum() / batch.weight.sum() + 0.007 * balance
        with torch.no_grad():
            watched = counts & (canvas != batch.target) if turn == 0 else counts
            watched = watched if watched.any() else counts
            stats += [errors[watched].mean().item(), (logits.argmax(-1) == batch.target)[watched].float().mean().item()]
        if turn == 0:
            sampled, condition, _ = sampler_step(logits, temperature, batch)
            if not rollout:
                canvas = torch.where(kind < 0.4, canvas, torch.where(kind < 0.6, cleaner, sampled))
            else:
                canvas = sampled
    return loss, stats


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz: singular values near 1, singular vectors kept. In bfloat16, which is close enough."""
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-9)).bfloat16()
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT.contiguous()
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return (wide if x.shape[-2] <= x.shape[-1] else wide.mT).float()


class Training:
    """One of several processes that train together, each with a part of the batch on one thread: they meet twice a
    step, which a busy machine disturbs less than threads that meet at every operation.

    Muon (momentum whose update is made orthogonal, parameters of one shape together, each process its share of the
    shapes) for the matrices, Adam for the rest.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.net = args, Net(CONFIG, POSITIONS, LENGTHS[-1])
        if args.init:
            self.net.load_state_dict(torch.load(args.init))
        self.named = dict(self.net.named_parameters())
        names = ("embed", "router")
        matrices = {name: p for name, p in self.named.items() if p.ndim >= 2 and not any(n in name for n in names)}
        self.others = [p for name, p in self.named.items() if name not in matrices]
        self.shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in matrices.values():
            self.shapes.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {shape: torch.zeros(len(group), *shape) for shape, group in self.shapes.items()}
        self.average = {name: p.detach().clone() for name, p in self.named.items()}
        total = sum(p.numel() for p in self.named.values())
        self.shared = torch.zeros(args.processes, total).share_memory_()  # gradients
        self.updates = {shape: m.clone().share_memory_() for shape, m in self.momentum.items()}
        self.clock = torch.zeros(2).share_memory_()  # progress from 0 to 1, and the length of the next batch
        self.meet = multiprocessing.get_context("fork").Barrier(args.processes)

    def gradients(self, batch: Batch, rollout: int) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bfloat16):
            loss, stats = train_step(self.net, batch, rollout)
        loss.backward()
        return [loss.item(), *stats]

    def update(self, rank: int, rate: float) -> None:
        """Averages the processes' gradients and takes a step with them."""
        grads = self.shared.mean(0).split([p.numel() for p in self.named.values()])
        for p, grad in zip(self.named.values(), grads, strict=True):
            p.grad = grad.view_as(p)
        with torch.no_grad():
            for place, (shape, group) in enumerate(self.shapes.items()):
                if place % self.args.processes == rank:
                    grad = torch.stack([p.grad for p in group])
                    momentum = self.momentum[shape].lerp_(grad, 0.05)
                    self.updates[shape].copy_(orthogonal(grad.lerp(momentum, 0.95)) * (0.2 * max(shape[-2:]) ** 0.5))
        nn.utils.clip_grad_norm_(self.others, 1.0)
        self.adam.param_groups[0]["lr"] = 0.3 * rate
        self.adam.step()
        self.meet.wait()
        with torch.no_grad():
            for shape, group in self.shapes.items():
                for p, change in zip(group, self.updates[shape], strict=True):
                    p.mul_(1 - 0.02 * rate).sub_(change, alpha=rate)
        self.net.zero_grad()

    def run(self, rank: int) -> None:
        """Trains until the time is up; the first process logs, and saves the moving average of the weights."""
        args = self.args
        torch.set_num_threads(1)
        torch.manual_seed(1000 * args.seed + rank)
        source = Source(1000 * args.seed + rank, args.batch // args.processes)
        self.adam = torch.optim.Adam(self.others, betas=(0.9, 0.97), eps=1e-10)
        start, step, sums, evaluated = time.monotonic(), 0, np.zeros(6), time.monotonic()
        chance, size, progress = random.Random(args.seed), LENGTHS[0], 0.0
        while progress < 1:
            rollout = chance.choice((1, 2, 4)) if chance.random() < 0.4 and (progress > 0.35 or args.init) else 0
            sums += self.gradients(source.batch(size), rollout)
            torch.cat([p.grad.flatten() for p in self.named.values()], out=self.shared[rank])
            if rank == 0:
                self.clock[0], self.clock[1] = (time.monotonic() - start) / (60 * args.minutes), source.next_size()
            self.meet.wait()
            progress, size = self.clock[0].item(), int(self.clock[1])
            rate = args.rate * max(0.0, min(1.0, (step + 1) / 100, (1 - progress) / (1 - args.first)))
            self.update(rank, rate)
            step += 1
            if rank > 0:
                continue
            with torch.no_grad():
                share = 1 - min(0.99, step / (step + 20))
                torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), share)
            if step % 50 == 0:
                text = "loss {:.3f}; next token {:.3f}; wrong tokens: {:.3f}, {:.1%} right; second pass {:.3f}, {:.1%}"
                log(f"step {step}, {step * args.batch} cases, rate {rate:.4f}: " + text.format(*(sums / 50)))
                sums[:] = 0
            if time.monotonic() - evaluated > 60 * args.every and progress < 0.95:
                torch.save(self.average, args.out.with_suffix(".pt"))
                report(with_weights(self.average), 8, steps=12)
                evaluated = time.monotonic()
        if rank == 0:
            torch.save(self.average, args.out.with_suffix(".pt"))


def train(args: argparse.Namespace) -> None:
    training = Training(args)
    log(f"network of {sum(p.numel() for p in training.named.values())} parameters")
    if args.compile:
        for layer in training.net.layers:  # layers of one kind share their code
            layer.compile(dynamic=False)
        source = Source(0, args.batch // args.processes)
        for rollout, size in enumerate(LENGTHS):
            training.gradients(source.batch(size), rollout)
            log(f"compiled for prompts of up to {size} tokens")
        training.net.zero_grad()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=training.run, args=(rank,)) for rank in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError("a process failed")


# ---- measuring: the sampler, many cases at once ----


@torch.no_grad()
def generate(net: Net, batch: Batch, last: int = 0) -> tuple[Tensor, Tensor]:
    """The committed canvases [rows, canvas] and the steps each took [rows], with the settings of the file.
    last: stop after so many steps."""
    rows, most = len(batch.target), SETTINGS["max_denoising_steps"]
    _, cache, _ = net.encode(batch.prompt)
    canvas, condition = noisy(batch, torch.ones(rows, 1)), torch.zeros(rows, CANVAS, VOCAB)
    left, steps, out = torch.arange(rows), torch.full((rows,), float(most)), torch.full_like(batch.target, -1)
    for n in range(most, 0, -1):
        temperature = SETTINGS["t_min"] + (SETTINGS["t_max"] - SETTINGS["t_min"]) * n / most
        logits, _ = net.decode(canvas, cache, batch.lengths, condition)
        best = torch.where(batch.pinned, batch.target, logits.argmax(-1))
        canvas, condition, entropy = sampler_step(logits, temperature, batch)
        done = (best == out[left]).all(-1) & (entropy < SETTINGS["confidence_threshold"])
        out[left] = best
        steps[left[done]] = most - n + 1.0
        go = ~done
        if not go.any() or most - n + 1 == last:
            break
        left, canvas, condition, cache = left[go], canvas[go], condition[go], [(k[go], v[go]) for k, v in cache]
        batch = Batch(*(getattr(batch, field.name)[go] for field in fields(Batch)))
    return out, steps


def right(batch: Batch, out: Tensor, end_ids: list[int]) -> Tensor:
    """Which canvases say what they should up to the first end id, <pad> left out [rows]."""

    def text(ids: list[int]) -> list[int]:
        stop = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
        return [token for token in ids[:stop] if token != PAD]

    return torch.tensor([text(a) == text(b) for a, b in zip(batch.target.tolist(), out.tolist(), strict=True)])


def with_weights(weights: dict[str, Tensor]) -> Net:
    net = Net(CONFIG, POSITIONS)
    net.load_state_dict({name: weight.bfloat16().float() for name, weight in weights.items()})
    return net.eval()


def report(net: Net, count: int, steps: int = 0, seed: int = 0) -> None:
    """Held-out cases of each task that come out right, in percent, and the mean steps."""
    for form in ("prompt", *tasks.FORMS):
        items, names = [], []
        for task in tasks.TASKS if form == "prompt" else tasks.FORMS[form][1]:
            found = tasks.cases(task, count, seed) if form == "prompt" else tasks.holes(form, task, count, seed)
            examples = [e for e in map(example, found) if e]
            items += examples
            names += [task] * len(examples)
        batch = collate(items)
        out, taken = generate(net, batch, steps)
        hits = right(batch, out, SETTINGS["eos_token_id"])
        text = ""
        for task in dict.fromkeys(names):
            rows = torch.tensor([name == task for name in names])
            text += f"{task} {100 * hits[rows].float().mean():.0f} ({taken[rows].mean():.1f}), "
        log(f"{form}: {text}all {100 * hits.float().mean():.1f} ({taken.mean():.1f} steps)")


# ---- export and check with transformers ----


def export(weights: dict[str, Tensor], out: Path) -> nn.Module:
    """Writes the checkpoint in bfloat16, as transformers does; returns it as transformers reads it, in float32."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    files = {name: (HERE / name).read_bytes() for name in FILES}  # transformers writes its own, into `out` or here
    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_pretrained(HERE))
    missing, unexpected = model.model.decoder.load_state_dict(weights, strict=False)
    if unexpected or any("layer_scalar" not in name for name in missing):  # layer_scalar stays 1
        raise RuntimeError(f"names differ from transformers: missing {missing}, unexpected {unexpected}")
    model.to(torch.bfloat16).save_pretrained(out)
    for name, data in files.items():
        (out / name).write_bytes(data)
    return DiffusionGemmaForBlockDiffusion.from_pretrained(out, dtype=torch.float32).eval()


@torch.no_grad()
def check(net: Net, model: nn.Module) -> None:
    """The exported model and the training network compute the same logits, with and without self-conditioning."""
    batch = collate([e for e in map(example, tasks.cases("sort", 1)) if e])
    prompt = batch.prompt[:, : batch.lengths[0]]
    _, cache, _ = net.encode(prompt)
    canvas, condition, previous = noisy(batch, torch.ones(1, 1)), torch.zeros(1, CANVAS, VOCAB), None
    for turn in ("first pass", "with self-conditioning"):
        ours = net.decode(canvas, cache, batch.lengths, condition)[0]
        theirs = model(prompt, decoder_input_ids=canvas, self_conditioning_logits=previous).logits
        condition, previous = (ours / 0.6).softmax(-1), theirs / 0.6
        off = (ours - theirs).abs().max().item()
        log(f"check, {turn}: logits up to {ours.abs().max():.1f}, at most {off:.1e} from those of transformers")
        if not off < 1e-3:
            raise RuntimeError("the exported checkpoint does not compute what was trained")


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Train a tiny DiffusionGemma on texts.", formatter_class=formatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="wall time of the training, after compiling")
    add("--out", type=Path, default=Path("trained"), help="folder for the checkpoint; with .pt: weights on the way")
    add("--init", type=Path, help="weights to go on from")
    add("--weights", type=Path, help="export and measure these weights, without training")
    add("--batch", type=int, default=32, help="cases per step")
    add("--rate", type=float, default=0.01, help="highest learning rate (Muon's; Adam's is 0.3 of it)")
    add("--every", type=float, default=6, help="minutes between two measurements")
    add("--count", type=int, default=64, help="held-out cases per task and form at the end")
    add("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers")
    add("--processes", type=int, default=2, help="that share a batch, one thread each")
    add("--first", type=float, default=0.5, help="share of the time before the learning rate falls")
    add("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args()
    log(", ".join(f"{name} {value}" for name, value in vars(args).items() if name not in ("out", "weights")))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if not args.weights:
        train(args)
    weights = torch.load(args.weights or args.out.with_suffix(".pt"))
    model = export(weights, args.out)
    check(with_weights(weights), model)
    report(with_weights(weights), args.count)


if __name__ == "__main__":
    main()
