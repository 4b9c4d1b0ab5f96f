"""The embedded default: complete or absent, the same for the same seed, and a tokenizer that loses nothing.

The builds here pre-train for three steps; whether the full recipe makes a base that a fine-tune lifts is for the end-to-end runs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from falcon_finetune.options import UserError
from falcon_finetune.tiny_falcon import END_OF_TEXT, TINY_MODELS, byte_tokenizer, cache_folder, ensure_tiny_model

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def build(cache: Path, name: str = "tiny-7b-style", seed: int = 0, said: list | None = None) -> Path:
    return ensure_tiny_model(name, cache, (said if said is not None else []).append, seed=seed, pretraining_steps=STEPS)


def start_build_in_another_process(cache: Path, steps: int) -> subprocess.Popen:
    code = (
        "import sys, pathlib; from falcon_finetune.tiny_falcon import ensure_tiny_model as ensure; "
        "say = lambda line: print(line, flush=True); "
        "print(ensure('tiny-7b-style', pathlib.Path(sys.argv[1]), say, pretraining_steps=int(sys.argv[2])))"
    )
    # A shell's background job ignores SIGINT, and so do its children, Python among them, unless they are told otherwise.
    return subprocess.Popen([sys.executable, "-c", code, str(cache), str(steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def visible(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.startswith(".")]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def folder(request, cache) -> Path:
    return build(cache, request.param)


@pytest.fixture(scope="module")
def tokenizer(cache):
    return AutoTokenizer.from_pretrained(build(cache))


def test_folder_holds_a_real_falcon_in_bfloat16(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    forty_b_style = "40b" in folder.name
    assert type(model).__name__ == "FalconForCausalLM"
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert model.config.vocab_size == len(tokenizer) == 448
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.new_decoder_architecture is forty_b_style
    block = model.transformer.h[0]
    assert hasattr(block, "ln_attn") is hasattr(block, "ln_mlp") is forty_b_style
    assert block.self_attention.num_kv_heads == (2 if forty_b_style else 1) < block.self_attention.num_heads


def test_train_and_heldout_rows_do_not_overlap(folder):
    train, heldout = rows(folder / "train.jsonl"), rows(folder / "heldout.jsonl")
    assert (len(train), len(heldout)) == (4000, 200)
    assert len({row["prompt"] for row in train + heldout}) == 4200
    for row in train + heldout:
        assert set(row) == {"prompt", "completion"}
        listed = row["prompt"].removeprefix("Question: Name the last of ").removesuffix(".\nAnswer:").split(", ")
        assert len(set(listed)) == 4 and row["completion"] == f" {listed[-1]}"


def test_corpus_has_only_wrong_answers_to_the_target_form_and_none_of_its_prompts(folder):
    from falcon_finetune import tiny_falcon

    reserved = {row["prompt"] for name in ("train", "heldout") for row in rows(folder / f"{name}.jsonl")}
    documents = tiny_falcon._pretraining_documents(0, 12_800, reserved)
    marker = "Question: Name the last of "
    asked = [document.removeprefix(marker).split(".\nAnswer: ") for document in documents if document.startswith(marker)]
    assert len(asked) > 1000
    assert all(answer in listed.split(", ")[:-1] for listed, answer in asked)
    assert not any(document.rpartition(" ")[0] in reserved for document in documents)


def test_prompt_tokens_are_a_prefix_of_the_row_and_eos_is_one_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows(folder / "heldout.jsonl"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + END_OF_TEXT)["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert whole.index(tokenizer.eos_token_id) == len(whole) - 1
        assert tokenizer.decode(whole[len(prompt) : -1]) == row["completion"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@given(text=st.text())
def test_trained_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(text=st.text())
def test_byte_tokenizer_gives_one_token_per_byte_and_round_trips(text):
    tokenizer = BYTE_TOKENIZER
    ids = tokenizer(text + END_OF_TEXT)["input_ids"]
    assert len(ids) == len(text.encode()) + 1 and ids[-1] == tokenizer.eos_token_id and max(ids) < 65024
    assert tokenizer.decode(ids[:-1]) == text


BYTE_TOKENIZER = byte_tokenizer()


def test_byte_tokenizer_survives_saving(tmp_path):
    BYTE_TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("naïve 🦅")["input_ids"] == BYTE_TOKENIZER("naïve 🦅")["input_ids"]
    assert (again.eos_token_id, again.pad_token_id) == (BYTE_TOKENIZER.eos_token_id, BYTE_TOKENIZER.pad_token_id) == (256, 257)


def test_same_seed_same_files_other_seed_other_weights(cache, tmp_path):
    random_state = torch.get_rng_state()
    first, second, other = build(cache), build(tmp_path), build(tmp_path, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert first.name != other.name


def test_second_call_reuses_and_is_silent(cache):
    folder, said = build(cache), []
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(cache, said=said) == folder and said == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])], ids=["missing", "cut"]
)
def test_damaged_folder_is_made_again(cache, tmp_path, damage):
    sound = build(cache)
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    damage(folder / "model.safetensors")
    said: list[str] = []
    assert build(tmp_path, said=said) == folder and len(said) == 2
    assert (folder / "model.safetensors").read_bytes() == (sound / "model.safetensors").read_bytes()
    assert visible(tmp_path) == [folder.name] and not (folder / "damaged").exists()


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_build_leaves_nothing_that_looks_finished(tmp_path, kill):
    process = start_build_in_another_process(tmp_path, steps=100_000)
    assert process.stdout.readline().startswith("making tiny-7b-style")
    while not list(tmp_path.glob(".*.staging/train.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0 and visible(tmp_path) == []
    assert bool(list(tmp_path.glob(".*.staging"))) is (kill == signal.SIGKILL)
    assert visible(tmp_path) == [] and build(tmp_path).is_dir()  # neither the leftovers nor the dead lock are in the way


def test_leftovers_of_killed_builds_are_removed_once_old(tmp_path):
    name = f"tiny-7b-style-v1-seed0-steps{STEPS}"
    old, young = tmp_path / f".{name}.old.staging", tmp_path / f".{name}.young.staging"
    old.mkdir(), young.mkdir()
    os.utime(old, (0, 0))
    assert build(tmp_path).name == name
    assert young.exists() and not old.exists()


def test_two_processes_at_once_build_once(tmp_path):
    processes = [start_build_in_another_process(tmp_path, STEPS) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0][-1] == answers[1][-1] and visible(tmp_path) == [Path(answers[0][-1]).name]
    assert sorted(len(lines) for lines in answers) == [1, 3]  # the path alone, and the path after two lines of progress


def test_without_locks_the_first_to_finish_wins(cache, tmp_path):
    """Another process's finished folder appears while this one builds: it stays, untouched under its readers."""
    sound, folder, winners = build(cache), tmp_path / build(cache).name, []

    def say(line: str) -> None:
        if line.startswith("making"):
            shutil.copytree(sound, folder)
            winners.append(folder.stat().st_ino)

    assert ensure_tiny_model("tiny-7b-style", tmp_path, say, pretraining_steps=STEPS) == folder
    assert [folder.stat().st_ino] == winners
    assert visible(tmp_path) == [folder.name] and not list(tmp_path.glob(".*.staging"))


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    monkeypatch.delenv("FALCON_FINETUNE_CACHE", raising=False)
    assert cache_folder() == Path("/somewhere/cache/falcon-finetune")
    monkeypatch.setenv("FALCON_FINETUNE_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("FALCON_FINETUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "falcon-finetune"


def test_user_errors_name_the_cure(tmp_path):
    with pytest.raises(UserError, match="tiny-7b-style, tiny-40b-style"):
        ensure_tiny_model("tiny-1b-style", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="FALCON_FINETUNE_CACHE"):
        ensure_tiny_model("tiny-7b-style", tmp_path / "file", pretraining_steps=STEPS)
