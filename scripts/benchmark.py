"""Speed and memory of the shipped finetune.py on this machine's GPU, one process a cell, kept in one results file.

    python -m scripts.benchmark -m falcon-7b falcon-40b -q 4bit 8bit --recipe ours original
    python -m scripts.benchmark -m falcon-7b --rows natural --steps 30
    python -m scripts.benchmark -m falcon-7b --length 256 512 1024 2048      # how cost grows; so do --tokens and --lora_r
    python -m scripts.benchmark -m falcon-7b --gpu_memory_gib 8              # on a card with no more than that
    python -m scripts.benchmark --show                                       # tables and picture of the results file, nothing is run

Weights are random at full size, rows are made on the spot (of --length tokens, or of natural length: exp(5.7 + 0.8 N(0, 1)) clamped to
32..--length). Each cell appends one JSON line to benchmarks/results.jsonl: command, commit, date, card, speed, memory and the share of the
matmul rate that the same card sustained just before. A cell that fails is kept too. "original" is the 2023 recipe on today's libraries
(scripts/original_recipe.py). Flags after -- go to finetune.py.
"""

import argparse
import itertools
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from falcon_finetune.console import run_main, say
from falcon_finetune.options import QUANTIZE_MODES, UserError
from scripts.benchmark_results import RESULTS, draw, read_results, tables

ROOT = Path(__file__).resolve().parent.parent
MATMUL_SECONDS = 5.0
RECIPES = {"ours": "finetune.py", "original": "scripts.original_recipe"}


def main() -> int:
    arguments, extra = parse()
    if arguments.show:
        rows = read_results(arguments.results)
        print(tables(rows))
        say(f"picture: {draw(rows, arguments.results.with_suffix('.png'))}")
        return 0
    import torch

    if not torch.cuda.is_available():
        raise UserError("the benchmark builds Falcons of full size and needs an NVIDIA GPU", "see it work on a CPU first: bash scripts/quickstart.sh")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    rates: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells(arguments):
            if cell["model"] not in rates:
                rates[cell["model"]] = None if arguments.no_matmul else sustained_matmul(cell["model"])
            row = run_cell(cell, arguments, extra, Path(scratch)) | {"matmul_tflops": rates[cell["model"]]}
            if row["matmul_tflops"] and row.get("tflops"):
                row["share_of_matmul"] = round(row["tflops"] / row["matmul_tflops"], 3)
            with open(arguments.results, "a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    ours, extra = sys.argv[1:], []
    if "--" in ours:
        ours, extra = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0], allow_abbrev=False)
    grid = parser.add_argument_group("cells: each combination of these is one")
    grid.add_argument("-m", "--model", nargs="+", default=["falcon-7b"], metavar="NAME", help="falcon-7b, 11b, 40b or 180b (%(default)s)")
    grid.add_argument("-q", "--quantize_mode", nargs="+", default=["4bit"], choices=QUANTIZE_MODES, help="(%(default)s)")
    grid.add_argument("--recipe", nargs="+", default=["ours"], choices=RECIPES, help="this suite, or the 2023 recipe on today's libraries (%(default)s)")
    grid.add_argument("--length", nargs="+", type=int, default=[512], metavar="TOKENS", help="of the fixed rows, and the longest natural one (%(default)s)")
    grid.add_argument("--tokens", nargs="+", type=int, default=[8192], metavar="TOKENS", help="rows per GPU and step x their longest length (%(default)s: 16 x 512)")
    grid.add_argument("--lora_r", nargs="+", type=int, default=[64], metavar="RANK", help="(%(default)s)")
    grid.add_argument("--gpu_memory_gib", nargs="+", type=float, default=[None], metavar="GIB", help="a cap on the memory of each process (none)")
    parser.add_argument("--rows", default="fixed", choices=("fixed", "natural"), help="lengths of the rows made on the spot (%(default)s)")
    parser.add_argument("--data", metavar="FILE", help="rows of your own instead")
    parser.add_argument("--steps", type=int, default=12, metavar="STEPS", help="optimizer steps of a cell, the first 3 left out (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of a cell (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="(benchmarks/results.jsonl)")
    parser.add_argument("--no_matmul", action="store_true", help="leave out the matmul measurement (5 s a model)")
    parser.add_argument("--show", action="store_true", help="print the tables of the results file, draw its picture and stop")
    arguments = parser.parse_args(ours)
    if arguments.steps < 5:
        raise UserError(f"--steps {arguments.steps}: the first 3 steps are left out of the figures", "take at least 5")
    if "original" in arguments.recipe and arguments.gpus > 1:
        raise UserError("the original recipe is measured on one GPU here", "leave out --gpus")
    return arguments, extra


def cells(arguments: argparse.Namespace) -> list[dict]:
    names = ("model", "quantize_mode", "length", "tokens", "lora_r", "gpu_memory_gib", "recipe")
    return [dict(zip(names, values)) for values in itertools.product(*(getattr(arguments, name) for name in names))]


def write_rows(path: Path, kind: str, length: int, count: int = 4000) -> Path:
    """Rows of random letters: with the embedded byte-level tokenizer a letter is a token, and EOS is one."""
    draw_from = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            tokens = length if kind == "fixed" else int(min(length, max(32, math.exp(5.7 + 0.8 * draw_from.gauss(0, 1)))))
            file.write(json.dumps({"text": "".join(draw_from.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens - 1))}) + "\n")
    return path


def run_cell(cell: dict, arguments: argparse.Namespace, extra: list[str], scratch: Path) -> dict:
    """One run in its own process; the row that it leaves, whether it ended well or not."""
    from falcon_finetune.run_record import source_commit

    data = Path(arguments.data) if arguments.data else scratch / f"{arguments.rows}-{cell['length']}.jsonl"
    if not data.exists():
        write_rows(data, arguments.rows, cell["length"])
    run_dir = scratch / f"run-{time.time_ns()}"
    rows = max(1, cell["tokens"] // cell["length"])
    flags = ["-m", cell["model"], "--random_weights", "-q", cell["quantize_mode"], "-s", str(arguments.steps), "--max_length", str(cell["length"]),
             "-b", str(rows), "--lora_r", str(cell["lora_r"])]
    flags += ["--gpu_memory_gib", f"{cell['gpu_memory_gib']:g}"] if cell["gpu_memory_gib"] else []
    flags += extra
    program = RECIPES[cell["recipe"]]
    start = [program] if program.endswith(".py") else ["-m", program]
    launcher = [sys.executable] if arguments.gpus == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.gpus)]
    say(f"$ {shlex.join([*start, *flags])}")
    began = time.time()
    ended = subprocess.run([*launcher, *start, *flags, "-d", str(data), "-o", str(run_dir)], cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(ended.stderr)
    row = {"date": time.strftime("%Y-%m-%d", time.gmtime(began)), **cell, "gpus": arguments.gpus, "rows": data.stem if arguments.data else arguments.rows,
           "rows_per_gpu": rows, "command": shlex.join([*start, *flags, "-d", data.name if arguments.data else "ROWS"])}
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if "Error" in line or line.startswith("error:")), lines[-1] if lines else "")
        return row | {"status": "failed", "commit": source_commit(), "exit_code": ended.returncode, "cause": cause.strip()[:300]}
    record = json.loads((run_dir / "run.json").read_text() if cell["recipe"] == "ours" else ended.stdout.splitlines()[-1])
    return row | {"status": "finished"} | measured(record)


def measured(record: dict) -> dict:
    """What a finished run's record says about speed and memory."""
    seconds = record["step_seconds"][record["warm_up_steps"] :]
    median = statistics.median(seconds)
    tokens = record["tokens_per_second"] / record["samples_per_second"] * record["effective_batch_size"]
    flops = flops_per_token(record) * tokens
    return {
        "commit": record["commit"], "device": record["device"], "world_size": record["world_size"], "effective_batch_size": record["effective_batch_size"],
        "samples_per_second": round(record["effective_batch_size"] / median, 3), "tokens_per_second": round(tokens / median),
        "step_seconds_median": round(median, 4), "step_seconds_min": min(seconds), "step_seconds_max": max(seconds), "steps_measured": len(seconds),
        "seconds_to_step_1": record["seconds_to_first_step"], "peak_memory_gib": round(record["peak_memory_gib"], 2),
        "peak_reserved_gib": round(record["peak_reserved_gib"], 2), "quantized_layers": f"{record['quantized_layers']}/{record['target_layers']}",
        "loss_first": round(record["losses"][0], 4), "loss_last": round(record["losses"][-1], 4), "plan": record["plan"],
        "tflops": round(flops / median / 1e12 / record["world_size"], 1), "versions": record["versions"],
    }


def flops_per_token(record: dict) -> float:
    """Arithmetic that the step needs, recomputation not counted: 4 N for the frozen decoder (forward, and the gradient of its inputs), 6 a
    weight of LoRA, 4 a weight of the head and learnt token, and 6 x row length x hidden a layer for causal attention."""
    from transformers import FalconConfig

    from falcon_finetune.family import SIZES, size_of
    from falcon_finetune.memory import decoder_weights

    config = FalconConfig(**SIZES[size_of(record["options"]["model_name"])])
    length = record["data"]["tokens"] / record["data"]["rows_kept"]
    attention = 6 * length * config.hidden_size * config.num_hidden_layers
    head = 4 * config.hidden_size * config.vocab_size * record["data"]["learnt_tokens"] / record["data"]["tokens"]  # only learnt positions are scored
    return 4 * decoder_weights(config) + 6 * record["trainable_parameters"] + head + attention


def sustained_matmul(model: str) -> float | None:
    """TFLOP/s of bf16 products at the four shapes of a decoder layer, 8,192 tokens, kept up for 5 s in a process of its own."""
    code = f"from scripts.benchmark import matmul_rate; print(matmul_rate({model!r}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        say(f"the matmul rate could not be measured: {(ended.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        return None
    return float(ended.stdout.split()[-1])


def matmul_rate(model: str) -> float:
    """What `sustained_matmul` runs in its own process."""
    import torch
    from transformers import FalconConfig

    from falcon_finetune.family import SIZES, size_of
    from falcon_finetune.memory import linear_shapes

    pairs = []
    for inputs, outputs in linear_shapes(FalconConfig(**SIZES[size_of(model)])):
        x, w = torch.randn(8192, inputs, device="cuda", dtype=torch.bfloat16), torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        pairs.append((x, w, torch.randn(8192, outputs, device="cuda", dtype=torch.bfloat16)))
    work = sum(4 * 8192 * w.numel() for _, w, _ in pairs)
    rounds, began = 0, None
    while began is None or time.perf_counter() - began < MATMUL_SECONDS:
        if rounds == 20 and began is None:
            torch.cuda.synchronize()
            began, rounds = time.perf_counter(), 0
        for x, w, g in pairs:
            x @ w.t()
            g @ w
        rounds += 1
        if rounds % 10 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return round(work * rounds / (time.perf_counter() - began) / 1e12, 1)


if __name__ == "__main__":
    run_main(main)
