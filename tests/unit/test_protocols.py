"""Scores by each protocol against independent programs and formulas, references in files, and uncertainty."""

import hashlib
import json

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
import torch_fidelity
from PIL import Image
from pytorch_fid import inception as pytorch_fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from eval import features, metrics, sample, score
from eval.images import any_images, read_image
from eval.protocols import PROTOCOLS
from eval.sample_folder import export_npz
from helpers import call, refused
from helpers.feature_spaces import Tiny
from helpers.pictures import KINDS, SIDE, arrays, picture, write_pictures
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of seeded Inception weights, of the kind that torch-fidelity reads."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    torch.save({}, path)
    torch.manual_seed(0)
    blank = Blank("blank", ["2048"], feature_extractor_weights_path=path)
    for module in blank.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
    torch.nn.init.normal_(blank.fc.weight, std=0.05)
    torch.save(blank.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images in class folders, 25 a class; and samples of two of the classes under any names."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    write_pictures(folder / "real", dict.fromkeys(KINDS, 25), generator)
    (folder / "samples").mkdir()
    for k, kind in enumerate(list(KINDS)[:2]):
        for i in range(25):
            picture(kind, generator).save(folder / "samples" / f"sample {k} {i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """As few as can be scored, for networks that take a fifth of a second for each: 10 real images, 12 samples."""
    folder = tmp_path_factory.mktemp("few")
    generator = np.random.default_rng(0)
    write_pictures(folder / "real", {"a": 5, "b b": 5}, generator)
    (folder / "flat").mkdir()
    for path in (folder / "real").rglob("*.png"):
        (folder / "flat" / f"{path.parent.name}{path.name}").symlink_to(path)
    (folder / "samples").mkdir()
    for i, kind in enumerate(["a"] * 9 + ["c"] * 3):
        picture(kind, generator).save(folder / "samples" / f"sample {i:03d}.png")
    return folder


def scored(*command, out):
    assert call("eval.score", *command, "--out", out) == 0
    return json.loads(out.read_text())


# --- the evaluators of others -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eigenvalues():
    """numpy's, of a matrix that is met again those found before: of 2048 features they take 3 s."""
    compute, known = np.linalg.eigvals, {}

    def found(matrix):
        key = hashlib.sha256(matrix.tobytes()).digest()
        if key not in known:
            known[key] = compute(matrix)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.linalg, "eigvals", found)
        yield


@pytest.fixture(scope="module")
def theirs(few, inception, eigenvalues):
    """torch-fidelity's scores of the few samples; and features by its layers, pool and spatial, samples before real."""
    found = {"pool": [], "spatial": []}

    class Watched(FeatureExtractorInceptionV3):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.AvgPool.register_forward_hook(lambda *of: found["pool"].append(of[2].flatten(1)))
            self.Mixed_6d.branch1x1.register_forward_hook(lambda *of: found["spatial"].append(of[2]))

    kinds = {"isc": True, "fid": True, "kid": True, "prc": True, "kid_subset_size": 10, "verbose": False}
    kinds |= {"feature_extractor": "watched", "feature_layer_prc": "2048", "save_cpu_ram": True}  # by no processes
    given = {"input1": str(few / "samples"), "input2": str(few / "flat"), "cuda": False, "cache": False}
    given |= {"feature_extractor_weights_path": str(inception)}
    FEATURE_EXTRACTORS_REGISTRY["watched"] = Watched
    try:
        scores = torch_fidelity.calculate_metrics(**given, **kinds)
    finally:
        del FEATURE_EXTRACTORS_REGISTRY["watched"]
    pool = [part.double().numpy() for part in found["pool"]]
    spatial = [part[:, :7].permute(0, 2, 3, 1).flatten(1).double().numpy() for part in found["spatial"]]
    assert [len(part) for part in pool + spatial] == [12, 10] * 2
    return scores, pool, spatial


def test_fidelity_is_torch_fidelity(few, inception, theirs, tmp_path):
    want = theirs[0]
    found = scored(few / "samples", "--reference", few / "flat", "--inception", inception, out=tmp_path / "a.json")
    pairs = {"fid": "frechet_inception_distance", "inception_score": "inception_score_mean"}
    pairs |= {"inception_score_std": "inception_score_std", "kid": "kernel_inception_distance_mean"}
    pairs |= {"precision": "precision", "recall": "recall"}
    for ours, theirs_ in pairs.items():
        assert found[ours] == pytest.approx(want[theirs_], rel=1e-6, abs=1e-6), ours
    assert found["protocol"] == "fidelity" and found["fid"] > 1 and "samples are few" in found["warning"]


def adm_distance(x, y, mean=None, covariance=None):
    """The evaluator's Frechet distance; tr((S1 S2)^1/2) is the nuclear norm of the centred features' products."""
    a = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    if mean is None:
        b = (y - y.mean(0)) / np.sqrt(len(y) - 1)
        trace = scipy.linalg.svdvals(a @ b.T).sum()
        return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace
    values = scipy.linalg.eigvalsh(a @ covariance @ a.T)  # of S1^1/2 S2 S1^1/2, on the span of the samples
    trace = np.sqrt(values.clip(0)).sum()
    return ((x.mean(0) - mean) ** 2).sum() + (a**2).sum() + np.trace(covariance) - 2 * trace


def test_adm_is_openai_s_evaluator(few, inception, theirs, tmp_path):
    """mu, sigma, mu_s and sigma_s are the file's, precision and recall of its arr_0; the score's parts unshuffled.

    The features are torch-fidelity's, the evaluator's arithmetic on them is done here.
    """
    real, made = arrays(few / "real"), arrays(few / "samples")
    _, (mine, pool), (mine_spatial, spatial) = theirs
    generator = np.random.default_rng(1)
    more, more_spatial = (np.concatenate([x, x + 0.1 * generator.normal(size=x.shape)]) for x in (pool, spatial))
    known = {"mu": more.mean(0), "sigma": np.cov(more, rowvar=False)}
    known |= {"mu_s": more_spatial.mean(0), "sigma_s": np.cov(more_spatial, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=real, **known)
    np.savez(tmp_path / "samples.npz", made)  # as ADM's sampler writes them
    flags = ["--reference", tmp_path / "adm.npz", "--inception", inception, "--protocol", "adm"]
    found = scored(tmp_path / "samples.npz", *flags, out=tmp_path / "a.json")
    fid = adm_distance(mine, None, known["mu"], known["sigma"])
    sfid = adm_distance(mine_spatial, None, known["mu_s"], known["sigma_s"])
    assert found["fid"] == pytest.approx(fid, rel=1e-4) and found["sfid"] == pytest.approx(sfid, rel=1e-4)
    logits = mine @ torch.load(inception)["fc.weight"].double().numpy().T
    p = np.exp(logits - scipy.special.logsumexp(logits, axis=1, keepdims=True))
    score_ = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())  # fewer than 5,000: one part
    assert found["inception_score"] == pytest.approx(score_, rel=1e-4)
    assert (found["precision"], found["recall"]) == pytest.approx(adm_precision_recall(pool, mine))
    assert 0 < found["recall"] < 1 and 0 < found["precision"] < 1
    assert found["protocol"] == "adm" and found["num_samples"] == 12


def adm_precision_recall(real, made):
    distances = scipy.spatial.distance.cdist

    def radii(x):
        return np.partition(distances(x, x), 3, axis=1)[:, 3]

    between = distances(made, real)
    return (between <= radii(real)).any(1).mean(), (between <= radii(made)[:, None]).any(0).mean()


def test_adm_s_parts_are_in_the_samples_own_order(monkeypatch):
    """A part of two labels as often says 2, one of a single label 1; shuffled, both would say more."""
    monkeypatch.setattr(metrics, "ADM_SPLIT", 50)
    logits = torch.zeros(100, 4)
    logits[:25, 0] = logits[25:50, 1] = logits[50:, 2] = 100.0
    assert metrics.inception_score(logits, shuffle=False) == (pytest.approx(1.5), pytest.approx(0.5))
    assert metrics.inception_score(logits)[0] > 2


def test_diffmoe_is_pytorch_fid_on_floats(inception, monkeypatch):
    weights = torch.load(inception)
    monkeypatch.setattr(pytorch_fid, "load_state_dict_from_url", lambda *_, **__: weights)
    want = pytorch_fid.InceptionV3([3]).eval()
    ours = features.Inception(str(inception), half_pixel=True)
    images = torch.rand(2, 3, 50, 50, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        expected = want(images / 255)[0].flatten(1)
        torch.testing.assert_close(ours(images)["features"], expected, rtol=1e-5, atol=1e-5)
        other = features.Inception(str(inception))(images)["features"]
    assert (other - expected).abs().max() > 1e-3  # the resize matters
    protocol = PROTOCOLS["diffmoe"]
    assert protocol.half_pixel and not protocol.rounded


def test_floats_are_not_rounded():
    from eval.generate import to_floats

    values = to_floats(torch.tensor([-1.1, -1.0, 0.0, 0.001, 1.0]))
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 128.0, 128.1275, 255.0]))


def test_jit_gives_fid_and_inception_score_alone(few, inception, tmp_path):
    np.savez(tmp_path / "jit.npz", mu=np.full(2048, 0.5), sigma=np.diag(1.0 * (np.arange(2048) < 20)))
    np.savez(tmp_path / "some.npz", arrays(few / "samples")[:10])
    flags = ["--reference", tmp_path / "jit.npz", "--inception", inception, "--protocol", "jit"]
    found = scored(tmp_path / "some.npz", *flags, out=tmp_path / "a.json")
    assert found["protocol"] == "jit" and found["fid"] > 0
    assert found["kid"] is found["precision"] is found["density"] is None and "sfid" not in found


# --- references -------------------------------------------------------------------------------------------------------


def test_a_reference_of_shards_is_that_of_the_folder(folders, tmp_path):
    """75 images in another order, in batches of 64."""
    shards = tmp_path / "shards"
    assert call("data_prep.pack_pixels", "--images", folders / "real", "--out", shards, "--size", SIDE) == 0
    extractor = features.Extractor([Tiny()], torch.device("cpu"))
    one, two = (features.survey(extractor, any_images(path), SIDE, "test") for path in (folders / "real", shards))
    for of in ("mu", "sigma"):
        ours, theirs = (getattr(found.moments["features"], of).numpy() for found in (one, two))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    images = any_images(folders / "real")
    x = torch.stack([read_image(image) for image in images])
    with torch.no_grad():
        x = Tiny()(x)["features"].double().numpy()
    np.testing.assert_allclose(one.moments["features"].sigma, np.cov(x, rowvar=False), rtol=1e-5)


def test_a_reference_of_any_size_keeps_a_few_rows(folders, monkeypatch):
    class Spatial(Tiny):
        def forward(self, images):
            found = super().forward(images)
            return found | {"spatial": found["features"][:, :7] ** 2, "logits": found["features"]}

    monkeypatch.setattr(features, "KEPT", 10)
    extractor = features.Extractor([Spatial()], torch.device("cpu"))
    images = any_images(folders / "real")
    found = features.survey(extractor, images, SIDE, "test")
    whole = features.extract(extractor, images, SIDE, "test").arrays
    chosen = [0, 8, 16, 25, 33, 41, 49, 58, 66, 74]
    torch.testing.assert_close(found.rows["features"], whole["features"][chosen])
    assert found.rows.keys() == {"features"} and found.count == 75
    for name in ("features", "spatial"):
        x = whole[name].double().numpy()
        np.testing.assert_allclose(found.moments[name].mu, x.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found.moments[name].sigma, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-12)


def test_dinov2_s_features_stand_beside_the_others(few, tmp_path, monkeypatch):
    """A small network of the same family, by timm's own loading and a hand-made resize."""
    import timm

    monkeypatch.setattr(features.DINOv2, "ARCHITECTURE", "vit_small_patch14_dinov2.lvd142m")
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    images = torch.stack([read_image(image) for image in any_images(few / "samples")[:2]])
    found = features.DINOv2(str(tmp_path / "dino.pth")).eval()(images)["dinov2"]
    x = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(found, network(x))
    monkeypatch.setattr(features.DINOv2, "SIDE", 56)  # enough to see that the scores are there
    flags = ["--reference", few / "real", "--dinov2", tmp_path / "dino.pth"]
    result = scored(few / "samples", *flags, out=tmp_path / "a.json")
    assert result["fd_dinov2"] > 0 and result["fd_dinov2_interval"][0] < result["fd_dinov2"]
    assert result["features"] == "fitted CNN (not comparable with published FID) and DINOv2"


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_the_error_is_the_bootstrap_s():
    """Against 200 real resamplings, of samples and of the reference."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(20, 20, generator=generator) / 4
    x = torch.randn(2000, 20, generator=generator) @ mix
    y = torch.randn(3000, 20, generator=generator) @ (mix + 0.1) + 0.7
    fid, of_samples, of_reference = metrics.Frechet(metrics.moments(y)).with_errors(metrics.moments(x), x, y)
    assert fid == pytest.approx(metrics.Frechet(metrics.moments(y)).distance(metrics.moments(x)), rel=1e-12)

    def resampled(of):
        return metrics.moments(of[torch.randint(len(of), (len(of),), generator=generator)])

    still = metrics.Frechet(metrics.moments(y))
    samples = np.std([still.distance(resampled(x)) for _ in range(200)])
    references = np.std([metrics.Frechet(resampled(y)).distance(metrics.moments(x)) for _ in range(200)])
    assert of_samples == pytest.approx(samples, rel=0.15) and of_reference == pytest.approx(references, rel=0.15)


def test_of_balanced_classes_the_error_is_what_samples_differ_by_within_them():
    """Against the spread of 200 sets that have 50 samples of each of 4 classes far apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = 3 * torch.randn(4, 6, generator=generator)
    exact = metrics.Frechet(metrics.moments(torch.randn(5000, 6, generator=generator) * 3 + 1))

    def drawn():
        return centres[labels] + torch.randn(200, 6, generator=generator)

    fids = [exact.distance(metrics.moments(drawn())) for _ in range(200)]
    told = [exact.with_errors(metrics.moments(x), x, None, labels)[1] for x in (drawn() for _ in range(10))]
    unbalanced = [exact.with_errors(metrics.moments(x), x)[1] for x in (drawn() for _ in range(10))]
    assert np.mean(told) == pytest.approx(np.std(fids), rel=0.15) and np.mean(unbalanced) > 2 * np.std(fids)


def test_half_against_the_other_half():
    """Of a set that is split in two 20 times, the interval of each split holds the mean of all."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) / 8
    whole = torch.cat([torch.randn(1000, 64, generator=generator) @ mix + k for k in range(3)])
    found = []
    extractor = features.Extractor([], torch.device("cpu"))
    for _ in range(20):
        one, two = whole[torch.randperm(3000, generator=generator)].split(1500)
        truth = features.Survey({"features": metrics.moments(two)}, {"features": two}, len(two))
        made = features.Features({"features": one, "logits": torch.zeros(len(one), 2)}, None)
        found.append(score.compute(made, truth, extractor, PROTOCOLS["jit"]))  # the same FID, without KID
    mean = np.mean([result["fid"] for result in found])
    holds = [low <= mean <= high for low, high in (result["fid_interval"] for result in found)]
    assert sum(holds) >= 18
    # Neither so wide that it says nothing: a shift by a fifth of the classes' distance is seen.
    moved = features.Features({"features": one + 0.2, "logits": torch.zeros(len(one), 2)}, None)
    shifted = score.compute(moved, truth, extractor, PROTOCOLS["jit"])
    assert shifted["fid_interval"][0] > mean


def test_fid_infinity_takes_the_bias_away():
    """Of 300 samples of a Gaussian against its exact moments, FID is all bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 30, generator=generator)
    exact = metrics.Frechet(metrics.Moments(torch.zeros(30, dtype=torch.float64), torch.eye(30, dtype=torch.float64)))
    halves = [metrics.Sums(30) for _ in range(2)]
    for half, part in zip(halves, x.split(150), strict=True):
        half.add(part)
    fid = exact.distance(metrics.moments(x))
    assert fid > 0.5 and abs(metrics.fid_infinity(exact, fid, halves)) < 0.15 * fid


def test_density_and_coverage_are_prdc_s():
    """By the definitions (arXiv:2002.09797, eq. 3 and 4), with numpy."""
    generator = np.random.default_rng(0)
    made, real = generator.normal(size=(60, 5)), generator.normal(0.3, 1.2, size=(80, 5))
    distances = scipy.spatial.distance.cdist(made, real)
    radii = np.sort(scipy.spatial.distance.cdist(real, real), axis=1)[:, 5]
    found = metrics.neighbour_scores(torch.from_numpy(made), torch.from_numpy(real))
    assert found["density"] == pytest.approx((distances <= radii).sum() / (5 * 60))
    assert found["coverage"] == pytest.approx((distances.min(axis=0) <= radii).mean())
    assert (found["precision"], found["recall"]) == pytest.approx(adm_precision_recall(real, made))
    blocks = metrics.BLOCK
    metrics.BLOCK = 7
    try:
        assert metrics.neighbour_scores(torch.from_numpy(made), torch.from_numpy(real)) == pytest.approx(found)
    finally:
        metrics.BLOCK = blocks


def test_a_difference_comes_with_whether_it_is_one(folders, tmp_path):
    """Against itself none; noise differs; another protocol cannot be compared."""
    assert call("eval.reference", folders / "real", "--out", tmp_path / "real.npz") == 0
    flags = ["--reference", tmp_path / "real.npz"]
    scored(folders / "samples", *flags, out=tmp_path / "a.json")
    same = scored(folders / "samples", *flags, "--against", tmp_path / "a.json", out=tmp_path / "b.json")["against"]
    assert same["fid_difference"] == pytest.approx(0, abs=1e-9) and same["differs"] is False
    (tmp_path / "noise").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, SIDE, SIDE, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / f"noise/{i}.png")
    noise = scored(tmp_path / "noise", *flags, "--against", tmp_path / "a.json", out=tmp_path / "c.json")["against"]
    assert noise["differs"] is True and noise["fid_difference"] > 0
    other = json.loads((tmp_path / "a.json").read_text()) | {"protocol": "adm"}
    with pytest.raises(InputError, match="protocol"):
        score.difference(json.loads((tmp_path / "b.json").read_text()), other, "x")


# --- forms of images --------------------------------------------------------------------------------------------------


def test_arrays_of_images_are_images(folders, tmp_path):
    images = arrays(folders / "samples")
    np.savez(tmp_path / "a.npz", images, np.arange(50) % 3)
    listed = any_images(tmp_path / "a.npz")
    assert len(listed) == 50 and [image.label for image in listed[:4]] == [0, 1, 2, 0]
    for i in (0, 17, 49):
        assert (read_image(listed[i]).permute(1, 2, 0).numpy() == images[i]).all()
    np.savez_compressed(tmp_path / "b.npz", images)
    np.savez(tmp_path / "c.npz", images.astype(np.float32))
    for name, line in (("b", "compressed"), ("c", "uint8")):
        with pytest.raises(InputError, match=line):
            any_images(tmp_path / f"{name}.npz")


def test_exported_arrays_are_the_images(folders, tmp_path):
    """What eval.sample --export-npz writes, by numpy."""
    (tmp_path / "images").mkdir()
    images = arrays(folders / "samples")
    for i in (2, 0, 1):
        Image.fromarray(images[i]).save(tmp_path / "images" / f"{i:06d}_{i + 4}.png")
    export_npz(tmp_path, 3, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as found:
        assert (found["arr_0"] == images[:3]).all() and found["arr_1"].tolist() == [4, 5, 6]
    assert [image.label for image in any_images(tmp_path / "a.npz")] == [4, 5, 6]


@pytest.fixture(scope="module")
def bad(folders, inception, tmp_path_factory):
    """Words of the cases below, and the paths they stand for."""
    folder = tmp_path_factory.mktemp("bad")
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(folder / "plain.npz", **moments)
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez(folder / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2048))
    about = {"format": "moe-dit-reference-1", "protocol": "diffmoe", "count": 9, "networks": ["x"]}
    np.savez(folder / "half.npz", **moments, about=np.array(json.dumps(about)))
    np.savez(folder / "others.npz", **moments, about=np.array(json.dumps(about | {"protocol": "fidelity"})))
    np.savez(folder / "cut.npz", arrays(folders / "samples"))
    with open(folder / "cut.npz", "r+b") as file:
        file.truncate(50_000)
    for name, count in (("few", 3), ("mixed", 12), ("corrupt", 12)):
        (folder / name).mkdir()
        for i in range(count):
            side = SIDE + 8 if (name, i) == ("mixed", 5) else SIDE
            Image.new("RGB", (side, side)).save(folder / name / f"{i}.png")
    (folder / "corrupt" / "4.png").write_bytes(b"\x89PNG no image")
    return {"SAMPLES": folders / "samples", "REAL": folders / "real", "TMP": folder, "WEIGHTS": inception}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("eval.score SAMPLES --reference REAL --protocol adm", "--inception"),
        ("eval.score SAMPLES --reference REAL --protocol nonsense", "--protocol"),
        ("eval.score SAMPLES --reference TMP/nan.npz --inception WEIGHTS", "not finite"),
        ("eval.score SAMPLES --reference TMP/pickled.npz --inception WEIGHTS", "pickle"),
        ("eval.score SAMPLES --reference TMP/plain.npz --inception WEIGHTS --protocol adm", "mu_s"),
        ("eval.score SAMPLES --reference TMP/half.npz --inception WEIGHTS", "resized otherwise"),
        ("eval.score SAMPLES --reference TMP/half.npz --inception WEIGHTS --protocol jit", "resized otherwise"),
        ("eval.score SAMPLES --reference TMP/others.npz --inception WEIGHTS", "was made with"),
        ("eval.score TMP/mixed --reference REAL", "mixes images"),
        ("eval.score TMP/corrupt --reference REAL", "cannot be read"),
        ("eval.score TMP/few --reference REAL", "at least 10"),
        ("eval.score SAMPLES --reference TMP/few", "at least 10"),
        ("eval.score TMP/cut.npz --reference REAL", "damaged"),
        ("eval.score SAMPLES --reference REAL --dinov2 TMP/none.pth", "--dinov2"),
        ("eval.score SAMPLES --reference REAL --against TMP/none.json", "no scores"),
        ("eval.score SAMPLES --reference REAL --out TMP", "folder"),
        ("eval.reference TMP/none --out TMP/x.npz", "no reference"),
        ("eval.reference REAL --out TMP/x.json", ".npz"),
        ("eval.reference REAL --out TMP/few/x/y.npz", "no folder"),
        ("eval.reference REAL --out TMP/plain.npz", "other"),
        ("eval.reference TMP/mixed --out TMP/x.npz", "--size"),
        ("eval.reference REAL --protocol adm --out TMP/x.npz", "--inception"),
        ("eval.reference REAL --size 0 --out TMP/x.npz", "--size"),
    ],
)
def test_bad_input_is_one_line(line, says, bad, capfd):
    for word, path in bad.items():
        line = line.replace(word, str(path))
    assert says in refused(capfd, *line.split(), harmless=bad["TMP"])


@pytest.mark.parametrize(
    ("num", "size", "device", "coupled", "batch"),
    [
        (50_000, 8, "cuda", False, 256),
        (50_000, 512, "cuda", False, 98),  # 511 batches; of 256 there would be 196
        (50_000, 512, "cuda", True, 256),  # a batch is part of what DiffMoE computes
        (40, 1, "cpu", False, 40),
        (1000, 2, "cpu", False, 64),
    ],
)
def test_no_rank_idles(num, size, device, coupled, batch, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
    assert sample.usual_batch(num, torch.device(device), coupled) == batch
