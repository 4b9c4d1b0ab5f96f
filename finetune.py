"""Fine-tunes a Falcon with LoRA on a base that is really quantised to 4 or 8 bits: one full replica per GPU, data parallel.

    torchrun --nnodes 1 --nproc_per_node 1 finetune.py -m ybelkada/falcon-7b-sharded-bf16 -q 4bit
    torchrun --nnodes 1 --nproc_per_node 8 finetune.py -m tiiuae/falcon-40b -q 8bit
    python finetune.py -m tiny-7b-style          # a laptop: a small real Falcon and its data, made on the spot

The file reads in the order of a run: options -> data -> quantised base -> LoRA -> SFTTrainer -> run directory.
"""

import contextlib
import os
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

from falcon_finetune.console import quiet_the_stack, run_main, say
from falcon_finetune.options import Options, UserError, parse_options


def main() -> int:
    started = time.time()
    options = parse_options()
    check_launch()

    from falcon_finetune.run_record import claim_output_dir

    previous = claim_output_dir(options)
    if previous is not None and previous.get("status") == "finished":
        say(f"{options.output_dir} is already finished ({previous['steps']} steps, last loss {previous['losses'][-1]:.4f}): nothing to do")
        return 0
    check_reporting(options)
    quiet_the_stack()
    # Before torch is imported: rows of changing length would otherwise leave the card's memory in pieces that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return train(options, previous, started)


def train(options: Options, previous: dict | None, started: float) -> int:
    from falcon_finetune.checkpoints import check_same_data, checkpoint_to_resume
    from falcon_finetune.data import prepare_data, rows_digest
    from falcon_finetune.family import find_model, load_tokenizer, weight_files
    from falcon_finetune.lora import add_lora
    from falcon_finetune.memory import choose_plan, limit_memory
    from falcon_finetune.packed_falcon import ForwardPlan, PackedFalcon
    from falcon_finetune.quantization import check_backend, load_base, pick_compute_dtype, visible_device
    from falcon_finetune.training import FalconTrainer, ProgressLine

    # 1. Where: one device per process, known before anything is loaded.
    device = visible_device(int(os.environ.get("LOCAL_RANK", "0")))
    state = start_processes(device)
    on_every_rank(state, lambda: (limit_memory(device, options.gpu_memory_gib), check_backend(options.quantize_mode, device)))
    dtype, why = on_every_rank(state, lambda: pick_compute_dtype(options.compute_dtype, device))

    # 2. What: the base's config, its tokenizer and the data. No weight is loaded yet, so bad input costs seconds.
    resume_from = on_every_rank(state, lambda: checkpoint_to_resume(options, previous, state.num_processes))
    base = on_every_rank(state, lambda: find_model(options.model_name, random_weights=options.random_weights, seed=options.seed,
                                                   revision=options.revision), state.main_process_first())
    tokenizer = on_every_rank(state, lambda: load_tokenizer(base), state.main_process_first())
    data = on_every_rank(state, lambda: prepare_data(
        options.dataset_name, tokenizer, max_length=options.max_length, model_max_length=base.config.max_position_embeddings,
        eval_fraction=options.eval_fraction, seed=options.seed, first_rank_context=state.main_process_first))
    say(data.report.summary())
    data_sha256 = rows_digest(data.train)
    on_every_rank(state, lambda: check_same_data(resume_from, previous, data_sha256))

    # 3. How a step will be carried out on this device, and whether it fits at all.
    plan = on_every_rank(state, lambda: choose_plan(options, base.config, device, dtype, data.report.longest_row_tokens, state.num_processes))
    say(plan.line())

    # 4. The frozen base, quantised as it streams onto device_map={"": state.local_process_index}, and counted.
    if base.random_seed is None:
        on_every_rank(state, lambda: weight_files(base), state.local_main_process_first())  # one download a node
    model, census = on_every_rank(state, lambda: load_base(base, options.quantize_mode, device, PackedFalcon, llm_int8=options.llm_int8))
    say(f"{base.identity}: {census.line()}; {why}")

    # 5. LoRA in float32 on every decoder linear.
    model = add_lora(model, options, base.identity)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.base_model.model.prepare_packed(ForwardPlan(dtype, recomputed_layers=plan.recomputed_layers, compile=plan.compile, keep_16bit_copy=plan.keep_16bit_copy))

    # 6. Train.
    steps = options.total_steps(len(data.train), state.num_processes)
    record = start_record(options, base, data, census, dtype, plan, steps, trainable, state.num_processes, device, started, tokenizer)
    record["data_sha256"], record["resumed_from"] = data_sha256, resume_from and Path(resume_from).name
    open_record(record)
    say_derived(record)
    trainer = FalconTrainer(model=model, options=options, device=device, micro_batch_tokens=plan.micro_batch_tokens, steps=steps,
                            train_dataset=data.train, eval_dataset=data.eval, tokenizer=tokenizer, callbacks=[ProgressLine(record)])
    trainer.train(resume_from_checkpoint=resume_from)
    eval_loss = trainer.evaluate()["eval_loss"] if data.eval is not None else None

    # 7. The run directory.
    record["seconds_to_first_step"] = None if trainer.first_step_ended is None else round(trainer.first_step_ended - started, 1)
    finish_record(record, trainer, eval_loss, started)
    end_processes(state)
    return 0


def on_every_rank(state, act, turns=None):
    """What `act` returns. An error of the user's on any rank is raised on all of them, the lowest rank's: one cause is printed, and no rank
    waits for one that has gone or ends in a traceback about its closed connection. `turns`: accelerate's context that lets the first rank go first."""
    import torch.distributed as dist

    answer = error = None
    with turns if turns is not None else contextlib.nullcontext():
        try:
            answer = act()
        except UserError as caught:
            error = caught
    if state.num_processes > 1:
        errors: list = [None] * state.num_processes
        dist.all_gather_object(errors, error and (error.cause, error.cure))
        error = next((UserError(*found) for found in errors if found), None)
    if error is not None:
        raise error
    return answer


def start_processes(device):
    """accelerate's view of the ranks. Its time-out is for the first rank's downloads and tokenising, which the others wait for: the library's
    own ten minutes would end a run in the middle of an 80 GB download."""
    import torch
    from accelerate import PartialState

    ranks, cards = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count() if device.type == "cuda" else 0
    if ranks == 1 and cards > 1:
        say(f"this machine has {cards} GPUs; training on GPU 0 alone. To use all of them:\n"
            f"  torchrun --nnodes 1 --nproc_per_node {cards} {shlex.join(sys.argv)}")
    return PartialState(cpu=device.type == "cpu", **({"timeout": timedelta(hours=12)} if ranks > 1 else {}))


def end_processes(state) -> None:
    import torch.distributed as dist

    state.wait_for_everyone()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_launch() -> None:
    """Refuses a half-set launcher environment, in which the stack would wait for ranks that never come."""
    world = os.environ.get("WORLD_SIZE")
    if world not in (None, "1") and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE={world} is set but RANK is not: this process was not started by torchrun",
                        f"unset WORLD_SIZE, or start it with torchrun --nproc_per_node {world} finetune.py ...")


def check_reporting(options: Options) -> None:
    """wandb without a key would stop the run after the weights are loaded: find out now."""
    if options.report_to != "wandb" or os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return
    import netrc

    try:
        logged_in = any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    if not logged_in:
        raise UserError("--report_to wandb: no wandb login was found", "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to sync later")


def start_record(options, base, data, census, dtype, plan, steps, trainable, world_size, device, started, tokenizer) -> dict:
    """What run.json says at the start."""
    from falcon_finetune.run_record import device_name, source_commit, versions

    embedded = base.folder is None and base.random_seed is not None
    return {
        "status": "running", "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)), "command": shlex.join(sys.argv),
        "options": options.to_dict(), "base_model": base.identity, "revision": base.revision,
        "tokenizer": "embedded byte-level" if embedded else type(tokenizer).__name__,
        "quantize_mode": options.quantize_mode, "target_layers": census.target_layers, "quantized_layers": census.quantized_layers if options.quantize_mode != "16bit" else 0,
        "census": census.to_dict(), "compute_dtype": str(dtype).removeprefix("torch."), "arithmetic_8bit": arithmetic_8bit(options, dtype),
        "plan": plan.to_dict(), "world_size": world_size, "effective_batch_size": options.rows_per_step(world_size), "steps": steps,
        "trainable_parameters": trainable, "data": data.report.to_dict(), "template": data.template,
        "versions": versions(), "commit": source_commit(), "device": device_name(device),
        "peak_memory_gib": None, "peak_reserved_gib": None, "samples_per_second": None, "tokens_per_second": None,
        "step_seconds": [], "losses": [], "eval_loss": None,
    }


def arithmetic_8bit(options, dtype) -> str | None:
    if options.quantize_mode != "8bit":
        return None
    return "LLM.int8" if options.llm_int8 else f"int8 weights x {str(dtype).removeprefix('torch.')} compute"


def open_record(record: dict) -> None:
    """Makes the run directory and writes run.json into it, on the first rank; opens the wandb run."""
    from falcon_finetune.console import is_first_rank
    from falcon_finetune.run_record import write_run

    if not is_first_rank():
        return
    folder = Path(record["options"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder, record)
    if record["options"]["report_to"] == "wandb":
        import wandb

        wandb.init(project=os.environ.get("WANDB_PROJECT", "falcon-finetune"), name=folder.name, dir=folder,
                   config={key: record[key] for key in ("options", "base_model", "quantize_mode", "quantized_layers", "effective_batch_size", "versions")},
                   settings=wandb.Settings(silent=True))


def say_derived(record: dict) -> None:
    """The numbers that follow from the flags, before step 1."""
    from falcon_finetune.quantization import c_compiler

    options, data = record["options"], record["data"]
    rows = record["effective_batch_size"]
    tokens = rows * data["tokens"] / max(data["rows_kept"], 1)
    if record["resumed_from"]:
        say(f"continuing from {record['resumed_from']}: step {record['resumed_from'].split('-')[-1]} of {record['steps']}")
    say(f"{rows} rows a step ({options['batch_size_per_device']} x {options['gradient_accumulation_steps']} accumulation x {record['world_size']} ranks), "
        f"about {tokens:,.0f} tokens; {record['steps']} steps = {record['steps'] * rows / max(data['rows_kept'] - data['rows_eval'], 1):.2f} epochs; "
        f"{record['trainable_parameters'] / 1e6:.1f} M trainable parameters")
    if record["device"][:3] != "CPU" and c_compiler() is None:
        say("no C compiler: torch.compile and the kernels of this suite are off, and the run is much slower (apt-get install gcc)")


def finish_record(record: dict, trainer, eval_loss: float | None, started: float) -> None:
    """Adapter, tokenizer, trainer state, run.json, loss plot and model card; complete when run.json says "finished"."""
    from falcon_finetune.console import is_first_rank
    from falcon_finetune.run_record import peak_memory_gib, plot_losses, write_model_card, write_run

    folder = Path(record["options"]["output_dir"])
    speed = trainer.speed()  # a collective: every rank takes part
    peaks = peak_memory_gib(trainer.args.device)
    if not is_first_rank():
        return
    history = trainer.state.log_history
    record |= speed | dict(zip(("peak_memory_gib", "peak_reserved_gib"), peaks))
    record |= {"losses": [entry["loss"] for entry in history if "loss" in entry], "eval_loss": eval_loss,
               "eval_losses": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry], "seconds": round(time.time() - started, 1)}
    trainer.model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    title = f"{record['base_model'].split('/')[-1]}, {record['quantize_mode']}, LoRA rank {record['options']['lora_r']}, {record['effective_batch_size']} rows a step"
    plot_losses(folder, record["losses"], record["eval_losses"], title)
    write_model_card(folder, record)
    if record["options"]["report_to"] == "wandb":
        import wandb

        wandb.finish()
    record["status"] = "finished"
    write_run(folder, record)
    held_out = "" if eval_loss is None else f", held-out {eval_loss:.4f}"
    rate = f"{record['samples_per_second']:.2f} samples/s, {record['tokens_per_second']:,.0f} tokens/s, " if record["samples_per_second"] else ""
    say(f"loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}{held_out}; {rate}peak {record['peak_memory_gib']:.1f} GiB; run directory {folder}")


if __name__ == "__main__":
    run_main(main)
