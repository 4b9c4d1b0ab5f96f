"""Real input: grade-school mathematics in question/answer columns, on a small Falcon, with held-out rows."""

from pathlib import Path

import pytest

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k/train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="gsm8k is not beside this checkout (../shared/data/gsm8k/train.jsonl)")
def test_gsm8k_trains_and_generalises(shop, falcon):
    run = shop.train("-m", falcon("40b"), "-d", GSM8K, "-q", "4bit", "-s", "40", "-b", "8", "--lora_r", "16", "--learning_rate", "0.01",
                     "--eval_fraction", "0.01", "--eval_steps", "10", to="gsm8k")  # fmt: skip
    record = run.record
    assert record["data"]["format"] == "question/answer"
    assert record["data"]["rows_kept"] + sum(record["data"]["rows_dropped"].values()) == record["data"]["rows_read"] == 7473
    assert record["data"]["rows_cut"] > 0 and record["data"]["longest_row_tokens"] == 512
    assert 40 < record["data"]["rows_eval"] < 120
    held_out = [loss for _, loss in record["eval_losses"]]
    print(f"gsm8k: held-out loss {', '.join(f'{loss:.3f}' for loss in held_out)}; {record['tokens_per_second']:,.0f} tokens/s")
    assert [step for step, _ in record["eval_losses"]][:4] == [10, 20, 30, 40]
    assert held_out[0] > held_out[1] > held_out[3]
    assert record["losses"][0] - record["eval_loss"] > 0.5
