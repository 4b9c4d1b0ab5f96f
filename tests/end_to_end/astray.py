"""finetune.py whose rank 1 is given data that is not there; started under torchrun by test_command_line."""

import os
import runpy
import sys

if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("-d") + 1] += ".missing"
sys.path.insert(0, os.getcwd())
runpy.run_path("finetune.py", run_name="__main__")
