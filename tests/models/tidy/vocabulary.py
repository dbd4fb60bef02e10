"""Writes tokenizer.json beside this file: Gemma's marks, the printable characters, and the words of the tasks.

    python vocabulary.py        (tokenizers)

As Gemma's, it is a BPE without a pre-tokenizer whose spaces are U+2581. Merges never join a word with a space or a
mark, so that a text cut at the edge of a word has the same tokens as the whole. Words are single tokens in both cases.
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks import WORDS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SPACE = "\u2581"
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
# fmt: off
MARKS = [
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
    "<|channel>", "<channel|>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>",
]
# fmt: on
SPELT = """
system user model thought declaration call response value STRING INTEGER NUMBER BOOLEAN tool get find is It Sort sort
Close close the brackets quotes table Write write JSON Upper upper case Indent indent Add add Call Again Be You are
brief tidy --
"""
OTHER = SPELT.split()
RUNS = [(SPACE, SPACE), (SPACE * 2, SPACE * 2), ("-", "-"), ("--", "-")]
ROUND = 32  # the size of the vocabulary is a multiple of this


def main() -> None:
    words = [*WORDS, *(word.upper() for word in WORDS), *OTHER]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=4096, min_frequency=1, show_progress=False))
    merges = json.loads(trained.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
    merges = [pair for pair in merges if "-" not in pair] + RUNS

    characters = [SPACE, "\n", *(chr(code) for code in range(33, 127))]
    tokens = [*CONTROL, *MARKS, *characters]
    tokens += dict.fromkeys(left + right for left, right in merges)
    tokens += [f"<unused{i}>" for i in range(-len(tokens) % ROUND)]
    special = [*CONTROL, *MARKS]
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for i, text in enumerate(special)
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": {text: i for i, text in enumerate(tokens)}, "merges": [" ".join(pair) for pair in merges]}
    decoder = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    top = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": space}
    top |= {"pre_tokenizer": None, "post_processor": None, "decoder": decoder, "model": model}
    (HERE / "tokenizer.json").write_text(json.dumps(top, indent=1, ensure_ascii=False) + "\n")
    whole = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    split = [word for word in words if word != "--" and len(whole.encode(word).ids) != 1]
    print(f"{len(tokens)} tokens, {len(merges)} merges; words of several tokens: {split}")


if __name__ == "__main__":
    main()
