"""Shards of a few tiny latents that tell which sample they are, and what training reads of them."""

import json
from dataclasses import replace

import numpy as np
import webdataset

from moe_dit.data import batches
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.ranks import World

DIGITS = load_recipe("digits")
SIZES = (5, 3, 7, 6, 2)


def write_latents(folder, sizes=SIZES, seed=0):
    """Shards of so many samples each, latents [4, 2, 2] whose first value is the sample's number."""
    folder.mkdir(parents=True)
    number, records = 0, []
    generator = np.random.default_rng(seed)
    for k, size in enumerate(sizes):
        name = f"part-{k}.tar"
        with webdataset.TarWriter(str(folder / name), mtime=0) as tar:
            for _ in range(size):
                latent = generator.normal(size=(4, 2, 2)).astype(np.float16)
                latent[0, 0, 0] = number
                tar.write(
                    {
                        "__key__": f"{number:06d}",
                        "cls": number % 10,
                        "latent.npy": latent,
                        "latent_flip.npy": latent[:, :, ::-1].copy(),
                    }
                )
                number += 1
        records.append({"name": name, "samples": size, "bytes": (folder / name).stat().st_size, "sha256": ""})
    values = {"kind": "latents", "samples": number, "classes": list("0123456789"), "sample_shape": [4, 2, 2]}
    values |= {"scale": 1.0, "shards": records, "posterior": False}
    (folder / "manifest.json").write_text(json.dumps({"format": "moe-dit-shards-1"} | values))
    return folder


def stream(folder, world, steps, window_gb, workers=0, first_step=0, global_batch=12):
    data = replace(DIGITS.data, workers=workers, window_gb=window_gb, horizontal_flip=0.0)
    recipe = replace(DIGITS, steps=steps, global_batch_size=global_batch, data=data)
    return list(batches(recipe, read_manifest(folder), global_batch // world.size, first_step, world))


def sequence(folder, size, steps, **how):
    """The samples' numbers in the order of positions, put together from all ranks."""
    found = {}
    for rank in range(size):
        for batch in stream(folder, World(rank, rank, size), steps, **how):
            for position, x, y in zip(batch["position"].tolist(), batch["x"], batch["y"].tolist(), strict=True):
                number = int(x[0, 0, 0])
                assert position not in found and y == number % 10
                found[position] = number
    return found


def flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
