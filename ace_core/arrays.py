"""Arrays on disk: safetensors written whole, read memory-mapped and read-only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ace_core.errors import StoreError

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to one safetensors file."""
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(path))


def array_header(shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these arrays begins with, for files that are written bit by bit.

    Args:
        shapes: name to (shape, dtype); their bytes follow the header in this order.

    Returns:
        the header, and the offset in the file of each array.
    """
    header: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (shape, dtype) in shapes.items():
        offsets[name], end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offsets[name], end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {k: 8 + len(text) + v for k, v in offsets.items()}


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Memory-map every array of a safetensors file, read-only and without copying.

    (safetensors' own NumPy loader copies the tensors into memory; a 10M-item index should not be.)

    Raises:
        StoreError: the file is missing or is not safetensors.
    """
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(path.stat().st_size - 8, 100_000_000):
                raise ValueError("bad header length")
            header = json.loads(f.read(length))
    except (OSError, ValueError) as e:
        raise StoreError(f"cannot read arrays ({e})", where=path, remedy="Publish again.") from None
    header.pop("__metadata__", None)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if path.stat().st_size > 8 + length else None
    out: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        flat = data[begin:end].view(dtype) if data is not None and end > begin else np.empty(0, dtype)
        out[name] = flat.reshape(entry["shape"])
    return out
