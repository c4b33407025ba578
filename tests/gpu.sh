#!/usr/bin/env bash
# Everything that needs a GPU: the tests of tests/gpu, and the speed of S, B and L beside the published code's loop.
# Where there is no GPU it says so and ends well. Under 8 minutes of measuring; the numbers go to OUT.
#   bash tests/gpu.sh [OUT]            sets .venv up, as tests/run.sh does
#   bash tests/gpu.sh --here [OUT]     in the current environment, as on a machine without network that was given wheels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=
[ "${1:-}" = --here ] && here=1 && shift
out=${1:-runs/gpu}
if [ -z "$here" ]; then
    source jobs/setup.sh dev
fi
python=$(command -v python || command -v python3)
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU here: nothing to test"
    exit 0
fi
mkdir -p "$out"
status=0
"$python" -m pytest tests/gpu -m gpu -p no:cacheprovider || status=$?
"$python" tests/gpu/measure.py "$out" || status=$?
exit "$status"
