#!/usr/bin/env bash
# Prepares a fresh Lambda Cloud instance: conda, the environment "falcon", a check of the GPU, one training step. Safe to run again.
#   bash scripts/lambda/setup.sh        # then, in a new shell: conda activate falcon
# Machine: Ubuntu 22.04 with the NVIDIA driver, an A10, A6000, A100, H100 or newer. Minutes: about 10, most of it downloads.
# Cost: see Lambda's price list.
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() {
  printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
  exit 2
}

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p) ||
  fail "nvidia-smi does not answer: this machine has no NVIDIA GPU, or its driver does not run" "start a GPU instance, or reboot after a driver update; without a GPU use bash scripts/quickstart.sh"

# Miniforge is Miniconda with conda-forge as its channel: it asks for no terms of service, which would stop an unattended install.
conda=$(command -v conda || echo "$HOME/miniforge3/bin/conda")
if [ ! -x "$conda" ]; then
  echo "Installing conda into $HOME/miniforge3" >&2
  installer=$(mktemp --suffix .sh)
  curl --fail --silent --show-error --location --retry 3 --output "$installer" \
    "https://github.com/conda-forge/miniforge/releases/latest/download/Miniforge3-Linux-$(uname -m).sh" ||
    fail "conda could not be downloaded" "check the network, or install Miniconda by hand and run this again"
  bash "$installer" -b -u -p "$HOME/miniforge3" >/dev/null # -u: over what an interrupted install left
  rm "$installer"
  "$conda" init bash >/dev/null
fi

# Either command installs requirements.txt through the pip part of the file; --yes replaces an environment that was left half-made.
if "$conda" run --name falcon python --version >/dev/null 2>&1; then
  "$conda" env update --quiet --name falcon --file falcon-env.yaml
else
  "$conda" env create --quiet --yes --name falcon --file falcon-env.yaml
fi
python=$("$conda" run --name falcon python -c 'import sys; print(sys.executable)')

"$python" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  fail "driver $driver is too old for $("$python" -c 'import torch; print("torch", torch.__version__, "built for CUDA", torch.version.cuda)')" \
    "update it: sudo apt-get update && sudo apt-get dist-upgrade --yes && sudo reboot; then run this again (or start the instance from Lambda's newest image)"
"$python" -c 'import torch; print(torch.cuda.device_count(), "x", torch.cuda.get_device_name(0), "with torch", torch.__version__, "for CUDA", torch.version.cuda)'

smoke=$(mktemp --directory)
trap 'rm -rf "$smoke"' EXIT
"$python" -m torch.distributed.run --nnodes 1 --nproc_per_node 1 finetune.py -m tiny-7b-style -q 4bit -s 1 -o "$smoke/run"
echo "Ready. In a new shell: conda activate falcon && bash scripts/lambda/falcon7b_4bit_1gpu.sh" >&2
