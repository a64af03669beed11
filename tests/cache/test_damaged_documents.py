"""Every kind of damage to a document of a cache is found by whatever opens it, and is named."""

import shutil

import pytest

from inpo.common.cache import open_cache
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError

DOCUMENT_DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda text: "[]",
    "no text": lambda text: "\0" * len(text),
    "unknown field": lambda text: text.replace("{", '{"surprise": 1,', 1),
}
EDITS = {
    "manifest.json": {
        "version": ('"schema_version": 2', '"schema_version": 3'),
        "no version": ('"schema_version": 2,', ""),
        "seed": ('"seed": 0', '"seed": 1'),
        "resolution": ('"resolution": [\n  64', '"resolution": [\n  65'),
        "group": ('"group": "pair"', '"group": "prompt"'),
        "tokens": ('"max_tokens": 9', '"max_tokens": 8'),
        "fingerprint": ("aaaaaaaa", "baaaaaaa"),
        "white space": ('"seed": 0', '"seed":  0'),
        "type": ('"seed": 0', '"seed": "zero"'),
    },
    "commits/s0.json": {
        "pairs": ('"num_pairs": 3', '"num_pairs": 2'),
        "groups": ('"num_groups": 3', '"num_groups": 2'),
        "images": ('"num_images": 6', '"num_images": 5'),
        "texts": ('"t0"', '"t1"'),
        "manifest": ('"manifest": "', '"manifest": "0'),
        "attempt": ('"attempt": "', '"attempt": "0'),
        "a size": ('"x0/zarr.json": ', '"x0/zarr.json": 1'),
        "source": ("0.tar", "1.tar"),
        "skipped": ('"skipped": {}', '"skipped": {"tie": 1}'),
        "checksum": ('"checksum": "', '"checksum": "0'),
    },
    "text-commits/t0.json": {
        "prompts": ('"num_prompts": 4', '"num_prompts": 3'),
        "manifest": ('"manifest": "', '"manifest": "0'),
        "attempt": ('"attempt": "', '"attempt": "0'),
        "a size": ('"text/zarr.json": ', '"text/zarr.json": 1'),
        "cut": ('"cut": []', '"cut": [0]'),
        "not finite": ('"not_finite": []', '"not_finite": [0]'),
        "checksum": ('"checksum": "', '"checksum": "0'),
    },
}
CASES = [(file, name, None) for file in EDITS for name in DOCUMENT_DAMAGES] + [
    (file, name, change) for file, changes in EDITS.items() for name, change in changes.items()
]


@pytest.mark.parametrize(("file", "name", "change"), CASES, ids=[f"{file}: {name}" for file, name, _ in CASES])
def test_every_damage_to_a_document_is_detected_and_named(whole, tmp_path, file, name, change):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    text = (folder / file).read_text()
    changed = DOCUMENT_DAMAGES[name](text) if change is None else text.replace(change[0], change[1], 1)
    assert changed != text
    (folder / file).write_text(changed)
    with pytest.raises((CacheCorrupt, CacheSchemaError)) as caught:
        open_cache(str(folder))
    assert str(folder / file) in str(caught.value)
    assert "to do:" in str(caught.value)

    if file != "manifest.json":  # the rest can be opened all the same, to look at it or to repair it
        damaged: dict[str, CacheError] = {}
        cache = open_cache(str(folder), damaged=damaged)
        of_texts = file.startswith("text-commits")
        assert list(damaged) == ["texts/t0" if of_texts else "s0"]
        assert list(cache.shards) == (["s0", "s1"] if of_texts else ["s1"])
        assert cache.shards["s1"].prompts()[0].startswith("prompt 1")
        if of_texts:
            with pytest.raises(type(caught.value)) as again:
                cache.shards["s0"].prompts()
            assert str(folder / file) in str(again.value)


def test_a_commit_of_another_cache_is_refused(whole, tmp_path, build):
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    build.cache(tmp_path / "other", pairs=(2,), seed=3)
    for kind in ("commits/s0.json", "text-commits/t0.json"):
        file = (folder / kind).with_name("foreign.json")
        shutil.copy(tmp_path / "other" / kind, file)
        with pytest.raises(CacheCorrupt, match="shard foreign was made under"):
            open_cache(str(folder))
        file.unlink()
