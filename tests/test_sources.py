"""Sources: every kind of file, folders, the hub, the columns that decide the format, and each fault with its place."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.stub_hub import NO_PROXY_ENVIRONMENT, StubHub, StubRepo
from tests.user_errors import error_of

from falcon_finetune.options import UserError
from falcon_finetune.sources import load_rows, recognise_format

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).resolve().parent.parent
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


def test_a_folder_is_read_without_its_held_out_splits(tmp_path, write_jsonl):
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


def test_a_mistyped_path_names_its_neighbour(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    assert f"near it: {tmp_path}/train.jsonl" in error_of(load_rows, str(tmp_path / "trian.jsonl")).cure
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


# --- formats ----------------------------------------------------------------------------------------------------------------------------


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


# --- the hub -----------------------------------------------------------------------------------------------------------------------------

HUB_SCRIPT = """
import json, sys, time
from falcon_finetune.options import UserError
from falcon_finetune.sources import load_rows
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
    variables = kept | NO_PROXY_ENVIRONMENT | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT, *names], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_data_sets_and_the_ways_they_cannot_be_had(tmp_path):
    contents = {
        "u/good": b'{"question": "q1", "answer": "a1", "id": 7}\n', "u/bad": b'{"text": null}\n{"text": "a"}\n{"text": null}\n',
        "u/number": b'{"text": 1}\n', "u/broken": b'{"text": \n',
    }
    data_sets = {name: StubRepo({"train.jsonl": content}) for name, content in contents.items()}
    data_sets |= {"u/gated": StubRepo({"train.jsonl": b'{"text": "a"}\n'}, gated=True), "u/refused": StubRepo(plain_status=403)}
    with StubHub(data_sets=data_sets) as hub:
        out = ask_hub(hub.endpoint, tmp_path, [*data_sets, "u/nope"])
    assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
    assert "u/bad row 1: 'text' is null, not text (2 such rows)" in out["u/bad"][0]
    assert "column 'text' is int64, not text" in out["u/number"][0]
    assert "data set 'u/broken' cannot be loaded" in out["u/broken"][0] and "local file with -d" in out["u/broken"][1]
    assert f"{hub.endpoint} has no data set 'u/nope'" in out["u/nope"][0] and "spelling" in out["u/nope"][1]
    assert "data set u/gated is gated" in out["u/gated"][0] and f"accept its terms at {hub.endpoint}/datasets/u/gated" in out["u/gated"][1]
    assert "HTTP 403" in out["u/refused"][0]
    # The hub has gone: what was loaded before is still had, the rest is a quick error.
    out = ask_hub(hub.endpoint, tmp_path, ["u/good", "u/nope"])
    assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
    assert f"the hub at {hub.endpoint} cannot be reached for u/nope" in out["u/nope"][0] and "local file with -d" in out["u/nope"][1]
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        out = ask_hub(hub.endpoint, tmp_path, ["u/good", "u/nope"], **{variable: "1"})
        assert out["u/good"] == [{"question": "q1", "answer": "a1"}]
        assert "data set u/nope is not (completely) in the cache" in out["u/nope"][0] and f"{variable}=1" in out["u/nope"][0]
