"""Every flag of finetune.py: its unit, its default and where that default comes from; validation; batch arithmetic.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import difflib
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, fields

USER_ERROR_EXIT_CODE = 2
QUANTIZE_MODES = ("4bit", "8bit", "16bit")
DEFAULT_MODEL = "ybelkada/falcon-7b-sharded-bf16"
DEFAULT_DATASET = "timdettmers/openassistant-guanaco"


class UserError(Exception):
    """The user's input (flags, data, model, folder, environment) is at fault: one line of cause, one of cure.

    finetune.py prints it on one rank without a traceback and exits with code 2.
    """

    def __init__(self, cause: str, cure: str):
        super().__init__(f"{cause}\n  -> {cure}")
        self.cause = cause
        self.cure = cure


@dataclass(frozen=True)
class Options:
    """The resolved flags of one run, in the order of `--help`. Units stand in the help lines."""

    model_name: str
    quantize_mode: str
    llm_int8: bool
    random_weights: bool
    revision: str | None
    compute_dtype: str
    dataset_name: str
    max_length: int
    eval_fraction: float
    eval_steps: int
    steps: int
    epochs: float | None
    batch_size_per_device: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    max_grad_norm: float
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    seed: int
    output_dir: str
    checkpoint_steps: int
    resume: str | None
    report_to: str
    micro_batch_tokens: int | None
    recompute: str
    compile: str
    gpu_memory_gib: float | None

    def to_dict(self) -> dict:
        return asdict(self)

    def rows_per_step(self, world_size: int) -> int:
        """The effective batch: rows that make one optimizer step, over all ranks."""
        return self.rows_per_rank * world_size

    @property
    def rows_per_rank(self) -> int:
        """Rows of one optimizer step that one rank trains on."""
        return self.batch_size_per_device * self.gradient_accumulation_steps

    def total_steps(self, rows: int, world_size: int) -> int:
        """Optimizer steps of the run for a data set of `rows` training rows."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * rows / self.rows_per_step(world_size)))


class _Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with the cause and the nearest flag instead of the whole usage."""

    def error(self, message: str):
        raise UserError(message[0].lower() + message[1:], f"see python {self.prog} --help")

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        known = list(self._option_string_actions)
        seen = set()
        for argument in arguments:
            if not argument.startswith("-") or _is_number(argument):
                continue
            flag = argument.split("=", 1)[0]
            action = self._option_string_actions.get(flag)
            if action is None and not flag.startswith("--"):
                action = self._option_string_actions.get(flag[:2])  # -b16
            if action is None:
                near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1, cutoff=0.5)
                prefixed = [name for name in known if len(flag) > 3 and name.startswith(flag)]
                guess = (prefixed or near or ["--help"])[0]
                raise UserError(f"unknown flag {flag}", f"did you mean {guess}?")
            if action.dest in seen:
                raise UserError(f"flag {flag} is given twice", "keep one of the two")
            seen.add(action.dest)
        # A value that starts with "-" and is a number reaches its own range check instead of argparse's "expected one argument".
        joined: list[str] = []
        for argument in arguments:
            takes_value = joined and joined[-1].startswith("-") and "=" not in joined[-1] and not _is_number(joined[-1])
            if argument.startswith("-") and _is_number(argument) and takes_value and joined[-1].startswith("--"):
                joined[-1] += "=" + argument
            else:
                joined.append(argument)
        return self.parse_args(joined)


def _is_number(text: str) -> bool:
    try:
        float(text)
        return True
    except ValueError:
        return False


def _whole(low: int, high: int | None = None):
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low or (high is not None and value > high):
            limit = f"from {low} to {high}" if high is not None else f"at least {low}"
            raise argparse.ArgumentTypeError(f"must be {limit} (got {value})")
        return value

    return convert


def _real(low: float, high: float | None = None, *, low_open: bool = False, high_open: bool = False):
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        too_low = value <= low if low_open else value < low
        too_high = high is not None and (value >= high if high_open else value > high)
        if not math.isfinite(value) or too_low or too_high:
            limit = ("above" if low_open else "at least") + f" {low:g}"
            if high is not None:
                limit += (" and below" if high_open else " and at most") + f" {high:g}"
            raise argparse.ArgumentTypeError(f"must be {limit} (got {text})")
        return value

    return convert


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="finetune.py",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
        description="Fine-tune a Falcon with LoRA on a base that is really quantised to 4 or 8 bits.",
        epilog="One GPU: torchrun --nnodes 1 --nproc_per_node 1 finetune.py -q 4bit. No GPU: bash scripts/quickstart.sh. "
        "'2023' marks a default of Lambda's post \"Fine-Tuning Falcon LLM 7B/40B\".",
    )
    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model_name", default=DEFAULT_MODEL, metavar="NAME",
                       help="hub id, local folder, falcon-7b|11b|40b|180b (with --random_weights), or tiny-7b-style|tiny-40b-style, made on the spot (%(default)s, 2023)")
    model.add_argument("-q", "--quantize_mode", default="4bit", choices=QUANTIZE_MODES,
                       help="weights of the frozen base: NF4 with double quantisation, int8 weights x 16-bit compute, or plain bf16 (%(default)s, 2023)")
    model.add_argument("--llm_int8", action="store_true",
                       help="with -q 8bit: int8 inputs too, outliers apart, as bitsandbytes and 2023 compute; several times slower and less exact (off)")
    model.add_argument("--random_weights", action="store_true",
                       help="build the named Falcon at full size with random weights, without a download: measures speed and memory, learns nothing of use (off)")
    model.add_argument("--revision", metavar="REV", help="commit, branch or tag of the model on the hub (its default branch)")
    model.add_argument("--compute_dtype", default="auto", choices=("auto", "bf16", "fp32"),
                       help="arithmetic between the weights: auto takes bf16 where the device has it, else fp32 (%(default)s; 2023 had fp16, which overflows on Falcon)")

    data = parser.add_argument_group("data")
    data.add_argument("-d", "--dataset_name", metavar="NAME",
                      help=f"hub id, local file (jsonl, json, csv, parquet) or folder; the tiny models bring their own ({DEFAULT_DATASET}, 2023)")
    data.add_argument("--max_length", type=_whole(2), default=512, metavar="TOKENS",
                      help="longest row in tokens, its EOS included; longer rows are cut and counted (%(default)s, 2023)")
    data.add_argument("--eval_fraction", type=_real(0, 0.5), default=0.0, metavar="SHARE",
                      help="share of rows held out for the evaluation loss, 0 to 0.5 (%(default)s, 2023 had none)")
    data.add_argument("--eval_steps", type=_whole(0), default=0, metavar="STEPS",
                      help="optimizer steps between evaluations, 0 for one at the end (%(default)s)")

    _add_training_flags(parser)

    run = parser.add_argument_group("run directory")
    run.add_argument("-o", "--output_dir", metavar="FOLDER", help="run directory (results/<model>-<mode>-<dataset>)")
    run.add_argument("--checkpoint_steps", type=_whole(0), default=0, metavar="STEPS",
                     help="optimizer steps between checkpoints, 0 for none (%(default)s, 2023 had none)")
    run.add_argument("--resume", nargs="?", const="auto", metavar="STEP",
                     help="continue from the newest checkpoint of the run directory, or from that step or folder (off)")
    run.add_argument("--report_to", default="none", choices=("none", "wandb", "tensorboard"), help="where metrics go besides run.json (%(default)s)")

    speed = parser.add_argument_group("speed and memory (chosen from the card, the model and the batch; never changes what is learnt)")
    speed.add_argument("--micro_batch_tokens", type=_whole(1), metavar="TOKENS",
                       help="tokens that pass through the model at once (auto)")
    speed.add_argument("--recompute", default="auto", choices=("auto", "none", "full"),
                       help="activations of a layer recomputed in the backward pass (%(default)s; 2023 had full)")
    speed.add_argument("--compile", default="auto", choices=("auto", "on", "off"),
                       help="torch.compile of each decoder layer: auto is on with a GPU and a C compiler (%(default)s)")
    speed.add_argument("--gpu_memory_gib", type=_real(0, low_open=True), metavar="GIB",
                       help="use at most this much of each GPU, enforced; the settings above follow (all of it)")
    return parser


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("-s", "--steps", type=_whole(1), default=50, metavar="STEPS", help="optimizer steps (%(default)s, 2023)")
    length.add_argument("--epochs", type=_real(0, low_open=True), metavar="N", help="passes over the data, instead of --steps (off)")
    training.add_argument("-b", "--batch_size_per_device", type=_whole(1), default=16, metavar="ROWS",
                          help="rows per GPU and accumulation step; rows per optimizer step = this x accumulation x GPUs (%(default)s, 2023)")
    training.add_argument("--gradient_accumulation_steps", type=_whole(1), default=1, metavar="N",
                          help="batches per optimizer step (%(default)s, 2023)")
    training.add_argument("--learning_rate", type=_real(0, 1, low_open=True), default=2e-4, metavar="RATE", help="peak, for AdamW (%(default)s, 2023)")
    training.add_argument("--lr_scheduler_type", default="constant", choices=("constant", "linear", "cosine"),
                          help="shape after the warm-up (%(default)s, 2023)")
    training.add_argument("--warmup_steps", type=_whole(0), default=0, metavar="STEPS", help="optimizer steps of linear warm-up (%(default)s, 2023)")
    training.add_argument("--max_grad_norm", type=_real(0, low_open=True), default=0.3, metavar="NORM", help="gradient clipping (%(default)s, 2023)")
    training.add_argument("--lora_r", type=_whole(1, 1024), default=64, metavar="RANK", help="LoRA rank (%(default)s, 2023)")
    training.add_argument("--lora_alpha", type=_real(0, low_open=True), default=16, metavar="ALPHA",
                          help="LoRA scale is alpha / rank (%(default)s, 2023)")
    training.add_argument("--lora_dropout", type=_real(0, 1, high_open=True), default=0.1, metavar="SHARE",
                          help="dropout on the input of LoRA (%(default)s, 2023)")
    training.add_argument("--seed", type=_whole(0, 2**31 - 1), default=0, metavar="N",
                          help="adapter weights, dropout, order of rows (%(default)s; 2023 had none)")


def slug(name: str) -> str:
    """A model or data set name as part of a folder name: its last path component without the extension."""
    last = name.rstrip("/").split("/")[-1]
    last = re.sub(r"\.(jsonl|json|csv|parquet)(\.\w+)?$", "", last)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "run"


def parse_options(arguments: list[str] | None = None) -> Options:
    """Parses and validates the flags.

    Raises:
        UserError: an unknown, abbreviated, repeated or out-of-range flag.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    namespace = build_parser().parse_strictly(arguments)
    values = vars(namespace)
    if values["model_name"].startswith("tiny") and values["model_name"] not in ("tiny-7b-style", "tiny-40b-style") and not os.path.isdir(values["model_name"]):
        raise UserError(f"model {values['model_name']!r} is none of the tiny models and no folder here", "did you mean tiny-7b-style or tiny-40b-style?")
    if values["dataset_name"] is None:
        values["dataset_name"] = values["model_name"] if values["model_name"] in ("tiny-7b-style", "tiny-40b-style") else DEFAULT_DATASET
    if values["eval_steps"] and not values["eval_fraction"]:
        raise UserError("--eval_steps without held-out rows evaluates nothing", "add --eval_fraction 0.02")
    if values["epochs"] is None and values["warmup_steps"] >= values["steps"] > 1:
        raise UserError(f"--warmup_steps {values['warmup_steps']} of {values['steps']} steps: the rate would never reach its peak", "warm up for less than --steps")
    if values["llm_int8"] and values["quantize_mode"] != "8bit":
        raise UserError(f"--llm_int8 is a way to compute with 8-bit weights, not with {values['quantize_mode']}", "add -q 8bit, or leave --llm_int8 out")
    if values["output_dir"] is None:
        mode = values["quantize_mode"] + ("-random" if values["random_weights"] else "")
        values["output_dir"] = f"results/{slug(values['model_name'])}-{mode}-{slug(values['dataset_name'])}"
    return Options(**{field.name: values[field.name] for field in fields(Options)})
