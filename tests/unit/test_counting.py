"""What counts as a launch, and what is checked of exchanges that are counted."""

import pytest
import torch

from moe_dit.counting import _Counter
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError


def test_what_is_a_launch():
    x = torch.ones(4, 8)
    with _Counter() as counter:
        y = (x.t()[2:] * 2).sum()  # a view twice, a product and a sum
        float(y)
        x @ x.t()
        torch.tensor(2.0)
    cost = counter.costs["draws and inputs"]
    # bytes: 6 x 4 floats read and written; read, and one written; the matrix product's are left out
    assert (cost.launches, cost.synchronisations, cost.bytes) == (3, 2, 4 * (24 + 24 + 24 + 1))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('"comm_backend": "nccl"', "expert_parallel.comm_backend is 'nccl'; it should be comm or deepep"),
        ('"async_split_plan": 1', "expert_parallel.async_split_plan is 1; it should be true or false"),
        ('"combine_impl": "bmm"', "expert_parallel takes .*, not combine_impl"),
        ('"comm_backend": "deepep"', "deepep needs the package deep_ep, which is not installed"),
    ],
)
def test_how_tokens_are_exchanged_is_checked(tmp_path, section, message):
    file = tmp_path / "ds.json"
    file.write_text(f'{{"expert_parallel": {{"enabled": true, "autoep_size": 2, {section}}}}}')
    recipe = load_recipe("digits")
    with pytest.raises(InputError, match=message):
        load_parallelism(str(file), recipe, 2).exchange(recipe, bf16=True)
