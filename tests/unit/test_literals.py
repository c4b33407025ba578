"""Numbers that a run, a sample and a score are made of, against values worked out by hand or by other means.

Tests that compare the project with itself (another topology, a part with the whole) do not see what is wrong alike
everywhere; these do.
"""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from eval import features, metrics, score
from eval.generate import to_uint8
from eval.images import reference_images
from helpers import call
from helpers.draws import FLIP, LABEL_DROP, LATENT, NOISE, SAMPLE_LABEL, SAMPLE_NOISE, TIME, normal, uniform
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import Latents, ShardReader, TrainingSamples, training_inputs
from moe_dit.export import save_export
from moe_dit.manifest import read_manifest
from moe_dit.metrics import imbalance
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.moe import load_loss, z_loss

# --- what training draws and reads ------------------------------------------------------------------------------------


def test_each_of_a_sample_s_draws_has_its_own_stream():
    """Labels dropped, posterior, noise and time at positions of all sizes, draw by draw."""
    seed, positions, shift, scale = 3, [0, 1, 2, 7, 64, 2**31, 2**32 + 1, 2**40 + 5], 0.25, 0.5
    recipe = load_recipe("digits", [f"seed={seed}", "flow.label_dropout=0.5"])
    mean, deviation = 1.5, 2.0
    moments = torch.full((8, 8, 3, 1), mean)
    moments[:, 4:] = 2 * math.log(deviation)
    batch = {"x": moments.double(), "y": torch.arange(8), "position": torch.tensor(positions)}
    got = training_inputs(recipe, batch, Latents(scale, shift))
    assert got["u"].tolist() == [uniform(seed, TIME, p) for p in positions]
    kept = [uniform(seed, LABEL_DROP, p) >= 0.5 for p in positions]
    assert 2 < sum(kept) < 6
    assert got["y"].tolist() == [y if keep else 10 for y, keep in enumerate(kept)]
    for row, position in enumerate(positions):
        assert got["noise"][row].flatten().tolist() == pytest.approx(normal(seed, NOISE, position, 12), abs=2e-5)
        want = [(mean + deviation * draw - shift) * scale for draw in normal(seed, LATENT, position, 12)]
        assert got["x"][row].flatten().tolist() == pytest.approx(want, abs=2e-5)


@pytest.fixture(scope="module")
def three_images(tmp_path_factory):
    """Shards of three images of 2 x 2 pixels, no two pixels of which are alike; image i has class i."""
    folder = tmp_path_factory.mktemp("images")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(3):
            file = io.BytesIO()
            Image.fromarray(np.array(PIXELS[i], np.uint8)).save(file, "PNG")
            for extension, content in (("png", file.getvalue()), ("cls", str(i).encode())):
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    shards = [{"name": "a.tar", "samples": 3, "bytes": (folder / "a.tar").stat().st_size, "sha256": ""}]
    manifest = {"format": "moe-dit-shards-1", "kind": "pixels", "samples": 3, "classes": ["a", "b", "c"]}
    manifest |= {"sample_shape": [3, 2, 2], "scale": None, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_manifest(folder)


PIXELS = [
    [[[0, 51, 255], [102, 153, 204]], [[10, 20, 30], [40, 50, 60]]],
    [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [11, 12, 13]]],
    [[[91, 92, 93], [94, 95, 96]], [[97, 98, 99], [81, 82, 83]]],
]  # image, row, column, channel


def test_the_order_of_samples_and_their_flips(three_images):
    """Four epochs of three images: numpy's own permutation of each, and columns turned round where a draw says so."""
    seed, flipped = 5, set()
    samples = TrainingSamples(ShardReader(three_images), seed, horizontal_flip=0.5)
    batch = samples.__getitems__(list(range(12)))
    orders = [np.random.Generator(np.random.Philox(key=[seed, 2**32 + epoch])).permutation(3) for epoch in range(4)]
    assert batch["y"].tolist() == np.concatenate(orders).tolist() and len({tuple(order) for order in orders}) > 1
    for position in range(12):
        image = np.array(PIXELS[batch["y"][position]])
        if uniform(seed, FLIP, position) < 0.5:
            flipped.add(position)
            image = image[:, [1, 0]]
        assert batch["x"][position].permute(1, 2, 0).tolist() == image.tolist()
    assert 3 < len(flipped) < 9


def test_pixels_reach_the_network_between_minus_one_and_one():
    recipe = load_recipe("digits_pixels")
    x = torch.tensor([0, 51, 102, 153, 204, 255], dtype=torch.uint8).view(1, 3, 2, 1)
    got = training_inputs(recipe, {"x": x, "y": torch.zeros(1).long(), "position": torch.zeros(1).long()}, Latents())
    assert got["x"].flatten().tolist() == pytest.approx([-1, -0.6, -0.2, 0.2, 0.6, 1], abs=1e-6)


# --- what a router and a fresh network are ----------------------------------------------------------------------------


def test_auxiliary_losses_of_two_tokens():
    """Two experts, three of four choices for the first; P is the mean of (1/2, 1/2) and (9/10, 1/10)."""
    logits, scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), torch.tensor([[0.4, 0.4], [0.9, 0.1]])
    counts = torch.tensor([3, 1])
    assert load_loss(logits, scores, counts).item() == pytest.approx(1.5 * 0.7 + 0.5 * 0.3)
    assert z_loss(logits, scores, counts).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_a_capacity_predictor_sends_no_gradient_into_the_network():
    """Its loss of one token of two for one expert: sigmoid(0) each, and nothing for what it is predicted from."""
    layer = ExpertChoiceMoE(2, 2, num_experts=1, capacity=0.5, capacity_loss_weight=3.0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(0.5)
        layer.capacity_predictor[2].weight.zero_()
        layer.capacity_predictor[2].bias.zero_()
    x = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], requires_grad=True)
    layer(x)
    loss = layer.layer_losses["capacity_loss"]
    assert loss.item() == pytest.approx(3 * math.log(2))
    assert torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(loss, layer.capacity_predictor[2].weight)[0].shape == (1, 2)


def test_imbalance_is_the_worst_layer_s():
    assert imbalance(torch.tensor([[2.0, 2, 2, 2], [6, 1, 1, 0], [3, 2, 2, 1]])) == 3.0


@pytest.mark.parametrize("name", ["digits", "digits_diffmoe", "digits_pixels"])
def test_the_embedders_of_time_and_label_begin_small(name):
    """DiT's 0.02, for both; Xavier's spread would be three to six times that."""
    weights = dict(build_model(name).named_parameters())
    for key in ("time.linear_1.weight", "time.linear_2.weight", "label.weight"):
        assert weights[f"c_embedder.{key}"].std().item() == pytest.approx(0.02, rel=0.1)


# --- samples ----------------------------------------------------------------------------------------------------------


def export_tiny(folder, recipe, seed):
    """An exported model of random weights: a fresh one gives zeros."""
    model, generator = build_model(recipe), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    save_export(model, recipe, folder)
    return folder


@pytest.fixture(scope="module")
def pixel_recipe():
    tiny = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "model.bottleneck_dim=8", "sampling.steps=4"]
    tiny += ["model.input_size=8", "model.patch_size=4", "model.in_context_start=1", "model.moe.expert_width=8"]
    return load_recipe("digits_pixels", tiny)


@pytest.fixture(scope="module")
def pixel_model(pixel_recipe, tmp_path_factory):
    """A JiT that samples by 4 of Heun's steps, with guidance 2 for t in (0.1, 1)."""
    return export_tiny(tmp_path_factory.mktemp("model") / "model", pixel_recipe, 0)


def sample_by_hand(model, seed, index, label, *, steps, heun, scale, low, high):
    """One image of a network that predicts data, uint8 [8, 8, 3], a number at a time as the papers say it."""

    def velocity(z, t):
        def towards(y):
            with torch.no_grad():
                return (model(z, torch.tensor([t]), torch.tensor([y])) - z) / max(1 - t, 0.05)

        return towards(10) + scale * (towards(label) - towards(10)) if low < t < high else towards(label)

    z = torch.tensor(normal(seed, SAMPLE_NOISE, index, 3 * 8 * 8)).view(1, 3, 8, 8)
    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        v = velocity(z, t)
        if heun and step < steps - 1:  # the last one is Euler's
            v = (v + velocity(z + v / steps, t_next)) / 2
        z = z + v / steps
    return ((z[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("flags", "want", "others"),
    [
        (  # the recipe's own
            [],
            {"heun": True, "scale": 2.0, "low": 0.1, "high": 1.0},
            [{"heun": False}, {"low": -1.0}, {"scale": 1.0}],
        ),
        (
            ["--method", "euler", "--cfg-scale", 3, "--cfg-interval", 0.2, 0.6, "--labels", "random"],
            {"heun": False, "scale": 3.0, "low": 0.2, "high": 0.6},
            [{"heun": True}, {"low": 0.3}, {"low": -1.0}, {"high": 1.0}, {"scale": 2.0}],
        ),
    ],
    ids=["recipe", "flags"],
)
def test_samples_follow_the_recipe_and_the_flags(pixel_model, tmp_path, flags, want, others):
    seed, num = 2**33 + 6, 4
    flags = ["--model", pixel_model, "--num", num, "--seed", seed, "--out", tmp_path / "samples", *flags]
    assert call("eval.sample", *flags) == 0
    labels = [int(10 * uniform(seed, SAMPLE_LABEL, i)) for i in range(num)] if "random" in flags else list(range(num))
    found = sorted((tmp_path / "samples/images").iterdir())
    assert [path.name for path in found] == [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    model, settings = load_model(pixel_model), {"steps": 4} | want

    def distance(settings):
        wanted = [sample_by_hand(model, seed, i, label, **settings) for i, label in enumerate(labels)]
        return max(np.abs(np.asarray(Image.open(path)) - want).max() for path, want in zip(found, wanted, strict=True))

    assert distance(settings) <= 1
    assert all(distance(settings | other) > 5 for other in others)  # so that each setting is seen


def test_samples_of_other_weights_are_not_continued(pixel_model, pixel_recipe, tmp_path, capfd):
    """The same network, moved by other random numbers."""
    other = export_tiny(tmp_path / "other", pixel_recipe, 1)
    assert call("eval.sample", "--model", pixel_model, "--num", 2, "--steps", 1, "--out", tmp_path / "samples") == 0
    capfd.readouterr()
    assert call("eval.sample", "--model", other, "--num", 4, "--steps", 1, "--out", tmp_path / "samples") == 2
    assert "model_sha256 was" in capfd.readouterr().err


def test_images_are_rounded_to_the_nearest_grey():
    values = torch.tensor([-2, -1, -0.9, 0.1, 0.105, 0.5, 1, 3])
    assert to_uint8(values).tolist() == [0, 0, 13, 140, 141, 191, 255, 255]


# --- scores -----------------------------------------------------------------------------------------------------------


def clusters(*centres, count=40):
    """Features around the centres, the same offsets around each."""
    offsets = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return torch.cat([offsets + centre for centre in centres])


def scores_of(made, real):
    """What eval.score says of these features."""
    samples = features.Features({"features": made, "logits": torch.zeros(len(made), 2)}, None)
    truth = features.Survey({"features": metrics.moments(real)}, {"features": real}, len(real))
    return score.compute(samples, truth, features.Extractor([], torch.device("cpu")))


def test_precision_is_of_the_samples_and_recall_of_the_real_images():
    """Samples of one of two kinds of real images are all real, and show half of the kinds."""
    result = scores_of(clusters(0.0), clusters(0.0, 100.0))
    assert (result["precision"], result["recall"]) == (1.0, 0.5)
    result = scores_of(clusters(0.0, 100.0, 200.0, 300.0), clusters(0.0))
    assert (result["precision"], result["recall"]) == (0.25, 1.0)


def test_recall_asks_for_every_class_of_a_large_reference(monkeypatch):
    """Real images come class by class: of two classes, samples show the first, and half of the images are looked at."""
    monkeypatch.setattr(features, "KEPT", 40)
    real = clusters(0.0, 100.0)[features.evenly(80)]
    assert len(real) == 40 and scores_of(clusters(0.0), real)["recall"] == 0.5


def test_kid_is_the_unbiased_distance_of_all_features():
    """Of the kernel (x . y / D + 1)^3 (arXiv:1801.01401, eq. 4); a subset that is the whole leaves no spread."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(150, 4)), generator.normal(0.5, 1.2, size=(150, 4))

    def kernel(a, b):
        return (a @ b.T / 4 + 1) ** 3

    inside = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (150 * 149) for a in (x, y))
    mean, deviation = metrics.kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(inside - 2 * kernel(x, y).mean(), rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_held_out_accuracy_is_of_images_that_were_not_fitted(tmp_path):
    """Of noise, with labels that mean nothing, a classifier can learn the images by heart and no more."""
    generator = np.random.default_rng(0)
    for i in range(100):
        path = tmp_path / f"{i % 5}/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    extractor = features.fit(reference_images(tmp_path), 32)
    assert extractor.held_out_accuracy < 0.5
