"""Images as people keep them: class folders, tars of class tars, shards of raw images, tables."""

import io
import json
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from data_prep import pack_pixels
from data_prep.images import list_images
from moe_dit.manifest import read_manifest


def write_images(folder):
    """Three classes of seven JPEGs; names with spaces and accents."""
    for k, name in enumerate(("a", "b b", "ç")):
        (folder / name).mkdir(parents=True)
        for i in range(7):
            (folder / name / f"é {i}.jpg").write_bytes(jpeg(30 * k + 10 * i))


BROKEN = {"ç/é 1.jpg": b"", "a/é 3.jpg": None, "a/notes.jpg": b"just text\n", "b b/é 6.jpg": b"\xff\xd8\xff"}


def break_images(folder):
    """Make four of those that :func:`write_images` wrote unreadable, as :data:`BROKEN` says."""
    for name, content in BROKEN.items():
        (folder / name).write_bytes(jpeg(30)[:300] if content is None else content)


def jpeg(value, size=(20, 14)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 100)).save(file, "JPEG", quality=95)
    return file.getvalue()


def png(image, **how):
    file = io.BytesIO()
    image.save(file, "PNG", **how)
    return file.getvalue()


def pack(images, out, *flags, module=pack_pixels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--images", str(images), "--out", str(out), "--size", "8", *map(str, flags)])
        module.main()
    return out


def samples(folder):
    """Each sample's class name and pixels, sorted."""
    manifest = read_manifest(folder)
    urls = [str(folder / shard["name"]) for shard in manifest.shards]
    found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8")
    return sorted((manifest.classes[one["cls"]], one["png"].tobytes()) for one in found)


def class_tar(folder, file):
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)


def as_class_tars(images, out):
    out.mkdir()
    for folder in images.iterdir():
        class_tar(folder, out / f"{folder.name}.tar")
    return out


def as_tar_of_tars(images, out):
    inner = as_class_tars(images, out.with_name("inner"))
    with tarfile.open(out.with_suffix(".tar"), "w") as tar:
        for path in sorted(inner.iterdir()):
            tar.add(path, path.name)
    return out.with_suffix(".tar")


def as_webdataset(images, out):
    out.mkdir()
    paths, labels, _ = list_images(images)
    for part in range(2):
        with webdataset.TarWriter(str(out / f"{part}.tar"), encoder=False) as tar:
            for i in range(part, len(paths), 2):
                content = open(paths[i], "rb").read()
                tar.write({"__key__": f"{i:05d}", "jpg": content, "cls": str(labels[i]).encode()})
    return out


def as_table(images, names=True):
    paths, labels, classes = list_images(images)
    return as_tables([open(path, "rb").read() for path in paths], labels, classes if names else None)


def as_tables(contents, labels, classes=None):
    """A table as the hub's datasets have them, of images' bytes and class numbers."""
    rows = [{"bytes": content, "path": None} for content in contents]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    features = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    return table if classes is None else table.replace_schema_metadata({"huggingface": json.dumps(features)})


def as_parquet(images, out):
    out.mkdir()
    table = as_table(images)
    pa.parquet.write_table(table.slice(0, 12), out / "train-0.parquet", row_group_size=5)
    pa.parquet.write_table(table.slice(12), out / "train-1.parquet", row_group_size=5)
    return out


def as_arrow(images, out):
    table = as_table(images)
    path = out.with_suffix(".arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return path
