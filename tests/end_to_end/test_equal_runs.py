"""Runs that are equal by definition are equal: 1 process x batch 4, 2 processes x batch 2, 1 process x batch 2 x accumulation 2.

Dropout is addressed by a value's place in the optimizer step, so the three agree with dropout as well. The micro-batch limit that some of
them get makes a step several passes: under it the ranks do unequal numbers of passes with unequal numbers of learnt tokens.
"""

import pytest
import torch

COMMON = ("-s", "6", "--lora_r", "8", "--learning_rate", "0.001", "--eval_fraction", "0.2", "--eval_steps", "3")
# Architecture, bits, arithmetic and dropout, cut down to four so that each value is met on both sides of the others where it can matter.
CASES = {
    "7b-4bit-float32-dropout": ("7b", ("-q", "4bit", "--compute_dtype", "fp32", "--lora_dropout", "0.1")),
    "40b-8bit-float32": ("40b", ("-q", "8bit", "--compute_dtype", "fp32", "--lora_dropout", "0")),
    "40b-4bit-bf16": ("40b", ("-q", "4bit", "--compute_dtype", "bf16", "--lora_dropout", "0")),
    "7b-8bit-bf16-dropout": ("7b", ("-q", "8bit", "--compute_dtype", "bf16", "--lora_dropout", "0.1")),
}


def largest_difference(left: dict, right: dict) -> float:
    """Of two adapters: the largest distance of a tensor, relative to its norm."""
    assert left.keys() == right.keys()
    return max(((left[name] - right[name]).norm() / left[name].norm()).item() for name in left)


@pytest.fixture(scope="module", params=CASES)
def equal_runs(request, shop, falcon, questions, side_by_side):
    style, flags = CASES[request.param]
    flags = ("-m", falcon(style), "-d", questions, *COMMON, *flags)
    # The first two share the cores; a run with two ranks needs both.
    one, accumulated = side_by_side(
        lambda: shop.train(*flags, "-b", "4", to=f"{request.param}-1x4"),
        lambda: shop.train(*flags, "-b", "2", "--gradient_accumulation_steps", "2", "--micro_batch_tokens", "100", to=f"{request.param}-accumulated"),
    )
    limit = ("--micro_batch_tokens", "70") if style == "7b" else ()
    return request.param, one, {"accumulation 2": accumulated, "2 ranks": shop.train(*flags, "-b", "2", *limit, ranks=2, to=f"{request.param}-2x2")}


def test_equal_runs_are_equal(equal_runs):
    name, one, others = equal_runs
    assert one.record["quantized_layers"] == one.record["target_layers"] == 8
    # In bf16 the first step differs by the order of float32 sums alone; then roundings go their own ways. Other dropout masks would be 0.4 apart.
    first, later, weights = (1e-5, 1e-5, 1e-4) if "float32" in name else (1e-5, 1e-2, 0.1)
    losses = one.record["losses"]
    assert len(losses) == 6 and losses[-1] < losses[0]
    for what, run in others.items():
        record = run.record
        assert (record["world_size"], record["effective_batch_size"]) == (2 if what == "2 ranks" else 1, 4)
        distances = [abs(mine - theirs) for mine, theirs in zip(losses, record["losses"], strict=True)]
        adapter = largest_difference(one.adapter, run.adapter)
        print(f"{name}, {what}: losses {max(distances):.1e} apart (the first {distances[0]:.1e}), adapters {adapter:.1e}")
        assert distances[0] <= first
        assert max(distances) <= later
        assert adapter <= weights
        evaluations = [(step, loss) for step, loss in record["eval_losses"]]
        assert [step for step, _ in evaluations] == [3, 6] and record["eval_loss"] == evaluations[-1][1]
        for (_, mine), (_, theirs) in zip(one.record["eval_losses"], evaluations, strict=True):
            assert abs(mine - theirs) <= later


def test_adapters_are_trained_and_float32(equal_runs):
    _, one, _ = equal_runs
    for name, tensor in one.adapter.items():
        assert tensor.dtype == torch.float32
        assert tensor.abs().max() > 0, name  # B starts at zero
        assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} holds only values that bf16 can hold"
