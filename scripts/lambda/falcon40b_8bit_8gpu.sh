#!/usr/bin/env bash
# Falcon 40B in 8 bits on eight GPUs, one full replica each: 50 steps of 128 rows from OpenAssistant Guanaco. More flags may follow.
#   bash scripts/lambda/setup.sh        # once; then, in a new shell: conda activate falcon
#   bash scripts/lambda/falcon40b_8bit_8gpu.sh
# Machine: 8x A100 80 GB or H100 80 GB. Minutes: 40 on A100s at the speed of 2023, and a download of 84 GB.
# Cost: see Lambda's price list.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nnodes 1 --nproc_per_node 8 finetune.py -m tiiuae/falcon-40b -q 8bit "$@"
