"""Several folders as one source, and files with the same bytes read once."""

import os

import pytest
from small_corpus import make_text

from deepv3.config.schema import SourceConfig
from deepv3.data.corpus import open_source
from deepv3.data.files import without_copies
from deepv3.data.prepare import prepare
from deepv3.errors import DataError


def write(folder, names):
    """A folder of files; the text of each is its own name."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"text of {name}\n", encoding="utf-8")
    return folder


@pytest.fixture
def three(tmp_path):
    """Three folders; b.py is in two of them."""
    a = write(tmp_path / "a", ["a.py", "b.py", "a.so"])
    return [a, write(tmp_path / "z", ["b.py", "z.h"]), write(tmp_path / "m", ["m.md"])]


def names(source, cache):
    """The documents' files, as folder/name."""
    return ["/".join(row["name"].split("/")[-2:]) for row in source.documents(cache)]


def opened(folders, cache, **fields):
    first, *others = map(str, folders)
    config = SourceConfig(path=first, folders=others, suffixes=[".py", ".h", ".md"], format="text", **fields)
    return open_source(config, "data.sources[0]", cache, False)


def test_folders_are_read_in_the_order_given_as_one_source(three, cache):
    assert names(opened(three, cache), cache) == ["a/a.py", "a/b.py", "z/b.py", "z/z.h", "m/m.md"]
    assert names(opened(three[::-1], cache), cache)[:2] == ["m/m.md", "z/b.py"]


def test_a_folder_within_another_is_read_once(three, cache):
    assert names(opened([three[0].parent, three[1]], cache), cache) == ["a/a.py", "a/b.py", "m/m.md", "z/b.py", "z/z.h"]


def test_unique_leaves_the_first_of_equal_files_and_counts_the_others(three, cache):
    source = opened(three, cache, unique=True)
    assert names(source, cache) == ["a/a.py", "a/b.py", "z/z.h", "m/m.md"]
    assert source.copies == 1


def test_a_folder_may_hold_no_fitting_file_as_long_as_another_does(three, cache, tmp_path):
    pictures = write(tmp_path / "pictures", ["p.png"])
    assert len(names(opened([*three, pictures], cache), cache)) == 5
    with pytest.raises(DataError, match="none ends in"):
        opened([pictures, write(tmp_path / "more", ["q.png"])], cache)


def test_a_missing_folder_is_refused_by_name(three, cache):
    with pytest.raises(DataError, match=r"sources\[0\].folders: /no/such is no folder"):
        opened([*three, "/no/such"], cache)


def test_the_standard_library_joins_others_without_its_tests(three, cache):
    config = SourceConfig(path="python-stdlib", folders=[str(three[1])], suffixes=[".py"], format="text")
    source = open_source(config, "data.sources[0]", cache, False)
    paths = [path for piece in source.pieces for path in piece.paths]
    assert any(path.endswith("/ast.py") for path in paths) and paths[-1].endswith("z/b.py")
    assert not any("/test/" in path for path in paths)


def test_files_of_equal_size_and_other_bytes_are_no_copies(tmp_path):
    for name, text in (("a", "12"), ("b", "21"), ("c", "12"), ("d", "123")):
        (tmp_path / name).write_text(text)
    files = [(str(tmp_path / name), os.stat(tmp_path / name).st_size, 0) for name in "abcd"]
    assert [path[-1] for path, _, _ in without_copies(files)] == ["a", "b", "d"]


def test_a_file_that_cannot_be_read_stays_to_be_named(tmp_path):
    files = [(str(tmp_path / name), 5, 0) for name in ("gone", "away")]
    assert without_copies(files) == files


def test_a_copy_changes_no_token(configure, tmp_path, silent):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        for i in range(40):
            (tmp_path / folder / f"{i}.txt").write_text(make_text(i), encoding="utf-8")
    alone = SourceConfig(path=str(tmp_path / "first"), unique=True)
    both = SourceConfig(path=str(tmp_path / "first"), folders=[str(tmp_path / "second")], unique=True)
    counts = [prepare(configure(sources=[source]), silent) for source in (alone, both)]
    assert counts[0].train[0].counts["tokens"] == counts[1].train[0].counts["tokens"]
    assert "40 copies of other files" in "\n".join(counts[1].describe())
