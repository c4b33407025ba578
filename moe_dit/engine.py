"""The engine: a recipe's network under DeepSpeed, in the recipe's precision, with its training state laid open.

Everything that knows of ZeRO stands here. State leaves and enters as pieces: contiguous slices of flattened logical
tensors, whatever the topology (see :class:`Piece`).
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moe_dit.runtime import ranks

if not torch.cuda.is_available():
    # DeepSpeed would guess from installed packages; a machine without a GPU trains on CPU ranks over gloo.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from moe_dit.build import build_model
from moe_dit.ema import EMA
from moe_dit.flow import build_flow
from moe_dit.kernels.linear import use_onednn
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.dropout import dropouts, set_dropout_draws
from moe_dit.models.initialization import initialize
from moe_dit.optimizer import optimizer_kind, prepare_state, set_step
from moe_dit.parallel.compile import compile_blocks, compile_dense_parts
from moe_dit.parallel.deepspeed_config import Parallelism, for_deepspeed
from moe_dit.parallel.expert_layers import apply_expert_parallelism, moe_layers
from moe_dit.parallel.recompute import apply_activation_checkpointing
from moe_dit.recipe import Recipe
from moe_dit.runtime.errors import InputError
from moe_dit.schedule import learning_rate

# Every run would start with a page of DeepSpeed's notes on our choosing our own optimizer and parallelism; and 0.19.8
# calls collectives by names that torch 2.14 deprecates.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`torch.distributed.*deprecated", category=FutureWarning)
# And its optimizer for ZeRO 1 with float32 gradients prints the memory in use at every group of weights, unasked.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None


def _mask_not_finite(norm: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    """DeepSpeed's function of the same purpose, without its wait.

    In 0.19.8 it makes a tensor of -1 on the GPU for each group of weights, a copy that the host waits for; a number
    goes with the kernel.
    """
    norm.masked_fill_(norm.isinf().logical_or_(norm.isnan()), val)


for module in (deepspeed.runtime.utils, deepspeed.runtime.zero.stage_1_and_2, deepspeed.runtime.zero.stage3):
    assert callable(module.mask_nan_or_inf_with_val_inplace)
    module.mask_nan_or_inf_with_val_inplace = _mask_not_finite
# Where ZeRO 1 and 2 clip, and in float32, 0.19.8 waits for the norm to see whether it is a number. The norm is infinite
# where it is none (combine_grad_norm_groups), which clips to the same; and a run whose norm is not finite ends
# (train.py), as it does in bf16, where DeepSpeed does not look.
assert callable(deepspeed.runtime.zero.stage_1_and_2.is_invalid_grad_norm)
deepspeed.runtime.zero.stage_1_and_2.is_invalid_grad_norm = lambda norm: False


def start_ranks() -> None:
    """Join the ranks through DeepSpeed (NCCL on GPUs, gloo on CPUs); every process group hangs off this."""
    # DeepSpeed 0.19.8 compiles a shared-memory op for CPU inference whenever it starts on CPUs: 20 s of a compiler
    # that a machine may lack, for a collective that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.start(alone=True)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@dataclass(frozen=True)
class Piece:
    """A contiguous slice of one weight's training state that this rank holds.

    Attributes:
        name: the weight's logical name, as in the plain model.
        numel: elements of the whole logical weight.
        start: where the slice begins in it, flattened.
        tensors: float32 views [n] by kind: "weight" (the master copy), "exp_avg", "exp_avg_sq", "ema" and, where the
            recipe has a second average, "ema2". The keys between are the optimizer's.
    """

    name: str
    numel: int
    start: int
    tensors: dict[str, torch.Tensor]


class Engine:
    """A network in training.

    Args:
        recipe: what to train.
        parallelism: how; its world size is the number of ranks that have joined.
        device: where this rank computes.
    """

    loss_names: list[str]  # of train_step's "terms", from the first step on

    def __init__(self, recipe: Recipe, parallelism: Parallelism, device: torch.device):
        self.recipe = recipe
        self.device = device
        self.flow = build_flow(recipe)
        self.bf16 = recipe.in_bf16(device.type)
        self.parallelism = parallelism = parallelism.in_precision(self.bf16)
        if self.bf16 and parallelism.zero_stage == 0:
            raise InputError(
                f"{parallelism.file}: ZeRO 0 trains in float32 only here; use zero_optimization.stage 1, which "
                f"computes the same with less memory, or --set precision=fp32"
            )
        model = build_model(recipe, device="meta")
        apply_expert_parallelism(model, parallelism.ep_size, parallelism.exchange(recipe, self.bf16))
        initialize(model, recipe.seed, device)
        compiled = recipe.compiled(device.type, parallelism.zero_stage)
        if compiled != "none" and parallelism.zero_stage == 3:
            raise InputError(
                f"{parallelism.file}: ZeRO 3 gathers weights in hooks that compile: {compiled} cannot keep"
            )
        if compiled == "dense":
            compile_dense_parts(model)
        elif compiled == "blocks":
            compile_blocks(model, whole=recipe.activation_checkpointing != "experts")
            self.flow.compile()
        elif device.type == "cpu":
            use_onednn(model)
        apply_activation_checkpointing(model, recipe.activation_checkpointing)
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        kind = optimizer_kind(recipe.optimizer.name)

        def make_optimizer(parameters):
            parameters = list(parameters)
            groups = split_params_into_different_moe_groups_for_optimizer({"params": parameters, "name": "weights"})
            return kind.build([group for group in groups if group["params"]], recipe.optimizer)

        config = for_deepspeed(parallelism, recipe, self.bf16)
        self.deepspeed_engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer, config=config)
        if parallelism.world_size == 1 and parallelism.zero_stage == 0:
            # DeepSpeed 0.19.8 would flatten and copy back gradients that nobody is to get.
            self.deepspeed_engine.enable_backward_allreduce = False
        # DeepSpeed casts buffers with the weights, but rotary tables and balance biases are float32 quantities.
        for name, buffer in buffers.items():
            module, _, key = name.rpartition(".")
            self.model.get_submodule(module)._buffers[key] = buffer.to(device)
        self.layers = moe_layers(self.model)
        self.thresholds = [m.expert_threshold for m in self.model.modules() if isinstance(m, ExpertChoiceMoE)]
        self._dropouts = dropouts(self.model)
        self._zero = self.deepspeed_engine.optimizer
        self._optimizer: torch.optim.Optimizer = getattr(self._zero, "optimizer", self._zero)
        self._state_keys = kind.state
        masters = self._flat_weights()
        prepare_state(self._optimizer, kind, masters)
        self.ema = EMA(masters, recipe.ema.decays)
        self._state_of = self._state_by_flat_weight()
        self._gradient_norm: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._mark: Callable[[str], None] | None = None

    @property
    def model(self) -> torch.nn.Module:
        """The network inside DeepSpeed's engine."""
        return self.deepspeed_engine.module

    def close(self) -> None:
        """Train no more: what it holds is freed with the last reference, but under ZeRO 3.

        DeepSpeed 0.19.8 frees nothing otherwise: hooks of gradients hold the weights, and so the hooks.
        """
        self.deepspeed_engine.destroy()

    def measure(self, mark: Callable[[str], None]) -> None:
        """Have ``mark`` called at moments of each step (:class:`moe_dit.times.StepTimes` has their names)."""
        self._mark = mark
        for layer in self.layers:
            layer.mark = mark

    def learning_rate(self, step: int) -> float:
        """The rate of step ``step``, counted from 0."""
        return learning_rate(self.recipe.optimizer, step, self.recipe.steps)

    def train_step(
        self,
        step: int,
        micro_batches: list[dict[str, torch.Tensor]],
        stop: bool = False,
        times: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One optimizer step over this rank's share of a global batch.

        Args:
            step: counted from 0.
            micro_batches: ``parallelism.accumulation`` batches of x, y, noise, u and position (data.training_inputs).
            stop: this rank was told to stop; the result tells every rank.
            times: float32 [ranks, numbers] on the device, zeros but for this rank's row; all ranks give them or none.

        Returns:
            On the device, alike on all ranks: "terms" [n], means over the global batch of the loss and, where it is a
            sum, of its parts (:attr:`loss_names` names them); "stop", the number of ranks that were told to stop;
            "load" [layers, experts], tokens by expert (no layers in a network without token choice); where there were
            times, "times", of all ranks.
        """
        if self._mark is not None:
            self._mark("begins")
        for group in self._zero.param_groups:
            group["lr"] = self.learning_rate(step)
        parallelism = self.parallelism
        parts = []
        thresholds = [torch.stack(self.thresholds)] if self.thresholds else []
        for batch in micro_batches:
            if len(thresholds) > 1:  # every micro-batch moves them from where the step began
                torch._foreach_copy_(self.thresholds, list(thresholds[0]))
            set_dropout_draws(self._dropouts, self.recipe.seed, batch["position"])
            t = self.flow.times(batch["u"])
            losses = self.flow.loss(self.deepspeed_engine, batch["x"], batch["y"], noise=batch["noise"], t=t)
            if self._mark is not None:
                self._mark("forward")
            self.loss_names = list(losses)
            self.deepspeed_engine.backward(losses["loss"])
            if parallelism.zero_stage == 0 and self.deepspeed_engine.is_gradient_accumulation_boundary():
                self._clip_without_zero()
            if self.deepspeed_engine.is_gradient_accumulation_boundary():
                self.before_change()
            self.deepspeed_engine.step()
            parts.append(torch.stack([loss.detach() for loss in losses.values()]))
            if thresholds:
                thresholds.append(torch.stack(self.thresholds))
        if self.deepspeed_engine.was_step_applied():
            self.ema.update()
        loads = [layer.tokens_per_expert for layer in self.layers]
        terms = sum(parts[1:], parts[0])
        # Last: what stands before is summed as without them, but that a ring of many ranks may begin elsewhere, which
        # the last bit of a reported loss can show; training does not see it.
        extra = [] if times is None else [times.flatten()]
        report = torch.cat([terms, terms.new_full((1,), float(stop)), *loads, *extra])
        deepspeed.comm.all_reduce(report)
        for load in loads:
            load.zero_()
        n = len(terms)
        report[:n] /= len(micro_batches) * parallelism.world_size
        tokens = sum(len(load) for load in loads)
        load = report[n + 1 : n + 1 + tokens].view(len(loads), tokens // max(1, len(loads)))
        if thresholds:
            self._settle_thresholds(thresholds[1:])
        if self.recipe.balance.rate:
            self._balance(load)
        result = {"terms": report[:n], "stop": report[n], "load": load}
        return result if times is None else result | {"times": report[n + 1 + tokens :].view_as(times)}

    def _settle_thresholds(self, moved: list[torch.Tensor]) -> None:
        """Go on with the mean of the thresholds [layers, experts] that each micro-batch of each rank left.

        So published code does with its ranks, which see different tokens; here micro-batches are no different.
        """
        mean = sum(moved[1:], moved[0])
        deepspeed.comm.all_reduce(mean)
        mean /= len(moved) * self.parallelism.world_size
        torch._foreach_copy_(self.thresholds, list(mean))

    def _balance(self, load: torch.Tensor) -> None:
        """DeepSeek-V3's bias update (arXiv:2412.19437, eq. 16): towards experts that got fewer tokens than the mean."""
        for layer, tokens in zip(self.layers, load, strict=True):
            bias = layer.router.e_score_correction_bias
            bias += self.recipe.balance.rate * torch.sign(tokens.mean() - tokens)

    @torch.no_grad()
    def _clip_without_zero(self) -> None:
        """Clip by the norm over dense and expert gradients together, where ZeRO does not.

        DeepSpeed 0.19.8 averages the ranks' norms instead, each over the rank's own experts, which is another number
        for every degree of expert parallelism.
        """
        dense: list[torch.Tensor] = []
        experts: list[torch.Tensor] = []
        for weight in self.model.parameters():
            if weight.grad is not None:
                (experts if hasattr(weight, "first_expert") else dense).append(weight.grad)
        squares = torch.stack(torch._foreach_norm(experts)).square().sum() if experts else dense[0].new_zeros(())
        if experts:
            deepspeed.comm.all_reduce(squares, group=self.layers[0].ep_group)
        norm = (torch.stack(torch._foreach_norm(dense)).square().sum() + squares).sqrt()
        limit = self.recipe.optimizer.clip_grad_norm
        if limit:
            torch._foreach_mul_(dense + experts, (limit / (norm + 1e-6)).clamp(max=1.0))
        self._gradient_norm = norm

    def gradient_norm(self) -> float | torch.Tensor:
        """Norm of the last step's gradient over all weights, before clipping."""
        norm = self._gradient_norm if self.parallelism.zero_stage == 0 else self.deepspeed_engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def bytes_held(self) -> dict[str, int]:
        """What this rank holds: bytes of "weights" (that compute), "master" weights and optimizer "state"."""
        weights = sum(
            getattr(weight, "ds_tensor", weight).numel() * weight.element_size() for weight in self.model.parameters()
        )
        flat = self._flat_weights()
        master = 0 if self.parallelism.zero_stage == 0 else sum(w.numel() * w.element_size() for w in flat)
        kept = len(self._state_keys) + len(self.ema.averages)
        state = sum(w.numel() * 4 * kept for w in flat)
        return {"weights": weights, "master": master, "state": state}

    def bytes_held_by_rank(self) -> list[dict[str, int]]:
        """What each rank holds (a collective)."""
        held: list[Any] = [None] * self.parallelism.world_size
        torch.distributed.all_gather_object(held, self.bytes_held())
        return held

    def set_step(self, step: int) -> None:
        """Say how many steps the loaded state has seen, and renew what is derived from the master weights."""
        set_step(self._optimizer, step)
        self._copy_master_to_model()

    @contextmanager
    def averaged_weights(self, name: str = "ema") -> Iterator[Any]:
        """Compute with an average of the weights, in eval mode, for the length of the block; gives the network to call.

        All ranks enter and leave together, and inside all call the network equally often. Afterwards everything is as
        before, to the last bit.
        """
        masters = [weight.detach() for weight in self.ema.weights]
        kept = [weight.clone() for weight in masters]
        counters = [(layer.tokens_per_expert, layer.tokens_per_expert.clone()) for layer in self.layers]
        self.before_change()
        with torch.no_grad():
            torch._foreach_copy_(masters, self.ema.averages[name])
            self._copy_master_to_model()
        self.deepspeed_engine.eval()
        try:
            yield self.deepspeed_engine
        finally:
            self.deepspeed_engine.train()
            with torch.no_grad():
                torch._foreach_copy_(masters, kept)
                self._copy_master_to_model()
                for counter, value in counters:
                    counter.copy_(value)

    def keep_until(self, copied: torch.cuda.Event) -> None:
        """Leave the tensors of :meth:`pieces` as they are until this has happened on the GPU: a save copies them."""
        self._copied = copied

    def before_change(self) -> None:
        """What the GPU is told from here on, and may change them, it does when a save has copied them."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers (balance biases), alike on all ranks, by logical name."""
        weights = {name for name, _ in self.model.named_parameters()}
        return {name: value for name, value in self.model.state_dict().items() if name not in weights}

    def pieces(self, owned_only: bool = False) -> Iterator[Piece]:
        """This rank's pieces of the training state.

        Args:
            owned_only: leave out what another rank holds too (only without ZeRO), so that all ranks' pieces together
                are the whole, once.
        """
        for name, weight in self.model.named_parameters():
            expert_start = getattr(weight, "first_expert", None)
            shape = getattr(weight, "ds_shape", weight.shape)
            local = shape.numel()
            if expert_start is None:
                numel = local
                offset = 0
            else:
                numel = local * self.parallelism.ep_size
                offset = expert_start * (local // shape[0])
            for start, tensors in self._local_slices(weight, owned_only):
                yield Piece(name, numel, offset + start, tensors)

    def _flat_weights(self) -> list[torch.Tensor]:
        """The float32 tensors that the optimizer steps: flat slices under ZeRO, else the weights themselves."""
        for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO 1 and 2; 3
            if hasattr(self._zero, attribute):
                return list(getattr(self._zero, attribute))
        if hasattr(self._zero, "fp32_groups_flat_partition"):  # ZeRO 1 where gradients of bf16 weights are float32
            return list(self._zero.fp32_groups_flat_partition)
        return [weight for group in self._optimizer.param_groups for weight in group["params"]]

    def _state_by_flat_weight(self) -> dict[int, dict[str, torch.Tensor]]:
        """All that training keeps of each flat weight, by its id: itself, the optimizer's state, the averages."""
        return {
            id(flat): {
                "weight": flat.detach(),
                **{key: self._optimizer.state[flat][key] for key in self._state_keys},
                **{name: averages[i] for name, averages in self.ema.averages.items()},
            }
            for i, flat in enumerate(self.ema.weights)
        }

    def _local_slices(self, weight: Any, owned_only: bool) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Where in a rank's own weight the slices begin whose state it holds, and their state."""
        if hasattr(weight, "ds_tensor"):  # ZeRO 3: equal parts of the weight, the last one padded
            part = weight.ds_tensor.numel()
            start = part * torch.distributed.get_rank(weight.ds_process_group)
            n = min(part, weight.ds_numel - start)
            if n > 0:
                group, first, _ = self._zero.grad_position[self._zero.get_param_id(weight)]
                state = self._state_of[id(self._zero.fp32_partitioned_groups_flat[group])]
                yield start, {kind: tensor.narrow(0, first, n) for kind, tensor in state.items()}
        elif hasattr(weight, "_hp_mapping"):  # ZeRO 1 and 2: parts of a flat tensor of many weights
            mapping = weight._hp_mapping
            if mapping is not None:
                # Our own table rather than DeepSpeed's linked fragments: 0.19.8 links them after the first group's step
                # only, and finds nothing for the other groups.
                in_flat = mapping.hp_fragment_address
                in_weight = mapping.lp_fragment_address
                state = self._state_of[id(self._flat_weights()[mapping.param_group_index])]
                yield (
                    in_weight.start,
                    {kind: tensor.narrow(0, in_flat.start, in_flat.numel) for kind, tensor in state.items()},
                )
        else:  # no ZeRO: every rank of the weight's group holds it all
            group = self._replicas(weight)
            rank = torch.distributed.get_rank(group)
            size = torch.distributed.get_world_size(group)
            n = weight.numel()
            first, last = (n * rank // size, n * (rank + 1) // size) if owned_only else (0, n)
            if last > first:
                state = self._state_of[id(weight)]
                yield first, {kind: tensor.view(-1)[first:last] for kind, tensor in state.items()}

    def _replicas(self, weight: Any) -> Any:
        if hasattr(weight, "first_expert"):
            return deepspeed.utils.groups._get_expert_data_parallel_group(f"ep_size_{self.parallelism.ep_size}")
        return None

    @torch.no_grad()
    def _copy_master_to_model(self) -> None:
        """After the master weights were set from outside, bring the weights that compute in line with them."""
        zero = self._zero
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
            zero.checkpoint_event_prologue()  # releases the small weights that stay whole on every rank ...
            for low, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
                low.copy_(master)
            zero.checkpoint_event_epilogue()  # ... and gathers them anew
        elif hasattr(zero, "update_lp_params"):  # ZeRO 1 and 2
            zero.update_lp_params()
