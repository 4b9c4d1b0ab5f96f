"""On a CUDA device: each fast kernel against its plain twin, and the packed path at the real widths of 7B and 40B.

Float32 stays float32 here (TF32 is off by torch's default), so that it can be the reference.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import FalconConfig

from falcon_finetune import lora, packed_falcon
from falcon_finetune.attention import attention_by_row, packed_attention
from falcon_finetune.family import SIZES
from falcon_finetune.lora import LoraLinear, drop, feature_keys, keep_threshold, mix
from falcon_finetune.memory import available_gib, choose_plan, limit_memory
from falcon_finetune.options import UserError, parse_options
from falcon_finetune.packed_falcon import TOKEN_BLOCK, ForwardPlan, pack_rows, summed_cross_entropy
from falcon_finetune.quantization import decoder_linears, dequantize, frozen_tensors
from tests.falcons import MODES, adapt, load_random, random_rows, relative_error, stored_weight, tiny_config
from tests.test_attention import bounds_of, random_heads
from tests.test_lora import adapted_linears
from tests.test_packed_falcon import accuracy_ratios, packed_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# tokens, width: one token, less than a tile, no multiple of any tile, the widths of 7B with its MLP, and enough tokens for the largest tiles
SIZES_OF_PRODUCTS = ((1, 64), (77, 200), (513, 4544), (300, 18176), (4097, 1000), (8200, 320))
RANKS = (8, 64, 100)
ROUNDING = 2**-8  # half a bf16 step is 2**-9 of a number


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def kernels():
    from falcon_finetune import kernels  # needs Triton, which CPU builds of torch leave out

    return kernels


# ------------------------------------------------------------------------------------------------------------------ Triton kernels


def product_inputs(tokens: int, width: int, rank: int, dropout: float, device: torch.device):
    """x [T, K], a [R, K], grad_u [T, R] in bf16, the keys of the mask, and drop(x) in float64. x is a slice: its rows are not adjacent."""
    generator = torch.Generator(device).manual_seed(tokens + width + rank)
    x = torch.randn(tokens, width + 64, generator=generator, device=device).bfloat16()[:, :width]
    a = torch.randn(rank, width, generator=generator, device=device).bfloat16()
    grad_u = torch.randn(tokens, rank, generator=generator, device=device).bfloat16()
    keys = mix(torch.arange(tokens, dtype=torch.int32, device=device) + 99), feature_keys(width, 3, device)
    place = (*keys, keep_threshold(dropout), 1 - dropout)
    return x, a, grad_u, place, drop(x.double(), *keys, dropout)


@pytest.mark.parametrize("dropout", (0.0, 0.1, 0.5))
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("tokens, width", SIZES_OF_PRODUCTS)
def test_lora_kernels_equal_their_twins(tokens, width, rank, dropout, cuda, kernels):
    x, a, grad_u, place, dropped = product_inputs(tokens, width, rank, dropout, cuda)
    projected = kernels.project_dropped(x, a, *place)
    expected = dropped @ a.double().T
    assert projected.dtype == torch.bfloat16
    assert relative_error(projected, expected) < ROUNDING
    assert ((projected.double() - expected).abs() <= ROUNDING * expected.abs() + 1e-4 * expected.std(correction=0)).all()

    outer = kernels.outer_dropped(grad_u, x, *place)
    assert outer.dtype == torch.float32
    assert relative_error(outer, grad_u.double().T @ dropped) < 1e-5
    assert torch.equal(outer, kernels.outer_dropped(grad_u, x, *place))  # summed in a fixed order

    # The same mask on the way back: ones through drop are mask / keep.
    scaled_mask = drop(torch.ones(tokens, width, dtype=torch.float64, device=cuda), place[0], place[1], dropout)
    grad_x = x.clone()
    kernels.add_dropped_update(grad_x, grad_u, a, *place)
    expected = x.double() + scaled_mask * (grad_u.double() @ a.double())
    assert relative_error(grad_x, expected) < ROUNDING
    untouched = scaled_mask == 0
    assert torch.equal(grad_x[untouched], x[untouched])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("mode", MODES)
def test_dequantised_weights_equal_bitsandbytes(mode, dtype, cuda):
    model, _ = load_random(tiny_config("rw", hidden_size=320, num_attention_heads=5), mode, cuda)
    for name, module in decoder_linears(model):
        wide = stored_weight(module)
        weight = dequantize(frozen_tensors(module), (module.out_features, module.in_features), dtype)
        assert weight.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(weight, wide, rtol=1e-6, atol=1e-9)
        else:  # rounded once: half a unit in the last place is 2^-8 of a number just above a power of two
            assert ((weight.float() - wide).abs() <= wide.abs() * ROUNDING + 1e-30).all(), name


@pytest.mark.parametrize("learnt", (0, 1, 700))
@pytest.mark.parametrize("vocabulary", (320, 4097, 65024))
def test_head_equals_torchs_cross_entropy(learnt, vocabulary, cuda, monkeypatch):
    monkeypatch.setattr(packed_falcon, "_HEAD_CHUNK_BYTES", 4 * vocabulary * 300)  # three chunks of the 700 rows
    generator = torch.Generator(cuda).manual_seed(0)
    hidden = torch.randn(learnt, 256, generator=generator, device=cuda).bfloat16().requires_grad_()
    weight = (0.2 * torch.randn(vocabulary, 256, generator=generator, device=cuda)).bfloat16()
    targets = torch.randint(0, vocabulary, (learnt,), generator=generator, device=cuda)
    loss = summed_cross_entropy(hidden, weight, targets)
    (0.5 * loss).backward()
    wide = hidden.detach().float().requires_grad_()
    expected = F.cross_entropy(wide @ weight.float().T, targets, reduction="sum")
    (0.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert hidden.grad.shape == wide.grad.shape
    assert learnt == 0 or relative_error(hidden.grad, wide.grad) < 4 * ROUNDING  # the logits (up to 10) are rounded to bf16


@pytest.mark.parametrize("rank", (8, 100, 256))  # above MAX_RANK the operator takes the plain twin
@pytest.mark.parametrize("mode", MODES)
def test_operator_equals_its_plain_twin(mode, rank, cuda, monkeypatch):
    model = adapt(load_random(tiny_config("rw"), mode, cuda)[0], "--lora_r", str(rank), "--lora_dropout", "0.1")
    for index, (name, module) in enumerate(adapted_linears(model)):
        linear = LoraLinear(module, index)
        tokens = mix(torch.arange(333, dtype=torch.int32, device=cuda))
        x = torch.randn(333, module.in_features, generator=torch.Generator(cuda).manual_seed(0), device=cuda)

        def values(x):
            x = x.detach().requires_grad_()
            y = linear(x, tokens, True)
            return [y, *torch.autograd.grad((y.float() * y.detach().float()).sum(), (x, linear.a, linear.b))]

        fast = values(x.bfloat16())
        with monkeypatch.context() as patch:
            patch.setattr(lora, "kernels", None)
            plain = values(x.bfloat16())
        reference = values(x.bfloat16().float())
        for ours, theirs, exact in zip(fast, plain, reference):
            assert relative_error(ours, exact) <= max(1.1 * relative_error(theirs, exact), ROUNDING / 4), name


# ---------------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("lengths", ((5, 1, 130, 512, 77), (256, 256, 256)), ids=("ragged", "equal"))
@pytest.mark.parametrize("heads, kv_heads", ((71, 1), (128, 8), (4, 4)))
def test_attention_kernels_equal_attention_by_row(heads, kv_heads, lengths, cuda):
    narrow = [x.requires_grad_() for x in random_heads(heads, kv_heads, lengths, dtype=torch.bfloat16, device=cuda)]
    bounds = bounds_of(lengths, cuda)
    upstream = torch.randn(narrow[0].shape, generator=torch.Generator(cuda).manual_seed(8), device=cuda)

    def values(inputs, attend):
        output = attend(*inputs)
        return [output, *torch.autograd.grad((output.float() * upstream).sum(), inputs)]

    fast = values(narrow, lambda *inputs: packed_attention(*inputs, bounds))
    plain = values(narrow, lambda *inputs: attention_by_row(*inputs, lengths))
    exact = values([x.detach().float().requires_grad_() for x in narrow], lambda *inputs: attention_by_row(*inputs, lengths))
    for ours, theirs, reference in zip(fast, plain, exact):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, reference) <= max(1.5 * relative_error(theirs, reference), 4e-3)


@pytest.mark.parametrize("heads, kv_heads", ((71, 1), (128, 8)))
@pytest.mark.parametrize("lengths", ((40, 130, 77), (128, 128, 128)), ids=("ragged", "equal"))
def test_attention_kernels_do_not_leak(heads, kv_heads, lengths, cuda):
    query, key, value = random_heads(heads, kv_heads, lengths, dtype=torch.bfloat16, device=cuda)
    bounds = bounds_of(lengths, cuda)
    before = packed_attention(query, key, value, bounds)
    start, end = lengths[0], lengths[0] + lengths[1]
    for tensor in (query, key, value):
        tensor[start + 20 : end] += 1
    after = packed_attention(query, key, value, bounds)
    assert torch.equal(before[: start + 20], after[: start + 20])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start + 20 : end], after[start + 20 : end])


# ------------------------------------------------------------------------------------------------------------------ the whole path


def two_layers(size: str, mode: str, device: torch.device, plan: ForwardPlan, *flags: str):
    """Two decoder layers at full width."""
    return adapt(load_random(FalconConfig(**SIZES[size] | {"num_hidden_layers": 2}), mode, device)[0], "--lora_r", "64", *flags, plan=plan)


def full_width_rows() -> list[dict]:
    return random_rows((300, 512, 84, 128), vocabulary=65024)  # whole blocks of tokens, for torch.compile


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ("falcon-7b", "falcon-40b"))
def test_packed_path_is_as_accurate_as_the_plain_path(size, mode, compiled, cuda):
    model = two_layers(size, mode, cuda, ForwardPlan(torch.bfloat16, compile=compiled))
    median, worst = accuracy_ratios(model, full_width_rows(), cuda, f"{size} {mode} {'compiled' if compiled else 'eager'}")
    assert median <= 1.1
    assert worst <= 1.5


@pytest.mark.parametrize("size", ("falcon-7b", "falcon-40b"))
def test_compilation_changes_nothing_but_rounding(size, cuda):
    batch = pack_rows(full_width_rows(), multiple=TOKEN_BLOCK).to(cuda)
    model = two_layers(size, "4bit", cuda, ForwardPlan(torch.bfloat16), "--lora_dropout", "0.1")
    loss, gradients = packed_gradients(model, [batch], dropout_key=7)
    model.base_model.model.prepare_packed(ForwardPlan(torch.bfloat16, compile=True))
    compiled_loss, compiled = packed_gradients(model, [batch], dropout_key=7)
    assert compiled_loss == pytest.approx(loss, rel=1e-3)
    assert max(relative_error(compiled[name], gradients[name]) for name in gradients) < 0.03  # another dropout mask would be above 0.1
    model.base_model.model.prepare_packed(ForwardPlan(torch.float32))
    exact_loss, exact = packed_gradients(model, [batch], dropout_key=7)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert max(relative_error(gradients[name], exact[name]) for name in gradients) < 0.03


@pytest.mark.parametrize("changes", ({"recomputed_layers": 1}, {"recomputed_layers": 2}, {"keep_16bit_copy": True}), ids=("partly recomputed", "recomputed", "copy"))
@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_settings_that_save_memory_or_time_change_nothing(mode, changes, cuda):
    batch = pack_rows(full_width_rows()).to(cuda)
    results = []
    for plan in (ForwardPlan(torch.bfloat16), ForwardPlan(torch.bfloat16, **changes)):
        results.append(packed_gradients(two_layers("falcon-7b", mode, cuda, plan, "--lora_dropout", "0.1"), [batch], dropout_key=7))
    (loss, gradients), (other_loss, other) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    # The attention kernel's backward adds to the query gradients in no fixed order.
    assert max(relative_error(other[name], gradients[name]) for name in gradients) < 2e-3


# -------------------------------------------------------------------------------------------------------------------- memory plan


def test_a_cap_is_enforced_and_planned_for(cuda):
    options = parse_options(["-m", "falcon-7b", "--random_weights"])
    config = FalconConfig(**SIZES["falcon-7b"])
    whole = choose_plan(options, config, cuda, torch.bfloat16, 512)
    total = torch.cuda.mem_get_info(cuda)[1] / 2**30
    assert whole.needed_gib <= whole.available_gib <= total
    try:
        limit_memory(cuda, 9.0)
        torch.cuda.empty_cache()
        assert available_gib(cuda) <= 9.0
        capped = choose_plan(options, config, cuda, torch.bfloat16, 512)
        assert capped.needed_gib <= capped.available_gib <= 9.0
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(10 * 2**30, dtype=torch.uint8, device=cuda)
        with pytest.raises(UserError, match="this card has"):
            limit_memory(cuda, total + 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
