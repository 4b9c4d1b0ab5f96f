"""The Falcon forward and loss over packed rows: the path that every run trains on, on CPUs and GPUs.

The weights are transformers' modules under PEFT's wrappers; only the arithmetic between them is here. 16-bit between the GEMMs, float32
inside the norms, the rotary embedding and the residual stream; the head scores only positions that carry loss and keeps no logits. The
plain twin is `FalconForCausalLM.forward`, which stays in place for generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import FalconForCausalLM
from transformers.activations import get_activation

from falcon_finetune.attention import RowBounds, packed_attention
from falcon_finetune.lora import LoraLinear, lora_gelu_mlp, mix
from falcon_finetune.quantization import dequantize, kernels

IGNORED = -100  # the label of a token that carries no loss, as everywhere in transformers
TOKEN_BLOCK = 128
_HEAD_CHUNK_BYTES = 2**29  # float32 logits held at once


@dataclass(frozen=True)
class PackedRows:
    """One micro-batch: rows laid end to end.

    input_ids, positions: int64 [T]; token_ids: int32 [T], the place of each token in the whole optimizer step (slot of its row x a
    stride above any row's length + position), what dropout is addressed by; learnt_at, targets: int64 [L], the positions whose next token carries loss and that token.
    """

    input_ids: Tensor
    positions: Tensor
    token_ids: Tensor
    learnt_at: Tensor
    targets: Tensor
    bounds: RowBounds

    def to(self, device: torch.device) -> "PackedRows":
        move = {name: getattr(self, name).to(device, non_blocking=True) for name in ("input_ids", "positions", "token_ids", "learnt_at", "targets")}
        return replace(self, bounds=replace(self.bounds, starts=self.bounds.starts.to(device, non_blocking=True)), **move)


def pack_rows(rows: Sequence[dict], slots: Sequence[int] | None = None, multiple: int = 1, row_stride: int = 1 << 16) -> PackedRows:
    """Lays rows end to end.

    Args:
        rows: dicts of equally long `input_ids` and `labels` (labels not shifted, -100 where not learnt).
        slots: the place of each row in the optimizer step (default: 0, 1, ...).
        multiple: T is rounded up to it by a filler row that carries no loss and that no other row sees (GEMM tiles, one compiled graph).
        row_stride: a number above the longest row, the same for the whole run.
    """
    if filler := -sum(len(row["input_ids"]) for row in rows) % multiple:
        rows = [*rows, {"input_ids": [0] * filler, "labels": [IGNORED] * filler}]
        slots = [*(range(len(rows) - 1) if slots is None else slots), -1]
    lengths = tuple(len(row["input_ids"]) for row in rows)
    slots = range(len(rows)) if slots is None else slots
    positions = torch.cat([torch.arange(length) for length in lengths])
    token_ids = torch.cat([slot * row_stride + torch.arange(length) for slot, length in zip(slots, lengths)])
    shifted = torch.cat([torch.tensor([*row["labels"][1:], IGNORED], dtype=torch.int64) for row in rows])
    learnt_at = torch.nonzero(shifted != IGNORED).squeeze(1)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedRows(
        input_ids=torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]),
        positions=positions, token_ids=token_ids.to(torch.int32), learnt_at=learnt_at, targets=shifted[learnt_at],
        bounds=RowBounds(starts, lengths, max(lengths), min(lengths) == max(lengths)),
    )


@dataclass(frozen=True)
class ForwardPlan:
    """How the forward pass is carried out; nothing here changes what is learnt. The first `recomputed_layers` layers keep only their input."""

    compute_dtype: torch.dtype = torch.bfloat16
    residual_dtype: torch.dtype = torch.float32
    recomputed_layers: int = 0
    compile: bool = False
    keep_16bit_copy: bool = False


class PackedFalcon(FalconForCausalLM):
    """transformers' Falcon with a second forward, `model(packed=PackedRows, ...)`, that returns the summed loss."""

    plan = ForwardPlan()
    packed_layers = None  # list of PackedLayer, one a decoder layer

    def prepare_packed(self, plan: ForwardPlan) -> None:
        """Collects the tensors of the adapted layers (after `add_lora`) and fixes the plan."""
        self.plan = plan
        self.packed_layers = [PackedLayer(layer, index) for index, layer in enumerate(self.transformer.h)]
        if plan.keep_16bit_copy:
            for layer in self.packed_layers:
                for linear in (layer.query_key_value, layer.dense, layer.h_to_4h, layer.four_h_to_h):
                    linear.frozen = [dequantize(linear.frozen, (linear.b.shape[0], linear.a.shape[1]), plan.compute_dtype)]
        self.layer_forward = torch.compile(blocked_layer, dynamic=None) if plan.compile else decoder_layer

    def forward(self, input_ids=None, packed: PackedRows | None = None, dropout_key: int = 0, **kwargs):
        """`packed`: the loss summed over its learnt positions (float32 scalar), of this micro-batch. Without it, transformers' own forward."""
        if packed is None:
            return super().forward(input_ids, **kwargs)
        hidden = self.packed_hidden(packed, dropout_key)
        learnt = F.layer_norm(hidden[packed.learnt_at].float(), (hidden.shape[1],), *_norm(self.transformer.ln_f)).to(self.plan.compute_dtype)
        return summed_cross_entropy(learnt, self.lm_head.weight, packed.targets)

    def packed_hidden(self, rows: PackedRows, dropout_key: int = 0) -> Tensor:
        """The residual stream [T, hidden] after the last layer, before the final norm."""
        plan, body = self.plan, self.transformer
        hidden = F.embedding(rows.input_ids, body.word_embeddings.weight).to(plan.residual_dtype)
        cos, sin = rotary_tables(body.rotary_emb, rows.positions) if not self.config.alibi else (None, None)
        slopes = alibi_slopes(self.config.num_attention_heads, hidden.device) if self.config.alibi else None
        tokens = mix(mix(rows.token_ids) ^ _as_int32(dropout_key))
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # the first layer's adapters need the graph, the embedding does not
        shape = hidden.shape
        if plan.compile:  # whole blocks: torch.compile then knows that any T is a multiple of TOKEN_BLOCK
            hidden, cos, sin, tokens = (x if x is None else x.unflatten(0, (-1, TOKEN_BLOCK)) for x in (hidden, cos, sin, tokens))
        for index, layer in enumerate(self.packed_layers):
            arguments = (layer, hidden, cos, sin, slopes, tokens, rows.bounds, plan.compute_dtype, self.training)
            if index < plan.recomputed_layers and torch.is_grad_enabled():
                hidden = checkpoint(self.layer_forward, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self.layer_forward(*arguments)
        return hidden.view(shape)


def _as_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return module.weight, module.bias, module.eps


class PackedLayer:
    """One decoder layer as the tensors and constants that `decoder_layer` needs."""

    def __init__(self, layer: nn.Module, index: int):
        config, attention = layer.config, layer.self_attention
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.kv_heads = attention.num_kv_heads
        self.grouped = config.new_decoder_architecture
        self.interleaved = not config.new_decoder_architecture and not config.multi_query
        self.sequential = not (config.new_decoder_architecture or config.parallel_attn)
        self.activation = None if config.activation == "gelu" else get_activation(config.activation)  # gelu: in the operator
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2:
            self.attention_norm, self.mlp_norm = _norm(layer.ln_attn), _norm(layer.ln_mlp)
        else:
            self.attention_norm = _norm(layer.input_layernorm)
            self.mlp_norm = _norm(layer.post_attention_layernorm) if self.sequential else None
        modules = (attention.query_key_value, attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h)
        self.query_key_value, self.dense, self.h_to_4h, self.four_h_to_h = (LoraLinear(m, 4 * index + n) for n, m in enumerate(modules))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (H + 2 K) D] -> query [T, H, D], key and value [T, K, D], in the order of each architecture's fused weight."""
        tokens = qkv.shape[0]
        if self.grouped:
            groups = qkv.view(tokens, self.kv_heads, self.heads // self.kv_heads + 2, self.head_dim)
            return groups[:, :, :-2].reshape(tokens, self.heads, self.head_dim), groups[:, :, -2], groups[:, :, -1]
        if self.interleaved:
            return qkv.view(tokens, self.heads, 3, self.head_dim).unbind(2)
        heads = qkv.view(tokens, self.heads + 2, self.head_dim)
        return heads[:, :-2], heads[:, -2:-1], heads[:, -1:]


def decoder_layer(layer: PackedLayer, hidden: Tensor, cos: Tensor | None, sin: Tensor | None, slopes: Tensor | None, tokens: Tensor,
                  bounds: RowBounds, dtype: torch.dtype, training: bool) -> Tensor:
    """One decoder layer on the residual stream: hidden [T, h] -> [T, h], in hidden's dtype."""

    def norm(x: Tensor, weights: tuple[Tensor, Tensor, float]) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[1],), *weights).to(dtype)

    normed = norm(hidden, layer.attention_norm)
    query, key, value = layer.split_heads(layer.query_key_value(normed, tokens, training))
    if cos is not None:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    mixed = packed_attention(query, key, value, bounds, slopes)
    attended = layer.dense(mixed.reshape(hidden.shape[0], -1), tokens, training)
    if layer.sequential:
        hidden = hidden + attended
    if layer.mlp_norm is not None:
        normed = norm(hidden, layer.mlp_norm)
    if layer.activation is None:
        output = lora_gelu_mlp(layer.h_to_4h, layer.four_h_to_h, normed, tokens, training)
    else:
        output = layer.four_h_to_h(layer.activation(layer.h_to_4h(normed, tokens, training)), tokens, training)
    return hidden + output if layer.sequential else hidden + (attended.float() + output.float()).to(hidden.dtype)


def blocked_layer(layer: PackedLayer, hidden: Tensor, cos: Tensor | None, sin: Tensor | None, slopes: Tensor | None, tokens: Tensor, *constants) -> Tensor:
    """`decoder_layer` on blocks of tokens, [T / TOKEN_BLOCK, TOKEN_BLOCK, ...]: what is compiled."""
    flat = [x if x is None else x.flatten(0, 1) for x in (hidden, cos, sin)]
    return decoder_layer(layer, *flat, slopes, tokens.flatten(), *constants).view(hidden.shape)


def rotary_tables(rotary: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, D] in float32."""
    angles = positions[:, None].float() * rotary.inv_freq[None].float()
    angles = torch.cat((angles, angles), -1).unsqueeze(1)
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [T, heads, D], computed in float32, returned in x's dtype."""
    wide = x.float()
    half = x.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), -1)
    return (wide * cos + turned * sin).to(x.dtype)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi slopes [heads], float32 (Press et al. 2021), as transformers builds them for Falcon."""
    closest = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / closest) for i in range(closest)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / closest) for i in range(heads - closest)]
    return torch.tensor(slopes, device=device)


# --- the head ----------------------------------------------------------------------------------------------------------------------------


class _SummedCrossEntropy(torch.autograd.Function):
    """Cross entropy over a frozen head, chunk by chunk: the gradient of the hidden states is made in the forward pass, logits never stay."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wants_grad else None
        weight = weight.to(hidden.dtype)
        rows = max(1, _HEAD_CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, hidden.shape[0], rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows].unsqueeze(1)
            logits = part @ weight.t()
            if kernels is not None and logits.is_cuda:
                total += kernels.cross_entropy_(logits, targets[start : start + rows], grad=wants_grad).sum()
                if wants_grad:
                    torch.mm(logits, weight, out=grad[start : start + rows])
                continue
            logits = logits.float()
            normaliser = logits.logsumexp(1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if wants_grad:
                share = logits.sub_(normaliser).exp_()
                share.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=share.dtype))
                grad[start : start + rows] = share.to(hidden.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad.float() * grad_total).to(grad.dtype), None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over L of -log softmax(hidden weight')[target]: hidden [L, h], weight [V, h] frozen, targets int64 [L] -> float32 scalar."""
    return _SummedCrossEntropy.apply(hidden, weight, targets)
