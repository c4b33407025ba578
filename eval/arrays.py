"""Reading .npz files, which may be damaged or another program's."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moe_dit.runtime.reading import open_file


def read_arrays(file: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of these names, or all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole .npz file, or lacks one of them.
    """
    try:
        with open_file(file) as opened, np.load(opened) as arrays:
            return {name: arrays[name] for name in (arrays.files if names is None else names)}
    except FileNotFoundError:
        raise
    # A byte that is not what it was makes zipfile, zlib and numpy raise errors of many kinds.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
