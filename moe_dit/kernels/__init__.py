"""Kernels that no library has: tokens to their experts and back, on GPUs in Triton, elsewhere in plain torch."""

from moe_dit.kernels.rows import combine, dispatch, places, regroup, swiglu, ungroup

__all__ = ["combine", "dispatch", "places", "regroup", "swiglu", "ungroup"]
