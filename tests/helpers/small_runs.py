"""Runs of small networks: what they begin from, and one plain torch process that they are held against."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from helpers import finish, start_training
from helpers.older_run import SHARDS
from moe_dit import build_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.export import save_export
from moe_dit.flow import build_flow
from moe_dit.manifest import read_manifest
from moe_dit.recipe import Recipe
from moe_dit.runtime.ranks import World

TINY = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "global_batch_size=16"]
SMALL = [*TINY, "model.moe.expert_width=16"]  # where tokens choose experts


def sets(keys: list[str]) -> list[str]:
    """Flags that change keys of a recipe."""
    return [f"--set={key}" for key in keys]


@dataclass
class Trained:
    """Some steps of training: the loss and the gradient's norm of each, and what they left."""

    losses: list[float]
    norms: list[float]
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def moments(self, kind: str) -> dict[str, torch.Tensor]:
        """Adam's ``exp_avg`` or ``exp_avg_sq`` of each weight, flattened."""
        return {name: self.optimizer.state[weight][kind].flatten() for name, weight in self.model.named_parameters()}


def adamw(weights: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of the digits' recipe."""
    return torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)


def train_plainly(
    recipe: Recipe,
    shards: Path,
    steps: int,
    clip: float = float("inf"),
    make_optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    after_step: Callable[[torch.nn.Module], None] = lambda model: None,
) -> Trained:
    """The steps that the command should take of a recipe whose samples are latents."""
    manifest, model, flow = read_manifest(shards), build_model(recipe), build_flow(recipe)
    optimizer = make_optimizer(model.parameters())
    done = Trained([], [], model, optimizer)
    stream = batches(replace(recipe, steps=steps), manifest, recipe.global_batch_size, 0, World())
    for _, batch in zip(range(steps), stream, strict=False):
        inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
        optimizer.zero_grad()
        t = flow.times(inputs["u"])
        loss = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=t)["loss"]
        loss.backward()
        done.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        after_step(model)
        done.losses.append(loss.item())
    return done


def begin(folder: Path, name: str, keys: list[str], spread: float, change=None) -> Path:
    """A model folder of random weights, to begin from; a fresh network's gradients are zero in most places."""
    recipe = load_recipe(name, keys)
    model, generator = build_model(recipe), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
        if change is not None:
            change(model)
    save_export(model, recipe, folder)
    return folder


def train(run: Path, steps: int, *flags: str, ranks: int = 1, zero: int = 1) -> str:
    """The command, with experts shared by all ranks; gives its output."""
    ds = Path(f"{run}.json")
    config = {"zero_optimization": {"stage": zero}, "expert_parallel": {"enabled": True, "autoep_size": ranks}}
    ds.write_text(json.dumps(config))
    return finish(start_training(ranks, ds, SHARDS, run, "--steps", str(steps), *flags), run)
