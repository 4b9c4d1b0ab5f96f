"""The plan: which micro-batch, recompute and compile settings, and what they are estimated to take."""

import pytest
import torch
from transformers import FalconConfig

from falcon_finetune.family import SIZES
from falcon_finetune.memory import Plan, activation_gib, adapter_parameters, base_gib, choose_plan, decoder_weights, fastest_plan
from falcon_finetune.options import UserError, parse_options
from falcon_finetune.quantization import decoder_linears
from tests.falcons import ARCHITECTURES, CPU, MODES, adapt, load_random, tiny_config

FULL_SIZES = {name: FalconConfig(**sizes) for name, sizes in SIZES.items()}


def plan_on_cpu(*flags: str, longest_row: int = 512) -> Plan:
    return choose_plan(parse_options(list(flags)), tiny_config("7b"), CPU, torch.bfloat16, longest_row)


def plan_on_card(size: str, available: float, *flags: str, longest_row: int = 512) -> Plan:
    return fastest_plan(parse_options(["-m", size, "--random_weights", *flags]), FULL_SIZES[size], available, longest_row)


def test_a_cpu_takes_the_whole_step_up_to_a_bound():
    plan = plan_on_cpu("-b", "2")
    assert (plan.micro_batch_tokens, plan.recomputed_layers, plan.compile, plan.needed_gib, plan.available_gib) == (1024, 0, False, None, None)
    assert not plan.keep_16bit_copy
    assert plan_on_cpu("-b", "2", "--gradient_accumulation_steps", "3").micro_batch_tokens == 3072
    assert plan_on_cpu("-b", "64").micro_batch_tokens == 4096


def test_the_flags_are_obeyed():
    assert plan_on_cpu("--micro_batch_tokens", "77").micro_batch_tokens == 77
    assert plan_on_cpu("--recompute", "full").recomputed_layers == tiny_config("7b").num_hidden_layers
    assert plan_on_cpu("--recompute", "none").recomputed_layers == 0
    assert plan_on_cpu("--compile", "on").compile
    assert not plan_on_cpu("--compile", "off").compile
    assert plan_on_cpu().line() == "micro-batches of up to 4,096 tokens, no recompute, torch.compile off"
    assert plan_on_card("falcon-7b", 139, "--recompute", "full").recomputed_layers == 32
    assert plan_on_card("falcon-7b", 12, "--recompute", "none").recomputed_layers == 0
    assert plan_on_card("falcon-7b", 139, "--micro_batch_tokens", "700").micro_batch_tokens == 700


@pytest.mark.parametrize("size", FULL_SIZES)
def test_more_tokens_and_layers_need_more_and_recompute_needs_less(size):
    config = FULL_SIZES[size]
    layers = config.num_hidden_layers

    def need(tokens: int, recomputed: int = 0, lora_r: int = 64) -> float:
        return activation_gib(tokens, config, recomputed, lora_r)

    assert need(512) < need(1024) < need(8192)
    assert need(8192) - need(4096) == pytest.approx(need(4096) - need(0), rel=1e-6)  # linear in the tokens
    assert need(8192, lora_r=8) < need(8192, lora_r=256)
    assert need(8192, layers) < need(8192, layers // 2) < need(8192)
    assert need(8192, layers) < 0.5 * need(8192)
    # What a layer keeps grows with depth; with recompute only its input does.
    per_token_and_layer = (need(8192, layers) - need(0, layers)) * 2**30 / 8192 / layers
    assert 4 * config.hidden_size <= per_token_and_layer < 8 * config.hidden_size


# Peak GiB allocated on an H200, benchmarks/results.jsonl: model, mode, tokens at once, kept copy.
MEASURED = (("falcon-7b", "4bit", 8192, True, 41.15), ("falcon-7b", "8bit", 8192, True, 44.15), ("falcon-40b", "4bit", 4096, False, 70.66),
            ("falcon-40b", "8bit", 4096, False, 89.02))


@pytest.mark.parametrize("size, mode, tokens, copy, measured", MEASURED)
def test_estimates_agree_with_what_was_measured(size, mode, tokens, copy, measured):
    config = FULL_SIZES[size]
    estimate = base_gib(config, mode) + 16 * adapter_parameters(config, 64) / 2**30 + activation_gib(tokens, config, dequantizes=not copy)
    estimate += copy * 2 * decoder_weights(config) / 2**30
    assert measured <= estimate * 1.01 and estimate <= measured * 1.06


# The card's GiB -> tokens at once and recomputed layers, at 16 rows of 512.
@pytest.mark.parametrize("size, mode, available", (("falcon-7b", "4bit", 8), ("falcon-7b", "8bit", 12), ("falcon-40b", "4bit", 32), ("falcon-40b", "8bit", 50),
                                                   ("falcon-180b", "4bit", 139)))
def test_small_cards_get_a_plan_that_fits(size, mode, available):
    plan = plan_on_card(size, available, "-q", mode)
    assert plan.needed_gib < available
    assert plan.micro_batch_tokens >= 512
    assert not plan.keep_16bit_copy


def test_more_memory_never_makes_a_slower_plan():
    plans = [plan_on_card("falcon-40b", available) for available in range(32, 140, 4)]
    work = [(4 + 2 * plan.recomputed_layers / plan.layers) * 8192 + -(-8192 // plan.micro_batch_tokens) * 2 * 345 * (2 + plan.recomputed_layers / plan.layers)
            for plan in plans if not plan.keep_16bit_copy]
    assert work == sorted(work, reverse=True)
    assert plans[0].recomputed_layers > 0 and plans[-1].recomputed_layers == 0
    assert any(0 < plan.recomputed_layers < plan.layers for plan in plans)  # some layers only, where that is enough


def test_a_large_card_keeps_a_16bit_copy():
    assert plan_on_card("falcon-7b", 139).keep_16bit_copy
    assert not plan_on_card("falcon-7b", 139, "-q", "16bit").keep_16bit_copy
    assert not plan_on_card("falcon-7b", 24).keep_16bit_copy


@pytest.mark.parametrize("size, mode, available, cure", (("falcon-40b", "8bit", 40, "-q 4bit"), ("falcon-180b", "4bit", 80, "a card with more memory"),
                                                          ("falcon-7b", "4bit", 5, "a smaller --lora_r")))
def test_a_base_too_large_for_the_card_is_refused_before_it_is_loaded(size, mode, available, cure):
    with pytest.raises(UserError) as error:
        plan_on_card(size, available, "-q", mode)
    assert f"{size} in {mode} with LoRA rank 64 and one row of 512 tokens needs about " in error.value.cause
    assert f"this card has {available:.1f} GiB to give" in error.value.cause
    assert cure in error.value.cure


def test_more_ranks_need_more():
    assert fastest_plan(parse_options([]), FULL_SIZES["falcon-7b"], 139, 512, ranks=8).needed_gib > plan_on_card("falcon-7b", 139).needed_gib


def test_micro_batches_that_do_not_fit_are_tried_with_a_warning(capsys):
    plan = plan_on_card("falcon-7b", 8, "--micro_batch_tokens", "8192")
    assert (plan.micro_batch_tokens, plan.recomputed_layers) == (8192, 32)
    assert "warning: micro-batches of 8,192 tokens need about" in capsys.readouterr().err


def test_a_plan_says_what_it_needs():
    values = {"micro_batch_tokens": 2048, "recomputed_layers": 20, "layers": 32, "compile": True, "keep_16bit_copy": False, "needed_gib": 12.34, "available_gib": 56.78}
    plan = Plan(**values)
    assert plan.line() == "micro-batches of up to 2,048 tokens, 20 of 32 layers' recompute, torch.compile on, needs about 12.3 of 56.8 GiB"
    assert plan.to_dict() == values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_counted(architecture, mode):
    config = tiny_config(architecture)
    model, census = load_random(config, mode)
    assert decoder_weights(config) == sum(module.in_features * module.out_features for _, module in decoder_linears(model))
    biases_and_norms = 0.02 * census.total_gib + 2e-5
    assert base_gib(config, mode) == pytest.approx(census.total_gib, abs=biases_and_norms)
    adapted = adapt(model, "--lora_r", "8")
    assert adapter_parameters(config, 8) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
