"""Branches of a run: what two moments have in common, and what becomes of records that are cut."""

from moe_dit.checkpoint_files import Attempt
from moe_dit.lineage import State, common_step
from moe_dit.metrics import Metrics
from moe_dit.recipe_file import load_recipe


def test_what_two_moments_have_in_common():
    a, b, c = Attempt("a", 0), Attempt("b", 40, asked=True), Attempt("c", 80)
    on_a, on_b, later = State([a], 100), State([a, b], 60), State([a, b, c], 90)
    old = State([], 50)  # of a version that kept no history
    assert common_step(on_a, on_b) == 40
    assert common_step(State([a], 30), on_b) == 30
    assert common_step(on_b, later) == 60
    assert common_step(State([a, b], 85), later) == 80
    assert common_step(old, State([Attempt("n", 50)], 70)) == 50
    assert common_step(old, State([Attempt("n", 20)], 70)) == 20
    assert common_step(State([Attempt("n", 20)], 70), State([Attempt("m", 30)], 90)) == 20


def test_records_that_are_cut_are_kept_beside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 2.0}', '{"step": 3, "loss": 3.0}', '{"step": 3, "lo']
    recipe = load_recipe("digits", ["metrics.sinks=[]"])
    for times in (1, 2):
        path.write_text("\n".join(lines))
        Metrics(tmp_path, 2, recipe, 2).close()
        assert path.read_text().splitlines() == lines[:2]
        assert (tmp_path / "metrics_superseded.jsonl").read_text().splitlines() == lines[2:] * times
    Metrics(tmp_path, 2, recipe, 2).close()
    assert path.read_text().splitlines() == lines[:2]
