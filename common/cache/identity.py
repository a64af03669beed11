"""Whether two caches, two runs, or a cache and a model are one: compared whole, both values shown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from inpo.common.cache.schema import LevelTables, Manifest
from inpo.common.cache.store import digest
from inpo.common.errors import CacheMismatch

if TYPE_CHECKING:
    from inpo.common.cache.reader import Cache

_INVERTS = ("network", "scheduler")
_ONE_RUN = ("crop", "vae_latent", "vae_dtype", "network_dtype", "family", "static", "max_tokens")
"""What caches must share to be trained on together: what x0 and the embeddings are and what inverted them. How they
were inverted, their size, which pairs were mirrored or lost their caption, and K may differ: each record is whole in
itself."""


def check_identity(existing: Manifest, wanted: Manifest, location: object) -> None:
    """Raise CacheMismatch, with both values of every difference, unless the two manifests are one identity."""
    have, want = existing.identity(), wanted.identity()
    if not same_levels(existing.levels, wanted.levels):
        # One fingerprint of the scheduler, two tables: another version of the library reads its settings otherwise.
        have["levels"], want["levels"] = map(_ends, (existing.levels, wanted.levels))
    names = [name for name in sorted({*have, *want}) if have.get(name) != want.get(name)]
    if names:
        raise CacheMismatch(
            f"The cache here was made with other settings or another model ({', '.join(names)}).",
            where=location,
            expected="; ".join(f"{name} = {have.get(name)!r} (in the cache)" for name in names),
            got="; ".join(f"{name} = {want.get(name)!r} (this run)" for name in names),
            fix="give this run its own --cache folder, or repeat the cache's settings",
        )


_TABLE_TOLERANCE = 1e-6
"""Of a squared table. The tables are float32 in their library; writers take the cache's own, to the last bit."""


def same_levels(left: LevelTables, right: LevelTables) -> bool:
    """Whether two sets of tables are one, to the rounding of the libraries."""
    if (left.space, len(left.signal)) != (right.space, len(right.signal)):
        return False

    def close(one: Sequence[float], other: Sequence[float], *, relative: float, absolute: float) -> bool:
        return np.allclose(np.square(one), np.square(other), rtol=relative, atol=absolute)

    return (
        close(left.signal, right.signal, relative=_TABLE_TOLERANCE, absolute=0.0)
        # Near the clean end noise^2 = 1 - signal^2 is small, and signal's rounding large beside it.
        and close(left.noise, right.noise, relative=_TABLE_TOLERANCE, absolute=_TABLE_TOLERANCE)
        and close(left.label, right.label, relative=_TABLE_TOLERANCE, absolute=0.0)
        and close([left.floor], [right.floor], relative=0.0, absolute=_TABLE_TOLERANCE)
    )


def _ends(levels: LevelTables) -> str:
    signal, digits = levels.signal, digest(levels.to_json())[:8]
    chosen = "" if levels.density is None else f" ({levels.density}, shift {levels.shift:g})"
    return f"{levels.space}{chosen}, signal {signal[0]:.9g} to {signal[-1]:.9g}, {len(signal)} values, digest {digits}"


def check_components(cache: "Cache", fingerprints: Mapping[str, str], *, model: str, fix: str) -> None:
    """Raise CacheMismatch, with both digests of every component that differs, unless `model` made the cache.

    Every component counts: the network and the scheduler invert, the VAE and the text encoders with their tokenizers
    are what the latents and the embeddings mean.
    """
    stored = cache.manifest.fingerprints
    names = [name for name in sorted({*stored, *fingerprints}) if stored.get(name) != fingerprints.get(name)]
    names.sort(key=lambda name: name not in _INVERTS)
    if names:
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        raise CacheMismatch(
            f"The cache was made by another model: its {listed} differ{'s' if len(names) == 1 else ''}.",
            where=f"{cache.location} against {model}",
            expected=", ".join(f"{name} {stored.get(name, 'none')}" for name in names) + " (in the cache)",
            got=", ".join(f"{name} {fingerprints.get(name, 'none')}" for name in names) + " (in the model)",
            fix=fix,
        )


def check_one_run(caches: "Sequence[Cache]") -> None:
    """Raise CacheMismatch unless one model made all the caches, from images processed in one way."""

    def facts(manifest: Manifest) -> dict[str, object]:
        return {name: getattr(manifest, name) for name in _ONE_RUN} | dict(manifest.fingerprints)

    for cache in caches[1:]:
        have, found = facts(caches[0].manifest), facts(cache.manifest)
        if not same_levels(caches[0].manifest.levels, cache.manifest.levels):
            have["levels"], found["levels"] = (_ends(each.manifest.levels) for each in (caches[0], cache))
        names = [name for name in sorted({*have, *found}) if have.get(name) != found.get(name)]
        if names:
            raise CacheMismatch(
                f"The caches were not made by the same reference and processing ({', '.join(names)}).",
                where=cache.location,
                expected=", ".join(f"{name} {have.get(name)}" for name in names) + f" ({caches[0].location})",
                got=", ".join(f"{name} {found.get(name)}" for name in names),
                fix="train on caches of one model, one kind of latents and one network dtype",
            )
