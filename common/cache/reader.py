"""Reading a cache: committed shards only, checked against their commits before the first byte is trusted."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, Shaped

from inpo.common.cache.commits import Commit, TextCommit, read_commits
from inpo.common.cache.committed import CommittedArrays, Rows
from inpo.common.cache.schema import BUCKETS, MANIFEST, Manifest
from inpo.common.cache.specs import TEXT, ArraySpec
from inpo.common.cache.store import CacheStore, digest
from inpo.common.errors import CacheError, CacheIncomplete, CacheMissing, InpoError

if TYPE_CHECKING:
    from inpo.common.levels import Levels


class TextShard(CommittedArrays):
    """One committed shard of texts: prompts and what the network is told of each."""

    def __init__(self, store: CacheStore, manifest: Manifest, name: str, commit: TextCommit) -> None:
        super().__init__(store, f"texts/{name}/{commit.attempt}", commit, manifest.text_specs)
        self.name = name
        self.commit = commit

    @property
    def title(self) -> str:
        return f"text shard {self.name}"

    @property
    def num_prompts(self) -> int:
        return self.commit.num_prompts

    def lengths(self) -> dict[str, int]:
        return {"prompt": self.num_prompts}

    def rows(self, name: str, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, "row ..."]:
        """What some prompts own under a condition's name. CacheSchemaError for one that has no numbers."""
        without = np.intersect1d(rows, self.commit.not_finite)
        if len(without):
            raise self.misfit(
                name, f"prompt {without[0]:.0f} is asked for, and the encoder gave NaN or infinity for it"
            )
        if self.specs[name].num_cut:
            return self.read_chunks(name, rows[:, None])
        return self.read_stored(name, rows)

    @cached_property
    def text(self) -> tuple[str, ...]:
        """The prompts, in rows' order."""
        return tuple(map(str, self.read_stored(TEXT.path)))


class Texts:
    """The committed text shards of a cache, by name. One that was committed after `commits` were read is found too."""

    def __init__(self, store: CacheStore, manifest: Manifest, commits: Mapping[str, TextCommit]) -> None:
        self.store = store
        self.manifest = manifest
        self._shards = {name: TextShard(store, manifest, name, commit) for name, commit in commits.items()}

    def __iter__(self) -> Iterator[TextShard]:
        return iter(list(self._shards.values()))

    def get(self, name: str) -> TextShard | None:
        """A text shard; None if it is not committed. Raises CacheCorrupt or CacheSchemaError for a bad commit."""
        if name not in self._shards:
            path = f"{TextCommit.folder}/{name}.json"
            data = self.store.get(path)
            if data is not None:
                commit = TextCommit.from_json(data, self.store.path(path))
                commit.check_files(self.manifest, self.store.path(path))
                self._shards[name] = TextShard(self.store, self.manifest, name, commit)
        return self._shards.get(name)

    def need(self, name: str) -> TextShard:
        """A text shard that a shard of images names; CacheIncomplete if it is not committed."""
        found = self.get(name)
        if found is None:
            raise CacheIncomplete(
                f"Text shard {name} is not there, and shards of this cache need it.",
                where=self.store.path(f"{TextCommit.folder}/{name}.json"),
                expected="a committed text shard",
                got="no commit",
                fix="the same `inpo precompute` encodes missing texts again; or restore it from a copy of the cache",
            )
        return found


class Shard(CommittedArrays):
    """One committed shard of images in groups, and the pairs among them."""

    def __init__(self, cache: "Cache", name: str, commit: Commit) -> None:
        super().__init__(cache.store, f"shards/{name}/{commit.attempt}", commit, cache.manifest.specs)
        self.cache = cache
        self.name = name
        self.commit = commit
        self._scales: dict[str, np.ndarray | None] = dict.fromkeys(
            path for path, spec in self.specs.items() if spec.dtype == "int8"
        )

    @property
    def title(self) -> str:
        return f"shard {self.name}"

    @property
    def num_pairs(self) -> int:
        return self.commit.num_pairs

    @property
    def num_images(self) -> int:
        return self.commit.num_images

    def lengths(self) -> dict[str, int]:
        return self.cache.manifest.lengths(self.commit.num_images, self.commit.num_groups, self.commit.num_pairs)

    def row_names(self, spec: ArraySpec, rows: list[int]) -> list[str]:
        """The pairs that stand on an array's rows."""
        try:
            names, sides = self.read("pair/id"), self.sides()
        except InpoError:
            return super().row_names(spec, rows)
        hit = np.isin(sides, rows).any(1) if spec.axes[0] == "image" else np.isin(np.arange(len(names)), rows)
        return [f"pair {name}" for name in names[hit]]

    def check_values(self, path: str, values: np.ndarray) -> None:
        commit = self.commit
        stops = {
            "timestep": self.cache.manifest.num_train_timesteps,
            "image/group": commit.num_groups,
            "pair/win": commit.num_images,
            "pair/lose": commit.num_images,
        }
        if path in stops and values.size and (values.min() < 0 or values.max() >= stops[path]):
            raise self.misfit(path, f"{values.min()}..{values.max()} outside 0..{stops[path] - 1}")
        if path == "group/prompt":
            self._check_prompts(values)

    def _check_prompts(self, values: Int[np.ndarray, "group 2"]) -> None:
        """CacheIncomplete for a text shard that is not there: that makes no shard of images a bad one."""
        texts = self.commit.texts
        for place, row in np.unique(values, axis=0).tolist():
            if not 0 <= place < len(texts):
                raise self.misfit("group/prompt", f"{place} outside 0..{len(texts) - 1}, the commit's texts")
            found = self.cache.texts.need(texts[place])
            if not 0 <= row < found.num_prompts:
                raise self.misfit("group/prompt", f"{row} outside 0..{found.num_prompts - 1} of {found.title}")
            if row in found.commit.not_finite:
                raise self.misfit(
                    "group/prompt", f"prompt {row} of {found.title}, for which the encoder gave no numbers"
                )

    def read_stored(self, path: str, rows: Rows = None) -> Shaped[np.ndarray, "row ..."]:
        """As stored; what a compact cache holds in 8 bits, as the float16 numbers that it stands for."""
        values = super().read_stored(path, rows)
        if path not in self._scales:
            return values
        scale = self._scale(path)[slice(None) if rows is None else rows]
        scaled: np.ndarray = values * scale[..., None, None]
        return scaled

    def read_chunks(self, path: str, places: Int[np.ndarray, "chunk axis"]) -> Shaped[np.ndarray, "chunk ..."]:
        """As `read_stored`."""
        values = super().read_chunks(path, places)
        if path not in self._scales:
            return values
        scaled: np.ndarray = values * self._scale(path)[tuple(places.T)][..., None, None]
        return scaled

    def _scale(self, path: str) -> Float16[np.ndarray, "*row c"]:
        """The scales of an array in 8 bits, read once."""
        found = self._scales[path]
        if found is None:
            found = self._scales[path] = super().read_stored(f"{path}_scale")
        return found

    def __contains__(self, path: str) -> bool:
        return path in self.stored or (path == "x_t" and "target" in self.stored) or self._is_delta(path)

    def _is_delta(self, path: str) -> bool:
        return path == "eps_ref" and self.cache.delta_is_reference and "delta" in self.stored

    def read(self, path: str, rows: Rows = None) -> Shaped[np.ndarray, "row ..."]:
        """Array `path` as numpy, whole or some rows of its first axis (image, group or pair).

        What is not stored but follows from what is stored is derived: x_t of a lean cache (bit-identical to a full
        one's), eps_ref where it is delta. Raises CacheIncomplete, naming the option that would store it, for the
        rest, and CacheCorrupt, naming shard, array and pairs, for damaged bytes.
        """
        if path in self.stored and path in self.specs:
            return self.read_stored(path, rows)
        if path == "x_t" and "target" in self.stored:
            return self._derive_x_t(rows)
        if self._is_delta(path):
            return self.read("delta", rows)
        raise self._incomplete(path)

    def read_records(
        self, path: str, images: Int[np.ndarray, " n"], records: Int[np.ndarray, " n"]
    ) -> Shaped[np.ndarray, "n c h w"]:
        """Array `path` (x_t, target, ...) at single records: image by image, record by record. As `read`."""
        if path in self.stored and path in self.specs:
            return self.read_chunks(path, np.stack([images, records], axis=1))
        if self._is_delta(path):
            return self.read_records("delta", images, records)
        if path == "x_t" and "target" in self.stored:
            return self.derive_records(images, records, self.read_records("target", images, records))
        raise self._incomplete(path)

    def derive_records(
        self, images: Int[np.ndarray, " n"], records: Int[np.ndarray, " n"], target: Float[np.ndarray, "n c h w"]
    ) -> Float[np.ndarray, "n c h w"]:
        """x_t at single records, from their stored `target`."""
        from inpo.common.cache.derive import derive_x_t  # torch, which takes seconds

        distinct, row = np.unique(images, return_inverse=True)
        x0 = self.read_chunks("x0", distinct[:, None])[row]
        a, s = self.cache.levels.mixture(self.timesteps()[images, records][:, None])
        return derive_x_t(x0, target[:, None], a, s)[:, 0]

    def sides(self, pairs: Rows = None) -> Int[np.ndarray, "pair 2"]:
        """Rows of the images of each pair: win, lose."""
        return np.stack([self.read("pair/win", pairs), self.read("pair/lose", pairs)], axis=1).astype(np.int64)

    def groups(self, pairs: Rows = None) -> Int[np.ndarray, " pair"]:
        """The group of each pair. Raises CacheSchemaError for a pair of images of two groups."""
        groups = self.read("image/group")[self.sides(pairs)].astype(np.int64)
        if (groups[:, 0] != groups[:, 1]).any():
            raise self.misfit("pair/lose", "a pair of images that are not of one group")
        first: np.ndarray = groups[:, 0]
        return first

    def timesteps(self, images: Rows = None) -> Int[np.ndarray, "image record"]:
        """Kept timesteps of images: their group's."""
        found: np.ndarray = self.read("timestep")[self.read("image/group", images)]
        return found

    def prompts(self) -> Shaped[np.ndarray, " group"]:
        """The original caption of each group, also where it was dropped; objects of str."""
        places = self.read("group/prompt").tolist()
        texts = [self.cache.texts.need(name).text for name in self.commit.texts]
        return np.array([texts[place][row] for place, row in places], dtype=object)

    def dropped(self) -> Bool[np.ndarray, " group"]:
        """Whether a group was inverted, and is to be trained, under the empty prompt."""
        return self.read("group/caption_dropped")

    def _derive_x_t(self, images: Rows) -> Float[np.ndarray, "image record c h w"]:
        from inpo.common.cache.derive import derive_x_t  # torch, which takes seconds

        a, s = self.cache.levels.mixture(self.timesteps(images))
        return derive_x_t(self.read("x0", images), self.read("target", images), a, s)

    def _incomplete(self, path: str) -> CacheIncomplete:
        manifest = self.cache.manifest
        if path in ("delta", "x0_t"):
            fix = "precompute a cache with --profile full"
        elif path in ("delta_prev", "eps_ref"):
            fix = f"precompute a cache with --extra {path}"
        else:
            fix = f"stored here: {', '.join(sorted(self.stored & manifest.specs.keys()))}"
        return CacheIncomplete(
            f"This cache does not hold {path!r}.", where=self.cache.location, got=f"profile {manifest.profile}", fix=fix
        )


class Cache:
    """A cache as its commits show it. Opening reads the manifest and every commit, and no array."""

    def __init__(
        self, store: CacheStore, manifest: Manifest, commits: dict[str, Commit], text_commits: dict[str, TextCommit]
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.commits = commits
        self.shards: dict[str, Shard] = {
            name: Shard(self, name, commit) for name, commit in commits.items() if commit.num_pairs
        }
        self.texts = Texts(store, manifest, text_commits)

    @property
    def location(self) -> str:
        return self.store.location

    @cached_property
    def levels(self) -> "Levels":
        """The reference's levels, from the manifest."""
        return self.manifest.levels.levels()

    @property
    def num_pairs(self) -> int:
        return sum(commit.num_pairs for commit in self.commits.values())

    @property
    def num_records(self) -> int:
        return self.num_pairs * self.manifest.timesteps_per_pair

    @property
    def delta_is_reference(self) -> bool:
        """True if delta is the reference prediction under the training caption: at guidance 1, and at points that were
        given."""
        inverter = self.manifest.inverter
        return inverter.guidance == 1.0 or inverter.name == "recorded"

    def __iter__(self) -> Iterator[Shard]:
        return iter(self.shards.values())

    def find(self, pair_id: str) -> tuple[Shard, int]:
        """The shard and the row of a pair. Raises CacheIncomplete if no committed shard has it."""
        for shard in self:
            rows = np.flatnonzero(shard.read("pair/id") == pair_id)
            if len(rows):
                return shard, int(rows[0])
        example = next((str(shard.read("pair/id")[0]) for shard in self), None)
        raise CacheIncomplete(
            f"No committed pair has the id {pair_id!r}.",
            where=self.location,
            expected=f"an id like {example!r}" if example else "at least one committed pair",
            fix="`inpo inspect summary` shows what is committed and what was skipped",
        )


def open_cache(location: str, *, allow_empty: bool = False, damaged: dict[str, CacheError] | None = None) -> Cache:
    """Open a cache for reading.

    Raises CacheMissing if there is no manifest, or (unless `allow_empty`) no committed pair yet, CacheSchemaError if
    a document cannot be read or is of another version, and CacheCorrupt if one was edited. With `damaged` a bad
    commit is put there under its shard's name (texts/NAME for one of texts), and the shard left out, instead.
    """
    store = CacheStore(location)
    data = store.get(MANIFEST)
    if data is None:
        commits_left = [name for name in store.listing("commits") if name.endswith(".json")]
        if commits_left:
            raise CacheMissing(
                "The cache has lost its manifest.",
                where=store.path(MANIFEST),
                expected="the file that its shards were committed under",
                got=f"no such file beside {len(commits_left)} commits",
                fix="restore it from a copy of the cache; without one, `inpo precompute` into another folder",
            )
        if store.get(BUCKETS) is not None:
            raise CacheMissing(
                "The caches here are those of buckets, each in a folder of its own.",
                where=store.location,
                expected=MANIFEST,
                got=BUCKETS,
                fix=f"name one of the folders that {BUCKETS} lists; `inpo train` takes them together",
            )
        raise CacheMissing(
            "There is no cache here.",
            where=store.location,
            expected=MANIFEST,
            got="no such file",
            fix="run `inpo precompute --cache` with this path first, or correct the path",
        )
    manifest = Manifest.from_json(data, store.path(MANIFEST))
    commits, bad = read_commits(store, manifest, digest(data), kind=Commit)
    text_commits, bad_texts = read_commits(store, manifest, digest(data), kind=TextCommit)
    if damaged is None and (bad or bad_texts):
        raise next(iter([*bad.values(), *bad_texts.values()]))
    if damaged is not None:
        damaged.update(bad)
        damaged.update({f"texts/{name}": error for name, error in bad_texts.items()})
    cache = Cache(store, manifest, commits, text_commits)
    if not allow_empty and cache.num_pairs == 0:
        raise CacheMissing(
            "This cache has no committed pair yet.",
            where=store.location,
            got=f"{len(commits)} commits, 0 pairs",
            fix="wait for `inpo precompute` to commit its first shard, or look at the skipped pairs with "
            "`inpo inspect summary`",
        )
    return cache
