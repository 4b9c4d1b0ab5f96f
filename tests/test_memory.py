"""The plan: which micro-batch, recompute and compile settings, and what they are estimated to take."""

import pytest
import torch
from transformers import FalconConfig

from falcon_finetune.family import SIZES
from falcon_finetune.memory import Plan, _largest, activation_gib, choose_plan, decoder_weights
from falcon_finetune.options import parse_options
from falcon_finetune.quantization import decoder_linears
from tests.falcons import ARCHITECTURES, CPU, load_random, tiny_config

FULL_SIZES = {name: FalconConfig(**sizes) for name, sizes in SIZES.items()}


def plan_on_cpu(*flags: str, longest_row: int = 512) -> Plan:
    return choose_plan(parse_options(list(flags)), tiny_config("7b"), CPU, torch.bfloat16, 100_000, longest_row)


def test_a_cpu_takes_the_whole_step_up_to_a_bound():
    plan = plan_on_cpu("-b", "2")
    assert (plan.micro_batch_tokens, plan.recompute, plan.compile, plan.estimated_gib, plan.free_gib) == (1024, False, False, None, None)
    assert not plan.keep_16bit_copy
    assert plan_on_cpu("-b", "2", "--gradient_accumulation_steps", "3").micro_batch_tokens == 3072
    assert plan_on_cpu("-b", "64").micro_batch_tokens == 4096


def test_the_flags_are_obeyed():
    assert plan_on_cpu("--micro_batch_tokens", "77").micro_batch_tokens == 77
    assert plan_on_cpu("--recompute", "full").recompute
    assert not plan_on_cpu("--recompute", "none").recompute
    assert plan_on_cpu("--compile", "on").compile
    assert not plan_on_cpu("--compile", "off").compile
    assert plan_on_cpu().line() == "micro-batches of up to 4,096 tokens, no recompute, torch.compile off"


@pytest.mark.parametrize("size", FULL_SIZES)
def test_more_tokens_and_layers_need_more_and_recompute_needs_less(size):
    config = FULL_SIZES[size]

    def need(tokens: int, recompute: bool = False, lora_r: int = 64) -> float:
        return activation_gib(tokens, config, recompute=recompute, lora_r=lora_r)

    assert need(512) < need(1024) < need(8192)
    assert need(8192) - need(4096) == pytest.approx(need(4096) - need(0), rel=1e-6)  # linear in the tokens
    assert need(8192, lora_r=8) < need(8192, lora_r=256)
    assert need(8192, recompute=True) < 0.5 * need(8192)
    # What a layer keeps grows with depth; with recompute only its input does.
    per_token_and_layer = (need(8192, True) - need(0, True)) * 2**30 / 8192 / config.num_hidden_layers
    assert 4 * config.hidden_size <= per_token_and_layer < 8 * config.hidden_size


def test_estimates_agree_with_what_was_measured_on_an_h200():
    """Framework-free layers at 16 x 512 tokens on 7B in 4 bits peaked at 49 GiB, of which the base and the adapters' state are about 6."""
    assert 30 < activation_gib(8192, FULL_SIZES["falcon-7b"], recompute=False, lora_r=64) < 60
    assert activation_gib(8192, FULL_SIZES["falcon-7b"], recompute=True, lora_r=64) < 12


@pytest.mark.parametrize("fits_up_to, expected", ((8192, 8192), (8191, 4096), (4096, 4096), (3000, 2048), (512, 512), (511, None)))
def test_the_largest_micro_batch_is_an_equal_cut_in_whole_rows(fits_up_to, expected):
    assert _largest(16 * 512, 512, lambda tokens: tokens <= fits_up_to) == expected


def test_a_plan_says_what_it_needs():
    values = {"micro_batch_tokens": 2048, "recompute": True, "compile": True, "keep_16bit_copy": False, "estimated_gib": 12.34, "free_gib": 56.78}
    plan = Plan(**values)
    assert plan.line() == "micro-batches of up to 2,048 tokens, full recompute, torch.compile on, needs about 12.3 of 56.8 GiB left"
    assert plan.to_dict() == values


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_decoders_weights_are_counted(architecture):
    config = tiny_config(architecture)
    linears = (module for _, module in decoder_linears(load_random(config, "16bit")[0]))
    assert decoder_weights(config) == sum(module.weight.numel() for module in linears)
