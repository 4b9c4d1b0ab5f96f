"""The recipe of Lambda's 2023 post on today's libraries, without this suite's fast path: what its speed and its losses are compared with.

    python -m scripts.original_recipe -m falcon-7b --random_weights -q 4bit -s 10 -d rows.jsonl

Takes finetune.py's flags (those of speed and of the run directory mean nothing here) and prints one JSON line. The rows, their order, the
quantised base and the initial adapters are finetune.py's own; everything after them is transformers, PEFT, TRL and bitsandbytes as they
come: right-padded batches, autocast, gradient checkpointing, paged AdamW, LLM.int8 with threshold 6. Two things are better than in those
libraries' own state: the layers are really quantised, and the adapters stay in float32, as in 2023.
"""

import json
import tempfile
import time

import torch
from transformers import PrinterCallback, TrainerCallback

from falcon_finetune.console import quiet_the_stack, run_main, say
from falcon_finetune.data import prepare_data
from falcon_finetune.family import find_model, load_tokenizer
from falcon_finetune.lora import add_lora
from falcon_finetune.options import Options, parse_options
from falcon_finetune.quantization import decoder_linears, load_base, pick_compute_dtype, visible_device
from falcon_finetune.run_record import device_name, peak_memory_gib, source_commit, versions
from falcon_finetune.training import WARM_UP_STEPS, StepSampler


def main() -> int:
    started = time.time()
    options = parse_options()
    quiet_the_stack()
    device = visible_device(0)
    dtype, _ = pick_compute_dtype(options.compute_dtype, device)
    base = find_model(options.model_name, random_weights=options.random_weights, seed=options.seed, revision=options.revision)
    tokenizer = load_tokenizer(base)
    data = prepare_data(options.dataset_name, tokenizer, max_length=options.max_length, model_max_length=base.config.max_position_embeddings, seed=options.seed)
    model, census = load_base(base, options.quantize_mode, device, llm_int8=options.quantize_mode == "8bit")
    say(f"{base.identity}: {census.line()}; the 2023 recipe")
    for _, linear in decoder_linears(model):
        if options.quantize_mode == "4bit":
            linear.compute_dtype, linear.compute_type_is_set = dtype, True
    model = add_lora(model, options, base.identity)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    clock = StepEnds(device)
    steps = options.total_steps(len(data.train), 1)
    trainer = plain_trainer(model, options, device, dtype, data.train, tokenizer, clock, steps)
    trainer.train()

    seconds = [later - earlier for earlier, later in zip(clock.times, clock.times[1:])]
    skip = min(WARM_UP_STEPS, len(seconds) - 1)
    rows, measured = options.rows_per_rank, sum(seconds[skip:])
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]][skip * rows :]
    peaks = peak_memory_gib(device)
    print(json.dumps({
        "options": options.to_dict(), "data": data.report.to_dict(), "trainable_parameters": trainable, "effective_batch_size": rows, "world_size": 1,
        "target_layers": census.target_layers, "quantized_layers": census.quantized_layers, "device": device_name(device), "commit": source_commit(),
        "versions": versions(), "plan": None, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "samples_per_second": rows * len(seconds[skip:]) / measured, "tokens_per_second": sum(lengths) / measured, "warm_up_steps": skip,
        "step_seconds": [round(second, 5) for second in seconds], "seconds_to_first_step": round(clock.first_step_ended - started, 1),
        "peak_memory_gib": peaks[0], "peak_reserved_gib": peaks[1],
    }), flush=True)
    return 0


class StepEnds(TrainerCallback):
    """The moments at which training and each optimizer step ended, the GPU's work included."""

    def __init__(self, device: torch.device):
        self.device, self.times, self.first_step_ended = device, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark()

    def on_step_end(self, args, state, control, **kwargs):
        self._mark()
        self.first_step_ended = self.first_step_ended or time.time()

    def _mark(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())


def plain_trainer(model, options: Options, device: torch.device, dtype: torch.dtype, rows, tokenizer, clock: StepEnds, steps: int):
    """TRL's SFTTrainer as it is, over the rows in finetune.py's order."""
    from trl import SFTConfig, SFTTrainer

    order = [row for step in StepSampler(len(rows), options.rows_per_rank, steps, options.seed) for row in step]
    adapters = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    tokenizer.pad_token = tokenizer.eos_token
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=options.batch_size_per_device,
        gradient_accumulation_steps=options.gradient_accumulation_steps, learning_rate=options.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=options.max_grad_norm, weight_decay=0.0, seed=options.seed, optim="paged_adamw_32bit" if device.type == "cuda" else "adamw_torch",
        bf16=dtype == torch.bfloat16, fp16=False, use_cpu=device.type == "cpu", gradient_checkpointing=True, max_length=options.max_length,
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential", logging_steps=1, logging_nan_inf_filter=False,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows.select(order), processing_class=tokenizer, callbacks=[clock])
    for name, parameter in trainer.model.named_parameters():  # TRL casts the adapters of a quantised base to bf16
        if name in adapters:
            parameter.data = adapters[name]
    trainer.remove_callback(PrinterCallback)  # it writes on stdout, where the JSON line goes
    return trainer


if __name__ == "__main__":
    run_main(main)
