"""Speed and memory of the shipped finetune.py on this machine's GPU, one process a cell, kept in one results file.

    python -m scripts.benchmark -m falcon-7b falcon-40b -q 4bit 8bit
    python -m scripts.benchmark -m falcon-7b -q 4bit --rows natural --steps 30 -- --max_length 512
    python -m scripts.benchmark --table            # the Markdown table of the results file, nothing is run

Weights are random at full size, rows are made on the spot (512 tokens each, or of natural length: exp(5.7 + 0.8 N(0, 1)) clamped to
32..512). Each cell appends one JSON line to benchmarks/results.jsonl: command, commit, date, card, speed, memory and the share of the
matmul rate that the same card sustained just before. A cell that fails is kept too. Flags after -- go to finetune.py.
"""

import argparse
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
MATMUL_SECONDS = 5.0


def main() -> int:
    arguments, extra = parse()
    if arguments.table:
        print(table(read_results(arguments.results)))
        return 0
    import torch

    if not torch.cuda.is_available():
        raise UserError("the benchmark builds Falcons of full size and needs an NVIDIA GPU", "see it work on a CPU first: bash scripts/quickstart.sh")
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or str(write_rows(Path(scratch) / f"{arguments.rows}.jsonl", arguments.rows, arguments.length))
        for model in arguments.model:
            rate = sustained_matmul(model) if not arguments.no_matmul else None
            for mode in arguments.quantize_mode:
                row = run_cell(model, mode, data, arguments, extra, Path(scratch)) | {"matmul_tflops": rate}
                if rate and row.get("tflops"):
                    row["share_of_matmul"] = round(row["tflops"] / rate, 3)
                arguments.results.parent.mkdir(parents=True, exist_ok=True)
                with open(arguments.results, "a", encoding="utf-8") as results:
                    results.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    ours, extra = sys.argv[1:], []
    if "--" in ours:
        ours, extra = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-m", "--model", nargs="+", default=["falcon-7b"], metavar="NAME", help="falcon-7b, 11b, 40b or 180b (%(default)s)")
    parser.add_argument("-q", "--quantize_mode", nargs="+", default=["4bit"], choices=QUANTIZE_MODES, help="(%(default)s)")
    parser.add_argument("--rows", default="fixed", choices=("fixed", "natural"), help="lengths of the rows made on the spot (%(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="TOKENS", help="of the fixed rows, and the longest natural one (%(default)s)")
    parser.add_argument("--data", metavar="FILE", help="rows of your own instead")
    parser.add_argument("--steps", type=int, default=12, metavar="STEPS", help="optimizer steps of a cell, the first 3 left out (%(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of a cell (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="(benchmarks/results.jsonl)")
    parser.add_argument("--no_matmul", action="store_true", help="leave out the matmul measurement (5 s a model)")
    parser.add_argument("--table", action="store_true", help="print the table of the results file and stop")
    arguments = parser.parse_args(ours)
    if arguments.steps < 5:
        raise UserError(f"--steps {arguments.steps}: the first 3 steps are left out of the figures", "take at least 5")
    return arguments, extra


def write_rows(path: Path, kind: str, length: int, count: int = 4000) -> Path:
    """Rows of random letters: with the embedded byte-level tokenizer a letter is a token, and EOS is one."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            tokens = length if kind == "fixed" else int(min(length, max(32, math.exp(5.7 + 0.8 * draw.gauss(0, 1)))))
            file.write(json.dumps({"text": "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens - 1))}) + "\n")
    return path


def run_cell(model: str, mode: str, data: str, arguments: argparse.Namespace, extra: list[str], scratch: Path) -> dict:
    """One run of finetune.py in its own process; the row that it leaves, whether it ended well or not."""
    from falcon_finetune.run_record import source_commit

    run_dir = scratch / f"{model}-{mode}-{time.time_ns()}"
    flags = ["-m", model, "--random_weights", "-q", mode, "-s", str(arguments.steps), "--max_length", str(arguments.length), *extra]
    launcher = [sys.executable] if arguments.gpus == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.gpus)]
    say(f"$ finetune.py {shlex.join(flags)}")
    began = time.time()
    ended = subprocess.run([*launcher, "finetune.py", *flags, "-d", data, "-o", str(run_dir)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    row = {"date": time.strftime("%Y-%m-%d", time.gmtime(began)), "model": model, "quantize_mode": mode, "gpus": arguments.gpus,
           "rows": Path(arguments.data).stem if arguments.data else arguments.rows, "length": arguments.length,
           "command": f"finetune.py {shlex.join(flags)} -d {'ROWS' if not arguments.data else Path(data).name}"}
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if "Error" in line or line.startswith("error:")), lines[-1] if lines else "")
        return row | {"status": "failed", "commit": source_commit(), "exit_code": ended.returncode, "cause": cause.strip()[:300]}
    record = json.loads((run_dir / "run.json").read_text())
    return row | {"status": "finished"} | measured(record)


def measured(record: dict) -> dict:
    """What a finished run's record says about speed and memory."""
    seconds = record["step_seconds"][record["warm_up_steps"] :]
    median = statistics.median(seconds)
    tokens = record["tokens_per_second"] / record["samples_per_second"] * record["effective_batch_size"]
    flops = flops_per_token(record) * tokens
    return {
        "commit": record["commit"], "device": record["device"], "world_size": record["world_size"], "effective_batch_size": record["effective_batch_size"],
        "samples_per_second": round(record["effective_batch_size"] / median, 2), "tokens_per_second": round(tokens / median),
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

    from falcon_finetune.family import SIZES, size_of

    sizes = SIZES[size_of(model)]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    fused = hidden + 2 * (sizes.get("num_kv_heads") or 1) * (hidden // heads)
    pairs = []
    for inputs, outputs in ((hidden, fused), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
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


def read_results(path: Path) -> list[dict]:
    if not path.exists():
        raise UserError(f"{path} does not exist", "run the benchmark first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def table(rows: list[dict]) -> str:
    """The newest result of each cell as Markdown; the older ones stay in the file."""
    rows = list({(row["model"], row["quantize_mode"], row["rows"], row["length"], row["gpus"], row.get("recipe")): row for row in rows}.values())
    lines = ["| model | base | rows | GPUs | samples/s | tokens/s | peak GiB (reserved) | TFLOP/s (share of matmul) | layers | loss | card, date, commit |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        recipe = " (2023 recipe, plain path)" if row.get("recipe") else ""
        start = f"| {row['model']}{recipe} | {row['quantize_mode']} | {row['rows']} {row['length']} | {row['gpus']} |"
        if row["status"] != "finished":
            lines.append(f"{start} failed | | | | | {row['cause'][:80]} | {row['date']} |")
            continue
        share = f" ({row['share_of_matmul']:.0%} of {row['matmul_tflops']:.0f})" if row.get("share_of_matmul") else ""
        reserved = f" ({row['peak_reserved_gib']:.1f})" if row.get("peak_reserved_gib") else ""
        speed = f"{row['tflops']:.0f}" if row.get("tflops") else ""
        where = f"{row['world_size']}x {row['device']}, {row['date']}" + (f", {row['commit'][:9]}" if row.get("commit") else "")
        lines.append(f"{start} {row['samples_per_second']:.1f} | {row['tokens_per_second']:,} | {row['peak_memory_gib']:.1f}{reserved} | "
                     f"{speed}{share} | {row['quantized_layers']} | {row['loss_first']:.2f} -> {row['loss_last']:.2f} | {where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
