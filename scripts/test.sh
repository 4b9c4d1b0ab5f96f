#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest. Tests marked gpu run where there is a card.
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_environment.py -k flags
# Machine: 2 cores, no GPU needed. Minutes: up to 12, and the first install. Cost: none.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh tests/requirements.txt
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false WANDB_MODE="${WANDB_MODE:-offline}"
exec .venv/bin/python -m pytest "$@"
