"""LoRA's operator against PEFT's own modules and plain autograd, and the dropout that is addressed by position."""

import itertools

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F

from falcon_finetune.lora import LoraLinear, add_lora, drop, feature_keys, keep_threshold, lora_linear_backward_op, lora_linear_op, mix
from falcon_finetune.options import parse_options
from falcon_finetune.training import cut_into_micro_batches
from tests.falcons import CPU, MODES, adapt, adapted_tiny, load_random, random_rows, relative_error, stored_weight, tiny_config

TOKENS = 23


def adapted_linears(model) -> list[tuple[str, peft.tuners.lora.LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def token_keys(count: int, slot: int = 0, key: int = 0) -> torch.Tensor:
    return mix(mix(slot * (1 << 16) + torch.arange(count, dtype=torch.int32)) ^ key)


def random_input(features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, features, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients_of(output: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Gradients for a fixed random gradient of the output."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return list(torch.autograd.grad(output, tensors, upstream))


# ------------------------------------------------------------------------------------------------------------------ the adapters


@pytest.mark.parametrize("mode", MODES)
def test_adapters_are_drawn_in_float32_on_every_decoder_linear(mode):
    base, _ = load_random(tiny_config("7b"), mode)
    model = add_lora(base, parse_options(["--lora_r", "8", "--seed", "3"]), "random:3:tiny")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapted_linears(model)) == 8
    assert len(trained) == 16
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    for name, parameter in trained.items():
        if "lora_A" in name:  # numbers that passed through bf16 would all survive the cast
            assert (parameter.bfloat16().float() != parameter).float().mean() > 0.9, name
        else:
            assert torch.count_nonzero(parameter) == 0
    assert model.peft_config["default"].base_model_name_or_path == "random:3:tiny"
    same = add_lora(load_random(tiny_config("7b"), mode)[0], parse_options(["--lora_r", "8", "--seed", "3"]), "random:3:tiny")
    other = add_lora(load_random(tiny_config("7b"), mode)[0], parse_options(["--lora_r", "8", "--seed", "4"]), "random:3:tiny")
    a = "base_model.model.transformer.h.1.mlp.dense_4h_to_h.lora_A.default.weight"
    assert torch.equal(trained[a], same.get_parameter(a))
    assert not torch.equal(trained[a], other.get_parameter(a))


# ------------------------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("mode", MODES)
def test_operator_equals_pefts_module(mode):
    model = adapted_tiny("rw", mode, "--lora_alpha", "24")  # this architecture has biases
    for index, (name, module) in enumerate(adapted_linears(model)):
        x = random_input(module.in_features)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        ours = LoraLinear(module, index)(x, token_keys(TOKENS), True)
        ours_gradients = gradients_of(ours, x, a, b)
        if mode != "16bit":  # a bf16 linear takes no float32 input
            assert relative_error(ours, module(x)) < 1e-6, name
        plain = torch.nn.Linear(module.in_features, module.out_features)
        plain.weight.data, plain.bias.data = stored_weight(module.get_base_layer()), module.get_base_layer().bias.data.float()
        module.base_layer = plain.requires_grad_(False)
        theirs = module(x)
        assert relative_error(ours, theirs) < 1e-6, name
        for gradient, expected in zip(ours_gradients, gradients_of(theirs, x, a, b)):
            assert gradient.dtype == expected.dtype
            assert relative_error(gradient, expected) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_operator_with_dropout_equals_plain_autograd_under_the_same_mask(mode):
    model = adapted_tiny("rw", mode, "--lora_dropout", "0.3", "--lora_alpha", "24")
    for index, (name, module) in enumerate(adapted_linears(model)):
        linear, tokens, x = LoraLinear(module, index), token_keys(TOKENS), random_input(module.in_features)
        mask = drop(torch.ones(TOKENS, module.in_features), tokens, linear.features, 0.3)
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
        base = module.get_base_layer()
        plain = F.linear(x, stored_weight(base), base.bias.float()) + F.linear(F.linear(x * mask, linear.a), linear.b) * (24 / 8)
        ours = linear(x, tokens, True)
        assert relative_error(ours, plain) < 1e-6, name
        for gradient, expected in zip(gradients_of(ours, x, linear.a, linear.b), gradients_of(plain, x, linear.a, linear.b)):
            assert relative_error(gradient, expected) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", (0.0, 0.1))
def test_operator_passes_torchs_own_checks(mode, dropout):
    module = adapted_linears(adapted_tiny("rw", mode))[0][1]
    linear, tokens, x = LoraLinear(module, 0), token_keys(TOKENS), random_input(module.in_features)
    forward = (x, linear.frozen, linear.bias, linear.a, linear.b, tokens, linear.features, linear.scale, dropout, 0.0)
    assert set(torch.library.opcheck(lora_linear_op, forward).values()) == {"SUCCESS"}
    with torch.no_grad():
        y, u = lora_linear_op(*forward)
        backward = (torch.ones_like(y), x, u, linear.frozen, linear.a, linear.b, tokens, linear.features, linear.scale, dropout)
        checks = torch.library.opcheck(lora_linear_backward_op, backward, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


def test_operator_in_16_bits_keeps_float32_gradients_of_the_adapters():
    linear = LoraLinear(adapted_linears(adapted_tiny("7b", "4bit"))[0][1], 0)
    x = random_input(256).detach().bfloat16().requires_grad_()
    y = linear(x, token_keys(TOKENS), True)
    grad_x, grad_a, grad_b = torch.autograd.grad(y.float().square().sum(), (x, linear.a, linear.b))
    assert (y.dtype, grad_x.dtype, grad_a.dtype, grad_b.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


# -------------------------------------------------------------------------------------------------------------------- the dropout


def mask(count: int, features: int, *, layer: int = 0, slot: int = 0, key: int = 0, dropout: float = 0.1) -> torch.Tensor:
    return drop(torch.ones(count, features), token_keys(count, slot, key), feature_keys(features, layer, CPU), dropout) != 0


@pytest.mark.parametrize("dropout", (0.01, 0.1, 0.5, 0.9))
def test_dropout_rate_is_the_one_asked_for(dropout):
    kept = mask(512, 1024, dropout=dropout)
    sigma = (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.float().mean().item() - (1 - dropout)) < 4 * sigma / kept.numel() ** 0.5
    # The share varies between tokens and between features as it does between independent draws.
    assert kept.float().mean(1).std().item() == pytest.approx(sigma / 1024**0.5, rel=0.2)
    assert kept.float().mean(0).std().item() == pytest.approx(sigma / 512**0.5, rel=0.2)


@pytest.mark.parametrize("dropout", (1e-12, 1e-6, 0.999999))
def test_extreme_rates_are_no_overflow(dropout):
    assert -(2**31) <= keep_threshold(dropout) < 2**31
    assert mask(64, 64, dropout=dropout).float().mean().item() == pytest.approx(1 - dropout, abs=1e-3)


def test_masks_of_layers_steps_rows_tokens_and_features_are_uncorrelated():
    masks = [mask(256, 256, dropout=0.5)]
    masks += [mask(256, 256, layer=layer, dropout=0.5) for layer in (1, 2, 239)]
    masks += [mask(256, 256, key=key, dropout=0.5) for key in (1, 2, 3, 0x9E3779B1 - 2**32)]
    masks += [mask(256, 256, slot=slot, dropout=0.5) for slot in (1, 2, 15)]
    masks += [masks[0].roll(1, 0), masks[0].roll(1, 1), masks[0].roll(16, 0), masks[0].T.contiguous()]
    signs = [2 * m.flatten().float() - 1 for m in masks]
    correlations = [(left @ right / left.numel()).item() for left, right in itertools.combinations(signs, 2)]
    assert max(map(abs, correlations)) < 5 / 256  # five standard deviations of a product of 256 x 256 independent signs


def test_the_mask_of_a_row_does_not_depend_on_its_micro_batch():
    rows = random_rows((9, 4, 13, 6))
    features = feature_keys(64, 5, CPU)

    def masks(budget: int) -> torch.Tensor:
        batches = cut_into_micro_batches(rows, budget, first_slot=4)
        keys = torch.cat([mix(mix(batch.token_ids) ^ 77) for batch in batches])
        return drop(torch.ones(len(keys), 64), keys, features, 0.5)

    assert torch.equal(masks(1), masks(1000))
    assert torch.equal(masks(20), masks(1000))


# ------------------------------------------------------------------------------------------------------------------------ LLM.int8


def test_llm_int8_equals_bitsandbytes_own_layer():
    model = adapt(load_random(tiny_config("rw"), "8bit", llm_int8=True)[0])
    for index, (name, module) in enumerate(adapted_linears(model)):
        linear, base = LoraLinear(module, index), module.get_base_layer()
        x = random_input(module.in_features).detach()
        x[3, 5] = x[11, 2] = 40.0  # two outlying features
        x.requires_grad_()
        ours = lora_linear_op(x, linear.frozen, linear.bias, linear.a, linear.b * 0, token_keys(TOKENS), linear.features, 1.0, 0.0, linear.threshold)[0]
        state = bnb.MatmulLtState(CB=linear.frozen[0], SCB=linear.frozen[1])
        state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
        theirs = bnb.autograd._functions.MatMul8bitLt.apply(x, linear.frozen[0], None, base.bias.float(), state)
        assert relative_error(ours, theirs) < 1e-5, name
        exact = F.linear(x, stored_weight(base), base.bias.float())
        assert 1e-4 < relative_error(ours, exact) < 0.05, name  # the inputs are rounded to int8
        # Without the outliers apart, one scale a row would spoil the rows that have them.
        without = lora_linear_op(x, linear.frozen, linear.bias, linear.a, linear.b * 0, token_keys(TOKENS), linear.features, 1.0, 0.0, 1e9)[0]
        assert relative_error(ours[[3, 11]], exact[[3, 11]]) < 0.5 * relative_error(without[[3, 11]], exact[[3, 11]]), name
        for gradient, expected in zip(gradients_of(ours, x), gradients_of(exact, x)):
            assert relative_error(gradient, expected) < 1e-5, name
