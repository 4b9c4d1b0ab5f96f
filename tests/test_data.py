"""falcon_finetune.data: exact ids and labels for each format, the EOS rule, the prompt prefix, the split, the cache, and bad input."""

import contextlib
import gzip
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from falcon_finetune import data
from falcon_finetune.data import build_example, build_prompt, iter_learnt, load_rows, prepare_data, recognise_format
from falcon_finetune.options import UserError

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT / "../shared/data/gsm8k/train.jsonl"
SPACE_42, EOS, PAD = 257, 258, 259
NO = -100


def make_tokenizer():
    """One token per byte with the byte as its id, " 4" and " 42" as tokens of their own, then EOS and a padding token that nothing may use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
    space = chr(256 + others.index(32))
    vocab |= {space + "4": 256, space + "42": SPACE_42}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(space, "4"), (space + "4", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


TOKENIZER = make_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has an empty cache of `datasets`, and no network to wait for."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


def ids(text: str) -> list[int]:
    return list(text.encode())


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(name, max_length=64, **more):
    return prepare_data(str(name), TOKENIZER, max_length=max_length, model_max_length=2048, **more)


def error_of(call, *arguments, **more) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    assert "\n" not in caught.value.cause and "\n" not in caught.value.cure
    return caught.value


# --- golden rows: id = byte, so every expectation can be checked by eye ------------------------------------------------------------------

GOLDEN = {
    "text": ({"text": "Hi 42"}, [72, 105, SPACE_42, EOS], [NO, 105, SPACE_42, EOS], "Hi 42"),
    "prompt/completion": ({"prompt": "a:", "completion": " 42"}, [97, 58, SPACE_42, EOS], [NO, NO, SPACE_42, EOS], "a:"),
    "question/answer": (
        {"question": "6*7?", "answer": "42"}, ids("Question: 6*7?\nAnswer:") + [SPACE_42, EOS], [NO] * 22 + [SPACE_42, EOS],
        "Question: 6*7?\nAnswer:",
    ),
    "instruction/output": (
        {"instruction": "Add.", "output": "42"}, ids("### Instruction:\nAdd.\n\n### Response:\n42") + [EOS],
        [NO] * 36 + ids("\n42") + [EOS], "### Instruction:\nAdd.\n\n### Response:",
    ),
    "instruction/output with input": (
        {"instruction": "Add.", "input": "40 2", "output": "42"},
        ids("### Instruction:\nAdd.\n\n### Input:\n40 2\n\n### Response:\n42") + [EOS], [NO] * 53 + ids("\n42") + [EOS],
        "### Instruction:\nAdd.\n\n### Input:\n40 2\n\n### Response:",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_rows(case, tmp_path):
    row, input_ids, labels, prompt = GOLDEN[case]
    result = prepare(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert result.train[0] == {"input_ids": input_ids, "labels": labels}
    assert result.report.format == case.removesuffix(" with input") == result.template["format"]
    assert result.train.features["input_ids"].feature.dtype == "int32"
    assert build_prompt(result.template, row) == prompt
    assert json.loads(json.dumps(result.template)) == result.template
    assert result.eval is None


def test_a_bare_string_fills_the_main_column():
    assert build_prompt(recognise_format(["question", "answer"]), "6*7?") == "Question: 6*7?\nAnswer:"
    assert build_prompt(recognise_format(["instruction", "input", "output"]), "Add {input}\\1") == "### Instruction:\nAdd {input}\\1\n\n### Response:"
    assert build_prompt(recognise_format(["text"]), "Once ") == "Once"
    assert "'question'" in error_of(build_prompt, recognise_format(["question", "answer"]), {"body": "x"}).cause
    assert error_of(build_prompt, recognise_format(["text"]), " \n").cause == "the prompt is empty"


@pytest.mark.parametrize(
    ("columns", "format_name"),
    [(["id", "text"], "text"), (["completion", "prompt"], "prompt/completion"), (["answer", "question", "id"], "question/answer"),
     (["instruction", "input", "output"], "instruction/output"), (["output", "instruction"], "instruction/output")],
)
def test_format_is_recognised_by_columns(columns, format_name):
    assert recognise_format(columns)["format"] == format_name


def test_unusable_columns_are_named():
    error = error_of(recognise_format, ["body", "id"])
    assert "'body', 'id'" in error.cause and "question + answer" in error.cure and "text;" in error.cure


def test_iter_learnt_gives_runs_of_learnt_text():
    labels = [NO, *ids("one"), EOS, NO, NO, *ids("two"), EOS]
    assert list(iter_learnt({"labels": labels}, TOKENIZER)) == ["one<|end|>", "two<|end|>"]


# --- EOS, cutting, the prompt prefix -----------------------------------------------------------------------------------------------------


def test_eos_is_never_doubled():
    assert build_example("", "Hi<|end|>", TOKENIZER, 8) == ([72, 105, EOS], [NO, 105, EOS], False)
    assert build_example("a:", "b<|end|>", TOKENIZER, 8) == ([97, 58, 98, EOS], [NO, NO, 98, EOS], False)


def test_a_cut_row_has_no_eos_and_one_that_just_fits_has():
    assert build_example("", "abc", TOKENIZER, 4) == ([97, 98, 99, EOS], [NO, 98, 99, EOS], False)
    assert build_example("", "abcd", TOKENIZER, 4) == ([97, 98, 99, 100], [NO, 98, 99, 100], True)  # room for all but the EOS
    assert build_example("ab", "cdef", TOKENIZER, 4) == ([97, 98, 99, 100], [NO, NO, 99, 100], True)
    assert build_example("abcd", "e", TOKENIZER, 4) == ([97, 98, 99, 100], [NO] * 4, True)


@pytest.mark.parametrize("max_length", [3, 4, 5, 6])
def test_a_cut_is_never_inside_a_character(max_length):
    input_ids, labels, was_cut = build_example("a", "b\U0001f600cd", TOKENIZER, max_length)
    assert was_cut and input_ids == (ids("ab") if max_length < 6 else ids("ab\U0001f600"))


def test_a_prompt_that_ends_in_a_space_keeps_its_tokens():
    template = recognise_format(["prompt", "completion"])
    prompt = build_prompt(template, {"prompt": "Answer: \n "})
    input_ids, labels, _ = build_example("Answer: ", "42", TOKENIZER, 64)
    assert prompt == "Answer:" and input_ids == ids("Answer:") + [SPACE_42, EOS] and labels == [NO] * 7 + [SPACE_42, EOS]
    # What the rule prevents: the tokens of the whole are not the tokens of the parts.
    naive = TOKENIZER("Answer: ")["input_ids"]
    assert TOKENIZER("Answer: 42")["input_ids"][: len(naive)] != naive


FORMATS_AND_ANSWERS = [(template, template["answer_column"]) for template in data.TEMPLATES if template["answer_column"]]
TEXT = st.text(st.one_of(st.sampled_from(" \n\t42:{}<é€\U0001f600"), st.characters(exclude_categories=["Cs"])), max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(template=st.sampled_from(data.TEMPLATES), fields=st.lists(TEXT, min_size=3, max_size=3), max_length=st.integers(2, 90))
def test_what_training_saw_is_what_generation_builds(template, fields, max_length):
    row = dict(zip([*template["columns"], *template["optional_columns"]], fields))
    batch = {name: [value] for name, value in row.items()}
    out = {name: column[0] for name, column in data._encode_batch(batch, TOKENIZER, template, max_length).items()}
    input_ids, labels = list(out["input_ids"]), list(out["labels"])
    if out["dropped"]:
        assert not input_ids and not labels
        return
    assert len(input_ids) == len(labels) <= max_length and PAD not in input_ids
    learnt = [label for label in labels if label != NO]
    assert len(learnt) == out["learnt_tokens"] > 0 and labels[0] == NO
    # Learnt labels are the row's own tokens, from one place on to the end.
    assert labels[len(labels) - len(learnt) :] == input_ids[len(labels) - len(learnt) :] == learnt
    # A text row's prompt is all of it; a prompt/completion row may have none.
    prompt_ids = []
    if template["answer_column"] and any(value.strip() for name, value in row.items() if name != template["answer_column"]):
        prompt_ids = TOKENIZER(build_prompt(template, row), add_special_tokens=False)["input_ids"]
    assert input_ids[: len(prompt_ids)] == prompt_ids
    assert len(learnt) == len(input_ids) - max(1, len(prompt_ids))
    answer = row[template["answer_column"] or "text"]
    if out["cut"]:
        assert EOS not in input_ids
        assert not TOKENIZER.decode(input_ids).endswith("\ufffd") or "\ufffd" in "".join(fields)
    else:
        assert input_ids.count(EOS) == 1 and labels[-1] == EOS == input_ids[-1]
        assert TOKENIZER.decode(input_ids[:-1]).endswith(answer)


def test_dropped_and_cut_rows_are_counted(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": " "}, {"question": "", "answer": "b"},
            {"question": "long" * 20, "answer": "b"}, {"question": "a", "answer": "b" * 99}]
    report = prepare(write_jsonl(tmp_path / "a.jsonl", rows), max_length=40).report
    assert (report.rows_read, report.rows_kept, report.rows_cut) == (5, 2, 1)
    assert report.rows_dropped == {"empty answer": 1, "empty question": 1, data.NO_ROOM: 1}
    first = len("Question: a\nAnswer: b") + 1
    assert (report.tokens, report.longest_row_tokens, report.rows_ending_in_eos) == (first + 40, 40, 1)
    assert report.learnt_tokens == 3 + (40 - len("Question: a\nAnswer:"))
    assert report.longest_uncut_tokens == len("Question: a\nAnswer: ") + 99 + 1
    assert report.p50_tokens in (first, 40) and report.p95_tokens == 40
    assert report.to_dict()["rows_dropped"]["empty answer"] == 1
    assert report.summary().count("\n") == 1 and "2 of 5 rows kept" in report.summary() and "1 cut at 40 tokens" in report.summary()


def test_nothing_left_to_learn_is_an_error(tmp_path):
    error = error_of(prepare, write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 80, "completion": "y"}] * 3))
    assert "p95 prompt: 80 tokens" in error.cause and "3 " in error.cause and "--max_length above 80" in error.cure
    error = error_of(prepare, write_jsonl(tmp_path / "b.jsonl", [{"text": ""}, {"text": " "}]))
    assert "all 2 rows dropped (2 empty text)" in error.cause
    error = error_of(prepare_data, str(tmp_path / "b.jsonl"), TOKENIZER, max_length=4096, model_max_length=2048)
    assert "4096" in error.cause and "2048" in error.cure


# --- split, cache, ranks -----------------------------------------------------------------------------------------------------------------


def test_a_row_stays_on_its_side_when_rows_are_added(tmp_path):
    rows = [{"text": f"row {index}"} for index in range(400)]
    few = prepare(write_jsonl(tmp_path / "few.jsonl", rows[:200]), eval_fraction=0.2, seed=3)
    many = prepare(write_jsonl(tmp_path / "many.jsonl", rows[::-1] + rows[:50]), eval_fraction=0.2, seed=3, max_length=5)
    other = prepare(tmp_path / "few.jsonl", eval_fraction=0.2, seed=4)

    def texts(side, cut=None):
        return {tuple(row["input_ids"][:cut]) for row in side}

    assert few.report.rows_eval == len(few.eval) and len(few.train) + len(few.eval) == 200
    assert 20 <= len(few.eval) <= 60 and 50 <= len(many.eval) <= 130
    assert not texts(few.train) & texts(few.eval)
    assert texts(few.eval) != texts(other.eval)
    # The other order, more rows, duplicates and another max_length change nobody's side.
    keys = {row["text"]: side for row, side in zip(rows[:200], data._held_out(_keys(rows[:200]), 0.2, 3))}
    longer = prepare(tmp_path / "many.jsonl", eval_fraction=0.2, seed=3)
    for text, held_out in keys.items():
        tokens = tuple(TOKENIZER(text)["input_ids"]) + (EOS,)
        assert (tokens in texts(few.eval)) == (tokens in texts(longer.eval)) == held_out
    assert len(many.eval) == len(longer.eval)


def _keys(rows):
    import numpy as np

    return np.array([data._row_key("", row["text"]) for row in rows])


def test_a_side_without_rows_is_an_error(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": "only one"}])
    assert "leaves no row for" in error_of(prepare, name, eval_fraction=0.5).cause


def cache_files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.arrow")}


def test_second_call_reuses_the_cache_and_a_change_does_not(tmp_path, own_cache):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": "row one"}, {"text": "row two"}])
    first = prepare(name)
    files = cache_files(own_cache)
    assert len(files) == 2 and first.train.cache_files  # the rows and their tokens, mapped from disk
    TOKENIZER(["a", "bb"], padding=True)  # leaves a padding setting behind, which is not a change
    copied = tmp_path / "elsewhere.jsonl"
    copied.write_bytes(Path(name).read_bytes())
    reloaded = make_tokenizer()
    for again in (prepare(name), prepare(copied), prepare_data(name, reloaded, max_length=64, model_max_length=2048)):
        assert again.train.to_list() == first.train.to_list() and again.report == first.report
        assert cache_files(own_cache) == files
    reloaded.add_tokens(["one"])
    assert prepare_data(name, reloaded, max_length=64, model_max_length=2048).train[0]["input_ids"] != first.train[0]["input_ids"]
    assert len(cache_files(own_cache)) == 3
    assert prepare(name, max_length=3).report.rows_cut == 2 and len(cache_files(own_cache)) == 4
    write_jsonl(tmp_path / "a.jsonl", [{"text": "row six"}])
    assert prepare(name).report.rows_read == 1 and len(cache_files(own_cache)) == 6


def test_another_process_finds_the_cache(tmp_path, own_cache):
    name = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    prepare(name)
    files = cache_files(own_cache)
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_data; test_data.prepare(sys.argv[1])"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, name], check=True, cwd=ROOT, env=environment, capture_output=True)
    assert cache_files(own_cache) == files


def test_an_error_waits_until_the_first_rank_context_is_left(tmp_path):
    steps = []

    @contextlib.contextmanager
    def context():
        steps.append("in")
        yield
        steps.append("out")  # a barrier: not reached if the error passed through here

    error_of(prepare, str(tmp_path / "missing.jsonl"), first_rank_context=context)
    assert steps == ["in", "out"]


# --- sources -----------------------------------------------------------------------------------------------------------------------------

QA = [{"question": "q1", "answer": "a1"}, {"question": "Größe", "answer": 'a, "b"\nc'}]


def write_source(folder: Path, kind: str) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in QA)
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(QA), path)
        return path
    text = {
        "jsonl": lines, "jsonl.gz": lines, "json": json.dumps(QA, indent=1),
        "csv": 'question,answer\nq1,a1\n\n"Größe","a, ""b""\nc"\n',
    }[kind]
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    path = write_source(tmp_path, kind)
    assert load_rows(str(path)).to_list() == QA
    assert load_rows(str(tmp_path)).to_list() == QA  # the folder that holds it; the cache below it is .arrow


def test_json_that_is_jsonl_and_a_spreadsheet_with_semicolons(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_rows(str(tmp_path / "a.json"))["text"][:] == ["one", "two"]
    (tmp_path / "a.csv").write_bytes("\ufeffquestion;answer\r\nq;a\r\n".encode())
    assert load_rows(str(tmp_path / "a.csv")).to_list() == [{"question": "q", "answer": "a"}]


def test_bom_crlf_blank_lines_and_other_columns_are_fine(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two", "extra": 1}')
    assert load_rows(str(tmp_path / "a.jsonl")).to_list() == [{"text": "one"}, {"text": "two"}]


def test_optional_input_may_be_missing_or_null(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "input": "x", "output": "b"}]
    result = prepare(write_jsonl(tmp_path / "a.jsonl", rows), max_length=128)
    assert result.train[0] == result.train[1] != result.train[2]


def test_a_folder_is_read_without_its_held_out_splits(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train-00.jsonl", [{"text": "one"}])
    write_jsonl(folder / "data" / "train-01.jsonl", [{"text": "two"}])
    write_jsonl(folder / "data" / "test-00.jsonl", [{"text": "secret"}])
    (folder / "dataset_info.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("not data")
    assert load_rows(str(folder))["text"][:] == ["one", "two"]
    (folder / "more.csv").write_text("text\nthree\n")
    assert "several kinds: .csv, .jsonl" in error_of(load_rows, str(folder)).cause
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("no data")
    assert "README.md" in error_of(load_rows, str(empty)).cause


def test_the_tiny_names_bring_their_own_rows(monkeypatch, tmp_path):
    tiny_falcon = pytest.importorskip("falcon_finetune.tiny_falcon")
    folder = tiny_falcon.cache_folder() / f"tiny-7b-style-v{tiny_falcon.RECIPE_VERSION}"
    if not (folder / "train.jsonl").exists():
        pytest.skip("the tiny model is not built yet on this machine (scripts/quickstart.sh builds it)")
    assert load_rows("tiny-7b-style").column_names == ["prompt", "completion"]


BAD_FILES = {
    "invalid JSON": ("a.jsonl", b'{"text": "one"}\n{"text": "two" "x"}\n', "a.jsonl:2:16: invalid JSON (expecting ',' delimiter)", '{"text": "two"'),
    "unterminated string": ("a.jsonl", b'{"text": "one"}\n\n{"text": "oops\n', "a.jsonl:3:10: invalid JSON (unterminated string", '{"text": "oops'),
    "not an object": ("a.jsonl", b'{"text": "one"}\n["text"]\n', "a.jsonl:2: the row is a list, not an object", "{"),
    "not UTF-8": ("a.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n', "a.jsonl:2 byte 14: 0xe9 is not UTF-8 (it looks like latin1)", "iconv -f latin1 -t utf-8"),
    "UTF-16": ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "a.jsonl:1 byte 1: 0xff is not UTF-8 (it looks like utf-16)", "iconv -f utf-16"),
    "missing column": ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n{"text": "x"}\n{}\n', "a.jsonl:2: no 'text'; found: 'body' (2 rows", "remove"),
    "null": ("a.jsonl", b'{"text": "one"}\n{"text": null}\n', "a.jsonl:2: 'text' is null, not text", "text"),
    "number": ("a.jsonl", b'{"text": 1}\n{"text": "a"}\n{"text": true}\n', "a.jsonl:1: 'text' is a number, not text (2 rows", "text"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: 'text' holds half of a surrogate", "text"),
    "huge number": ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: invalid JSON", "correct"),
    "deep": ("a.jsonl", b"[" * 100_000, "a.jsonl:1: invalid JSON", "correct"),
    "no usable column": ("a.jsonl", b'{"body": "one", "id": 1}\n', "a.jsonl:1 has no usable columns; found: 'body', 'id'", "question + answer"),
    "empty": ("a.jsonl", b"", "a.jsonl has no rows", "rows"),
    "blank": ("a.jsonl", b"\n \r\n", "a.jsonl has no rows", "rows"),
    "empty list": ("a.json", b"[]", "a.json has no rows", "rows"),
    "invalid list": ("a.json", b'[\n {"text": "one"},\n {"text": }\n]', "a.json:3:11: invalid JSON", '{"text": }'),
    "list without end": ("a.json", b'[\n {"text": "one"}', "a.json:2:17: invalid JSON", "list of objects"),
    "list goes on": ("a.json", b'[{"text": "one"}]\n]', "a.json:2:1: invalid JSON (extra data)", "list of objects"),
    "list of strings": ("a.json", b'[\n"one"]', "a.json:2: the row is text, not an object", "{"),
    "one pretty object": ("a.json", b'{\n "rows": []\n}', "a.json:1", "list of objects"),
    "ragged CSV": ("a.csv", b"question,answer\na,b\nc,d,e\n", "a.csv:3: 3 fields, but the header has 2", "quote fields"),
    "CSV quote": ("a.csv", b'question,answer\na,"b\n', "a.csv:2: invalid CSV", "quote"),
    "CSV columns": ("a.csv", b"body,id\na,1\n", "a.csv:2 has no usable columns; found: 'body', 'id'", "text"),
    "CSV twice": ("a.csv", b"text,text\na,b\n", "a.csv:1: column 'text' stands twice", "rename"),
    "CSV header only": ("a.csv", b"question,answer\n", "a.csv has no rows", "rows"),
    "CSV not UTF-8": ("a.csv", b"question,answer\na,b\nc,\xe9\n", "a.csv:3 byte 3: 0xe9", "iconv"),
    "gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 999)[:-12], "a.jsonl.gz is no complete gzip file", "again"),
    "Parquet": ("a.parquet", b"PAR1 cut short", "a.parquet is no complete Parquet file", "again"),
    "kind": ("a.docx", b"x", "a.docx is of no kind that can be read", ".jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_has_its_place_and_cure(case, tmp_path, own_cache):
    name, content, cause, cure = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    error = error_of(load_rows, str(tmp_path / name))
    assert f"{tmp_path}/{cause}" in error.cause and cure in error.cure
    assert not list(own_cache.rglob("*.arrow")), "a bad file leaves no data in the cache"


def test_null_and_number_columns_of_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, None]}), tmp_path / "a.parquet")
    assert "a.parquet row 2: 'text' is null, not text (2 rows" in error_of(load_rows, str(tmp_path / "a.parquet")).cause
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    assert "row 1: 'text' is a number" in error_of(load_rows, str(tmp_path / "b.parquet")).cause


def test_a_mistyped_path_names_its_neighbour(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    assert f"did you mean {tmp_path}/train.jsonl?" == error_of(load_rows, str(tmp_path / "trian.jsonl")).cure
    assert "no file or folder 'nope.csv'" in error_of(load_rows, "nope.csv").cause


JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(st.characters(), max_size=8), st.lists(st.integers(), max_size=2))
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "question", "answer", "instruction", "output", "input", "id"]), JSON_VALUES, max_size=4), max_size=5)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, kind=st.sampled_from(["jsonl", "json", "csv"]), junk=st.binary(max_size=12), at=st.integers(0, 200), damage=st.booleans())
def test_any_file_gives_text_or_an_error_of_the_user(rows, kind, junk, at, damage):
    with tempfile.TemporaryDirectory() as folder:
        content = (json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(content[:at] + junk + content[at:] if damage else content)
        try:
            loaded = load_rows(str(path))
        except UserError:
            return
        assert len(loaded) and all(isinstance(value, str) for row in loaded for value in row.values())


# --- the hub -----------------------------------------------------------------------------------------------------------------------------

HUB_FILES = {"u/good": b'{"question": "q1", "answer": "a1", "id": 7}\n', "u/bad": b'{"text": null}\n{"text": "a"}\n{"text": null}\n', "u/number": b'{"text": 1}\n'}
HUB_COMMIT = "0" * 40


class StubHub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub's API that loading a data set of one file takes; "u/gated" refuses its files."""

    def log_message(self, *arguments):
        pass

    def reply(self, code: int, body: bytes = b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        name = next((name for name in [*HUB_FILES, "u/gated"] if f"/{name}" in path), None)
        if name is None:
            self.reply(404, X_Error_Code="RepoNotFound")
        elif path.startswith(f"/api/datasets/{name}/tree"):
            listing = [{"type": "file", "path": "train.jsonl", "size": len(HUB_FILES[name]), "oid": name}]
            self.reply(200, json.dumps([] if path.endswith("/data") else listing).encode(), Content_Type="application/json")
        elif path.startswith("/api/"):
            info = {"id": name, "sha": HUB_COMMIT, "siblings": [{"rfilename": "train.jsonl"}], "tags": [], "private": False, "downloads": 0}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        elif name == "u/gated":
            self.reply(401, X_Error_Code="GatedRepo")
        elif path.endswith("/train.jsonl"):
            self.reply(200, HUB_FILES[name], ETag=f'"{name[2:]}"', X_Repo_Commit=HUB_COMMIT)
        else:
            self.reply(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


HUB_SCRIPT = """
import json, sys, time
from falcon_finetune.data import load_rows
from falcon_finetune.options import UserError
out = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        out[name] = load_rows(name).to_list()
    except UserError as error:
        out[name] = [error.cause, error.cure]
    assert time.perf_counter() - start < 8, name
print(json.dumps(out))
"""


def ask_hub(endpoint: str, home: Path, names: list[str], **environment) -> dict:
    """In a process of its own, since huggingface_hub reads its endpoint once, at import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", **environment}
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT, *names], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_data_sets_and_the_ways_they_cannot_be_had(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StubHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        out = ask_hub(endpoint, tmp_path, ["u/good", "u/bad", "u/number", "u/nope", "u/gated"])
    finally:
        server.shutdown()
        server.server_close()
    assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
    assert "u/bad row 1: 'text' is null, not text (2 such rows)" in out["u/bad"][0]
    assert "column 'text' is int64, not text" in out["u/number"][0]
    assert f"{endpoint} has no such data set" in out["u/nope"][0] and "spelling" in out["u/nope"][1]
    assert "gated" in out["u/gated"][0] and "accept its terms" in out["u/gated"][1]
    # The hub has gone: what was loaded before is still had, the rest is a quick error.
    out = ask_hub(endpoint, tmp_path, ["u/good", "u/nope"])
    assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
    assert f"{endpoint} cannot be reached" in out["u/nope"][0] and "not in the cache" in out["u/nope"][0]
    out = ask_hub(endpoint, tmp_path, ["u/good", "u/nope"], HF_HUB_OFFLINE="1")
    assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
    assert "HF_HUB_OFFLINE is set" in out["u/nope"][0]


# --- real data ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.exists(), reason="../shared/data/gsm8k/train.jsonl is not here")
def test_gsm8k():
    result = prepare_data(str(GSM8K), TOKENIZER, max_length=2048, model_max_length=2048, eval_fraction=0.05)
    report = result.report
    assert (report.format, report.rows_read, report.rows_kept, report.rows_cut, report.rows_dropped) == ("question/answer", 7473, 7473, 0, {})
    assert report.rows_ending_in_eos == 7473 and 280 < report.rows_eval < 470 and len(result.train) == 7473 - report.rows_eval
    answers = {f" {json.loads(line)['answer']}<|end|>" for line in open(GSM8K, encoding="utf-8")}
    seen = [*result.eval["labels"][:], *result.train["labels"][:600]]
    assert {"".join(iter_learnt({"labels": labels}, TOKENIZER)) for labels in seen} <= answers
