"""What open_source takes a location for, and what it says when it cannot tell."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from inpo.common.errors import DataError
from inpo.common.pairs import InputShard, Pair, PairSource, mark_duplicates, open_source, recognise
from inpo.common.pairs.files import Listing

WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]


@pytest.fixture
def tars(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Four tars of one pair each."""
    for i in range(4):
        fields = json.dumps({"prompt": "p", "id": str(i)}).encode()
        members = [("0.json", fields), ("0.lose.png", b"L"), ("0.win.png", b"W")]
        write_tar(tmp_path / f"pairs-{i:04d}.tar", members)
    return tmp_path


def ids(location: Path | str) -> list[str]:
    return [item.pair_id for shard in open_source(str(location)).shards for item in shard.rows(0, 99)]


def test_interfaces(tars: Path) -> None:
    source = open_source(str(tars))
    assert isinstance(source, PairSource)
    assert (source.location, source.kind) == (str(tars), "webdataset")
    shards = source.shards
    assert all(isinstance(shard, InputShard) for shard in shards)
    assert [shard.name for shard in shards] == [f"pairs-{i:04d}" for i in range(4)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", "0123"),
        ("/", "0123"),
        ("/pairs-0002.tar", "2"),
        ("/pairs-{0000..0003}.tar", "0123"),
        ("/pairs-{0001..0002}.tar", "12"),
        ("/{pairs-0003,pairs-0001}.tar", "13"),
        ("/pairs-*.tar", "0123"),
        ("/pairs-000[02].tar", "02"),
    ],
)
def test_files_folders_braces_and_globs(tars: Path, pattern: str, expected: str) -> None:
    assert ids(f"{tars}{pattern}") == list(expected)


def test_file_urls(tars: Path) -> None:
    assert ids(f"file://{tars}/pairs-{{0000..0001}}.tar") == ["0", "1"]


def test_a_name_with_braces_that_exists_is_no_pattern(tars: Path) -> None:
    (tars / "pairs-0002.tar").rename(tars / "odd{1,2}.tar")
    assert ids(tars / "odd{1,2}.tar") == ["2"]


@pytest.mark.parametrize("name", ["run[1]", "run*", "run{1,2}"])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("pairs-*.tar", "23"),
        ("pairs-000[12].tar", "2"),
        ("pairs-000{2..3}.tar", "23"),
        ("**/*.tar", "123"),
        ("in*/pairs-*.tar", "1"),
        ("inner/**/*.tar", "1"),
        ("{inner,.}/*.tar", "123"),
        ("odd[[]1].tar", "0"),
    ],
)
def test_names_of_folders_that_exist_are_no_patterns(
    tars: Path, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str, expected: str
) -> None:
    """Neither that of the folder that is worked in. Beside it lies what such a pattern would name."""
    folder, other = tars / name, tars / "run1"
    for number, where in ((0, other), (1, folder / "inner"), (2, folder), (3, folder)):
        where.mkdir(parents=True, exist_ok=True)
        (tars / f"pairs-{number:04d}.tar").rename(where / f"pairs-{number:04d}.tar")
    if "odd" in pattern:
        (other / "pairs-0000.tar").rename(folder / "odd[1].tar")
    for where, location in ((folder, pattern), (tars, f"{name}/{pattern}"), (tars, f"{folder}/{pattern}")):
        monkeypatch.chdir(where)
        assert sorted(ids(location)) == list(expected)
    with pytest.raises(DataError, match="no file matches the pattern"):
        ids(f"nothing/{pattern}" if "{" not in pattern else "[no]*/pairs-*.tar")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("pairs-{0000..0001.tar", "A brace in this pattern of names does not close."),
        ("file://{", "A brace in this pattern of names does not close."),
        ("github://pairs.tar", "cannot be opened.*'org' and 'repo'"),
        ("zip://pairs.tar::missing.zip", "cannot be opened.*FileNotFoundError"),
    ],
)
def test_a_location_that_no_library_understands_is_an_error_with_advice(location: str, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}.*to do:"):
        open_source(location)


def test_a_missing_member_of_a_brace_pattern_is_one_unreadable_shard(tars: Path) -> None:
    (tars / "pairs-0001.tar").unlink()
    shards = open_source(f"{tars}/pairs-{{0000..0002}}.tar").shards
    assert [shard.name for shard in shards] == ["pairs-0000", "pairs-0001", "pairs-0002"]
    with pytest.raises(DataError, match="This input shard cannot be read") as error:
        _ = shards[1].num_rows
    assert "FileNotFoundError" in str(error.value)
    assert [shards[i].num_rows for i in (0, 2)] == [1, 1]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The in-memory file system, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("pattern", ["", "/pairs-{0000..0003}.tar", "/*.tar"])
def test_tars_by_url(tars: Path, memory: fsspec.AbstractFileSystem, pattern: str) -> None:
    for path in tars.glob("*.tar"):
        memory.pipe(f"/remote/set/{path.name}", path.read_bytes())
    assert ids(f"memory://remote/set{pattern}") == ["0", "1", "2", "3"]


def test_parquet_by_url(
    tmp_path: Path,
    memory: fsspec.AbstractFileSystem,
    pick_row: Callable[..., dict[str, object]],
    write_parquet: Callable[..., Path],
) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick_row(i) for i in range(9)])
    memory.pipe("/remote/a.parquet", path.read_bytes())
    (remote,), (local,) = (open_source(p).shards for p in ("memory://remote/a.parquet", str(path)))
    assert list(remote.rows(3, 8)) == list(local.rows(3, 8))
    assert remote.fingerprint() == local.fingerprint()


def test_shards_with_one_stem_in_two_folders_get_two_names(tars: Path) -> None:
    for name in ("one", "two"):
        (tars / name).mkdir()
        (tars / name / "0.tar").write_bytes((tars / "pairs-0000.tar").read_bytes())
    for pattern in ("{one,two}/0.tar", "*/0.tar", "*/*.tar"):
        shards = open_source(f"{tars}/{pattern}").shards
        assert [shard.name for shard in shards] == ["one-0", "two-0"]
        assert [shard.num_rows for shard in shards] == [1, 1]


def test_names_are_file_system_safe_and_stay_apart(tars: Path) -> None:
    (tars / "a b.tar").write_bytes((tars / "pairs-0000.tar").read_bytes())
    (tars / "a/").mkdir()
    (tars / "a_b.tar").write_bytes((tars / "pairs-0000.tar").read_bytes())
    names = [shard.name for shard in open_source(f"{tars}/a?b.tar").shards]
    assert len(set(names)) == 2
    assert "a_b" in names
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-.") for name in names)


def test_links_are_what_they_lead_to(tars: Path) -> None:
    """The layout of a hub client: links to files without a suffix, beside a real file and a link to a folder."""
    for folder in ("blobs", "linked", "elsewhere"):
        (tars / folder).mkdir()
    for i in range(4):
        (tars / f"pairs-{i:04d}.tar").rename(tars / "blobs" / f"{i}")
    for i in range(3):
        (tars / "linked" / f"pairs-{i}.tar").symlink_to(f"../blobs/{i}")
    (tars / "linked" / "pairs-3.tar").write_bytes((tars / "blobs" / "3").read_bytes())
    (tars / "linked" / "more").symlink_to("../elsewhere")
    (tars / "other").symlink_to("linked")
    for location in ("linked", "linked/*.tar", "linked/pairs-[0-3].tar", "other", "oth*/*.tar", "o?her/pairs-?.tar"):
        assert ids(tars / location) == ["0", "1", "2", "3"]
    assert dict(open_source(str(tars / "linked")).not_read) == {"folder more": 1}


@pytest.mark.parametrize("location", ["", "/*.tar", "/pairs-*.tar", "/pairs-{0001..0003}.tar"])
def test_a_link_that_leads_nowhere_is_one_unreadable_shard(tars: Path, location: str) -> None:
    (tars / "pairs-0001.tar").unlink()
    (tars / "pairs-0001.tar").symlink_to("gone")
    shards = {shard.name: shard for shard in open_source(f"{tars}{location}").shards}
    assert "pairs-0001" in shards
    with pytest.raises(DataError, match="a symbolic link to gone, which is not there"):
        _ = shards["pairs-0001"].num_rows
    assert shards["pairs-0002"].num_rows == 1
    with pytest.raises(DataError, match="a symbolic link to gone"):
        open_source(str(tars / "pairs-0001.tar"))


def test_a_pipe_in_a_folder_is_counted_and_not_opened(tars: Path) -> None:
    os.mkfifo(tars / "pairs-0009.tar")
    (tars / ".hidden.tar").touch()
    source = open_source(str(tars))
    assert len(source.shards) == 4
    assert dict(source.not_read) == {"hidden file or folder": 1, "pipe, socket or device": 1}


def test_a_repository_with_its_files_in_data(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tars / "repository" / "data").mkdir(parents=True)
    (tars / "repository" / "README.md").touch()
    for path in tars.glob("*.tar"):
        path.rename(tars / "repository" / "data" / path.name)
    (tars / "repository" / "images").mkdir()
    assert ids(tars / "repository") == ["0", "1", "2", "3"]
    assert dict(open_source(str(tars / "repository")).not_read) == {"file *.md": 1, "folder images": 1}
    (tars / "repository" / "data").rename(tars / "repository" / "train")
    # Not a list of pairs by its name, as a model's or a cache's documents.
    (tars / "repository" / "images" / "config.json").touch()
    with pytest.raises(DataError, match="folders in it: images, train") as raised:
        open_source(f"{tars / 'repository'}/")
    assert raised.value.fix == f"name a folder in it: {tars / 'repository' / 'train'}"
    original = recognise.list_folder

    def refuse(folder: str) -> Listing:
        if folder.endswith("/images"):
            raise DataError("this folder cannot be listed", where=folder, fix="none")
        return original(folder)

    monkeypatch.setattr(recognise, "list_folder", refuse)
    with pytest.raises(DataError, match="folders in it: images, train") as raised:
        open_source(str(tars / "repository"))
    assert raised.value.fix == f"name a folder in it: {tars / 'repository' / 'train'}"


def test_links_that_lead_back_give_nothing_twice(tars: Path) -> None:
    (tars / "round").symlink_to(".")
    (tars / "data").symlink_to(".")
    assert ids(f"{tars}/**/*.tar") == ["0", "1", "2", "3"]
    assert [shard.name for shard in open_source(f"{tars}/**/*.tar").shards] == [f"pairs-{i:04d}" for i in range(4)]
    for path in tars.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=rf"(?s)where: +{re.escape(str(tars))}/data\n"):
        open_source(str(tars))


def test_a_web_address_with_a_query_is_refused_and_not_opened_without_it() -> None:
    for address in ("http://127.0.0.1:9/a.tar?sig=SIGNED", "https://127.0.0.1:9/{0..1}.tar?sig=SIGNED"):
        with pytest.raises(DataError, match=r"(?s)address with a query.*\.tar\?sig=\*\*\*"):
            open_source(address)


def test_a_login_in_the_address_of_a_bucket_is_refused_and_not_passed_over() -> None:
    with pytest.raises(DataError, match=r"(?s)has no login.*s3://bucket/a\.tar") as caught:
        open_source("s3://KEY:SIGNED@bucket/a.tar")
    assert "SIGNED" not in str(caught.value)


def test_other_lists_beside_a_list_are_counted_and_its_images_are_not(tars: Path) -> None:
    (tars / "set").mkdir()
    (tars / "set" / "images").mkdir()
    for name in (
        "pairs.jsonl",
        "more.jsonl",
        "a.png",
        "b.JPG",
        "c.jfif",
        "notes.txt",
        "d.h5",
        "c.zip",
        "c.tar.gz.00",
        "d.tar.aa",
    ):
        (tars / "set" / name).touch()
    assert dict(open_source(str(tars / "set")).not_read) == {"file *.h5": 1, "file *.jsonl": 1, "file *.txt": 1}


@pytest.mark.parametrize(
    ("files", "location", "message", "got"),
    [
        ([], "/nothing-here", "No pairs found.", "nothing of that name"),
        ([], "/*.tar", "No pairs found.", "no file matches"),
        ([], "/x-{0..3}.tar", "No pairs found.", "none of 4 names"),
        ([], "", "no source of pairs", "no files directly in it"),
        (["a.png", "notes.txt"], "", "no source of pairs", "a.png, notes.txt"),
        (["model.bin"], "/model.bin", "no source of pairs", "model.bin"),
        (["a.tar.gz"], "/a.tar.gz", "uncompress it first", "a.tar.gz"),
        (["a.tar", "b.parquet"], "", "more than one source", "a.tar, b.parquet"),
        (["pairs.csv", "pairs.jsonl"], "", "more than one source", "pairs.csv and pairs.jsonl"),
        (["a.tar", "a.jpg"], "/a.*", "no source of pairs", "a.jpg, a.tar"),
        (
            ["train-00000-of-00001-ab.parquet", "test-00000-of-00001-cd.parquet"],
            "",
            "more than one split",
            "test (1 files), train (1 files)",
        ),
        (
            ["metadata-train.parquet", "metadata-test.parquet", "other.parquet"],
            "",
            "more than one split",
            "test (1 files), train (1 files)",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_was_found(
    tmp_path: Path, files: list[str], location: str, message: str, got: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        open_source(f"{tmp_path}{location}")
    assert message in str(error.value)
    assert got in str(error.value)
    assert "pairs.jsonl" in str(error.value) or "pattern" in str(error.value) or "which" in str(error.value)


def test_the_examples_of_readme_and_recipes_name_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "pickapic_v2/data"  # as the repository of the published set has it
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        (data / f"{split}-00000-of-00001.parquet").touch()
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    texts = [file.read_text(encoding="utf-8") for file in (root / "README.md", *root.glob("recipes/*.toml"))]
    examples = [each for text in texts for each in re.findall(r'pairs(?: = | )"?(pickapic[^"\s]*)', text)]
    assert len(examples) == 6
    for each in examples:
        assert [shard.name for shard in open_source(each).shards] == ["train-00000-of-00001"]


def test_an_unknown_url_scheme_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        open_source("carrierpigeon://loft/pairs.tar")


def test_only_later_rows_with_an_id_are_duplicates() -> None:
    def pair(pair_id: str, row: int) -> Pair:
        return Pair(pair_id=pair_id, prompt="", win=b"W", lose=b"L", label=1.0, row=row)

    seen: set[str] = set()
    found = list(mark_duplicates([pair("a", 0), pair("b", 1), pair("a", 2)], seen))
    assert [getattr(item, "reason", "pair") for item in found] == ["pair", "pair", "duplicate_id"]
    assert [item.row for item in found] == [0, 1, 2]
    (again,) = mark_duplicates([pair("b", 0)], seen)
    assert getattr(again, "reason", None) == "duplicate_id"
