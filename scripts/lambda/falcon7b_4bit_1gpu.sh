#!/usr/bin/env bash
# Falcon 7B in 4 bits on one GPU: 50 steps of 16 rows from OpenAssistant Guanaco. More flags may follow, e.g. -s 200.
#   bash scripts/lambda/setup.sh        # once; then, in a new shell: conda activate falcon
#   bash scripts/lambda/falcon7b_4bit_1gpu.sh
# Machine: 1x A100 or H100 (24 GB of GPU memory are enough). Minutes: 3 on an A100 at the speed of 2023, and a download of 14 GB.
# Cost: see Lambda's price list.
set -euo pipefail
cd "$(dirname "$0")/../.."
torchrun --nnodes 1 --nproc_per_node 1 finetune.py -m ybelkada/falcon-7b-sharded-bf16 -q 4bit "$@"
