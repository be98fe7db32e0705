"""Named arrays in safetensors files: read and written here, since the format is a table of contents and bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name; their bytes stay in the file until they are used.

    Eight bytes with the length of a JSON table {name: {dtype, shape, data_offsets}}, the table, and the bytes.

    Raises:
        ValueError: the file is none, or is cut off, or its table and its bytes disagree; file and name are said.
    """
    table, _, start = _contents(path)
    path, size, arrays = Path(path), Path(path).stat().st_size, {}
    for name, entry in table.items():
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: the table of contents says no dtype, shape and place of {name}.") from None
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {name} has the dtype {kind}; known are {', '.join(_DTYPES)}.")
        dtype = np.dtype(_DTYPES[kind])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, and {shape} of {kind} need others.")
        if begin < 0 or start + end > size:
            raise ValueError(f"{path} is cut off: {name} ends at byte {start + end}, and the file has {size}.")
        empty = end == begin
        arrays[name] = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", start + begin, shape)
    return arrays


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says of itself beside its arrays: texts by name.

    Raises:
        ValueError: the file is none, or is cut off.
    """
    return _contents(path)[1]


def _contents(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str], int]:
    """A file's table of contents, what it says of itself, and where its bytes begin."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or is cut off: its table of contents is not all there.")
        try:
            table = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file: its table of contents is not JSON ({error}).") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no safetensors file: its table of contents is no table.")
    said = table.pop("__metadata__", None)
    return table, said if isinstance(said, dict) else {}, 8 + length


def check_weights(
    given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], owner: Any, whose: str = "the weights' own"
) -> None:
    """Raise a `ValueError` where named arrays are not those of a network, by name and shape.

    Args:
        given: arrays by name.
        shapes: the network's.
        owner: the network.
        whose: configuration would fit, in words.
    """
    missing, extra = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys())
    if missing or extra:
        raise ValueError(
            f"The weights are not those of {owner}: missing {missing[:3]} ({len(missing)} in all), unknown {extra[:3]} "
            f"({len(extra)} in all). Give {whose} configuration."
        )
    for name, shape in shapes.items():
        if np.shape(given[name]) != shape:
            raise ValueError(f"{name} has the shape {np.shape(given[name])}, and {owner} needs {shape}.")


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: Mapping[str, str] = {}
) -> None:
    """Write arrays by name as a safetensors file, whole or not at all.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    codes = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, place = [], 0
    for name, array in arrays.items():
        part = np.asarray(array)
        if part.dtype not in codes:
            raise ValueError(f"{name} has the dtype {part.dtype}, which safetensors files do not have.")
        table[name] = {
            "dtype": codes[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [place, place + part.nbytes],
        }
        place += part.nbytes
        parts.append(part)
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the arrays begin at a multiple of eight
    draft = Path(f"{os.fspath(path)}.part")
    with draft.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())
    draft.replace(path)
