"""Triton kernels for what a GEMM library has no call for: dropped LoRA products, dequantisation, cross entropy.

Each reads the wide matrix once, and masks are made in registers, never stored. Their plain twins stand in lora.py, quantization.py and
packed_falcon.py; the tests hold each pair together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles: measured on an H200 at 8,192 tokens, the widths of 7B and rank 64. Neighbouring programs share rows, so that grad_u stays in the cache.
UPDATE_TILE = (64, 64, 4)  # rows, columns, warps
GELU_TILE = (64, 128, 8)
OUTER_TILE = (64, 128, 8)  # tokens, columns, warps
MAX_RANK = 128  # a block of this rank still fits the registers; larger ranks take the plain twin


@triton.jit
def _keep(token_keys, feature_keys, threshold):
    """The mask of lora.drop for a tile: token_keys [M, 1], feature_keys [1, N], int32."""
    value = (token_keys ^ feature_keys).to(tl.uint32, bitcast=True) * 0x7FEB352D
    value = (value ^ (value >> 15)) * 0x846CA68B
    return value.to(tl.int32, bitcast=True) < threshold


@triton.jit
def _normal(x):
    """(the standard normal distribution up to x, exp(-x^2 / 2)): Abramowitz and Stegun 7.1.26, 7e-8 off at most, a quarter of erf's price."""
    bell = tl.exp2(-0.7213475204444817 * x * x)
    t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(x))
    tail = bell * t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _gelu(x):
    below, _ = _normal(x)
    return x * below


@triton.jit
def _gelu_slope(x):
    below, bell = _normal(x)
    return below + x * bell * 0.3989422804014327


@triton.jit
def _project_kernel(x, a, tokens, features, partial, T, K, R, stride_x, columns_per_split, threshold, inverse_keep,
                    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    ranks = tl.arange(0, BR)
    inside = rows < T
    token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
    total = tl.zeros((BM, BR), dtype=tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, K)
    for start in range(first, last, BK):
        columns = start + tl.arange(0, BK)
        valid = columns < last
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride_x + columns[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
        if DROP:
            feature_keys = tl.load(features + columns, mask=valid, other=0)[None, :]
            tile = tl.where(_keep(token_keys, feature_keys, threshold), tile, 0.0)
        weight = tl.load(a + ranks[None, :] * K + columns[:, None], mask=(ranks < R)[None, :] & valid[:, None], other=0.0)
        total = tl.dot(tile, weight, total)
    out = partial + (split * T + rows[:, None]).to(tl.int64) * R + ranks[None, :]
    tl.store(out, total * inverse_keep, mask=inside[:, None] & (ranks < R)[None, :])


def project_dropped(x: Tensor, a: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float) -> Tensor:
    """u = drop(x) a': x [T, K] and a [R, K] in bf16 -> [T, R] in bf16, summed in float32 in a fixed order."""
    count, width, rank = x.shape[0], x.shape[1], a.shape[0]
    row_blocks = triton.cdiv(count, 64)
    splits = max(1, min(8, 528 // row_blocks, width // 512))
    columns_per_split = triton.cdiv(triton.cdiv(width, splits), 64) * 64
    splits = triton.cdiv(width, columns_per_split)
    partial = torch.empty(splits, count, rank, dtype=torch.float32, device=x.device)
    _project_kernel[(row_blocks, splits)](x, a, tokens, features, partial, count, width, rank, x.stride(0), columns_per_split, threshold, 1 / keep,
                                          DROP=keep < 1, BM=64, BK=64, BR=_rank_block(rank), num_warps=4, num_stages=3)
    return (partial.sum(0) if splits > 1 else partial[0]).to(x.dtype)


@triton.jit
def _outer_kernel(x, grad_u, tokens, features, partial, T, K, R, stride_x, rows_per_split, threshold, inverse_keep,
                  DROP: tl.constexpr, GELU: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
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
        if GELU:
            tile = _gelu(tile.to(tl.float32)).to(tile.dtype)
        if DROP:
            token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
            tile = tl.where(_keep(token_keys, feature_keys, threshold), tile, 0.0)
        grad = tl.load(grad_u + rows[None, :] * R + ranks[:, None], mask=inside[None, :] & (ranks < R)[:, None], other=0.0)
        total = tl.dot(grad, tile, total)
    out = partial + split.to(tl.int64) * R * K + ranks[:, None] * K + columns[None, :]
    tl.store(out, total * inverse_keep, mask=(ranks < R)[:, None] & valid[None, :])


def outer_dropped(grad_u: Tensor, x: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float, *, gelu: bool = False) -> Tensor:
    """grad_u' drop(x), or grad_u' drop(gelu(x)), summed over the tokens in float32 in a fixed order: grad_u [T, R], x [T, K] -> [R, K]."""
    count, width, rank = x.shape[0], x.shape[1], grad_u.shape[1]
    tokens_per_tile, block, warps = OUTER_TILE
    tiles = triton.cdiv(width, block)
    splits = max(1, min(16, (792 if gelu else 396) // tiles, count // 256))  # programs for 132 multiprocessors: 6 or 3 each
    rows_per_split = triton.cdiv(triton.cdiv(count, splits), tokens_per_tile) * tokens_per_tile
    splits = triton.cdiv(count, rows_per_split)
    partial = torch.empty(splits, rank, width, dtype=torch.float32, device=x.device)
    _outer_kernel[(tiles, splits)](x, grad_u, tokens, features, partial, count, width, rank, x.stride(0), rows_per_split, threshold, 1 / keep,
                                   DROP=keep < 1, GELU=gelu, BT=tokens_per_tile, BK=block, BR=_rank_block(rank), num_warps=warps, num_stages=3)
    return partial.sum(0) if splits > 1 else partial[0]


@triton.jit
def _update_kernel(grad_x, grad_u, a, tokens, features, T, K, R, stride_g, threshold, inverse_keep,
                   preactivation, DROP: tl.constexpr, GELU: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    columns = tl.program_id(0) * BK + tl.arange(0, BK)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    ranks = tl.arange(0, BR)
    inside, valid = rows < T, columns < K
    place = grad_x + rows[:, None].to(tl.int64) * stride_g + columns[None, :]
    both = inside[:, None] & valid[None, :]
    before = tl.load(place, mask=both, other=0.0)
    grad = tl.load(grad_u + rows[:, None] * R + ranks[None, :], mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
    weight = tl.load(a + ranks[:, None] * K + columns[None, :], mask=(ranks < R)[:, None] & valid[None, :], other=0.0)
    update = tl.dot(grad, weight)
    if DROP:
        token_keys = tl.load(tokens + rows, mask=inside, other=0)[:, None]
        feature_keys = tl.load(features + columns, mask=valid, other=0)[None, :]
        update = tl.where(_keep(token_keys, feature_keys, threshold), update * inverse_keep, 0.0)
    update += before.to(tl.float32)
    if GELU:
        update *= _gelu_slope(tl.load(preactivation + rows[:, None].to(tl.int64) * K + columns[None, :], mask=both, other=0.0).to(tl.float32))
    tl.store(place, update.to(grad_x.dtype.element_ty), mask=both)


def add_dropped_update(grad_x: Tensor, grad_u: Tensor, a: Tensor, tokens: Tensor, features: Tensor, threshold: int, keep: float,
                       *, through_gelu: Tensor | None = None) -> None:
    """grad_x += mask (grad_u a) / keep, in place: grad_x [T, K], grad_u [T, R], a [R, K], all bf16; the sum is rounded once.

    through_gelu: x = gelu(through_gelu) [T, K, contiguous]; then grad_x becomes the gradient of through_gelu.
    """
    count, width, rank = grad_x.shape[0], grad_x.shape[1], a.shape[0]
    rows, columns, warps = UPDATE_TILE
    grid = (triton.cdiv(width, columns), triton.cdiv(count, rows))
    _update_kernel[grid](grad_x, grad_u, a, tokens, features, count, width, rank, grad_x.stride(0), threshold, 1 / keep,
                         through_gelu, DROP=keep < 1, GELU=through_gelu is not None, BM=rows, BK=columns, BR=_rank_block(rank), num_warps=warps, num_stages=2)


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


@triton.jit
def _add_gelu_kernel(up, u, b, activated, T, K, R, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    ranks = tl.arange(0, BR)
    inside, valid = rows < T, columns < K
    both = inside[:, None] & valid[None, :]
    place = rows[:, None].to(tl.int64) * K + columns[None, :]
    before = tl.load(up + place, mask=both, other=0.0)
    left = tl.load(u + rows[:, None] * R + ranks[None, :], mask=inside[:, None] & (ranks < R)[None, :], other=0.0)
    right = tl.load(b + columns[None, :] * R + ranks[:, None], mask=(ranks < R)[:, None] & valid[None, :], other=0.0)
    total = (tl.dot(left, right) + before.to(tl.float32)).to(up.dtype.element_ty)
    tl.store(up + place, total, mask=both)
    tl.store(activated + place, _gelu(total.to(tl.float32)).to(up.dtype.element_ty), mask=both)


def add_update_gelu_(up: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """up += u b' in place, and gelu(up) in the same pass: up [T, K] contiguous, u [T, R], b [K, R], all bf16."""
    activated = torch.empty_like(up)
    count, width, rank = up.shape[0], up.shape[1], u.shape[1]
    rows, columns, warps = GELU_TILE
    _add_gelu_kernel[(triton.cdiv(count, rows), triton.cdiv(width, columns))](up, u, b, activated, count, width, rank, BM=rows, BK=columns,
                                                                              BR=_rank_block(rank), num_warps=warps, num_stages=2)
    return activated


@triton.jit
def _nf4_kernel(codes, absmax_codes, absmax_scales, code_book, offset, levels, out, COUNT, BYTES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = place < COUNT
    byte = tl.load(codes + place, mask=inside, other=0)
    block = place // 32  # 64 weights share an absmax
    absmax_code = tl.load(absmax_codes + block, mask=inside, other=0)
    absmax = tl.load(code_book + absmax_code) * tl.load(absmax_scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    high = tl.load(levels + (byte >> 4)) * absmax
    low = tl.load(levels + (byte & 15)) * absmax
    pair = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + pair, tl.interleave(high, low).to(out.dtype.element_ty), mask=pair < 2 * COUNT)


def dequantize_nf4(codes: Tensor, absmax_codes: Tensor, absmax_scales: Tensor, code_book: Tensor, offset: Tensor, levels: Tensor,
                   shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The doubly quantised NF4 weight in one pass: its absmax is decoded on the way (bitsandbytes takes three kernels)."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _nf4_kernel[(triton.cdiv(codes.numel(), 1024),)](codes, absmax_codes, absmax_scales, code_book, offset, levels, out, codes.numel(), BYTES=1024, num_warps=4)
    return out


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, V, stride, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    top, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(value, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher), 0)
        top = higher
    normaliser = top + tl.log(total)
    tl.store(losses + row, normaliser - tl.load(logits + row * stride + target).to(tl.float32))
    if GRAD:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
            share = tl.exp(value - normaliser) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + row * stride + columns, share.to(logits.dtype.element_ty), mask=columns < V)


def cross_entropy_(logits: Tensor, targets: Tensor, *, grad: bool) -> Tensor:
    """The loss of each row, float32 [L]; with `grad`, logits [L, V] are overwritten with softmax - onehot(target)."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(logits.shape[0],)](logits, targets, losses, logits.shape[1], logits.stride(0), GRAD=grad, BLOCK=4096, num_warps=8)
    return losses
