"""Where the time of an optimizer step goes on this machine's GPU: milliseconds by kind of work, and the kernels that take most of them.

    python -m scripts.profile_step -m falcon-7b --random_weights -q 4bit -d rows.jsonl

Takes finetune.py's flags, trains 8 steps through the same trainer and profiles three of them. The profiler slows the host a little: compare
shares, not totals, with the benchmark. One JSON line last on stdout.
"""

import json
import re
import sys
import tempfile
from collections import Counter

import torch
from transformers import TrainerCallback

from falcon_finetune.console import quiet_the_stack, run_main, say
from falcon_finetune.options import UserError, parse_options

FIRST, PROFILED = 5, 3
# The first pattern that a kernel's name matches says what it is.
KINDS = (
    ("attention", r"flash|fmha|sdpa|cudnn_generated"),
    ("dequantise", r"_nf4_kernel|_int8_kernel|dequant"),
    ("LoRA: dropped products and their sums", r"_project_kernel|_outer_kernel|_update_kernel|_sum_|reduce_kernel"),
    ("gelu and LoRA update", r"_add_gelu_kernel"),
    ("head: cross entropy", r"_cross_entropy"),
    ("rotary embedding", r"_rotate_kernel"),
    ("GEMM (base, LoRA and head)", r"gemm|nvjet|cutlass|xmma|splitK"),
    ("norms, residual and what else is compiled", r"^triton_"),
    ("optimizer and clipping", r"multi_tensor|adam|lpnorm"),
    ("copies and fills", r"Memcpy|Memset|copy_kernel|FillFunctor|CatArray"),
)


def main() -> int:
    options = parse_options()
    quiet_the_stack()
    if not torch.cuda.is_available():
        raise UserError("this profile is of a GPU", "run it on a machine with one")
    wall, kernels = profile(options)
    kinds = Counter()
    for name, milliseconds in kernels.items():
        kinds[next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")] += milliseconds
    kinds["idle"] = max(0.0, wall - sum(kernels.values()))
    print(f"{wall:.1f} ms a step of {options.rows_per_rank} rows, {options.model_name} {options.quantize_mode}", file=sys.stderr)
    for kind, milliseconds in kinds.most_common():
        print(f"{milliseconds:9.2f} ms {milliseconds / wall:6.1%}  {kind}", file=sys.stderr)
    for name, milliseconds in kernels.most_common(40):
        print(f"{milliseconds:9.2f} ms  {name[:150]}", file=sys.stderr)
    print(json.dumps({"model": options.model_name, "quantize_mode": options.quantize_mode, "milliseconds_per_step": round(wall, 2),
                      "kinds": {kind: round(milliseconds, 2) for kind, milliseconds in kinds.most_common()}}))
    return 0


def profile(options) -> tuple[float, Counter]:
    """(milliseconds of a step, milliseconds of each kernel in a step)."""
    from falcon_finetune.data import prepare_data
    from falcon_finetune.family import find_model, load_tokenizer
    from falcon_finetune.lora import add_lora
    from falcon_finetune.memory import choose_plan
    from falcon_finetune.packed_falcon import ForwardPlan, PackedFalcon
    from falcon_finetune.quantization import load_base, pick_compute_dtype, visible_device
    from falcon_finetune.training import FalconTrainer

    device = visible_device(0)
    dtype, _ = pick_compute_dtype(options.compute_dtype, device)
    base = find_model(options.model_name, random_weights=options.random_weights, seed=options.seed, revision=options.revision)
    tokenizer = load_tokenizer(base)
    data = prepare_data(options.dataset_name, tokenizer, max_length=options.max_length, model_max_length=base.config.max_position_embeddings)
    plan = choose_plan(options, base.config, device, dtype, data.report.longest_row_tokens)
    say(plan.line())
    model, _ = load_base(base, options.quantize_mode, device, PackedFalcon, llm_int8=options.llm_int8)
    model = add_lora(model, options, base.identity)
    model.base_model.model.prepare_packed(ForwardPlan(dtype, recomputed_layers=plan.recomputed_layers, compile=plan.compile, keep_16bit_copy=plan.keep_16bit_copy))
    window = ProfiledSteps()
    with tempfile.TemporaryDirectory() as scratch:
        object.__setattr__(options, "output_dir", scratch)
        trainer = FalconTrainer(model=model, options=options, device=device, micro_batch_tokens=plan.micro_batch_tokens, steps=FIRST + PROFILED,
                                train_dataset=data.train, eval_dataset=None, tokenizer=tokenizer, callbacks=[window])
        trainer.train()
    return window.wall / PROFILED, Counter({name: milliseconds / PROFILED for name, milliseconds in window.kernels.items()})


class ProfiledSteps(TrainerCallback):
    """Runs torch's profiler over the last steps."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == FIRST:
            torch.cuda.synchronize()
            self.began = torch.cuda.Event(enable_timing=True)
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
            self.began.record()
        if state.global_step == FIRST + PROFILED:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            self.wall = self.began.elapsed_time(ended)
            self.kernels = Counter()
            for event in self.profiler.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    self.kernels[event.name] += event.device_time / 1e3


if __name__ == "__main__":
    run_main(main)
