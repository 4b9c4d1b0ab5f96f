"""run.json and the run directory: who may write where, what is read back, and files that are complete or absent."""

import json
import os

import pytest

from falcon_finetune.options import UserError, parse_options
from falcon_finetune.run_record import RUN_FILE, claim_output_dir, plot_losses, read_run, versions, write_complete, write_run


def options_for(folder, *flags: str):
    return parse_options(["-o", str(folder), *flags])


def start_run(folder, *flags: str) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": "running", "options": options_for(folder, *flags).to_dict()}
    write_run(folder, record)
    return record


# ------------------------------------------------------------------------------------------------------------- the run directory


def test_an_absent_or_empty_folder_is_free_and_stays_as_it_is(tmp_path):
    assert claim_output_dir(options_for(tmp_path / "a" / "b")) is None
    assert not (tmp_path / "a").exists()
    assert claim_output_dir(options_for(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="run is a file"):
        claim_output_dir(options_for(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError):
        claim_output_dir(options_for(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write in"):
        claim_output_dir(options_for(tmp_path / "run"))
    tmp_path.chmod(0o700)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds files that are not a run .thesis.tex first"):
        claim_output_dir(options_for(tmp_path))


def test_the_same_run_is_recognised(tmp_path):
    record = start_run(tmp_path, "-s", "7")
    assert claim_output_dir(options_for(tmp_path, "-s", "7")) == record
    # How a run is carried out may change between its start and its continuation.
    assert claim_output_dir(options_for(tmp_path, "-s", "7", "--resume", "--recompute", "full", "--micro_batch_tokens", "99", "--checkpoint_steps", "2")) == record


def test_another_run_is_refused_with_what_differs(tmp_path):
    start_run(tmp_path, "-s", "7")
    with pytest.raises(UserError) as error:
        claim_output_dir(options_for(tmp_path, "-s", "8"))
    assert error.value.cause == f"{tmp_path} holds another run (steps 7 -> 8)"
    with pytest.raises(UserError, match=r"max_length 512 -> 64, steps 7 -> 50, learning_rate 0.0002 -> 0.001, \.\.\.\)"):
        claim_output_dir(options_for(tmp_path, "--max_length", "64", "--learning_rate", "1e-3", "--lora_r", "8"))


# ---------------------------------------------------------------------------------------------------------------------- run.json


def test_what_is_written_is_read_back(tmp_path):
    record = {"status": "finished", "losses": [1.5, 0.25], "name": "Grüße 鷹"}
    write_run(tmp_path, record)
    assert read_run(tmp_path) == record
    assert read_run(str(tmp_path)) == record
    assert "鷹" in (tmp_path / RUN_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ("", "{", '{"status": "run', "[1]", "null", "\x00"))
def test_a_damaged_run_json_is_told(text, tmp_path):
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(UserError, match="run.json is damaged"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="run.json is damaged"):
        claim_output_dir(options_for(tmp_path))


@pytest.mark.parametrize("options", (None, [], "x"))
def test_a_run_json_without_options_is_told(options, tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps({"status": "running", "options": options}))
    with pytest.raises(UserError):
        claim_output_dir(options_for(tmp_path))


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / RUN_FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="is damaged"):
        read_run(tmp_path)


def test_a_folder_without_run_json_is_told(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------------- complete or absent


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "card.md"
    write_complete(path, "long " * 1000)
    write_complete(path, "short")
    assert path.read_text() == "short"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "card.md"
    write_complete(path, "old")
    with pytest.raises(TypeError):
        write_complete(path, None)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_a_byte_that_is_no_text_is_written_escaped(tmp_path):
    write_complete(tmp_path / "card.md", "new \udcff")  # a byte of the command line that was not UTF-8
    assert (tmp_path / "card.md").read_text() == "new \\udcff"


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / RUN_FILE
    write_complete(path, "old")
    with open(path, encoding="utf-8") as reader:
        write_complete(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("losses, eval_losses", (([2.0, 1.0], []), ([float(50 - i) for i in range(45)], [(10, 3.0), (40, 2.0)])))
def test_the_loss_plot_is_a_picture(losses, eval_losses, tmp_path):
    plot_losses(tmp_path, losses, eval_losses, "tiny")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_versions_name_the_stack():
    found = versions()
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"} <= found.keys()
    assert all(number[0].isdigit() for number in found.values())
