"""The kernels: plain torch and, on its interpreter, Triton against float64; and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ENV, ROOT
from kernels import check_all

from moe_dit.kernels import combine, dispatch, places


def test_plain_torch_against_float64():
    assert check_all("cpu") == 32


def test_triton_against_float64():
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = ENV | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "tests/kernels.py"], cwd=ROOT, env=env, capture_output=True, text=True)
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


def test_graphs_are_not_broken():
    experts_TK = torch.tensor([[1, 0], [2, 1], [0, 2]])

    def layer(x, weights):
        order_N, place_TK = places(experts_TK)
        return combine(dispatch(x, order_N, place_TK).square(), place_TK, weights)

    x, weights = torch.randn(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        out = function(x, weights)
        results.append((out, *torch.autograd.grad(out.sum(), (x, weights))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)
    torch.testing.assert_close(results[0][0], x.square() * weights.sum(1, keepdim=True))
