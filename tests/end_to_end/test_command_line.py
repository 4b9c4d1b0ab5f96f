"""finetune.py as a command: its help, and the errors that need a process or a launcher of their own."""

import re
from pathlib import Path

import pytest

from falcon_finetune.options import build_parser


def test_help_lists_every_flag(shop):
    shown = shop.python("finetune.py", "--help").finish()
    assert shown.code == 0 and shown.stderr == ""
    listed = set(re.findall(r"(?<![\w-])--?[a-z]\w*", shown.stdout))
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert flags <= listed, flags - listed


@pytest.mark.parametrize("fault", ["data", "model"])
def test_two_ranks_give_the_cause_once(shop, falcon, questions, fault):
    missing = shop.folder / "missing.jsonl"
    model, data = (missing, questions) if fault == "model" else (falcon("7b"), missing)
    asked = shop.finetune("-m", model, "-d", data, to=f"two-ranks-{fault}", ranks=2).finish()
    assert asked.code == 1  # torchrun's own
    assert asked.stderr.count("error: ") == 1, asked.stderr
    assert len([line for line in asked.stderr.splitlines() if str(missing) in line]) == 1, asked.stderr
    assert "[rank" not in asked.stderr, f"a rank ended in a traceback:\n{asked.stderr}"
    assert not asked.run_dir.exists()


def test_an_error_on_another_rank_is_told_too(shop, falcon, questions):
    """A cause that only rank 1 sees (a node without the file, a card that is full) is printed once, and rank 0 stops as well."""
    script = Path(__file__).with_name("astray.py")
    asked = shop.python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "-m", falcon("7b"), "-d", questions,
                        "-o", shop.folder / "astray", run_dir=shop.folder / "astray").finish()
    assert asked.code == 1
    assert asked.stderr.count("error: ") == 1 and f"{questions.name}.missing" in asked.stderr, asked.stderr
    assert "[rank" not in asked.stderr and not asked.run_dir.exists()
