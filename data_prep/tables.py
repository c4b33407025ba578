"""Images in parquet or arrow files, as the hub's datasets keep them."""

import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.classes import label, normal
from data_prep.source import BrokenImage, Source
from moe_dit.data.order import WindowOrder
from moe_dit.runtime.errors import InputError
from moe_dit.store import RemotePath

GROUPS = 16  # row groups of a parquet file whose images are shuffled together, and kept by a process that reads
_COLUMNS = "columns image (bytes and path, or bytes) and label"


class Tables(Source):
    """Parquet or arrow files with columns ``image`` (a struct of bytes and path, or bytes) and ``label``.

    A parquet file gives a row by decoding its whole row group, so images are shuffled in windows of GROUPS of them.
    """

    def __init__(self, paths: Sequence[Path | RemotePath], names: Sequence[str] | None = None):
        self.paths = paths
        self.left_out = Counter()
        self._groups: list[tuple[int, int]] = []  # file, row group
        kinds: list[Any] = []
        texts: list[Any] = []  # the same by the names that files give
        sizes: list[int] = []
        classes: dict[tuple[str, ...], str] = {}  # what files name, and one that does
        for number, path in enumerate(paths):
            try:
                table = _open_table(path)
                columns = table.schema_arrow.names
                if not {"image", "label"} <= set(columns):
                    raise ValueError(f"its columns are {', '.join(columns[:8])}")
                found: list[Any] = []
                for group in range(table.num_row_groups):
                    part = table.read_row_group(group, columns=["label"])["label"].to_pylist()
                    found += part
                    self._groups.append((number, group))
                    sizes.append(len(part))
                told = _class_names(table.schema_arrow)
            except InputError:
                raise
            except Exception as error:  # pyarrow raises whatever it meets
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(f"{path} cannot be read as a table with {_COLUMNS}: {reason}") from None
            if found and all(_is_none(one) for one in found):
                raise InputError(
                    f"{path} has no labels ({found[0]} in every row), as test splits have none; leave it out, with "
                    "--split train where its folder has others"
                )
            kinds += found
            if found:
                classes.setdefault(tuple(told), str(path))
                texts += [told[one] if told and not _is_none(one) and one < len(told) else one for one in found]
        if len(classes) > 1 and names is not None and () not in classes:
            kinds, classes = texts, {(): ""}  # by name
        if len(classes) > 1:
            (_, first), (_, second) = list(classes.items())[:2]
            raise InputError(
                f"{first} and {second} name other classes; a label is to mean one; give --classes FILE with all names"
            )
        if not kinds:
            raise InputError(f"{paths[0]}: it has no rows; there should be some, with {_COLUMNS}")
        self._unlabelled = {i: kind for i, kind in enumerate(kinds) if _is_none(kind)}
        good = [kind for i, kind in enumerate(kinds) if i not in self._unlabelled]
        wrong = next((kind for kind in good if type(kind) is not type(good[0]) or type(kind) not in (int, str)), None)
        if wrong is not None:
            raise InputError(f"{paths[0]}: labels should be class numbers, or names; one is {str(wrong)[:40]!r}")
        labelled = label(good, str(paths[0]), names, next(iter(classes)))
        found_labels = iter(labelled.labels)
        self.labels = [0 if i in self._unlabelled else next(found_labels) for i in range(len(kinds))]
        self.classes = labelled.classes
        self.told = f"a class is a value of the column label; {labelled.order}"
        self._sizes = sizes
        self._starts = np.cumsum([0, *sizes])
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def name(self, i: int) -> str:
        group, row = self._row(i)
        number, part = self._groups[group]
        return f"{self.paths[number].name}/{part}/{row}"

    def read(self, i: int) -> bytes:
        if i in self._unlabelled:
            raise BrokenImage(f"its row has no label ({self._unlabelled[i]})")
        group, row = self._row(i)
        if group not in self._kept:
            number, part = self._groups[group]
            try:
                self._kept[group] = _open_table(self.paths[number]).read_row_group(part, columns=["image"])["image"]
            except InputError:
                raise
            except Exception as error:  # pyarrow raises whatever it meets
                raise BrokenImage(f"row group {part} cannot be read: {str(error).partition(chr(10))[0]}") from None
            if len(self._kept) > GROUPS:
                self._kept.popitem(last=False)
        return _content(self._kept[group][row].as_py())

    def order(self) -> np.ndarray:
        return WindowOrder(0, self._sizes, GROUPS).samples(np.arange(len(self)))

    def _row(self, i: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        return group, i - int(self._starts[group])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}


def _is_none(value: Any) -> bool:
    """Whether a label is none; -1 stands for that in the hub's datasets."""
    return value is None or (isinstance(value, int) and value < 0)


def _content(value: Any) -> bytes:
    """The bytes of an image in a row; BrokenImage where there are none."""
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    if isinstance(value, bytes) and value:
        return value
    if path:
        raise BrokenImage(f"its row holds a path ({str(path)[:200]}) and no bytes")
    if value is None or value == b"":
        raise BrokenImage("its row holds no image")
    raise BrokenImage(f"its row holds {type(value).__name__} instead of bytes")


class _ArrowFile:
    """An arrow file with the part of pyarrow's ParquetFile that is used here."""

    def __init__(self, path: Path):
        import pyarrow as pa

        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except pa.ArrowInvalid:  # the datasets library writes streams
            self.table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.schema_arrow = self.table.schema
        self.num_row_groups = 1

    def read_row_group(self, _: int, columns: list[str]) -> Any:
        return self.table.select(columns)


def _open_table(path: Path | RemotePath) -> Any:
    import pyarrow.parquet

    if isinstance(path, RemotePath):
        if path.suffix == ".arrow":
            raise InputError(f"{path}: arrow files are read from this machine's disks; copy them first")
        return pyarrow.parquet.ParquetFile(path.open())
    return _ArrowFile(path) if path.suffix == ".arrow" else pyarrow.parquet.ParquetFile(path)


def _class_names(schema: Any) -> list[str]:
    """Those of the label, where the datasets library left them in the file."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return [normal(str(name)) for name in names]
    except (KeyError, TypeError, ValueError):
        return []
