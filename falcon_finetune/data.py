"""Any instruction data set -> token ids and labels, with a report of what was kept, cut and dropped.

    source (file, folder, hub id) -> checked text columns -> prompt and answer by a template -> ids and labels -> train and eval rows

Three rules hold for every row:

- The prompt and the answer are tokenised apart and joined, after the prompt's trailing whitespace has moved to the answer. Generation
  builds its prompt with `build_prompt` from the same template, so it sees exactly the tokens that training saw.
- Loss is on the answer and one EOS; on everything for plain text. The first token of a row has nothing before it to be predicted from,
  so its label is always -100: labels that are not -100 are exactly the tokens that carry loss, in packed rows too.
- A row that was cut has no EOS: the model must not learn to stop where we ran out of room.

Special tokens: nothing is added but the EOS. A special token that is spelt out in the user's text ("<|endoftext|>") becomes that token, as
the tokenizer does by default. Where that matters, set `tokenizer.split_special_tokens = True`: it is part of the cache key.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, List, Value

from falcon_finetune.options import UserError
from falcon_finetune.sources import digest, load_rows, recognise_format

NOT_LEARNT = -100
SOURCE_DIGEST = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()  # a changed module must not find its old cache
NO_ROOM = "without a token to learn inside --max_length"


@dataclass(frozen=True)
class DataReport:
    """What became of the rows. Token counts are of kept rows as they are trained on (after cutting, EOS included), training and eval together."""

    rows_read: int
    rows_kept: int
    rows_cut: int  # among the kept
    rows_dropped: dict[str, int]  # reason -> rows
    rows_eval: int  # among the kept
    format: str
    template: dict
    tokens: int
    learnt_tokens: int
    rows_ending_in_eos: int
    longest_row_tokens: int
    p50_tokens: int
    p95_tokens: int
    max_length: int
    longest_uncut_tokens: int  # the longest kept row before cutting: the --max_length that would cut nothing

    def summary(self) -> str:
        """Two lines for a person."""
        loss = "every token" if self.template["answer_column"] is None else "the answers"
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.rows_dropped.items())
        rows = [f"{self.rows_kept:,} of {self.rows_read:,} rows kept"]
        rows += [f"dropped: {dropped}"] if dropped else []
        if self.rows_cut:
            rows.append(f"{self.rows_cut:,} cut at {self.max_length:,} tokens (the longest has {self.longest_uncut_tokens:,})")
        rows += [f"{self.rows_eval:,} held out"] if self.rows_eval else []
        return (
            f"data: {', '.join(rows)}; format {self.format}, loss on {loss}\n"
            f"      {self.tokens:,} tokens, {self.learnt_tokens / self.tokens:.1%} learnt; tokens per row: median {self.p50_tokens:,}, "
            f"p95 {self.p95_tokens:,}, longest {self.longest_row_tokens:,}; {self.rows_ending_in_eos / self.rows_kept:.1%} end in a learnt EOS"
        )

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class TrainingData:
    """Rows ready to train on: columns `input_ids` and `labels`, lists of int32 of equal length, labels not shifted, -100 where not learnt."""

    train: Dataset
    eval: Dataset | None
    report: DataReport
    template: dict


def prepare_data(
    name: str, tokenizer, *, max_length: int, model_max_length: int, eval_fraction: float = 0.0, seed: int = 0,
    first_rank_context: Callable[[], contextlib.AbstractContextManager] | None = None,
) -> TrainingData:
    """Loads, checks and tokenises a data set, and splits it. The work is cached by content: a second call only maps the files.

    Args:
        max_length: longest row in tokens, its EOS included.
        model_max_length: the model's context in tokens.
        eval_fraction: share of rows held out. A row's side depends on its text and the seed alone, not on the other rows, the tokenizer
            or `max_length`, and equal rows share a side.
        first_rank_context: makes a context in which the first rank goes before the others, so that they find its cache
            (`accelerate.PartialState().main_process_first`).

    Raises:
        UserError: data that cannot be had or read, no row left to learn from, `max_length` above the model's, an empty side of the split.
    """
    if max_length > model_max_length:
        raise UserError(f"--max_length {max_length} is above the model's context of {model_max_length} tokens",
                        f"use --max_length {model_max_length} or less")
    error = None
    with (first_rank_context or contextlib.nullcontext)():
        # The context ends in a barrier that every rank must reach, so an error waits until it is left.
        try:
            rows = load_rows(name)
            template = recognise_format(rows.column_names, where=name)
            encoded = _encode_cached(rows, tokenizer, template, max_length)
        except UserError as caught:
            error = caught
    if error is not None:
        raise error
    kept = np.flatnonzero(_numbers(encoded, "source_tokens"))
    if not len(kept):
        raise _nothing_left(name, encoded, max_length)
    held_out = _held_out(_numbers(encoded, "key")[kept], eval_fraction, seed)
    if eval_fraction > 0 and (held_out.all() or not held_out.any()):
        empty = "training" if held_out.all() else "evaluation"
        raise UserError(f"--eval_fraction {eval_fraction:g} of {len(kept)} rows leaves no row for {empty}",
                        "give more rows, another share or another --seed")
    report = _report(encoded, kept, int(held_out.sum()), template, max_length)
    columns = encoded.select_columns(["input_ids", "labels"])
    train = columns.select(kept[~held_out]) if len(kept) < len(columns) or held_out.any() else columns
    return TrainingData(train, columns.select(kept[held_out]) if eval_fraction > 0 else None, report, template)


# --- templates -------------------------------------------------------------------------------------------------------------------------


def build_prompt(template: dict, row: dict | str) -> str:
    """The prompt that training saw for a row, without its trailing whitespace (which the model writes itself).

    Args:
        row: the columns of a row (an answer may be absent), or a bare string for the template's main column.

    Raises:
        UserError: a column that the template needs is missing, or the prompt is empty.
    """
    fields = {template["main_column"]: row} if isinstance(row, str) else row
    needed = [name for name in template["columns"] if name != template["answer_column"]]
    missing = [name for name in needed if not isinstance(fields.get(name), str)]
    if missing:
        raise UserError(f"a prompt of format {template['format']} needs text in {missing[0]!r}; found: {', '.join(fields) or 'nothing'}",
                        f"give {' and '.join(needed)}")
    prompt = _fill_prompt(template, fields).rstrip()
    if not prompt:
        raise UserError("the prompt is empty", "write something to answer")
    return prompt


def prompts_and_answers(template: dict, rows: Dataset) -> tuple[list[str], list[str]]:
    """The prompts of rows as generation builds them, and the rows' own answers without the whitespace around them.

    Raises:
        UserError: plain text, which has no answers, or rows without a column that the template needs.
    """
    answer = template["answer_column"]
    if answer is None:
        raise UserError(f"format {template['format']} is plain text: there are no answers to compare",
                        "use a run that was trained on prompts and answers")
    if answer not in rows.column_names:
        raise UserError(f"rows of format {template['format']} need {answer!r}; found: {', '.join(rows.column_names)}", f"add a column {answer!r}")
    return [build_prompt(template, row) for row in rows], [row[answer].strip() for row in rows]


def _fill_prompt(template: dict, fields: dict) -> str:
    pattern = template["prompt"]
    if "prompt_with_input" in template and (fields.get("input") or "").strip():
        pattern = template["prompt_with_input"]
    # Not str.format: braces and backslashes in the user's text stay what they are.
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1]) or "", pattern)


def _split_row(template: dict, row: dict) -> tuple[str, str, str]:
    """(prompt, answer, reason to drop the row or ""). Plain text is all answer."""
    # An empty prompt is allowed where the user writes the whole prompt: it is text to be learnt without a condition.
    for name in template["columns"]:
        if not row[name].strip() and name != "prompt":
            return "", "", f"empty {name}"
    if template["answer_column"] is None:
        return "", row[template["main_column"]], ""
    answer = row[template["answer_column"]]
    if not answer[0].isspace():
        answer = template["separator"] + answer
    return _move_whitespace(_fill_prompt(template, row), answer) + ("",)


def _move_whitespace(prompt: str, answer: str) -> tuple[str, str]:
    # Byte-level BPE joins a space to the word after it: "Answer: " + "42" never gives the token " 42" that the model knows.
    bare = prompt.rstrip()
    return bare, prompt[len(bare):] + answer


# --- token ids and labels --------------------------------------------------------------------------------------------------------------


def build_example(prompt: str, answer: str, tokenizer, max_length: int) -> tuple[list[int], list[int], bool]:
    """(input_ids, labels, was_cut) of one row; an empty prompt makes a text row.

    Ids of the prompt without its trailing whitespace, then of that whitespace and the answer, then one EOS, cut at the end to at most
    `max_length` tokens and never inside a character. Where the prompt alone fills the row, no label is learnt.
    """
    prompt, answer = _move_whitespace(prompt, answer)
    prompt_ids, answer_ids = _tokenise([prompt, answer], tokenizer)
    return _join(prompt_ids, answer_ids, tokenizer, max_length)


def iter_learnt(example: dict, tokenizer) -> Iterator[str]:
    """The text of each unbroken run of learnt tokens, special tokens spelt out."""
    run: list[int] = []
    for label in [*example["labels"], NOT_LEARNT]:
        if label != NOT_LEARNT:
            run.append(label)
        elif run:
            yield _decode_ids(run, tokenizer)
            run = []


def _decode_ids(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _tokenise(texts: list[str], tokenizer) -> list[list[int]]:
    # verbose=False: a row above the tokenizer's own idea of a maximum is cut and counted here, not warned about there.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]


def _join(prompt_ids: list[int], answer_ids: list[int], tokenizer, max_length: int) -> tuple[list[int], list[int], bool]:
    eos = tokenizer.eos_token_id
    if answer_ids[-1:] != [eos]:
        answer_ids = answer_ids + [eos]
    was_cut = len(prompt_ids) + len(answer_ids) > max_length
    if was_cut:
        room = max(0, max_length - len(prompt_ids))
        prompt_ids, answer_ids = prompt_ids[:max_length], answer_ids[: _whole_characters(answer_ids, room, tokenizer)]
    input_ids = prompt_ids + answer_ids
    labels = [NOT_LEARNT] * len(prompt_ids) + answer_ids
    labels[:1] = [NOT_LEARNT]
    return input_ids, labels, was_cut


def _whole_characters(ids: list[int], count: int, tokenizer) -> int:
    """`count` or up to a few tokens less, so that the cut is not inside the bytes of a character."""
    # Eight tokens are at least eight bytes, more than a character has: a replacement mark at the end is the cut's doing.
    while count and _decode_ids(ids[max(0, count - 8) : count], tokenizer).endswith("\ufffd"):
        count -= 1
    return count


ENCODED_FEATURES = Features({
    "input_ids": List(Value("int32")), "labels": List(Value("int32")), "dropped": Value("string"), "cut": Value("bool"),
    "ends_in_eos": Value("bool"), "learnt_tokens": Value("int64"), "prompt_tokens": Value("int64"),
    "source_tokens": Value("int64"), "key": Value("int64"),
})


def _encode_batch(batch: dict[str, list], tokenizer, template: dict, max_length: int) -> dict[str, list]:
    """Columns of text -> ENCODED_FEATURES. A dropped row keeps its place, without tokens: `source_tokens` (before cutting) is 0."""
    columns = {name: batch[name] for name in [*template["columns"], *template["optional_columns"]] if name in batch}
    parts = [_split_row(template, dict(zip(columns, values))) for values in zip(*columns.values())]
    prompts = _tokenise([prompt for prompt, _, _ in parts], tokenizer)
    answers = _tokenise([answer for _, answer, _ in parts], tokenizer)
    out: dict[str, list] = {name: [] for name in ENCODED_FEATURES}
    for (prompt, answer, dropped), prompt_ids, answer_ids in zip(parts, prompts, answers):
        input_ids, labels, was_cut = ([], [], False) if dropped else _join(prompt_ids, answer_ids, tokenizer, max_length)
        learnt = len(labels) - labels.count(NOT_LEARNT)
        if not dropped and not learnt:
            input_ids, labels, was_cut, dropped = [], [], False, NO_ROOM
        length = len(prompt_ids) + len(answer_ids) + (answer_ids[-1:] != [tokenizer.eos_token_id])
        ends_in_eos = labels[-1:] == [tokenizer.eos_token_id]
        counts = (learnt, len(prompt_ids), 0 if dropped else length)
        values = (input_ids, labels, dropped, was_cut, ends_in_eos, *counts, _row_key(prompt, answer))
        for name, value in zip(out, values):
            out[name].append(value)
    # Through numpy because the conversion of nested Python lists takes longer than the tokenising.
    for name in ("input_ids", "labels"):
        out[name] = [np.asarray(ids, dtype=np.int32) for ids in out[name]]
    return out


def _row_key(prompt: str, answer: str) -> int:
    text = f"{len(prompt)}:{prompt}{answer}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _encode_cached(rows: Dataset, tokenizer, template: dict, max_length: int) -> Dataset:
    """`_encode_batch` over all rows, memory-mapped from the cache of `datasets` where the same content was encoded before."""
    return rows.map(
        _encode_batch, batched=True, remove_columns=rows.column_names, features=ENCODED_FEATURES, desc="Tokenising",
        fn_kwargs={"tokenizer": tokenizer, "template": template, "max_length": max_length},
        # datasets would hash the function by its name alone and the tokenizer with the folder that it came from.
        new_fingerprint=digest(rows._fingerprint, SOURCE_DIGEST, _tokenizer_digest(tokenizer), json.dumps(template), str(max_length)),
    )


def _tokenizer_digest(tokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # left behind by earlier calls, not part of what it does here
    return digest(json.dumps(backend, sort_keys=True), str(tokenizer.eos_token_id), str(tokenizer.split_special_tokens))


# --- split and report ------------------------------------------------------------------------------------------------------------------


def _numbers(encoded: Dataset, column: str) -> np.ndarray:
    return encoded.data.column(column).to_numpy()


def _held_out(keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows belong to the eval side: a row's key and the seed decide, hashed once more so that seeds are independent."""
    if not fraction:
        return np.zeros(len(keys), dtype=bool)
    salt, limit = seed.to_bytes(8, "little"), fraction * 2**64

    def draw(key: np.int64) -> int:  # uniform in [0, 2^64)
        return int.from_bytes(hashlib.blake2b(key.tobytes(), key=salt, digest_size=8).digest(), "little")

    return np.fromiter((draw(key) < limit for key in keys), dtype=bool, count=len(keys))


def _reasons(encoded: Dataset) -> dict[str, int]:
    return {reason: rows for reason, rows in sorted(Counter(encoded.data.column("dropped").to_pylist()).items()) if reason}


def _report(encoded: Dataset, kept: np.ndarray, rows_eval: int, template: dict, max_length: int) -> DataReport:
    # Dropped rows have no tokens, so sums over all rows are sums over the kept ones.
    lengths = pyarrow.compute.list_value_length(encoded.data.column("input_ids")).to_numpy()[kept]
    return DataReport(
        rows_read=len(encoded), rows_kept=len(kept), rows_cut=int(_numbers(encoded, "cut").sum()), rows_dropped=_reasons(encoded),
        rows_eval=rows_eval, format=template["format"], template=template,
        tokens=int(lengths.sum()), learnt_tokens=int(_numbers(encoded, "learnt_tokens").sum()),
        rows_ending_in_eos=int(_numbers(encoded, "ends_in_eos").sum()), longest_row_tokens=int(lengths.max()),
        p50_tokens=int(np.percentile(lengths, 50, method="nearest")), p95_tokens=int(np.percentile(lengths, 95, method="nearest")),
        max_length=max_length, longest_uncut_tokens=int(_numbers(encoded, "source_tokens").max()),
    )


def _nothing_left(name: str, encoded: Dataset, max_length: int) -> UserError:
    reasons = _reasons(encoded)
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if NO_ROOM not in reasons:
        return UserError(f"{name} has nothing to learn: all {len(encoded)} rows dropped ({counted})", "give rows with text")
    p95 = int(np.percentile(_numbers(encoded, "prompt_tokens"), 95, method="nearest"))
    return UserError(f"{name} has no row with a learnt token at --max_length {max_length}: {counted} (p95 prompt: {p95} tokens)",
                     f"raise --max_length above {max(p95, max_length)}, by as much as an answer needs")


def rows_digest(rows: Dataset) -> str:
    """SHA-256 of the token ids and labels of the rows in their order: what a continued run must find unchanged."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        for column in ("input_ids", "labels"):
            values = batch.column(column).combine_chunks()
            digest.update(np.asarray(values.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(values.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()
