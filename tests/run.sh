#!/usr/bin/env bash
# Sets up everything and checks everything; the first part that fails ends it. Other arguments go to pytest, and then
# only pytest runs:
#   bash tests/run.sh                  ten minutes on two cores
#   bash tests/run.sh --long           then what is marked long: endurance, many ranks, kills, whole matrices
#   bash tests/run.sh --oldest         what torch computes, on the oldest torch that is admitted, in .venv-oldest
#   bash tests/run.sh tests/unit       what starts no process: a minute and a half
#   bash tests/run.sh tests/unit/test_recipe.py -k digits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Tests never reach the network.
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1
# Each test process would rewrite the assertions of all test files anew, for three seconds.
unset PYTHONDONTWRITEBYTECODE

if [ "${1:-}" = --oldest ]; then
    source jobs/setup.sh oldest
    oldest=(models kernels compile engine flow precision optimizer dropout)
    exec python -m pytest -n 2 --dist loadfile $(printf "tests/unit/test_%s.py " "${oldest[@]}") tests/ranks/test_engine.py
fi
long=no
if [ "${1:-}" = --long ]; then long=yes && shift; fi
source jobs/setup.sh dev

# More files at a time than cores, those first that wait most: for SLURM, for signals, for a time that must run out.
workers=$(($(env -u OMP_NUM_THREADS nproc) + 1)) # nproc says no more than that variable
tests() { python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations 20 "$@"; }
if [ $# -gt 0 ]; then
    tests "$@"
    exit
fi

SECONDS=0
echo "== ruff check" && ruff check .
echo "== ruff format" && ruff format --check .
echo "== mypy" && mypy moe_dit data_prep eval jobs
echo "== bash -n"
for script in jobs/*.sh jobs/slurm/* tests/run.sh tests/gpu.sh .ci/run; do bash -n "$script"; done
echo "== pytest" && tests
echo "== GPU"
bash tests/gpu.sh --here || { [ $? -eq 3 ] && echo "tests/gpu.sh is skipped"; }
echo "== all but the long part: $SECONDS s"
if [ $long = yes ]; then
    echo "== long" && tests -m long
    echo "== all: $SECONDS s"
fi
