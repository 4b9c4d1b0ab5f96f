"""What a person sees: one rank speaks, errors of the user are two lines, the libraries' noise is kept out."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

from falcon_finetune.options import USER_ERROR_EXIT_CODE, UserError


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Prints on the first rank, to stderr: stdout is for results."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command and exits with its code; a UserError becomes cause and cure on the first rank and exit code 2."""
    try:
        code = main()
    except UserError as error:
        say(f"error: {error}")
        code = USER_ERROR_EXIT_CODE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.stdout.flush()
    sys.exit(code)


def quiet_the_stack() -> None:
    """Silences what is noise in this suite; real problems are checked here and raised.

    bitsandbytes asks for the `kernels` package at import on a CPU (it must not be installed: it fetches from the hub). transformers warns
    about generation flags and caches that training does not use; torch about gloo and about pinned memory without a card.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    # A bar is for a person who watches: in a log file each of its updates is a line. The variable is never set to 0, which would forbid
    # hub.py to leave the bar out for small files.
    has_bars = is_first_rank() and sys.stderr.isatty()
    if not has_bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "torch.distributed.distributed_c10d"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    # The one warning that tells of a wrong run: an operator through which the gradient is lost.
    warnings.filterwarnings("default", message=".*an autograd kernel was not registered.*")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    if not has_bars:
        datasets.disable_progress_bars()
