"""What float32 means on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute what is float32 in float32, for the length of the block, by the same kernels each time.

    By default torch lets cuDNN take TF32 for convolutions, which moves latents, images and features in the third digit;
    some containers let matrix products take it too (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE). Other precisions stay as they
    are.
    """
    cudnn = torch.backends.cudnn
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            yield
    finally:
        torch.set_float32_matmul_precision(products)
