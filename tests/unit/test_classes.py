"""Classes by their names: from shards to checkpoints, exports, samples and references, and wherever two sets meet."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eval.images import reference_images
from eval.neighbours import comparisons
from eval.reference import about, labels_in
from eval.sample_folder import open_folder
from helpers import call, refused
from helpers.older_run import OLD, taken_back
from helpers.pictures import KINDS, SIDE, picture, write_pictures
from moe_dit import build_model
from moe_dit.classes import labels_among, model_classes, translated
from moe_dit.export import export_checkpoint, save_export
from moe_dit.initial_weights import check_initial_weights
from moe_dit.recipe_file import load_recipe
from moe_dit.runtime.errors import InputError

# --- two sets of names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "places"),
    [
        (["cat", "dog"], ["cat", "dog"], None),
        (["cat"], ["cat", "dog"], None),
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["dog"], ["cat", "dog", "emu"], [1]),
        (["1", "2"], ["0", "1", "2"], [1, 2]),  # folders of numbers are names like others
        (["2", "0"], ["0", "1", "2"], [2, 0]),
        (["0", "1"], ["1", "0"], [1, 0]),
    ],
)
def test_labels_are_those_of_the_same_name(theirs, ours, places, capfd):
    found = labels_among(theirs, ours, "A", "B")
    assert (found if found is None else found.tolist()) == places
    told = "" if places is None else "the classes of A are numbered otherwise than those of B, and are taken by name\n"
    assert capfd.readouterr().err == told


@pytest.mark.parametrize(
    ("theirs", "ours", "line"),
    [
        (["0", "1"], ["cat", "dog"], "A names no classes; its labels are taken for those of B, whose class 0 is 'cat'"),
        (["cat"], ["0", "1"], "B names no classes; its labels are taken for those of A, whose class 0 is 'cat'"),
    ],
)
def test_labels_without_names_are_taken_as_they_are_and_told(theirs, ours, line, capfd):
    assert labels_among(theirs, ours, "A", "B") is None
    assert capfd.readouterr().err == f"{line}\n"


@pytest.mark.parametrize(
    ("theirs", "ours", "line"),
    [
        (["cat", "emu"], ["cat", "dog"], "A has 1 of 2 classes that B has not ('emu'); B has 'cat', 'dog'"),
        (["5", "7"], ["0", "1", "2"], "A has 2 of 2 classes that B has not ('5', '7'); B has '0', '1', '2'"),
        (["0", "1"], ["1", "2", "3", "4"], "A has 1 of 2 classes that B has not ('0'); B has '1', '2', '3' and 1 more"),
        (["0", "1"], ["0", "cat"], "A has 1 of 2 classes that B has not ('1'); B has '0', 'cat'"),
        (["0", "1", "2"], ["cat", "dog"], "A has 3 of 3 classes that B has not ('0', '1', '2')"),
        (["dog", "cat"], ["cat", "cat", "dog"], "A and B number classes otherwise, and 'cat' is the name of several"),
    ],
)
def test_classes_that_are_not_there_are_one_line(theirs, ours, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        labels_among(theirs, ours, "A", "B")


def test_labels_beyond_the_names_are_nobody_s():
    labels = torch.tensor([0, 1, 2, 9])
    assert translated(labels, np.array([2, 0])).tolist() == [2, 0, -1, -1]
    assert translated(labels, None) is labels


# --- names that travel ------------------------------------------------------------------------------------------------

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def tell_classes(run, names):
    """Let a run's checkpoints say what they were trained with, as those of today do."""
    for file in (run / "checkpoints").glob("*/state.json"):
        data = {"kind": "latents", "sample_shape": [8, 8, 8], "samples": 96, "classes": names, "content": "ab" * 32}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"data": data}))


def test_an_export_has_the_names_that_its_checkpoint_was_trained_with(tmp_path, capfd):
    run, model = taken_back(tmp_path), tmp_path / "model"
    export_checkpoint(run, "ema", model)
    assert model_classes(model) is None and not (model / "classes.json").exists()  # the checkpoint is older than names
    tell_classes(run, DIGITS)
    for _ in range(2):  # an export with names is replaced like one without
        export_checkpoint(run, "ema", model)
        assert json.loads((model / "classes.json").read_text()) == DIGITS == model_classes(model)
    (model / "classes.json").write_text('{"0": "zero"}')
    line = refused(capfd, "jobs/export.py", run, "--out", model, harmless=tmp_path)
    assert "holds files that are no exported model" in line  # a person's own file of the name
    with pytest.raises(InputError, match=r"classes.json should be a JSON list of the classes' names"):
        model_classes(model)


def test_samples_keep_the_names_and_continue_without(tmp_path):
    made = {"model_sha256": "0" * 64, "num": 8, "save": "images", "image_size": 32}

    def kept(folder):
        return json.loads((folder / "settings.json").read_text()).get("classes")

    old, new = tmp_path / "old", tmp_path / "new"
    open_folder(old, made)  # as an earlier version began it
    open_folder(old, made | {"classes": ["a", "b"]})
    assert kept(old) == ["a", "b"]
    open_folder(new, made | {"classes": ["a", "b"]})
    open_folder(new, made | {"num": 16})  # by an earlier version's export
    assert kept(new) == ["a", "b"]
    with pytest.raises(InputError, match="classes was 'b' and is now 'c' as class 1; give"):
        open_folder(new, made | {"classes": ["a", "c"]})
    (new / "settings.json").write_text(json.dumps(made | {"classes": "ab"}))
    with pytest.raises(InputError, match="classes is missing or of the wrong kind"):
        open_folder(new, made)


def test_the_sampling_command_writes_its_model_s_names(tmp_path):
    recipe = load_recipe("digits_pixels", ["model.depth=4"])
    save_export(build_model(recipe), recipe, tmp_path / "model", DIGITS)
    flags = ["--model", tmp_path / "model", "--num", 2, "--steps", 1, "--out", tmp_path / "samples"]
    assert call("eval.sample", *flags) == 0
    assert json.loads((tmp_path / "samples/settings.json").read_text())["classes"] == DIGITS


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (DIGITS, ""),
        (["zero", "one"], "with 2 names instead of 10"),
        (["0", *DIGITS[1:]], "with '0' as class 0 instead of 'zero'"),
    ],
)
def test_a_run_that_begins_from_other_classes_says_so(tmp_path, names, line, capfd):
    recipe = load_recipe("digits_pixels", ["model.depth=4", f"initial_weights={tmp_path / 'model'}"])
    save_export(build_model(recipe, device="cpu"), recipe, tmp_path / "model", DIGITS)
    check_initial_weights(recipe, names)
    told = capfd.readouterr().err
    assert (line in told and told.count("\n") == 1) if line else not told


def test_shards_name_their_classes(tmp_path):
    write_pictures(tmp_path / "images", {"b b": 2, "a": 2}, np.random.default_rng(0))
    flags = ["--images", tmp_path / "images", "--out", tmp_path / "shards", "--size", SIDE]
    assert call("data_prep.pack_pixels", *flags) == 0
    assert reference_images(tmp_path / "shards").classes == ["a", "b b"]


# --- samples and references -------------------------------------------------------------------------------------------

NAMES = list(KINDS)  # "a", "b b", "c": the order of class folders
MODEL = ["c", "a", "b b"]  # a model's, trained on shards of another order


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Class folders, and their statistics."""
    folder = tmp_path_factory.mktemp("real")
    write_pictures(folder / "images", dict.fromkeys(NAMES, 30), np.random.default_rng(0))
    assert call("eval.reference", folder / "images", "--out", folder / "real.npz") == 0
    return folder


def write_samples(folder, names, told=True):
    """Ten pictures of each class as samples of a model of these classes."""
    generator = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True)
    for i in range(30):
        kind = names[i % 3] if names[i % 3] in KINDS else "a"
        picture(kind, generator).save(folder / f"images/{i:06d}_{i % 3}.png")
    settings = {"num": 30, "save": "images", "image_size": SIDE, "model_sha256": "0" * 64}
    (folder / "settings.json").write_text(json.dumps(settings | ({"classes": names} if told else {})))
    return folder


def agreement(samples, reference, capfd):
    """The share of samples whose label the classifier of the reference agrees with, and what was said."""
    capfd.readouterr()
    assert call("eval.score", samples, "--reference", reference) == 0
    return json.loads((samples / "metrics.json").read_text())["label_agreement"], capfd.readouterr().err


def test_samples_are_scored_by_the_names_of_their_classes(real, tmp_path, capfd):
    assert about(real / "real.npz")["class_names"] == NAMES
    samples, silent = write_samples(tmp_path / "a", MODEL), write_samples(tmp_path / "b", MODEL, told=False)
    for reference in (real / "images", real / "real.npz"):
        found, said = agreement(samples, reference, capfd)
        assert found > 0.9 and "the classes of the model are numbered otherwise" in said
        found, said = agreement(silent, reference, capfd)  # of an earlier version: nothing is known, nothing is refused
        assert found < 0.2 and "class" not in said.replace("classifier", "")
    with np.load(real / "real.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    older = {key: value for key, value in json.loads(str(values["about"])).items() if key != "class_names"}
    np.savez(tmp_path / "older.npz", **values | {"about": np.array(json.dumps(older))})
    assert agreement(samples, tmp_path / "older.npz", capfd)[0] < 0.2


def test_a_reference_of_other_classes_is_refused_or_told(real, tmp_path, capfd):
    samples = write_samples(tmp_path / "other", ["a", "b b", "zebra"])
    line = refused(capfd, "eval.score", samples, "--reference", real / "images", harmless=tmp_path)
    assert f"the model has 1 of 3 classes that the reference {real}/images has not ('zebra'); " in line
    recipe = load_recipe("digits_pixels", ["model.depth=4", "model.num_classes=3"])
    save_export(build_model(recipe), recipe, tmp_path / "model", ["a", "b b", "zebra"])
    flags = ["--model", tmp_path / "model", "-n", 20, "--reference", real / "real.npz", "--out", tmp_path / "a.json"]
    for command in (["eval.run"], ["eval.sweep", "--out", tmp_path / "sweep"]):  # before anything is sampled
        given = flags if command == ["eval.run"] else flags[:-2]
        assert "('zebra')" in refused(capfd, *command, *given, harmless=tmp_path)
    assert labels_in(real, ["a", "zebra"], NAMES, fitted=False) is None  # by Inception labels are of no concern
    assert "the model has 1 of 2 classes that" in capfd.readouterr().err
    labels_in(real, ["0"], ["0", "1"], fitted=True)
    assert "has 1 of 2 classes that the model has not ('1')" in capfd.readouterr().err
    labels_in(real, ["0", "1"], NAMES, fitted=False)
    assert not capfd.readouterr().err
    fewer = write_samples(tmp_path / "fewer", ["a", "b b", "a"])
    settings = json.loads((fewer / "settings.json").read_text()) | {"classes": ["a", "b b"]}
    (fewer / "settings.json").write_text(json.dumps(settings))
    _, said = agreement(fewer, real / "images", capfd)
    assert f"the reference {real}/images has 1 of 3 classes that the model has not ('c')" in said


def test_samples_stand_beside_real_images_of_their_name(real, tmp_path, capsys):
    """Also where the real images lack a class; without names, of their label."""
    samples = write_samples(tmp_path / "samples", MODEL)
    few = tmp_path / "few"
    for name in ("b b", "c"):
        shutil.copytree(real / "images" / name, few / name)
    colour = {name: np.array(KINDS[name][0]) for name in NAMES}

    def nearest_kind(image):
        mean = image.reshape(-1, 3).mean(0)
        return min(NAMES, key=lambda name: abs(mean - colour[name]).sum())

    found = comparisons(samples, few, None, MODEL)
    assert "1 of 3 classes that" in capsys.readouterr().err  # whose samples stand beside nothing
    assert [(one.label, one.name) for one in found] == [(0, "c"), (2, "b b")]
    for one in found:
        assert {nearest_kind(image) for image in (one.sample, *one.real, *one.nearest)} == {one.name}
    assert [(one.label, one.name) for one in comparisons(samples, few, None)] == [(0, "b b"), (1, "c")]
    bare = comparisons(samples, few, None, ["0", "1", "2"])  # labels of nobody who told names
    assert [(one.label, one.name) for one in bare] == [(0, "b b"), (1, "c")]
    with pytest.raises(InputError, match="no labelled images of the samples' classes"):
        comparisons(samples, few, None, ["x", "y", "z"])


def test_a_report_shows_the_names_of_its_run_and_refuses_another_s_atlas(real, tmp_path, capfd):
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    counts = {"by_time": (1, 1, 2), "by_class": (1, 3, 2), "by_position": (1, 2, 2, 2), "together": (1, 2, 2)}
    arrays = {name: np.full(shape, 100) for name, shape in (counts | {"class_tokens_by_time": (1, 1, 2)}).items()}
    arrays |= {"entropy": np.ones((1, 1)), "times": np.array([0.5]), "layers": np.array(["blocks.1.mlp"])}
    settings = {"format": "moe-dit-atlas-1", "samples": 3, "seed": 0, "choice": "token"}
    arrays |= {"samples_by_class": np.full(3, 50), "settings": np.array(json.dumps(settings))}

    def page(classes):
        np.savez(tmp_path / "atlas.npz", **arrays, classes=np.array(classes))
        flags = ["--run", run, "--atlas", tmp_path / "atlas.npz", "--out", tmp_path / "page.html"]
        assert call("eval.report", *flags) == 0
        return (tmp_path / "page.html").read_text()

    assert "zebra" in page(["zebra", "b", "c"])  # nobody knows the run's
    tell_classes(run, MODEL)
    assert "zebra" not in page(["0", "1", "2"]) and ">b b<" in page(["0", "1", "2"])
    assert ">b b<" in page(["b b", "a", "c"])
    np.savez(tmp_path / "atlas.npz", **arrays, classes=np.array(["a", "zebra", "c"]))
    flags = ["--run", run, "--atlas", tmp_path / "atlas.npz", "--out", tmp_path / "page.html"]
    assert "atlas.npz has 1 of 3 classes that the model of this page has not ('zebra')" in refused(
        capfd, "eval.report", *flags
    )
    samples = write_samples(tmp_path / "samples", MODEL, told=False)  # the run knows
    Image.new("RGB", (8, 8)).save(samples / "samples.png")
    flags = ["--run", run, "--samples", samples, "--real", real / "images", "--out", tmp_path / "page.html"]
    assert call("eval.report", *flags) == 0
    shown = re.findall("<figcaption>sample of class ([^<]*)<", (tmp_path / "page.html").read_text())
    assert shown == MODEL
