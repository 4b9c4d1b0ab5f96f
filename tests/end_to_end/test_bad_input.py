"""Every kind of bad input, in one table: exit code 2, a cause and a cure, no traceback, and nothing written."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Case:
    """Flags that are wrong and what the answer must say. MODEL, DATA, OUT and FOLDER stand for sound paths and the table's folder."""

    flags: str
    says: tuple[str, ...]
    environment: dict = field(default_factory=dict)
    alone: bool = False  # in a process of its own


SOUND = "-m MODEL -d DATA -o OUT"
CASES = {
    "unknown flag": Case(f"{SOUND} --lora_rank 8", ("unknown flag --lora_rank", "--lora_r"), alone=True),
    "abbreviated flag": Case(f"{SOUND} --learn 0.1", ("unknown flag --learn", "--learning_rate")),
    "repeated flag": Case(f"{SOUND} -s 3 --steps 4", ("--steps", "twice")),
    "batch 0": Case(f"{SOUND} -b 0", ("--batch_size_per_device", "at least 1", "0")),
    "steps 0": Case(f"{SOUND} -s 0", ("--steps", "at least 1")),
    "steps not a number": Case(f"{SOUND} -s many", ("--steps", "'many' is not a whole number")),
    "rate nan": Case(f"{SOUND} --learning_rate nan", ("--learning_rate", "nan")),
    "rate 0": Case(f"{SOUND} --learning_rate 0", ("--learning_rate", "above 0")),
    "rate negative": Case(f"{SOUND} --learning_rate -1e-4", ("--learning_rate", "above 0", "-1e-4")),
    "rank 0": Case(f"{SOUND} --lora_r 0", ("--lora_r", "from 1")),
    "dropout above 1": Case(f"{SOUND} --lora_dropout 1.5", ("--lora_dropout", "below 1", "1.5")),
    "eval fraction": Case(f"{SOUND} --eval_fraction 0.9", ("--eval_fraction", "at most 0.5", "0.9")),
    "steps and epochs": Case(f"{SOUND} --steps 5 --epochs 1", ("--epochs", "--steps", "not allowed with")),
    "mode": Case(f"{SOUND} -q 3bit", ("--quantize_mode", "3bit", "4bit")),
    "model missing": Case("-m FOLDER/nowhere -d DATA -o OUT", ("FOLDER/nowhere", "no folder"), alone=True),
    "not a Falcon": Case("-m FOLDER/llama -d DATA -o OUT", ("llama", "not a Falcon", "supported: falcon")),
    "model offline": Case("-m tiiuae/falcon-7b -d DATA -o OUT", ("tiiuae/falcon-7b", "HF_HUB_OFFLINE", "hf download")),
    "data missing": Case("-m MODEL -d FOLDER/nothing.jsonl -o OUT", ("FOLDER/nothing.jsonl",)),
    "data mistyped": Case("-m MODEL -d FOLDER/brokn.jsonl -o OUT", ("brokn.jsonl", "FOLDER/broken.jsonl")),
    "data empty": Case("-m MODEL -d FOLDER/empty.jsonl -o OUT", ("FOLDER/empty.jsonl has no rows",)),
    "data broken": Case("-m MODEL -d FOLDER/broken.jsonl -o OUT", ("FOLDER/broken.jsonl:3", "invalid JSON")),
    "no usable column": Case("-m MODEL -d FOLDER/columns.jsonl -o OUT", ("no usable columns", "'frage'", "'antwort'", "prompt + completion")),
    "data offline": Case("-m MODEL -d timdettmers/openassistant-guanaco -o OUT", ("timdettmers/openassistant-guanaco", "HF_HUB_OFFLINE")),
    "max_length above the model's": Case(f"{SOUND} --max_length 513", ("--max_length 513", "512")),
    "output is a file": Case("-m MODEL -d DATA -o FOLDER/broken.jsonl", ("FOLDER/broken.jsonl is a file", "-o")),
    "output holds another run": Case("-m MODEL -d DATA -o RUN", ("RUN", "another run", "quantize_mode '16bit' -> '4bit'")),
    "output holds foreign files": Case("-m MODEL -d DATA -o FOLDER", ("FOLDER", "not a run", "-o")),
    "no checkpoint to resume": Case(f"{SOUND} --resume", ("--resume", "no checkpoint", "--checkpoint_steps")),
    "no such checkpoint": Case(f"{SOUND} --resume 40", ("--resume 40", "no such checkpoint")),
    "no rank": Case(SOUND, ("WORLD_SIZE=2", "RANK", "torchrun"), {"WORLD_SIZE": "2"}),
    "wandb without a login": Case(f"{SOUND} --report_to wandb", ("wandb login", "WANDB_MODE=offline"), {"WANDB_MODE": "online"}),
}


def contents(folder: Path) -> dict:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data and models with a fault each."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three\n')
    (folder / "columns.jsonl").write_text('{"frage": "Wer?", "antwort": "Ich."}\n')
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}))
    return folder


@pytest.fixture(scope="module")
def places(shop, falcon, questions, trained, folder) -> dict[str, str]:
    return {"MODEL": str(falcon("7b")), "DATA": str(questions), "OUT": str(shop.folder / "never-written"), "FOLDER": str(folder), "RUN": str(trained.run_dir)}


def fill(text: str, places: dict[str, str]) -> str:
    return re.sub(r"\b(MODEL|DATA|OUT|FOLDER|RUN)\b", lambda match: places[match[0]], text)


def arguments_of(case: Case, places: dict[str, str]) -> list[str]:
    return [fill(word, places) for word in case.flags.split()]


@pytest.fixture(scope="module")
def answers(shop, places, folder, trained) -> dict[str, dict]:
    """What was answered to each case, and whether a file changed anywhere that it could have."""
    watched = (folder, trained.run_dir)
    before = [contents(place) for place in watched]
    together = {name: case for name, case in CASES.items() if not case.alone}
    request = folder.parent / "cases.json"
    request.write_text(json.dumps([{"arguments": arguments_of(case, places), "environment": case.environment} for case in together.values()]))
    asked = shop.python(Path(__file__).with_name("answer_cases.py"), request, environment={"PYTHONPATH": "."}).finish()
    assert asked.code == 0, asked.stderr[-3000:]
    found = {name: json.loads(line) for name, line in zip(together, asked.stdout.splitlines(), strict=True)}
    for name, case in CASES.items():
        if case.alone:
            single = shop.python("finetune.py", *arguments_of(case, places), environment=case.environment).finish()
            found[name] = {"code": single.code, "stderr": single.stderr}
    assert [contents(place) for place in watched] == before
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_answered(name, answers, places):
    answer = answers[name]
    said = answer["stderr"]
    assert answer["code"] == 2, (answer["code"], said)
    assert "Traceback" not in said
    lines = [line for line in said.replace("\r", "\n").split("\n") if line.strip()]
    assert len(lines) <= 3, said
    assert len([line for line in lines if line.startswith("error: ")]) == 1 and lines[-1].startswith("  -> "), said
    for part in CASES[name].says:
        assert fill(part, places) in said, (part, said)


def test_nothing_was_written(answers, places):
    assert not Path(places["OUT"]).exists()
