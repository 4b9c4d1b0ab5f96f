"""From nothing to a fine-tuned Falcon in minutes: the embedded default through the main job, scored before and after.

Called by scripts/quickstart.sh, which sets up the environment. The flags are finetune.py's; the last line on stdout is one JSON object.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from falcon_finetune.console import run_main, say
from falcon_finetune.options import parse_options

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ["-m", "tiny-7b-style", "-q", "4bit", "-s", "400"]  # the original's settings but for the number of steps


def main() -> int:
    started = time.time()
    options = parse_options(flags := with_defaults(sys.argv[1:]))
    run_dir = Path(options.output_dir)
    run_dir = run_dir if run_dir.is_absolute() else ROOT / run_dir
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc_per_node", "1", "finetune.py", *flags]
    say("$ torchrun --standalone --nnodes 1 --nproc_per_node 1 finetune.py " + " ".join(flags))
    if code := subprocess.run(command, cwd=ROOT).returncode:
        return code
    say(f"$ python -m scripts.evaluate {options.output_dir}")
    scored = subprocess.run([sys.executable, "-m", "scripts.evaluate", str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if scored.returncode:
        return scored.returncode
    score = json.loads(scored.stdout.splitlines()[-1])
    record = json.loads((run_dir / "run.json").read_text())
    show(score, record, options.output_dir)
    print(json.dumps({"exact_match_before": score["exact_match_before"], "exact_match_after": score["exact_match_after"],
                      "quantized_layers": record["quantized_layers"], "run_dir": str(run_dir), "seconds": round(time.time() - started, 1)}), flush=True)
    return 0


def with_defaults(arguments: list[str]) -> list[str]:
    """The recipe's flags, each giving way to the user's own."""
    given = {argument.split("=")[0] for argument in arguments}
    spelled = {"-m": "--model_name", "-q": "--quantize_mode", "-s": "--steps"}
    kept = []
    for flag, value in zip(RECIPE[::2], RECIPE[1::2]):
        if flag not in given and spelled[flag] not in given and not (flag == "-s" and "--epochs" in given):
            kept += [flag, value]
    return kept + arguments


def show(score: dict, record: dict, run_dir: str) -> None:
    example = score["example"]
    print(f"""
A Falcon with {record['quantized_layers']} of {record['target_layers']} layers in {record['quantize_mode']}, fine-tuned for {record['steps']} steps.

  exact match on {score['rows']} held-out rows   {score['exact_match_before']:.2f} before   {score['exact_match_after']:.2f} after

  {example['prompt'].replace(chr(10), chr(10) + '  ')}
    before: {example['before'].strip()}
    after:  {example['after'].strip()}

  run directory   {run_dir}   (run.json, loss.png, README.md, the adapter)
  next            source .venv/bin/activate; python finetune.py -m tiny-40b-style -q 8bit -s 400
  on a GPU        torchrun --nnodes 1 --nproc_per_node 1 finetune.py -m ybelkada/falcon-7b-sharded-bf16 -q 4bit
""", flush=True)


if __name__ == "__main__":
    run_main(main)
