"""Record which experts a model sends the tokens of real samples to, by time, class and place in the image.

A sample of a run's position p is noised to the middles of equal parts of [0, 1], as in training and along one line from
its noise to it, and given to the network in eval mode with its own label. What is counted follows from (model, shards,
seed) alone; only DiffMoE's experts choose among the samples of a batch, so that there it depends on --batch too.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eval.atlas_file import Atlas, entropy_bits, is_atlas, save_atlas, shares
from eval.sample_folder import model_fingerprint
from moe_dit.build import to_compute
from moe_dit.classes import are_numbers, labels_among, model_classes, translated
from moe_dit.data import Latents, ShardReader, TrainingSamples, check_manifest, training_inputs
from moe_dit.export import load_export
from moe_dit.flow import build_flow
from moe_dit.manifest import Manifest, read_manifest
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.moe import MoE
from moe_dit.recipe import Recipe
from moe_dit.runtime import ranks
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file
from moe_dit.runtime.progress import say, task

EXAMPLES = """\
  python -m eval.atlas --model MODEL --data SHARDS --out atlas.npz
  python -m eval.atlas --model MODEL --data SHARDS --samples 5000 --times 20 --out atlas.npz
  python -m eval.report --run RUN --atlas atlas.npz --out report.html
"""
Layer = MoE | ExpertChoiceMoE


# --- counting ---------------------------------------------------------------------------------------------------------


class Recorder:
    """Counts the choices of MoE layers, which know nothing of it, on the device that computes.

    Use it as a context manager; call :meth:`expect` before each forward pass.

    Args:
        layers: MoE or ExpertChoiceMoE by name, all with the same number of experts.
        side: of the square of tokens that have a place in the image; a sample's further tokens come before them.
        times, classes: how many there are.
        device: where the layers compute.
    """

    def __init__(self, layers: dict[str, Layer], side: int, times: int, classes: int, device: torch.device):
        self.layers = layers
        self.side = side
        first = next(iter(layers.values()))
        experts = len(first.router.weight) if isinstance(first, MoE) else first.num_experts

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(len(layers), *shape, experts, dtype=torch.int64, device=device)

        self.by_time = zeros(times)
        self.class_tokens_by_time = zeros(times)
        self.by_class = zeros(classes)
        self.by_position = zeros(side, side)
        self.together = zeros(experts)
        self._time = 0
        self._labels = torch.empty(0)

    def expect(self, time: int, labels: torch.Tensor) -> None:
        """The next forward pass is of samples with these labels, int64 [N], at the time of this number."""
        self._time = time
        self._labels = labels

    def __enter__(self) -> "Recorder":
        self._hooks = []
        for number, layer in enumerate(self.layers.values()):
            if isinstance(layer, MoE):
                self._hooks.append(layer.router.register_forward_hook(self._token_choice(number)))
            else:
                self._hooks.append(layer.register_forward_hook(self._expert_choice(number)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _token_choice(self, number: int):
        def record(router, _, output) -> None:
            experts_TK = output[1]
            taken_TE = torch.zeros(len(experts_TK), self.together.shape[-1], device=experts_TK.device)
            self._count(number, taken_TE.scatter_(1, experts_TK, 1.0))

        return record

    def _expert_choice(self, number: int):
        def record(layer, inputs, _) -> None:
            x_TD = inputs[0].flatten(0, -2)
            token_R, _, count_E = layer.choose(x_TD)
            experts = torch.arange(len(count_E), device=x_TD.device)
            expert_R = experts.repeat_interleave(count_E, output_size=len(token_R))
            taken_TE = torch.zeros(len(x_TD), len(count_E), device=x_TD.device)
            self._count(number, taken_TE.index_put_((token_R, expert_R), taken_TE.new_ones(())))

        return record

    def _count(self, number: int, taken_TE: torch.Tensor) -> None:
        """Add 0s and 1s [tokens of all samples, E]; float32 sums of fewer than 2^24 ones are exact."""
        taken_NTE = taken_TE.unflatten(0, (len(self._labels), -1))
        places = self.side * self.side
        class_NTE, image_NTE = taken_NTE.split([taken_NTE.shape[1] - places, places], dim=1)  # class tokens come first
        by_sample_NE = image_NTE.sum(1).long()
        self.by_time[number, self._time] += by_sample_NE.sum(0)
        self.by_class[number].index_add_(0, self._labels, by_sample_NE)
        self.by_position[number] += image_NTE.sum(0).long().unflatten(0, (self.side, self.side))
        self.class_tokens_by_time[number, self._time] += class_NTE.sum((0, 1)).long()
        image_TE = image_NTE.flatten(0, 1)
        self.together[number] += (image_TE.T @ image_TE).long()


@torch.no_grad()
def make_atlas(
    model: nn.Module,
    recipe: Recipe,
    manifest: Manifest,
    classes: Sequence[str] | None = None,
    *,
    samples: int,
    times: int,
    seed: int,
    batch: int,
) -> Atlas:
    """Run a model on real samples and count its choices.

    Args:
        model: ready to compute with (moe_dit.build.to_compute).
        recipe: the model's.
        manifest: of shards that fit it.
        classes: the names of the model's classes, by which those of the shards are taken; None: their labels are.
        samples: positions [0, samples) of a run with this seed.
        times: equal parts of [0, 1], of which the middles are taken.
        seed: of order, latent draws and noise.
        batch: samples computed at once.

    Returns:
        The atlas; its settings are samples, seed, batch and choice.

    Raises:
        InputError: the shards do not fit the recipe or cannot be read, or the model is dense.
    """
    check_manifest(manifest, recipe)
    names, places = manifest.classes, None
    if classes is not None:
        places = labels_among(names, classes, f"the shards {manifest.place}", "the model")
        names = list(classes) if places is not None or are_numbers(names) else names
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    if not layers:
        raise InputError(f"the model of recipe {recipe.name} is dense; an atlas is of mixture-of-experts layers")
    choice = "token" if isinstance(next(iter(layers.values())), MoE) else "expert"
    device = next(model.parameters()).device
    side = recipe.model.input_size // recipe.model.patch_size
    recipe = replace(recipe, seed=seed, flow=replace(recipe.flow, label_dropout=0.0))
    reader = TrainingSamples(ShardReader(manifest), seed, recipe.data.horizontal_flip)
    latents = Latents.of(recipe, manifest)
    flow = build_flow(recipe)
    middles = (np.arange(times) + 0.5) / times
    samples_by_class = torch.zeros(len(names), dtype=torch.int64)
    with (
        Recorder(layers, side, times, len(names), device) as recorder,
        task("routing atlas", samples * times) as progress,
    ):
        for start in range(0, samples, batch):
            read = reader.__getitems__(list(range(start, min(start + batch, samples))))
            read["y"] = translated(read["y"], places)
            samples_by_class += read["y"].bincount(minlength=len(samples_by_class))
            inputs = training_inputs(recipe, {key: value.to(device) for key, value in read.items()}, latents)
            x = inputs["x"]
            y = inputs["y"]
            noise = inputs["noise"]
            for k, middle in enumerate(middles):
                recorder.expect(k, y)
                # The loss noises as training does, and is not asked for its value.
                flow.loss(model, x, y, noise=noise, t=torch.full((len(x),), float(middle), device=device))
                progress.advance(len(x))
    counts = {
        name: getattr(recorder, name).cpu().numpy()
        for name in ("by_time", "by_class", "by_position", "together", "class_tokens_by_time")
    }
    return Atlas(
        **counts,
        entropy=entropy_bits(shares(counts["by_time"])),
        times=middles,
        samples_by_class=samples_by_class.numpy(),
        layers=np.array(list(layers)),
        classes=np.array(names),
        settings={"samples": samples, "seed": seed, "batch": batch, "choice": choice},
    )


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="MODEL", help="an exported model (jobs/export.py)")
    add("--data", type=Path, required=True, metavar="SHARDS", help="real samples, encoded as for its training")
    add("--samples", type=int, default=256, metavar="N", help="default %(default)s")
    add("--times", type=int, default=10, metavar="N", help="equal parts of [0, 1]; default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of samples and their noise; default 0")
    add("--batch", type=int, default=64, metavar="N", help="samples computed at once; default %(default)s")
    add("--out", type=Path, required=True, metavar="ATLAS", help="file to write, .npz")
    args = parser.parse_args()
    for flag, most in (("samples", 10**9), ("times", 10_000), ("batch", 100_000)):
        if not 1 <= getattr(args, flag) <= most:
            raise InputError(f"--{flag} is {getattr(args, flag)}; it should be 1 to {most:,}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed is {args.seed}; it should be at least 0 and below 2^63")
    check_new_file(args.out, is_atlas)
    model, recipe = load_export(args.model)
    manifest = read_manifest(args.data)
    classes = model_classes(args.model)
    settings = {"samples": args.samples, "times": args.times, "seed": args.seed, "batch": args.batch}
    try:
        atlas = make_atlas(to_compute(model, recipe, ranks.device()), recipe, manifest, classes, **settings)
    except torch.OutOfMemoryError:
        raise InputError(f"--batch {args.batch} does not fit into the GPU's memory; give a smaller one") from None
    settings = {"model": str(args.model), "model_sha256": model_fingerprint(args.model), "data": str(args.data)}
    save_atlas(replace(atlas, settings=settings | atlas.settings), args.out)
    even = math.log2(atlas.by_time.shape[-1])
    lowest = atlas.entropy.min()
    highest = atlas.entropy.max()
    say(
        f"{len(atlas.layers)} MoE layers, {args.samples} samples at {args.times} times: entropy of the experts' shares "
        f"{lowest:.2f} to {highest:.2f} bits, {even:.2f} is even; atlas in {args.out}"
    )


if __name__ == "__main__":
    run(main)
