"""What benchmarks/results.jsonl says, as Markdown tables and a picture: the newest row of each cell; older ones stay in the file."""

import json
from pathlib import Path

from falcon_finetune.options import UserError

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results.jsonl"
CELL = ("model", "quantize_mode", "recipe", "rows", "length", "tokens", "lora_r", "gpu_memory_gib", "gpus")
USUAL = {"length": 512, "tokens": 8192, "lora_r": 64}
GROWS_WITH = {"length": "tokens of a row", "tokens": "tokens per step", "lora_r": "LoRA rank"}


def read_results(path: Path) -> list[dict]:
    """The newest row of each cell, in the order in which the cells were first measured.

    Raises:
        UserError: no such file.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", "run the benchmark first")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({tuple(row[name] for name in CELL): row for row in rows}.values())


def is_usual(row: dict) -> bool:
    """The cells that are compared with each other and with 2023: 16 rows of 512 positions, rank 64, the whole card."""
    return row["gpu_memory_gib"] is None and all(row[name] == value for name, value in USUAL.items())


def tables(rows: list[dict]) -> str:
    """Speed, memory caps and growth, each as one Markdown table."""
    parts = [speed_table([row for row in rows if is_usual(row)])]
    if capped := [row for row in rows if row["gpu_memory_gib"] is not None]:
        parts.append(cap_table(capped))
    if any(growth(rows, name) for name in GROWS_WITH):
        parts.append(growth_table(rows))
    return "\n\n".join(parts)


def speed_table(rows: list[dict]) -> str:
    originals = {(row["model"], row["quantize_mode"], row["rows"]): row for row in rows if row["recipe"] == "original" and row["status"] == "finished"}
    lines = ["| model | base | recipe | rows | GPUs | samples/s | tokens/s | x original | peak GiB (reserved) | TFLOP/s (share of matmul) | to step 1 | layers | card, date, commit |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row["rows"] == "natural", _size(row["model"]), row["quantize_mode"], row["recipe"] == "original")):
        start = f"| {row['model']} | {row['quantize_mode']} | {row['recipe']} | {row['rows']} {row['length']} | {row['gpus']} |"
        if row["status"] != "finished":
            lines.append(f"{start} {_failure(row)} | | | | | | | {_where(row)} |")
            continue
        other = originals.get((row["model"], row["quantize_mode"], row["rows"]))
        ratio = f"{row['samples_per_second'] / other['samples_per_second']:.1f}" if other and other is not row else ""
        share = f" ({row['share_of_matmul']:.0%} of {row['matmul_tflops']:.0f})" if row.get("share_of_matmul") else ""
        lines.append(f"{start} {_rate(row)} | {row['tokens_per_second']:,} | {ratio} | {_memory(row)} | {row.get('tflops') or '':.4}{share} | "
                     f"{row.get('seconds_to_step_1') or ''}{' s' * bool(row.get('seconds_to_step_1'))} | {row['quantized_layers']} | {_where(row)} |")
    return "\n".join(lines)


def cap_table(rows: list[dict]) -> str:
    lines = ["| model | base | memory cap | peak GiB (reserved) | samples/s | plan | card, date, commit |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (_size(row["model"]), row["gpu_memory_gib"])):
        start = f"| {row['model']} | {row['quantize_mode']} | {row['gpu_memory_gib']:g} GiB |"
        if row["status"] != "finished":
            lines.append(f"{start} | {_failure(row)} | | {_where(row)} |")
            continue
        plan = row["plan"]
        lines.append(f"{start} {_memory(row)} | {_rate(row)} | {plan['micro_batch_tokens']:,} tokens at once, {plan['recomputed_layers']} of {plan['layers']} layers recomputed | {_where(row)} |")
    return "\n".join(lines)


def growth(rows: list[dict], name: str) -> list[dict]:
    """Finished cells that differ from the usual one of our recipe in `name` alone, that one among them, in its order; none if it stands alone."""
    alike = [row for row in rows if row["status"] == "finished" and row["recipe"] == "ours" and row["rows"] == "fixed" and row["gpu_memory_gib"] is None
             and row["model"] == "falcon-7b" and row["quantize_mode"] == "4bit" and row["gpus"] == 1
             and all(row[other] == value for other, value in USUAL.items() if other != name)]
    return sorted(alike, key=lambda row: row[name]) if len(alike) > 1 else []


def growth_table(rows: list[dict]) -> str:
    lines = ["| falcon-7b, 4bit, against | | tokens/s | of the usual | peak GiB (reserved) | card, date, commit |", "| --- | --- | --- | --- | --- | --- |"]
    for name, title in GROWS_WITH.items():
        series = growth(rows, name)
        usual = next((row["tokens_per_second"] for row in series if row[name] == USUAL[name]), None)
        for row in series:
            share = f"{row['tokens_per_second'] / usual:.0%}" if usual else ""
            lines.append(f"| {title} | {row[name]:,} | {row['tokens_per_second']:,} | {share} | {_memory(row)} | {_where(row)} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> Path:
    """The picture: samples/s beside the 2023 recipe's, and how cost grows with row length, tokens per step and LoRA rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = [name for name in GROWS_WITH if growth(rows, name)]
    figure, panels = plt.subplots(1, 1 + len(series), figsize=(7 + 3.6 * len(series), 4.6), dpi=110, width_ratios=[1.9, *[1] * len(series)], squeeze=False)
    _draw_speed(panels[0][0], [row for row in rows if is_usual(row) and row["rows"] != "natural"])
    for axes, name in zip(panels[0][1:], series):
        _draw_growth(axes, growth(rows, name), name)
    cards = sorted({row["device"] for row in rows if row.get("device")})
    figure.suptitle(f"LoRA fine-tuning, rank 64, dropout 0.1, 16 rows of 512 positions a step where not said otherwise; {', '.join(cards)}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw_speed(axes, rows: list[dict]) -> None:
    pairs = sorted({(_size(row["model"]), row["model"], row["quantize_mode"]) for row in rows})
    for place, (_, model, mode) in enumerate(pairs):
        found = {row["recipe"]: row for row in rows if (row["model"], row["quantize_mode"]) == (model, mode)}
        for shift, recipe, colour in ((-0.2, "original", "#b8b8b8"), (0.2, "ours", "#1f4e79")):
            row = found.get(recipe)
            if row is None:
                continue
            value = row["samples_per_second"] if row["status"] == "finished" else 0
            axes.bar(place + shift, value, width=0.38, color=colour, label={"original": "2023 recipe, today's libraries", "ours": "this suite"}[recipe])
            axes.text(place + shift, value, _rate(row) if value else "failed", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(pairs)), [f"{model.removeprefix('falcon-').upper()}\n{mode}" for _, model, mode in pairs])
    axes.set_ylabel("samples/s on one GPU")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    _tidy(axes)


def _draw_growth(axes, rows: list[dict], name: str) -> None:
    values = [row[name] for row in rows]
    axes.plot(values, [row["tokens_per_second"] / 1000 for row in rows], color="#1f4e79", marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{GROWS_WITH[name]} (7B, 4bit)")
    axes.set_ylabel("1,000 tokens/s", color="#1f4e79")
    memory = axes.twinx()
    memory.plot(values, [row["peak_memory_gib"] for row in rows], color="#c0504d", marker="s", linestyle="--")
    memory.set_ylim(bottom=0)
    memory.set_ylabel("peak GiB", color="#c0504d")
    memory.spines["top"].set_visible(False)
    _tidy(axes)


def _tidy(axes) -> None:
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _size(model: str) -> int:
    return int(model.split("-")[-1].removesuffix("b"))


def _rate(row: dict) -> str:
    rate = row["samples_per_second"]
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _memory(row: dict) -> str:
    return f"{row['peak_memory_gib']:.1f}" + (f" ({row['peak_reserved_gib']:.1f})" if row.get("peak_reserved_gib") else "")


def _failure(row: dict) -> str:
    return "out of memory" if "OutOfMemory" in row["cause"] else f"failed: {row['cause'][:80]}"


def _where(row: dict) -> str:
    commit = f", {row['commit'][:9]}" if row.get("commit") else ""
    return f"{row['gpus']}x {row.get('device', 'GPU')}, {row['date']}{commit}"
