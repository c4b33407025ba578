"""The DeepSpeed JSON: what it may not say, and what would be right.

The JSONs are literal, as people have them.
"""

import json

import pytest

from helpers import ROOT
from moe_dit import load_recipe
from moe_dit.parallel.deepspeed_config import for_deepspeed, load_parallelism
from moe_dit.runtime.errors import InputError


def load(folder, content: str, world: int = 2):
    (folder / "ds.json").write_text(content)
    return load_parallelism(str(folder / "ds.json"), load_recipe("digits"), world)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        # what the recipe decides
        (
            '{"train_micro_batch_size_per_gpu": 8}',
            "is decided by the recipe; remove it and set max_micro_batch_size there",
        ),
        ('{"fp16": {"enabled": false}}', "fp16 is decided by the recipe; remove it and set precision there"),
        (
            '{"data_types": {"grad_accum_dtype": "fp32"}}',
            "data_types is decided by the recipe; remove it and set gradients",
        ),
        ('{"communication_data_type": "fp16"}', "remove it and set gradients there"),
        ('{"activation_checkpointing": {"partition_activations": true}}', "set activation_checkpointing there"),
        ('{"tensorboard": {"enabled": true}}', "remove it and set metrics.sinks there"),
        # what would change a result, or not work
        ('{"prescale_gradients": true}', "prescale_gradients changes how gradients are summed; remove it"),
        ('{"gradient_predivide_factor": 2.0}', "gradient_predivide_factor changes how gradients are summed"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
            "offload_optimizer moves training",
        ),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}',
            "use more GPUs or a higher ZeRO stage",
        ),
        (
            '{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
            "zero_quantized_weights rounds what ranks",
        ),
        (
            '{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}',
            "does not go with expert-parallel layers",
        ),
        ('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}', "serves offloading alone"),
        ('{"zero_optimization": {"stage": 2, "reduce_scatter": false}}', "reduce_scatter is False; it should be true"),
        ('{"zero_optimization": {"stage": 2, "contiguous_gradients": false}}', "is False; it should be true"),
        ('{"expert_parallel": {"enabled": true, "load_balance_coeff": 0.01}}', "set balance.rate there"),
        # what is unknown
        ('{"zero_optimisation": {"stage": 2}}', "not zero_optimisation; did you mean zero_optimization?"),
        ('{"curriculum_learning": {}}', "what is not known to be neutral could change results"),
        ('{"zero_optimization": {"stage": 2, "overlap_com": true}}', "not overlap_com; did you mean overlap_comm?"),
        ('{"zero_optimization": {"stage": 2, "leaf_module": {}}}', "zero_optimization takes stage, overlap_comm, "),
        ('{"flops_profiler": {"enabled": true, "steps": 5}}', "flops_profiler takes enabled, profile_step, "),
        # wrong types
        ('{"zero_optimization": 2}', "zero_optimization is 2; it should be an object"),
        ('{"zero_optimization": true}', "zero_optimization is True; it should be an object"),
        ('{"zero_optimization": {"stage": "2"}}', "stage is '2'; it should be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": true}}', "stage is True; it should be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1.5}}', "stage is 1.5; it should be 0, 1, 2 or 3"),
        (
            '{"zero_optimization": {"stage": 2, "overlap_comm": "false"}}',
            "overlap_comm is 'false'; it should be true or",
        ),
        (
            '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
            "'auto'; it should be a positive integer",
        ),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}', "it should be a positive integer"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e400}}', "the number 1e400, which is infinite"),
        (
            '{"zero_optimization": {"stage": 2, "allgather_bucket_size": 5}}',
            "is 5; it should be a positive, even integer",
        ),
        (
            '{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": -1}}',
            "it should be a non-negative integer",
        ),
        ('{"expert_parallel": [2]}', "expert_parallel is [2]; it should be an object"),
        ('{"expert_parallel": {"enabled": "true", "autoep_size": 2}}', "enabled is 'true'; it should be true or false"),
        ('{"expert_parallel": {"enabled": true, "autoep_size": "2"}}', "autoep_size is '2'; it should be a positive"),
        ('{"comms_logger": {"enabled": true, "prof_ops": "all_reduce"}}', "it should be a list of names"),
        ('{"wall_clock_breakdown": 1}', "wall_clock_breakdown is 1; it should be true or false"),
        # no such JSON
        ('{"wall_clock_breakdown": true, "wall_clock_breakdown": false}', "wall_clock_breakdown stands twice"),
        ("[]", "should hold a JSON object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_a_json_may_not_say_is_one_line(tmp_path, content, line):
    with pytest.raises(InputError) as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert line in message and message.startswith(str(tmp_path / "ds.json")) and len(message) < 600


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.stem)
def test_those_that_ship_load(file):
    ep = int(file.stem.rpartition("ep")[2])
    recipe = load_recipe("dsmoe_s_e16")
    parallelism = load_parallelism(str(file), recipe, 16)
    assert (parallelism.zero_stage, parallelism.ep_size) == (int(file.stem[4]), ep)
    given = for_deepspeed(parallelism, recipe, True)
    assert given["zero_optimization"] == json.loads(file.read_text())["zero_optimization"]
    # DeepSpeed's look for overflows would wait for the GPU twice a step, and launch 416 kernels for S.
    assert given["bf16"]["enabled"] and given["bf16"]["check_grad_overflow"] is False


def test_numbers_may_be_written_as_people_do(tmp_path):
    content = '{"zero_optimization": {"stage": 2.0, "reduce_bucket_size": 2e8}, "expert_parallel": {"autoep_size": 8}}'
    parallelism = load(tmp_path, content)
    assert (parallelism.zero_stage, parallelism.ep_size) == (
        2,
        1,
    )  # enabled is false where it is not said, as in DeepSpeed
    assert (load(tmp_path, "{}").zero_stage, load(tmp_path, "{}").ep_size) == (0, 1)
