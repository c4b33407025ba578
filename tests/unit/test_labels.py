"""What a class is and which label it has, however images are kept: one rule, or one line."""

import io
import json
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data_prep import index, verify
from data_prep.classes import label, read_names, split_of
from data_prep.images import list_images
from data_prep.sources import open_source
from eval.images import reference_images
from helpers.server import serving
from helpers.sources import as_tables, jpeg, pack, png
from moe_dit.data import ShardReader
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError

# Twelve classes each: their names on disk in no order, and as they are kept, in the order of their labels.
NAMES = {
    "words": (
        ["zebra", "ant", "Bee", "cat 2", "cat 10", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay"],
        ["Bee", "ant", "cat 10", "cat 2", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "zebra"],
    ),
    "numbers": (
        ["10", "2", "0", "11", "1", "3", "4", "5", "6", "7", "8", "9"],
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"],
    ),
    "padded numbers": (
        ["010", "002", "000", "011", "001", "003", "004", "005", "006", "007", "008", "009"],
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"],
    ),
    "Unicode": (  # "é" in two forms: a letter, and a letter with an accent behind it, as macOS writes it
        ["鳥", "e\u0301te", "\u00e9ta", "犬", "ä", "ß", "猫", "ñu", "Ω", "٣", "ça", "²"],
        ["²", "ß", "ä", "ça", "\u00e9ta", "\u00e9te", "ñu", "Ω", "٣", "犬", "猫", "鳥"],
    ),
}


def pixels_of(place, i):
    """Image ``i`` of five of class number ``place`` on disk: 8x8, no two alike."""
    array = np.full((8, 8, 3), 20 * place, np.uint8)
    array[i, :, 1] = 255
    return array


def content(place, i):
    return png(Image.fromarray(pixels_of(place, i)))


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def number_of(names, place):
    """The label of a class on disk, as a person who makes shards would number it."""
    on_disk, kept = names
    name = unicodedata.normalize("NFC", on_disk[place])
    return kept.index(name.lstrip("0") or "0" if name.isascii() and name.isdecimal() else name)


def tar_of(folder, file, name="."):
    """A folder with its entries, as tar makes it."""
    with tarfile.open(file, "w") as tar:
        tar.add(folder, name)
    return file


def as_folders(names, out):
    for place, name in enumerate(names[0]):
        (out / name).mkdir(parents=True)
        for i in range(5):
            (out / name / f"{i}.png").write_bytes(content(place, i))
    return out


def as_class_tars(names, out):
    out.mkdir()
    for place, name in enumerate(names[0]):
        with tarfile.open(out / f"{name}.tar", "w") as tar:
            for i in range(5):
                add(tar, f"{i}.png", content(place, i))
    return out


def as_tar_of_folders(names, out):
    folder = as_folders(names, out / "train")
    return tar_of(folder, out.with_suffix(".tar"), "train")


def as_parts_of_folders(names, out):
    """Class folders over two tar files, as tar -c . makes them."""
    out.mkdir()
    for part in range(2):
        with tarfile.open(out / f"part-{part}.tar", "w") as tar:
            for place, name in enumerate(names[0]):
                for i in range(part, 5, 2):
                    add(tar, f"./{name}/{i}.png", content(place, i))
    return out


def as_tar_of_tars(names, out):
    inner = as_class_tars(names, out.with_name("inner"))
    return tar_of(inner, out.with_suffix(".tar"))


def as_webdataset(names, out):
    out.mkdir()
    for part in range(2):
        with webdataset.TarWriter(str(out / f"{part}.tar"), encoder=False) as tar:
            for place in range(part, 12, 2):
                for i in range(5):
                    cls = f"{number_of(names, place)}\n".encode()
                    tar.write({"__key__": f"v1.0/{place}_{i}", "png": content(place, i), "cls": cls, "json": b"{}"})
    return out


def as_plain_tar(names, out):
    """Shards as tar makes them of a folder: entries of folders, ./ before names, labels behind all images."""
    (out / "train.v1").mkdir(parents=True)
    for place in range(12):
        for i in range(5):
            (out / "train.v1" / f"{place}.{i}.png").write_bytes(content(place, i))
            (out / "train.v1" / f"{place}.{i}.cls").write_text(str(number_of(names, place)))
            (out / "train.v1" / f"._{place}.{i}.png").write_bytes(b"AppleDouble")
    return tar_of(out, out.with_suffix(".tar"))


def as_rows(names):
    rows = [(content(place, i), number_of(names, place)) for place in range(12) for i in range(5)]
    return as_tables(*zip(*rows, strict=True), names[1])


def as_parquet(names, out):
    out.mkdir()
    pa.parquet.write_table(as_rows(names), out / "train-0.parquet", row_group_size=7)
    return out


def as_arrow(names, out):
    table = as_rows(names)
    with pa.OSFile(str(out.with_suffix(".arrow")), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return out.with_suffix(".arrow")


SOURCES = [
    *(as_folders, as_class_tars, as_tar_of_folders, as_parts_of_folders, as_tar_of_tars),
    *(as_webdataset, as_plain_tar, as_parquet, as_arrow),
]


def check(out, names):
    """The samples of packed shards: label, class name and pixels of each."""
    manifest = read_manifest(out)
    assert manifest.classes == names[1]
    want = {pixels_of(place, i).tobytes(): number_of(names, place) for place in range(12) for i in range(5)}
    x, y = ShardReader(manifest).read(np.arange(60), np.zeros(60, bool))
    got = {image.permute(1, 2, 0).numpy().tobytes(): int(one) for image, one in zip(x, y, strict=True)}
    assert got == want


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_labels(tmp_path, make, kind):
    names = NAMES[kind]
    flags = []
    if make in (as_webdataset, as_plain_tar) and kind in ("words", "Unicode"):  # numbers have no names
        (tmp_path / "names.txt").write_text("\n".join(names[1]), "utf-8")
        flags = ["--classes", tmp_path / "names.txt"]
    check(pack(make(names, tmp_path / "source"), tmp_path / "out", *flags), names)


@pytest.mark.parametrize("make", [as_folders, as_class_tars, as_webdataset])
def test_a_url_gives_the_same_labels(tmp_path, make):
    names = NAMES["padded numbers"]
    with serving(make(names, tmp_path / "source")) as server:
        check(pack(server.url, tmp_path / "out"), names)


@pytest.mark.parametrize("make", [as_folders, as_class_tars, as_tar_of_tars, as_parquet])
def test_a_file_gives_the_order_by_name(tmp_path, make):
    names = (NAMES["words"][0], [*reversed(NAMES["words"][1]), "yak"])
    (tmp_path / "names.txt").write_text("\r\n".join(names[1]) + "\r\n")
    source = make(NAMES["words"], tmp_path / "source")
    check(pack(source, tmp_path / "out", "--classes", tmp_path / "names.txt"), names)
    with pytest.raises(InputError, match=r"begun with other settings: .*--classes"):
        pack(source, tmp_path / "out")


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "names", "labels", "classes"),
    [
        (["b", "a", "b"], None, [1, 0, 1], ["a", "b"]),
        (["10", "9"], None, [10, 9], list(map(str, range(11)))),
        ([2, 0], None, [2, 0], ["0", "1", "2"]),
        ([2, 0], ["x", "y", "z"], [2, 0], ["x", "y", "z"]),
        (["2", "0"], ["x", "y", "z"], [2, 0], ["x", "y", "z"]),  # numbers are labels, where the names are others
        (["2", "0"], ["2", "0"], [0, 1], ["2", "0"]),  # and not where they are names
        (["1", "a"], None, [0, 1], ["1", "a"]),
    ],
)
def test_labels_are_in_order(kinds, names, labels, classes):
    found = label(kinds, "here", names)
    assert (found.labels, found.classes) == (labels, classes)


@pytest.mark.parametrize(
    ("kinds", "names", "line"),
    [
        (["1", "2", "3"], None, "1 to 3, and their labels may be 1 to 3, or 0 to 2; give --classes FILE"),
        (["2019", "2020"], None, "would make 2021 classes; give --classes FILE"),
        (["7", "007"], None, "'007' and '7' are one class"),
        (["\u00e9", "e\u0301"], None, "are one class"),
        (["a", "b"], ["a"], "1 of its classes are not in --classes: 'b'"),
        (["a", "b"], ["a", "b", "a"], "names a class twice"),
        ([0, 3], ["a", "b"], "a label is 3, but --classes names 2 classes"),
        ([999_999_999], None, "a label is 999999999; it should be below 1,000,000"),
    ],
)
def test_ambiguous_classes_are_one_line(kinds, names, line):
    with pytest.raises(InputError, match=line) as caught:
        label(kinds, "here", names)
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"a\n\nb\n", b"\xff\xfe"])
def test_a_file_of_names_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "names.txt").write_bytes(text)
    with pytest.raises(InputError, match="--classes"):
        read_names(tmp_path / "names.txt")


def test_it_is_said_what_a_class_is(tmp_path, capsys):
    folder = as_folders(NAMES["numbers"], tmp_path / "images")
    pack(folder, tmp_path / "out")
    line = capsys.readouterr().err.splitlines()[0]
    assert (
        line == f"{folder}: 60 images of 12 classes; a class is a class folder; labels are the numbers in their names"
    )
    (folder / "3").rename(folder / "12")
    pack(folder, tmp_path / "other")
    assert "; label 3 has no images" in capsys.readouterr().err


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"),
        ("imagenet_val2012.tar", "validation"),
        ("mnist-test.arrow", "test"),
        ("dev.tar", "validation"),
        ("trainer.tar", None),
        ("contest-1.parquet", None),
        ("0000.parquet", None),
    ],
)
def test_splits_are_told_by_whole_words(name, split):
    assert split_of(name) == split


def test_splits_are_not_mixed(tmp_path):
    folder = as_parquet(NAMES["words"], tmp_path / "hub")
    rows = pa.table({"image": [content(0, 0)] * 3, "label": pa.array([-1, -1, -1])})
    pa.parquet.write_table(rows, folder / "test-0.parquet")
    with pytest.raises(InputError, match=r"the splits test, train .* choose with --split train"):
        pack(folder, tmp_path / "out")
    check(pack(folder, tmp_path / "out", "--split", "train"), NAMES["words"])
    with pytest.raises(InputError, match=r"test-0\.parquet has no labels \(-1 in every row\).*--split train"):
        pack(folder, tmp_path / "out", "--split", "test")
    with pytest.raises(InputError, match=r"--split val: .* holds the splits test, train"):
        pack(folder, tmp_path / "out", "--split", "val")
    for part in ("train", "val"):
        as_folders(NAMES["words"], tmp_path / "images" / part)
    with pytest.raises(InputError, match=r"the splits train and val, not classes; give one .*images/train"):
        open_source(str(tmp_path / "images"))
    tar_of(tmp_path / "images", tmp_path / "x.tar", "images")
    with pytest.raises(InputError, match="the splits train and val, not classes"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    "folders", [("train", "val", "unlabeled"), ("train_256", "val_256", "test_256"), ("Train",), ("train2017", "dev")]
)
def test_folders_of_splits_are_no_classes(tmp_path, folders):
    for name in folders:
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "0.png").write_bytes(content(0, 0))
    for listing in (open_source, list_images, lambda folder: reference_images(Path(folder))):
        with pytest.raises(InputError, match=r"the splits .*, not classes; give one instead, e\.g\. .*/[Tt]rain"):
            listing(str(tmp_path))
    (tmp_path / "names.txt").write_text("\n".join(folders))
    assert open_source(str(tmp_path), read_names(tmp_path / "names.txt")).classes == list(folders)


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for name in ("airplane", "bus", "train", "test tube"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "0.png", content(0, 0))
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "0.png").write_bytes(content(0, 0))
    for place in (tmp_path, tmp_path / "folders"):
        assert open_source(str(place)).classes == ["airplane", "bus", "test tube", "train"]


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_images_beside_class_folders_are_counted(tmp_path, capsys):
    folder = as_folders(NAMES["words"], tmp_path / "images")
    (folder / "loose").write_bytes(jpeg(3))  # an image by its content
    (folder / "README").write_bytes(b"no image")
    (folder / "fox" / "0.png").rename(folder / "fox" / "zero.jfif")
    (folder / "fox" / "1.png").rename(folder / "fox" / "one")
    (folder / "fox" / "notes.txt").write_bytes(b"P6 is no image either")
    (folder / "fox" / ".hidden.png").write_bytes(b"")
    out = pack(folder, tmp_path / "out")
    check(out, NAMES["words"])
    said = capsys.readouterr().err
    assert (
        "1 images beside the class folders are left out" in said
        and "1 files that are no images of a known format" in said
    )
    kept = open_source(str(folder)).left_out
    assert kept == {"images beside the class folders": 1, "files that are no images of a known format": 1}
    assert json.loads((out / "manifest.json").read_text())["left_out"] == kept


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"0.png": 1, "0.json": b'{"label": 3}'}, r"0\.png has 0\.json beside it and no \.cls"),
        ({"0.png": 1, "0.cls": b"0", "1.png": 1}, r"1\.png has no \.cls"),
        ({"0.png": 1, "0.cls": b"cat"}, r"0\.cls holds 'cat', not a class number"),
        ({"0.left.png": 1, "0.right.png": 1, "0.cls": b"1"}, r"0\.cls is beside two images"),
        ({"a/1.png": 1, "b.tar": b""}, "holds no images|cannot be read"),
    ],
)
def test_shards_whose_labels_nobody_tells_are_one_line(tmp_path, files, line):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in files.items():
            add(tar, name, content(3, 1) if data == 1 else data)
    with pytest.raises(InputError, match=line) as caught:
        open_source(str(tmp_path / "x.tar"))
    assert str(tmp_path / "x.tar") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("shard-000000", "shard-000001"), ("00000", "00001"), ("part_7",), ("train",)])
def test_parts_of_a_data_set_are_no_classes(tmp_path, names):
    for name in names:
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "cat.0.png", content(0, 0))
    with pytest.raises(InputError, match=r"is called as a part of a data set is, so nothing says their classes"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), [*names]).classes == list(names)


def test_a_link_that_leads_nowhere_is_counted(tmp_path):
    folder = as_folders(NAMES["words"], tmp_path / "images")
    (folder / "broken").symlink_to(tmp_path / "none")
    assert open_source(str(folder)).left_out == {"links that lead nowhere": 1}


def test_a_folder_of_tables_in_a_folder_is_told_of(tmp_path):
    as_parquet(NAMES["words"], tmp_path / "data")
    with pytest.raises(InputError, match=r"data holds no images but train-0\.parquet; give .*/data instead"):
        open_source(str(tmp_path))


def test_a_class_is_a_tar_or_a_folder_in_it_not_either(tmp_path):
    for name, folders in (("cat", ("a", "b")), ("dog", ("a", "c"))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for folder in folders:
                add(tar, f"{folder}/1.png", content(1, 1))
    with pytest.raises(InputError, match=r"cat\.tar lie in folders \(a, b\)"):
        open_source(str(tmp_path))
    for file in tmp_path.iterdir():
        with tarfile.open(file, "w") as tar:
            for folder in ("a", "b"):
                add(tar, f"{file.stem}/{folder}/1.png", content(1, 1))
    assert open_source(str(tmp_path)).classes == ["cat", "dog"]


def test_what_lies_beside_tars_is_counted_or_refused(tmp_path):
    folder = as_class_tars(NAMES["words"], tmp_path / "tars")
    (folder / "fox").mkdir()
    (folder / "loose.png").write_bytes(content(0, 0))
    source = open_source(str(folder))
    assert source.left_out == {"folders beside the .tar files": 1, "images beside the .tar files": 1}
    with tarfile.open(folder / "fox.tar", "a") as tar:
        add(tar, "notes.md", b"x")
        link = tarfile.TarInfo("same.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    kept = open_source(str(folder)).left_out
    assert kept["files that are no images of a known format"] == 1 and kept["links and devices in tar files"] == 1
    with tarfile.open(folder / "hen.tar.gz", "w:gz") as tar:
        add(tar, "0.png", content(0, 0))
    with pytest.raises(InputError, match=r"hen\.tar\.gz', which cannot be read in parts"):
        open_source(str(folder))
    os.rename(folder / "hen.tar.gz", folder / "hen.tar")
    with pytest.raises(InputError, match=r"hen\.tar cannot be read as a tar file: it is compressed \(gzip\)"):
        open_source(str(folder))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_rows_that_hold_no_image_are_listed(tmp_path):
    good = content(0, 0)
    whole = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": good, "path": None}] * 5
    rows[1], rows[2], rows[3] = None, {"bytes": None, "path": "/data/x.png"}, {"bytes": b"", "path": None}
    table = pa.table({"image": pa.array(rows, whole), "label": pa.array([0, 0, 0, 0, None], pa.int64())})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    out = pack(tmp_path / "x.parquet", tmp_path / "out")
    assert [line.split('"reason": ')[1] for line in (out / "errors.jsonl").read_text().splitlines()] == [
        '"its row holds no image"}',
        '"its row holds a path (/data/x.png) and no bytes"}',
        '"its row holds no image"}',
        '"its row has no label (None)"}',
    ]
    with pytest.raises(InputError, match=r"cannot use the image x\.parquet/0/\d|cannot read the image x\.parquet/0/\d"):
        pack(tmp_path / "x.parquet", tmp_path / "strict", "--strict")


def test_tables_that_disagree_are_one_line(tmp_path):
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        pa.parquet.write_table(as_tables([content(0, 0)] * 2, [0, 1], classes), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match=r"a\.parquet and .*b\.parquet name other classes"):
        open_source(str(tmp_path))
    assert open_source(str(tmp_path), ["dog", "cat", "eel"]).labels == [1, 0, 0, 1]
    pa.parquet.write_table(as_tables([content(0, 0)], [2], ["cat", "dog"]), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: a label is 2, but it names 2 classes"):
        open_source(str(tmp_path / "c.parquet"))
    pa.parquet.write_table(pa.table({"img": [content(0, 0)], "label": [0]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"its columns are img, label"):
        open_source(str(tmp_path / "d.parquet"))


# --- shards of other programs -----------------------------------------------------------------------------------------


def adopt(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", str(folder), *map(str, flags)])
        index.main()
    return read_manifest(folder)


def test_shards_by_plain_tar_are_adopted(tmp_path):
    folder = tmp_path / "v1.0"
    folder.mkdir()
    for i in range(2):
        (folder / ("0.png", "1.PNG")[i]).write_bytes(content(i, 0))
        (folder / f"{i}.cls").write_text(str(i))
    (folder / "._0.png").write_bytes(b"AppleDouble")
    for name in (".", "v1.0"):
        (tmp_path / name / "shards").mkdir()
        tar_of(folder, tmp_path / name / "shards" / "x.tar", name)
        manifest = adopt(tmp_path / name / "shards")
        x, y = ShardReader(manifest).read(np.arange(2), np.zeros(2, bool))
        got = sorted((int(one), int(image[0, 7, 7])) for image, one in zip(x, y, strict=True))
        assert got == [(0, 0), (1, 20)] and verify.verify(tmp_path / name / "shards") == (1, 2)


def test_foreign_shards_without_samples_or_with_twice_the_same_are_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    tarfile.open(tmp_path / "a" / "1.tar", "w").close()
    with pytest.raises(InputError, match=r"1\.tar: the first sample has no files"):
        adopt(tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "0.tar", "w") as tar:
        add(tar, "0.png", content(0, 0))
        add(tar, "0.cls", b"0")
    with pytest.raises(InputError, match=r"1\.tar holds no samples"):
        adopt(tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "1.tar", "w") as tar:
        add(tar, "0.png", content(0, 0))
        add(tar, "0.jpg", jpeg(3, (8, 8)))
    with pytest.raises(InputError, match=r"the sample 0 has two files \.image"):
        adopt(tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "0.tar", "w") as tar:
        for i in range(9):
            add(tar, f"img.{i}.png", content(0, 0))
    with pytest.raises(InputError, match=r"has 0\.png, 1\.png, 2\.png, 3\.png, 4\.png \(a sample's name ends at"):
        adopt(tmp_path / "a")
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_folder_of_class_folders_is_listed_in_the_order_of_its_labels(tmp_path):
    paths, labels, classes = list_images(as_folders(NAMES["numbers"], tmp_path / "images"))
    assert labels == sorted(labels) and classes == NAMES["numbers"][1]
    assert [os.path.basename(os.path.dirname(path)) for path in paths[10:15]] == ["2"] * 5
