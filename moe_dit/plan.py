"""What a run will hold and send on each GPU, worked out without training.

Weights and optimizer state are exact: the same rules of partition and padding as DeepSpeed 0.19.8's, applied to the
network on the meta device. Activations are measured on two small depths of the real network on the CPU and extended
along the depth. Traffic is counted from the algorithms. The speed is an estimate: arithmetic and the memory touched at
the rates that large products and copies reach, traffic, the time it takes to launch a step's kernels, and host waits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moe_dit.build import build_model
from moe_dit.models.moe import Experts, MoE
from moe_dit.optimizer import optimizer_kind
from moe_dit.parallel.deepspeed_config import Parallelism, sums_in_fp32
from moe_dit.parallel.recompute import apply_activation_checkpointing
from moe_dit.recipe import Recipe


@dataclass(frozen=True)
class GPU:
    """From the vendor's data sheet: bytes of memory, dense bf16 FLOP/s, bytes/s of memory, and of NVLink one way."""

    memory: float
    flops: float
    bandwidth: float
    nvlink: float


GPUS = {
    "a100-40g": GPU(40e9, 312e12, 1.555e12, 300e9),
    "a100-80g": GPU(80e9, 312e12, 2.039e12, 300e9),
    "h100-80g": GPU(80e9, 989e12, 3.35e12, 450e9),
    "h200-141g": GPU(141e9, 989e12, 4.8e12, 450e9),
    "b200-192g": GPU(192e9, 2250e12, 8e12, 900e9),
}
NODE = 8  # GPUs that NVLink joins
NETWORK = 50e9  # bytes/s of a GPU's share of the network between nodes: 400 Gb/s
ARITHMETIC = 790 / 989  # share of the sheet's FLOP/s that large bf16 products reach on an H100
COPIES = 3.0 / 3.35  # share of the sheet's bytes/s that copies reach there
RESERVED = 3e9  # CUDA context, communication buffers and the allocator's slack
# Seconds of host time an operation of torch takes, autograd and launch: an estimate. An H200's host took 40 to 55e-6,
# with all that Python does around it (docs/gpu), so small batches are slower there than planned.
LAUNCH = 8e-6
WAIT = 30e-6  # seconds a GPU idles where the host waits for it: a number's copy, its reading, the next launch; as rough
MODES = ("none", "experts", "blocks")  # of activation checkpointing, from the fastest to the smallest

ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: flat groups are padded to a multiple of this times the ranks
MAX_GROUP = 178956971  # elements in a group of expert weights (split_params_into_different_moe_groups_for_optimizer)

# Kernels launched, forward and backward, as moe_dit/counting.py counts them: dsmoe_s_e16 (10 blocks, 5 of them MoE, 126
# parameters) at EP 8 and ZeRO 2 under DeepSpeed 0.19.8; the totals stand beside the divisors. Eager, then compiled.
LAUNCHES_DRAWS = 548, 10 + 9 + 6 + 10  # noise, times, labels; compiled, with objective, embedders, modulations
LAUNCHES_BLOCK = (570 + 380) / 10, 498 / 10  # attention, rotation, modulation, norms, residuals; compiled, all of it
LAUNCHES_MOE = (210 + 280 + 105 + 85 + 75) / 5, (70 + 65) / 5  # router, tokens' way, experts; what is not compiled
LAUNCHES_DENSE = 50 / 5, 0  # a dense block's MLP
LAUNCHES_HOOK = 173 / 126  # a parameter's gradient into its bucket
LAUNCHES_STEP = 144 / 126  # a parameter, once a step: norm and optimizer

# Bytes touched in bf16 outside products and attention, by a token, block and channel, counted likewise at 64 images and
# EP 1. Eager it is 291 for DiffMoE and 1,001 for JiT; compiled 203 for S-E48, 234 and 199.
POINTWISE = 431, 203
POINTWISE_SENT = 2.01 / 0.44  # by a byte of tokens sent to other ranks' experts, sorted and copied on its way, at EP 8


@dataclass(frozen=True)
class Plan:
    """One rank's share, in bytes; ``sends`` by kind of collective, each step."""

    weights: int  # that compute
    gradients: int  # sums of them: in the weights' precision or float32 (sums_in_fp32)
    master: int  # float32 master weights
    state: int  # both moments and the EMA(s), float32
    activations: dict[str, float]  # by activation_checkpointing mode
    sends: dict[str, float]
    flops: float  # of one image, forward and backward
    attention: float  # of these, attention's
    touched: dict[str, float]  # read and written each step, by part: products, attention, pointwise, optimizer
    images: int  # a step, on this rank
    launches: float  # kernels a step
    waits: int  # of the host for the GPU, each step
    overlapped: frozenset[str]  # kinds of collective that travel during arithmetic

    def total(self, mode: str) -> float:
        """Bytes needed on the GPU."""
        return self.weights + self.gradients + self.master + self.state + self.activations[mode] + RESERVED


def make_plan(
    recipe: Recipe, parallelism: Parallelism, bf16: bool = True, kept: dict[str, float] | None = None
) -> Plan:
    """Work out a rank's share.

    Args:
        recipe: the experiment.
        parallelism: from load_parallelism, for the number of GPUs in question.
        bf16: weights that compute are bf16, as on GPUs; else float32 as on CPUs.
        kept: activations of an image, from :func:`measure_activations`; without it the plan leaves them out.
    """
    parallelism = parallelism.in_precision(bf16)
    model = build_model(recipe, device="meta")
    expert_layers = [m.experts for m in model.modules() if isinstance(m, MoE)]
    experts = {id(p) for layer in expert_layers for p in layer.parameters()}
    world = parallelism.world_size
    ep = parallelism.ep_size
    dense_sizes = [p.numel() for p in model.parameters() if id(p) not in experts]
    expert_sizes = [p.numel() // ep for p in model.parameters() if id(p) in experts]
    size = 2 if bf16 else 4
    gradient_size = 4 if sums_in_fp32(recipe, parallelism, bf16) else 2
    stage = parallelism.zero_stage
    groups = [(dense_sizes, world)] + [(group, world // ep) for group in _split(expert_sizes)]
    local = sum(dense_sizes) + sum(expert_sizes)
    if stage == 3:
        parts = sum(-(-n // ranks) for sizes, ranks in groups for n in sizes)
        weights = parts
        gradients = parts
        masters = parts
    else:
        parts = sum(_padded(sum(sizes), ALIGNMENT * ranks) // ranks for sizes, ranks in groups)
        weights = local
        masters = parts if stage else local
        apart = gradient_size > size  # float32 sums beside bf16 gradients: in flat tensors, padded as the weights'
        if stage == 2:
            gradients = parts if apart else max(_touched(groups, rank, world) for rank in range(world))
        else:
            gradients = sum(_padded(sum(sizes), ALIGNMENT * ranks) for sizes, ranks in groups) if apart else local
    states = len(optimizer_kind(recipe.optimizer.name).state) + len(recipe.ema.decays)
    kept = kept or dict.fromkeys(MODES, 0.0)
    images = parallelism.micro_batch_size * parallelism.accumulation
    sends = _traffic(recipe, parallelism, sum(dense_sizes), sum(expert_sizes), size, gradient_size)
    touched = {
        "products": size * (images * _operands(recipe, model) + 3 * parallelism.accumulation * local),
        # forward q, k, v and the result; backward these, the result's gradient and three more
        "attention": size * images * 12.0 * recipe.model.tokens * recipe.model.hidden_size * recipe.model.depth,
        "pointwise": _pointwise(recipe, parallelism, size) + POINTWISE_SENT * sends["all-to-all"],
        "optimizer": _optimizer_bytes(recipe, parallelism, local, masters, size, gradient_size),
    }
    exchanges = len(expert_layers) if ep > 1 else 0  # each waits for the sizes of what it receives
    return Plan(
        weights=weights * size,
        gradients=gradients * gradient_size,
        master=masters * 4 if stage else 0,
        state=masters * 4 * states,
        activations={mode: n * parallelism.micro_batch_size * size / 4 for mode, n in kept.items()},
        sends=sends,
        flops=training_flops(recipe, model),
        attention=_attention_flops(recipe),
        touched=touched,
        images=images,
        launches=launches(recipe, model, parallelism.accumulation, parallelism.zero_stage),
        waits=parallelism.accumulation * exchanges,
        overlapped=_overlapped(parallelism),
    )


def _overlapped(parallelism: Parallelism) -> frozenset[str]:
    """Gradients travel during the backward pass where overlap_comm says so; ZeRO 3 also fetches weights ahead of use.

    Under ZeRO 1 and 2 the weights are gathered after the optimizer, when there is nothing to compute meanwhile.
    """
    stage = parallelism.zero_stage
    overlap = parallelism.json.get("zero_optimization", {}).get("overlap_comm", stage == 3)
    kinds = {"all-reduce", "reduce-scatter"} if overlap else set()
    return frozenset(kinds | ({"all-gather"} if stage == 3 else set()))


def launches(recipe: Recipe, model: torch.nn.Module, accumulation: int, zero_stage: int) -> float:
    """Kernels that a step launches, by the counts above; without recomputing, which launches a forward pass again."""
    depth = recipe.model.depth
    moe = sum(isinstance(module, Experts) for module in model.modules())
    parameters = len(list(model.parameters()))
    form = int(recipe.compiled("cuda", zero_stage) == "blocks")
    blocks = LAUNCHES_BLOCK[form] * depth + LAUNCHES_MOE[form] * moe + LAUNCHES_DENSE[form] * (depth - moe)
    micro_batch = LAUNCHES_DRAWS[form] + blocks + LAUNCHES_HOOK * parameters
    return accumulation * micro_batch + LAUNCHES_STEP * parameters


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _touched(groups: list[tuple[list[int], int]], rank: int, world: int) -> int:
    """Elements of the weights that a rank's shares touch: ZeRO 2 keeps the whole gradient of one that it cuts."""
    touched = 0
    for sizes, ranks in groups:
        share = _padded(sum(sizes), ALIGNMENT * ranks) // ranks
        first = share * (rank * ranks // world)
        start = 0
        for n in sizes:
            touched += n if start < first + share and first < start + n else 0
            start += n
    return touched


def _split(sizes: list[int]) -> list[list[int]]:
    """Expert weights in the groups that DeepSpeed makes of them."""
    groups: list[list[int]] = []
    for n in sizes:
        if groups and sum(groups[-1]) + n <= MAX_GROUP:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def training_flops(recipe: Recipe, model: torch.nn.Module) -> float:
    """Floating-point operations to train on one image: 6 a weight and row that it meets, and attention's."""
    return _attention_flops(recipe) + sum(
        6.0 * weight.numel() * share * rows for _, weight, share, rows in _weights(recipe, model)
    )


def _attention_flops(recipe: Recipe) -> float:
    """Of one image: 12 T^2 D a block."""
    return 12.0 * recipe.model.tokens**2 * recipe.model.hidden_size * recipe.model.depth


def _operands(recipe: Recipe, model: torch.nn.Module) -> float:
    """Numbers of one image, beside weights, that products with weights read and write: for outputs and both gradients.

    Narrow layers' products take as long to fetch their rows as to multiply them, so the two times are added.
    """
    numbers = 0.0
    for name, weight, share, rows in _weights(recipe, model):
        met = 1.0
        if ".experts." in name:  # a stack, of which a row meets some
            met = share * len(weight)
            weight = weight[0]
        if weight.ndim in (2, 4):  # no biases and positions
            numbers += 3 * rows * met * sum(weight.flatten(1).shape)
    return numbers


def _pointwise(recipe: Recipe, parallelism: Parallelism, size: int) -> float:
    """Bytes a step that the network touches outside products and attention."""
    images = parallelism.micro_batch_size * parallelism.accumulation
    form = int(recipe.compiled("cuda", parallelism.zero_stage) == "blocks")
    return POINTWISE[form] * size / 2 * images * recipe.model.tokens * recipe.model.depth * recipe.model.hidden_size


def _optimizer_bytes(
    recipe: Recipe, parallelism: Parallelism, local: int, owned: int, size: int, gradient_size: int
) -> float:
    """Bytes a step that gradients' way to the optimizer, the optimizer and the averages touch.

    Read off DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py; ZeRO 3 and BF16_Optimizer do about as much. A parameter of
    one bf16 rank: gradient to a bucket 4, divided 4; then, of what the rank owns, taken from the bucket 4, norm 2,
    flattened 4, to float32 6, AdamW 28, average 12, to bf16 6.

    Args:
        local: numbers in the rank's weights; the gradient of each passes through the bucket.
        owned: of these, what ZeRO leaves the rank to step.
        size: bytes of a weight that computes.
        gradient_size: bytes of a number in sums of gradients.
    """
    stage = parallelism.zero_stage
    apart = gradient_size > size  # float32 sums of bf16 gradients
    copy = 2 * gradient_size  # read and written
    # To a bucket and divided; between ranks also made one tensor. One rank without ZeRO steps gradients where they are.
    passes = 3 if parallelism.world_size > 1 else 2 if stage else 0
    bucket = passes * copy * local
    if stage:
        bucket += (copy + gradient_size * apart) * owned  # taken from the bucket, or added to the sums
    reduces = 1 if stage < 2 else parallelism.accumulation
    sums = parallelism.accumulation * (size + copy) * local if apart else 0
    states = len(optimizer_kind(recipe.optimizer.name).state)
    step = gradient_size + 4 * (3 + 2 * states) + 12 * len(recipe.ema.decays)  # norm; gradient, weight, state; averages
    if recipe.optimizer.clip_grad_norm:
        step += 8
    if stage:
        step += 4 + size  # to the weights that compute
        if gradient_size == 2:
            step += copy + 6  # flattened, and to float32
    return reduces * bucket + sums + step * owned


def parameters(recipe: Recipe) -> tuple[int, int]:
    """Of the network: in all, and those that a token meets."""
    found = [(weight.numel(), share) for _, weight, share, _ in _weights(recipe, build_model(recipe, device="meta"))]
    return sum(count for count, _ in found), round(sum(count * share for count, share in found))


def _weights(recipe: Recipe, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, float, int]]:
    """A network's weights by name, the share of each that a row meets, and an image's rows."""
    moe = getattr(recipe.model, "moe", None)
    for name, weight in model.named_parameters():
        share = 1.0
        if ".experts." in name and moe is not None:
            share = (getattr(moe, "top_k", None) or moe.capacity) / moe.num_experts
        # Conditioning is computed once a sample, the rest once a token.
        per_sample = "adaLN" in name or "c_embedder" in name
        yield name, weight, share, 1 if per_sample else recipe.model.tokens


def most_images_per_second(recipe: Recipe, device_type: str) -> float:
    """More than a rank trains on: half of an H100's bf16 peak ("cuda"), or a teraflop a second ("cpu")."""
    rate = GPUS["h100-80g"].flops / 2 if device_type == "cuda" else 1e12
    return rate / training_flops(recipe, build_model(recipe, device="meta"))


def measure_activations(recipe: Recipe) -> dict[str, float]:
    """Bytes that autograd keeps for one image in float32, by activation checkpointing mode.

    Two depths of the network run on the CPU; what a pair of blocks keeps is extended to the recipe's depth. To the
    modes that recompute, one block's activations are added, which the backward pass brings back.
    """
    two = _kept_bytes(recipe, 2)
    four = _kept_bytes(recipe, 4)
    pairs = (recipe.model.depth - 2) / 2
    block = (four["none"] - two["none"]) / 2
    return {mode: two[mode] + (four[mode] - two[mode]) * pairs + (block if mode != "none" else 0) for mode in MODES}


def _kept_bytes(recipe: Recipe, depth: int) -> dict[str, int]:
    changes: dict[str, Any] = {"depth": depth}
    if hasattr(recipe.model, "in_context_start"):
        changes["in_context_start"] = 0  # every block sees the class tokens, as most of the real depth does
    small = replace(recipe, model=replace(recipe.model, **changes))
    model = build_model(small, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)  # memory that is never written costs nothing
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = "grouped"  # as GPUs compute; what CPUs do keeps less
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    x = torch.randn(1, recipe.model.in_channels, recipe.model.input_size, recipe.model.input_size)
    result = {}
    for mode in MODES:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        parts = apply_activation_checkpointing(model, mode)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x, torch.tensor([0.5]), torch.tensor([0]))
        result[mode] = sum(kept.values())
        del output
        for part in parts:
            del part.forward
    return result


def _traffic(
    recipe: Recipe, parallelism: Parallelism, dense: int, experts: int, size: int, gradient_size: int
) -> dict[str, float]:
    """Bytes that a rank sends each step; the sizes are bytes of a number: of weights and tokens, and of gradients."""
    world = parallelism.world_size
    ep = parallelism.ep_size
    images = parallelism.micro_batch_size * parallelism.accumulation
    moe = recipe.token_choice
    layers = recipe.model.depth // 2
    rows = images * recipe.model.tokens * (moe.top_k if moe is not None else 0)
    # Tokens go out and come back, in the forward and in the backward pass.
    all_to_all = 4.0 * layers * rows * recipe.model.hidden_size * size * (ep - 1) / ep
    share = dense * (world - 1) / world + experts * (1 - ep / world)
    stage = parallelism.zero_stage
    reduces = 1 if stage < 2 else parallelism.accumulation
    if stage == 3:
        gradients = {"reduce-scatter": share * gradient_size * reduces}
    else:  # also where reduce_scatter is true: DeepSpeed 0.19.8 all-reduces under ZeRO 1 and 2, twice the bytes
        gradients = {"all-reduce": 2 * share * gradient_size * reduces}
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * parallelism.accumulation}[stage]
    return {"all-to-all": all_to_all, **gradients, "all-gather": share * size * gathers}


def step_seconds(plan: Plan, gpu: str, parallelism: Parallelism) -> dict[str, float]:
    """An estimate of a step's time, and of its parts: without recomputing, reading data, looks and saves.

    Returns:
        Seconds of the GPU's work: "products", "attention", "pointwise" (all else of the network) and "optimizer" (with
        gradients on their way there and averages); "launches" of all kernels by the host, which run beside that work;
        "waits" of the host; "overlapped", traffic beside the network, and "traffic" that is waited for; and "step", the
        whole.
    """
    card = GPUS[gpu]
    flops = {"products": plan.flops - plan.attention, "attention": plan.attention}
    parts = {
        part: plan.images * flops.get(part, 0) / (card.flops * ARITHMETIC) + size / (card.bandwidth * COPIES)
        for part, size in plan.touched.items()
    }
    network = parts["products"] + parts["attention"] + parts["pointwise"]

    def seconds(kind: str) -> float:
        ranks = parallelism.ep_size if kind == "all-to-all" else parallelism.world_size
        return plan.sends[kind] / (card.nvlink if ranks <= NODE else NETWORK)

    parts["launches"] = plan.launches * LAUNCH
    parts["waits"] = plan.waits * WAIT
    parts["overlapped"] = sum(seconds(kind) for kind in plan.sends if kind in plan.overlapped)
    parts["traffic"] = sum(seconds(kind) for kind in plan.sends if kind not in plan.overlapped)
    work = max(network, parts["overlapped"]) + parts["optimizer"]
    return parts | {"step": max(work, parts["launches"]) + parts["waits"] + parts["traffic"]}


def images_per_second(plan: Plan, gpu: str, parallelism: Parallelism) -> float:
    """An estimate of what all GPUs together should reach (:func:`step_seconds`)."""
    return plan.images * parallelism.world_size / step_seconds(plan, gpu, parallelism)["step"]


def best_mode(plan: Plan, gpu: str) -> str | None:
    """The cheapest activation checkpointing mode that fits, or None."""
    return next((mode for mode in MODES if plan.total(mode) <= GPUS[gpu].memory), None)
