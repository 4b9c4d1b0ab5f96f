"""Flags: what follows from them, and what is refused (the end-to-end tests see the messages)."""

import pytest

from falcon_finetune.options import DEFAULT_DATASET, UserError, parse_options


@pytest.mark.parametrize(
    "flags, dataset",
    [
        ([], DEFAULT_DATASET),
        (["-m", "tiny-7b-style"], "tiny-7b-style"),
        (["-m", "./tiny-of-my-own"], DEFAULT_DATASET),
        (["-m", "tiny-7b-style", "-d", DEFAULT_DATASET], DEFAULT_DATASET),
    ],
)
def test_only_the_tiny_models_bring_their_own_data_and_a_given_data_set_stays(flags, dataset):
    assert parse_options(flags).dataset_name == dataset


def test_rows_a_step_and_steps_of_an_epoch():
    options = parse_options(["-b", "4", "--gradient_accumulation_steps", "3", "--epochs", "1.5"])
    assert options.rows_per_step(world_size=2) == 24
    assert options.total_steps(rows=100, world_size=2) == 7  # 150 rows in steps of 24


@pytest.mark.parametrize(
    "flags, cause",
    [
        (["--eval_steps", "10"], "held-out rows"),
        (["--warmup_steps", "100", "-s", "10"], "never reach"),
        (["--lerning_rate", "1"], "unknown flag"),
        (["--batch", "1"], "unknown flag"),
        (["-m", "tiny-7b-styl"], "none of the tiny models"),
        (["--seed", "1", "--seed", "2"], "twice"),
        (["-b", "-1"], "at least 1"),
        (["--learning_rate", "-1e-4"], "above 0"),
    ],
)
def test_refused(flags, cause):
    with pytest.raises(UserError, match=cause):
        parse_options(flags)
