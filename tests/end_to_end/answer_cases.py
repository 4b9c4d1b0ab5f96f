"""Puts many command lines to finetune.py in one process, because the libraries take longer to import than an error takes to be found.

    python answer_cases.py CASES.json

CASES.json: a list of {"arguments": [...], "environment": {...}}. Prints one JSON line a case: exit code and what went to stderr.
"""

import json
import os
import sys
import tempfile

from falcon_finetune.console import run_main
from finetune import main


def answer(arguments: list[str], environment: dict[str, str]) -> dict:
    before = dict(os.environ)
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as caught:
        os.dup2(caught.fileno(), 2)
        os.environ.update(environment)
        sys.argv = ["finetune.py", *arguments]
        code: object = "no exit"
        try:
            run_main(main)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"Traceback of {type(error).__name__}: {error}"
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            os.environ.clear()
            os.environ.update(before)
        caught.seek(0)
        return {"code": code, "stderr": caught.read()}


with open(sys.argv[1]) as handle:
    cases = json.load(handle)
for case in cases:
    print(json.dumps(answer(case["arguments"], case["environment"])), flush=True)
