"""Tiny networks of the family JiT, with random weights: what is upcycled, and what runs begin from."""

from pathlib import Path

import torch

from moe_dit import build_model, load_recipe
from moe_dit.export import save_export

TINY = ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", "model.bottleneck_dim=16"]
TINY += ["model.in_context_start=1", "global_batch_size=16"]
UNITS = 85  # hidden units of its dense blocks: int(4 * 32 * 2 / 3)
MIXTURE = [*TINY, "model.moe.num_experts=4", "model.moe.expert_width=48"]


def recipe(*changes):
    return load_recipe("digits_pixels", changes)


def fill(model, seed=1):
    """Random weights everywhere: fresh networks have zeros where an error could hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0, 0.2, generator=generator)
    return model


def save_mixture(folder: Path) -> Path:
    """A tiny JiTMoE's model folder, in several files."""
    mixture = recipe(*MIXTURE)
    model = fill(build_model(mixture))
    save_export(model, mixture, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def flags_from(folder, steps=2):
    values = [*MIXTURE, f"initial_weights={folder}"]
    return ["--recipe", "digits_pixels", "--steps", str(steps), *(f for value in values for f in ("--set", value))]
