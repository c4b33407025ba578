"""Training in one plain torch process, for runs of a small network to be held against."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe_dit import build_model
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.flow import Flow
from moe_dit.manifest import read_manifest
from moe_dit.recipe import Recipe
from moe_dit.runtime.ranks import World

SMALL = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.moe.expert_width=16"]
SMALL += ["global_batch_size=16"]  # of the recipe digits; seconds of starting it remain


def sets(keys: list[str]) -> list[str]:
    """Flags that change keys of a recipe."""
    return [f"--set={key}" for key in keys]


@dataclass
class Trained:
    """Some steps of training: the loss and the gradient's norm of each, and what they left."""

    losses: list[float]
    norms: list[float]
    model: torch.nn.Module
    adam: torch.optim.AdamW

    def moments(self, kind: str) -> dict[str, torch.Tensor]:
        """Adam's ``exp_avg`` or ``exp_avg_sq`` of each weight, flattened."""
        return {name: self.adam.state[weight][kind].flatten() for name, weight in self.model.named_parameters()}


def train_plainly(recipe: Recipe, shards: Path, steps: int, clip: float = float("inf")) -> Trained:
    """The steps that the command should take of a recipe whose rate is 1e-3 and whose samples are latents."""
    manifest, model = read_manifest(shards), build_model(recipe)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    done = Trained([], [], model, adam)
    stream = batches(replace(recipe, steps=steps), manifest, recipe.global_batch_size, 0, World())
    for _, batch in zip(range(steps), stream, strict=False):
        inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
        adam.zero_grad()
        loss = Flow().loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=inputs["u"])["loss"]
        loss.backward()
        done.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        adam.step()
        done.losses.append(loss.item())
    return done
