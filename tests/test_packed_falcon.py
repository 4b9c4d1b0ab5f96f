"""The packed forward against its twin, transformers' own forward through PEFT on each row alone: loss, logits and gradients."""

import statistics

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from falcon_finetune import packed_falcon
from falcon_finetune.packed_falcon import TOKEN_BLOCK, ForwardPlan, alibi_slopes, pack_rows, summed_cross_entropy
from falcon_finetune.training import cut_into_micro_batches
from tests.falcons import ARCHITECTURES, CPU, MODES, adapted_tiny, adapter_gradients, random_rows, relative_error, stored_weight

LENGTHS = (5, 17, 1, 9)


# --------------------------------------------------------------------------------------- the twin, shared with the tests on a GPU


def widen(model: peft.PeftModel) -> None:
    """Turns an adapted model into its float32 reference in place: the same stored weights, plain linears, no rounding anywhere."""
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            base = module.get_base_layer()
            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            plain.weight = nn.Parameter(stored_weight(base), requires_grad=False)
            if base.bias is not None:
                plain.bias = nn.Parameter(base.bias.data.float(), requires_grad=False)
            module.base_layer = plain
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def plain_loss(model: peft.PeftModel, rows: list[dict], device: torch.device) -> torch.Tensor:
    """The loss of each row alone, summed, by transformers' forward."""
    total = torch.zeros((), device=device)
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:], dtype=torch.int64, device=device), ignore_index=-100, reduction="sum")
    return total


def packed_gradients(model: peft.PeftModel, batches: list, dropout_key: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        loss = model(packed=batch, dropout_key=dropout_key)
        loss.backward()
        total += loss.item()
    return total, adapter_gradients(model)


def accuracy_ratios(model: peft.PeftModel, rows: list[dict], device: torch.device, label: str) -> tuple[float, float]:
    """(median, worst) over the adapters of the packed path's gradient error divided by the plain path's; the model is widened by this.

    Both errors are against float32 on the same stored weights. The plain path is transformers and PEFT under bf16 autocast, norms in float32.
    """
    _, packed = packed_gradients(model, [pack_rows(rows).to(device)])
    with torch.autocast(device.type, torch.bfloat16):
        loss = plain_loss(model, rows, device)
    loss.backward()
    plain = adapter_gradients(model)
    widen(model)
    plain_loss(model, rows, device).backward()
    reference = adapter_gradients(model)
    ours = {name: relative_error(packed[name], reference[name]) for name in reference}
    theirs = {name: relative_error(plain[name], reference[name]) for name in reference}
    median = statistics.median(ours.values()) / statistics.median(theirs.values())
    worst = max(ours[name] / theirs[name] for name in reference)
    print(f"{label}: gradient error, packed median {statistics.median(ours.values()):.2e} max {max(ours.values()):.2e}, "
          f"plain median {statistics.median(theirs.values()):.2e} max {max(theirs.values()):.2e}; ratio median {median:.2f}, worst {worst:.2f}")  # fmt: skip
    return median, worst


# ------------------------------------------------------------------------------------------------------------- the same as the twin


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_equal_each_row_alone(architecture, mode):
    model = adapted_tiny(architecture, mode)
    falcon, rows = model.base_model.model, random_rows(LENGTHS)
    with torch.no_grad():
        logits = falcon.lm_head.weight.float() @ falcon.transformer.ln_f(falcon.packed_hidden(pack_rows(rows))).T
    loss, gradients = packed_gradients(model, [pack_rows(rows)])
    widen(model)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    total = plain_loss(model, rows, CPU)
    total.backward()
    assert relative_error(logits.T, alone) < 1e-5
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, gradient in adapter_gradients(model).items():
        assert gradient.norm() > 0
        assert relative_error(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("mode", MODES)
def test_packed_rows_equal_the_layers_of_bitsandbytes(mode):
    """Against the quantised layers' own forward; their backward rounds to 16 bits, which is why the test above widens them."""
    model = adapted_tiny("40b", mode)
    rows = random_rows(LENGTHS)
    with torch.no_grad():
        loss = model(packed=pack_rows(rows)).item()
        model.base_model.model.transformer.word_embeddings.weight.data = model.base_model.model.transformer.word_embeddings.weight.data.float()
        if mode == "16bit":
            model.float()
        assert loss == pytest.approx(plain_loss(model, rows, CPU).item(), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_16_bit_compute_is_as_accurate_as_the_plain_path(architecture, mode):
    model = adapted_tiny(architecture, mode, plan=ForwardPlan(torch.bfloat16))
    median, worst = accuracy_ratios(model, random_rows((96, 64, 31, 65)), CPU, f"{architecture} {mode}")
    assert median <= 1.1
    assert worst <= 1.5


@pytest.mark.parametrize("heads", (4, 6, 71))
def test_alibi_slopes_are_transformers_own(heads):
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # [heads, 1, 2]; the bias of position 1 is the slope in bf16
    torch.testing.assert_close(alibi_slopes(heads, CPU).bfloat16().float(), bias[:, 0, 1], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- equal by definition, so tested equal


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("architecture", ("7b", "rw"))
def test_recompute_changes_no_bit(architecture, dtype):
    rows = random_rows(LENGTHS)
    results = []
    for recomputed_layers in (0, 1, 2):  # none, some, all
        model = adapted_tiny(architecture, "4bit", "--lora_dropout", "0.1", plan=ForwardPlan(dtype, recomputed_layers=recomputed_layers))
        results.append(packed_gradients(model, [pack_rows(rows)], dropout_key=7))
    (loss, gradients), *others = results
    for again, same in others:
        assert loss == again
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)


@pytest.mark.parametrize("architecture", ("7b", "40b"))
def test_micro_batches_add_up_to_the_whole_step(architecture):
    model = adapted_tiny(architecture, "4bit", "--lora_dropout", "0.1")
    rows = random_rows((20, 30, 7, 25, 12, 40))
    cuts = {budget: cut_into_micro_batches(rows, budget) for budget in (1, 50, 10_000)}
    assert [len(cut) for cut in cuts.values()] == [6, 3, 1]
    whole, gradients = packed_gradients(model, cuts.pop(10_000), dropout_key=7)
    for cut in cuts.values():
        loss, parts = packed_gradients(model, cut, dropout_key=7)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert max(relative_error(parts[name], gradients[name]) for name in gradients) < 1e-5
    other, moved = packed_gradients(model, cuts[50], dropout_key=8)  # the test above would pass without any dropout
    assert other != pytest.approx(whole, rel=1e-5)
    assert min(relative_error(moved[name], gradients[name]) for name in gradients) > 1e-3


def test_dropout_is_off_in_evaluation():
    model = adapted_tiny("7b", "4bit", "--lora_dropout", "0.5")
    without = adapted_tiny("7b", "4bit")
    batch = pack_rows(random_rows(LENGTHS))
    assert model.eval()(packed=batch).item() == without(packed=batch).item() != model.train()(packed=batch).item()


def test_a_row_without_learnt_tokens_changes_nothing():
    model = adapted_tiny("7b", "8bit")
    rows = random_rows(LENGTHS)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    before = packed_gradients(model, [pack_rows(rows)])
    rows[1]["input_ids"] = [2 + token % 300 for token in rows[1]["input_ids"]]
    after = packed_gradients(model, [pack_rows(rows)])
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    loss, gradients = packed_gradients(model, [pack_rows([rows[1]])])
    assert loss == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients.values())


def test_nothing_is_padded_and_labels_are_shifted_inside_each_row():
    packed = pack_rows([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}], slots=[3, 9], row_stride=100)
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.token_ids.tolist() == [300, 301, 302, 900, 901]
    assert packed.learnt_at.tolist() == [0, 1, 3]  # never the last token of a row, whose next token belongs to another
    assert packed.targets.tolist() == [6, 7, 9]
    assert packed.bounds.starts.tolist() == [0, 3, 5]
    assert packed.bounds.lengths == (3, 2)
    assert packed.bounds.longest == 3


def test_a_filler_row_carries_nothing():
    model = adapted_tiny("7b", "4bit", "--lora_dropout", "0.1")
    rows = random_rows(LENGTHS)
    filled = pack_rows(rows, multiple=TOKEN_BLOCK)
    assert len(filled.input_ids) == len(filled.positions) == len(filled.token_ids) == TOKEN_BLOCK
    loss, gradients = packed_gradients(model, [pack_rows(rows)], dropout_key=7)
    same_loss, same = packed_gradients(model, [filled], dropout_key=7)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert max(relative_error(same[name], gradients[name]) for name in gradients) < 1e-5
    whole = pack_rows(random_rows((TOKEN_BLOCK,)), multiple=TOKEN_BLOCK)
    assert whole.bounds.lengths == (TOKEN_BLOCK,) and whole.bounds.equal and not filled.bounds.equal


@pytest.mark.parametrize("mode", ("4bit", "8bit"))
def test_a_16_bit_copy_of_the_base_changes_no_bit(mode):
    rows = random_rows(LENGTHS)
    results = []
    for copy in (False, True):
        model = adapted_tiny("40b", mode, "--lora_dropout", "0.1", plan=ForwardPlan(torch.bfloat16, keep_16bit_copy=copy))
        results.append(packed_gradients(model, [pack_rows(rows)], dropout_key=7))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


# ------------------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("learnt", (0, 1, 3, 10))
def test_summed_cross_entropy_equals_torchs_over_chunks(learnt, monkeypatch):
    monkeypatch.setattr(packed_falcon, "_HEAD_CHUNK_BYTES", 3 * 4 * 50)  # three rows a chunk
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(learnt, 16, generator=generator)).requires_grad_()
    weight, targets = torch.randn(50, 16, generator=generator), torch.randint(0, 50, (learnt,), generator=generator)
    loss = summed_cross_entropy(hidden, weight, targets)
    (0.37 * loss).backward()
    ours, hidden.grad = hidden.grad, None
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (0.37 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-5, atol=1e-5)


def test_the_loss_needs_no_gradient():
    model = adapted_tiny("7b", "16bit")
    batch = pack_rows(random_rows(LENGTHS))
    with torch.no_grad():
        quiet = model(packed=batch)
    assert not quiet.requires_grad
    assert quiet.item() == pytest.approx(model(packed=batch).item(), rel=1e-6)
