"""Small real Falcons of every architecture for the tests, loaded and adapted by the product's own functions."""

import copy

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import FalconConfig

from falcon_finetune.family import BaseModel
from falcon_finetune.lora import add_lora
from falcon_finetune.options import parse_options
from falcon_finetune.packed_falcon import ForwardPlan, PackedFalcon
from falcon_finetune.quantization import load_base

CPU = torch.device("cpu")
MODES = ("4bit", "8bit", "16bit")
ARCHITECTURES = {
    "7b": {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "11b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 640, "tie_word_embeddings": False},
    "40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    "rw": {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
}


def tiny_config(architecture: str, **changes) -> FalconConfig:
    sizes = {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 1, "bias": False}
    return FalconConfig(**sizes | ARCHITECTURES[architecture] | changes)


def load_random(config: FalconConfig, mode: str, device: torch.device = CPU, *, llm_int8: bool = False):
    """A base of random weights and its census; its norms and biases are random too, so that leaving one out shows."""
    model, census = load_base(BaseModel("tiny", None, config, None, 3), mode, device, PackedFalcon, llm_int8=llm_int8)
    generator = torch.Generator(device).manual_seed(4)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, device=device)
    return model, census


def adapt(base: nn.Module, *flags: str, plan: ForwardPlan = ForwardPlan(torch.float32)):
    """LoRA of rank 8 without dropout, unless the flags say otherwise, with B drawn at random: at zero it would hide half of the gradients."""
    flags = [*flags, *(["--lora_r", "8"] if "--lora_r" not in flags else []), *(["--lora_dropout", "0"] if "--lora_dropout" not in flags else [])]
    model = add_lora(base, parse_options(flags), "random:3:tiny")
    generator = torch.Generator(next(base.parameters()).device).manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    model.base_model.model.prepare_packed(plan)
    return model.train()


def adapted_tiny(architecture: str, mode: str, *flags: str, plan: ForwardPlan = ForwardPlan(torch.float32)):
    return adapt(load_random(tiny_config(architecture), mode)[0], *flags, plan=plan)


def random_rows(lengths: tuple[int, ...], vocabulary: int = 320, prompt: int = 2, seed: int = 1) -> list[dict]:
    """Rows of random tokens of which the first `prompt` carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * min(prompt, length) + ids[prompt:]})
    return rows


def stored_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a base layer in float32, by bitsandbytes' public functions and not by ours."""
    if isinstance(module, bnb.nn.Linear4bit):
        state = copy.copy(module.weight.quant_state)
        state.dtype = torch.float32  # it would round the result to the dtype of the weights it was made from
        return bnb.functional.dequantize_4bit(module.weight.data, state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    return module.weight.data.float()


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the adapters, taken off the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return found
