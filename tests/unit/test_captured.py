"""Sampling through a CUDA graph: where it is refused. That it gives the same samples is in tests/gpu."""

import pytest
import torch

from eval.captured import captured
from moe_dit import build_model, load_recipe
from moe_dit.runtime.errors import InputError


@pytest.mark.parametrize(
    ("recipe", "device", "says"),
    [
        ("dsmoe_s_e16", "cpu", "needs a GPU and bf16"),
        ("digits_fp32", "cuda", "needs a GPU and bf16"),
        ("diffmoe_s_e16", "cuda", "DiffMoE"),
    ],
)
def test_what_cannot_be_captured_is_refused(recipe, device, says):
    settings = load_recipe(recipe) if recipe != "digits_fp32" else load_recipe("digits", ["precision=fp32"])
    with pytest.raises(InputError, match=says):
        captured(build_model(settings, device="meta"), settings, torch.device(device))
