"""Sampling, scores and report, held against closed forms and a sampler written by hand."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_digits
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval import features, metrics, plots
from eval.images import read_image, reference_images
from helpers import call, refused
from helpers.sampling import CLASSES, SIZE, assert_same, pictures, write_model
from moe_dit import load_model
from moe_dit.events import record
from moe_dit.randomness import Stream, normal

# --- a tiny model, its VAE, and real images ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Class folders of real digits, as many others as a samples folder, and a few real ones by themselves."""
    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    (folder / "unseen" / "images").mkdir(parents=True)
    # Shuffled: the digits come in the order 0, 1, 2, ...
    for i, chosen in enumerate(np.random.default_rng(0).permutation(len(data.images))[:600]):
        pixels, label = data.images[chosen], data.target[chosen]
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        path = folder / "real" / str(label) / f"{i}.png" if i % 2 else folder / "unseen/images" / f"{i:06d}_{label}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    for path in (folder / "real").iterdir():
        (folder / "few" / path.name).mkdir(parents=True)
        for image in sorted(path.iterdir())[:8]:
            (folder / "few" / path.name / image.name).symlink_to(image)
    return folder


# --- the scores -------------------------------------------------------------------------------------------------------


def gaussian(mean, deviations, n=500):
    """Features whose sample mean and covariance are exactly these (covariance diagonal)."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x * torch.tensor(deviations, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_fid_of_gaussians_is_the_closed_form():
    """|mu1 - mu2|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    a, b = gaussian([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), gaussian([1.0, 1.0, 0.0], [2.0, 2.0, 0.5])
    fid = metrics.Frechet(metrics.moments(b)).distance(metrics.moments(a))
    assert fid == pytest.approx(1 + 4 + 1 + 0 + 2.5**2, abs=1e-6)


def test_inception_score_of_certain_labels_is_their_number():
    logits = 100.0 * torch.eye(4).repeat(1000, 1)
    assert metrics.inception_score(logits)[0] == pytest.approx(4, rel=1e-2)
    assert metrics.inception_score(torch.zeros(100, 4))[0] == pytest.approx(1)


def test_precision_recall_and_kid_of_equal_and_of_distant_features():
    a = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    same, distant = metrics.neighbour_scores(a, a), metrics.neighbour_scores(a, a + 100)
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)
    assert set(distant.values()) == {0.0}
    b = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    assert abs(metrics.kernel_distance(a, b)[0]) < 0.05 < 1 < metrics.kernel_distance(a, b + 3)[0]


def test_real_images_score_well_and_noise_badly(digits, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "noise/images").mkdir(parents=True)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / f"noise/images/{i:06d}_{i % 10}.png")
    assert call("eval.reference", digits / "real", "--out", tmp_path / "real.npz") == 0  # one classifier is fitted
    flags = ["--reference", tmp_path / "real.npz"]
    assert call("eval.score", digits / "unseen", *flags, "--out", tmp_path / "good.json") == 0
    assert call("eval.score", tmp_path / "noise", *flags) == 0
    good = json.loads((tmp_path / "good.json").read_text())
    bad = json.loads((tmp_path / "noise/metrics.json").read_text())
    assert good["fid"] * 20 < bad["fid"] and good["kid"] * 20 < bad["kid"]
    assert good["precision"] > 0.8 and good["recall"] > 0.8 and bad["precision"] < 0.2
    assert good["held_out_accuracy"] > 0.9 and good["label_agreement"] > 0.9 and bad["label_agreement"] < 0.3
    assert good["inception_score"] > 5 > 2 > bad["inception_score"]
    assert (good["num_samples"], good["num_reference"]) == (300, 300)
    assert "not comparable" in good["features"]


def test_pixel_shards_and_their_folder_are_the_same_reference(digits, tmp_path):
    shards = tmp_path / "shards"
    assert call("data_prep.pack_pixels", "--images", digits / "real", "--out", shards, "--size", SIZE) == 0
    packed, loose = reference_images(shards), reference_images(digits / "real")

    def contents(images):
        return sorted((image.label, read_image(image).numpy().tobytes()) for image in images)

    assert contents(packed) == contents(loose)


def test_inception_weights(tmp_path):
    """torch-fidelity's own class, filled with random weights of the right shapes."""

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    torch.save({}, tmp_path / "empty.pth")
    blank = Blank("blank", ["2048"], feature_extractor_weights_path=tmp_path / "empty.pth")
    torch.save(blank.state_dict(), tmp_path / "weights.pth")
    extractor = features.Inception(str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = blank(images)[0]
        found = extractor(images)
    torch.testing.assert_close(found["features"], want)
    assert found["logits"].shape == (1, 1008)
    assert "not comparable" in extractor.title  # these are not the published weights


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(model, tmp_path_factory):
    """40 samples by one rank, in batches of 8."""
    out = tmp_path_factory.mktemp("sampled") / "samples"
    assert call("eval.sample", "--model", model, "--num", 40, "--out", out, "--batch", 8, "--local_rank=0") == 0
    return out


def test_samples_are_euler_steps_of_their_own_noise(model, sampled):
    """Sample 13, by hand: guidance 2 and 3 Euler steps in the recipe, label 13 mod 10."""
    network, vae = load_model(model), AutoencoderKL.from_pretrained(model.parent / "vae")
    z = normal(0, Stream.SAMPLE_NOISE, torch.tensor([13]), (4, SIZE // 2, SIZE // 2))
    with torch.no_grad():
        for step in range(3):
            t = torch.tensor([step / 3])
            label, null = (network(z, t, torch.tensor([y]))[:, :4] for y in (3, CLASSES))
            z = z + (null + 2.0 * (label - null)) / 3
        image = vae.decode(z / 0.5).sample[0].clamp(-1, 1)
    found = pictures(sampled)
    want = ((image + 1) * 127.5).round().int()
    assert want.float().std() > 5  # a grey square would say nothing
    assert (found["000013_3.png"] - want).abs().max() <= 1
    assert list(found) == [f"{i:06d}_{i % 10}.png" for i in range(40)]
    assert Image.open(sampled / "samples.png").size == (10 * (SIZE + 2) + 2, 4 * (SIZE + 2) + 2)


def test_more_samples_continue_and_other_settings_are_refused(model, sampled, tmp_path, capsys):
    out = tmp_path / "samples"
    assert call("eval.sample", "--model", model, "--num", 6, "--out", out, "--batch", 4) == 0
    stamp = (out / "images/000000_0.png").stat().st_mtime_ns
    assert call("eval.sample", "--model", model, "--num", 40, "--out", out, "--batch", 8) == 0
    assert_same(pictures(out), pictures(sampled))
    assert (out / "images/000000_0.png").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert call("eval.sample", "--model", model, "--num", 40, "--out", out, "--seed", 1, "--steps", 4) == 2
    error = capsys.readouterr().err
    assert "seed was 0 and is now 1" in error and "steps was 3 and is now 4" in error and "\n" not in error[:-1]
    assert_same(pictures(out), pictures(sampled))


def test_random_labels_do_not_depend_on_how_many_are_drawn(model, tmp_path):
    names = []
    for num in (3, 30):
        flags = ["--labels", "random", "--steps", 1, "--out", tmp_path / str(num)]
        assert call("eval.sample", "--model", model, "--num", num, *flags) == 0
        names.append(list(pictures(tmp_path / str(num))))
    assert names[1][:3] == names[0]
    assert len({name[-5] for name in names[1]}) > 5


def test_run_scores_as_sample_and_score_do(model, digits, sampled, tmp_path):
    """With features kept in batches of another size, sampled in two goes."""
    for num in (17, 40):
        flags = ["--reference", digits / "few", "--samples", tmp_path / "kept", "--batch", 5, "--num", num]
        assert call("eval.run", "--model", model, *flags, "--out", tmp_path / "run.json") == 0
    assert call("eval.score", sampled, "--reference", digits / "few", "--out", tmp_path / "two.json") == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("run.json", "two.json"))
    for key in ("fid", "inception_score", "kid", "precision", "recall", "label_agreement"):
        assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-4), key
    assert not list((tmp_path / "kept").glob("images/*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "run.json", "two.json"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(model, digits, sampled, tmp_path):
    """Words of the cases below, and the paths they stand for."""
    (tmp_path / "latents").mkdir()
    manifest = {"format": "moe-dit-shards-1", "kind": "latents", "samples": 1, "classes": ["0"], "scale": 1.0}
    manifest |= {"sample_shape": [8, 8, 8], "shards": [{"name": "a.tar", "samples": 1, "bytes": 0, "sha256": ""}]}
    (tmp_path / "latents/a.tar").touch()
    (tmp_path / "latents/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "empty/images").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "flat/a.png")
    for i in range(12):
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(tmp_path / f"flat/{i}.png")
    (tmp_path / "broken.pth").write_text("not weights")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    return {"MODEL": model, "DIGITS": digits / "real", "SAMPLED": sampled, "TMP": tmp_path}


SAMPLE, SCORE = "eval.sample --num 4 --out TMP/out --model ", "eval.score "


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SAMPLE + "TMP/none", "config.json"),
        (SAMPLE + "MODEL --vae TMP/none", "none"),
        (SAMPLE + "MODEL --num 0", "--num is 0"),
        (SAMPLE + "MODEL --steps x", "--steps"),
        (SAMPLE + "MODEL --cfg-interval 0.9 0.1", "0 <= LO <= HI <= 1"),
        (SAMPLE + "MODEL --save features", "--inception"),
        (SAMPLE + "MODEL --save features --reference TMP/small.npz", "--inception"),
        (SAMPLE + "MODEL --out TMP/broken.pth", "taken"),
        (SCORE + "TMP/none --reference DIGITS", "eval.sample"),
        (SCORE + "TMP/empty --reference DIGITS", "holds no samples"),
        (SCORE + "SAMPLED --reference TMP/none", "no reference"),
        (SCORE + "SAMPLED --reference TMP/empty", "images"),
        (SCORE + "SAMPLED --reference TMP/flat", "no labels"),
        (SCORE + "SAMPLED --reference TMP/latents", "pack_pixels"),
        (SCORE + "SAMPLED --reference TMP/small.npz", "--inception"),
        (SCORE + "SAMPLED --reference TMP/none.npz --inception download", "no reference"),
        (SCORE + "SAMPLED --reference TMP/other.npz --inception download", "mu and sigma"),
        (SCORE + "SAMPLED --reference TMP/small.npz --inception download", "shape"),
        (SCORE + "SAMPLED --reference DIGITS --inception TMP/none.pth", "no Inception weights"),
        (SCORE + "SAMPLED --reference DIGITS --inception TMP/broken.pth", "does not hold"),
        (SCORE + "SAMPLED --reference DIGITS --inception TMP/other.pth", "does not hold"),
        (SCORE + "SAMPLED --reference DIGITS --out TMP/none/a.json", "no folder"),
        ("eval.report --run TMP/empty --out TMP/a.html", "metrics.jsonl"),
        ("eval.run --model TMP/none --reference DIGITS --samples TMP/out", "config.json"),
    ],
)
def test_bad_input_is_one_line_and_harms_nothing(line, says, given, capfd):
    for word, path in given.items():
        line = line.replace(word, str(path))
    assert says in refused(capfd, *line.split(), harmless=given["TMP"])


# --- the report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page links to and shows."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.ids, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.text += data + "\n"


def assert_self_contained(page, text):
    """Nothing is fetched: links are data, or parts of the page that are there once."""
    assert len(page.ids) == len(set(page.ids))
    assert page.links and all(link.startswith("data:") or link.removeprefix("#") in page.ids for link in page.links)
    assert "script" not in page.tags and "@import" not in text and "<style type" not in text
    assert all(link in page.ids for link in re.findall(r"url\(#([^)]*)\)", text))
    assert text.count("url(") == text.count("url(#")


def test_report_is_whole_and_self_contained(sampled, tmp_path):
    run_folder = tmp_path / "digits <run>"
    run_folder.mkdir()
    load = [[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.0, 0.0, 0.5, 0.5]]
    with open(run_folder / "metrics.jsonl", "w") as file:
        for step in range(1, 201):
            record = {"step": step, "loss": 30 / step, "lr": 1e-3, "images_per_second": 100.0, "moe_imbalance": 1.5}
            file.write(json.dumps(record | ({"expert_load": load} if step % 50 == 0 else {})) + "\n")
        file.write('{"step": 201, "lo')
    (run_folder / "config.yaml").write_text("name: digits # <script>\n")
    scores = {"features": "fitted CNN", "num_samples": 40, "fid": 1.25, "inception_score": 9.0}
    scores |= {"inception_score_std": 0.1, "kid": None, "sampling": {"steps": 3, "vae": "hub/name"}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    flags = ["--samples", sampled, "--scores", tmp_path / "scores.json", "--out", tmp_path / "report.html"]
    assert call("eval.report", "--run", run_folder, *flags) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert_self_contained(page, text)
    assert page.tags.count("svg") == 6  # the loss for desks and phones, rate, speed, imbalance and load
    names = [name.partition("-")[2] for name in page.ids]
    assert names.count("raw") == names.count("smooth") == 5
    dead = [name for name in names if name.startswith("dead-")]
    assert dead == ["dead-2-0", "dead-2-1"] and "Without a token (layer.expert): 2.0, 2.1." in page.text
    assert [name for name in names if name.startswith("cell-")] == [f"cell-{i}-{j}" for i in range(3) for j in range(4)]
    assert len([name for name in names if name.startswith("legend-")]) == 5
    assert "MoE layer 0, expert 0: 70.00% of the tokens" in page.text and "loss (log scale)" in page.text
    assert page.text.index("Scores") < page.text.index("Loss")
    for piece in ("digits <run>", "Loss", "Expert load", "Samples", "Scores", "1.25", "9 ± 0.1", "<script>", "200"):
        assert piece in page.text, piece


def test_report_shows_held_out_losses_terms_and_looks(tmp_path):
    """Each in a drawing of its own; records of a step may come in two lines."""
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 101):
            record = {"step": step, "loss": 1.0, "mse": 0.9, "capacity_loss": 0.1, "moe_imbalance": 1.0}
            file.write(json.dumps(record) + "\n")
            if step % 50 == 0:
                held_out = {"held_out_loss": 1 + step / 100, "held_out_loss_by_time": [3.0, 2.0, 1.0, step / 25]}
                file.write(json.dumps({"step": step, "look_fid": 500 / step} | held_out) + "\n")
    (tmp_path / "looks").mkdir()
    for step, colour in ((9, "red"), (50, "red"), (100, "lime")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"looks/step_{step}.png")
    assert call("eval.report", "--run", tmp_path, "--out", tmp_path / "report.html") == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert_self_contained(page, text)
    titles = ["Loss", "Held-out loss", "Held-out loss by time", "Loss term capacity_loss", "Loss term mse"]
    titles += ["Course", "Looks"]
    assert re.findall("<h2>([^<]*)</h2>", text) == titles
    assert page.tags.count("svg") == 8
    assert "Step 100" in page.text and "At step 100" in page.text
    (shown,) = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]*)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(shown))).getpixel((0, 0)) == (0, 255, 0)
    # Bars over equal parts of t, in the ratio of the values: 3, 2, 1, 4.
    chart = next(svg for svg in re.findall("<svg.*?</svg>", text) if "held-out loss over t" in svg)
    heights = []
    for path in re.findall(r'd="([^"]*)"[^>]*style="[^"]*opacity: 0.8', chart):
        y = [float(point) for point in re.findall(r"[\d.]+ ([\d.]+)", path)]
        heights.append(max(y) - min(y))
    assert [height / heights[2] for height in heights] == pytest.approx([3, 2, 1, 4], rel=1e-2)


def test_curves_are_where_their_values_are():
    """Of 100 values falling by a factor of 1,000: equal steps across, equal factors down, the same text twice."""
    values = [10.0 ** (-3 * i / 99) for i in range(100)]
    drawing = plots.line_chart(range(100), values, "loss <x>")
    assert drawing == plots.line_chart(range(100), values, "loss <x>")
    assert "loss &lt;x&gt; (log scale)" in drawing and 'aria-label="loss &lt;x&gt; over steps"' in drawing
    raw = re.search(r'id="[^"]*-raw".*?d="([^"]*)"', drawing)[1]
    points = np.array([[float(x), float(y)] for x, y in re.findall(r"([\d.]+) ([\d.]+)", raw)])
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert x1 - x0 > 0.8 * plots.WIDTH and y1 > y0  # downwards in a picture
    np.testing.assert_allclose(points[:, 1], y0 + (points[:, 0] - x0) / (x1 - x0) * (y1 - y0), atol=0.1)


def test_smoothing_has_no_lag():
    """A mean of as many neighbours on both sides leaves a line where it is, and a step's middle at the step."""
    line = [3 + 2 * i for i in range(500)]
    assert plots.smooth(line, 50) == pytest.approx(line)
    step = plots.smooth([0.0] * 300 + [1.0] * 300, 50)
    assert step[299] == pytest.approx(25 / 51) and step[300] == pytest.approx(26 / 51) and step[270] == 0
    assert plots.smooth([5.0, 1.0, 4.0], 50)[0] == 5


def facts(tmp_path, scores, **recipe):
    """A run of one step with its facts, and its page."""
    record = {"step": 1, "loss": 1.0, "images_per_second": 0.002}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record | {"step": i}) + "\n" for i in (1, 2)))
    (tmp_path / "config.yaml").write_text(json.dumps(recipe))
    start = {"date": "2026-01-02T03:04:05Z", "commit": "0123456789abcdef", "ranks": 8, "machine": "GPU X"}
    start |= {"precision": "bf16", "zero_stage": 2, "expert_parallel": 4, "torch": "2.14.1"}
    start |= {"parameters": 96_870_000, "activated": 34_940_000}
    (tmp_path / "starts.json").write_text(json.dumps([start, start | {"date": "2026-01-05T00:00:00Z"}]))
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    flags = ["--scores", tmp_path / "scores.json", "--out", tmp_path / "a.html"]
    assert call("eval.report", "--run", tmp_path, *flags) == 0
    return Page((tmp_path / "a.html").read_text()).text


def test_the_report_says_what_a_run_was_and_what_is_published(tmp_path):
    scores = {"features": "Inception V3", "num_samples": 50_000, "num_reference": 1_281_167, "protocol": "diffmoe"}
    scores |= {"fid": 15.25, "fid_interval": [15.0, 15.5], "inception_score": 90.0, "sampling": {"cfg_scale": 1.5}}
    record(tmp_path, "changed", "goes on with optimizer.lr 0.001 instead of 0.0002", 1)
    text = facts(tmp_path, scores, name="dsmoe_s_e16", global_batch_size=512)
    for piece in (
        "96.87 M, 34.94 M",
        "8 x GPU X, bf16, ZeRO 2, EP 4",
        "2, the first 2026-01-02T03:04:05Z",
        "goes on with optimizer.lr 0.001 instead of 0.0002",
        "0123456789ab",
    ):
        assert piece in text, piece
    assert "5 d 22 h" in text  # 2 x 512 / 0.002 s
    assert "15 to 15.5" in text and "14.53" in text and "39.84" in text and "Scored in the same way" in text
    other = scores | {"protocol": "fidelity", "num_samples": 100}
    text = facts(tmp_path, other, name="dsmoe_s_e16", global_batch_size=512)
    assert "Not to be compared: these have protocol diffmoe, 50,000 samples." in text
    assert "published FID" not in facts(tmp_path, scores, name="mine", global_batch_size=512)


def test_samples_stand_beside_their_nearest_real_images(digits, tmp_path):
    """A sample that is a real image finds it."""
    from eval.neighbours import comparisons

    (tmp_path / "images").mkdir()
    for label in (0, 3, 7):
        source = sorted((digits / "few" / str(label)).iterdir())[5]
        Image.open(source).save(tmp_path / "images" / f"{label:06d}_{label}.png")
    found = comparisons(tmp_path, digits / "few", None)
    assert [one.label for one in found] == [0, 3, 7]
    for one in found:
        assert len(one.real) == len(one.nearest) == 3
        assert (one.nearest[0] == one.sample).all() and not (one.nearest[1] == one.sample).all()


def test_map_colours_are_ratios():
    """Even is transparent, a factor of 2 half and of 4 or more full colour, unknown grey."""
    ratios = np.array([[1.0, 2.0, 8.0], [0.5, 0.0, np.nan]])
    drawing = plots.maps({"a": ratios}, "test", "x", "y")
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r"data:image/png;base64,([^\"]*)", drawing)[1])))
    pixels = np.asarray(image.convert("RGBA")).reshape(2, 3, 4)
    assert (pixels[..., 3] == [[0, 127, 255], [127, 255, 76]]).all()
    assert (pixels[0, 2, 2] > pixels[0, 2, 0]) and (pixels[1, 1, 0] > pixels[1, 1, 2])  # blue above, orange below
    assert (pixels[1, 2, :3] == pixels[1, 2, 0]).all()


def test_report_needs_a_step(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert call("eval.report", "--run", tmp_path, "--out", tmp_path / "a.html") == 2
    assert "no step yet" in capsys.readouterr().err
