"""Counts of a training step without a GPU: kernel launches, host synchronisations and bytes touched, by part.

What is counted, and how near it is to a GPU:

- One micro-batch's draws, forward and backward pass run on a CPU, for rank 0 of ``ep_size`` ranks that do not exist,
  with bf16 weights, grouped experts' products and few samples. A rank keeps what it would send, as if every other rank
  sent it just as much. DeepSpeed's own part (gradient hooks, clipping, optimizer, gathering) does not run: its line is
  what was counted once for DSMoE-S under ZeRO 2 with DeepSpeed 0.19.8 (:data:`DEEPSPEED`), the same for all recipes.
- Launches are the aten operations that reach the dispatcher below autograd, in the forward and backward pass and the
  step; views and other operations on shapes, and allocations, are left out. On a GPU most are one kernel each; a sort,
  an accumulating index_put and a large foreach are a few, so sums are somewhat low. A collective is one launch.
- A compiled graph counts the nodes that inductor's scheduler keeps after fusion: fused loops and calls of libraries.
  They are those of a CPU, whose fusions differ from a GPU's here and there.
- Triton kernels (:mod:`moe_dit.kernels`) count as the one launch that they are on a GPU; here their torch twins run.
- Synchronisations are reads of a tensor's value by the host (``_local_scalar_dense``), tensors that are made of the
  host's numbers (``lift_fresh``, of torch.tensor: a copy to a GPU that the host waits for), and the one of an exchange
  between expert-parallel ranks (split sizes).
- Bytes are those of every launch's tensor arguments and results, but of matrix products, convolutions and attention
  (:data:`PRODUCTS`). They are counted at two and four samples and continued linearly to ``samples``.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dit.recipe import Recipe

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward", "scaled_dot_product")
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "alias",
        "set_", "resize_", "_reshape_alias", "is_same_size"}  # fmt: skip
# Counted by hand in DeepSpeed 0.19.8 for S at EP 8 under ZeRO 2, without check_grad_overflow and overlap_comm: hooks of
# gradients 173, the step 144; nothing waits (moe_dit/engine.py has what did). Their bytes were not counted.
DEEPSPEED = (173 + 144, 0)
SMALL = (2, 4)  # samples that are run; costs are linear in them


@dataclass
class Cost:
    """What a part costs in a step.

    Attributes:
        launches: of kernels.
        synchronisations: of the host with the device.
        bytes: read and written outside products and attention.
    """

    launches: float = 0
    synchronisations: float = 0
    bytes: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.launches + other.launches,
            self.synchronisations + other.synchronisations,
            self.bytes + other.bytes,
        )


def count(recipe: Recipe, ep_size: int, zero_stage: int, compiled: bool = True, samples: int = 64) -> dict[str, Cost]:
    """Count one training step of one micro-batch on one of ``ep_size`` ranks.

    Args:
        recipe: what is trained; its micro-batch is taken to be ``samples``.
        ep_size: expert-parallel ranks, which are all ranks there are.
        zero_stage: DeepSpeed's; 0 leaves its line empty, others are taken to be as 2.
        compiled: as GPUs compute it by default, else every operation by itself.
        samples: of a rank's micro-batch.

    Returns:
        What each part costs, and "total".
    """
    small, large = (_count_small(recipe, ep_size, compiled, n) for n in SMALL)
    table = {}
    for part in large:
        one, two = small.get(part, Cost()), large[part]
        slope = (two.bytes - one.bytes) / (SMALL[1] - SMALL[0])
        table[part] = Cost(two.launches, two.synchronisations, one.bytes + slope * (samples - SMALL[0]))
    launches, waits = DEEPSPEED if zero_stage else (0, 0)
    table["DeepSpeed's hooks and step"] = Cost(launches, waits, 0)
    table["total"] = sum(table.values(), Cost())
    return table


class _Counter(TorchDispatchMode):
    """Counts what is dispatched; ``part`` says for what."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.operations: dict[tuple[str, str], int] = defaultdict(int)
        self.stack = ["draws and inputs"]
        self.spans: list[tuple[int, int, str]] = []  # of autograd's sequence numbers, made in the forward pass
        self.hidden = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let graphs that are compiled run inside, and count themselves (:class:`_Backend`)."""
        return True

    @property
    def part(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.stack[-1]
        number = node._sequence_nr()
        inside = [span for span in self.spans if span[0] <= number < span[1]]
        if node.name().startswith("torch::autograd::AccumulateGrad") or not inside:
            return "gradient hooks" if "AccumulateGrad" in node.name() else "objective"
        return min(inside, key=lambda span: span[1] - span[0])[2]

    def add(
        self, launches: float = 0, synchronisations: float = 0, size: float = 0, name: str = "", part: str | None = None
    ) -> None:
        part = part or self.part
        self.costs[part] = self.costs[part] + Cost(launches, synchronisations, size)
        self.operations[part, name] += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.hidden and name in ("_local_scalar_dense", "lift_fresh"):
            self.add(synchronisations=1, name=name)
            return out
        if self.hidden or func.is_view or name in FREE or func.namespace in ("prim", "c10d"):
            return out
        product = any(name.startswith(p) or name.startswith("_" + p) for p in PRODUCTS)
        self.add(1, 0, 0 if product else _bytes((args, kwargs, out)), name)
        return out


class _Backend:
    """Graphs that run as they are, and count what inductor would launch for them."""

    def __init__(self, counter: _Counter):
        self.counter = counter

    def named(self, part: str) -> Callable:
        """A backend of torch.compile that counts for a part."""

        def backend(graph: Any, inputs: Any) -> Any:
            return compile_fx(graph, inputs, inner_compile=partial(self._compile, part))

        return backend

    def _compile(self, part: str, graph: Any, inputs: Any, **options: Any) -> Any:
        found: list[tuple[int, int]] = []

        def look(nodes: list[Any]) -> list[Any]:
            kernels = [node for node in nodes if _launches(node)]
            size = sum(0 if _is_product(node) else node.get_read_write_buffers_sizes() for node in kernels)
            found.append((len(kernels), size))
            raise _Seen

        with torch._inductor.config.patch(_post_fusion_custom_pass=look, force_disable_caches=True):
            try:
                compile_fx_inner(copy.deepcopy(graph), inputs, **options)
            except Exception:
                if not found:
                    raise
        launches, size = found[0] if found else (0, 0)

        def counted(given: list[Any]) -> Any:
            self.counter.add(launches, 0, size, "graph", part)
            with self.counter.uncounted():
                return graph(*given)

        return make_boxed_func(lambda *given: counted(list(given)))


class _Seen(Exception):
    """Ends inductor's work where it has chosen its kernels; no C++ compiler is needed."""


def _launches(node: Any) -> bool:
    """Whether a node of inductor's scheduler starts a kernel."""
    return type(node).__name__ != "NopKernelSchedulerNode" and not isinstance(node.node, ir.MultiOutput)


def _is_product(node: Any) -> bool:
    names = f"{getattr(node.node, 'python_kernel_name', '')} {getattr(node.node, 'op_overload', '')}"
    return type(node).__name__ == "ExternKernelSchedulerNode" and any(p in names for p in (*PRODUCTS, "mkldnn"))


def _parts(model: torch.nn.Module, counter: _Counter) -> None:
    """Tell the counter which part of the network computes."""

    def follow(module: Any, part: str) -> None:
        starts: list[int] = []

        def enter(*_: Any) -> None:
            counter.stack.append(part)
            starts.append(torch.autograd._get_sequence_nr())

        def leave(*_: Any) -> None:
            counter.stack.pop()
            counter.spans.append((starts.pop(), torch.autograd._get_sequence_nr(), part))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    for name, module in model.named_children():
        if name != "blocks":
            follow(module, "embedders and final layer")
    for block in getattr(model, "blocks", []):
        follow(block.adaLN_modulation, "adaLN, norm, residual")
        follow(block, "adaLN, norm, residual")
        follow(block.attn, "attention and rotation")
        follow(block.mlp, "dispatch and combine" if hasattr(block.mlp, "experts") else "dense MLP")
        for name, part in (("experts", "experts"), ("shared_experts", "shared expert")):
            if getattr(block.mlp, name, None) is not None:
                follow(getattr(block.mlp, name), part)
        router = getattr(block.mlp, "router", None)
        if router is not None:  # called by a method that hooks do not see
            follow(router, "router")
            router.route = partial(_as_call, router, type(router).route)


def _compiled_parts(model: torch.nn.Module, counter: _Counter) -> None:
    """As :func:`_parts`, of what is not in a graph."""

    def follow(owner: Any, method: str, part: str) -> None:
        call = getattr(owner, method)

        def followed(*inputs: Any) -> Any:
            counter.stack.append(part)
            start = torch.autograd._get_sequence_nr()
            out = call(*inputs)
            counter.stack.pop()
            counter.spans.append((start, torch.autograd._get_sequence_nr(), part))
            return out

        setattr(owner, method, followed)

    for name in ("x_embedder", "c_embedder"):
        follow(model.get_submodule(name), "forward", "embedders")
    blocks: Any = model.get_submodule("blocks")
    follow(blocks, "modulations", "modulations")
    for block in blocks:
        if hasattr(block.mlp, "exchange"):
            follow(block.mlp, "exchange", "exchange")
        if hasattr(block.mlp, "experts"):
            follow(block.mlp.experts, "forward", "experts")


def _as_call(module: Any, method: Any, *inputs: Any) -> Any:
    """A method of a module between the module's hooks."""
    for hook in module._forward_pre_hooks.values():
        hook(module, inputs)
    out = method(module, *inputs)
    for hook in module._forward_hooks.values():
        hook(module, inputs, out)
    return out


@contextmanager
def _lonely_exchange(counter: _Counter) -> Iterator[None]:
    """Replace what speaks with other ranks, and Triton kernels, by twins that count as they would."""
    from deepspeed.module_inject import auto_ep_layer

    from moe_dit.kernels import rows

    def all_to_all(out: torch.Tensor, rows: torch.Tensor, **_: Any) -> None:
        counter.add(1, 0, 2 * rows.numel() * rows.element_size(), "all_to_all")
        with counter.uncounted():
            out.copy_(rows)

    def plan(*args: Any, **kwargs: Any) -> Any:
        counter.add(0, 1, 0, "split sizes")
        return split_plan(*args, **kwargs)

    def kernel(name: str, *args: Any) -> Any:
        with counter.uncounted():
            out = getattr(rows.Torch, name)(*args)
        counter.add(1, 0, _bytes((args, out)), name)
        return out

    names = [name for name in vars(rows.Torch) if not name.startswith("_")]
    twins = SimpleNamespace(**{name: partial(kernel, name) for name in names})
    chosen = rows._kernels
    split_plan = auto_ep_layer._split_plan_from_expert_counts
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(auto_ep_layer.dist, "all_to_all_single", all_to_all))
        stack.enter_context(mock.patch.object(auto_ep_layer, "_split_plan_from_expert_counts", plan))
        stack.enter_context(
            mock.patch.object(rows, "_kernels", lambda x: chosen(x) if torch.compiler.is_compiling() else twins)
        )
        yield


def _bytes(tree: Any) -> int:
    """Of all tensors in arguments and results, each once."""
    tensors = {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _network(recipe: Recipe, ep_size: int) -> torch.nn.Module:
    """The network of rank 0 of ``ep_size``, in bf16, with experts' products grouped."""
    from moe_dit.build import build_model
    from moe_dit.models.initialization import initialize
    from moe_dit.models.moe import Experts, MoE
    from moe_dit.parallel.expert_layers import ExpertParallelMoE

    model: Any = build_model(recipe, device="meta")
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ExpertParallelMoE(name, layer, ep_size, 0, {}))
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    initialize(model, recipe.seed, torch.device("cpu"))
    model.to(torch.bfloat16)
    for name, buffer in buffers.items():
        module, _, key = name.rpartition(".")
        model.get_submodule(module)._buffers[key] = buffer
    for module in model.modules():
        if isinstance(module, Experts):
            module.implementation = "grouped"
    return model


def _count_small(recipe: Recipe, ep_size: int, compiled: bool, samples: int) -> dict[str, Cost]:
    from moe_dit.data import Latents, training_inputs
    from moe_dit.flow import build_flow

    torch.manual_seed(0)
    model = _network(recipe, ep_size).train()
    counter = _Counter()
    flow = build_flow(recipe)
    pixels = recipe.data.kind == "pixels"
    shape = samples, recipe.model.in_channels * (1 if pixels else 2), *[recipe.model.input_size] * 2
    batch = {
        "x": torch.randint(256, shape, dtype=torch.uint8) if pixels else torch.randn(shape),
        "y": torch.zeros(samples, dtype=torch.int64),
        "position": torch.arange(samples),
    }
    inputs = partial(training_inputs, recipe, batch, Latents(1.0, 0.0, True))
    if compiled:
        from moe_dit.parallel.compile import compile_blocks

        backend = _Backend(counter)
        compile_blocks(model, backend=backend.named("network, compiled"))
        flow.compile(backend=backend.named("objective"))
        inputs = partial(inputs, backend=backend.named("draws and inputs"))

    def micro_batch() -> None:
        given = inputs()
        counter.stack.append("objective")
        start = torch.autograd._get_sequence_nr()
        times = flow.times(given["u"])
        losses = flow.loss(model, given["x"], given["y"], noise=given["noise"], t=times)
        counter.spans.append((start, torch.autograd._get_sequence_nr(), "objective"))
        losses["loss"].backward()
        counter.stack.pop()

    with _lonely_exchange(counter):
        if compiled:
            micro_batch()
            _compiled_parts(model, counter)
            model.zero_grad()  # DeepSpeed takes each gradient away as soon as it is there
            counter.costs.clear()
            counter.operations.clear()
            counter.spans.clear()
        else:
            _parts(model, counter)
        with counter:
            micro_batch()
    return dict(counter.costs)
