"""What of a folder is scored: which files are images, which folders are refused, and what becomes of a broken image."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval import features
from eval.features import Extractor, extract, survey
from eval.images import any_images, read_image, reference_images, sample_images
from eval.score import _images
from helpers import call, refused
from helpers.feature_spaces import Tiny
from helpers.pictures import KINDS, SIDE, write_pictures
from moe_dit.runtime.errors import InputError


def write(folder, *names, kind="PNG"):
    """Different grey images of these names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (SIDE, SIDE), 9 * i).save(folder / name, kind)
    return folder


def names(images):
    return [image.file.name for image in images]


# --- which files are images -------------------------------------------------------------------------------------------


def test_images_are_told_by_their_content_where_their_names_do_not(tmp_path):
    write(tmp_path, "a.jfif", "b", kind="JPEG")
    write(tmp_path, "c.png", ".hidden.png", ".hidden/d.png")
    for name in ("notes.txt", "Thumbs.db", "labels.npz"):
        (tmp_path / name).write_bytes(b"P nothing \x00 of the kind")
    (tmp_path / "empty").mkdir()  # a folder without images is no class of any
    assert names(any_images(tmp_path)) == ["a.jfif", "b", "c.png"]
    assert any_images(tmp_path).classes is None
    classes = write(tmp_path / "classes", "y/1.png", "x/2.png")
    (classes / "README.md").write_text("about")
    found = any_images(classes)
    assert [(image.file.name, image.label) for image in found] == [("2.png", 0), ("1.png", 1)]
    for one in (found, pickle.loads(pickle.dumps(found))):  # as rank 0 sends it
        assert one == found and one.classes == ["x", "y"]


OWN = [f"{i:06d}_{i % 3}.png" for i in range(12)]
SETTINGS = {"num": 12, "save": "images", "image_size": SIDE, "model_sha256": "0" * 64}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([*"abcdefghijk", "grids/x.png", "grids/y.png"], "11 images of its own (a) and 2 others (grids/x.png)"),
        (
            [*(f"images/{name}" for name in OWN), "images/a.png"],
            "12 images that are named as eval.sample does (000000_0.png) and 1 other (a.png)",
        ),
        (
            [*(f"images/{name}" for name in OWN), "images/grids/a.png"],
            "12 images that are named as eval.sample does (000000_0.png) and 1 other (grids/a.png)",
        ),
        (
            [*(f"images/{name}" for name in OWN), "images/7_2.png"],
            "two samples of index 7, 000007_1.png and 7_2.png; remove",
        ),
        (
            [*(f"images/{name}" for name in OWN), "loose.png"],
            "12 images in its folder images (images/000000_0.png) and 1 other (loose.png)",
        ),
        (
            [*(f"images/{name}" for name in OWN), "grids/1.png"],
            "12 images in its folder images (images/000000_0.png) and 1 other (grids/1.png)",
        ),
        (
            [*OWN, "samples.png"],
            "12 images that are named as eval.sample does (000000_0.png) and 1 other (samples.png)",
        ),
    ],
    ids=[
        "folders beside",
        "other names",
        "grids inside",
        "one index twice",
        "beside images",
        "two folders",
        "its grid",
    ],
)
def test_samples_of_which_not_all_may_be_meant_are_refused(files, says, tmp_path, capfd):
    samples = write(tmp_path / "samples", *files)
    real = write(tmp_path / "real", *(f"{kind}/{i}.png" for kind in "ab" for i in range(10)))
    line = refused(capfd, "eval.score", samples, "--reference", real, harmless=tmp_path)
    assert says in line and str(samples) in line


def test_a_samples_folder_of_ours_keeps_other_files_beside_its_images(tmp_path):
    samples = write(tmp_path, *(f"images/{name}" for name in OWN), "samples.png", "looks/a.png")
    (samples / "images/notes.txt").write_text("no image")
    (samples / "metrics.json").write_text("{}")
    assert names(_images(samples, ours=True)) == OWN
    with pytest.raises(InputError, match=r"and 2 others \(samples.png\)"):
        _images(samples, ours=False)


def test_a_reference_of_which_not_all_may_be_meant_is_refused(tmp_path, capfd):
    write(tmp_path, *(f"{kind}/{i}.png" for kind in "ab" for i in range(10)), "loose.png")
    line = refused(capfd, "eval.reference", tmp_path, "--out", tmp_path / "r.npz", harmless=tmp_path)
    assert "holds 1 image of its own (loose.png) and 20 others (a/0.png)" in line
    shards = tmp_path / "shards"
    (tmp_path / "loose.png").unlink()
    assert call("data_prep.pack_pixels", "--images", tmp_path, "--out", shards, "--size", SIDE) == 0
    write(shards, "loose.png")
    assert len(reference_images(shards)) == 20  # shards are what their manifest says


# --- images that cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A reference of 135 images, and the same with some files more that are no whole images, and their names."""
    folder = tmp_path_factory.mktemp("pair")
    write_pictures(folder / "whole", dict.fromkeys(KINDS, 45), np.random.default_rng(0))
    shutil.copytree(folder / "whole", folder / "broken")
    broken = [folder / "broken" / name for name in ("a/0broken.png", "b b/3broken.png", "c/zz.jpg")]
    for file in broken:
        whole = next(path for path in file.parent.iterdir() if path not in broken).read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if file.suffix == ".png" else b"no image at all")
    return folder / "whole", folder / "broken", broken


@pytest.mark.parametrize("kept", [10, 10_000])
def test_what_is_known_of_real_images_is_that_of_those_that_can_be_read(pair, monkeypatch, kept, capfd):
    monkeypatch.setattr(features, "KEPT", kept)
    whole, broken, files = pair
    extractor = Extractor([Tiny()], torch.device("cpu"))
    unread = {}
    want = survey(extractor, any_images(whole), SIDE, "test")
    capfd.readouterr()
    found = survey(extractor, any_images(broken), SIDE, "the real ones", unread)
    said = capfd.readouterr().err
    assert f"the real ones: 3 of 138 images cannot be read and are left out; the first: {files[0]} " in said
    assert found.count == want.count == 135 and want.unreadable is None
    assert torch.equal(found.moments["features"].mu, want.moments["features"].mu)
    assert torch.equal(found.moments["features"].sigma, want.moments["features"].sigma)
    assert torch.equal(found.rows["features"], want.rows["features"]) and len(want.rows["features"]) == min(kept, 135)
    assert found.unreadable["count"] == 3
    assert [one["image"] for one in found.unreadable["first"]] == [str(file) for file in files]
    assert all("cannot be read" in one["reason"] for one in found.unreadable["first"])
    assert [any_images(broken)[place].file for place in unread] == files


@pytest.mark.parametrize("count", [7, 64, 65, 66])
def test_batches_are_those_of_a_reference_without_what_cannot_be_read(count, tmp_path):
    """A network sees the same batches, on which the last bits of features may depend."""

    class Seen(Tiny):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    found = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:03d}.png")
    for _ in range(2):
        seen = []
        made = extract(Extractor([Seen()], torch.device("cpu")), any_images(tmp_path), SIDE, "test", {})
        found.append((seen, made.arrays["features"]))
        for name in ("000a.png", "003a.png"):
            (tmp_path / name).write_bytes(b"")
    assert [len(batch) for batch in found[0][0]] == {7: [7], 64: [64]}.get(count, [64, 64])
    for one, two in zip(*(seen for seen, _ in found), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(found[0][1], found[1][1]) and len(found[0][1]) == count


def test_a_broken_image_of_samples_is_refused_by_name(pair):
    _, broken, files = pair
    with pytest.raises(InputError, match=re.escape(str(files[0]))):
        extract(Extractor([Tiny()], torch.device("cpu")), any_images(broken), SIDE, "samples")


@pytest.mark.parametrize(
    ("enough", "count", "good"), [(1000, 12, True), (24, 3, True), (24, 2, True), (20, 2, True), (20, 3, False)]
)
def test_a_reference_of_which_too_many_cannot_be_read_is_refused(tmp_path, monkeypatch, enough, count, good):
    """More than a tenth of as many as tell; of fewer, two good ones do."""
    monkeypatch.setattr(features, "ENOUGH", enough)
    write(tmp_path, *(f"{i:02d}.png" for i in range(20)))
    for i in range(count):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    extractor = Extractor([Tiny()], torch.device("cpu"))
    if good:
        assert survey(extractor, any_images(tmp_path), SIDE, "test").count == 20 - count
        return
    with pytest.raises(InputError, match=f"test: {count} of 20 images cannot be read, too many"):
        survey(extractor, any_images(tmp_path), SIDE, "test")


def test_a_reference_without_an_image_that_can_be_read_is_refused(tmp_path, capfd):
    write(tmp_path / "real", *(f"{kind}/{i}.png" for kind in "ab" for i in range(6)))
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    samples = write(tmp_path / "samples", *OWN)
    line = refused(capfd, "eval.score", samples, "--reference", tmp_path / "real")
    assert "12 of 12 images cannot be read, too many" in line


def test_scores_and_files_say_what_was_left_out(pair, tmp_path):
    """By the classifier that is fitted to what can be read, from folders and from the file of statistics."""
    whole, broken, files = pair
    found = {}
    write_pictures(tmp_path / "samples", dict.fromkeys(KINDS, 10), np.random.default_rng(5))
    samples = tmp_path / "samples"
    for name, path in (("whole", whole), ("broken", broken)):
        assert call("eval.reference", path, "--out", tmp_path / f"{name}.npz") == 0
        for reference in (path, tmp_path / f"{name}.npz"):
            out = tmp_path / "scores.json"
            assert call("eval.score", samples, "--reference", reference, "--out", out) == 0
            found[name, reference.suffix] = json.loads(out.read_text())
    left = {"count": 3, "first": found["broken", ""]["unreadable"]["first"]}
    assert [one["image"] for one in left["first"]] == [str(file) for file in files]
    for suffix in ("", ".npz"):
        one, two = found["whole", suffix], found["broken", suffix]
        assert "unreadable" not in one and two.pop("unreadable") == left
        assert {**one, "reference": ""} == {**two, "reference": ""} and one["num_reference"] == 135
    (first, says), (second, said) = (
        (dict(arrays), json.loads(str(arrays["about"])))
        for arrays in (np.load(tmp_path / f"{name}.npz") for name in ("whole", "broken"))
    )
    assert said.pop("unreadable") == left and says.pop("images") != said.pop("images") and says == said
    assert all(np.array_equal(first[key], second[key]) for key in first if key != "about")


def test_a_broken_image_in_shards_is_left_out_by_its_place(tmp_path):
    write_pictures(tmp_path / "images", dict.fromkeys(KINDS, 4), np.random.default_rng(0))
    shards = tmp_path / "shards"
    assert call("data_prep.pack_pixels", "--images", tmp_path / "images", "--out", shards, "--size", SIDE) == 0
    images = any_images(shards)
    bad = images[5]
    with open(bad.file, "r+b") as file:
        file.seek(bad.offset)
        file.write(bytes(bad.length))
    unread = {}
    found = extract(Extractor([Tiny()], torch.device("cpu")), images, SIDE, "test", unread)
    assert list(unread) == [5] and images[5].name == f"{bad.file}, at byte {bad.offset}"
    assert found.labels.tolist() == [image.label for i, image in enumerate(images) if i != 5]
    kept = torch.stack([read_image(image) for i, image in enumerate(images) if i != 5])
    torch.testing.assert_close(found.arrays["features"], Tiny()(kept)["features"])


def test_one_index_twice_is_refused_wherever_samples_are_listed(tmp_path):
    write(tmp_path, "000001_3.png", "000001_5.png")
    with pytest.raises(InputError, match=r"two samples of index 1, 000001_3.png and 000001_5.png"):
        sample_images(tmp_path)
