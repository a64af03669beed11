"""A whole cache as one xarray dataset: all committed shards along their axes, arrays of latents read when used."""

from typing import Any

import numpy as np
import xarray
from xarray.backends import BackendArray
from xarray.core import indexing

from inpo.common.cache.reader import Cache, Shard
from inpo.common.cache.specs import ARRAYS

_UNITS = {"timestep": "index of levels", "pair/label": "probability"}
_ROWS = {"image/group": "group", "pair/win": "image", "pair/lose": "image"}
"""Arrays that hold rows of another axis, which begins anew with each shard."""
_COORDINATES = ("timestep", "image/id", "group/id", "pair/id")


class _Joined(BackendArray):
    """One array over all shards, behind their readers and checks; what is not asked for is not read."""

    def __init__(self, shards: list[Shard], path: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._shards, self._path, self.shape, self.dtype = shards, path, shape, dtype
        self._starts = np.cumsum([0, *(shard.num_images for shard in shards)])

    def __getitem__(self, key: Any) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        first, *rest = key
        rows = np.atleast_1d(np.arange(self.shape[0])[first])
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard).tolist():
            hit = shard == number
            out[hit] = self._shards[number].read(self._path, rows[hit] - self._starts[number])
        for axis, index in enumerate(rest, start=1):
            out = out[(slice(None),) * axis + (np.atleast_1d(np.arange(out.shape[axis])[index]),)]
        drop = tuple(axis for axis, index in enumerate(key) if isinstance(index, int | np.integer))
        squeezed: np.ndarray = out.squeeze(axis=drop) if drop else out
        return squeezed


def dataset(cache: Cache) -> xarray.Dataset:
    """The committed shards of a cache; see `inpo.common.cache.to_xarray`."""
    shards, manifest = list(cache), cache.manifest
    specs = dict(manifest.specs)
    if "x_t" not in specs:  # derived on reading, bit for bit
        specs["x_t"] = next(spec for spec in ARRAYS if spec.path == "x_t")
    lengths = [shard.lengths() for shard in shards]
    starts = {axis: np.cumsum([0, *(each[axis] for each in lengths)]) for axis in ("image", "group", "pair")}
    sizes = lengths[0] | {axis: int(ends[-1]) for axis, ends in starts.items()}
    variables: dict[str, Any] = {}
    for path, spec in specs.items():
        if path == "group/prompt":  # places in text shards: the captions themselves stand below
            continue
        if spec.chunking == "whole":
            parts = [shard.read(path) for shard in shards]
            if path in _ROWS:
                offsets = starts[_ROWS[path]]
                parts = [part.astype(np.int64) + offsets[number] for number, part in enumerate(parts)]
            data: Any = np.concatenate(parts)
        else:
            shape = tuple(sizes[axis] for axis in spec.axes)
            # What a compact cache holds in 8 bits is read as the numbers that they stand for.
            dtype = np.dtype("float16") if spec.dtype == "int8" else spec.numpy_dtype
            data = indexing.LazilyIndexedArray(_Joined(shards, path, shape, dtype))
        variables[path.replace("/", "_")] = xarray.Variable(spec.axes, data, _attributes(path, spec.meaning))
    prompts = np.concatenate([shard.prompts() for shard in shards])
    names = np.repeat([shard.name for shard in shards], [shard.num_pairs for shard in shards])
    variables["prompt"] = xarray.Variable(("group",), prompts, _attributes("prompt", "the original caption"))
    variables["shard"] = xarray.Variable(("pair",), names, _attributes("shard", "the shard that holds the pair"))
    coordinates = {*(path.replace("/", "_") for path in _COORDINATES), "prompt", "shard"}
    levels = manifest.levels
    return xarray.Dataset(
        {name: variable for name, variable in variables.items() if name not in coordinates},
        coords={name: variables[name] for name in coordinates},
        attrs={
            "title": "InPO cache",
            "schema_version": manifest.schema_version,
            "family": manifest.family,
            "inverter": manifest.inverter.name,
            "network_dtype": manifest.network_dtype,
            "space": levels.space,
            "signal": np.asarray(levels.signal),
            "noise": np.asarray(levels.noise),
            "equation": f"x_t = {'signal[t] ' if levels.space == 'noise' else ''}x0 + noise[t] target",
        },
    )


def _attributes(path: str, meaning: str) -> dict[str, str]:
    return {"long_name": meaning, "units": _UNITS.get(path, "1")}
