#!/usr/bin/env bash
# Checks Trivium on one GPU in about ten minutes, and writes runs/gpu/gpu.json and runs/gpu/gpu.md.
#
#   tests/gpu/run.sh                        # on a machine with a CUDA GPU
#   tests/gpu/run.sh --device cpu --small   # the same road without a GPU, in some minutes
#   tests/gpu/run.sh --wheels DIR           # installs from the wheels in DIR alone, without network
#   tests/gpu/run.sh --make-wheels DIR      # fills DIR, on a machine with network and the same Python
#
# PYTHON names the Python to use (3.11 to 3.13). If it has a torch already, that one stays; torch 2.11 or later will do.
# The packages go into .venv-gpu. With --no-install the checks run in PYTHON itself.
set -euo pipefail
cd "$(dirname "$0")/../.."

wheels= make_wheels= install=yes checks=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=$2; shift ;;
    --make-wheels) make_wheels=$2; shift ;;
    --no-install) install= ;;
    *) checks+=("$1") ;;
  esac
  shift
done
[ -n "$wheels" ] || [ ! -d tests/gpu/wheels ] || wheels=tests/gpu/wheels

# The one that PYTHON names, else the first suitable one that has torch, else the first suitable one.
python=${PYTHON:-} first=
suitable='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
for name in python3 python3.13 python3.12 python3.11; do
  if [ -z "$python" ] && "$name" -c "$suitable" 2>/dev/null; then
    first=${first:-$name}
    ! "$name" -c 'import torch' 2>/dev/null || python=$name
  fi
done
python=${python:-$first}
[ -n "$python" ] || { echo "error: no Python 3.11 to 3.13 on PATH; name one: PYTHON=/path/to/python tests/gpu/run.sh" >&2; exit 1; }

if [ -z "$install" ]; then
  exec "$python" -m tests.gpu.check ${checks[@]+"${checks[@]}"}
fi

# DeepSpeed's setup looks for nvcc unless it is told that no kernel is to be built.
export DS_ACCELERATOR=cpu DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
own_torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null || true)

# Makes an environment that sees the packages of $python if torch is among them, also where $python is in one itself.
environment() {
  "$python" -m venv --clear "$1"
  [ -z "$own_torch" ] || "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
    >"$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
}

"$python" tests/gpu/requirements.py "$own_torch" "$scratch"

if [ -n "$make_wheels" ]; then
  environment "$scratch/venv"
  "$scratch/venv/bin/pip" install -q -c "$scratch/constraints.txt" setuptools wheel numpy
  [ -n "$own_torch" ] || "$scratch/venv/bin/pip" install -q -c "$scratch/constraints.txt" torch==2.13.0
  "$scratch/venv/bin/pip" wheel -w "$make_wheels" -c "$scratch/constraints.txt" pip setuptools wheel
  "$scratch/venv/bin/pip" wheel -w "$make_wheels" -c "$scratch/constraints.txt" --no-build-isolation -r "$scratch/requirements.txt"
  echo "copy $make_wheels beside the repository, then: tests/gpu/run.sh --wheels $make_wheels"
  exit 0
fi

venv=.venv-gpu
if [ ! -e "$venv/installed" ]; then
  echo "installing into $venv${own_torch:+ beside torch $own_torch}"
  environment "$venv"
  from=()
  [ -z "$wheels" ] || from=(--no-index --find-links "$wheels")
  pip=("$venv/bin/pip" install -q ${from[@]+"${from[@]}"} -c "$scratch/constraints.txt" --no-build-isolation)
  "${pip[@]}" setuptools wheel
  [ -n "$own_torch" ] || "${pip[@]}" torch==2.13.0 numpy
  "${pip[@]}" -r "$scratch/requirements.txt"
  touch "$venv/installed"
fi
unset DS_ACCELERATOR
"$venv/bin/python" -m tests.gpu.check ${checks[@]+"${checks[@]}"}
