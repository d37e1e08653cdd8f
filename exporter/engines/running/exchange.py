"""Arrays between two processes: their bytes in a file, their names, types and shapes in a message.

Inputs and outputs of a model may take gigabytes, which a pipe would copy in small pieces; a file in the page cache is
read where it lies. The bytes are plain, because numpy's own format has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ALIGNMENT = 64


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Write arrays one behind the other.

    Args:
        path: The file; what it held is lost.
        arrays: What to write, of any type that numpy or ml_dtypes has.

    Returns:
        ``name``, ``dtype``, ``shape`` and ``offset`` of each: what `read_arrays` needs, as JSON values.
    """
    records = []
    with path.open("wb") as file:
        for name, value in arrays.items():
            file.seek(-file.tell() % _ALIGNMENT, 1)
            records.append({"name": name, "dtype": value.dtype.name, "shape": list(value.shape), "offset": file.tell()})
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.truncate()
    return records


def read_arrays(path: Path, records: Iterable[Mapping[str, Any]]) -> dict[str, Array]:
    """Read what `write_arrays` wrote, in its order; the arrays do not depend on the file."""
    arrays = {}
    for record in records:
        dtype, shape = np.dtype(getattr(ml_dtypes, record["dtype"], record["dtype"])), tuple(record["shape"])
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        raw = np.fromfile(path, np.uint8, count=count, offset=record["offset"])
        arrays[record["name"]] = raw.view(dtype).reshape(shape)
    return arrays
