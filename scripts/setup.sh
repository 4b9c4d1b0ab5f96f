#!/usr/bin/env bash
# Makes .venv in the repository root and installs a list of requirements into it; once that is done, it finds nothing to do.
#   bash scripts/setup.sh                                   # requirements.txt: what finetune.py and the scripts need
#   bash scripts/setup.sh tests/requirements.txt            # the same and the test tools
#   PYTHON=python3.12 bash scripts/setup.sh                   # with this Python, not the first suitable one on PATH
# Machine: Linux with Python 3.11 to 3.14, a GPU or none. Minutes: 1 to 10, by the network. Cost: up to 6 GB of disk.
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS) say where packages come from.
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=${1:-requirements.txt}
installed=.venv/installed-pins.txt # the pins of the last install that ran to its end

fail() {
  printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
  exit 2
}

suitable() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.14" "unset PYTHON to use the first suitable one on PATH"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python from 3.11 to 3.14 on PATH" "install one with its venv module (Ubuntu: sudo apt-get install python3.11-venv), or set PYTHON to its path"
}

# The pins of a list and of the lists it includes, one a line, without comments.
pins() {
  sed -E 's/[[:space:]]*#.*//; /^-r /d; /^$/d' "$1"
  sed -nE 's/^-r +//p' "$1" | while IFS= read -r included; do pins "$(dirname "$1")/$included"; done
}

[ -f "$requirements" ] || fail "there is no $requirements in $PWD" "give requirements.txt or tests/requirements.txt"

# Two set-ups at once take turns.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi

# A .venv that was left half-made, or whose Python is gone, is made anew.
if [ -e .venv/.unfinished ] || ! .venv/bin/python -c '' 2>/dev/null; then
  python=$(find_python)
  echo "Making .venv with $("$python" --version)" >&2
  rm -rf .venv
  mkdir .venv
  touch .venv/.unfinished
  "$python" -m venv .venv >&2 || fail "$python cannot make a virtual environment" "install its venv module (Ubuntu: sudo apt-get install python3-venv)"
  rm .venv/.unfinished
fi
suitable .venv/bin/python || fail ".venv holds $(.venv/bin/python --version), not a Python from 3.11 to 3.14" "remove it (rm -r .venv) and run this again"

missing=all
if [ -f "$installed" ]; then missing=$(pins "$requirements" | grep -vxFf "$installed" || true); fi
if [ -n "$missing" ]; then
  echo "Installing $requirements into .venv (the first time some minutes: torch for GPUs is a download of about 3 GB)" >&2
  rm -f "$installed"
  .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null || fail ".venv has no pip" "remove it (rm -r .venv) and run this again"
  .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement "$requirements" >&2 ||
    fail "pip could not install $requirements" "see its message above, then run this again"
  pins "$requirements" >"$installed.part"
  mv "$installed.part" "$installed"
fi
