"""Where images come from, how odd ones come out, and what becomes of those that cannot be read."""

import io
import json
import os
import shutil
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image

from data_prep import encode_latents, index, shards, verify
from data_prep.digits import build_vae
from data_prep.images import list_images
from data_prep.sources import open_source
from helpers.server import serving
from helpers.sources import (
    BROKEN,
    as_arrow,
    as_class_tars,
    as_parquet,
    as_tar_of_tars,
    as_webdataset,
    break_images,
    jpeg,
    pack,
    png,
    samples,
    write_images,
)
from moe_dit.data import ShardReader, stored_png
from moe_dit.data.pixels import as_seen, load_image
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "images"
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    return pack(images, tmp_path_factory.mktemp("packed") / "out", "--shard-size", 4)


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (as_class_tars, True),
        (as_tar_of_tars, True),
        (as_webdataset, False),
        (as_parquet, True),
        (as_arrow, True),
    ],
)
def test_every_source_gives_the_same_samples(images, packed, tmp_path, make, named):
    out = pack(make(images, tmp_path / "source"), tmp_path / "out", "--shard-size", 6)
    want = samples(packed)
    assert len(want) == 21
    if not named:  # WebDataset shards tell numbers
        want = sorted((str(["a", "b b", "ç"].index(name)), pixels) for name, pixels in want)
    assert samples(out) == want
    assert verify.verify(out) == (4, 21)


def test_servers_that_stop_or_give_no_parts(images, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_DIT_PATIENCE", "1")
    tars = as_class_tars(images, tmp_path / "tars")
    with serving(tars) as server:
        server.parts = False
        with pytest.raises(InputError, match="in parts"):
            open_source(server.url).read(3)
        server.parts = True
        source = open_source(server.url)
        assert source.read(3) == open(list_images(images)[0][3], "rb").read()
        (tars / "ç.tar").unlink()
        with pytest.raises(InputError, match=r"ç\.tar is missing on the server"):
            source.read(20)
        with pytest.raises(InputError, match="missing on the server"):
            open_source(f"{server.url}/none")
    with pytest.raises(InputError, match="cannot be read, tried for"):
        source.read(3)
    (tmp_path / "empty" / "cls").mkdir(parents=True)
    with serving(tmp_path / "empty") as server:
        with pytest.raises(InputError, match="class folder cls holds no images"):
            open_source(server.url)
        with pytest.raises(InputError, match="no class folders"):
            open_source(f"{server.url}/cls")
        (tmp_path / "empty" / "x.arrow").write_bytes(b"x")
        with pytest.raises(InputError, match="copy them first"):
            open_source(server.url)


def test_an_image_that_goes_is_broken_and_a_server_that_goes_ends_the_job(images, tmp_path, monkeypatch):
    served = tmp_path / "served"
    shutil.copytree(images, served)
    monkeypatch.setenv("MOE_DIT_PATIENCE", "1")
    with serving(served) as server:
        source = open_source(server.url)
        monkeypatch.setattr(shards, "open_source", lambda *_: source)
        next((served / "a").iterdir()).unlink()
        out = pack(server.url, tmp_path / "out", "--shard-size", 6)
        (line,) = (out / "errors.jsonl").read_text().splitlines()
        assert json.loads(line)["reason"] == "missing on the server"
        assert verify.verify(out) == (4, 20)
    with pytest.raises(InputError, match=r"^http://.* tried for"):  # and not that no image can be read
        pack(server.url, tmp_path / "again", "--shard-size", 6)
    assert not (tmp_path / "again" / "manifest.json").exists()


def test_a_broken_row_group_is_some_broken_images(images, tmp_path):
    folder = as_parquet(images, tmp_path / "source")
    source = open_source(str(folder))
    part = pa.parquet.ParquetFile(folder / "train-1.parquet").metadata.row_group(0).column(0)
    with open(folder / "train-1.parquet", "r+b") as file:
        file.seek(part.data_page_offset)
        file.write(b"\xff" * 64)
    out = pack(folder, tmp_path / "out", "--shard-size", 6)
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"train-1.parquet/0/{row}" for row in range(5)]
    assert all("row group 0 cannot be read" in line["reason"] for line in lines) and len(source) == 21


def test_parquet_is_shuffled_and_read_group_by_group(images, tmp_path):
    source = open_source(str(as_parquet(images, tmp_path / "source")))
    order = source.order()
    assert sorted(order) == list(range(21)) and order.tolist() != list(range(21))
    assert source.name(13) == "train-1.parquet/0/1"
    assert source.read(13) == open(list_images(images)[0][13], "rb").read()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda p: p.with_suffix(".tar").write_bytes(b"x" * 2000), "cannot be read as a tar file"),
        (lambda p: p.with_suffix(".parquet").write_bytes(b"PAR1"), "cannot be read as a table"),
        (lambda p: p.with_suffix(".txt").write_bytes(b"x"), "expected a folder, or a .tar"),
        (lambda p: tarfile.open(p.with_suffix(".tar"), "w").close(), "holds no images"),
        (
            lambda p: pa.parquet.write_table(pa.table({"x": [1]}), p.with_suffix(".parquet")),
            "cannot be read as a table",
        ),
    ],
)
def test_a_source_that_is_none_is_one_line(tmp_path, make, line):
    make(tmp_path / "source")
    (path,) = tmp_path.iterdir()
    with pytest.raises(InputError, match=line) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_remote_and_looping_folders(images, tmp_path):
    with pytest.raises(InputError, match="this machine"):
        pack(images, tmp_path / "out", "--out", "s3://bucket/x")
    with pytest.raises(InputError, match="pip install s3fs"):
        pack(images, tmp_path / "out", "--images", "s3://bucket/x")
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(3))
    (folder / "again").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    assert len(list_images(tmp_path / "images")[0]) == 1


# --- odd images -------------------------------------------------------------------------------------------------------


def test_images_come_out_as_people_see_them():
    half = Image.new("L", (2, 1))
    half.putdata([0, 128])

    def seen(image, **how):
        return list(as_seen(Image.open(io.BytesIO(png(image, **how)))).getdata())

    grey16 = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert seen(grey16) == [(0,) * 3, (100,) * 3, (255,) * 3]
    assert seen(half) == [(0, 0, 0), (128, 128, 128)]
    assert seen(Image.new("1", (1, 1), 1)) == [(255, 255, 255)]
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)])
    assert seen(rgba) == [(10, 20, 30), (255, 255, 255), (127, 127, 127)]
    la = Image.new("LA", (2, 1))
    la.putdata([(50, 255), (50, 0)])
    assert seen(la) == [(50, 50, 50), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    assert seen(palette) == [(200, 0, 0), (0, 0, 200)]
    assert seen(palette, transparency=1) == [(200, 0, 0), (255, 255, 255)]
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(file, "JPEG", quality=100)
    red, green, blue = as_seen(Image.open(file)).getpixel((4, 4))
    assert red < 10 and green > 240 and blue > 240  # cyan


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (1, 0)), (8, (0, 1)), (2, (1, 0))])
def test_images_are_turned_as_their_exif_data_says(orientation, corner):
    image = Image.new("RGB", (2, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    turned = load_image(file.getvalue(), 2)
    assert [p for p in np.ndindex(2, 2) if turned.getpixel(p) == (255, 255, 255)] == [corner]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (256, 256), (300, 200)])
def test_stored_png_is_png(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    data = stored_png.encode(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert np.array_equal(stored_png.decode(data), pixels)
    assert pixels.nbytes < len(data) < 1.01 * pixels.nbytes + 500
    if shape[0] > 1:
        assert stored_png.decode(png(Image.fromarray(pixels))) is None
    assert stored_png.decode(data[:50]) is None and stored_png.decode(b"") is None
    filtered = bytearray(data)
    filtered[48] = 1  # the first row's filter: sub; the checksum of the stream is off too
    assert stored_png.decode(bytes(filtered)) is None


# --- images that cannot be read ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(images, tmp_path_factory):
    """The images with broken ones among them: 22 files, 4 of which cannot be read."""
    folder = shutil.copytree(images, tmp_path_factory.mktemp("damaged") / "images")
    break_images(folder)
    return folder


@pytest.fixture(scope="module")
def left_out(damaged, tmp_path_factory):
    return pack(damaged, tmp_path_factory.mktemp("left") / "out", "--shard-size", 3)


def test_every_file_is_accounted_for(damaged, left_out):
    errors = [json.loads(line) for line in (left_out / "errors.jsonl").read_text().splitlines()]
    assert [error["image"] for error in errors] == sorted(BROKEN)
    assert all(error["reason"] and "0x" not in error["reason"] for error in errors)
    manifest = json.loads((left_out / "manifest.json").read_text())
    assert manifest["errors"] == 4 and manifest["samples"] == 18 == len(samples(left_out))
    paths, _, _ = list_images(damaged)
    keys = {
        one["__key__"]
        for shard in left_out.glob("*.tar")
        for one in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    }
    listed = {os.path.relpath(path, damaged) for path in paths}
    assert {os.path.relpath(paths[int(key)], damaged) for key in keys} == listed - set(BROKEN)
    assert verify.verify(left_out)[1] == 18 and not list(left_out.glob(".*.broken.json"))


def test_strict_stops_and_most_broken_stops(damaged, tmp_path):
    with pytest.raises(InputError, match=r"cannot read the image .*(é \d|notes)\.jpg"):
        pack(damaged, tmp_path / "out", "--strict")
    assert not list((tmp_path / "out").glob("*.tar"))
    folder = tmp_path / "many" / "a"
    folder.mkdir(parents=True)
    for i in range(1100):
        (folder / f"{i}.png").write_bytes(png(Image.new("L", (8, 8))) if i % 5 else b"x")
    with pytest.raises(InputError, match=r"\d+ of \d+ cannot be used"):
        pack(tmp_path / "many", tmp_path / "out2")
    assert not (tmp_path / "out2" / "manifest.json").exists()


def test_a_shard_without_samples_does_not_appear(images, tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(5))
    (folder / "2.jpg").write_bytes(b"")
    out = pack(tmp_path / "images", tmp_path / "out", "--shard-size", 1)
    assert len(list(out.glob("*.tar"))) == 1 and verify.verify(out) == (1, 1)


# --- damage -----------------------------------------------------------------------------------------------------------


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _index(folder):
    return next(folder.glob("index-*.npy"))


def _rows(folder, change):
    """Change the index's records, of which there are 21 of 36 bytes."""
    path = _index(folder)
    data = path.read_bytes()
    start = len(data) - 21 * 36
    rows = [bytearray(data[start + 36 * i : start + 36 * (i + 1)]) for i in range(21)]
    change(rows)
    path.write_bytes(data[:start] + b"".join(rows))


def _manifest(folder, change):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _label_place(folder):
    with tarfile.open(folder / "shard-000001.tar") as tar:
        return next(member.offset_data for member in tar if member.name.endswith(".cls"))


def _swap(folder):
    a, b, c = (folder / name for name in ("shard-000000.tar", "shard-000001.tar", "x"))
    a.rename(c), b.rename(a), c.rename(b)


DAMAGE = {
    "a pixel": lambda f: _flip(f / "shard-000002.tar", 1600),
    "a label": lambda f: _flip(f / "shard-000001.tar", _label_place(f)),
    "a name": lambda f: _flip(f / "shard-000001.tar", 3),
    "padding": lambda f: _flip(f / "shard-000001.tar", 512 + 300),
    "the last byte": lambda f: _flip(f / "shard-000003.tar", -1),
    "cut off": lambda f: os.truncate(f / "shard-000001.tar", 2000),
    "empty": lambda f: os.truncate(f / "shard-000001.tar", 0),
    "longer": lambda f: (f / "shard-000001.tar").open("ab").write(b"\0" * 512),
    "deleted": lambda f: (f / "shard-000001.tar").unlink(),
    "renamed": lambda f: (f / "shard-000001.tar").rename(f / "shard-000009.tar"),
    "swapped": _swap,
    "doubled": lambda f: (f / "shard-000001.tar").write_bytes((f / "shard-000000.tar").read_bytes()),
    "a shard too many": lambda f: (f / "shard-000077.tar").write_bytes((f / "shard-000000.tar").read_bytes()),
    "an index label": lambda f: _rows(f, lambda rows: rows[7].__setitem__(0, rows[7][0] ^ 1)),
    "an index offset": lambda f: _rows(f, lambda rows: rows[7].__setitem__(21, rows[7][21] ^ 1)),
    "an index checksum": lambda f: _rows(f, lambda rows: rows[20].__setitem__(35, rows[20][35] ^ 1)),
    "index rows swapped": lambda f: _rows(f, lambda rows: rows.insert(3, rows.pop(9))),
    "an index cut off": lambda f: os.truncate(_index(f), 500),
    "an index of noise": lambda f: _index(f).write_bytes(os.urandom(900)),
    "a manifest's count": lambda f: _manifest(f, lambda m: m.update(samples=20)),
    "a manifest's shard": lambda f: _manifest(f, lambda m: (m["shards"].pop(), m.update(samples=20))),
    "a manifest's hash": lambda f: _manifest(f, lambda m: m["shards"][2].update(sha256="0" * 64)),
    "a manifest's classes": lambda f: _manifest(f, lambda m: m["classes"].pop()),
    "a manifest's shape": lambda f: _manifest(f, lambda m: m.update(sample_shape=[3, 8, 9])),
    "a manifest's kind": lambda f: _manifest(f, lambda m: m.update(kind="latents")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds_damage(packed, tmp_path, kind):
    folder = shutil.copytree(packed, tmp_path / "shards")
    assert verify.verify(folder) == (6, 21)
    DAMAGE[kind](folder)
    with pytest.raises(InputError) as caught:
        verify.verify(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_classes_that_are_a_level_too_high(images, tmp_path, capsys):
    for part in ("part 1", "part 2"):
        shutil.copytree(images, tmp_path / "images" / part)
    open_source(str(tmp_path / "images"))
    assert "if those are the classes" in capsys.readouterr().err
    open_source(str(images))
    assert not capsys.readouterr().err


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    build_vae(seed=1).save_pretrained(folder)
    return folder


def latents(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    return {one["__key__"]: one["latent.npy"] for one in found}


def test_means_and_precision(images, vae, tmp_path, monkeypatch):
    flags = ["--vae", vae, "--size", 32]
    whole = pack(images, tmp_path / "moments", *flags, module=encode_latents)
    means = pack(images, tmp_path / "means", *flags, "--keep", "means", module=encode_latents)
    rough = pack(images, tmp_path / "bf16", *flags, "--precision", "bf16", module=encode_latents)
    manifest = read_manifest(means)
    assert manifest.sample_shape == [4, 8, 8] and not manifest.posterior
    for key, moments in latents(whole).items():
        assert np.array_equal(latents(means)[key], moments[:4])
    exact, other = (np.stack(list(latents(folder).values())).astype(np.float32) for folder in (whole, rough))
    error = np.abs(other - exact)[:, :4].max() / exact[:, :4].std()
    assert 0 < error < 0.1  # of the means' standard deviation
    with pytest.raises(InputError, match="begun with other settings: --keep"):
        pack(images, tmp_path / "moments", *flags, "--keep", "means", module=encode_latents)
    # A folder of before there was a choice is continued as it was begun.
    settings = tmp_path / "moments" / ".settings.json"
    old = json.loads(settings.read_text())
    del old["precision"], old["keep"]
    settings.write_text(json.dumps(old))
    pack(images, tmp_path / "moments", *flags, module=encode_latents)
    with pytest.raises(InputError, match="begun with other settings: --precision"):
        pack(images, tmp_path / "moments", *flags, "--precision", "bf16", module=encode_latents)


def test_latents_that_are_not_finite_are_one_images(images, vae, tmp_path, monkeypatch):
    """An image whose latents leave float16, as SDXL's VAE has them, is left out and listed, and changes no other."""
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "a" / "bright.png").write_bytes(png(Image.new("RGB", (32, 32), "white")))
    encode = encode_latents.encode

    def overflowing(network, pixels):
        moments = encode(network, pixels)
        return torch.where((pixels == 1).all(dim=(1, 2, 3), keepdim=True), 1e5, moments)

    flags = ["--vae", vae, "--size", 32, "--batch", 4]
    want = pack(images, tmp_path / "want", *flags, module=encode_latents)
    monkeypatch.setattr(encode_latents, "encode", overflowing)
    out = pack(folder, tmp_path / "out", *flags, module=encode_latents)
    (line,) = map(json.loads, (out / "errors.jsonl").read_text().splitlines())
    assert line["image"] == "a/bright.png" and "not finite in float16" in line["reason"]
    names = [os.path.relpath(path, folder) for path in list_images(folder)[0]]
    before = [os.path.relpath(path, images) for path in list_images(images)[0]]
    whole, kept = latents(want), latents(out)
    assert len(kept) == 21 and read_manifest(out).samples == 21
    for key, value in kept.items():
        other = whole[f"{before.index(names[int(key)]):08d}"]
        assert np.allclose(value.astype(np.float32), other.astype(np.float32), atol=2e-3)  # in batches of other images
    with pytest.raises(InputError, match=r"cannot use the image a/bright\.png: .*not finite"):
        pack(folder, tmp_path / "strict", *flags, "--strict", module=encode_latents)


# --- shards of other programs -----------------------------------------------------------------------------------------


def write_foreign(folder, kind):
    folder.mkdir()
    for part in range(2):
        with webdataset.TarWriter(str(folder / f"data-{part}.tar")) as tar:
            for i in range(part * 3, part * 3 + 3):
                value = np.full((4, 2, 2), i, np.float32) if kind == "latents" else np.full((4, 6, 3), i * 40, np.uint8)
                name = "latent.npy" if kind == "latents" else "webp" if i % 2 else "png"
                file = io.BytesIO()
                if kind == "latents":
                    np.save(file, value)
                else:
                    Image.fromarray(value).save(file, name, **({"lossless": True} if name == "webp" else {}))
                tar.write({"__key__": f"x/{i}", name: file.getvalue(), "cls": str(i % 3).encode(), "json": b"{}"})
    return folder


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_foreign_shards_train_after_indexing(tmp_path, monkeypatch, capsys, kind):
    folder = write_foreign(tmp_path / "foreign", kind)
    with pytest.raises(InputError, match="has no manifest"):
        read_manifest(folder)
    monkeypatch.setattr(sys, "argv", ["x", str(folder), *(["--means", "--scale", "0.5"] if kind == "latents" else [])])
    index.main()
    assert "2 shards, 6 samples" in capsys.readouterr().out
    manifest = read_manifest(folder)
    assert manifest.kind == kind and manifest.classes == ["0", "1", "2"] and not manifest.posterior
    assert manifest.sample_shape == ([4, 2, 2] if kind == "latents" else [3, 4, 6])
    x, y = ShardReader(manifest).read(np.array([4, 0, 5]), np.zeros(3, bool))
    assert y.tolist() == [1, 0, 2] and x.flatten(1)[:, 0].tolist() == (
        [4, 0, 5] if kind == "latents" else [160, 0, 200]
    )


@pytest.mark.parametrize(
    ("sample", "line"),
    [
        ({"txt": b"a", "cls": b"1"}, "the first sample has cls, txt; expected"),
        ({"png": b"a", "cls": b"1"}, "the first sample cannot be read"),
        ({"png": stored_png.encode(np.zeros((2, 2, 3), np.uint8))}, r"a sample has no \.cls"),
        ({"png": stored_png.encode(np.zeros((2, 2, 3), np.uint8)), "cls": b"cat"}, "a label is b'cat'"),
    ],
)
def test_foreign_shards_that_cannot_train_are_one_line(tmp_path, monkeypatch, sample, line):
    (tmp_path / "shards").mkdir()
    with webdataset.TarWriter(str(tmp_path / "shards" / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "0"} | sample)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "shards")])
    with pytest.raises(InputError, match=line) as caught:
        index.main()
    assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path / "shards")) == ["a.tar"]
