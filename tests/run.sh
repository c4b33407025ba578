#!/usr/bin/env bash
# Sets up everything and checks everything; the first part that fails ends it. Other arguments than --long go to pytest,
# and then only pytest runs:
#   bash tests/run.sh
#   bash tests/run.sh --long           then what torch computes, once more on the oldest torch that is admitted
#   bash tests/run.sh tests/test_recipe.py -k digits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
long=no
if [ "${1:-}" = --long ]; then long=yes && shift; fi
source jobs/setup.sh dev

# Tests never reach the network.
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1

if [ $# -eq 0 ]; then
    echo "== ruff check" && ruff check .
    echo "== ruff format" && ruff format --check .
    echo "== mypy" && mypy moe_dit data_prep eval jobs
    echo "== bash -n"
    for script in jobs/*.sh jobs/slurm/* tests/run.sh tests/gpu.sh .ci/run; do bash -n "$script"; done
    echo "== pytest"
fi
# Two files at a time: much of a training test is starting processes, which keeps one core busy.
python -m pytest -n 2 --dist loadfile "$@"

if [ $# -eq 0 ]; then
    echo "== GPU"
    bash tests/gpu.sh --here || { [ $? -eq 3 ] && echo "tests/gpu.sh is skipped"; }
fi
if [ $long = yes ]; then
    echo "== pytest, oldest torch"
    source jobs/setup.sh oldest
    oldest=(model kernels compile engine flow precision optimizer dropout)
    python -m pytest -n 2 --dist loadfile $(printf "tests/test_%s.py " "${oldest[@]}")
fi
