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
import copy
import csv
import difflib
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, Features, List, Value
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError

from falcon_finetune.options import UserError

NOT_LEARNT = -100
TINY_NAMES = ("tiny-7b-style", "tiny-40b-style")
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
HUB_TIMEOUT_SECONDS = 5
SOURCE_DIGEST = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()  # a changed module must not find its old cache
NO_ROOM = "without a token to learn inside --max_length"

# JSON-able, because the template travels in the run directory. `columns` must be there and hold text; `optional_columns` may be missing,
# null or empty. `separator` goes between the prompt and an answer that does not start with whitespace.
TEMPLATES = (
    {"format": "text", "columns": ["text"], "optional_columns": [], "main_column": "text", "prompt": "{text}",
     "answer_column": None, "separator": ""},
    {"format": "prompt/completion", "columns": ["prompt", "completion"], "optional_columns": [], "main_column": "prompt",
     "prompt": "{prompt}", "answer_column": "completion", "separator": ""},
    {"format": "question/answer", "columns": ["question", "answer"], "optional_columns": [], "main_column": "question",
     "prompt": "Question: {question}\nAnswer:", "answer_column": "answer", "separator": " "},
    {"format": "instruction/output", "columns": ["instruction", "output"], "optional_columns": ["input"], "main_column": "instruction",
     "prompt": "### Instruction:\n{instruction}\n\n### Response:\n",
     "prompt_with_input": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
     "answer_column": "output", "separator": ""},
)


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


def recognise_format(column_names: Iterable[str], where: str = "the data set") -> dict:
    """The template for rows with these columns; where several fit, the first of TEMPLATES.

    Raises:
        UserError: no template fits; names the columns found and the accepted ones.
    """
    names = list(column_names)
    for template in TEMPLATES:
        if set(template["columns"]) <= set(names):
            return copy.deepcopy(template)
    found = ", ".join(repr(str(name)) for name in names[:20]) or "none"
    accepted = "; ".join(" + ".join(template["columns"]) for template in TEMPLATES)
    raise UserError(f"{where} has no usable columns; found: {found}", f"rename them to one of: {accepted} (input may join the last)")


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
        new_fingerprint=_digest(rows._fingerprint, SOURCE_DIGEST, _tokenizer_digest(tokenizer), json.dumps(template), str(max_length)),
    )


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _tokenizer_digest(tokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # left behind by earlier calls, not part of what it does here
    return _digest(json.dumps(backend, sort_keys=True), str(tokenizer.eos_token_id), str(tokenizer.split_special_tokens))


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


# --- sources ---------------------------------------------------------------------------------------------------------------------------


def load_rows(name: str) -> Dataset:
    """The text columns of a data set, checked, memory-mapped from the cache of `datasets`; nothing else is written.

    Args:
        name: a local file (.jsonl, .json, .csv, .parquet, any but the last may end in .gz), a local folder of files of one of these
            kinds (files named as test or validation splits are left out), a hub id (its split "train"), or tiny-7b-style|tiny-40b-style.

    Returns:
        The columns of the recognised format alone. Optional columns are "" where a local row has none.

    Raises:
        UserError: not there, unreachable, empty, broken (file and line), or without a usable column.
    """
    if name in TINY_NAMES:
        from falcon_finetune.tiny_falcon import ensure_tiny_model

        return _load_files([Path(ensure_tiny_model(name)) / "train.jsonl"])
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_files(_files_of_folder(path))
    if path.exists():
        if _kind(path) not in FILE_KINDS:
            raise UserError(f"{name} is of no kind that can be read", f"give one of {' '.join(FILE_KINDS)}")
        return _load_files([path])
    if name[:1] in (".", "/", "~", "") or "\\" in name or name.count("/") > 1 or _kind(path) in FILE_KINDS:
        folder = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, sorted(entry.name for entry in folder.iterdir()), n=1)
        raise UserError(f"no file or folder {name!r}", f"did you mean {folder / near[0]}?" if near else f"check the path; this is {Path.cwd()}")
    return _load_from_hub(name)


def _kind(path: Path) -> str:
    """The suffix that says how to read a file, without .gz."""
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _files_of_folder(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and "/." not in f"/{file.relative_to(folder).as_posix()}"]
    not_data = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` writes beside data
    held_out = re.compile(r"(^|[-_.])(test|testing|valid|validation|val|dev|eval|evaluation|heldout)([-_.]|$)", re.IGNORECASE)
    readable = [file for file in files if _kind(file) in FILE_KINDS and file.name not in not_data and not held_out.search(file.name)]
    if not readable:
        there = ", ".join(str(file.relative_to(folder)) for file in files[:10]) or "nothing"
        raise UserError(f"folder {folder} has no training data; it holds: {there}", f"give it files of kind {', '.join(FILE_KINDS)}")
    kinds = sorted({_kind(file) for file in readable})
    if len(kinds) > 1:
        raise UserError(f"folder {folder} holds data of several kinds: {', '.join(kinds)}", "name one file, or keep one kind in the folder")
    return readable


def _load_files(files: Sequence[Path]) -> Dataset:
    place, row = next(_read_rows(files[0]))
    template = recognise_format(row, where=place)
    columns = [*template["columns"], *template["optional_columns"]]
    contents = []
    for file in files:
        with open(file, "rb") as stream:
            contents += [_kind(file), file.suffix, hashlib.file_digest(stream, "blake2b").hexdigest()]
    try:
        return Dataset.from_generator(
            _checked_rows, features=Features({name: Value("string") for name in columns}),
            gen_kwargs={"files": tuple(files), "template": template},  # a tuple, since a list would be one call per file
            fingerprint=_digest(SOURCE_DIGEST, *columns, *contents),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _checked_rows(files: Sequence[Path], template: dict) -> Iterator[dict[str, str]]:
    """Rows of text; an error names the first bad row and how many there are."""
    first, bad = "", 0
    for file in files:
        for place, row in _read_rows(file):
            fault = _fault_of(row, template)
            if fault:
                first, bad = first or f"{place}: {fault}", bad + 1
            elif not bad:
                yield {name: row.get(name) or "" for name in [*template["columns"], *template["optional_columns"]]}
    if bad:
        raise UserError(first + (f" ({bad} rows are like that or otherwise bad)" if bad > 1 else ""),
                        f"give every row text in {' and '.join(template['columns'])}, or remove the row")


def _fault_of(row: dict, template: dict) -> str:
    for name in template["columns"]:
        if name not in row:
            return f"no {name!r}; found: {', '.join(repr(column) for column in row) or 'no columns'}"
    for name in [*template["columns"], *template["optional_columns"]]:
        value = row.get(name)
        if value is None and name in template["optional_columns"]:
            continue
        if not isinstance(value, str):
            return f"{name!r} is {_kind_of_value(value)}, not text"
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            return f"{name!r} holds half of a surrogate pair (a broken \\u escape)"
    return ""


def _kind_of_value(value) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return names.get(type(value), type(value).__name__)


def _load_from_hub(name: str) -> Dataset:
    """Split "train" of a hub data set, checked column by column.

    load_dataset retries an unreachable hub for 23 s, so one request of our own asks first; if it fails, what is in the cache still counts.
    """
    endpoint, unreachable = datasets.config.HF_ENDPOINT, None
    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        if not was_offline:
            try:
                HfApi(endpoint=endpoint).dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
            except (HTTPError, OSError) as error:  # HTTPError is of the HTTP library that huggingface_hub uses, httpx or httpx2
                if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
                    raise
                unreachable = " ".join(str(error).split())[:100] or type(error).__name__
                datasets.config.HF_HUB_OFFLINE = True
        rows = datasets.load_dataset(name, split="train")
        if unreachable is not None:
            logging.getLogger(__name__).warning("%s cannot be reached (%s): %r is taken from the cache and may be old", endpoint, unreachable, name)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{name!r} is no file or folder here, and {endpoint} has no such data set, or a private one",
                        "check the spelling; for a private one: hf auth login") from None
    except (HTTPError, datasets.exceptions.DatasetsError, ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _hub_error(name, endpoint, error, was_offline, unreachable) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return _checked_columns(rows, name)


def _hub_error(name: str, endpoint: str, error: Exception, offline: bool, unreachable: str | None) -> UserError:
    if offline:
        return UserError(f"{name!r} is no file or folder here and not in the cache, and HF_HUB_OFFLINE is set",
                         "unset HF_HUB_OFFLINE, or give a local file with -d")
    if unreachable is not None:
        return UserError(f"{name!r} is no file or folder here and not in the cache, and {endpoint} cannot be reached ({unreachable})",
                         "check the network or HF_ENDPOINT, or give a local file with -d")
    if isinstance(error, GatedRepoError) or "gated" in str(error):
        return UserError(f"data set {name!r} is gated", f"accept its terms at {endpoint}/datasets/{name}, then: hf auth login")
    return UserError(f"data set {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}",
                     "download the part that you want and give it as a local file with -d")


def _checked_columns(rows: Dataset, name: str) -> Dataset:
    """The columns of the format, proved to be text. `rows` has no indices mapping."""
    template = recognise_format(rows.column_names, where=name)
    columns = [column for column in [*template["columns"], *template["optional_columns"]] if column in rows.column_names]
    if not len(rows):
        raise UserError(f"{name} has no rows", "give rows")
    for column in columns:
        kind = getattr(rows.features[column], "dtype", "nested")
        if kind not in ("string", "large_string"):
            raise UserError(f"{name}: column {column!r} is {kind}, not text", "give a data set whose column holds text")
        nulls = np.flatnonzero(pyarrow.compute.is_null(rows.data.column(column)).to_numpy())
        if len(nulls) and column in template["columns"]:
            raise UserError(f"{name} row {nulls[0] + 1}: {column!r} is null, not text ({len(nulls)} such rows)",
                            "give a data set without nulls in it")
    return rows.select_columns(columns)


# --- files: each reader yields ("file:line", row) ----------------------------------------------------------------------------------------


def _read_rows(file: Path) -> Iterator[tuple[str, dict]]:
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[_kind(file)]
    empty = True
    try:
        for place, row in reader(file):
            empty = False
            yield place, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is no complete gzip file ({error})", "copy or download it again") from None
    except PermissionError:
        raise UserError(f"{file} may not be read by this user", f"chmod u+r {file}, or ask its owner") from None
    if empty:
        raise UserError(f"{file} has no rows", "give rows")


def _open(file: Path):
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")


def _decode(data: bytes, file: Path, line: int) -> str:
    """Bytes of the file that start at `line` -> text without a byte order mark."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        at, byte = line + data.count(b"\n", 0, error.start), error.start - data.rfind(b"\n", 0, error.start)
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise UserError(f"{file}:{at} byte {byte}: 0x{data[error.start]:02x} is not UTF-8 (it looks like {encoding})",
                        f"iconv -f {encoding} -t utf-8 {file} > utf8-{file.name}") from None
    return text.removeprefix("\ufeff") if line == 1 else text


def _decoded_lines(file: Path) -> Iterator[str]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            yield _decode(line, file, number)


def _invalid_json(file: Path, line: int, column: int | None, reason: str, text_line: str) -> UserError:
    place = f"{file}:{line}:{column}" if column else f"{file}:{line}"
    shape = "write a list of objects, or one object per line; " if _kind(file) == ".json" else ""
    return UserError(f"{place}: invalid JSON ({reason[:1].lower() + reason[1:]})", f"{shape}correct the line that begins: {text_line.strip()[:60]}")


def _checked_object(value, file: Path, line: int) -> tuple[str, dict]:
    if not isinstance(value, dict):
        raise UserError(f"{file}:{line}: the row is {_kind_of_value(value)}, not an object", 'write each row as {"column": "text", ...}')
    return f"{file}:{line}", value


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_decoded_lines(file), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip("\r\n"))  # with its line end, a string that does not end is called a control character
        except json.JSONDecodeError as error:
            raise _invalid_json(file, number, error.colno, error.msg, line) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
            raise _invalid_json(file, number, None, str(error), line) from None
        yield _checked_object(value, file, number)


def _read_json(file: Path) -> Iterator[tuple[str, dict]]:
    """A list of objects, taken one by one so that each has its line; else JSON Lines under another name."""
    with _open(file) as stream:
        text = _decode(stream.read(), file, 1)
    gap, decode = re.compile(r"\s*"), json.JSONDecoder().raw_decode
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(file)
        return
    position, line, counted = gap.match(text, text.index("[") + 1).end(), 1, 0
    try:
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            value, end = decode(text, position)
            yield _checked_object(value, file, line)
            position = gap.match(text, end).end()
            if text[position : position + 1] == ",":
                position = gap.match(text, position + 1).end()
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, gap.match(text, position + 1).end())
    except json.JSONDecodeError as error:
        raise _invalid_json(file, error.lineno, error.colno, error.msg, text.split("\n", error.lineno)[error.lineno - 1]) from None
    except (ValueError, RecursionError) as error:
        raise _invalid_json(file, line, None, str(error), text[counted : counted + 60]) from None


def _read_csv(file: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)
    first = next(_decoded_lines(file), "")
    delimiter = next((mark for mark in ",;\t" if _fits([name.strip() for name in next(csv.reader([first], delimiter=mark), [])])), ",")
    reader = csv.reader(_decoded_lines(file), delimiter=delimiter, strict=True)
    header, line = None, 1
    try:
        for fields in reader:
            if not fields:
                pass  # a blank line
            elif header is None:
                header = [name.strip() for name in fields]
                twice = [name for name in header if header.count(name) > 1]
                if twice:
                    raise UserError(f"{file}:{line}: column {twice[0]!r} stands twice in the header", "rename one of the two")
            elif len(fields) != len(header):
                raise UserError(f"{file}:{line}: {len(fields)} fields, but the header has {len(header)}",
                                f'quote fields that hold {delimiter!r} or a line break: "a{delimiter} b"')
            else:
                yield f"{file}:{line}", dict(zip(header, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line}: invalid CSV ({error})", "correct that row; a quote inside a quoted field is written twice") from None


def _fits(columns: list[str]) -> bool:
    return any(set(template["columns"]) <= set(columns) for template in TEMPLATES)


def _read_parquet(file: Path) -> Iterator[tuple[str, dict]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            template = recognise_format(names, where=str(file))
            columns = [name for name in [*template["columns"], *template["optional_columns"]] if name in names]
            for batch in table.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(f"{file} is no complete Parquet file ({' '.join(str(error).split())[:100]})", "copy or download it again") from None
