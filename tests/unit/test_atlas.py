"""The routing atlas, against networks whose choices are known, and against a plain loop over samples and times."""

import io
import json
import re
import tarfile
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.atlas import make_atlas
from eval.atlas_file import Atlas, entropy_bits, load_atlas, save_atlas, shares
from eval.atlas_page import atlas_parts
from helpers import call, refused
from moe_dit import build_model
from moe_dit.export import save_export
from moe_dit.manifest import read_manifest
from moe_dit.randomness import Stream, normal, permutation
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError

SAMPLES, CLASSES, SCALE = 40, 10, 0.5  # of the shards; sample i has class i mod 10 but for the last ten: all 3
LABELS = [i % CLASSES if i < 30 else 3 for i in range(SAMPLES)]
DSMOE = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=4", "model.moe.num_groups=1"]
DSMOE += ["model.moe.num_groups_kept=1", "model.moe.num_experts=4", "model.moe.expert_width=8"]  # tokens: 2 x 2
DIFFMOE = ["model.depth=4", "model.hidden_size=16", "model.num_heads=2", "model.moe.num_experts=4"]
PIXELS = ["model.depth=6", "model.hidden_size=16", "model.num_heads=2", "model.moe.expert_width=8"]


def write_shards(folder, kind):
    """Shards of random latents, or of grey images, written by hand."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, label in enumerate(LABELS):
            sample = io.BytesIO()
            if kind == "latents":
                np.save(sample, rng.normal(size=(8, 8, 8)).astype(np.float16))
            else:
                Image.new("RGB", (32, 32), (6 * i,) * 3).save(sample, "PNG")
            name = "latent.npy" if kind == "latents" else "png"
            for extension, data in ((name, sample.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    manifest = {"format": "moe-dit-shards-1", "kind": kind, "samples": SAMPLES}
    manifest |= {"classes": [f"class {i}" for i in range(CLASSES)], "scale": SCALE if kind == "latents" else None}
    manifest["sample_shape"] = [8, 8, 8] if kind == "latents" else [3, 32, 32]
    size = (folder / "a.tar").stat().st_size
    manifest["shards"] = [{"name": "a.tar", "samples": SAMPLES, "bytes": size, "sha256": ""}]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Folders of shards by kind."""
    folder = tmp_path_factory.mktemp("shards")
    return {kind: write_shards(folder / kind, kind) for kind in ("latents", "pixels")}


def network(name, settings, spread=0.0):
    """A recipe and its network in eval mode, every weight moved by random numbers."""
    recipe = load_recipe(name, settings)
    model, generator = build_model(recipe), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += spread * torch.randn(weight.shape, generator=generator)
    return recipe, model.eval()


def atlas_of(recipe, model, folder, **settings):
    settings = {"samples": SAMPLES, "times": 3, "seed": 0, "batch": 16} | settings
    return make_atlas(model, recipe, read_manifest(folder), **settings)


def assert_equal(one, two):
    for field in fields(Atlas):
        if field.name != "settings":
            assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name


# --- choices that are known -------------------------------------------------------------------------------------------


def test_choice_by_position(shards):
    """The network sees nothing but positions, and each expert's router weights are one position's token."""
    recipe, model = network("digits", [*DSMOE, "model.moe.top_k=1", "model.positions=sin_cos"])
    with torch.no_grad():
        for weight in model.x_embedder.parameters():
            weight.zero_()
        # A fresh block's gates and modulation are zero, so that the layer sees the normed position embedding.
        tokens = torch.nn.functional.layer_norm(model.pos_embed.view(4, 16), (16,), eps=1e-6)
        model.blocks[1].mlp.router.weight.copy_(0.05 * tokens[[2, 0, 3, 1]])
    atlas = atlas_of(recipe, model, shards["latents"])
    # Position (row, column) = (0, 0) is token 0, which is expert 1's, and so on.
    want = np.zeros((1, 2, 2, 4), int)
    for row, column, expert in ((0, 0, 1), (0, 1, 3), (1, 0, 0), (1, 1, 2)):
        want[0, row, column, expert] = SAMPLES * 3
    assert np.array_equal(atlas.by_position, want)
    assert np.array_equal(shares(atlas.by_time), np.full((1, 3, 4), 0.25))
    assert np.array_equal(atlas.entropy, np.full((1, 3), 2.0))
    assert np.array_equal(atlas.together, [np.diag([SAMPLES * 3] * 4)])  # no token has two
    assert atlas.layers.tolist() == ["blocks.1.mlp"] and not atlas.class_tokens_by_time.any()


def test_choice_by_a_constant_bias(shards):
    """Two experts whose bias outweighs every score get all tokens, and always together."""
    recipe, model = network("digits", [*DSMOE, "model.moe.top_k=2"], spread=0.1)
    model.blocks[1].mlp.router.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 5.0]))
    atlas = atlas_of(recipe, model, shards["latents"])
    assert np.array_equal(shares(atlas.by_time), np.broadcast_to([0, 0.5, 0, 0.5], (1, 3, 4)))
    assert np.array_equal(atlas.entropy, np.full((1, 3), 1.0))
    tokens = SAMPLES * 4 * 3
    assert np.array_equal(atlas.together[0], tokens * np.outer([0, 1, 0, 1], [0, 1, 0, 1]))
    ratio = atlas.together_ratio()[0]
    assert ratio[1, 3] == pytest.approx(1) and np.isnan(ratio).sum() == 14
    assert atlas.tokens == SAMPLES * 4


def test_choice_by_class_and_a_single_expert(shards):
    """The label reaches the layer through its modulation alone: class y goes to expert y mod 4."""
    recipe, model = network("digits", [*DSMOE, "model.moe.top_k=1"])
    with torch.no_grad():
        for weight in model.c_embedder.time.parameters():
            weight.zero_()
        model.c_embedder.label.weight.copy_(100 * torch.eye(16)[:11])
        shift = model.blocks[1].adaLN_modulation[1].weight.view(6, 16, 16)[3]
        shift.copy_(torch.eye(16))
        model.blocks[1].mlp.router.weight.copy_(0.001 * torch.eye(4).repeat(1, 4))
    atlas = atlas_of(recipe, model, shards["latents"], samples=20)
    seen = [LABELS[i] for i in permutation(0, 0, SAMPLES)[:20]]
    want = np.zeros((1, CLASSES, 4), int)
    for label in seen:
        want[0, label, label % 4] += 3 * 4  # times, positions
    assert np.array_equal(atlas.by_class, want)
    assert np.array_equal(atlas.samples_by_class, np.bincount(seen, minlength=CLASSES))
    assert atlas.classes.tolist() == [f"class {i}" for i in range(CLASSES)]
    one = atlas_of(recipe, model, shards["latents"], samples=1)
    assert np.array_equal(one.entropy, np.zeros((1, 3)))
    # A model that lacks one of the classes, and one that numbers them the other way round.
    names = ["class 10", *(f"class {9 - i}" for i in range(CLASSES - 1))]
    with pytest.raises(InputError, match=r"1 of 10 classes that the model has not \('class 0'\)"):
        atlas_of(recipe, model, shards["latents"], samples=20, classes=names)
    names = [f"class {9 - i}" for i in range(CLASSES)]
    other = atlas_of(recipe, model, shards["latents"], samples=20, classes=names)
    want = np.zeros((1, CLASSES, 4), int)
    for label in seen:
        want[0, 9 - label, (9 - label) % 4] += 3 * 4
    assert np.array_equal(other.by_class, want) and other.classes.tolist() == names
    assert np.array_equal(other.samples_by_class, np.bincount([9 - label for label in seen], minlength=CLASSES))
    bare = atlas_of(recipe, model, shards["latents"], samples=20, classes=[str(i) for i in range(CLASSES)])
    assert_equal(atlas, bare)


def test_expert_choice(shards):
    """DiffMoE whose predictors say yes for two experts and no for the others."""
    recipe, model = network("digits_diffmoe", DIFFMOE, spread=0.1)
    for block in model.blocks[1::2]:
        with torch.no_grad():
            block.mlp.capacity_predictor[2].weight.zero_()
            block.mlp.capacity_predictor[2].bias.copy_(torch.tensor([5.0, -5.0, -5.0, 5.0]))
        block.mlp.expert_threshold.fill_(0.5)
    atlas = atlas_of(recipe, model, shards["latents"])
    want = SAMPLES * 16 * np.array([1, 0, 0, 1])
    assert np.array_equal(atlas.by_time, np.broadcast_to(want, (2, 3, 4)))
    assert np.array_equal(atlas.by_position, np.broadcast_to(SAMPLES * 3 * np.array([1, 0, 0, 1]), (2, 4, 4, 4)))
    assert np.array_equal(atlas.together[1], 3 * SAMPLES * 16 * np.outer([1, 0, 0, 1], [1, 0, 0, 1]))
    assert atlas.settings["choice"] == "expert"


def test_expert_choice_counts_what_the_experts_compute(shards):
    recipe, model = network("digits_diffmoe", DIFFMOE, spread=0.1)
    computed = torch.zeros(2, 4, dtype=torch.int64)
    for number, block in enumerate(model.blocks[1::2]):
        block.mlp.expert_threshold.fill_(0.5)

        def count(_, inputs, number=number):
            computed[number] += inputs[1]

        block.mlp.experts.register_forward_pre_hook(count)
    atlas = atlas_of(recipe, model, shards["latents"])
    assert np.array_equal(atlas.by_time.sum(1), computed.numpy())
    assert computed.min() > 0 and computed.max() < 3 * SAMPLES * 16


# --- against a plain loop ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_model():
    return network("digits", [*DSMOE, "model.moe.top_k=2"], spread=0.3)


def test_counts_are_those_of_a_plain_loop(random_model, shards):
    """Sample by sample, noised by hand; the router's choice from its input and weights."""
    recipe, model = random_model
    atlas = atlas_of(recipe, model, shards["latents"], samples=8, seed=5)
    want = {name: np.zeros_like(getattr(atlas, name)) for name in ("by_time", "by_class", "by_position", "together")}
    with tarfile.open(shards["latents"] / "a.tar") as tar:
        latents = [np.load(io.BytesIO(tar.extractfile(f"{i:06d}.latent.npy").read())) for i in range(SAMPLES)]
    inputs = []
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    weight = model.blocks[1].mlp.router.weight
    for position, i in enumerate(permutation(5, 0, SAMPLES)[:8]):
        mean, log_variance = torch.from_numpy(latents[i]).float().chunk(2)
        draw, noise = (
            normal(5, stream, torch.tensor([position]), (4, 8, 8))[0] for stream in (Stream.LATENT, Stream.NOISE)
        )
        x = SCALE * (mean + (log_variance / 2).exp() * draw)
        for k, t in enumerate((1 / 6, 1 / 2, 5 / 6)):
            with torch.no_grad():
                model((t * x + (1 - t) * noise)[None], torch.tensor([t]), torch.tensor([LABELS[i]]))
            for token, pair in enumerate((inputs.pop() @ weight.T).topk(2).indices.tolist()):
                for expert in pair:
                    want["by_time"][0, k, expert] += 1
                    want["by_class"][0, LABELS[i], expert] += 1
                    want["by_position"][0, token // 2, token % 2, expert] += 1
                    for other in pair:
                        want["together"][0, expert, other] += 1
    hook.remove()
    for name, counts in want.items():
        assert np.array_equal(getattr(atlas, name), counts), name
    assert atlas.by_time.min(axis=-1).max() < 0.9 * atlas.by_time.mean()  # the choice is not even


def test_another_batch_makes_the_same_atlas_and_totals_add_up(random_model, shards):
    atlas = atlas_of(*random_model, shards["latents"], samples=50)  # ten samples are met twice
    assert_equal(atlas, atlas_of(*random_model, shards["latents"], samples=50, batch=7))
    choices = 50 * 3 * 4 * 2
    for name in ("by_time", "by_class", "by_position"):
        assert getattr(atlas, name).sum() == choices, name
    assert np.trace(atlas.together[0]) == choices and atlas.together.sum() == 2 * choices
    other = atlas_of(*random_model, shards["latents"], samples=50, seed=1)
    assert not np.array_equal(atlas.by_time, other.by_time)
    assert not any(module._forward_hooks for module in random_model[1].modules())


def test_class_tokens_are_counted_apart(shards):
    """JiT: four class tokens join before block 2, so that blocks 3 and 5 have them and block 1 has not."""
    recipe, model = network("digits_pixels", PIXELS, spread=0.1)
    atlas = atlas_of(recipe, model, shards["pixels"], samples=10)
    assert atlas.class_tokens_by_time.sum((1, 2)).tolist() == [0, 10 * 3 * 4 * 2, 10 * 3 * 4 * 2]
    assert atlas.by_position.shape == (3, 4, 4, 8)
    assert np.array_equal(atlas.by_position.sum(-1), np.full((3, 4, 4), 10 * 3 * 2))


# --- what is made of the counts ---------------------------------------------------------------------------------------


def test_entropy_in_bits():
    assert entropy_bits(np.array([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0]])).tolist() == [1.5, 0]


def test_experts_that_meet_by_chance_have_ratio_one(random_model, shards):
    """Pairs in numbers w_i w_j are quasi-independent, however uneven the experts; one pair more stands out."""
    atlas = atlas_of(*random_model, shards["latents"], samples=1)
    pairs = np.multiply.outer([100, 40, 20, 10], [100, 40, 20, 10])
    ratio = replace(atlas, together=pairs[None]).together_ratio()[0]
    assert np.isnan(np.diag(ratio)).all()
    np.testing.assert_allclose(ratio[~np.eye(4, dtype=bool)], 1, rtol=1e-6)
    pairs[2, 3] = pairs[3, 2] = 600
    assert replace(atlas, together=pairs[None]).together_ratio()[0][2, 3] > 1.2


# --- command, file and page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(random_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_export(random_model[1], random_model[0], folder)
    return folder


def test_command_and_report(model, shards, random_model, tmp_path):
    flags = ["--samples", 20, "--times", 4, "--batch", 8, "--out", tmp_path / "atlas.npz"]
    assert call("eval.atlas", "--model", model, "--data", shards["latents"], *flags) == 0
    atlas = load_atlas(tmp_path / "atlas.npz")
    assert_equal(atlas, atlas_of(*random_model, shards["latents"], samples=20, times=4, batch=5))
    assert atlas.times.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert (
        atlas.settings["samples"] == 20
        and atlas.settings["model"] == str(model)
        and len(atlas.settings["model_sha256"]) == 64
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    flags = ["--atlas", tmp_path / "atlas.npz", "--out", tmp_path / "report.html"]
    assert call("eval.report", "--run", tmp_path, *flags) == 0
    text = (tmp_path / "report.html").read_text()
    for title in ("Routing atlas", "Entropy over time", "Experts over the image", "Experts by class", "together"):
        assert title in text, title
    assert text.count("<svg") == 7 and "class 3" in text and "block 1" in text and "even: 2 bits" in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)


def test_page_of_a_large_model_shows_the_most_specialised():
    """7 layers, 20 experts, 24 classes: class 5 and expert 19 are unlike the others, class 23 was never seen."""
    layers, experts, classes = 7, 20, 24
    by_class = np.full((layers, classes, experts), 100)
    by_class[:, 5] = 10 * np.arange(experts)
    by_class[:, 23] = 0
    by_position = np.full((layers, 2, 2, experts), 100)
    by_position[:, 0, 0, 19] = 300
    by_time = np.full((layers, 3, experts), 100)
    atlas = Atlas(
        by_time=by_time,
        by_class=by_class,
        by_position=by_position,
        together=np.full((layers, experts, experts), 50),
        entropy=entropy_bits(shares(by_time)),
        class_tokens_by_time=0 * by_time,
        times=np.array([1, 3, 5]) / 6,
        samples_by_class=np.minimum(100, by_class[0].sum(-1)),
        layers=np.array([f"blocks.{2 * i + 1}.mlp" for i in range(layers)]),
        classes=np.array([f"name <{i}>" for i in range(classes)]),
        settings={"samples": 100, "seed": 0, "choice": "token"},
    )
    parts = {title: (note, drawing) for title, note, drawing in atlas_parts(atlas)}
    note, drawing = parts["Experts by class"]
    assert "Of 23 classes those 20" in note and "6 of 7 layers" in note
    assert "name &lt;5&gt;" in drawing and "name &lt;23&gt;" not in drawing
    note, drawing = parts["Experts over the image"]
    assert "Of 20 experts those 16" in note and drawing.count(">19</text>") == 6
    assert "block 13" in drawing and parts["Experts over time"][1].count("<image") == 7


def test_an_atlas_comes_back_from_its_file(random_model, shards, tmp_path):
    atlas = atlas_of(*random_model, shards["latents"], samples=2)
    save_atlas(atlas, tmp_path / "a.npz")
    again = load_atlas(tmp_path / "a.npz")
    assert_equal(atlas, again)
    assert again.settings == atlas.settings


@pytest.fixture
def given(model, shards, tmp_path):
    recipe, dense = network("digits_pixels", ["model.depth=3", "model.moe=null"])
    save_export(dense, recipe, tmp_path / "dense")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "broken.npz").write_text("no arrays")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return {"MODEL": model, "LATENTS": shards["latents"], "PIXELS": shards["pixels"], "TMP": tmp_path}


ATLAS = "eval.atlas --samples 2 --out TMP/a.npz "
REPORT = "eval.report --run TMP --out TMP/a.html --atlas "


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (ATLAS + "--model TMP/none --data LATENTS", "config.json"),
        (ATLAS + "--model MODEL --data TMP/none", "no folder of shards"),
        (ATLAS + "--model MODEL --data PIXELS", "trains on latents"),
        (ATLAS + "--model TMP/dense --data PIXELS", "is dense"),
        (ATLAS + "--model MODEL --data LATENTS --times 0", "--times is 0"),
        (ATLAS + "--model MODEL --data LATENTS --batch x", "--batch"),
        (ATLAS + "--model MODEL --data LATENTS --seed -1", "--seed is -1"),
        (ATLAS + "--model MODEL --data LATENTS --out TMP", "is a folder"),
        (ATLAS + "--model MODEL --data LATENTS --out TMP/none/a.npz", "no folder"),
        (ATLAS + "--model MODEL --data LATENTS --out /proc/a.npz", "cannot write"),
        (REPORT + "TMP/none.npz", "no atlas"),
        (REPORT + "TMP/other.npz", "is not an atlas"),
        (REPORT + "TMP/broken.npz", "is not an atlas"),
        (REPORT + "TMP", "is not an atlas"),
    ],
)
def test_what_makes_or_shows_no_atlas_is_one_line_and_harms_nothing(line, says, given, capfd):
    for word, path in given.items():
        line = line.replace(word, str(path))
    assert says in refused(capfd, *line.split(), harmless=given["TMP"])
