"""The run directory of one run: complete, true, and of use without this project."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from falcon_finetune.data import prepare_data
from falcon_finetune.family import find_model, load_tokenizer
from falcon_finetune.generation import load_run
from falcon_finetune.lora import add_lora
from falcon_finetune.options import Options
from falcon_finetune.packed_falcon import PackedFalcon
from falcon_finetune.quantization import load_base

PROMISED = {"options", "base_model", "quantize_mode", "target_layers", "quantized_layers", "world_size", "effective_batch_size", "versions", "commit",
            "device", "peak_memory_gib", "peak_reserved_gib", "samples_per_second", "tokens_per_second", "losses", "eval_loss"}  # fmt: skip
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "run.json", "tokenizer.json", "tokenizer_config.json",
         "trainer_state.json"}  # fmt: skip


@pytest.fixture(scope="module")
def rows(trained, falcon):
    """The held-out and the training rows of the run, as it saw them."""
    options = trained.record["options"]
    tokenizer = load_tokenizer(find_model(str(falcon("7b"))))
    return prepare_data(options["dataset_name"], tokenizer, max_length=512, model_max_length=512, eval_fraction=options["eval_fraction"], seed=options["seed"])


@pytest.fixture(scope="module")
def random_run(shop, falcon, questions):
    return shop.train("-m", falcon("40b"), "-d", questions, "--random_weights", "-q", "8bit", "-s", "2", "-b", "2", "--lora_r", "8", to="random")


@pytest.fixture(scope="module")
def stranger(shop, trained, random_run, rows, tmp_path_factory):
    """What a process with PEFT and nothing of this project sees, and the logits it computed for the held-out rows."""
    folder = tmp_path_factory.mktemp("stranger")
    request = {"run_dir": str(trained.run_dir), "refused": str(random_run.run_dir), "out": str(folder / "logits.safetensors"),
               "rows": [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows.eval]}
    (folder / "request.json").write_text(json.dumps(request))
    script = folder / "load_without_project.py"  # away from the root: the project cannot be imported from there
    script.write_text(Path(__file__).with_name("load_without_project.py").read_text())
    finished = subprocess.run([sys.executable, script, folder / "request.json"], cwd=folder, env=shop.environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1]) | {"logits": load_file(folder / "logits.safetensors")}


def test_run_json_has_what_is_promised(trained, falcon):
    record = trained.record
    assert PROMISED <= record.keys()
    assert record["status"] == "finished"
    assert record["options"].keys() == Options.__dataclass_fields__.keys()
    assert record["base_model"] == str(falcon("7b"))
    assert (record["quantize_mode"], record["target_layers"], record["quantized_layers"]) == ("16bit", 8, 0)
    assert (record["world_size"], record["effective_batch_size"], record["steps"]) == (1, 4, 60)
    assert len(record["losses"]) == len(record["step_seconds"]) == 60
    assert record["losses"][-1] < record["losses"][0]
    assert [step for step, _ in record["eval_losses"]][:3] == [20, 40, 60]
    assert record["eval_loss"] == record["eval_losses"][-1][1]
    assert {name: version(name) for name in record["versions"]} == record["versions"]
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= record["versions"].keys()
    assert all(record[name] > 0 for name in ("peak_memory_gib", "peak_reserved_gib", "samples_per_second", "tokens_per_second"))
    assert record["device"].startswith("CPU")


def test_speed_counts_real_tokens(trained):
    record = trained.record
    seconds = sum(record["step_seconds"][record["warm_up_steps"] :])
    assert record["samples_per_second"] == pytest.approx(4 * (60 - record["warm_up_steps"]) / seconds, rel=1e-3)
    tokens_per_row = record["tokens_per_second"] / record["samples_per_second"]
    assert record["data"]["p50_tokens"] * 0.8 < tokens_per_row < record["data"]["longest_row_tokens"]


def test_files_are_there_and_nothing_else(trained):
    assert FILES <= {path.name for path in trained.run_dir.iterdir()}
    assert {path.name for path in trained.run_dir.iterdir()} - FILES == {"runs"}  # tensorboard's
    assert (trained.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(trained.adapter) == 16 and all(tensor.dtype == torch.float32 for tensor in trained.adapter.values())
    config = json.loads((trained.run_dir / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (8, 16, 0.05, "none")
    assert set(config["target_modules"]) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert config["base_model_name_or_path"] == trained.record["base_model"]


def test_model_card_has_the_facts(trained):
    record, card = trained.record, (trained.run_dir / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and "![loss](loss.png)" in card
    for fact in (record["base_model"], record["options"]["dataset_name"], "16bit", "60 steps of 4 rows", "rank 8, alpha 16, dropout 0.05", "learning rate 0.01",
                 f"{record['losses'][-1]:.4f}", f"{record['eval_loss']:.4f} on {record['data']['rows_eval']} held-out rows", record["device"],
                 f"torch {record['versions']['torch']}", f"{record['samples_per_second']:.2f} samples/s"):  # fmt: skip
        assert fact in card, fact


def test_trainer_state_has_every_step(trained):
    history = json.loads((trained.run_dir / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in history if "loss" in entry] == trained.record["losses"]


def test_peft_alone_loads_it_and_computes_the_same(trained, rows, stranger):
    assert stranger["project_modules"] == []
    assert stranger["adapted"] == 8 and stranger["eos"] == 256
    model, _, _ = load_run(trained.run_dir)
    with torch.no_grad():
        for index, row in enumerate(rows.eval):
            ours = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(ours, stranger["logits"][str(index)], rtol=1e-4, atol=1e-4)


def test_base_in_memory_never_changed(trained, stranger):
    """The loss that the run measured at its end is that of the base on disk with the saved adapter, by transformers' own forward."""
    assert stranger["loss"] == pytest.approx(trained.record["eval_loss"], rel=1e-4)


def test_lora_weights_changed(trained, falcon):
    base = find_model(str(falcon("7b")))
    model, _ = load_base(base, "16bit", torch.device("cpu"), PackedFalcon)
    fresh = add_lora(model, Options(**trained.record["options"]), base.identity).state_dict()
    for name, tensor in trained.adapter.items():
        start = fresh[name.replace(".weight", ".default.weight")]
        assert (tensor - start).norm() > 0.01 * max(start.norm(), 1e-3), name


def test_end_of_text_is_learnt(trained, rows):
    """After an answer the model stops, inside it it goes on; before training it did neither."""
    model, tokenizer, _ = load_run(trained.run_dir)
    eos = tokenizer.eos_token_id
    at_the_end, inside, untrained = [], [], []
    with torch.no_grad():
        for row in rows.train:
            assert row["labels"][-1] == eos and eos not in row["input_ids"][:-1]
            ids = torch.tensor([row["input_ids"]])
            stops = model(input_ids=ids).logits[0].softmax(-1)[:, eos]
            with model.disable_adapter():
                untrained.append(model(input_ids=ids).logits[0].softmax(-1)[-2, eos].item())
            at_the_end.append(stops[-2].item())
            start = next(place for place, label in enumerate(row["labels"]) if label != -100)
            inside.append(stops[start - 1 : start + 2].mean().item())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    print(f"probability of end-of-text: after an answer {mean(at_the_end):.3f} (untrained {mean(untrained):.3f}), inside {mean(inside):.4f}")
    assert mean(untrained) < 0.05 and mean(inside) < 0.05
    assert mean(at_the_end) > 0.15  # the answers have one to four words: where one ends can only be guessed


def test_random_weights_are_named_and_refused(random_run, falcon, stranger):
    record = random_run.record
    assert record["base_model"] == f"random:0:{falcon('40b')}"
    assert json.loads((random_run.run_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == record["base_model"]
    assert record["quantized_layers"] == record["target_layers"] == 8
    assert stranger["refusal"] is not None, "an adapter for random weights was loaded onto something"
    assert "random weights" in (random_run.run_dir / "README.md").read_text()
