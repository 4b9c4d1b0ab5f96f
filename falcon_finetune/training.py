"""The SFTTrainer that every run goes through: rows of an optimizer step by position, packed micro-batches, one exact loss.

What the stack would do differently is overridden here, each with its reason: TRL casts the adapters of a quantised base to bf16; the
Trainer ends an epoch with a smaller step, whose rows depend on the number of GPUs; both read numbers back from the GPU every step.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from falcon_finetune.options import Options
from falcon_finetune.packed_falcon import TOKEN_BLOCK, PackedRows, pack_rows

WARM_UP_STEPS = 3  # left out of every speed figure: compilation, allocator, clocks


class StepSampler:
    """Row numbers of each optimizer step for one rank.

    The data is a stream of seeded permutations, one an epoch, without a seam: step s takes rows [s E, (s + 1) E) of the stream, whatever
    the number of ranks and accumulation steps that share E, so equal runs see equal rows and a resumed run needs only its step number.
    """

    def __init__(self, rows: int, rows_per_step: int, steps: int, seed: int, rank: int = 0, world_size: int = 1):
        self.rows, self.rows_per_step, self.steps, self.seed = rows, rows_per_step, steps, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.rows_per_step // self.world_size
        epoch, order = -1, []
        for step in range(self.steps):
            mine = []
            for place in range(step * self.rows_per_step + self.rank * share, step * self.rows_per_step + (self.rank + 1) * share):
                if place // self.rows != epoch:
                    epoch = place // self.rows
                    order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)).tolist()
                mine.append(order[place % self.rows])
            yield mine


def cut_into_micro_batches(rows: Sequence[dict], budget: int, first_slot: int = 0, multiple: int = 1) -> list[PackedRows]:
    """Packs rows in their order into as few micro-batches of at most `budget` tokens as that order allows; a longer row stands alone."""
    groups: list[list[int]] = []
    tokens = budget + 1
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        if tokens + length > budget:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += length
    return [pack_rows([rows[i] for i in group], [first_slot + i for i in group], multiple) for group in groups]


class StepCollator:
    """The rows of one rank's share of an optimizer step as packed micro-batches and their counts."""

    def __init__(self, budget: int, first_slot: int, multiple: int = 1):
        self.budget, self.first_slot, self.multiple = budget, first_slot, multiple

    def __call__(self, rows: Sequence[dict]) -> dict:
        micro_batches = cut_into_micro_batches(rows, self.budget, self.first_slot, self.multiple)
        if torch.cuda.is_available():
            micro_batches = [_pinned(batch) for batch in micro_batches]
        return {"micro_batches": micro_batches, "learnt_tokens": sum(len(batch.targets) for batch in micro_batches),
                "tokens": sum(len(row["input_ids"]) for row in rows), "rows": len(rows)}


def _pinned(batch: PackedRows) -> PackedRows:
    """Page-locked, so that the copy to the GPU does not stop the host."""
    for name in ("input_ids", "positions", "token_ids", "learnt_at", "targets"):
        object.__setattr__(batch, name, getattr(batch, name).pin_memory())
    object.__setattr__(batch.bounds, "starts", batch.bounds.starts.pin_memory())
    return batch


class StepClock:
    """Seconds of each optimizer step, from the end of the one before; on a GPU by events, without stopping the host."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple] = []
        self.restart()

    def restart(self) -> None:
        """Leaves out what came since the last step (evaluation, a checkpoint)."""
        self.last = self._now()

    def step_done(self) -> None:
        now = self._now()
        self.spans.append((self.last, now))
        self.last = now

    def seconds(self) -> list[float]:
        """One number a step of this process; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in self.spans]
        return [end - start for start, end in self.spans]

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LaterNumbers:
    """Numbers on their way from the GPU: reading them waits for the step that made them, not for what was launched since."""

    def __init__(self, *numbers: Tensor | float):
        values = torch.stack([torch.as_tensor(number).detach().float() for number in numbers])
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.values = values

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class FalconTrainer(SFTTrainer):
    """SFTTrainer over `PackedFalcon`; the rest of the run (optimizer, schedule, clipping, DDP, callbacks, checkpoints) is the library's."""

    def __init__(self, *, model, options: Options, device: torch.device, micro_batch_tokens: int, steps: int, train_dataset, eval_dataset,
                 tokenizer, callbacks: Sequence[TrainerCallback] = ()):
        self.options, self.micro_batch_tokens = options, micro_batch_tokens
        self.token_multiple = TOKEN_BLOCK if device.type == "cuda" or model.base_model.model.plan.compile else 1
        self.step_tokens: list[int] = []  # of this rank, one number a step of this process
        self.first_step_ended: float | None = None
        self._unread: list[tuple[int, LaterNumbers, float, int]] = []
        adapters = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(model=model, args=training_arguments(options, device, steps), train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=tokenizer, data_collator=list, callbacks=list(callbacks))
        # TRL casts the adapters of a quantised base to bf16 in its constructor; they are trained in float32.
        for name, parameter in self.model.named_parameters():
            if name in adapters:
                parameter.data = adapters[name]
        self.remove_callback(PrinterCallback)  # ProgressLine speaks
        self.clock = StepClock(device)

    # --- which rows ---

    def get_train_dataloader(self) -> DataLoader:
        rank, world = self.args.process_index, self.args.world_size
        sampler = StepSampler(len(self.train_dataset), self.options.rows_per_step(world), self.args.max_steps, self.options.seed, rank, world)
        collator = StepCollator(self.micro_batch_tokens, rank * self.options.rows_per_rank, self.token_multiple)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=collator)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Tokens that carry loss in the whole optimizer step, over all ranks."""
        learnt = float(sum(batch["learnt_tokens"] for batch in batch_samples))
        return self._sum_over_ranks(torch.full((), learnt, device=device)).clamp(min=1)  # filled on the device: a copy would wait for the GPU

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.args.world_size > 1:
            dist.all_reduce(value)
        return value

    # --- one step ---

    def training_step(self, model, inputs: dict, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward over this rank's micro-batches; returns the loss of the whole step over all ranks."""
        model.train()
        self.step_tokens.append(inputs["tokens"])
        total = torch.zeros((), device=self.args.device)
        last = len(inputs["micro_batches"]) - 1
        key = (self.options.seed * 0x9E3779B1 + self.state.global_step + 1) & 0xFFFFFFFF
        for index, rows in enumerate(inputs["micro_batches"]):
            hold = model.no_sync() if index < last and hasattr(model, "no_sync") else contextlib.nullcontext()
            with hold:
                loss = model(packed=rows.to(self.args.device), dropout_key=key)
                # DDP averages the gradients over the ranks; the loss is the mean over all learnt tokens.
                (loss * (self.args.world_size / num_items_in_batch)).backward()
            total += loss.detach()
        return self._sum_over_ranks(total) / num_items_in_batch

    def speed(self) -> dict:
        """samples/s and real tokens/s over all ranks, the first steps left out, and the seconds of each step of this process. A collective."""
        seconds = self.clock.seconds()
        skip = min(WARM_UP_STEPS, len(seconds) - 1) if len(seconds) > 1 else 0
        tokens = self._sum_over_ranks(torch.tensor(float(sum(self.step_tokens[skip:])), dtype=torch.float64, device=self.args.device)).item()
        measured = sum(seconds[skip:])
        rows = self.options.rows_per_step(self.args.world_size) * (len(seconds) - skip)
        enough = len(seconds) > 1
        return {"samples_per_second": rows / measured if enough else None, "tokens_per_second": tokens / measured if enough else None,
                "warm_up_steps": skip, "step_seconds": [round(second, 5) for second in seconds]}

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's count takes a padded batch; run.json has tokens and the benchmark its own formula

    # --- numbers, evaluation, checkpoints ---

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None):
        step = self.state.global_step
        if not self._unread or self._unread[-1][0] != step:
            if step > self._globalstep_last_logged and tr_loss is not None:
                self.clock.step_done()
                self._globalstep_last_logged = step
                if self.first_step_ended is None:  # loading and compilation are part of what a user waits for
                    if self.clock.on_gpu:
                        torch.cuda.synchronize()
                    self.first_step_ended = time.time()
                self._unread.append((step, LaterNumbers(tr_loss, grad_norm), learning_rate, self.step_tokens[-1]))
                tr_loss.zero_()
        final = step >= self.args.max_steps
        pause = final or self.control.should_evaluate or self.control.should_save
        # The newest step is still running on the GPU: its numbers are read after the next one was launched.
        self._read_numbers(keep=0 if pause or self.args.device.type == "cpu" else 1)
        if self.control.should_evaluate and not final:
            self.evaluate()
        if self.control.should_save:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if pause:
            self.clock.restart()

    def _read_numbers(self, keep: int) -> None:
        while len(self._unread) > keep:
            step, numbers, learning_rate, tokens = self._unread.pop(0)
            loss, grad_norm = numbers.read()
            self._total_loss_scalar += loss  # of the Trainer's closing summary
            now, self.state.global_step = self.state.global_step, step
            self.state.epoch = step * self.options.rows_per_step(self.args.world_size) / len(self.train_dataset)
            self.log({"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate, "tokens": tokens})
            self.state.global_step = now

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """Mean loss over every learnt token of the held-out rows, over all ranks."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        mine = range(self.args.process_index, len(rows), self.args.world_size)
        for start in range(0, len(mine), 64):
            for batch in cut_into_micro_batches([rows[i] for i in mine[start : start + 64]], self.micro_batch_tokens, multiple=self.token_multiple):
                sums += torch.tensor([self.model(packed=batch.to(self.args.device)).item(), len(batch.targets)], dtype=torch.float64)
        sums = self._sum_over_ranks(sums.to(self.args.device)).cpu()
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": (sums[0] / sums[1].clamp(min=1)).item()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        # Past SFTTrainer's own, which writes a model card of its own into the run directory.
        super(SFTTrainer, self)._save_checkpoint(model, trial)


def training_arguments(options: Options, device: torch.device, steps: int) -> SFTConfig:
    """The recipe as the Trainer reads it. One of its batches is this rank's whole share of an optimizer step."""
    schedule = "constant_with_warmup" if options.lr_scheduler_type == "constant" and options.warmup_steps else options.lr_scheduler_type
    evaluates = "steps" if options.eval_fraction and options.eval_steps else "no"
    arguments = SFTConfig(
        output_dir=options.output_dir, max_steps=steps, per_device_train_batch_size=options.rows_per_rank, gradient_accumulation_steps=1,
        learning_rate=options.learning_rate, lr_scheduler_type=schedule, warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm, weight_decay=0.0, optim="adamw_torch_fused", seed=options.seed,
        bf16=False, fp16=False, use_cpu=device.type == "cpu", gradient_checkpointing=False, max_length=options.max_length,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False, average_tokens_across_devices=True,
        logging_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True, report_to=[] if options.report_to == "none" else [options.report_to],
        eval_strategy=evaluates, eval_steps=options.eval_steps or None,  # the last evaluation is finetune.py's own
        save_strategy="steps" if options.checkpoint_steps else "no", save_steps=options.checkpoint_steps or 1, save_total_limit=2,
        dataloader_pin_memory=False, include_for_metrics=[],
    )
    arguments.device  # sets up the devices; without torchrun the Trainer would take all visible GPUs and wrap the model in DataParallel
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


class ProgressLine(TrainerCallback):
    """A bar with loss, samples/s, tokens/s and memory on the first rank; plain lines where stderr is a file."""

    def __init__(self, record: dict):
        self.record = record
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plain = not sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, dynamic_ncols=True, leave=True,
                            disable=plain, bar_format="{desc}{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]")
            self.plain_every = max(1, state.max_steps // 10) if plain else 0
            self.began = self.counted_from = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "eval_loss" in logs:
            self._write(f"step {state.global_step}: loss on held-out rows {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        now = time.perf_counter()
        parts = [f"loss {logs['loss']:.4f}"]
        if self.began is None:
            self.began, self.counted_from, self.tokens = now, state.global_step, 0
        else:
            self.tokens += logs["tokens"] * args.world_size
            steps = state.global_step - self.counted_from
            parts.append(f"{steps * self.record['effective_batch_size'] / (now - self.began):.1f} samples/s")
            parts.append(f"{self.tokens / (now - self.began):,.0f} tokens/s")
        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        if self.plain_every and (state.global_step % self.plain_every == 0 or state.global_step == 1):
            self._write(f"step {state.global_step}/{state.max_steps}: {', '.join(parts)}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: str) -> None:
        if self.bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self.bar.write(line, file=sys.stderr)
