"""Recipes: every one loads, counts its parameters as published, and every mistake is one line that helps."""

import json
import shutil
from functools import partial

import pytest
import yaml

from helpers.older_run import OLD
from moe_dit import build_model
from moe_dit.checkpoint_files import read_description
from moe_dit.parallel.deepspeed_config import load_parallelism
from moe_dit.recipe_file import load_recipe, names, parse_recipe
from moe_dit.runtime.errors import InputError

# Total and activated parameters in millions, counted on the published code (arXiv:2512.01252's table gives the second).
PARAMETERS = {
    "dsmoe_s_e16": (96.87, 34.94),
    "dsmoe_s_e48": (69.24, 31.19),
    "dsmoe_b_e16": (386.32, 138.59),
    "dsmoe_b_e48": (275.61, 123.44),
    "dsmoe_l_e16": (1368.06, 487.25),
    "dsmoe_l_e48": (1166.94, 456.80),
    "dsmoe_3b_e16": (3101.67, 1011.48),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    model, moe = build_model(name, device="meta"), load_recipe(name).model.moe
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    activated = total - routed + routed * moe.top_k / moe.num_experts
    assert (round(total / 1e6, 2), round(activated / 1e6, 2)) == PARAMETERS[name]


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_named_as_its_file_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(recipe.to_dict(), name) == recipe


def test_published_training_settings():
    recipe = load_recipe("dsmoe_b_e16")
    assert (recipe.global_batch_size, recipe.steps, recipe.ema.decay) == (512, 700_000, 0.9999)
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (1e-4, [0.9, 0.999], 0)
    assert (recipe.flow.label_dropout, recipe.data.horizontal_flip, recipe.data.latent_scale) == (0.1, 0.5, 0.18215)
    assert (recipe.sampling.method, recipe.sampling.steps) == ("euler", 250)


def test_set_changes_a_key_and_reads_numbers_without_a_dot():
    assert load_recipe("digits", ["optimizer.lr=1e-4", "model.moe.num_experts=4"]).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.depht=3", "unknown key model.depht; did you mean depth?"),
        ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
        ("model.depth=3.5", "model.depth is 3.5; it should be a valid integer"),
        ("model.depth=0", "model.depth is 0; it should be greater than 0"),
        ("seed=true", "seed is True"),
        ("sampling.method=eular", "did you mean euler?"),
        ("model.family=dsmo", "model.family is 'dsmo'; did you mean dsmoe?"),
        ("flow.prediction=x", "choose one of velocity, data"),
        ("ema.second_decay=0.995", "the same as ema.decay"),
        ("model.moe.capacity=1.0", "unknown key model.moe.capacity"),
        ("model.moe.num_groups=3", "it must divide num_experts 8: 1, 2, 4, 8"),
        ("model.moe.top_k=9", "model.moe.top_k is 9; at most the 8 experts"),
        ("model.num_heads=5", "hidden_size / num_heads must be a multiple of 4"),
        ("model=3", "model is 3"),
        ("seed.x=3", "seed is a value, not a section"),
        ("nonsense", "expected section.key=value"),
        ("seed=[", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_one_line_with_the_remedy(override, line):
    with pytest.raises(InputError) as caught:
        load_recipe("digits", [override])
    assert line in str(caught.value)
    assert override.split("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("name: [", "cannot read recipe"),
        ("- 1", "should be a mapping"),
        ("name: x", "key seed is missing"),
        (None, "no recipe file"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, content, line):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_recipe(str(path))
    assert line in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["x\ntouch OWNED\n#", "", ".", "..", "../x", "a/b", "-x", ".x", "a b", "a$(b)", "é", "x\n", "x\0", "a" * 101],
)
def test_a_name_that_could_be_a_path_or_a_program_is_refused(tmp_path, name):
    """In a recipe, in a stranger's RUN/config.yaml, and in a checkpoint's description."""
    whole = load_recipe("digits").to_dict() | {"name": name}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(whole))
    checkpoint = shutil.copytree(OLD / "run/checkpoints/step_00000003", tmp_path / "step_00000003")
    description = json.loads((checkpoint / "state.json").read_text()) | {"recipe": whole}
    (checkpoint / "state.json").write_text(json.dumps(description))
    for read in (partial(load_recipe, str(file)), partial(read_description, checkpoint)):
        with pytest.raises(InputError) as caught:
            read()
        assert "name is " in str(caught.value) and "letters (a to z, A to Z), digits and ._- only" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "A-1.b_c", "_", "9..", "a" * 100])
def test_a_plain_name_is_taken(name):
    assert parse_recipe(load_recipe("digits").to_dict() | {"name": name}, "mine.yaml").name == name


@pytest.mark.parametrize(
    ("recipe", "override", "line"),
    [
        ("digits_diffmoe", "model.moe.top_k=2", "unknown key model.moe.top_k; valid keys here: num_experts, capacity"),
        ("digits_diffmoe", "balance.rate=0.001", "balance.rate is 0.001; only experts that tokens choose"),
        ("digits_pixels", "model.in_context_start=6", "it should be less than model.depth 6"),
        ("digits_pixels", "model.moe.top_k=9", "at most the 8 experts"),
        ("digits_pixels", "model.in_context_lenn=6", "did you mean in_context_len?"),
    ],
)
def test_a_wrong_override_of_another_family(recipe, override, line):
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, [override])
    assert line in str(caught.value)


def test_ranks_cannot_share_the_experts_of_a_network_that_has_none_to_share(tmp_path):
    (tmp_path / "ds.json").write_text('{"expert_parallel": {"enabled": true, "autoep_size": 2}}')
    with pytest.raises(InputError, match="no experts that ranks can share"):
        load_parallelism(str(tmp_path / "ds.json"), load_recipe("digits_diffmoe"), world_size=2)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean dsmoe_s_e16"):
        load_recipe("dsmoe_s_e61")
