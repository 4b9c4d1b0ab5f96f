"""Triton kernels of the LoRA operator: products with the dropped input whose mask is made in registers, never stored.

Each reads the wide matrix once. Their plain twins stand in lora.py (`drop` and a matmul); the tests hold the two together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 128  # a block of this rank still fits the registers; larger ranks take the plain twin


@triton.jit
def _keep(token_keys, feature_keys, threshold):
    """The mask of lora.drop for a tile: token_keys [M, 1], feature_keys [1, N], int32."""
    value = (token_keys ^ feature_keys) * 0x7FEB352D
    value = (value ^ ((value >> 15) & 0x1FFFF)) * -2073254261
    return value < threshold


@triton.jit
def _project_kernel(x, a, tokens, features, u, T, K, R, stride_x, threshold, inverse_keep,
                    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    inside = rows < T
    token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
    total = tl.zeros((BM, BR), dtype=tl.float32)
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        valid = columns < K
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if DROP:
            feature_keys = tl.load(features + columns, mask=valid, other=0)[None, :]
            tile = tl.where(_keep(token_keys, feature_keys, threshold), tile, 0.0)
        weight = tl.load(a + ranks[None, :] * K + columns[:, None], mask=(ranks < R)[None, :] & valid[:, None], other=0.0)
        total = tl.dot(tile, weight, total)
    tl.store(u + rows[:, None] * R + ranks[None, :], (total * inverse_keep).to(u.dtype.element_ty), mask=inside[:, None] & (ranks < R)[None, :])


def project_dropped(x: Tensor, a: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float) -> Tensor:
    """u = drop(x) a': x [T, K] and a [R, K] in bf16 -> [T, R] in bf16."""
    count, width, rank = x.shape[0], x.shape[1], a.shape[0]
    u = x.new_empty(count, rank)
    block = 64 if count >= 8192 else 32 if count >= 4096 else 16
    _project_kernel[(triton.cdiv(count, block),)](x, a, tokens, features, u, count, width, rank, x.stride(0), threshold, 1 / keep,
                                                  DROP=keep < 1, BM=block, BK=128, BR=_rank_block(rank), num_warps=4, num_stages=4)
    return u


@triton.jit
def _outer_kernel(x, grad_u, tokens, features, partial, T, K, R, stride_x, rows_per_split, threshold, inverse_keep,
                  DROP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    ranks = tl.arange(0, BR)
    valid = columns < K
    feature_keys = tl.load(features + columns, mask=valid, other=0)[None, :]
    total = tl.zeros((BR, BK), dtype=tl.float32)
    first = split * rows_per_split
    for start in range(first, tl.minimum(first + rows_per_split, T), BT):
        rows = start + tl.arange(0, BT)
        inside = rows < tl.minimum(first + rows_per_split, T)
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if DROP:
            token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
            tile = tl.where(_keep(token_keys, feature_keys, threshold), tile, 0.0)
        grad = tl.load(grad_u + rows[None, :] * R + ranks[:, None], mask=inside[None, :] & (ranks < R)[:, None], other=0.0)
        total = tl.dot(grad, tile, total)
    out = partial + split.to(tl.int64) * R * K + ranks[:, None] * K + columns[None, :]
    tl.store(out, total * inverse_keep, mask=(ranks < R)[:, None] & valid[None, :])


def outer_dropped(grad_u: Tensor, x: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float) -> Tensor:
    """grad_u' drop(x), summed over the tokens in float32 in a fixed order: grad_u [T, R], x [T, K] -> [R, K]."""
    count, width, rank = x.shape[0], x.shape[1], grad_u.shape[1]
    block = 128
    tiles = triton.cdiv(width, block)
    splits = max(1, min(16, 396 // tiles, count // 256))
    rows_per_split = triton.cdiv(triton.cdiv(count, splits), 64) * 64
    splits = triton.cdiv(count, rows_per_split)
    partial = torch.empty(splits, rank, width, dtype=torch.float32, device=x.device)
    _outer_kernel[(tiles, splits)](x, grad_u, tokens, features, partial, count, width, rank, x.stride(0), rows_per_split, threshold, 1 / keep,
                                   DROP=keep < 1, BT=64, BK=block, BR=_rank_block(rank), num_warps=4, num_stages=3)
    return partial.sum(0) if splits > 1 else partial[0]


@triton.jit
def _update_kernel(grad_x, grad_u, a, tokens, features, T, K, R, stride_g, threshold, inverse_keep,
                   DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    inside, valid = rows < T, columns < K
    grad = tl.load(grad_u + rows[:, None] * R + ranks[None, :], mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
    weight = tl.load(a + ranks[:, None] * K + columns[None, :], mask=(ranks < R)[:, None] & valid[None, :], other=0.0)
    update = tl.dot(grad, weight)
    if DROP:
        token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
        feature_keys = tl.load(features + columns, mask=valid, other=0)[None, :]
        update = tl.where(_keep(token_keys, feature_keys, threshold), update * inverse_keep, 0.0)
    place = grad_x + rows[:, None].to(tl.int64) * stride_g + columns[None, :]
    both = inside[:, None] & valid[None, :]
    tl.store(place, (tl.load(place, mask=both, other=0.0).to(tl.float32) + update).to(grad_x.dtype.element_ty), mask=both)


def add_dropped_update(grad_x: Tensor, grad_u: Tensor, a: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float) -> None:
    """grad_x += mask (grad_u a) / keep, in place: grad_x [T, K], grad_u [T, R], a [R, K], all bf16; the sum is rounded once."""
    count, width, rank = grad_x.shape[0], grad_x.shape[1], a.shape[0]
    grid = (triton.cdiv(count, 128), triton.cdiv(width, 128))
    _update_kernel[grid](grad_x, grad_u, a, tokens, features, count, width, rank, grad_x.stride(0), threshold, 1 / keep,
                         DROP=keep < 1, BM=128, BK=128, BR=_rank_block(rank), num_warps=8, num_stages=2)


@triton.jit
def _int8_kernel(codes, scales, out, K, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    scale = tl.load(scales + row) * (1 / 127)
    value = tl.load(codes + row * K + columns, mask=columns < K, other=0).to(tl.float32) * scale
    tl.store(out + row * K + columns, value.to(out.dtype.element_ty), mask=columns < K)


def dequantize_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes int8 [out, in] x scales float32 [out] / 127 -> [out, in] in dtype, rounded once."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _int8_kernel[(codes.shape[0], triton.cdiv(codes.shape[1], 2048))](codes, scales, out, codes.shape[1], BK=2048, num_warps=4)
    return out


def _rank_block(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))
