"""That what a DeepSpeed JSON may say changes nothing.

The JSONs are literal, as people have them.
"""

import pytest
import torch

from helpers import finish, losses, start_training, state_of

LOGGING = """
    "comms_logger": {"enabled": true, "verbose": false, "prof_all": true, "debug": false, "prof_ops": []},
    "flops_profiler": {"enabled": true, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": false,
                       "output_file": "OUT"},
    "wall_clock_breakdown": true, "memory_breakdown": true, "dump_state": true,
    "expert_parallel": {"enabled": true, "autoep_size": 2},
"""
NEUTRAL = {
    "zero2": """{LOGGING "zero_optimization": {"stage": 2, "overlap_comm": false, "contiguous_gradients": true,
        "reduce_scatter": true, "reduce_bucket_size": 5e4, "allgather_bucket_size": 3e4,
        "use_multi_rank_bucket_allreduce": false}}""",
    "zero3": """{LOGGING "zero_optimization": {"stage": 3, "overlap_comm": true, "reduce_bucket_size": 50000,
        "sub_group_size": 300000, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 100,
        "stage3_model_persistence_threshold": 5000, "stage3_max_live_parameters": 100000,
        "stage3_max_reuse_distance": 1000}}""",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_every_key_that_is_admitted_is_neutral(plain, two_ranks, latents, tmp_path, name):
    """All of them at once, at other values than DeepSpeed's own, and small enough to act; in what is saved too."""
    ds, run = tmp_path / f"{name}.json", tmp_path / "run"
    ds.write_text(NEUTRAL[name].replace("LOGGING", LOGGING).replace("OUT", str(tmp_path / "profile")))
    finish(start_training(2, ds, latents, run, "--steps", "4"), run)
    assert losses(run) == pytest.approx(plain[0][:4], rel=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(plain[1][:4], rel=1e-4)
    for kind in ("weight", "exp_avg", "ema"):
        want = state_of(two_ranks, 4, kind)
        for weight, value in state_of(run, 4, kind).items():
            torch.testing.assert_close(value, want[weight], rtol=1e-3, atol=1e-5)
