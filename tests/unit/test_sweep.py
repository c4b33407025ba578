"""What a sweep's table says."""

import json
from dataclasses import replace

import pytest

from eval import sweep
from eval.generate import Sampling
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError


def made_up(folder, fids):
    """Cells of given FIDs and errors, and their files."""
    (folder / "cells").mkdir(parents=True)
    recipe = load_recipe("digits")
    cells = []
    for (scale, seed), (fid, error) in fids.items():
        cell = sweep.Cell("m", replace(Sampling.of_recipe(recipe, seed), cfg_scale=scale))
        (folder / "cells" / cell.file).write_text(
            json.dumps({"fid": fid, "fid_std_error": error, "precision": fid / 10})
        )
        cells.append(cell)
    return cells


def test_the_best_is_marked_and_what_does_not_differ_from_it(tmp_path):
    cells = made_up(tmp_path, {(1.0, 0): (5.0, 0.1), (1.5, 0): (4.0, 0.3), (2.0, 0): (4.5, 0.2), (3.0, 0): (9.0, 0.4)})
    found = sweep.rows(tmp_path, cells)
    # 4.5 - 4 is within 1.96 sqrt(0.3^2 + 0.2^2) = 0.71, and 5 - 4 is not within 1.96 sqrt(0.3^2 + 0.1^2) = 0.62.
    assert [(row.best, row.near) for row in found] == [(False, False), (True, False), (False, True), (False, False)]


def test_several_seeds_are_a_mean_with_its_spread(tmp_path):
    cells = made_up(
        tmp_path, {(1.0, 0): (5.0, 0.01), (1.0, 1): (6.0, 0.01), (1.0, 2): (7.0, 0.01), (2.0, 0): (8.0, 0.3)}
    )
    one, two = sweep.rows(tmp_path, cells)
    assert (one.fid, one.seeds) == (6.0, 3) and one.error == pytest.approx(1 / 3**0.5)  # stdev 1 over sqrt(3)
    assert one.scores["precision"] == pytest.approx(0.6) and (two.fid, two.error) == (8.0, 0.3)


def test_a_folder_without_checkpoints_is_one_line(tmp_path):
    with pytest.raises(InputError, match="has no checkpoints; give a run"):
        sweep.variants(tmp_path, ["all"], ["ema"])
