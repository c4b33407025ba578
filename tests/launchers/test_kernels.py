"""The kernels on Triton's interpreter, which a process has from its first import or never."""

import os
import subprocess
import sys

import numpy as np
import pytest

from helpers import ENV, ROOT


def test_triton_against_float64():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter makes a number of an array of one, as numpy does to 2.3")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = ENV | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "tests/kernels.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "32 cases hold" in done.stdout, done.stderr
