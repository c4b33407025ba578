"""Dropout by position on ranks: a run with it is the same run, whatever ranks share the work."""

import pytest
import torch

from helpers import finish, losses, start_training
from moe_dit import build_model
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import save_export
from moe_dit.flow import build_flow
from moe_dit.manifest import read_manifest
from moe_dit.models.dropout import dropouts, set_dropout_draws
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.ranks import World


def test_a_pixel_mixture_with_dropout_is_the_same_run_on_one_rank_and_on_two(pixels, tmp_path):
    settings = ["model.depth=4", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
    settings += ["global_batch_size=16", "model.moe.dropout=0.2", "model.proj_dropout=0.2", "model.attn_dropout=0.1"]
    recipe = load_recipe("digits_pixels", settings)
    # A fresh network is the identity, whatever is dropped inside it: begin from one that is not.
    model, generator = build_model(recipe), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save_export(model, recipe, tmp_path / "begin")
    common = ["--recipe", "digits_pixels", "--steps", "3", f"--set=initial_weights={tmp_path / 'begin'}"]

    def train(ranks: int, ds: str, *changes: str) -> list[float]:
        run = tmp_path / f"{ranks} {len(changes)}"
        flags = [f"--set={change}" for change in (*settings, *changes)]
        finish(start_training(ranks, ds, pixels, run, *common, *flags), run)
        return losses(run)

    one = train(1, "zero1_ep1")
    assert train(2, "zero2_ep2") == pytest.approx(one, rel=1e-6)
    recomputed = ["activation_checkpointing=blocks", "max_micro_batch_size=4"]
    assert train(2, "zero2_ep2", *recomputed) == pytest.approx(one, rel=1e-6)

    # The plain network has the loss of the first step; and without any one of the dropouts it gives something else.
    manifest = read_manifest(pixels)
    batch = next(batches(recipe, manifest, 16, 0, World()))
    inputs = training_inputs(recipe, batch, Latents())
    flow = build_flow(recipe)

    t, found = flow.times(inputs["u"]), dropouts(model.train())
    set_dropout_draws(found, recipe.seed, inputs["position"])
    loss = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=t)["loss"]
    assert loss.item() == pytest.approx(one[0], rel=1e-6)
    whole = model(inputs["x"], t, inputs["y"])
    for part in ("attn.attn_drop", "attn.proj_drop", "experts.dropout", "shared_experts.dropout", "mlp.dropout"):
        chosen = {name: module.p for name, module in found.items() if name.endswith(part)}
        assert chosen
        for name in chosen:
            found[name].p = 0.0
        assert (model(inputs["x"], t, inputs["y"]) - whole).norm() > 1e-3 * whole.norm()
        for name, p in chosen.items():
            found[name].p = p
