"""Learning rates by their closed forms, averages by their definition, and optimizers that are refused."""

from dataclasses import replace

import pytest
import torch

from moe_dit.ema import EMA
from moe_dit.optimizer import optimizer_kind
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError
from moe_dit.schedule import learning_rate

OPTIMIZER = load_recipe("digits").optimizer


@pytest.mark.parametrize(
    ("schedule", "warmup", "want"),
    [  # lr 1, final_lr 0.2, 9 steps
        ("constant", 0, [1.0] * 9),
        ("constant", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ("linear", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 4, [0.25, 0.5, 0.75, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_the_rate_of_each_step(schedule, warmup, want):
    final = 0.0 if schedule == "constant" else 0.2
    optimizer = replace(OPTIMIZER, lr=1.0, final_lr=final, schedule=schedule, warmup_steps=warmup)
    assert [learning_rate(optimizer, step, 9) for step in range(9)] == pytest.approx(want, abs=1e-6)


def test_a_rate_beyond_the_last_step_stays_at_the_end():
    optimizer = replace(OPTIMIZER, lr=1.0, final_lr=0.2, schedule="cosine")
    assert learning_rate(optimizer, 100, 9) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optimizer.final_lr=1.0", "optimizer.final_lr is 1.0, more than optimizer.lr"),
        ("optimizer.schedule=cosin", "did you mean cosine?"),
        ("optimizer.lr=-1.0", "optimizer.lr"),
    ],
)
def test_wrong_rates_are_one_line(change, line):
    with pytest.raises(InputError, match=line.replace("?", r"\?")):
        load_recipe("digits", [change])


def test_averages_follow_weights_that_change_in_place():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    ema = EMA(weights, {"ema": 0.5, "ema2": 0.75})
    weights[0] += 2.0
    ema.update()
    weights[1] *= 0
    ema.update()
    assert [average.tolist() for average in ema.averages["ema"]] == [[2.5, 3.5], [[2.0]]]
    assert [average.tolist() for average in ema.averages["ema2"]] == [[1.875, 2.875], [[3.0]]]
    assert [weight.tolist() for weight in weights] == [[3.0, 4.0], [[0.0]]]


def test_optimizers_that_cannot_work_here_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"Muon works on whole matrices.*choose one of adamw"):
        optimizer_kind("muon")
    with pytest.raises(InputError, match="no such optimizer here; choose one of adamw"):
        optimizer_kind("adamm")
