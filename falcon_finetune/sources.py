"""Rows of text from files, folders and the hub, each checked and each fault told with its place.

    python -c "from falcon_finetune.sources import load_rows; print(load_rows('rows.jsonl'))"

The columns decide the format: the first of TEMPLATES whose columns are there.
"""

import copy
import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import OfflineModeIsEnabled

from falcon_finetune.console import say
from falcon_finetune.hub import HUB_FAILURES, HubRepo, explain, is_hub_id, is_outage, nearby, reach, warn_of_cache
from falcon_finetune.options import UserError
from falcon_finetune.tiny_falcon import TINY_MODELS, ensure_tiny_model

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
SOURCE_DIGEST = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).hexdigest()  # a changed module must not find its old cache

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
    if name in TINY_MODELS:
        return _load_files([Path(ensure_tiny_model(name, say=say)) / "train.jsonl"])
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_files(_files_of_folder(path))
    if path.exists():
        if _kind(path) not in FILE_KINDS:
            raise UserError(f"{name} is of no kind that can be read", f"give one of {' '.join(FILE_KINDS)}")
        return _load_files([path])
    if not is_hub_id(name) or _kind(path) in FILE_KINDS:
        raise UserError(f"no file or folder {name!r}", f"check the path (this is {Path.cwd()}){nearby(name)}")
    return _load_from_hub(name)


def digest(*parts: str) -> str:
    """The key of cached rows that depend on these parts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


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
            fingerprint=digest(SOURCE_DIGEST, *columns, *contents),
        )
    except DatasetGenerationError as error:
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
    """Split "train" of a hub data set, checked column by column; from the cache, with a warning, where the hub does not answer."""
    repo, outage = HubRepo(name, "data set"), None
    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        if not was_offline:
            try:
                reach(repo)
            except HUB_FAILURES as error:
                if not is_outage(error):
                    raise
                outage, datasets.config.HF_HUB_OFFLINE = error, True
        rows = datasets.load_dataset(name, split="train")
    except (*HUB_FAILURES, DatasetsError, ValueError, RuntimeError) as error:
        raise _load_error(error, repo, outage, was_offline) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    if outage is not None:
        warn_of_cache(outage, repo, "the cached rows")
    return _checked_columns(rows, name)


def _load_error(error: Exception, repo: HubRepo, outage: Exception | None, offline: bool) -> UserError:
    if offline:
        return explain(OfflineModeIsEnabled(), repo)
    if outage is not None or (isinstance(error, HUB_FAILURES) and not isinstance(error, DatasetsError)):
        return explain(outage or error, repo)
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    return UserError(f"data set {repo.name!r} cannot be loaded: {reason}", f"download the part that you want and give {repo.instead}")


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
