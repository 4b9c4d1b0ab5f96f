"""Attention over packed rows: each row as if it were alone."""

import pytest
import torch

from falcon_finetune.attention import RowBounds, attention_by_row, packed_attention
from falcon_finetune.packed_falcon import alibi_slopes
from tests.falcons import CPU, relative_error

LENGTHS = (5, 1, 12, 30)


def random_heads(heads: int, kv_heads: int, lengths: tuple[int, ...] = LENGTHS, head_dim: int = 64, dtype=torch.float32, device=CPU):
    generator = torch.Generator(device).manual_seed(2)
    return [torch.randn(sum(lengths), count, head_dim, generator=generator, device=device).to(dtype) for count in (heads, kv_heads, kv_heads)]


def bounds_of(lengths: tuple[int, ...], device=CPU) -> RowBounds:
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return RowBounds(starts, lengths, max(lengths))


def dense_attention(query, key, value, lengths, slopes=None):
    """Softmax attention of all rows at once in float64, with a mask [T, T] that is written out."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(rows))
    positions = torch.cat([torch.arange(length) for length in lengths])
    seen = (rows[:, None] == rows[None]) & (place[:, None] >= place[None])
    group = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().T / query.shape[2] ** 0.5
        if slopes is not None:
            scores += slopes[head].double() * positions[None] / query.shape[2] ** 0.5
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(1) @ value[:, head // group].double())
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("heads, kv_heads", ((71, 1), (16, 2), (4, 4)))
def test_each_row_equals_attention_under_a_dense_mask(heads, kv_heads):
    query, key, value = random_heads(heads, kv_heads)
    assert relative_error(packed_attention(query, key, value, bounds_of(LENGTHS)), dense_attention(query, key, value, LENGTHS)) < 1e-6


def test_alibi_is_added_per_position_of_the_row():
    query, key, value = random_heads(4, 4)
    slopes = alibi_slopes(4, CPU)  # powers of two: exact in bf16, in which Falcon rounds the product with positions below 256
    assert relative_error(attention_by_row(query, key, value, LENGTHS, slopes), dense_attention(query, key, value, LENGTHS, slopes)) < 1e-6


@pytest.mark.parametrize("alibi", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_row_sees_another_and_no_token_sees_a_later_one(alibi, dtype):
    query, key, value = (x.requires_grad_() for x in random_heads(4, 4, dtype=dtype))
    slopes = alibi_slopes(4, CPU) if alibi else None
    before = attention_by_row(query, key, value, LENGTHS, slopes)
    start, end = 6, 18  # the third row
    before[start:end].float().square().sum().backward()
    for tensor in (query, key, value):
        outside = torch.cat((tensor.grad[:start], tensor.grad[end:]))
        assert torch.count_nonzero(outside) == 0
        assert torch.count_nonzero(tensor.grad[start:end]) > 0
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[start + 4 : end] += 1
        after = attention_by_row(query, key, value, LENGTHS, slopes)
    assert torch.equal(before[: start + 4], after[: start + 4])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start + 4 : end], after[start + 4 : end])
