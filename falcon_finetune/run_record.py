"""run.json, the loss plot and the model card: what makes a run directory explain itself.

run.json is written when the run starts (status "running") and again when it ends ("finished"); each write is complete or absent.
"""

import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from falcon_finetune.options import Options, UserError

RUN_FILE = "run.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
# Settings that say how a run is carried out; the same run may change them between a start and its continuation.
CARRIED_OUT_BY = ("output_dir", "resume", "report_to", "micro_batch_tokens", "recompute", "compile", "gpu_memory_gib", "checkpoint_steps")


def write_complete(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the whole new one."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name on the command line may be no text
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def read_run(folder: Path) -> dict:
    """The run.json of a run directory.

    Raises:
        UserError: not a run directory, or a damaged run.json.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run directory (no {RUN_FILE})", "give the folder that finetune.py printed at its end")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}", "restore it, or train again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: not a JSON object", "restore it, or train again")
    return record


def write_run(folder: Path, record: dict) -> None:
    write_complete(Path(folder) / RUN_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def claim_output_dir(options: Options) -> dict | None:
    """Checks, before anything is loaded, that the run directory can be written and is this run's own. Writes nothing.

    Returns:
        The record of the same run, if it was started here before.

    Raises:
        UserError: a file, a folder without write permission, a folder of something else, or another run's directory.
    """
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "choose another folder with -o")
    parent = folder if folder.exists() else next(p for p in folder.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {parent} (user {os.getuid()}, mode {parent.stat().st_mode & 0o777:o})", "choose another folder with -o")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / RUN_FILE).exists():
        raise UserError(f"{folder} holds files that are not a run ({next(folder.iterdir()).name} first)", "choose another folder with -o")
    record = read_run(folder)
    before, now = record.get("options"), options.to_dict()
    if not isinstance(before, dict):
        raise UserError(f"{folder / RUN_FILE} is damaged: it holds no options", "choose another folder with -o, or remove this one")
    changed = [f"{name} {before.get(name)!r} -> {value!r}" for name, value in now.items() if name not in CARRIED_OUT_BY and before.get(name) != value]
    if changed:
        raise UserError(f"{folder} holds another run ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''})",
                        "choose another folder with -o, or remove this one")
    return record


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def source_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+changes" if the tree differs from it; None outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def plot_losses(folder: Path, losses: list[float], eval_losses: list[tuple[int, float]], title: str) -> None:
    """loss.png: the loss of each optimizer step, its running mean, and the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9bb7d4", linewidth=1, marker="." if len(losses) < 30 else None, label="loss of each step")
    window = max(1, len(losses) // 20)
    if window > 1:
        means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
        axes.plot(steps, means, color="#1f4e79", linewidth=2, label=f"mean of {window} steps")
    if eval_losses:
        axes.plot(*zip(*eval_losses), color="#c0504d", marker="o", linewidth=1.5, label="held-out rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy, nats per learnt token")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(folder) / "loss.png")
    plt.close(figure)


def write_model_card(folder: Path, record: dict) -> None:
    """README.md of the run directory, in the form the hub reads."""
    options, base = record["options"], record["base_model"]
    is_hub_id = "/" in base and not base.startswith(("/", "random:"))
    head = ["---", *([f"base_model: {base}"] if is_hub_id else []), "library_name: peft", "pipeline_tag: text-generation",
            "tags:", "- falcon", "- lora", f"- {record['quantize_mode']}", "---", ""]
    warning = ["**The base of this adapter has random weights: it measures speed and memory and must not be put on a real Falcon.**", ""] if base.startswith("random:") else []
    evaluation = "" if record["eval_loss"] is None else f", {record['eval_loss']:.4f} on {record['data']['rows_eval']:,} held-out rows"
    body = [
        f"# LoRA adapter for {base}", "", *warning,
        f"Trained on `{options['dataset_name']}` with the base held in {record['quantize_mode']} ({record['quantized_layers']} of {record['target_layers']} "
        f"decoder linears), {record['steps']} steps of {record['effective_batch_size']} rows.", "",
        "| | |", "| --- | --- |",
        f"| loss, last step | {record['losses'][-1]:.4f}{evaluation} |" if record["losses"] else "| loss | none |",
        f"| LoRA | rank {options['lora_r']}, alpha {options['lora_alpha']:g}, dropout {options['lora_dropout']} on every decoder linear |",
        f"| optimizer | AdamW, learning rate {options['learning_rate']:g}, {options['lr_scheduler_type']}, gradient norm at most {options['max_grad_norm']} |",
        f"| data | {record['data']['rows_kept']:,} rows, format {record['data']['format']}, {record['data']['rows_cut']:,} cut at {options['max_length']} tokens |",
        f"| hardware | {record['world_size']} x {record['device']}, {record['compute_dtype']}, peak {record['peak_memory_gib']:.1f} GiB |",
        f"| speed | {record['samples_per_second']:.2f} samples/s, {record['tokens_per_second']:,.0f} tokens/s |" if record["samples_per_second"] else "| speed | run too short to measure |",
        f"| code | commit {record['commit'] or 'unknown'}; " + ", ".join(f"{name} {number}" for name, number in record["versions"].items()) + " |",
        "", "![loss](loss.png)", "", "## Use", "", "```python", "from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", "",
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")', 'tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")', "```", "",
        f"Prompts were built like this: {_shown_prompt(record['template'])}. Every setting stands in `run.json`.", "",
    ]
    write_complete(Path(folder) / "README.md", "\n".join(head + body))


def _shown_prompt(template: dict) -> str:
    forms = [template[name] for name in ("prompt", "prompt_with_input") if isinstance(template.get(name), str)]
    if not forms or forms == ["{prompt}"]:
        return "the text as the row has it"
    return ", or ".join(f"`{form!r}`" for form in forms)


def device_name(device) -> str:
    """The card's name, or "CPU" with the processor's name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return f"CPU ({name}, {os.cpu_count()} cores)" if name else "CPU"


def peak_memory_gib(device) -> tuple[float, float]:
    """(peak allocated, peak reserved) of this process on its GPU; on a CPU, its peak resident memory for both."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return peak, peak
