"""The kernels: plain torch against float64, and in graphs."""

import importlib
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kernels import check_all
from moe_dit import kernels
from moe_dit.kernels import combine, cpu, dispatch, places, regroup, swiglu, ungroup
from moe_dit.kernels.linear import linear


def test_plain_torch_against_float64():
    assert check_all("cpu") == 32


def chain(x, weights, factor):
    """All that a graph may hold of the kernels, one after another; tokens [3, 4] to the same."""
    experts_TK = torch.tensor([[1, 0], [2, 1], [0, 2]])
    order_N, place_TK = places(experts_TK)
    counts_SE = torch.tensor([[1, 0, 2], [2, 1, 0]])
    rows = regroup(dispatch(x, order_N, place_TK), counts_SE)
    return linear(combine(ungroup(swiglu(rows, rows * rows), counts_SE), place_TK, weights), factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_are_whole_and_give_the_gradients(dtype):
    """On torch 2.11 too (tests/run.sh --long), whose graphs lose gradients where a forward pass returns an alias."""
    generator = torch.Generator().manual_seed(0)
    x, factor = (torch.randn(n, 4, generator=generator).to(dtype).requires_grad_() for n in (3, 5))
    weights = torch.rand(3, 2, generator=generator).requires_grad_()
    torch._dynamo.reset()
    results = []
    for function in (chain, torch.compile(chain, fullgraph=True, backend="aot_eager")):
        out = function(x, weights, factor)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, weights, factor))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)
    if dtype == torch.float32:  # bf16's rounding is tests/kernels.py's
        plain = (F.silu(x.double()) * x.double().square() * weights.double().sum(1, keepdim=True)) @ factor.double().T
        truth = plain, *torch.autograd.grad(plain.square().sum(), (x, weights, factor))
        for eager, want in zip(results[0], truth, strict=True):
            torch.testing.assert_close(eager, want.float())


class Calls(TorchFunctionMode):
    """Notes the tensors that torch's calls give, each call being a value of its own to Dynamo."""

    def __init__(self):
        super().__init__()
        self.values = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.values += [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_forward_pass_returns_an_alias(dtype):
    """What Dynamo 2.11 loses gradients by, whatever torch is here: a result that is another value, or a part of it."""
    rows, order, place = torch.randn(6, 4).to(dtype), torch.tensor([1, 0, 2, 3, 5, 4]), torch.arange(6).view(3, 2)
    arguments = {
        "_Dispatch": [(rows[:3], order, place)],
        "_Combine": [(rows, place, torch.rand(3, 2))],
        "_Regroup": [(rows, torch.tensor([[1, 0, 2], [2, 1, 0]]), back) for back in (False, True)],
        "_SwiGLU": [(rows, rows + 1)],
        "_Linear": [(rows.float(), torch.randn(5, 4), None)],
    }
    modules = [importlib.import_module(f"moe_dit.kernels.{module.name}") for module in iter_modules(kernels.__path__)]
    functions = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function)
    }
    del functions["_Loop"]  # works in place, and is never part of a graph:
    assert cpu.expert_rows._torchdynamo_disable and cpu.expert_tokens._torchdynamo_disable
    assert functions.keys() == arguments.keys()
    for name, function in functions.items():
        for given in arguments[name]:
            ctx = SimpleNamespace(save_for_backward=lambda *tensors: None)
            with torch.no_grad(), Calls() as calls:
                out = function.forward(ctx, *given)
            tensors = [*calls.values, *(value for value in given if isinstance(value, torch.Tensor))]
            storage = out.untyped_storage().data_ptr()
            assert sum(value.untyped_storage().data_ptr() == storage for value in tensors) == 1, name
