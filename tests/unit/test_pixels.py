"""Odd images have the pixels that their formats define, the same ones wherever they are read, and little memory."""

import io
import json
import os
import runpy
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep.encode_latents import read_pixels
from data_prep.index import adopt
from eval.images import ImageFile, any_images, image_size, read_batches, read_image
from helpers.odd_images import (
    RGB,
    SIDE,
    check_pixels,
    chunk,
    exif,
    gif,
    odd_images,
    png,
    rows,
    saved,
    tiff,
    write_odd_images,
)
from helpers.sources import pack
from moe_dit.data import ShardReader
from moe_dit.data import pixels as module
from moe_dit.data.pixels import as_seen, center_crop, load_image, read_picture
from moe_dit.manifest import read_manifest
from moe_dit.runtime.errors import InputError

# The module's own filter of warnings is gone when pytest has imported it.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write_odd_images(tmp_path_factory.mktemp("odd") / "images")


@pytest.fixture(scope="module")
def shards(odd, tmp_path_factory):
    return pack(odd, tmp_path_factory.mktemp("shards") / "out", "--shard-size", 50)


# --- every way of reading ---------------------------------------------------------------------------------------------


def one_by_one(read):
    """What gives each image's pixels or reason, of a function that reads one file."""

    def read_all(odd: Path, _: Path) -> dict[str, np.ndarray | str]:
        found: dict[str, np.ndarray | str] = {}
        for path in (odd / "odd").iterdir():
            try:
                found[path.name] = np.asarray(read(path))
            except InputError as error:
                found[path.name] = str(error)
        return found

    return read_all


def of_shards(read):
    """The same of shards, of a function from their folder to the pixels of what is in them, in the order of keys."""

    def read_all(odd: Path, shards: Path) -> dict[str, np.ndarray | str]:
        errors = [json.loads(line) for line in (shards / "errors.jsonl").read_text().splitlines()]
        found: dict[str, np.ndarray | str] = {Path(error["image"]).name: error["reason"] for error in errors}
        names = sorted(path.name for path in (odd / "odd").iterdir() if path.name not in found)
        return found | dict(zip(names, read(shards), strict=True))

    return read_all


def members(shards: Path) -> list[np.ndarray]:
    urls = [str(path) for path in shards.glob("*.tar")]
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    return [sample["png"] for sample in sorted(samples, key=lambda sample: sample["__key__"])]


def as_scored(shards: Path) -> list[np.ndarray]:
    found = sorted(any_images(shards), key=lambda image: (image.file, image.offset))
    keys = [
        name
        for path in sorted(shards.glob("*.tar"))
        for name in (one["__key__"] for one in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    ]
    return [read_image(image, SIDE).permute(1, 2, 0).numpy() for _, image in sorted(zip(keys, found, strict=True))]


def as_scores_do(path: Path) -> np.ndarray:
    """An image as scores read it; why it is not read, which they do not tell of all, is as shards tell it."""
    try:
        return read_image(ImageFile(path, None), SIDE).permute(1, 2, 0).numpy()
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        load_image(path, SIDE)
        raise


def trained_on(odd: Path, shards: Path) -> dict[str, np.ndarray | str]:
    """What training reads of them in shards of another program, which keep files as they are."""
    folder = shards.with_name("foreign")
    names = sorted(path.name for path in (odd / "odd").iterdir())
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar"), encoder=False) as tar:
        tar.write({"__key__": "0", "png": png(8, 2, rows(RGB)), "cls": b"0"})
        for i, name in enumerate(names):
            tar.write({"__key__": f"{i + 1}", "png": (odd / "odd" / name).read_bytes() or b" ", "cls": b"0"})
    adopt(folder, None, None, None, 0.0, False)
    reader = ShardReader(read_manifest(folder))
    found: dict[str, np.ndarray | str] = {}
    for i, name in enumerate(names):
        try:
            x, _ = reader.read(np.array([i + 1]), np.zeros(1, bool))
            found[name] = x[0].permute(1, 2, 0).numpy()
        except InputError as error:
            found[name] = str(error)
    return found


# What is written of these is (folder of images, folder of shards) -> {file name: pixels or reason}.
WAYS = {
    "files": one_by_one(lambda path: load_image(path, SIDE)),
    "bytes": one_by_one(lambda path: load_image(path.read_bytes(), SIDE)),
    "for an autoencoder": one_by_one(lambda path: read_pixels(str(path), SIDE).permute(1, 2, 0)),
    "for scores": one_by_one(as_scores_do),
    "shards": of_shards(members),
    "shards for scores": of_shards(as_scored),
    "shards of other programs": trained_on,
}


@pytest.mark.parametrize("way", WAYS)
def test_odd_images_have_the_pixels_that_their_formats_define(odd, shards, way):
    check_pixels(WAYS[way](odd, shards))


def test_reasons_do_not_change_from_run_to_run(odd, shards, tmp_path):
    again = pack(odd, tmp_path / "again", "--shard-size", 7)
    assert (again / "errors.jsonl").read_bytes() == (shards / "errors.jsonl").read_bytes()
    assert "0x" not in (shards / "errors.jsonl").read_text()
    for name in ("text.jpg", "nothing.png"):
        with pytest.raises(InputError, match=r"^cannot read an image: not an image of a known format$"):
            load_image((odd / "odd" / name).read_bytes(), SIDE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
def test_sizes_are_those_of_what_is_read(tmp_path, kind, orientation):
    wide = np.concatenate([RGB, RGB], 1)
    if kind == "png":
        content = png(8, 2, rows(wide), (b"eXIf", exif(orientation)), size=(16, 8))
    elif kind == "tif":
        content = tiff(rows(wide), (8,) * 3, 2, more={256: [16], 274: [orientation]})
    else:
        content = saved(wide, "JPEG", exif=b"Exif\0\0" + exif(orientation))
    (tmp_path / f"a.{kind}").write_bytes(content)
    image = ImageFile(tmp_path / f"a.{kind}", None)
    height, width = read_image(image).shape[1:]
    assert (width, height) == image_size(image) == ((8, 16) if orientation > 4 else (16, 8))


def test_arrays_of_samples_are_held_to_the_same_limit(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(bytes(100))
    for read in (image_size, read_image):
        with pytest.raises(InputError, match="it has 8193 x 8192 pixels, more than the 67108864"):
            read(ImageFile(path, None, 0, 8192 * 8193 * 3, (8192, 8193)))


def test_formats_whose_decoders_take_more_have_a_limit_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(module.MOST_OF, "WEBP", 100)
    for kind, good in (("WEBP", False), ("PNG", True)):
        content = saved(np.concatenate([RGB, RGB], 1), kind)
        if good:
            assert load_image(content, SIDE).size == (SIDE, SIDE)
        else:
            with pytest.raises(InputError, match="it has 16 x 8 pixels, more than the 100 that are read"):
                load_image(content, SIDE)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 2, rows(RGB)))
    os.truncate(path, 5 * 2**30)
    with memory(8), pytest.raises(InputError, match=r"it has 5368709120 bytes, more than the 1073741824"):
        load_image(path, SIDE)
    with memory(8), pytest.raises(InputError, match="it has 5368709120 bytes"):
        read_image(ImageFile(path, None), SIDE)


# --- large and thin images --------------------------------------------------------------------------------------------


class memory:
    """Within it the process may have so many MB more in memory than before, at its highest."""

    def __init__(self, most: int):
        self.most = most

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the highest of now on
        self.before = self.highest()

    def __exit__(self, kind, *_):
        taken = self.highest() - self.before
        assert kind is not None or taken < self.most, f"{taken} MB"

    @staticmethod
    def highest() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 // 10**6


def plain(width, height):
    """A PNG file of one colour, RGB, made without holding it."""
    row = b"\0" + bytes((200, 100, 50)) * width
    stream = zlib.compressobj(1)
    data = b"".join(stream.compress(row) for _ in range(height)) + stream.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_an_image_takes_memory_for_itself_and_half(tmp_path):
    """Of 60 million pixels, which are 240 MB; and one of 20,000 that became 1.3 billion as its width was made 256."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "large.png").write_bytes(plain(6001, 9999))
    (folder / "thin.png").write_bytes(plain(1, 20_000))
    with memory(400):
        out = pack(tmp_path / "images", tmp_path / "out", "--size", 256)
    assert [np.unique(pixels.reshape(-1, 3), axis=0).tolist() for pixels in members(out)] == [[[200, 100, 50]]] * 2
    image = ImageFile(folder / "large.png", None)
    with memory(400):  # which two threads share
        ((_, read),) = read_batches([image, image], 64)
    assert (read == torch.tensor([200, 100, 50]).view(3, 1, 1)).all()


@pytest.mark.parametrize("size", [(3, 997), (997, 3), (1, 700), (40, 2001), (301, 20), (100, 1000)])
def test_thin_images_are_cut_and_then_enlarged(monkeypatch, size):
    width, height = size
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    want = np.asarray(center_crop(Image.fromarray(noise), 32)).astype(int)
    calls = []
    cut = module._resized_middle
    monkeypatch.setattr(module, "_resized_middle", lambda *args: calls.append(args) or cut(*args))
    monkeypatch.setattr(module, "FAR_LARGER", 0)
    got = np.asarray(center_crop(Image.fromarray(noise), 32))
    assert len(calls) == 1 and got.shape == (32, 32, 3) and np.abs(got - want).max() <= 1


def test_usual_shapes_are_resized_whole(monkeypatch):
    monkeypatch.setattr(module, "_resized_middle", None)
    for size in ((500, 375), (375, 500), (2000, 300), (64, 64), (40, 5000)):
        assert center_crop(Image.new("L", size), 256).size == (256, 256)
    monkeypatch.setattr(module, "FAR_LARGER", 0)
    assert center_crop(Image.new("L", (400, 100)), 256).size == (256, 256)


def noisy(mode, width, height, orientation):
    """A PNG or TIFF file of noise."""
    noise = np.random.default_rng(width + height)
    if mode == "I;16":
        return png(16, 0, rows(noise.integers(0, 65536, (height, width)), ">u2"), (b"eXIf", exif(orientation)),
                   size=(width, height))  # fmt: skip
    image = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise.integers(0, 256, (height, width), np.uint8)))
    file = io.BytesIO()
    how = {"transparency": 3} if mode == "P" else {}
    kind = "TIFF" if mode == "CMYK" else "PNG"
    more = {} if kind == "TIFF" else {"compress_level": 1, "exif": b"Exif\0\0" + exif(orientation)}
    image.save(file, kind, **more, **how)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_strips_give_the_same_pixels(monkeypatch, mode):
    """Large images are turned, converted and halved strip by strip; here in strips of three rows."""
    for number, (width, height) in enumerate([(64, 41), (41, 64), (67, 67)]):
        for orientation in (1, 2, 3, 4, 5, 6, 7, 8) if number == 0 else (1, 6):
            content = noisy(mode, width, height, orientation)
            monkeypatch.setattr(module, "STRIP", 2**20)
            whole = as_seen(Image.open(io.BytesIO(content)))
            want = [np.asarray(center_crop(whole, size)) for size in (8, 20, 40)]
            monkeypatch.setattr(module, "STRIP", 3 * 64)
            got = [np.asarray(read_picture(io.BytesIO(content), size)) for size in (8, 20, 40)]
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), (orientation, width)
            assert np.array_equal(read_picture(io.BytesIO(content)), whole)


def test_threads_decode_no_more_than_one_image_may_have(monkeypatch):
    monkeypatch.setattr(module, "_side_by_side", module._SideBySide())
    inside, most, lock = [0], [0], threading.Lock()

    def decode(pixels):
        with module.decoding(pixels, 1):
            with lock:
                inside[0] += pixels
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.002)
            with lock:
                inside[0] -= pixels

    sizes = [module.MOST_PIXELS // part for part in (3, 1, 2, 5, 8, 1, 3, 4, 2, 9)]
    threads = [threading.Thread(target=decode, args=(pixels,), daemon=True) for pixels in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert module.MOST_PIXELS / 2 < most[0] <= module.MOST_PIXELS
    assert module._side_by_side._left == module.MOST_PIXELS


def test_who_waits_for_memory_is_not_overtaken():
    memory_of_images = module._SideBySide()
    memory_of_images.take(module.MOST_PIXELS // 2)
    order = []

    def take(pixels):
        memory_of_images.take(pixels)
        order.append(pixels)
        memory_of_images.give(pixels)

    large, small = (threading.Thread(target=take, args=(module.MOST_PIXELS // part,), daemon=True) for part in (1, 4))
    large.start()
    for _ in range(10_000):
        if memory_of_images._turn.locked():
            break
        threading.Event().wait(0.001)
    small.start()
    small.join(0.1)
    assert small.is_alive() and order == []
    memory_of_images.give(module.MOST_PIXELS // 2)
    large.join(60), small.join(60)
    assert order == [module.MOST_PIXELS, module.MOST_PIXELS // 4]


def test_a_photograph_is_decoded_whole():
    """Pillow's draft mode, a small picture of a JPEG file's, has other pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    content = saved(noise, "JPEG", quality=90)
    want = center_crop(Image.open(io.BytesIO(content)).convert("RGB"), 16)
    assert np.array_equal(load_image(content, 16), want)


def test_pillow_does_not_warn_of_what_is_refused():
    (larger,) = (odd.content for odd in odd_images() if odd.name == "larger.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(larger))
        assert len(said) == 1
        fresh = runpy.run_path(module.__file__)
        with pytest.raises(InputError, match="it has 12000 x 12000 pixels"):
            fresh["load_image"](larger, SIDE)
    assert len(said) == 1


def test_pillow_s_own_limit_stays(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    for odd in odd_images():
        if odd.name.startswith("bomb"):
            with pytest.raises(InputError, match="pixels, more than"):
                load_image(odd.content, SIDE)
    assert before == Image.MAX_IMAGE_PIXELS
    (tmp_path / "a.gif").write_bytes(gif([((0, 0, 8, 8), bytes(64))]))
    assert image_size(ImageFile(tmp_path / "a.gif", None)) == (8, 8)
