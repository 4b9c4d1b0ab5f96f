"""What a run needs of this card before anything is loaded, and which micro-batch, recompute and compile settings fit and run fastest.

Both are arithmetic on the config. Memory counts the bytes that a token leaves behind in each decoder layer (h = hidden size, f = width of
the MLP, 16-bit activations, float32 residual): residual 4h, norms 2h each, query, key and value about 2.2h, the attention's output
as the kernel and as the next layer wants it 4h, the MLP before its activation 2f. Time counts floating-point operations, and what a pass
through the weights costs whatever the micro-batch.
"""

from dataclasses import asdict, dataclass

import torch

from falcon_finetune.console import say
from falcon_finetune.options import Options, UserError
from falcon_finetune.quantization import c_compiler

# Bytes a weight takes: NF4 has a one-byte scale for 64 weights and a float32 for 256 of those.
WEIGHT_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0, "16bit": 2.0}
ADAPTER_BYTES = 16  # a trained weight in float32, its gradient and two moments
RESERVE_SHARE, RESERVE_GIB = 0.03, 0.3  # fragments; cuBLAS workspaces and what else asks for memory
IDLE_GIB = 16  # left free beside a 16-bit copy of the base, which only saves its dequantisation (about 2 % of a step)
# One pass over the weights costs as much as this many tokens more: launches and GEMM tiles, and dequantising (measured on an H200: 0.75
# ps a weight in 4 bits, 0.48 in 8, against 3.1 fs a weight and token in the GEMMs; the ratio is much the same on other cards).
PASS_TOKENS, DEQUANTIZE_TOKENS = 100, {"4bit": 245, "8bit": 155, "16bit": 0}


@dataclass(frozen=True)
class Plan:
    """What was chosen and why it fits. `micro_batch_tokens` bounds the tokens that pass through the model at once; the first
    `recomputed_layers` decoder layers keep nothing but their input for the backward pass."""

    micro_batch_tokens: int
    recomputed_layers: int
    layers: int
    compile: bool
    keep_16bit_copy: bool = False
    needed_gib: float | None = None
    available_gib: float | None = None

    def line(self) -> str:
        recompute = {0: "no", self.layers: "full"}.get(self.recomputed_layers) or f"{self.recomputed_layers} of {self.layers} layers'"
        fit = "" if self.needed_gib is None else f", needs about {self.needed_gib:.1f} of {self.available_gib:.1f} GiB"
        return (f"micro-batches of up to {self.micro_batch_tokens:,} tokens, {recompute} recompute, torch.compile {'on' if self.compile else 'off'}"
                f"{', a bf16 copy of the base kept in idle memory' if self.keep_16bit_copy else ''}{fit}")

    def to_dict(self) -> dict:
        return asdict(self)


def choose_plan(options: Options, config, device: torch.device, dtype: torch.dtype, longest_row: int, ranks: int = 1) -> Plan:
    """The plan for this device, before the base is loaded.

    Args:
        dtype: of the arithmetic between the GEMMs.
        longest_row: tokens of the longest row, the smallest micro-batch there is.

    Raises:
        UserError: the base, the adapters and one row do not fit this card.
    """
    compile_layers = options.compile == "on" or options.compile == "auto" and device.type == "cuda" and c_compiler() is not None
    if device.type != "cuda":
        tokens = options.micro_batch_tokens or min(options.rows_per_rank * longest_row, 4096)
        return Plan(tokens, config.num_hidden_layers if options.recompute == "full" else 0, config.num_hidden_layers, compile_layers)
    return fastest_plan(options, config, available_gib(device), longest_row, compute_bytes=dtype.itemsize, ranks=ranks, compile_layers=compile_layers)


def available_gib(device: torch.device) -> float:
    """GiB of the card that this process may still take, a cap of its own (`limit_memory`) included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    # torch 2.8 and older cannot tell the cap
    share = torch.cuda.get_per_process_memory_fraction(device) if hasattr(torch.cuda, "get_per_process_memory_fraction") else 1.0
    return min(free + reserved - allocated, total * share - allocated) / 2**30


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Caps what this process can take of the card: torch refuses to allocate beyond it.

    Raises:
        UserError: the card has less.
    """
    if gib is None or device.type != "cuda":
        return
    total = torch.cuda.mem_get_info(device)[1] / 2**30
    if gib > total:
        raise UserError(f"--gpu_memory_gib {gib:g}: this card has {total:.1f} GiB", "give less, or leave the flag out to use all of it")
    torch.cuda.set_per_process_memory_fraction(gib / total, device)


def fastest_plan(options: Options, config, available: float, longest_row: int, *, compute_bytes: int = 2, ranks: int = 1, compile_layers: bool = True) -> Plan:
    """Of all cuts of a step into equal micro-batches, with as few recomputed layers as each needs, the one that should run fastest.

    Raises:
        UserError: not even one row fits with everything recomputed.
    """
    layers, whole_step = config.num_hidden_layers, options.rows_per_rank * longest_row
    fixed = base_gib(config, options.quantize_mode) + (ADAPTER_BYTES + 4 * (ranks > 1)) * adapter_parameters(config, options.lora_r) / 2**30
    room = available * (1 - RESERVE_SHARE) - RESERVE_GIB - fixed

    def needs(tokens: int, recomputed: int, copy: bool) -> float:
        dequantizes = options.quantize_mode != "16bit" and not copy
        kept = activation_gib(max(tokens, longest_row), config, recomputed, options.lora_r, compute_bytes, dequantizes=dequantizes)
        return kept + copy * decoder_weights(config) * compute_bytes / 2**30

    def cost(choice: tuple[int, int, bool]) -> tuple[float, bool]:
        tokens, recomputed, copy = choice
        share = recomputed / layers
        per_pass = PASS_TOKENS + (0 if copy else DEQUANTIZE_TOKENS[options.quantize_mode])
        return (4 + 2 * share) * whole_step + -(-whole_step // tokens) * (2 + share) * 2 * per_pass, copy

    allowed = {"auto": range(layers + 1), "none": (0,), "full": (layers,)}[options.recompute]
    cuts = [options.micro_batch_tokens] if options.micro_batch_tokens else _cuts(options.rows_per_rank, longest_row)
    choices = []
    for tokens in cuts:
        for copy in (False, True) if options.quantize_mode != "16bit" and not options.llm_int8 else (False,):
            reserve = IDLE_GIB if copy else 0
            fitting = (k for k in allowed if needs(tokens, k, copy) + reserve <= room)
            if (fewest := next(fitting, None)) is not None:
                choices.append((tokens, fewest, copy))
    least = min(cuts), allowed[-1], False
    if not choices and options.micro_batch_tokens:
        say(f"warning: micro-batches of {least[0]:,} tokens need about {fixed + needs(*least):.1f} GiB, {available:.1f} are there: "
            "lower --micro_batch_tokens if memory runs out")
    elif not choices:
        raise _does_not_fit(options, longest_row, (fixed + needs(*least) + RESERVE_GIB) / (1 - RESERVE_SHARE), available)
    best = min(choices, key=cost, default=least)
    return Plan(best[0], best[1], layers, compile_layers, best[2], round(fixed + needs(*best), 2), round(available, 2))


def _cuts(rows: int, longest_row: int) -> list[int]:
    """Tokens of a micro-batch for each way to cut a step into equal numbers of rows, largest first."""
    return sorted({-(-rows // parts) * longest_row for parts in range(1, rows + 1)}, reverse=True)


def _does_not_fit(options: Options, longest_row: int, needed: float, available: float) -> UserError:
    cures = ["-q 4bit"] * (options.quantize_mode != "4bit") + ["--recompute auto"] * (options.recompute == "none")
    cures += ["a smaller --lora_r"] * (options.lora_r > 8) + ["a smaller --max_length"] * (longest_row > 256) + ["a card with more memory"]
    return UserError(f"{options.model_name} in {options.quantize_mode} with LoRA rank {options.lora_r} and one row of {longest_row} tokens needs about "
                     f"{needed:.1f} GiB, this card has {available:.1f} GiB to give", f"use {', '.join(cures[:-1])}{' or ' * (len(cures) > 1)}{cures[-1]}")


# --- bytes -----------------------------------------------------------------------------------------------------------------------------------


def linear_shapes(config) -> list[tuple[int, int]]:
    """(inputs, outputs) of the four adapted linears of one decoder layer."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else config.num_attention_heads
    return [(hidden, hidden + 2 * kv_heads * head_dim), (hidden, hidden), (hidden, config.ffn_hidden_size), (config.ffn_hidden_size, hidden)]


def decoder_weights(config) -> int:
    """Weights of the decoder's linear layers."""
    return config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_shapes(config))


def adapter_parameters(config, lora_r: int) -> int:
    """Trainable weights: A [r, in] and B [out, r] of every decoder linear."""
    return config.num_hidden_layers * lora_r * sum(inputs + outputs for inputs, outputs in linear_shapes(config))


def base_gib(config, mode: str) -> float:
    """The frozen base: quantised decoder, and embedding and head in bf16."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return (decoder_weights(config) * WEIGHT_BYTES[mode] + 2 * embeddings) / 2**30


def activation_gib(tokens: int, config, recomputed: int = 0, lora_r: int = 64, compute_bytes: int = 2, *, dequantizes: bool = True) -> float:
    """Peak GiB beside base and adapters for one micro-batch of `tokens`: activations kept, workspace, and what holds 16-bit weights.

    Args:
        recomputed: decoder layers that keep only their input.
        dequantizes: one layer's weights at a time are made 16 bits wide.
    """
    hidden, ffn, layers = config.hidden_size, config.ffn_hidden_size, config.num_hidden_layers
    fused = linear_shapes(config)[0][1]
    norms = 2 if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1 else 1
    saved = compute_bytes * (norms * hidden + fused + 2 * hidden + ffn + 4 * lora_r)
    kept = 4 * hidden * layers + saved * (layers - recomputed)
    in_layer = compute_bytes * (ffn + 6 * hidden) + 8 * hidden + saved * (recomputed > 0)  # gradients; the layer made again
    in_head = 12 * hidden + 2 * compute_bytes * hidden
    chunk = 2**29  # of logits
    matrix = compute_bytes * hidden * ffn * dequantizes
    return (tokens * (kept + max(in_layer, in_head)) + max(chunk, matrix) + matrix) / 2**30
