"""Answer the lines of a file on all machines of a Ray cluster: batch_ray.py MODEL.gguf PROMPTS.jsonl ANSWERS.jsonl

Requests and answers are those of `dg-run --batch`. MODEL must have the same path on every machine, or be hf:owner/name.
Each worker opens the model for itself: --workers N is the number of workers, --cpus M the processors of each.
Needs ray[data] (pip install 'dgemma[ray]'); `ray.init()` joins the cluster that RAY_ADDRESS names, or starts one here.
"""

import argparse

import ray

import dgemma
from dgemma.batch import Batch
from dgemma.files import json_lines


class Answerer:
    """A worker: opens the model once, and answers the lines that it is given."""

    def __init__(self, path: str, threads: int) -> None:
        self.batch = Batch(dgemma.Model(path, threads=threads))

    def __call__(self, row: dict) -> dict:
        return {"answer": json_lines.as_line(self.batch.answer(row["text"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "answers"):
        parser.add_argument(name)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1)
    given = parser.parse_args()
    ray.init()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # No processor is reserved for reading: the workers may have all of them.
    lines = ray.data.read_text(given.prompts, ray_remote_args={"num_cpus": 0})
    answers = lines.map(
        Answerer,
        fn_constructor_args=(given.model, given.cpus),
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        num_cpus=given.cpus,
    )
    with open(given.answers, "x", encoding="utf-8", errors="replace") as out:  # "x": an existing file is not replaced
        for row in answers.iter_rows():
            out.write(row["answer"] + "\n")


if __name__ == "__main__":
    main()
