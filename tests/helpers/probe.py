"""A training step, looked into on each rank, under several DeepSpeed JSONs and settings: for ranks/test_engine.py.

    tests/helpers/probe.py OUT STAGE,EP[,section.key=value ...] ...

Each rank writes OUT.RANK, a list of what it found in each case.
"""

import gc
import json
import sys
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from zlib import crc32

import torch

from moe_dit.engine import Engine, start_ranks
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.plan import make_plan
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime import ranks

BATCH = 16  # of a step, all ranks together
LEAST = 4096  # bytes of a tensor that is looked at: numbers beside it are counters and losses
BUCKET = 200_000  # elements of DeepSpeed's buffer for what it is about to send
SETTINGS = [f"global_batch_size={BATCH}", "optimizer.betas=[0.0, 0.999]"]  # so that a first moment is a gradient


def storages(tensors) -> dict[int, int]:
    """Bytes by address of the memory behind tensors."""
    found = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def draw(name: str, numel: int) -> torch.Tensor:
    """Values [numel] of a weight: a fresh network is the identity, and most of its gradients are zero."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(crc32(name.encode()))) * 0.05


def note(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total += gradient.flatten().double()


def sums_over_ranks(captured: dict[str, torch.Tensor], engine: Engine) -> dict[str, torch.Tensor]:
    """The mean over ranks of float64 sums of gradients; experts that a rank has alone get it of its own."""
    world = engine.parallelism.world_size
    for name, weight in engine.model.named_parameters():
        if not hasattr(weight, "first_expert") or engine.parallelism.ep_size == 1:
            torch.distributed.all_reduce(captured[name])
        captured[name] /= world
    return captured


def look(stage: int, ep: int, settings: list[str]) -> tuple[dict, weakref.ref]:
    """One step in one case, and what became of its gradients; and some master weights of the engine, now closed."""
    recipe, world = load_recipe("digits", [*SETTINGS, *settings]), ranks.world()
    with tempfile.TemporaryDirectory() as folder:
        ds = Path(folder) / "ds.json"
        zero = {"stage": stage, "reduce_bucket_size": BUCKET}
        ds.write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": ep}, "zero_optimization": zero}))
        parallelism = load_parallelism(str(ds), recipe, world.size)
    engine = Engine(recipe, parallelism, torch.device("cpu"))
    for piece in engine.pieces():
        weight = piece.tensors["weight"]
        weight.add_(draw(piece.name, piece.numel)[piece.start : piece.start + len(weight)])
    engine.set_step(0)
    # What autograd gives for a weight in each micro-batch, before DeepSpeed sees it.
    captured: dict[str, torch.Tensor] = {}
    for name, weight in engine.model.named_parameters():
        shape = getattr(weight, "ds_shape", weight.shape)
        captured[name] = torch.zeros(shape.numel(), dtype=torch.float64)
        weight.register_hook(partial(note, captured[name]))
    generator, n = torch.Generator().manual_seed(world.rank), parallelism.micro_batch_size
    batches = []
    for _ in range(parallelism.accumulation):
        batch = {key: torch.randn(n, 4, 8, 8, generator=generator) for key in ("x", "noise")}
        batch |= {"y": torch.randint(0, 11, (n,), generator=generator), "u": torch.rand(n, generator=generator)}
        batches.append(batch | {"position": torch.arange(n)})
    optimizer = engine._zero
    step = optimizer.step
    found: dict = {"accumulation": parallelism.accumulation, "optimizer": type(optimizer).__name__}

    def held() -> int:
        """All gradients are there now, and the activations gone: what is left beside the state is gradients."""
        gc.collect()
        weights = list(engine.model.parameters())
        parts = [weight.ds_tensor for weight in weights if hasattr(weight, "ds_tensor")]
        state = [tensor for piece in engine.pieces() for tensor in piece.tensors.values()]
        inputs = [tensor for batch in batches for tensor in batch.values()]
        known = storages([*weights, *parts, *engine.model.buffers(), *state, *inputs, *captured.values()])
        alive = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        alive += [weight.grad for weight in weights if weight.grad is not None]
        rest = [size for place, size in storages(alive).items() if place not in known and size >= LEAST]
        return sum(rest) - (BUCKET * 4 if stage == 3 else 0)  # where DeepSpeed's buffer is there all the time

    found["planned"] = make_plan(recipe, parallelism, engine.bf16).gradients

    def look_and_step():
        asked = stage == 2 or "gradients=bf16" not in settings  # else DeepSpeed holds more than is planned
        deadline = time.monotonic() + (300 if asked else 0)
        while (now := held()) > found["planned"] and time.monotonic() < deadline:
            time.sleep(0.05)  # gloo's thread keeps what it has sent until it is scheduled once more
        found["held"] = now
        step()

    optimizer.step = look_and_step
    result = engine.train_step(0, batches)
    found["load"] = result["load"].sum().item()
    truth = sums_over_ranks(captured, engine)
    first_expert = {name: getattr(weight, "first_expert", 0) for name, weight in engine.model.named_parameters()}
    errors = torch.zeros(2, dtype=torch.float64)
    for piece in engine.pieces():
        got = piece.tensors["exp_avg"].double()
        start = piece.start - first_expert[piece.name] * (piece.numel // recipe.model.moe.num_experts)
        want = truth[piece.name][start : start + len(got)]
        errors += torch.stack([(got - want).square().sum(), want.square().sum()])
    found["error"] = (errors[0] / errors[1]).sqrt().item()
    engine.close()
    return found, weakref.ref(engine.ema.weights[0])


def main(out: str, *cases: str) -> None:
    start_ranks()
    results = []
    for case in cases:
        stage, ep, *settings = case.split(",")
        found, masters = look(int(stage), int(ep), settings)
        gc.collect()
        results.append(found | {"freed": masters() is None})
    Path(f"{out}.{ranks.world().rank}").write_text(json.dumps(results))
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
