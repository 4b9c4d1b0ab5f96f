"""--report_to: the metrics and the options are in what wandb and tensorboard wrote, read back from their files."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

HEADER_BYTES, BLOCK_BYTES = 7, 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes. (wandb 0.31 reads it in its Go program alone.)"""
    data, place, joined = path.read_bytes(), HEADER_BYTES, b""
    assert data[:4] == b":W&B"
    while place + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < HEADER_BYTES:  # too little for a header: padding up to the next block
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        joined += data[place + HEADER_BYTES : place + HEADER_BYTES + length]
        place += HEADER_BYTES + length
        if kind in (FULL, LAST):
            yield Record.FromString(joined)
            joined = b""
        else:
            assert kind in (FIRST, MIDDLE), kind


@pytest.fixture(scope="module")
def reported(shop, falcon, questions):
    return shop.train("-m", falcon("7b"), "-d", questions, "-s", "3", "-b", "2", "--lora_r", "7", "--report_to", "wandb", to="wandb-run",
                      environment={"WANDB_MODE": "offline"})


def test_wandb_run_holds_the_losses_and_the_options(reported):
    files = list(reported.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    losses, config = [], ""
    for record in wandb_records(files[0]):
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            if name in ("train/loss", "loss"):
                losses.append(float(item.value_json))
        config += str(record.run.config) + str(record.config)
    assert losses == pytest.approx(reported.record["losses"])
    assert re.search(r'lora_r\\": ?7\b', config), config
    assert "quantized_layers" in config


def test_wandb_without_a_login_is_an_error_at_once(shop, falcon, questions):
    asked = shop.finetune("-m", falcon("7b"), "-d", questions, "--report_to", "wandb", to="no-login").finish()
    assert asked.code == 2
    assert "wandb login" in asked.stderr and "Traceback" not in asked.stderr
    assert len(asked.stderr.splitlines()) <= 3
    assert not asked.run_dir.exists()


def test_tensorboard_events_hold_the_losses(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    readers = [EventAccumulator(str(path)).Reload() for path in trained.run_dir.rglob("events.out.tfevents.*")]
    scalars = [reader.Scalars("train/loss") for reader in readers if "train/loss" in reader.Tags()["scalars"]]  # another file holds the options
    assert len(scalars) == 1
    assert [event.value for event in scalars[0]] == pytest.approx(trained.record["losses"])
    assert [event.step for event in scalars[0]] == list(range(1, 61))
