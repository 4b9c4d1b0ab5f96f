"""LoRA on a frozen, quantised linear layer: float32 adapters, one operator for base and adapter, dropout addressed by position.

The operator keeps the layer's input once (PEFT keeps it, a dropped copy of it and a mask) and dequantises the weight in the forward and
again in the backward pass, so no 16-bit copy of the base outlives a GEMM. Its plain twin is PEFT's own forward.
"""

from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from falcon_finetune.family import LORA_TARGETS
from falcon_finetune.options import Options
from falcon_finetune.quantization import dequantize, frozen_tensors, int8_product, int8_threshold, kernels

ADAPTER = "default"


def add_lora(model: nn.Module, options: Options, identity: str) -> peft.PeftModel:
    """Wraps the base with LoRA on every decoder linear, in float32, drawn from the run's seed.

    Args:
        identity: what adapter_config.json names as the base; `random:...` keeps anyone from loading it onto real weights.
    """
    model.name_or_path = model.config._name_or_path = identity
    config = peft.LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=list(LORA_TARGETS), base_model_name_or_path=identity,
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    torch.manual_seed(options.seed)
    for module in wrapped.modules():  # drawn again: on a 16-bit base PEFT draws them in bf16
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters(ADAPTER, init_lora_weights=True)
    # DDP would broadcast the frozen base over the network at the start: every rank loaded the same one.
    wrapped._ddp_params_and_buffers_to_ignore = [name for name, p in wrapped.named_parameters() if not p.requires_grad]
    wrapped._ddp_params_and_buffers_to_ignore += [name for name, _ in wrapped.named_buffers()]
    return wrapped


# --- dropout that depends on where a value is, not on when it is drawn -----------------------------------------------------------------
#
# keep(token, feature) = hash(token_key xor feature_key) < threshold. token_key comes from the seed, the optimizer step and the row's place in
# that step, feature_key from the layer. So a step cut into other micro-batches, other ranks, a recomputed layer or a resumed run drops the
# same values, and no mask is stored.

_MIX = (0x7FEB352D, 0x846CA68B - (1 << 32))  # odd multipliers of lowbias32 (C. Wellons, hash-prospector), as int32


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift of an int32 tensor (torch's own is arithmetic)."""
    return (value >> bits) & ((1 << (32 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """A 32-bit integer hash in wrapping int32 arithmetic, any shape."""
    value = (value ^ _shift_right(value, 16)) * _MIX[0]
    value = (value ^ _shift_right(value, 15)) * _MIX[1]
    return value ^ _shift_right(value, 16)


def feature_keys(features: int, stream: int, device: torch.device) -> Tensor:
    """Keys of a layer's input features, int32 [features]; `stream` differs for every linear layer of the model."""
    return mix(torch.arange(features, dtype=torch.int32, device=device) + stream * 0x10001)


def keep_threshold(dropout: float) -> int:
    """A hash below it (as int32) is kept: the share 1 - dropout of all 32-bit values."""
    return min(round((1 - dropout) * 2**32) - 2**31, 2**31 - 1)


def drop(x: Tensor, tokens: Tensor, features: Tensor, dropout: float) -> Tensor:
    """Inverted dropout of x [T, features] with the mask of its keys, in x's dtype."""
    if dropout == 0:
        return x
    value = (tokens.unsqueeze(1) ^ features.unsqueeze(0)) * _MIX[0]  # both keys are well mixed: one more round is enough
    value = (value ^ _shift_right(value, 15)) * _MIX[1]
    return torch.where(value < keep_threshold(dropout), x * (1 / (1 - dropout)), 0)


# --- the operator --------------------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, tokens: Tensor, features: Tensor,
             scale: float, dropout: float, threshold: float, *, add: bool = True) -> tuple[Tensor, Tensor]:
    """y = x W' + bias + scale * u b' (without the last term if not `add`), and u = drop(x) a'. threshold: of LLM.int8, 0 without it."""
    if _has_kernels(x, a):
        u = kernels.project_dropped(x, a.to(x.dtype), tokens, features, keep_threshold(dropout), 1 - dropout)
    else:
        u = F.linear(drop(x, tokens, features, dropout), a.to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    y = int8_product(x, frozen, bias, threshold) if threshold else F.linear(x, dequantize(frozen, (b.shape[0], x.shape[1]), x.dtype), bias)
    return (y.addmm_(u, (b * scale).to(x.dtype).t()) if add else y), u


def _backward(grad: Tensor, x: Tensor, u: Tensor, frozen: Sequence[Tensor], a: Tensor, b: Tensor, tokens: Tensor, features: Tensor,
              scale: float, dropout: float, *, through_gelu: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a (float32) and b (float32). With `through_gelu` x is what the layer's input was the gelu of."""
    grad = grad.contiguous()
    grad_u = grad @ (b * scale).to(grad.dtype)
    grad_b = _mm_float32(grad.t(), u).mul_(scale)
    grad_x = grad @ dequantize(frozen, (b.shape[0], x.shape[1]), grad.dtype)
    if _has_kernels(x, a):
        place = (tokens, features, keep_threshold(dropout), 1 - dropout)
        grad_a = kernels.outer_dropped(grad_u, x, *place, gelu=through_gelu)
        kernels.add_dropped_update(grad_x, grad_u, a.to(grad.dtype), *place, through_gelu=x if through_gelu else None)
        return grad_x, grad_a, grad_b
    grad_a = _mm_float32(grad_u.t(), drop(F.gelu(x) if through_gelu else x, tokens, features, dropout))
    grad_x += drop(grad_u @ a.to(grad.dtype), tokens, features, dropout)
    return (torch.ops.aten.gelu_backward(grad_x, x) if through_gelu else grad_x), grad_a, grad_b


@torch.library.custom_op("falcon_finetune::lora_linear", mutates_args=())
def lora_linear_op(x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, tokens: Tensor, features: Tensor,
                   scale: float, dropout: float, threshold: float) -> tuple[Tensor, Tensor]:
    """y = x W' + bias + scale * drop(x) A' B', and u = drop(x) A' for the backward pass.

    x [T, in] in the compute dtype; frozen: the stored W [out, in]; a [r, in] and b [out, r] in float32; tokens int32 [T]; features int32 [in];
    threshold: above 0, x W' is computed by LLM.int8 with outliers from there on (the backward pass is the same: bitsandbytes' own
    multiplies the gradient with the dequantised weight too).
    """
    return _forward(x, frozen, bias, a, b, tokens, features, scale, dropout, threshold)


@lora_linear_op.register_fake
def _(x, frozen, bias, a, b, tokens, features, scale, dropout, threshold):
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("falcon_finetune::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(grad: Tensor, x: Tensor, u: Tensor, frozen: Sequence[Tensor], a: Tensor, b: Tensor, tokens: Tensor, features: Tensor,
                            scale: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (compute dtype), a and b (float32) for grad [T, out]."""
    return _backward(grad, x, u, frozen, a, b, tokens, features, scale, dropout)


@lora_linear_backward_op.register_fake
def _(grad, x, u, frozen, a, b, tokens, features, scale, dropout):
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)


def _save_linear(ctx, inputs, output):
    x, frozen, _, a, b, tokens, features, ctx.scale, ctx.dropout, _ = inputs
    ctx.frozen_count = len(frozen)
    ctx.save_for_backward(x, output[1], a, b, tokens, features, *frozen)


def _linear_backward(ctx, grad_y, _grad_u):
    x, u, a, b, tokens, features, *frozen = ctx.saved_tensors
    grad_x, grad_a, grad_b = lora_linear_backward_op(grad_y, x, u, frozen, a, b, tokens, features, ctx.scale, ctx.dropout)
    return grad_x, [None] * ctx.frozen_count, None, grad_a, grad_b, None, None, None, None, None


lora_linear_op.register_autograd(_linear_backward, setup_context=_save_linear)


@torch.library.custom_op("falcon_finetune::lora_gelu_mlp", mutates_args=())
def lora_gelu_mlp_op(x: Tensor, frozen: Sequence[Tensor], frozen_count: int, bias: Tensor | None, bias_out: Tensor | None, a: Tensor, b: Tensor,
                     a_out: Tensor, b_out: Tensor, tokens: Tensor, features: Tensor, features_out: Tensor, scale: float, scale_out: float,
                     dropout: float, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two linears of a Falcon MLP with the gelu between them: y, the preactivation and both u.

    frozen: the stored weights of the first layer (`frozen_count` tensors), then of the second; the rest as in `lora_linear_op`.
    """
    together = _has_kernels(x, a)
    up, u = _forward(x, frozen[:frozen_count], bias, a, b, tokens, features, scale, dropout, threshold, add=not together)
    activated = kernels.add_update_gelu_(up, u, (b * scale).to(x.dtype)) if together else F.gelu(up)
    y, u_out = _forward(activated, frozen[frozen_count:], bias_out, a_out, b_out, tokens, features_out, scale_out, dropout, threshold)
    return y, up, u, u_out


@lora_gelu_mlp_op.register_fake
def _(x, frozen, frozen_count, bias, bias_out, a, b, a_out, b_out, tokens, features, features_out, scale, scale_out, dropout, threshold):
    return tuple(x.new_empty(x.shape[0], width) for width in (b_out.shape[0], b.shape[0], a.shape[0], a_out.shape[0]))


@torch.library.custom_op("falcon_finetune::lora_gelu_mlp_backward", mutates_args=())
def lora_gelu_mlp_backward_op(grad: Tensor, x: Tensor, up: Tensor, u: Tensor, u_out: Tensor, frozen: Sequence[Tensor], frozen_count: int, a: Tensor,
                              b: Tensor, a_out: Tensor, b_out: Tensor, tokens: Tensor, features: Tensor, features_out: Tensor, scale: float,
                              scale_out: float, dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, a, b, a_out and b_out; the activation is made again from the preactivation, tile by tile."""
    grad_up, grad_a_out, grad_b_out = _backward(grad, up, u_out, frozen[frozen_count:], a_out, b_out, tokens, features_out, scale_out, dropout,
                                                through_gelu=True)
    return (*_backward(grad_up, x, u, frozen[:frozen_count], a, b, tokens, features, scale, dropout), grad_a_out, grad_b_out)


@lora_gelu_mlp_backward_op.register_fake
def _(grad, x, up, u, u_out, frozen, frozen_count, a, b, a_out, b_out, tokens, features, features_out, scale, scale_out, dropout):
    return tuple(torch.empty_like(tensor) for tensor in (x, a, b, a_out, b_out))


def _save_mlp(ctx, inputs, output):
    x, frozen, ctx.frozen_count, _, _, a, b, a_out, b_out, tokens, features, features_out, *ctx.numbers, _ = inputs
    ctx.stored_count = len(frozen)
    ctx.save_for_backward(x, *output[1:], a, b, a_out, b_out, tokens, features, features_out, *frozen)


def _mlp_backward(ctx, grad_y, *_):
    x, up, u, u_out, a, b, a_out, b_out, tokens, features, features_out, *frozen = ctx.saved_tensors
    grad_x, *grads = lora_gelu_mlp_backward_op(grad_y, x, up, u, u_out, frozen, ctx.frozen_count, a, b, a_out, b_out, tokens, features, features_out,
                                               *ctx.numbers)
    return grad_x, [None] * ctx.stored_count, None, None, None, *grads, None, None, None, None, None, None, None


lora_gelu_mlp_op.register_autograd(_mlp_backward, setup_context=_save_mlp)


def _has_kernels(x: Tensor, a: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and kernels is not None and a.shape[0] <= kernels.MAX_RANK


def _mm_float32(left: Tensor, right: Tensor) -> Tensor:
    """A product of 16-bit matrices whose sum over the tokens is not rounded to 16 bits at the end."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


class LoraLinear:
    """The tensors of one adapted linear layer, read off PEFT's module; calling it runs the operator on x [T, in]."""

    def __init__(self, module: nn.Module, stream: int):
        base = module.get_base_layer()
        self.frozen = frozen_tensors(base)
        self.threshold = int8_threshold(base)
        self.bias = base.bias
        self.a = module.lora_A[ADAPTER].weight
        self.b = module.lora_B[ADAPTER].weight
        self.scale = float(module.scaling[ADAPTER])
        self.dropout = float(getattr(module.lora_dropout[ADAPTER], "p", 0.0))
        self.features = feature_keys(base.in_features, stream, self.a.device)

    def __call__(self, x: Tensor, tokens: Tensor, training: bool) -> Tensor:
        return lora_linear_op(x, self.frozen, self.bias, self.a, self.b, tokens, self.features, self.scale, self.dropout if training else 0.0,
                              self.threshold)[0]


def lora_gelu_mlp(first: LoraLinear, second: LoraLinear, x: Tensor, tokens: Tensor, training: bool) -> Tensor:
    """second(gelu(first(x))) as one operator: the activation is neither kept for the backward pass nor made in a pass of its own."""
    return lora_gelu_mlp_op(x, first.frozen + second.frozen, len(first.frozen), first.bias, second.bias, first.a, first.b, second.a, second.b, tokens,
                            first.features, second.features, first.scale, second.scale, first.dropout if training else 0.0, first.threshold)[0]
