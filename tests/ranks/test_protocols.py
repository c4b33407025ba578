"""The same scores by any number of ranks, against images or a file of what is known of them."""

import json
import sys

import numpy as np
import pytest

from helpers import ROOT, call, run_ranks
from helpers.pictures import KINDS, SIDE, write_pictures


def by_ranks(count, *command):
    """Run a command in this process, or by several ranks."""
    if count == 1:
        assert call(*command) == 0
        return
    line = [sys.executable, "-m", *map(str, command)]
    for done in run_ranks([line] * count, [ROOT] * count):
        assert done.returncode == 0, done.stderr


def test_scores_do_not_depend_on_ranks_or_on_the_reference_s_form(tmp_path):
    """By 1, 2 and 3 ranks, against the images and against their file, which two ranks made.

    More images than a classifier has features: 120 real ones, and 135 samples, three batches of two ranks. Another real
    one cannot be read.
    """
    real, samples = tmp_path / "real", tmp_path / "samples"
    generator = np.random.default_rng(1)
    write_pictures(real, dict.fromkeys(KINDS, 40), generator)
    write_pictures(samples, dict.fromkeys(KINDS, 45), generator)
    (real / "b b" / "0broken.png").write_bytes(b"no image")
    by_ranks(2, "eval.reference", real, "--out", tmp_path / "r.npz")
    stored = dict(np.load(tmp_path / "r.npz"))
    assert stored["mu"].shape == (64,) and stored["features"].shape == (120, 64)
    about = json.loads(str(stored["about"]))
    (left,) = about["unreadable"]["first"]
    assert left["image"] == str(real / "b b" / "0broken.png") and about["unreadable"]["count"] == 1
    assert about["count"] == 120 and about["size"] == SIDE and len(about["sha256"]) == 64
    found = []
    for count, reference in ((1, real), (2, real), (3, real), (2, tmp_path / "r.npz")):
        out = tmp_path / "scores.json"
        by_ranks(count, "eval.score", samples, "--reference", reference, "--out", out)
        found.append(json.loads(out.read_text()))
        out.unlink()
    names = ("fid", "inception_score", "kid", "precision", "recall", "density", "coverage", "fid_infinity")
    for other in found[1:]:
        for key in (*names, "fid_std_error", "held_out_accuracy"):
            exact = 1e-7 if key in ("fid_infinity", "fid_std_error") else 1e-9  # differences of what is nearly equal
            assert other[key] == pytest.approx(found[0][key], rel=exact, abs=1e-9), key
        assert other["num_samples"] == 135 and other["num_reference"] == 120
        assert other["unreadable"] == about["unreadable"]
