"""Answers from a run directory, with the run's own base, quantisation, adapter and template."""

from collections.abc import Sequence
from pathlib import Path
from types import MethodType

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from falcon_finetune.family import BaseModel, find_model
from falcon_finetune.options import UserError
from falcon_finetune.quantization import dequantize, frozen_tensors, load_base, pick_compute_dtype, visible_device
from falcon_finetune.run_record import read_run


def base_of_run(record: dict) -> BaseModel:
    """The base that a run was trained on, from its run.json."""
    options = record["options"]
    return find_model(options["model_name"], random_weights=options["random_weights"], seed=options["seed"], revision=record.get("revision"))


def load_run(folder: Path, *, base_only: bool = False) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, dict]:
    """The model of a run (its base as it was trained, with or without the adapter) on this machine's device, its tokenizer and its record.

    Raises:
        UserError: not a run directory, or an adapter that is not there yet.
    """
    record = read_run(folder)
    if not base_only and not (Path(folder) / "adapter_model.safetensors").exists():
        raise UserError(f"{folder} has no adapter: its run is {record.get('status', 'not finished')}", "finish it: run the same finetune.py command again")
    device = visible_device(0)
    dtype, _ = pick_compute_dtype(record["options"]["compute_dtype"], device)
    model, _ = load_base(base_of_run(record), record["quantize_mode"], device)
    model.generation_config.pad_token_id = model.config.eos_token_id
    if not base_only:
        model = PeftModel.from_pretrained(model, str(folder))  # float32 as it was saved; to_compute_dtype rounds it, once
    to_compute_dtype(model, dtype)
    compute_as_trained(model)
    return model.eval(), AutoTokenizer.from_pretrained(str(folder)), record


def to_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Casts what is not quantised, so that transformers' own forward runs in one dtype (PEFT casts its inputs to the adapter's)."""
    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)


def compute_as_trained(model: torch.nn.Module) -> None:
    """8 bits as in training, int8 weights x compute dtype: on a GPU the layer's own forward would round the activations to int8 as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize(frozen_tensors(self), (self.out_features, self.in_features), x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.forward = MethodType(forward, module)


@torch.no_grad()
def greedy_answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 64,
                   batch_size: int = 64) -> list[str]:
    """The most likely answer to each prompt, up to EOS, in the order of the prompts.

    Prompts of equal length share a batch, so nothing is padded and a batched answer is the single answer.
    """
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, tokens in enumerate(encoded):
        by_length.setdefault(len(tokens), []).append(index)
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    for length, indices in by_length.items():
        for start in range(0, len(indices), batch_size):
            group = indices[start : start + batch_size]
            batch = torch.tensor([encoded[i] for i in group], device=device)
            out = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=max_new_tokens, do_sample=False,
                                 use_cache=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
            for index, tokens in zip(group, out[:, length:].tolist()):
                if tokenizer.eos_token_id in tokens:
                    tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
                answers[index] = tokenizer.decode(tokens)
    return answers
