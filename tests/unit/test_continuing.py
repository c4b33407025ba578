"""What a run may change when it goes on: each kind of key, with and without its name on the command line."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from helpers.older_run import OLD, SHARDS
from moe_dit.continuing import Asked, Named, computed, judge
from moe_dit.manifest import read_manifest
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError

HERE = Path("runs/x/checkpoints/step_00000006")
BASE = ["data.latent_scale=0.5", "data.latent_shift=0.1", "data.vae=vae", "data.vae_sha256=aa", "data.window_gb=null"]
BASE += ["global_batch_size=64", "max_micro_batch_size=64"]
CONTENT = {"kind": "latents", "sample_shape": [8, 8, 8], "samples": 4, "classes": ["a", "b", "c"], "content": "ab" * 32}

# A change of each key, by what follows where the command does not name it, where --set does, and where --allow-change
# does.
KEYS = {
    ("refused", "refused", "refused"): [
        *("model.depth=4", "model.hidden_size=64", "model.moe.num_experts=4", "model.moe.score=softmax"),
        *("model.positions=rope_1d", "model.num_classes=11", "ema.second_decay=0.9"),
    ],
    ("refused", "refused", "told"): [
        *("seed=1", "global_batch_size=32", "ema.decay=0.5", "data.window_gb=2", "data.vae_sha256=bb"),
        *("flow.label_dropout=0.5", "flow.prediction=data", "flow.time=logit_normal", "flow.time_mean=1.0"),
        *("flow.time_std=2.0", "flow.noise_scale=2.0", "flow.min_denominator=0.1"),
        "model.moe.auxiliary_losses={z_loss: 0.1}",
    ],
    ("refused", "told", "told"): [
        *("optimizer.lr=0.5", "optimizer.betas=[0.8, 0.9]", "optimizer.weight_decay=0.1", "optimizer.warmup_steps=3"),
        *("optimizer.clip_grad_norm=1.0", "optimizer.name=other", "optimizer.schedule=cosine"),
        *("optimizer.final_lr=0.0001", "balance.rate=0.001", "precision=bf16", "gradients=fp32"),
        *("data.horizontal_flip=0.5", "data.latent_scale=0.6", "data.latent_shift=0.2"),
    ],
    ("told", "told", "told"): [
        *("name=other", "steps=7", "max_micro_batch_size=8", "activation_checkpointing=blocks", "compile=dense"),
        *("initial_weights=model", "sampling.method=heun", "sampling.steps=9", "sampling.cfg_scale=3.0"),
        *("sampling.cfg_interval=[0.1, 1.0]", "sampling.labels=random", "data.path=elsewhere", "data.workers=3"),
        *("data.cache_gb=1", "data.vae=other", "checkpoint.every=9", "checkpoint.keep=9"),
        *("checkpoint.milestone_every=9", "checkpoint.write_gb_per_second=9.0", "looks.every=9", "looks.samples=9"),
        *("looks.held_out=x", "looks.held_out_samples=9", "looks.time_buckets=9", "looks.reference=x"),
        *("looks.inception=x", "metrics.sinks=[]"),
    ],
}


def trained(*keys: str, ranks: int = 1, recipe: str = "digits", device: str = "cpu", data=None) -> dict:
    """What is trained with these keys."""
    made = load_recipe(recipe, [*BASE, *keys])
    return computed(made, ranks, made.in_bf16(device), data)


def verdict(new: dict, old: dict, named: Named = Named(), own: bool = True) -> str:  # noqa: B008  # frozen
    """What becomes of a difference: "told" or "refused", and "silent" where there is none."""
    told, refused = judge(new, old, named, own)
    assert len(told) + len(refused) <= 1, (told, refused)
    return "told" if told else "refused" if refused else "silent"


@pytest.mark.parametrize(("change", "verdicts"), [(change, v) for v, group in KEYS.items() for change in group])
def test_a_key_that_differs(change, verdicts):
    key, old, new = change.partition("=")[0], trained(), trained(change)
    names = Named(), Named(given=[key]), Named(allowed=[key])
    assert tuple(verdict(new, old, named) for named in names) == verdicts
    # Its section names it too, another key does not.
    assert verdict(new, old, Named(allowed=[key.split(".")[0]])) == verdicts[2]
    assert verdict(new, old, Named(["dat", "optimizer.l"], ["dat", "optimizer.l"])) == verdicts[0]
    assert verdict(new, new) == "silent"
    # A run that begins from another run's checkpoint is told what differs; what its state is of no use with is refused.
    elsewhere = "refused" if verdicts[1] == "refused" else "told"
    assert verdict(new, old, own=False) == elsewhere


def test_each_key_has_its_case():
    """Those that need another are looks.score_samples, and the model's, which are all alike."""

    def leaves(section, path=""):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if field.name != "model":
                yield from (
                    leaves(value, f"{path}{field.name}.") if dataclasses.is_dataclass(value) else [path + field.name]
                )

    cases = {change.partition("=")[0] for group in KEYS.values() for change in group}
    given = {"data.kind", "looks.score_samples"}
    assert set(leaves(load_recipe("digits"))) - given == {key for key in cases if not key.startswith("model.")}


def test_steps_that_change_the_rate_of_each_step_are_named():
    old, new = trained("optimizer.schedule=cosine"), trained("optimizer.schedule=cosine", "steps=7")
    assert verdict(new, old) == "refused"
    assert verdict(new, old, Named(["steps"])) == verdict(new, old, Named(allowed=["steps"])) == "told"


def test_precision_is_what_it_came_to():
    assert verdict(trained("precision=fp32"), trained("precision=auto")) == "silent"  # on CPUs
    assert verdict(trained(), trained(device="cuda")) == "refused"
    assert verdict(trained("precision=bf16"), trained(device="cuda")) == "silent"
    # Sums of gradients follow from how a run is spread: nodes that are lost end no run.
    few, many = (trained(ranks=ranks, device="cuda") for ranks in (8, 16))
    assert [str(change) for change in judge(few, many, Named())[0]] == [
        "goes on with gradients.auto bf16 instead of fp32"
    ]
    assert judge(few, many, Named())[1] == []


BALANCED = "model.moe.auxiliary_losses={load_loss: 0.01}"


@pytest.mark.parametrize(
    ("recipe", "keys", "verdicts"),
    [
        ("digits", [], ("silent", "silent")),
        ("digits", ["model.moe.auxiliary_losses={z_loss: 0.01}"], ("silent", "silent")),
        ("digits", [BALANCED], ("refused", "told")),
        ("digits_diffmoe", [], ("refused", "told")),
    ],
)
def test_the_micro_batch_counts_where_its_samples_meet(recipe, keys, verdicts):
    two, four, accumulated = (
        trained(*keys, f"max_micro_batch_size={most}", ranks=ranks, recipe=recipe)
        for ranks, most in ((2, 32), (4, 32), (1, 32))
    )
    named = Named(["max_micro_batch_size"]), Named(allowed=["micro_batch_size"])
    assert (verdict(four, two, named[0]), verdict(four, two, named[1])) == verdicts
    assert verdict(accumulated, two) == "silent"  # micro-batches of the same size
    assert verdict(four, two, own=False) == verdicts[1]


def lines(data: dict, *allowed: str, own: bool = True) -> list[str]:
    """What is told where the shards are these."""
    recipe = load_recipe("digits", BASE)
    description = {"recipe": recipe.to_dict(), "world_size": 1, "precision": "fp32", "data": CONTENT}
    return Asked(recipe, 1, False, CONTENT | data, Named(["data.path"], allowed)).changes(description, HERE, own)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"samples": 3, "content": "cd" * 32}, ("data.samples", "4", "3")),
        ({"content": "cd" * 32}, ("data.content", "abababababab...", "cdcdcdcdcdcd...")),
        ({"classes": ["a", "c", "b"]}, ("data.classes", "'b'", "'c' as class 1")),
        ({"classes": ["a", "b"]}, ("data.classes", "3", "2 names")),
        ({"sample_shape": [4, 8, 8]}, ("data.sample_shape", "[8, 8, 8]", "[4, 8, 8]")),
    ],
)
def test_other_data_is_refused_unless_it_may_change(data, said):
    key, old, new = said
    with pytest.raises(InputError) as error:
        lines(data)
    assert str(error.value) == (
        f"{HERE} was trained with {key} {old}, not {new}; keep it with the same shards, change it with --allow-change "
        "data, or give another --out for another experiment"
    )
    told = [f"goes on with {key} {new} instead of {old}"]
    assert lines(data, "data") == lines(data, key) == lines(data, own=False) == told
    assert lines({}) == []


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path):
    manifest = read_manifest(SHARDS)
    found = manifest.content()
    assert (found["kind"], found["samples"], found["classes"]) == ("latents", 96, [str(n) for n in range(10)])
    moved = shutil.copytree(SHARDS, tmp_path / "moved")
    values = json.loads((moved / "manifest.json").read_text())
    shard = values["shards"][0]
    (moved / shard["name"]).rename(moved / "renamed.tar")
    shard["name"] = "renamed.tar"
    (moved / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(moved).content() == found
    shard["sha256"] = "0" * 64
    (moved / "manifest.json").write_text(json.dumps(values))
    assert read_manifest(moved).content()["content"] != found["content"]
    two = [{"samples": 1, "bytes": 1, "sha256": "a"}, {"samples": 1, "bytes": 1, "sha256": "b"}]
    contents = [dataclasses.replace(manifest, shards=order).content()["content"] for order in (two, two[::-1])]
    assert contents[0] != contents[1]


def test_a_checkpoint_of_before_there_was_a_digest_continues():
    recipe = load_recipe(str(OLD / "run/config.yaml"))
    description = json.loads(next((OLD / "run/checkpoints").glob("step_*/state.json")).read_text())
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path="elsewhere", window_gb="auto"))
    told = Asked(moved, 4, False, CONTENT, Named()).changes(description, HERE, True)
    assert told == ["goes on with data.path elsewhere instead of data/digits"]


def refusal(keys: list[str], old: list[str], recipe: str = "digits", ranks: int = 1) -> str:
    """What is said where the recipe of these keys is not that of the old ones, which one rank trained."""
    recipes = [load_recipe(recipe, [*BASE, *changes]) for changes in (keys, old)]
    description = {"recipe": recipes[1].to_dict(), "world_size": 1, "precision": "fp32", "data": CONTENT}
    with pytest.raises(InputError) as error:
        Asked(recipes[0], ranks, False, CONTENT, Named()).changes(description, HERE, True)
    return str(error.value)


def test_a_refusal_says_how_to_keep_and_how_to_change():
    assert refusal([], ["optimizer.lr=2e-4", "optimizer.betas=[0.8, 0.9]"]) == (
        f"{HERE} was trained with optimizer.lr 0.0002, not 0.001, optimizer.betas [0.8, 0.9], not [0.9, 0.999]; keep "
        "them with --set optimizer.lr=0.0002 --set 'optimizer.betas=[0.8, 0.9]', change them with --allow-change "
        "optimizer.lr --allow-change optimizer.betas, or give another --out for another experiment"
    )
    assert refusal(["model.depth=4", "seed=1"], []) == (
        f"{HERE} was trained with model.depth 6, not 4, and its state is of no use with another; continue it with 6, "
        "or give another --out for another experiment"
    )
    cosine = "optimizer.schedule=cosine"
    assert "steps 7, not 8; keep it with --steps 7, change it with --allow-change steps" in refusal(
        [cosine, "steps=8"], [cosine, "steps=7"]
    )
    half = ["max_micro_batch_size=16"]
    assert "micro_batch_size 16, not 32; keep it with --set max_micro_batch_size=16," in refusal(
        [], half, "digits_diffmoe", 2
    )
    assert "keep it with another number of ranks," in refusal([], [], "digits_diffmoe", 2)


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("optimizer.lrr", "--allow-change optimizer.lrr: there is no such key; did you mean optimizer.lr?"),
        ("lr=1e-3", "--allow-change lr=1e-3: there is no such key; give a key or section of the recipe"),
    ],
)
def test_what_may_change_must_be_a_key(key, line):
    for good in ("optimizer", "optimizer.lr", "data", "data.classes", "micro_batch_size", "model.moe.dropout"):
        Named(allowed=[good]).check(load_recipe("digits"))
    with pytest.raises(InputError) as error:
        Named(allowed=[key]).check(load_recipe("digits"))
    assert str(error.value).startswith(line)
