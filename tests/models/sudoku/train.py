"""Train a tiny DiffusionGemma to solve 9x9 Sudoku by block diffusion: from nothing, on two CPU cores, in minutes.

    python train.py --minutes 15 --out trained    (torch, transformers, numpy; a C++ compiler for torch.compile)

config.json beside this file is the architecture, tokenizer.json the characters. The prompt is <bos> and the puzzle, the
canvas the solved grid, <eos> and padding. What mattered:

* The second rotary frequency of both layer kinds turns once per text row of 10 tokens: the bases in config.json are
  (10 / 2 pi)^16 for head size 32 and (10 / 2 pi)^32 for 64. Columns, and the copy from prompt to canvas, become phases.
* q_norm and k_norm start at head_dim^-1/4, because attention is not scaled by 1 / sqrt(head_dim).
* A token's weight in the loss depends on the prompt alone. Weighting wrong canvas tokens up makes the model hedge.
* Two chained passes per puzzle: the second sees the first one's probabilities and often the canvas the sampler makes of
  them. Later in the run half of the batch are chains, which keep the sampler's state from one step to the next.
* Muon for the matrices, Adam for the rest; the learning rate falls to zero at the end of the time given.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from net import Net

HERE = Path(__file__).parent
CONFIG = json.loads((HERE / "config.json").read_text())
IDS = json.loads((HERE / "tokenizer.json").read_text())["model"]["vocab"]
CANVAS, VOCAB = CONFIG["canvas_length"], CONFIG["text_config"]["vocab_size"]
EXPORT_SECONDS = 60  # kept back from the training time for the export and the evaluation
START = time.monotonic()


def log(text: str) -> None:
    print(f"{(time.monotonic() - START) / 60:5.2f} min  {text}", flush=True)


# ---- puzzles: many grids at once; a cell's candidates are the bits of a mask, arrays are [81, grids] ----

ALL_DIGITS = 0x1FF
BITS = np.array([bin(mask).count("1") for mask in range(512)], np.uint8)
CELL = np.arange(81)
# the row, column and box of a cell [3, 81], and the cells of a row, column or box [27, 9]
CELL_UNITS = np.stack([CELL // 9, 9 + CELL % 9, 18 + CELL // 27 * 3 + CELL % 9 // 3])
UNIT_CELLS = np.stack([np.nonzero((unit == CELL_UNITS).any(0))[0] for unit in range(27)])


def deduce(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One round of naked and hidden singles: the new masks [81, n], and which grids have no solution [n]."""
    units = masks[UNIT_CELLS]  # [27, 9, n]
    taken = np.bitwise_or.reduce(np.where(units & (units - 1), 0, units), 1)
    once, twice = np.zeros_like(taken), np.zeros_like(taken)
    for cell in range(9):
        twice |= once & units[:, cell]
        once |= units[:, cell]
    alone = once & ~twice
    hidden = masks & (alone[CELL_UNITS[0]] | alone[CELL_UNITS[1]] | alone[CELL_UNITS[2]])
    free = ~(taken[CELL_UNITS[0]] | taken[CELL_UNITS[1]] | taken[CELL_UNITS[2]])
    new = np.where(BITS[masks] == 1, masks, np.where(hidden, hidden, masks) & free)
    return new, (once != ALL_DIGITS).any(0) | (new == 0).any(0)


def solvable(masks: np.ndarray) -> np.ndarray:
    """Which grids [81, n] have a solution: breadth first, all grids and all branches side by side."""
    owner = np.arange(masks.shape[1])
    found = np.zeros(len(owner), bool)
    while len(owner):
        new, dead = deduce(masks)
        found[owner[(BITS[new] == 1).all(0) & (new == masks).all(0) & ~dead]] = True
        live = ~dead & ~found[owner]
        stuck = live & (new == masks).all(0)
        live &= ~stuck
        parts, owners = [new[:, live]], [owner[live]]
        branches, owner = new[:, stuck], owner[stuck]
        cell = fewest_candidates(branches)
        for bit in range(9):
            has = branches[cell, np.arange(len(cell))] >> bit & 1 == 1
            parts.append(branches[:, has])
            parts[-1][cell[has], np.arange(has.sum())] = 1 << bit
            owners.append(owner[has])
        masks, owner = np.concatenate(parts, 1), np.concatenate(owners)
    return found


def fewest_candidates(masks: np.ndarray) -> np.ndarray:
    counts = BITS[masks]
    return np.where(counts > 1, counts, 10).argmin(0)


def random_grids(rng: np.random.Generator, count: int) -> np.ndarray:
    """Solved grids [81, count] as masks: deduce, guess a random digit when stuck, start over when it leads nowhere."""
    masks = np.full((81, count), ALL_DIGITS, np.uint16)
    done, total = [], 0
    while total < count:
        new, dead = deduce(masks)
        same = (new == masks).all(0) & ~dead
        solved = same & (BITS[new] == 1).all(0)
        done.append(new[:, solved])
        total += solved.sum()
        stuck = np.nonzero(same & ~solved)[0]
        cell = fewest_candidates(new[:, stuck])
        chance = rng.random((9, len(stuck))) * (new[cell, stuck] >> np.arange(9)[:, None] & 1)
        new[cell, stuck] = 1 << chance.argmax(0)
        new[:, dead | solved] = ALL_DIGITS
        masks = new
    return np.concatenate(done, 1)[:, :count]


def make_puzzles(seed: int, count: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Solutions [count, 81] with digits 1..9, and up to `most` cells of each that may be blank together [count, 81].

    The solution stays unique. Blanking fewer of those cells only adds clues, so each subset of them is a puzzle too.
    """
    rng = np.random.default_rng(seed)
    grids = random_grids(rng, count)
    blank = np.zeros(grids.shape, bool)
    grid = np.arange(count)
    for cell in rng.permuted(np.repeat(CELL[:, None], count, 1), axis=0):  # a random order for each grid
        todo = grid[blank.sum(0) < most]
        masks = np.where(blank, ALL_DIGITS, grids)[:, todo].astype(np.uint16)
        masks[cell[todo], np.arange(len(todo))] ^= ALL_DIGITS
        blank[cell[todo], todo] = ~solvable(masks)  # no solution with another digit there
    return (np.log2(grids).astype(np.int64) + 1).T, blank.T


def shuffle(rng: np.random.Generator, solution: np.ndarray, blank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same puzzle after a random symmetry: digits, rows, bands, columns and stacks permuted, perhaps transposed."""
    rows, columns = (np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)]) for _ in range(2))
    source = rows[:, None] * 9 + columns
    source = (source.T if rng.random() < 0.5 else source).ravel()
    return rng.permutation(9)[solution[source] - 1] + 1, blank[source]


# ---- text: nine rows of nine characters, each followed by a newline ----

CELL_AT = CELL // 9 * 10 + CELL % 9  # offset of a cell in the text
DIGIT_IDS = np.array([IDS["."], *(IDS[str(digit)] for digit in range(1, 10))])
PROMPT = 91  # <bos> and the text
LENGTHS = torch.tensor([PROMPT])  # of all prompts of a batch


def tokens(cells: np.ndarray) -> np.ndarray:
    """Ids [90] of a grid's text; 0 is a blank."""
    ids = np.full(90, IDS["\n"])
    ids[CELL_AT] = DIGIT_IDS[cells]
    return ids


class Batch:
    """Puzzles and the state of their denoising, one row each. The last `chains` rows keep it from step to step."""

    def __init__(self, size: int, seed: int, puzzles: tuple[np.ndarray, np.ndarray], blanks: tuple[int, int]):
        self.rng, self.puzzles, self.blanks, self.chains = np.random.default_rng(seed), puzzles, blanks, 0
        self.prompt = torch.zeros(size, PROMPT, dtype=torch.long)
        self.target, self.canvas, self.cleaner = torch.zeros(3, size, CANVAS, dtype=torch.long)
        self.blank = torch.zeros(size, CANVAS, dtype=torch.bool)
        self.condition = torch.zeros(size, CANVAS, VOCAB)  # probabilities of the step before, or zeros
        self.second = torch.zeros(size, 1, dtype=torch.long)  # second pass on: 0 same canvas, 1 cleaner, 2 sampler's
        self.passes_left = torch.zeros(size)

    def fill(self, row: int, chain: bool) -> None:
        """A new puzzle in this row: a chain starts from noise, other canvases have a random share of wrong tokens."""
        pick = self.rng.integers(len(self.puzzles[0]))
        solution, blank = shuffle(self.rng, self.puzzles[0][pick], self.puzzles[1][pick])
        cells = np.nonzero(blank)[0]
        blank = self.rng.permutation(cells)[: self.rng.integers(self.blanks[0], self.blanks[1] + 1)]
        shown = solution.copy()
        shown[blank] = 0
        self.prompt[row] = torch.tensor([IDS["<bos>"], *tokens(shown)])
        self.target[row] = torch.tensor([*tokens(solution), IDS["<eos>"], *[IDS["<pad>"]] * (CANVAS - 91)])
        self.blank[row] = False
        self.blank[row, CELL_AT[blank]] = True
        noise = 1.0 if chain or self.rng.random() < 0.3 else self.rng.random()
        level, words = torch.rand(CANVAS), torch.randint(VOCAB, (2, CANVAS))
        self.canvas[row] = torch.where(level < noise, words[0], self.target[row])
        self.cleaner[row] = torch.where(level < noise * self.rng.random(), words[1], self.target[row])
        self.condition[row] = 0
        self.second[row] = 2 if chain else int(self.rng.choice(3, p=[0.4, 0.3, 0.3]))
        self.passes_left[row] = 2 * int(self.rng.integers(2, 8))

    def prepare(self, chains: int) -> None:
        """Before a step: new puzzles in all rows but the chains that are not done."""
        self.chains = chains
        for row in range(len(self.prompt)):
            chain = row >= len(self.prompt) - chains
            if not chain or self.second[row] != 2 or self.passes_left[row] <= 0:
                self.fill(row, chain)


# ---- training ----


@torch.no_grad()
def sampler_step(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entropy-bound sampler: next canvas, probabilities, mean entropy."""
    log_probs = (logits / temperature).log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    ordered, index = entropy.sort(-1)
    accepted = torch.zeros_like(entropy, dtype=torch.bool).scatter(1, index, ordered.cumsum(-1) - ordered <= 0.1)
    sampled = probs.flatten(0, 1).multinomial(1).view_as(accepted)
    return torch.where(accepted, sampled, torch.randint_like(sampled, VOCAB)), probs, entropy.mean(-1)


def train_step(net: Net, batch: Batch) -> tuple[Tensor, list[float]]:
    """Loss of two chained passes; of each, cross entropy and accuracy on blank, wrong cells outside the chains."""
    cache = net.keys_values(batch.prompt)
    temperature = 0.5 + 0.35 * torch.rand(len(batch.prompt), 1, 1)
    weight = torch.where(batch.blank, 1.0, 0.15)
    canvas, condition = batch.canvas, batch.condition
    loss, stats, previous = 0.0, [], None
    for turn in range(2):
        logits, balance = net.decode(canvas, cache, LENGTHS, condition)
        errors = F.cross_entropy(logits.transpose(1, 2), batch.target, reduction="none")
        loss = loss + (errors * weight).sum() / weight.sum() + 0.007 * balance
        best = logits.argmax(-1)
        watched = batch.blank & (canvas != batch.target)
        watched[len(watched) - batch.chains :] = False
        stats += [errors[watched].mean().item(), (best == batch.target)[watched].float().mean().item()]
        sampled, condition, entropy = sampler_step(logits, temperature)
        if turn == 0:
            canvas = torch.where(batch.second == 2, sampled, torch.where(batch.second == 1, batch.cleaner, canvas))
            previous = best
    finished = (best == previous).all(-1) & (entropy < 0.005)
    batch.canvas, batch.condition = sampled, condition
    batch.passes_left = torch.where(finished, 0, batch.passes_left - 2)
    return loss, stats


class Muon:
    """Momentum whose update is made orthogonal. Parameters of one shape are done together."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momentum = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            grad = torch.stack([parameter.grad for parameter in group])
            momentum = self.momentum[shape].lerp_(grad, 0.05)
            update = orthogonal(grad.lerp(momentum, 0.95)) * (0.2 * max(shape[-2:]) ** 0.5)
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - 0.02 * rate).sub_(change, alpha=rate)


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz: singular values near 1, singular vectors kept."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-9)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


def train(net: Net, batch: Batch, seconds: float, rate: float) -> dict[str, Tensor]:
    """Trains for so long; returns the moving average of the weights."""
    named = dict(net.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim >= 2 and "embed" not in name and "router" not in name]
    others = [p for p in named.values() if all(p is not matrix for matrix in matrices)]
    muon, adam = Muon(matrices), torch.optim.Adam(others, betas=(0.9, 0.97), eps=1e-10)
    average = {name: p.detach().clone() for name, p in named.items()}
    start, step, sums = time.monotonic(), 0, np.zeros(5)
    while (progress := (time.monotonic() - start) / seconds) < 1:
        batch.prepare(chains=len(batch.prompt) // 2 if progress > 0.4 else 0)
        loss, stats = train_step(net, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        now = rate * min(1.0, (step + 1) / 100, (1 - progress) / 0.6)
        adam.param_groups[0]["lr"] = 0.3 * now
        adam.step()
        muon.step(now)
        net.zero_grad()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(named.values()), 1 - min(0.99, step / (step + 20)))
        sums += [loss.item(), *stats]
        if step % 50 == 0:
            rows = step * len(batch.prompt)
            text = "loss {:.3f}; blank cells: cross entropy {:.3f}, {:.1%} right; second pass {:.3f}, {:.1%}"
            log(f"step {step}, {rows} puzzles, rate {now:.4f}: " + text.format(*(sums / 50)))
            sums[:] = 0
    return average


# ---- export, check and evaluation with transformers ----


def export(weights: dict[str, Tensor], out: Path) -> nn.Module:
    """Writes the checkpoint in bfloat16, as transformers does; returns it as transformers reads it, in float32."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig.from_pretrained(HERE))
    missing, unexpected = model.model.decoder.load_state_dict(weights, strict=False)
    if unexpected or any("layer_scalar" not in name for name in missing):  # layer_scalar stays 1
        raise RuntimeError(f"names differ from transformers: missing {missing}, unexpected {unexpected}")
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / name, out / name)
    return DiffusionGemmaForBlockDiffusion.from_pretrained(out, dtype=torch.float32).eval()


@torch.no_grad()
def check(net: Net, model: nn.Module, batch: Batch) -> None:
    """The exported model and the training network compute the same logits, with and without self-conditioning."""
    cache, condition, previous = net.keys_values(batch.prompt), torch.zeros_like(batch.condition), None
    for turn in ("first pass", "with self-conditioning"):
        ours = net.decode(batch.canvas, cache, LENGTHS, condition)[0]
        theirs = model(batch.prompt, decoder_input_ids=batch.canvas, self_conditioning_logits=previous).logits
        condition, previous = (ours / 0.6).softmax(-1), theirs / 0.6
        off = (ours - theirs).abs().max().item()
        log(f"check, {turn}: logits up to {ours.abs().max():.1f}, at most {off:.1e} from those of transformers")
        if not off < 1e-3:
            raise RuntimeError("the exported checkpoint does not compute what was trained")


def evaluate(model: nn.Module, levels: list[int], count: int) -> None:
    lines = [line.split() for line in (HERE / "puzzles_test.txt").read_text().splitlines() if line[0] != "#"]
    for level in levels:
        chosen = [line[1:] for line in lines if line[0] == str(level)][:count]
        texts = torch.tensor([[[IDS[c] for c in rows.replace("/", "\n") + "\n"] for rows in line] for line in chosen])
        puzzles, solutions = texts.unbind(1)
        result = model.generate(F.pad(puzzles, (1, 0), value=IDS["<bos>"]))
        canvas = result.sequences[:, PROMPT:]
        steps = (canvas != IDS["<pad>"]).sum(1) / result.tokens_per_forward
        right = canvas[:, :90] == solutions
        cells = right[puzzles == IDS["."]].float().mean()
        solved = right.all(1).sum()
        log(f"{level} blanks: {solved} of {len(chosen)} solved, {cells:.1%} of the blanks, {steps.mean():.1f} steps")


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Train a tiny DiffusionGemma on Sudoku.", formatter_class=formatter)
    add = parser.add_argument
    add("--minutes", type=float, default=15, help="wall time of everything, puzzles and evaluation included")
    add("--out", type=Path, default=Path("trained"), help="folder for the checkpoint")
    add("--batch", type=int, default=16, help="puzzles per step")
    add("--rate", type=float, default=0.01, help="highest learning rate (Muon's; Adam's is 0.3 of it)")
    add("--blanks", type=int, nargs=2, default=[15, 54], help="fewest and most blanks of a training puzzle")
    add("--grids", type=int, default=4096, help="solved grids to make; their symmetries multiply them")
    add("--levels", type=int, nargs="+", default=[20, 30, 40, 51], help="blanks of the test puzzles")
    add("--puzzles", type=int, default=32, help="test puzzles per level")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--seed", type=int, default=0, help="of everything random")
    args = parser.parse_args()
    log(", ".join(f"{name} {value}" for name, value in vars(args).items() if name != "out"))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    puzzles = make_puzzles(args.seed, args.grids, args.blanks[1])
    log(f"{args.grids} grids made, with {puzzles[1].sum(1).min()} to {puzzles[1].sum(1).max()} cells that can be blank")
    net, batch = Net(CONFIG, PROMPT + CANVAS), Batch(args.batch, args.seed, puzzles, args.blanks)
    for layer in net.layers:  # layers of one kind share their code
        layer.compile(dynamic=False)
    batch.prepare(chains=0)
    train_step(net, batch)[0].backward()
    net.zero_grad()
    log(f"network of {sum(p.numel() for p in net.parameters())} parameters compiled")
    weights = train(net, batch, START + 60 * args.minutes - EXPORT_SECONDS - time.monotonic(), args.rate)

    model = export(weights, args.out)
    net = Net(CONFIG, PROMPT + CANVAS)
    net.load_state_dict({name: weight.bfloat16().float() for name, weight in weights.items()})
    check(net, model, batch)
    torch.manual_seed(args.seed)
    evaluate(model, args.levels, args.puzzles)


if __name__ == "__main__":
    main()
