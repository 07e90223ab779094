import builtins
import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lr_ray.errors import StorageError
from lr_ray.storage import filesystem
from lr_ray.storage.filesystem import (
    absolute_path,
    check_exclusive,
    create_bytes,
    delete,
    exists,
    file_size,
    join,
    list_files,
    list_marks,
    list_sizes,
    list_uris,
    open_file,
    read_bytes,
    read_if_there,
    read_many,
    write_bytes,
)


def no_space(*_args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("root", "parts", "expected"),
    [
        ("runs", ("demo", "a.json"), "runs/demo/a.json"),
        ("runs/", ("a.json",), "runs/a.json"),
        ("s3://bucket/run/", ("x", "y"), "s3://bucket/run/x/y"),
        ("/tmp", (), "/tmp"),
    ],
)
def test_join(root: str, parts: tuple[str, ...], expected: str):
    assert join(root, *parts) == expected


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_written_is_read(tmp_path: Path, scheme: str):
    uri = f"{scheme}{tmp_path}/deep/er/a.bin"
    assert not exists(uri)
    write_bytes(uri, b"one\0")
    assert exists(uri)
    assert read_bytes(uri) == b"one\0"
    assert (tmp_path / "deep" / "er" / "a.bin").read_bytes() == b"one\0"
    assert files_below(tmp_path) == ["deep/er/a.bin"]


def test_a_relative_path_is_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_bytes("a.bin", b"x")
    assert read_bytes(str(tmp_path / "a.bin")) == b"x"


def test_writing_replaces_the_whole_content(tmp_path: Path):
    uri = str(tmp_path / "a.bin")
    write_bytes(uri, b"a long content")
    write_bytes(uri, b"short")
    assert read_bytes(uri) == b"short"
    assert files_below(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, step: str, old: bytes | None
):
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(StorageError) as caught:
        write_bytes(f"{scheme}{path}", b"new")
    assert str(caught.value).startswith(f"cannot write {scheme}{path}: No space left on device")
    assert files_below(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or path.read_bytes() == old


def test_a_disk_that_fills_midway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Disk(io.FileIO):
        """Takes four bytes."""

        def write(self, content: Any, /) -> int:
            super().write(content[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(builtins, "open", Disk)
    with pytest.raises(StorageError, match=r"a\.bin: No space left on device"):
        write_bytes(str(path), b"new content")
    monkeypatch.undo()
    assert files_below(tmp_path) == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_readers_never_see_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Until the name is given to the new content, it has the old; and the new content is on disk by then."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    calls, fsync, replace = [], os.fsync, os.replace

    def observed_fsync(descriptor: int) -> None:
        calls.append(("fsync", path.read_bytes()))
        fsync(descriptor)

    def observed_replace(source: str, target: str) -> None:
        calls.append(("replace", path.read_bytes()))
        assert Path(source).read_bytes() == b"new"
        assert Path(source).parent == path.parent, "a rename across filesystems is not atomic"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", observed_fsync)
    monkeypatch.setattr(os, "replace", observed_replace)
    write_bytes(str(path), b"new")
    assert calls == [("fsync", b"old"), ("replace", b"old")]
    assert path.read_bytes() == b"new"


def test_a_half_written_file_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a reader in another process sees it, or anyone after a crash."""
    seen, replace = [], os.replace

    def observed(source: str, target: str) -> None:
        seen.append(list_files(str(tmp_path), suffix=".parquet"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", observed)
    write_bytes(str(tmp_path / "a.parquet"), b"x")
    assert seen == [[]]
    assert list_files(str(tmp_path), suffix=".parquet") == ["a.parquet"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reading_a_missing_file(tmp_path: Path, scheme: str):
    uri = f"{scheme}{tmp_path}/missing.bin"
    with pytest.raises(StorageError, match=rf"cannot read {uri}: .*No such file"):
        read_bytes(uri)


def test_a_folder_is_no_file(tmp_path: Path):
    assert not exists(str(tmp_path))
    with pytest.raises(StorageError, match="cannot read"):
        read_bytes(str(tmp_path))


def test_writing_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"cannot write .*file/a\.bin: (File exists|Not a directory)"):
        write_bytes(str(tmp_path / "file" / "a.bin"), b"")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_list_files_is_recursive_sorted_and_relative(tmp_path: Path, scheme: str):
    for name in ("b.json", "a/z.json", "a/b/c.json", "a/x.txt", "json"):
        write_bytes(str(tmp_path / name), b"")
    (tmp_path / "folder.json").mkdir()
    uri = f"{scheme}{tmp_path}"
    assert list_files(uri, suffix=".json") == ["a/b/c.json", "a/z.json", "b.json"]
    assert list_files(f"{uri}/", suffix=".txt") == ["a/x.txt"]
    assert list_files(uri, suffix=".png") == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_sizes(tmp_path: Path, scheme: str):
    root = f"{scheme}{tmp_path}"
    write_bytes(f"{root}/b/c.bin", b"four")
    write_bytes(f"{root}/a", b"")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to("self")
    (tmp_path / "link").symlink_to("b/c.bin")
    os.mkfifo(tmp_path / "pipe")
    assert list_sizes(root) == {"a": 0, "b/c.bin": 4, "link": 4}
    assert list_marks(root) == {"a": (0, ""), "b/c.bin": (4, ""), "link": (4, "")}
    assert [file_size(f"{root}/{name}") for name in ("a", "b/c.bin", "link")] == [0, 4, 4]
    assert [file_size(f"{root}/{name}") for name in ("b", "pipe", "absent", "a/below", "b/self")] == [None] * 5
    with open_file(f"{root}/b/c.bin") as file:
        assert file.seek(2) == 2
        assert file.read() == b"ur"
    with pytest.raises(StorageError, match="cannot read .*/absent: No such file"):
        open_file(f"{root}/absent")


@pytest.mark.parametrize("link", ["a-first", "latest", "zz"])
def test_a_link_hides_no_folder_beside_it(tmp_path: Path, link: str):
    for name in ("task-0", "task-1", "task-2"):
        write_bytes(f"{tmp_path}/root/deep/{name}/file", b"x")
    write_bytes(f"{tmp_path}/elsewhere/file", b"x")
    (tmp_path / "root" / link).symlink_to("deep/task-1")
    (tmp_path / "root" / "deep" / link).symlink_to("task-1")
    (tmp_path / "root" / "deep" / "outside").symlink_to(tmp_path / "elsewhere")
    found = list_files(f"{tmp_path}/root", suffix="file")
    assert found == ["deep/outside/file", *(f"deep/task-{index}/file" for index in range(3))]


def test_a_file_that_is_renamed_while_its_folder_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As every write does that goes on at the same time."""
    write_bytes(f"{tmp_path}/deep/a", b"x")
    walk = os.walk

    def late_walk(*args: Any, **options: Any) -> Any:
        for folder, folders, names in walk(*args, **options):
            folders.append("gone")
            yield folder, folders, [*names, "a.tmp"]

    monkeypatch.setattr(os, "walk", late_walk)
    assert list_sizes(str(tmp_path)) == {"deep/a": 1}


def test_list_files_of_an_absent_folder(tmp_path: Path):
    assert list_files(str(tmp_path / "absent"), suffix=".json") == []


@pytest.mark.parametrize(
    ("call", "verb"),
    [
        (read_bytes, "read"),
        (exists, "look up"),
        (lambda uri: write_bytes(uri, b""), "write"),
        (lambda uri: list_files(uri, suffix=""), "list"),
    ],
)
def test_an_unknown_scheme(call: Any, verb: str):
    with pytest.raises(StorageError, match=f"cannot {verb} gopher://host/a: .*gopher"):
        call("gopher://host/a")


@pytest.mark.parametrize("uri", ["hf://a/b", "github://a/b", "dask://a/b"])
def test_schemes_that_are_no_store(uri: str):
    with pytest.raises(
        StorageError, match=f"unknown scheme {uri.partition(':')[0]}:// .known: file://, s3://, .*; correct the URI"
    ):
        read_bytes(uri)


@pytest.mark.parametrize("uri", ["s3:/bucket/a", "file:/tmp/a", join("s3://", "a")])
def test_a_uri_that_lacks_a_slash_is_no_local_folder(uri: str):
    assert absolute_path(uri) == uri
    with pytest.raises(StorageError, match=rf"cannot read {uri}: a URI has two slashes, {uri.partition(':')[0]}://"):
        read_bytes(uri)


def test_an_empty_path_is_no_folder():
    for call in (read_bytes, lambda uri: list_files(uri, suffix=""), lambda uri: write_bytes(uri, b"")):
        with pytest.raises(StorageError, match="'': the path is empty"):
            call("")
    with pytest.raises(StorageError, match="the path is empty; give a folder"):
        join("", "a")


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_bytes("~/a/b", b"x")
    assert read_bytes(f"{tmp_path}/a/b") == read_bytes("~/a/b") == b"x"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_deleting_and_reading_what_may_be_absent(tmp_path: Path, scheme: str):
    uri = f"{scheme}{tmp_path}/a.bin"
    write_bytes(uri, b"x")
    assert read_if_there(uri) == b"x"
    assert list_uris(f"{scheme}{tmp_path}/", suffix=".bin") == {uri}
    delete(uri)
    delete(uri)
    assert read_if_there(uri) is None
    assert files_below(tmp_path) == []


def test_deleting_a_folder(tmp_path: Path):
    with pytest.raises(StorageError, match=f"cannot delete {tmp_path}: "):
        delete(str(tmp_path))


def test_items_are_read_in_order_and_the_first_error_is_raised(tmp_path: Path):
    uris = [f"{tmp_path}/{index}" for index in range(30)]
    for uri in uris:
        write_bytes(uri, uri.encode())
    assert read_many(read_bytes, uris) == [uri.encode() for uri in uris]
    delete(uris[7])
    with pytest.raises(StorageError, match=f"cannot read {uris[7]}: No such file"):
        read_many(read_bytes, uris)


def test_of_many_writers_of_a_free_name_one_succeeds(tmp_path: Path):
    uri = str(tmp_path / "a" / "b.bin")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: create_bytes(uri, bytes([i])), range(32)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)])
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_a_store_that_lets_two_write_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_exclusive(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(filesystem, "create_bytes", lambda uri, content: write_bytes(uri, content) is None)
    with pytest.raises(StorageError, match=r"does not keep a name to its first writer \(If-None-Match\)"):
        check_exclusive(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
