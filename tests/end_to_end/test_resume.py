"""A killed run, started again by the same command, ends where an undisturbed one ends; a finished run is left alone."""

import hashlib
import json
import shutil
import time

import pytest
import torch

STEPS = 30
FLAGS = ("-q", "4bit", "--compute_dtype", "fp32", "-s", str(STEPS), "-b", "4", "--lora_r", "8", "--lora_dropout", "0.1",
         "--lr_scheduler_type", "cosine", "--warmup_steps", "2", "--checkpoint_steps", "10")  # fmt: skip


def contents(folder) -> dict:
    """Bytes and time of change of every file under a folder."""
    return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def flags(falcon, questions):
    return ("-m", falcon("40b"), "-d", questions, *FLAGS)


@pytest.fixture(scope="module")
def undisturbed(shop, flags):
    return shop.train(*flags, to="undisturbed")


@pytest.fixture(scope="module")
def killed(shop, flags):
    """What is left of a run that was killed once its first checkpoint was there: its folder, and its run.json of that moment."""
    run = shop.finetune(*flags, to="killed")
    state = run.run_dir / "checkpoint-10" / "trainer_state.json"
    ends = time.monotonic() + 120
    while not state.exists() and run.process.poll() is None and time.monotonic() < ends:
        time.sleep(0.002)
    run.kill()
    finished = run.finish()
    assert state.exists() and finished.code == -9, finished.stderr[-2000:]
    assert not (run.run_dir / "adapter_model.safetensors").exists(), "it was finished before it was killed"
    return run.run_dir, finished.record


def test_killed_run_continues_to_the_same_adapter(shop, flags, undisturbed, killed):
    folder, left = killed
    assert left["status"] == "running" and left["losses"] == []
    continued = shop.train(*flags, to=folder.name)
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text()) if (folder / "checkpoint-10").exists() else {"global_step": 10}
    assert state["global_step"] == 10
    assert f"step 1/{STEPS}" not in continued.stderr, "it began anew"
    wanted = undisturbed.adapter
    assert continued.adapter.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in continued.adapter.items())
    assert continued.record["losses"] == undisturbed.record["losses"]
    assert len(continued.record["losses"]) == STEPS
    assert continued.record["status"] == "finished"


def test_adapter_moves_between_checkpoint_and_end(undisturbed):
    from safetensors.torch import load_file

    folder = undisturbed.run_dir
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-20", "checkpoint-30"]  # the last two are kept
    before = load_file(folder / "checkpoint-20" / "adapter_model.safetensors")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in undisturbed.adapter.items())


def test_finished_run_is_left_alone(shop, flags, undisturbed):
    before = contents(undisturbed.run_dir)
    again = shop.finetune(*flags, to="undisturbed").finish()
    assert again.code == 0
    assert "already finished" in again.stderr and len(again.stderr.splitlines()) == 1
    assert contents(undisturbed.run_dir) == before


def test_run_killed_between_its_last_checkpoint_and_its_end_is_finished_by_the_same_command(shop, flags, undisturbed):
    folder = shop.folder / "almost"
    shutil.copytree(undisturbed.run_dir, folder)
    record = json.loads((folder / "run.json").read_text())
    record["options"]["output_dir"] = str(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    (folder / "adapter_model.safetensors").unlink()
    finished = shop.train(*flags, to=folder.name)
    assert finished.record["status"] == "finished" and finished.record["losses"] == undisturbed.record["losses"]
    assert all(torch.equal(tensor, undisturbed.adapter[name]) for name, tensor in finished.adapter.items())


def test_another_number_of_rows_a_step_does_not_continue(shop, flags, undisturbed):
    folder = shop.folder / "two-ranks"
    shutil.copytree(undisturbed.run_dir, folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    asked = shop.finetune(*flags, to=folder.name, ranks=2).finish()
    assert asked.code == 1 and asked.stderr.count("was started with 4 rows a step, this command makes 8") == 1, asked.stderr


def test_changed_rows_do_not_continue(shop, falcon, questions, undisturbed):
    folder, mine = shop.folder / "changed", shop.folder / "changing.jsonl"
    shutil.copy(questions, mine)
    flags = ("-m", falcon("40b"), "-d", mine, *FLAGS)
    shutil.copytree(undisturbed.run_dir, folder)
    record = json.loads((folder / "run.json").read_text())
    record["options"]["dataset_name"] = str(mine)
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    mine.write_text(mine.read_text().replace("horse", "mouse"))
    asked = shop.finetune(*flags, to=folder.name).finish()
    assert asked.code == 2 and "have changed since this run was started" in asked.stderr, asked.stderr
    shutil.copy(questions, mine)
    continued = shop.train(*flags, to=folder.name)
    assert f"continuing from checkpoint-{STEPS}" in continued.stderr and continued.record["resumed_from"] == f"checkpoint-{STEPS}"
