"""Exact match of a run on held-out rows, base against adapter.

    python -m scripts.evaluate results/tiny-7b-style-4bit-tiny-7b-style
    python -m scripts.evaluate RUN -d heldout.jsonl --rows 200

Prints one JSON object last on stdout: exact_match_before (base alone), exact_match_after (with the adapter) and its 95 % confidence interval
(Wilson), rows, and one example.
"""

import argparse
import json
from pathlib import Path

from falcon_finetune.console import quiet_the_stack, run_main, say
from falcon_finetune.options import UserError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run directory that finetune.py made")
    parser.add_argument("-d", "--dataset_name", metavar="NAME", help="held-out rows with prompts and answers (the tiny models bring their own)")
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="rows to score, from the first (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=32, metavar="TOKENS", help="longest answer (%(default)s)")
    arguments = parser.parse_args()
    quiet_the_stack()
    print(json.dumps(evaluate(Path(arguments.run), arguments.dataset_name, arguments.rows, arguments.max_new_tokens), ensure_ascii=False), flush=True)
    return 0


def evaluate(run: Path, dataset: str | None, rows: int, max_new_tokens: int) -> dict:
    """Scores greedy answers; an answer counts if it equals the row's, apart from space around it."""
    from scipy.stats import binomtest

    from falcon_finetune.data import prompts_and_answers
    from falcon_finetune.generation import greedy_answers, load_run
    from falcon_finetune.sources import load_rows

    model, tokenizer, record = load_run(run)
    held_out = load_rows(dataset or held_out_file(record))
    held_out = held_out.select(range(min(rows, len(held_out))))
    prompts, wanted = prompts_and_answers(record["template"], held_out)
    after = greedy_answers(model, tokenizer, prompts, max_new_tokens)
    with model.disable_adapter():
        before = greedy_answers(model, tokenizer, prompts, max_new_tokens)
    say(f"{len(prompts)} held-out rows")

    def hits(answers: list[str]) -> int:
        return sum(answer.strip() == right.strip() for answer, right in zip(answers, wanted))

    shown = next((i for i in range(len(wanted)) if before[i].strip() != wanted[i].strip() == after[i].strip()), 0)
    interval = binomtest(hits(after), len(wanted)).proportion_ci(method="wilson")
    example = {"prompt": prompts[shown], "before": before[shown], "after": after[shown], "wanted": wanted[shown]}
    return {"run_dir": str(run), "rows": len(wanted), "exact_match_before": hits(before) / len(wanted), "exact_match_after": hits(after) / len(wanted),
            "exact_match_after_95": [round(interval.low, 4), round(interval.high, 4)], "example": example}


def held_out_file(record: dict) -> str:
    """The held-out rows that come with the data set of the run."""
    from falcon_finetune.tiny_falcon import TINY_MODELS, ensure_tiny_model

    name = record["options"]["dataset_name"]
    if name not in TINY_MODELS:
        raise UserError(f"{name} brings no held-out rows", "give a file with -d")
    return str(ensure_tiny_model(name) / "heldout.jsonl")


if __name__ == "__main__":
    run_main(main)
