#!/usr/bin/env bash
# From nothing to a fine-tuned Falcon: sets up .venv, makes a small Falcon and its data on the spot, trains, and scores before and after.
#   bash scripts/quickstart.sh
# Machine: 2 cores, no GPU needed. Minutes: under 3, and the first install. Cost: none.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements.txt
exec .venv/bin/python -m scripts.quickstart "$@"
