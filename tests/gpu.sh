#!/usr/bin/env bash
# Everything that needs a GPU, in one command under one time budget; results come as they are found.
#   bash tests/gpu.sh [--here] [--dry] [--seconds 420] [--only PART,PART] [OUT]
# OUT (runs/gpu, dry runs/gpu_dry) gets results.jsonl, a line a check or figure, summary.md, and log;
# `python tests/gpu/publish.py OUT` takes them into docs/ and README.md.
#   --here   in the current environment, as on a machine without network: what it lacks is taken from .gpu/wheels
#   --dry    the same parts, tiny, on a CPU
# Exits 0 where a GPU was used and all checks hold, 1 where one does not or nothing could be run, 2 on wrong flags, 3
# where there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
GPU_SH_COMMAND="bash tests/gpu.sh $*"
export GPU_SH_COMMAND
here='' dry=''
for word in "$@"; do
    case $word in
        --here) here=1 ;;
        --dry) dry=1 ;;
        -h | --help) exec "$(command -v python3 || command -v python)" tests/gpu/run.py --help ;;
    esac
done
"$(command -v python3 || command -v python)" tests/gpu/run.py --check "$@"
sees_gpu() { nvidia-smi -L >/dev/null 2>&1 || compgen -G '/dev/nvidia[0-9]*' >/dev/null; }
if [ -z "$dry" ] && ! sees_gpu; then
    echo "tests/gpu.sh: there is no GPU here; --dry tries the same on a CPU" >&2
    exit 3
fi
if [ -z "$here" ]; then
    (source jobs/setup.sh run) || exit 1 # its own status would say that flags are wrong
    source jobs/setup.sh run
fi
python=$(command -v python3 || command -v python)
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
has_all() { "$python" -c 'import deepspeed, diffusers, pydantic, torch_fidelity, webdataset' 2>/dev/null; }
if [ -n "$here" ] && ! has_all; then
    export PYTHONPATH="$PYTHONPATH:$PWD/.gpu/site"
    if ! has_all; then
        compgen -G '.gpu/wheels/*.whl' >/dev/null || { echo "tests/gpu.sh: packages are missing, and .gpu/wheels has" \
            "none: make it with 'python tests/gpu/pack.py --wheels'" >&2 && exit 1; }
        rm -rf .gpu/site
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
            --root-user-action ignore --target .gpu/site .gpu/wheels/*.whl || exit 1
    fi
fi
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "tests/gpu.sh: there is a GPU here, and torch does not see it" >&2
    exit 1
fi
"$python" tests/gpu/pack.py || exit 1
[ -z "$dry" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two processes at a time, of little work
exec "$python" tests/gpu/run.py "$@"
