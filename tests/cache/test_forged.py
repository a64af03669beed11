"""A hostile cache: documents that are whole and sealed, and say what no writer of ours says.

Every forged value must be refused, with a message that names the document, by whatever reads a cache, before it is used
as a length, a path or a line on a screen.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from inpo.common.cache import CacheWriter, open_cache
from inpo.common.cache.labels import LabelSet, PairLabel, read_labels, write_labels
from inpo.common.cache.store import CacheStore, digest
from inpo.common.errors import CacheCorrupt, CacheError, CacheSchemaError, InpoError, StorageError
from inpo.inspection.checks import Finding
from inpo.inspection.cli import app
from inpo.inspection.leftovers import find_leftovers, remove_leftover
from inpo.inspection.verify import quarantine, verify
from inpo.train.index import build_index


@pytest.fixture(scope="module")
def whole(tmp_path_factory, build) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    manifest = build.manifest(**build.everything)
    writer = CacheWriter.open(str(folder), manifest)
    skipped = [{"pair_id": "tie", "reason": "tie", "detail": "label 0.5", "row": 3}]
    assert writer.write("s0", build.shard(manifest, 3, skipped=skipped))
    assert writer.write("s1", build.shard(manifest, 2, seed=1))
    writer.write_configuration('[data]\ncache = "x"\n')
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def edit(document: Any, path: str, value: Any) -> None:
    """Set `a.b.0` of a document to a value; to what a function makes of it, if the value is one."""
    *parents, last = path.split(".")
    for name in parents:
        document = document[int(name) if isinstance(document, list) else name]
    key: Any = int(last) if isinstance(document, list) else last
    document[key] = value(document[key]) if callable(value) else value


def forge_commit(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "s0") -> None:
    file = folder / "commits" / f"{name}.json"
    document = json.loads(file.read_text())
    change(document)
    rest = {key: value for key, value in document.items() if key != "checksum"}
    checksum = digest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    file.write_text(json.dumps(rest | {"checksum": checksum}))


def verified(folder: Path) -> list[Finding]:
    """What verify finds, but for the numbers of these arrays, which are random and fulfil no identity."""
    return [each for each in verify(str(folder)).findings if each.check not in ("x0_t", "reference_error")]


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and make every commit one of it."""
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    for commit in (folder / "commits").iterdir():
        forge_commit(folder, lambda each: each.update(manifest=digest(file.read_bytes())), commit.stem)


def forge_file(folder: Path, path: str, data: bytes) -> None:
    """Replace a file of s0's attempt and have the commit say so."""
    (attempt,) = (folder / "shards" / "s0").iterdir()
    (attempt / path).write_bytes(data)
    store = CacheStore(str(folder))

    def change(document: dict[str, Any]) -> None:
        document["files"][path] = len(data)
        document["digests"][path] = store.sample_digest(f"shards/s0/{attempt.name}/{path}", len(data))

    forge_commit(folder, change)


def forge_metadata(folder: Path, array: str, field: str, value: Any) -> None:
    (attempt,) = (folder / "shards" / "s0").iterdir()
    document = json.loads((attempt / array / "zarr.json").read_text())
    edit(document, field, value)
    forge_file(folder, f"{array}/zarr.json", json.dumps(document).encode())


def ways_in(folder: Path) -> dict[str, Callable[[], Any]]:
    """What reads a cache. A command that ends with code 1 after naming the shard has refused it."""

    def command(*words: str) -> Callable[[], Any]:
        def call() -> str:
            done = CliRunner().invoke(app, [words[0], str(folder), *words[1:]])
            if isinstance(done.exception, InpoError):
                return str(done.exception)
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
            assert done.exit_code == 1, done.output
            return done.output

        return call

    out = folder.parent
    return {
        "train": lambda: build_index([open_cache(str(folder))], soft=True, held_out=0.0),
        "summary": command("summary"),
        "verify": command("verify"),
        "filter": command("filter", "--where", "label >= 0", "--out", str(out / "list")),
        "pair": lambda: open_cache(str(folder)).find("pair-0-0 ä"),
        "report": command("report", "--out", str(out / "r.html")),
    }


def refused(folder: Path, document: Path) -> None:
    """Every way in refuses; those that raise name the document."""
    for name, way in ways_in(folder).items():
        if name in ("train", "pair"):
            with pytest.raises(CacheError) as caught:
                way()
            assert str(document) in str(caught.value), name
            assert "to do:" in str(caught.value)
        else:
            assert "s0" in (said := way()) or str(document) in said, name


HUGE, DEEP = 10**30, "../../../../etc/passwd"
COMMIT = {
    "pairs beyond memory": ("num_pairs", HUGE),
    "pairs beyond a shard": ("num_pairs", 257),
    "pairs below none": ("num_pairs", -1),
    "more pairs than rows": ("num_pairs", 100),
    "no pairs and files": ("num_pairs", 0),
    "an attempt elsewhere": ("attempt", "../s1/0123456789abcdef"),
    "an attempt of another form": ("attempt", "0123456789ABCDEF"),
    "an attempt with a line end": ("attempt", "0123456789abcdef\n"),
    "an empty attempt": ("attempt", ""),
    "no files": ("files", {}),
    "a file above": ("files", lambda files: files | {DEEP: 1}),
    "a size beyond any disk": ("files", lambda files: files | {"x_t/zarr.json": HUGE}),
    "metadata of a megabyte": ("files", lambda files: files | {"x_t/zarr.json": 1 << 20}),
    "a size that is none": ("files", lambda files: files | {"x_t/zarr.json": math.inf}),
    "no digests": ("digests", {}),
    "a digest that is none": ("digests", lambda digests: digests | {"x_t/zarr.json": "0" * 31}),
    "skipped beyond a shard": ("skipped", {"tie": HUGE}),
    "more skipped than rows": ("skipped", {"tie": 200}),
    "a reason with an escape": ("skipped", {"\x1b[31mtie": 1}),
    "many reasons": ("skipped", {f"reason{number}": 0 for number in range(100)}),
    "a count beyond a shard": ("counts", {"cut_prompt": HUGE}),
    "an infinite time": ("seconds", {"read": math.inf}),
    "a negative time": ("seconds", {"read": -1.0}),
    "a time that is no number": ("seconds", {"read": math.nan}),
    "rows backwards": ("source.rows", [5, 3]),
    "rows beyond a shard": ("source.rows", [0, 257]),
    "rows below none": ("source.rows", [-3, 1]),
    "rows beyond any source": ("source.rows", [HUGE, HUGE + 4]),
    "an input shard elsewhere": ("source.input_shard", DEEP),
    "a location without end": ("source.location", "x" * 10_000),
    "half a surrogate pair": ("source.location", "\ud800"),
    "an input's digest": ("source.fingerprint", "f" * 33),
    "a day with an escape": ("created", "2026-01-01T00:00:00+00:00\x1b[2J"),
    "another manifest": ("manifest", "0" * 32),
    "a list's digest": ("skipped_digest", "no"),
}


@pytest.mark.parametrize("name", COMMIT)
def test_a_forged_commit_is_refused_everywhere(folder, name):
    field, value = COMMIT[name]
    forge_commit(folder, lambda document: edit(document, field, value))
    if name == "another manifest":
        with pytest.raises(CacheCorrupt, match="not the one that shard s0 was made under"):
            open_cache(str(folder))
        return
    refused(folder, folder / "commits" / "s0.json")


MANIFEST = {
    "a latent beyond memory": ("latent_shape", [HUGE, HUGE, HUGE]),
    "a latent of another size": ("latent_shape", [4, 16, 16]),
    "no channel": ("latent_shape", [0, 8, 8]),
    "steps beyond memory": ("timesteps_per_pair", HUGE),
    "steps beyond the grid": ("timesteps_per_pair", 11),
    "other steps than stored": ("timesteps_per_pair", 3),
    "no step": ("timesteps_per_pair", 0),
    "levels beyond int16": ("levels.label", list(range(40_000))),
    "a table of another length": ("levels.label", lambda table: table[:-1]),
    "no level": ("levels", lambda levels: levels | {"signal": [], "noise": [], "label": []}),
    "a table with infinity": ("levels.signal.5", math.inf),
    "a table with nothing a number is": ("levels.noise.5", math.nan),
    "a signal that rises": ("levels.signal.5", 0.99999),
    "a noise that falls": ("levels.noise.5", 0.00001),
    "a signal of zeros at the end": ("levels.signal.999", 0.0),
    "a label without end": ("levels.label.5", math.inf),
    "no floor": ("levels.floor", 0.0),
    "another space": ("levels.space", "flow"),
    "no condition": ("conditions", {}),
    "a condition elsewhere": ("conditions", lambda told: told | {"../../x0": told["embedding"]}),
    "a condition over an array": ("conditions", lambda told: told | {"x0": told["embedding"] | {"per": "image"}}),
    "a condition over the prompts": ("conditions", lambda told: told | {"text": told["embedding"]}),
    "a condition over a group": ("conditions", lambda told: told | {"prompt": told["embedding"] | {"per": "image"}}),
    "another owner": ("conditions.embedding.per", "pair"),
    "a condition of text": ("conditions.embedding.dtype", "string"),
    "an axis elsewhere": ("conditions.embedding.axes", ["../token", "width"]),
    "a family with an escape": ("family", "\x1b[31m"),
    "another profile": ("profile", "fat"),
    "a profile without arrays that are there": ("profile", "lean"),
    "an extra that is none": ("extra", ["x_t"]),
    "a seed without end": ("seed", HUGE),
    "a resolution without end": ("resolution", HUGE),
    "another crop": ("crop", "random"),
    "another VAE latent": ("vae_latent", "mode"),
    "another dtype": ("network_dtype", "int8"),
    "a share above one": ("measure_inversion", 1.5),
    "no component": ("fingerprints", {}),
    "a component's digest": ("fingerprints.network", "../" * 10 + "ab"),
    "a component's name": ("fingerprints", lambda prints: prints | {"\x1b]0;x\x07": "0" * 32}),
    "a version without end": ("versions", {"torch": "9" * 1000}),
    "a version with an escape": ("versions", {"torch": "\x1b[31m"}),
    "an infinite guidance": ("inverter.guidance", math.inf),
    "a dropout below none": ("inverter.caption_dropout", -0.5),
    "an inverter without end": ("inverter.grid_points", HUGE),
    "an inverter's name": ("inverter.name", DEEP),
    "a range outside the table": ("inverter.timestep_range", [0, HUGE]),
    "an empty range": ("inverter.timestep_range", [5, 5]),
    "iterations without end": ("inverter.iterations", HUGE),
    "a tolerance that is none": ("inverter.tolerance", math.nan),
}
BY_ITS_ARRAYS = ("a latent of another size", "other steps than stored", "a profile without arrays that are there")


@pytest.mark.parametrize("name", MANIFEST)
def test_a_forged_manifest_is_refused_everywhere(folder, name):
    field, value = MANIFEST[name]
    forge_manifest(folder, lambda document: edit(document, field, value))
    if name not in BY_ITS_ARRAYS:
        refused(folder, folder / "manifest.json")
        return
    assert {finding.shard for finding in verified(folder)} == {"s0", "s1"}
    assert "s0" in CliRunner().invoke(app, ["summary", str(folder)]).output


BIG = 1 << 50
METADATA = {
    "more pairs": ("shape.0", 9),
    "pairs beyond memory": ("shape.0", BIG),
    "no pair": ("shape.0", 0),
    "pairs below none": ("shape.0", -3),
    "pairs that are no number": ("shape.0", "3"),
    "an axis less": ("shape", lambda shape: shape[1:]),
    "an axis more": ("shape", lambda shape: [*shape, 1]),
    "a shape that is none": ("shape", None),
    "another dtype": ("data_type", "float64"),
    "a dtype beyond memory": ("data_type", {"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 40}}),
    "chunks beyond memory": ("chunk_grid.configuration.chunk_shape.0", BIG),
    "smaller chunks": ("chunk_grid.configuration.chunk_shape.0", 1),
    "another grid": ("chunk_grid.name", "rectilinear"),
    "a codec more": ("codecs", lambda codecs: [*codecs, {"name": "gzip", "configuration": {"level": 5}}]),
    "an unknown codec": ("codecs", [{"name": "\x1b[31m", "configuration": {}}]),
    "codecs that are none": ("codecs", [3]),
    "no codec": ("codecs", []),
    "other file names": ("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "."}}),
    "other axes": ("dimension_names.0", "side"),
    "another fill value": ("fill_value", 7),
    "another node": ("node_type", "group"),
    "another format": ("zarr_format", 2),
    "a transformer": ("storage_transformers", [{"name": "x", "configuration": {}}]),
    "what must be understood": ("surprise", {"name": "x", "must_understand": True}),
}


@pytest.mark.parametrize("array", ["x_t", "pair_id", "prompt/embedding"])
@pytest.mark.parametrize("name", METADATA)
def test_forged_metadata_of_an_array_is_refused_before_anything_is_made_for_it(folder, array, name, monkeypatch):
    field, value = METADATA[name]
    largest = 0
    real = np.empty

    def watched(shape: Any, *arguments: Any, **options: Any) -> np.ndarray:
        nonlocal largest
        largest = max(largest, math.prod(shape) if isinstance(shape, tuple) else int(shape))
        return real(shape, *arguments, **options)

    monkeypatch.setattr(np, "empty", watched)
    (attempt,) = (folder / "shards" / "s0").iterdir()
    document = json.loads((attempt / array / "zarr.json").read_text())
    if field in ("storage_transformers", "surprise"):
        document[field] = value
    else:
        edit(document, field, value)
    forge_file(folder, f"{array}/zarr.json", json.dumps(document).encode())
    with pytest.raises(CacheError) as caught:
        open_cache(str(folder)).shards["s0"].read(array)
    for words in (array, "s0", str(folder), "to do:"):
        assert words in str(caught.value)
    assert "s0" in {finding.shard for finding in verified(folder)}
    assert largest < 1e7


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"[" * 60_000, b"\xff\xfe", b'{"shape": [3]}'])
def test_metadata_that_is_no_document_is_refused(folder, text):
    forge_file(folder, "label/zarr.json", text)
    with pytest.raises(CacheError, match="label"):
        open_cache(str(folder)).shards["s0"].read("label")
    assert {finding.shard for finding in verified(folder)} == {"s0"}


def crc32c(data: bytes) -> bytes:
    import google_crc32c

    return google_crc32c.value(data).to_bytes(4, "little")


def test_forged_counts_inside_a_chunk_fill_no_memory(folder):
    (attempt,) = (folder / "shards" / "s0").iterdir()
    text = (attempt / "pair_id" / "c" / "0").read_bytes()[:-4]
    forged = (2**32 - 1).to_bytes(4, "little") + text[4:]
    forge_file(folder, "pair_id/c/0", forged + crc32c(forged))
    with pytest.raises(CacheSchemaError, match="4294967295 texts instead of 3"):
        open_cache(str(folder)).shards["s0"].read("pair_id")

    path = "x0/c/0/0/0/0/0"
    data = bytearray((attempt / path).read_bytes())
    index = np.frombuffer(data[-4 - 16 * 3 : -4], "<u8").copy()
    index[1] = 1 << 45  # the length of the first chunk
    data[-4 - 16 * 3 :] = index.tobytes() + crc32c(index.tobytes())
    forge_file(folder, path, bytes(data))
    with pytest.raises(CacheCorrupt, match="x0 of shard s0"):
        open_cache(str(folder)).shards["s0"].read("x0", np.array([0]))


@pytest.mark.parametrize(("path", "value"), [("prompt_index", -1), ("prompt_index", 99), ("timestep", 1000)])
def test_a_position_outside_what_it_points_into_is_refused(tmp_path, build, monkeypatch, path, value):
    monkeypatch.setattr(CacheWriter, "_check", lambda self, name, data: None)
    manifest = build.manifest()
    data = build.shard(manifest, 3)
    data.arrays[path].reshape(-1)[-1] = value
    CacheWriter.open(str(tmp_path), manifest).write("s0", data)
    with pytest.raises(CacheSchemaError, match=rf"{path} of shard s0(.|\n)*{value} outside|{value}"):
        open_cache(str(tmp_path)).shards["s0"].read(path)
    assert {finding.shard for finding in verified(tmp_path)} == {"s0"}


def test_a_copy_of_a_commit_is_no_second_shard(folder):
    shutil.copytree(folder / "shards" / "s0", folder / "shards" / "s7")
    shutil.copy(folder / "commits" / "s0.json", folder / "commits" / "s7.json")
    with pytest.raises(CacheCorrupt, match="Two commits name one attempt: those of shards s0 and s7"):
        open_cache(str(folder))


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge"])
@pytest.mark.parametrize("document", ["manifest.json", "commits/s0.json"])
def test_what_is_no_document_is_not_read(folder, kind, document):
    file = folder / document
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        with file.open("wb") as stream:
            stream.truncate(1 << 40)  # sparse
    if kind == "folder" and document != "manifest.json":  # a folder is no commit: the shard is not committed
        assert list(open_cache(str(folder)).commits) == ["s1"]
        return
    with pytest.raises(CacheSchemaError, match="no document of a cache"):
        open_cache(str(folder))


LABELS = {
    "an attempt elsewhere": ("attempt", DEEP),
    "a label above one": ("pairs.a.label", 1.5),
    "a score that is none": ("pairs.a.scores", [math.nan, 0.0]),
    "a temperature of nothing": ("temperature", 0.0),
    "a temperature without end": ("temperature", math.inf),
    "a scorer without end": ("scorer", "x" * 10_000),
    "more pairs than a shard has": ("pairs", {str(row): {"scores": [1, 0], "label": 1} for row in range(257)}),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_forged_label_set_is_refused(folder, name):
    field, value = LABELS[name]
    cache = open_cache(str(folder))
    labels = LabelSet(
        attempt=cache.shards["s0"].commit.attempt,
        scorer="eye",
        temperature=1.0,
        source="/pairs",
        pairs={"a": PairLabel(scores=(1.0, 0.0), label=0.7)},
    )
    assert write_labels(cache.store, "mine", "s0", labels)
    file = folder / "labels" / "mine" / "s0.json"
    document = json.loads(file.read_text())
    edit(document, field, value)
    text = json.dumps({**document, "checksum": ""})
    file.write_text(text)
    with pytest.raises(CacheError) as caught:
        read_labels(cache, "mine")
    assert str(file) in str(caught.value)
    findings = [finding for finding in verified(folder) if finding.check == "labels"]
    assert any(finding.shard == "s0" for finding in findings)


def test_a_set_whose_name_is_a_path_is_no_set(folder):
    (folder / "labels" / "..x").mkdir(parents=True)
    (folder / "labels" / "..x" / "s0.json").write_text("{}")
    assert json.loads(CliRunner().invoke(app, ["summary", str(folder), "--json"]).output)["label_sets"] == []


SKIPPED = {
    "another reason": lambda text: text.replace("tie", "bad_label"),
    "another id": lambda text: text.replace('"pair_id": "tie"', '"pair_id": "tie2"'),
    "a line more": lambda text: text + text,
    "cut": lambda text: text[:-9],
    "empty": lambda text: "",
    "no text": lambda text: "\0\0",
}


@pytest.mark.parametrize("name", SKIPPED)
def test_a_changed_list_of_skipped_rows_is_found_and_can_be_made_again(folder, name):
    (file,) = (folder / "skipped" / "s0").iterdir()
    file.write_text(SKIPPED[name](file.read_text()))
    (finding,) = verified(folder)
    assert (finding.shard, finding.check) == ("s0", "skipped")
    assert str(file) in finding.detail
    assert "s0" in quarantine(str(folder), verify(str(folder)))


def test_a_list_that_is_lost_and_one_that_nothing_counts_are_found(folder):
    (file,) = (folder / "skipped" / "s0").iterdir()
    (attempt,) = (folder / "shards" / "s1").iterdir()
    (folder / "skipped" / "s1").mkdir()
    shutil.move(file, folder / "skipped" / "s1" / f"{attempt.name}.jsonl")
    assert [(each.shard, each.check) for each in verified(folder)] == [("s0", "skipped"), ("s1", "skipped")]


def test_a_changed_configuration_is_found(folder):
    assert verified(folder) == []
    (file,) = (folder / "configurations").iterdir()
    file.write_text(file.read_text().replace('"x"', '"y"'))
    (finding,) = verified(folder)
    assert (finding.check, finding.remake) == ("configurations", False)


def test_a_removed_commit_is_told_where_something_tells_it(folder):
    cache = open_cache(str(folder))
    pairs = {str(each): PairLabel(scores=(1.0, 0.0), label=0.7) for each in cache.shards["s0"].read("pair_id")}
    labels = LabelSet(
        attempt=cache.shards["s0"].commit.attempt, scorer="eye", temperature=1.0, source="/pairs", pairs=pairs
    )
    assert write_labels(cache.store, "mine", "s0", labels)
    (folder / "commits" / "s0.json").unlink()
    (folder / "surprise").write_text("")
    found = verify(str(folder))
    (finding,) = verified(folder)
    assert (finding.shard, finding.check) == ("s0", "labels")
    assert "no commit" in finding.detail
    notes = "\n".join(found.notes)
    for words in ("1 shards have an attempt and no commit (s0)", "surprise", "not known from here"):
        assert words in notes


def commit_of_nothing(folder: Path) -> None:
    forge_commit(folder, lambda document: document.update(files={}, digests={}))


def commit_without_x_t(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        for name in ("files", "digests"):
            document[name] = {path: value for path, value in document[name].items() if not path.startswith("x_t/")}

    forge_commit(folder, change)


@pytest.mark.parametrize("forge", [commit_of_nothing, commit_without_x_t])
@pytest.mark.parametrize("alone", [False, True])
def test_a_commit_that_does_not_make_up_its_arrays_is_found_moved_and_made_again(folder, build, forge, alone):
    if alone:
        (folder / "commits" / "s1.json").unlink()
    forge(folder)
    (finding,) = verified(folder)
    assert (finding.shard, finding.check, finding.remake) == ("s0", "commit", True)
    assert "x_t" in finding.detail or "0 files" in finding.detail
    assert "s0" in quarantine(str(folder), verify(str(folder)))
    manifest = open_cache(str(folder), allow_empty=True).manifest
    assert CacheWriter.open(str(folder), manifest).write("s0", build.shard(manifest, 3)) is not None
    assert len(open_cache(str(folder)).shards["s0"].read("x_t")) == 3


def meddle(monkeypatch, what: Callable[[CacheWriter, str], None], *, times: int = 1) -> list[str]:
    """Something happens to an attempt between its arrays and its commit."""
    real, folders = CacheWriter._write_arrays, []

    def write(self: CacheWriter, folder: str, arrays: Any) -> None:
        real(self, folder, arrays)
        folders.append(folder)
        if len(folders) <= times:
            what(self, folder)

    monkeypatch.setattr(CacheWriter, "_write_arrays", write)
    return folders


def clean(writer: CacheWriter, folder: str) -> None:
    for leftover in find_leftovers(writer.store):
        assert remove_leftover(writer.store, leftover)


def change_a_file(how: Callable[[Path], object]) -> Callable[[CacheWriter, str], None]:
    return lambda writer, folder: (
        how(Path(writer.store.location) / folder / "x0" / "c" / "0" / "0" / "0" / "0" / "0") and None
    )


MEDDLING = {
    "clean --all": clean,
    "a file is lost": change_a_file(lambda file: file.unlink()),
    "a file is short": change_a_file(lambda file: file.write_bytes(file.read_bytes()[:-1])),
    "a file is zeros": change_a_file(lambda file: file.write_bytes(bytes(file.stat().st_size))),
    "a file too many": change_a_file(lambda file: file.with_name("1").write_bytes(b"")),
}


@pytest.mark.parametrize("name", MEDDLING)
def test_an_attempt_that_changed_before_its_commit_is_made_again(tmp_path, build, monkeypatch, name):
    manifest = build.manifest()
    folders = meddle(monkeypatch, MEDDLING[name])
    commit = CacheWriter.open(str(tmp_path), manifest).write("s0", build.shard(manifest, 3))
    assert commit is not None
    assert folders[1] == f"shards/s0/{commit.attempt}"
    assert verified(tmp_path) == []
    assert len(open_cache(str(tmp_path)).shards["s0"].read("x_t")) == 3


@pytest.mark.parametrize("name", MEDDLING)
def test_an_attempt_that_always_changes_is_never_committed(tmp_path, build, monkeypatch, name):
    manifest = build.manifest()
    meddle(monkeypatch, MEDDLING[name], times=9)
    writer = CacheWriter.open(str(tmp_path), manifest)
    with pytest.raises(StorageError, match="nothing is committed") as caught:
        writer.write("s0", build.shard(manifest, 3))
    assert "inspect clean --all" in str(caught.value)
    assert writer.committed() == set()


def test_a_listing_that_lags_makes_no_commit_with_fewer_files(tmp_path, build, monkeypatch):
    manifest = build.manifest()
    writer = CacheWriter.open(str(tmp_path), manifest)
    real = CacheStore.listing
    monkeypatch.setattr(
        CacheStore, "listing", lambda self, prefix: dict(list(real(self, prefix).items())[:3]) if "/" in prefix else {}
    )
    with pytest.raises(StorageError, match="no such file"):
        writer.write("s0", build.shard(manifest, 3))
    assert not (tmp_path / "commits").exists()


def test_clean_and_a_commit_at_the_same_moment(tmp_path, build, monkeypatch):
    """clean has looked for the commit and found none; then the writer commits; then clean removes. In every order one
    sees the other: no commit of an attempt that is gone stays."""
    manifest = build.manifest()
    writer = CacheWriter.open(str(tmp_path), manifest)
    store = CacheStore(str(tmp_path))
    put_new, remove = CacheStore.put_new, CacheStore.remove
    commits = []

    def at_commit(self: CacheStore, name: str, data: bytes) -> bool:
        if name.startswith("commits/") and not commits:
            commits.append(name)
            (leftover,) = find_leftovers(store)

            def removing(each: CacheStore, prefix: str) -> None:  # the commit comes before the first removal
                monkeypatch.setattr(CacheStore, "remove", remove)
                assert put_new(self, name, data)
                assert writer._difference("s0", leftover.attempt, b"", digests=False) is not None
                remove(each, prefix)

            monkeypatch.setattr(CacheStore, "remove", removing)
            assert remove_leftover(store, leftover)
            return True
        return put_new(self, name, data)

    monkeypatch.setattr(CacheStore, "put_new", at_commit)
    commit = writer.write("s0", build.shard(manifest, 3))
    assert commit is not None
    assert verified(tmp_path) == []
    assert len(open_cache(str(tmp_path)).shards["s0"].read("x_t")) == 3


def test_clean_leaves_what_was_committed_while_it_looked(tmp_path, build, monkeypatch):
    manifest = build.cache(tmp_path, pairs=(2,))
    store = CacheStore(str(tmp_path))
    commit = (tmp_path / "commits" / "s0.json").read_bytes()
    (tmp_path / "commits" / "s0.json").unlink()
    (leftover,) = find_leftovers(store)
    (tmp_path / "commits" / "s0.json").write_bytes(commit)
    assert remove_leftover(store, leftover) is False
    assert verified(tmp_path) == []
    assert not [name for name in store.listing("shards") if name.endswith(".removing")]
    assert open_cache(str(tmp_path)).manifest == manifest
