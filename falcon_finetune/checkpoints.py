"""Which checkpoint a run continues from. (What a checkpoint holds is still the Trainer's own; see the README.)"""

import re
from pathlib import Path

from falcon_finetune.options import Options, UserError


def checkpoints_of(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").exists()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_same_data(resume_from: str | None, previous: dict | None, data_sha256: str) -> None:
    """Refuses to continue on other rows than the run was started with.

    Raises:
        UserError: the rows that came out of the same -d differ.
    """
    if resume_from is not None and previous is not None and previous.get("data_sha256") not in (None, data_sha256):
        raise UserError(f"the rows of {previous['options']['dataset_name']} have changed since this run was started", "restore them, or start another run with -o")


def checkpoint_to_resume(options: Options, previous: dict | None, world_size: int) -> str | None:
    """The checkpoint that this run continues from: the one asked for, else the newest of the same run, else none.

    Raises:
        UserError: --resume names a checkpoint that is not there, or there is none at all, or the run was started with other rows a step.
    """
    found = checkpoints_of(Path(options.output_dir))
    rows = options.rows_per_step(world_size)
    if found and previous is not None and previous.get("effective_batch_size") != rows:
        raise UserError(f"{options.output_dir} was started with {previous.get('effective_batch_size')} rows a step, this command makes {rows}",
                        "choose -b, --gradient_accumulation_steps and the number of GPUs so that their product is the same, or another -o")
    names = ", ".join(path.name.split("-")[1] for path in found) or "none"
    if options.resume in (None, "auto"):
        if options.resume == "auto" and not found:
            raise UserError(f"--resume: {options.output_dir} holds no checkpoint", "leave --resume out to start, and use --checkpoint_steps to keep some")
        return str(found[-1]) if found and previous is not None else None
    for path in found:
        if options.resume in (path.name, path.name.split("-")[1], str(path)):
            return str(path)
    raise UserError(f"--resume {options.resume}: no such checkpoint in {options.output_dir}", f"steps that exist: {names}")
