"""The kernels compiled for GPUs that are not here, by Triton's own assembler."""

import pytest


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
