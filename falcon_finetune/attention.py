"""Causal attention over packed rows: no row sees another, nothing is padded, keys and values are not copied per query head.

transformers' Falcon drops the row boundaries of packed batches and builds a dense mask for every other batch; here the boundaries are
computed once per batch and the kernel reads them. GPUs run torch's variable-length flash kernel, CPUs a loop over the rows.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import varlen

# torch 2.11 takes fewer key/value heads as they are; 2.13 wants to be told.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}


@dataclass(frozen=True)
class RowBounds:
    """Where the packed rows begin and end: `starts` int32 [rows + 1] on the device, `lengths` the same on the host."""

    starts: Tensor
    lengths: tuple[int, ...]
    longest: int
    equal: bool = False  # all rows have the longest's length


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: RowBounds, alibi: Tensor | None = None) -> Tensor:
    """Causal attention inside each row.

    Args:
        query: [T, H, D]; key and value: [T, K, D] with H a multiple of K (71:1 in Falcon-7B, 128:8 in 40B).
        bounds: the rows; their lengths sum to T.
        alibi: slopes [H] of falcon-rw, in place of rotary positions.

    Returns:
        [T, H, D] in the dtype of query.
    """
    if bounds.equal and alibi is None:  # without ragged rows the dense causal kernel serves, on a GPU about a third quicker
        q, k, v = (x.unflatten(0, (-1, bounds.longest)).transpose(1, 2) for x in (query, key, value))
        if not query.is_cuda:  # the CPU kernel wants as many key and value heads
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=query.is_cuda).transpose(1, 2).reshape(query.shape)
    if query.is_cuda and query.dtype != torch.float32 and alibi is None:
        return varlen.varlen_attn(query, key, value, bounds.starts, bounds.starts, bounds.longest, bounds.longest, window_size=(-1, 0), **_GROUPED)
    return attention_by_row(query, key, value, bounds.lengths, alibi)


def attention_by_row(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], alibi: Tensor | None = None) -> Tensor:
    """The plain twin of the kernel: one scaled_dot_product_attention a row."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
        q, k, v = (rearrange(x, "length heads d -> 1 heads length d") for x in (q, k, v))
        k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
        if alibi is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=_alibi_mask(alibi, q.shape[2], q.shape[3], q.dtype))
        outputs.append(rearrange(mixed, "1 heads length d -> length heads d"))
    return torch.cat(outputs)


def _alibi_mask(slopes: Tensor, length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Causal mask plus slope x key position, divided by sqrt(D) as Falcon was trained: [H, length, length]."""
    positions = torch.arange(length, device=slopes.device)
    bias = (slopes[:, None].bfloat16() * positions[None]).to(dtype) / head_dim**0.5  # [H, length]
    causal = positions[None] > positions[:, None]
    return bias[:, None].expand(-1, length, -1).masked_fill(causal, torch.finfo(dtype).min)
