"""Which micro-batch, recompute and compile settings fit this card and run fastest, decided before the first step.

The estimate counts bytes a token leaves behind in each decoder layer (h = hidden size, 16-bit activations, float32 residual):
residual 4h, each norm's output 2h, query, key, value and attention output about 2.2 x 2h, MLP before and after its activation 8h + 8h.
"""

from dataclasses import asdict, dataclass

import torch

from falcon_finetune.console import say
from falcon_finetune.options import Options, UserError
from falcon_finetune.quantization import c_compiler

RESERVE_GIB = 1.5  # CUDA context, cuBLAS workspaces, fragments
IDLE_GIB = 16  # left free beside a 16-bit copy of the base, which only saves its dequantisation (about 2 % of a step)
MIN_EFFICIENT_TOKENS = 2048  # below it the GEMMs and the dequantisation of each pass cost more than recomputing does


@dataclass(frozen=True)
class Plan:
    """What was chosen and why it fits; `micro_batch_tokens` bounds the tokens that pass through the model at once."""

    micro_batch_tokens: int
    recompute: bool
    compile: bool
    keep_16bit_copy: bool
    estimated_gib: float | None
    free_gib: float | None

    def line(self) -> str:
        fit = "" if self.estimated_gib is None else f", needs about {self.estimated_gib:.1f} of {self.free_gib:.1f} GiB left"
        return (f"micro-batches of up to {self.micro_batch_tokens:,} tokens, {'full' if self.recompute else 'no'} recompute, "
                f"torch.compile {'on' if self.compile else 'off'}"
                f"{', a bf16 copy of the base kept in idle memory' if self.keep_16bit_copy else ''}{fit}")

    def to_dict(self) -> dict:
        return asdict(self)


def activation_gib(tokens: int, config, *, recompute: bool, lora_r: int, compute_bytes: int = 2) -> float:
    """Peak GiB of activations and workspace for one micro-batch of `tokens`; `compute_bytes` a value between the GEMMs (2 for bf16)."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    ffn = config.ffn_hidden_size
    norms = 2 if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1 else 1
    per_layer = 4 * hidden + compute_bytes * (norms * hidden + 2.2 * hidden + 2 * ffn + 4 * lora_r)
    kept = per_layer * layers if not recompute else 4 * hidden * layers + per_layer
    workspace = 6 * ffn * compute_bytes  # gradients and dropped copies inside one layer
    head = 3 * 2**29 + 2 * compute_bytes * tokens * hidden
    weight = 2 * compute_bytes * hidden * ffn  # the largest dequantised matrix, twice
    return (tokens * (kept + workspace) + head + weight) / 2**30


def decoder_weights(config) -> int:
    """Weights of the decoder's linear layers."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else config.num_attention_heads
    fused = hidden + 2 * kv_heads * head_dim
    return config.num_hidden_layers * hidden * (fused + hidden + 2 * config.ffn_hidden_size)


def choose_plan(options: Options, config, device: torch.device, dtype: torch.dtype, adapter_parameters: int, longest_row: int) -> Plan:
    """Picks the largest micro-batch that fits, without recompute where that leaves an efficient one.

    Args:
        dtype: of the arithmetic between the GEMMs.
        adapter_parameters: trainable parameters; their gradients and two moments (float32) are still to come, and DDP's buckets.
        longest_row: tokens of the longest row, the smallest micro-batch there is.

    Raises:
        UserError: not even one row fits.
    """
    whole_step = options.rows_per_rank * longest_row
    compile_layers = _compile_works(options.compile, device)
    if device.type != "cuda":
        tokens = options.micro_batch_tokens or min(whole_step, 4096)
        return Plan(tokens, options.recompute == "full", compile_layers, False, None, None)
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = torch.cuda.get_per_process_memory_fraction(device) if hasattr(torch.cuda, "get_per_process_memory_fraction") else 1.0
    free = min(free + reusable, int(total * share) - torch.cuda.memory_allocated(device)) / 2**30
    room = free - RESERVE_GIB - (16 if torch.distributed.is_initialized() else 12) * adapter_parameters / 2**30

    def needs(tokens: int, recompute: bool) -> float:
        return activation_gib(max(tokens, longest_row), config, recompute=recompute, lora_r=options.lora_r, compute_bytes=dtype.itemsize)

    choices = {"auto": (False, True), "none": (False,), "full": (True,)}[options.recompute]
    for recompute in choices:
        last = recompute is choices[-1]
        tokens = options.micro_batch_tokens or _largest(whole_step, longest_row, lambda t: needs(t, recompute) <= room)
        efficient = tokens is not None and tokens >= min(whole_step, MIN_EFFICIENT_TOKENS)
        if tokens is not None and needs(tokens, recompute) <= room and (efficient or last or options.micro_batch_tokens):
            need = needs(tokens, recompute)
            copy = decoder_weights(config) * dtype.itemsize / 2**30
            keep = options.quantize_mode != "16bit" and tokens >= whole_step and not recompute and need + copy + IDLE_GIB <= room
            return Plan(tokens, recompute, compile_layers, keep, round(need + copy * keep, 2), round(room, 2))
    if options.micro_batch_tokens:
        need = needs(options.micro_batch_tokens, choices[-1])
        say(f"warning: micro-batches of {options.micro_batch_tokens:,} tokens need about {need:.1f} GiB, {room:.1f} are left: lower --micro_batch_tokens if memory runs out")
        return Plan(options.micro_batch_tokens, choices[-1], compile_layers, False, round(need, 2), round(room, 2))
    need = needs(longest_row, choices[-1])
    raise UserError(f"one row of {longest_row} tokens needs about {need:.1f} GiB beside the base, {max(room, 0):.1f} GiB are left on this card",
                    "lower --max_length or --lora_r, use -q 4bit or --recompute auto where they are not set yet, or a larger card")


def _largest(whole_step: int, longest_row: int, fits) -> int | None:
    """The largest equal cut of a step's tokens that fits, in whole rows."""
    rows = whole_step // longest_row
    for parts in range(1, rows + 1):
        tokens = -(-rows // parts) * longest_row
        if fits(tokens):
            return tokens
    return None


def _compile_works(choice: str, device: torch.device) -> bool:
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and c_compiler() is not None
