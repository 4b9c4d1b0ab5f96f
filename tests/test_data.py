"""Data: exact ids and labels for each format, the EOS rule, the prompt prefix, the split and the cache."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.user_errors import error_of

from falcon_finetune import data
from falcon_finetune.data import build_example, build_prompt, iter_learnt, prepare_data, prompts_and_answers
from falcon_finetune.sources import TEMPLATES, recognise_format

pytestmark = pytest.mark.usefixtures("own_cache")
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


def ids(text: str) -> list[int]:
    return list(text.encode())


def prepare(name, max_length=64, **more):
    return prepare_data(str(name), TOKENIZER, max_length=max_length, model_max_length=2048, **more)


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
def test_golden_rows(case, tmp_path, write_jsonl):
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


def test_iter_learnt_gives_runs_of_learnt_text():
    labels = [NO, *ids("one"), EOS, NO, NO, *ids("two"), EOS]
    assert list(iter_learnt({"labels": labels}, TOKENIZER)) == ["one<|end|>", "two<|end|>"]


def test_prompts_and_answers_to_score():
    rows = Dataset.from_list([{"instruction": "Add.", "input": None, "output": " 42\n"}, {"instruction": "Add. ", "input": "40 2", "output": "42"}])
    template = recognise_format(rows.column_names)
    prompts, answers = prompts_and_answers(template, rows)
    assert prompts == [build_prompt(template, row) for row in rows]
    assert prompts[0].endswith("### Response:") and "40 2" in prompts[1]
    assert answers == ["42", "42"]
    assert "plain text" in error_of(prompts_and_answers, recognise_format(["text"]), Dataset.from_list([{"text": "a"}])).cause
    assert "found: instruction" in error_of(prompts_and_answers, template, rows.select_columns(["instruction"])).cause
    assert "'instruction'" in error_of(prompts_and_answers, template, rows.select_columns(["output"])).cause


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


FORMATS_AND_ANSWERS = [(template, template["answer_column"]) for template in TEMPLATES if template["answer_column"]]
TEXT = st.text(st.one_of(st.sampled_from(" \n\t42:{}<é€\U0001f600"), st.characters(exclude_categories=["Cs"])), max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(template=st.sampled_from(TEMPLATES), fields=st.lists(TEXT, min_size=3, max_size=3), max_length=st.integers(2, 90))
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


def test_optional_input_may_be_missing_or_null(tmp_path, write_jsonl):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}, {"instruction": "a", "input": "x", "output": "b"}]
    result = prepare(write_jsonl(tmp_path / "a.jsonl", rows), max_length=128)
    assert result.train[0] == result.train[1] != result.train[2]


def test_dropped_and_cut_rows_are_counted(tmp_path, write_jsonl):
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


def test_nothing_left_to_learn_is_an_error(tmp_path, write_jsonl):
    error = error_of(prepare, write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 80, "completion": "y"}] * 3))
    assert "p95 prompt: 80 tokens" in error.cause and "3 " in error.cause and "--max_length above 80" in error.cure
    error = error_of(prepare, write_jsonl(tmp_path / "b.jsonl", [{"text": ""}, {"text": " "}]))
    assert "all 2 rows dropped (2 empty text)" in error.cause
    error = error_of(prepare_data, str(tmp_path / "b.jsonl"), TOKENIZER, max_length=4096, model_max_length=2048)
    assert "4096" in error.cause and "2048" in error.cure


# --- split, cache, ranks -----------------------------------------------------------------------------------------------------------------


def test_a_row_stays_on_its_side_when_rows_are_added(tmp_path, write_jsonl):
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


def test_a_side_without_rows_is_an_error(tmp_path, write_jsonl):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": "only one"}])
    assert "leaves no row for" in error_of(prepare, name, eval_fraction=0.5).cause


def cache_files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.arrow")}


def test_second_call_reuses_the_cache_and_a_change_does_not(tmp_path, own_cache, write_jsonl):
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


def test_another_process_finds_the_cache(tmp_path, own_cache, write_jsonl):
    name = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    prepare(name)
    files = cache_files(own_cache)
    code = "import sys; from tests.test_data import prepare; prepare(sys.argv[1])"
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
