"""The kernels: plain torch and, on its interpreter, Triton against float64; and compiled for GPUs that are not here."""

import importlib
import os
import subprocess
import sys
from pkgutil import iter_modules
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from helpers import ENV, ROOT
from helpers.kernels import check_all
from moe_dit import kernels
from moe_dit.kernels import combine, cpu, dispatch, places, regroup, swiglu, ungroup
from moe_dit.kernels.linear import linear


def test_plain_torch_against_float64():
    assert check_all("cpu") == 32


def test_triton_against_float64():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter makes a number of an array of one, as numpy does to 2.3")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = ENV | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "tests/helpers/kernels.py"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "32 cases hold" in done.stdout, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_kernels_compile_for_gpus_that_are_not_here(capability, dtype, top_k, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_dit.kernels import triton_rows

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    row, weight = f"*{dtype}", "*fp32"
    types = {"rows": row, "out": row, "grad": row, "grad_rows": row, "width": "i32"}
    types |= {"weights": weight, "grad_weights": weight, "place": "*i64", "counts": "*i32", "numel": "i32"}
    types |= dict.fromkeys(("gate", "up", "grad_gate", "grad_up"), row)
    constants = {"K": top_k, "BLOCK": 512, "WEIGHTED": True, "S": 3, "E": top_k, "G": 16, "BACK": top_k == 1}
    kernels = [kernel for name, kernel in vars(triton_rows).items() if name.endswith("_kernel")]
    assert len(kernels) == 5
    for kernel in kernels:
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        values = {name: value for name, value in constants.items() if name in signature}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        # Results must not change from run to run.
        assert "atom." not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"]


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
    if dtype == torch.float32:  # bf16's rounding is tests/helpers/kernels.py's
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
