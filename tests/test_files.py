"""Files and folders that appear whole or not at all, and survive a loss of power."""

import errno
import json
import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from andromeda import files


class PowerCut(BaseException):
    pass


def cut_power(*_):
    raise PowerCut


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_flush_takes_files_and_folders(tmp_path, disk_log):
    (tmp_path / "file").write_text("text")
    files.flush(tmp_path / "file")
    files.flush(str(tmp_path))
    assert disk_log.events == [("sync", tmp_path / "file"), ("sync", tmp_path)]
    with pytest.raises(FileNotFoundError):
        files.flush(tmp_path / "nothing")


def test_flush_tree_reaches_everything(tmp_path, disk_log):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    (tmp_path / "a" / ".hidden").write_text("")
    files.flush_tree(tmp_path)
    expected = {tmp_path, *tmp_path.rglob("*")}
    assert len(expected) == 5 and {path for _, path in disk_log.events} == expected


def test_write_json_replaces_whole(tmp_path, disk_log):
    target = tmp_path / "figures.json"
    files.write_json(target, {"loss": 1.5})
    disk_log.assert_durable(target)
    with pytest.raises(TypeError):
        files.write_json(target, {"loss": object()})
    assert json.loads(target.read_text()) == {"loss": 1.5}
    assert names(tmp_path) == ["figures.json"]


def test_a_file_written_piece_by_piece_replaces_whole(tmp_path, disk_log):
    target = tmp_path / "figures.json"
    target.write_text("old")
    with pytest.raises(KeyError), files.whole_file(target) as file:
        file.write(b"half")
        raise KeyError("of the caller")
    assert target.read_text() == "old" and names(tmp_path) == ["figures.json"]
    with files.whole_file(target) as file:
        file.write(b"one ")
        assert target.read_text() == "old"
        file.write(b"two")
    disk_log.assert_durable(target)
    assert target.read_text() == "one two" and names(tmp_path) == ["figures.json"]
    there = pytest.raises(FileNotFoundError, match=r"cannot write .*none/x: .*Make the folder first")
    with there, files.whole_file(tmp_path / "none" / "x"):
        pass
    with files.whole_file("/dev/null") as file:
        file.write(b"x")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_json(tmp_path, monkeypatch, step):
    target = tmp_path / "figures.json"
    files.write_json(target, 1)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(os, step, cut_power)
        files.write_json(target, 2)
    assert target.read_text() == "1\n" and names(tmp_path) == ["figures.json"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path, disk_log):
    target = tmp_path / "deep" / "rows"
    with pytest.raises(KeyboardInterrupt), files.whole_folder(target) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert names(target.parent) == []
    for name in ("first", "second"):
        with files.whole_folder(target) as folder:
            assert folder.parent == target.parent  # one file system, so that a rename is possible
            (folder / "inner").mkdir()
            (folder / "inner" / name).write_text("")
        disk_log.assert_durable(target)
        assert names(target / "inner") == [name]
    assert names(target.parent) == ["rows"]


def test_a_folder_that_cannot_be_synced_replaces_nothing(tmp_path, monkeypatch):
    target = tmp_path / "rows"
    with files.whole_folder(target) as folder:
        (folder / "old").write_text("")
    monkeypatch.setattr(os, "fsync", cut_power)
    with pytest.raises(PowerCut), files.whole_folder(target) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == ["rows"] and names(target) == ["old"]


def test_a_folder_never_holds_half_of_the_old_one(tmp_path, monkeypatch):
    """The old folder is renamed in one step, so that a crash while its files are removed leaves no part of it."""
    target = tmp_path / "rows"
    with files.whole_folder(target) as folder:
        (folder / "old").write_text("")
    seen = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: seen.append(names(target)))
    with files.whole_folder(target) as folder:
        (folder / "new").write_text("")
    assert seen and all(found == ["new"] for found in seen)


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "rows").write_text("text")
    with pytest.raises(NotADirectoryError), files.whole_folder(tmp_path / "rows"):
        pass
    assert (tmp_path / "rows").read_text() == "text" and names(tmp_path) == ["rows"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "figures.json", 1)
        with files.whole_folder(tmp_path / "rows"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "figures.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o750


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    target = tmp_path / "figures.json"
    target.write_text("old")
    target.chmod(0o604)
    files.write_json(target, 1)
    assert target.stat().st_mode & 0o777 == 0o604 and target.read_text() == "1\n"


# ---- links and what is no file


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "chain").symlink_to("link")
    (tmp_path / "link").symlink_to("real/figures.json")
    for value in (1, 2):  # first a link that leads nowhere yet
        files.write_json(tmp_path / "chain", value)
        assert (tmp_path / "real" / "figures.json").read_text() == f"{value}\n"
    assert (tmp_path / "chain").is_symlink() and (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["figures.json"] and names(tmp_path) == ["chain", "link", "real"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "rows").symlink_to("disk/rows")
    for name in ("first", "second"):
        with files.whole_folder(tmp_path / "rows") as folder:
            assert folder.parent == tmp_path / "disk"  # the file system of what is made
            (folder / name).write_text("")
        assert names(tmp_path / "disk" / "rows") == [name]
    assert (tmp_path / "rows").is_symlink() and names(tmp_path / "disk") == ["rows"]


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.check_output(pipe)  # does not wait for a reader
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    files.write_bytes(pipe, b"x" * 200_000)  # more than a pipe holds
    reader.join()
    assert read == [b"x" * 200_000] and pipe.is_fifo() and names(tmp_path) == ["pipe"]


def test_a_descriptor_of_a_file_is_written_on_where_it_is(tmp_path):
    """As with `--json /dev/stdout >> log`: the file keeps its content and is not replaced."""
    log = tmp_path / "log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    try:
        os.write(descriptor, b"before\n")
        inode = log.stat().st_ino
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{descriptor}")
        for name in (f"/dev/fd/{descriptor}", f"/proc/self/fd/{descriptor}", tmp_path / "link"):
            files.check_output(name)
            files.write_json(name, 1)
        os.write(descriptor, b"after\n")
    finally:
        os.close(descriptor)
    assert log.read_text() == "before\n1\n1\n1\nafter\n" and log.stat().st_ino == inode


def test_dev_stdout_comes_after_what_was_printed(capfd, monkeypatch):
    with open(os.dup(1), "w", buffering=1000) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        print("first")
        files.write_json("/dev/stdout", "second")
        print("third")
    assert capfd.readouterr().out == 'first\n"second"\nthird\n'


def test_dev_null_stays_a_device():
    files.write_json("/dev/null", 1)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- before the work


@pytest.mark.parametrize("check", [files.check_output, files.check_output_folder])
def test_checks_leave_nothing_behind(tmp_path, check):
    check(tmp_path / "new")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "name, kind, text",
    [
        ("missing/x", FileNotFoundError, "missing). Make the folder first"),
        ("file/x", NotADirectoryError, "Choose a place inside a folder"),
        ("folder", IsADirectoryError, "it is a folder"),
        ("new/", IsADirectoryError, "it is a folder"),
        ("dangling", FileNotFoundError, "nowhere). Make the folder first"),
        ("loop", OSError, "lead in a circle"),
        ("x" * 256, OSError, "Choose a shorter name"),
        ("/dev/fd/987654", OSError, "Bad file descriptor"),
        ("/proc/no", OSError, "cannot write /proc/no"),
    ],
)
def test_a_file_that_cannot_be_written_is_known_before(tmp_path, monkeypatch, name, kind, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/x")
    before = names(tmp_path)
    with pytest.raises(kind) as caught:
        files.check_output(name)
    assert text in str(caught.value) and str(caught.value).startswith(f"cannot write {name}: ")
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "name, text", [("file/deep/er", "Choose a place inside a folder"), ("file", "it is no folder")]
)
def test_a_folder_that_cannot_be_written_is_known_before(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=text):
        files.check_output_folder(name)
    files.check_output_folder("deep/er")
    assert names(tmp_path) == ["file"]


def test_a_read_only_place_is_known_before(tmp_path, monkeypatch):
    """Root may write everywhere, so the test simulates the refusal of the system."""

    def refuse(number):
        def refusing(path, *arguments, **options):
            raise OSError(number, os.strerror(number), str(path))

        return refusing

    for number, text in ((errno.EACCES, "change the permissions"), (errno.EROFS, "mounted read-only")):
        for check in (files.check_output, files.check_output_folder):
            with monkeypatch.context() as patch, pytest.raises(OSError, match=text) as caught:
                patch.setattr(os, "open", refuse(number))
                check(tmp_path / "x")
            assert caught.value.errno == number and ".x." not in str(caught.value)
    (tmp_path / "x").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="write-protected"):
        files.check_output(tmp_path / "x")


@pytest.mark.parametrize(
    "use",
    [
        files.check_output,
        files.check_output_folder,
        lambda path: files.write_json(path, 1),
        lambda path: files.whole_folder(path).__enter__(),
    ],
)
def test_an_empty_name_is_refused(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must not be empty"):
        use("")
    assert names(tmp_path) == []


def test_a_name_as_long_as_names_may_be(tmp_path):
    target = tmp_path / ("é" * 127)
    files.check_output(target)
    files.write_text(target, "é")
    with files.whole_folder(tmp_path / ("ö" * 127)):
        pass
    assert target.read_bytes() == "é".encode()
    assert names(tmp_path) == ["é" * 127, "ö" * 127]


# ---- why something could not be written


def raising(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("number", sorted(files._REMEDIES))
def test_every_failure_is_said_in_words(tmp_path, monkeypatch, number):
    target = tmp_path / "figures.json"
    files.write_json(target, 1)
    monkeypatch.setattr(os, "fsync", raising(OSError(number, os.strerror(number))))
    with pytest.raises(OSError) as caught:
        files.write_json(target, 2)
    said = str(caught.value)
    assert said.startswith(f"cannot write {target}: {os.strerror(number)}")
    assert "what was there before is unchanged" in said and files._REMEDIES[number] in said
    assert ("MB free" in said) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert caught.value.errno == number and not isinstance(caught.value, BrokenPipeError)
    assert target.read_text() == "1\n" and names(tmp_path) == ["figures.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("SafetensorError: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7296 vs 7188"),
    ],
    ids=["python", "rust", "torch"],
)
def test_full_disks_of_every_library(tmp_path, monkeypatch, error):
    monkeypatch.setattr(files, "_free", lambda path: 1_000_000)
    with (
        pytest.raises(OSError) as caught,
        files.writing(tmp_path / "x", "the weights", whole="step 10 is whole", remedy="Continue with --resume"),
    ):
        raise error
    assert str(caught.value) == (
        f"cannot write the weights to {tmp_path / 'x'}: No space left on device, 1.0 MB free; step 10 is whole. "
        "Continue with --resume. Make room there or choose another place"
    )
    assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is error


def test_a_full_disk_behind_another_error_is_found_and_said_once(tmp_path):
    with pytest.raises(OSError) as caught, files.writing(tmp_path / "outer"), files.writing(tmp_path / "inner"):
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        finally:
            raise ValueError("something that follows from it")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'inner'}: Disk quota exceeded")


class _OfTheNetwork(OSError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/source.txt"),
        PermissionError(errno.EACCES, "Permission denied", "SOURCE"),
        _OfTheNetwork(errno.ENOSPC, "the hub is full"),
        OSError("without a number"),
        ValueError("text"),
    ],
    ids=repr,
)
def test_errors_about_something_else_pass(tmp_path, error):
    """Errors of a source that is read while its rows are written pass through, even if it is next to the rows."""
    if getattr(error, "filename", None) == "SOURCE":
        error.filename = str(tmp_path / "text.txt")
    with pytest.raises(type(error)) as caught, files.whole_folder(tmp_path / "rows"):
        raise error
    assert caught.value is error and names(tmp_path) == []


def test_an_error_that_names_the_target_is_explained(tmp_path):
    denied = PermissionError(errno.EACCES, "Permission denied")
    with (
        pytest.raises(PermissionError, match=r"cannot write .*rows: Permission denied"),
        files.whole_folder(tmp_path / "rows") as folder,
    ):
        denied.filename = str(folder / "data.arrow")
        raise denied
    (tmp_path / "rows").write_text("")
    with (
        pytest.raises(FileExistsError, match=r"cannot write .*rows/a: File exists \(.*rows\)"),
        files.whole_folder(tmp_path / "rows" / "a"),
    ):
        pass


# ---- what killed processes leave


def stale(path):
    path.mkdir() if path.name.startswith(".rows") else path.write_text("")
    os.utime(path, (0, 0))
    return path


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead = stale(tmp_path / ".rows.0123456789abcdef")
    old = stale(tmp_path / ".rows.1123456789abcdef.old")
    young = tmp_path / ".rows.fedcba9876543210"
    other = stale(tmp_path / ".other.0123456789abcdef")
    young.mkdir()
    with files.whole_folder(tmp_path / "rows") as first:
        assert not dead.exists()
        assert old.exists()  # it may be all that is left of the rows, which are absent
        os.utime(first, (0, 0))
        with files.whole_folder(tmp_path / "rows"):  # beside the first, which is locked
            pass
        assert first.is_dir()
    with files.whole_folder(tmp_path / "rows"):
        pass
    assert names(tmp_path) == [other.name, young.name, "rows"]


def test_a_file_that_a_killed_process_left_is_removed(tmp_path):
    stale(tmp_path / ".figures.json.0123456789abcdef")
    files.write_json(tmp_path / "figures.json", 1)
    assert names(tmp_path) == ["figures.json"]


def test_what_is_being_written_can_be_removed_at_any_moment(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    seen = []

    def interrupted(*_):
        seen.append(names(tmp_path))
        files.remove_unfinished()
        seen.append(names(tmp_path))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), files.whole_folder(tmp_path / "rows") as new:
        (new / "half").write_text("")
        patch.setattr(os, "fsync", interrupted)
        files.write_json(tmp_path / "figures.json", 1)
    assert len(seen[0]) == 3 and seen[1] == ["rows"]
    files.remove_unfinished()
    assert names(tmp_path) == ["rows"]


@pytest.mark.parametrize(
    "name, expected",
    [
        (".train.json.0123456789abcdef", True),
        (".rows.0123456789abcdef.old", True),
        (files._other_name(Path("a.b")).name, True),
        ("train.json", False),
        (".train.json.0123", False),
        ("x.0123456789abcdef", False),
    ],
)
def test_temporary_names_are_known(name, expected):
    assert files.is_temporary(name) == expected


# ---- JSON


@pytest.mark.parametrize(
    "content, text",
    [
        (b"{", "it must be JSON, Expecting property name"),
        (b"", "it must be JSON, Expecting value"),
        (b"\xff\xfe", "it must be JSON, 'utf-8' codec"),
        (b"[" * 100_000, "it must be JSON, "),
        (b"[]", "it must be a JSON object, got list"),
        (b"null", "it must be a JSON object, got NoneType"),
        (b'{"a": 1}', "it must have the key 'step', 'files', got none"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path, content, text):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged") as caught:
        files.read_json(path, ("a", "step", "files"))
    assert text in str(caught.value) and str(path) in str(caught.value)
    path.write_text('{"a": 1}')
    assert files.read_json(path, ("a",)) == {"a": 1}


# ---- checksums


def test_checksums_find_every_damage(tmp_path):
    for name, content in (("a", b"one"), ("b/c", b"two" * 1_000_000), ("empty", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    recorded = files.checksums(tmp_path)
    assert list(recorded) == ["a", "b/c", "empty"]
    assert recorded["empty"] == {
        "bytes": 0,
        "xxh3_128": "99aa06d3014798d86001c324468d497f",
    }  # of the XXH3 specification
    assert files.damages(tmp_path, recorded) == []
    flipped = bytearray((tmp_path / "b/c").read_bytes())
    flipped[1_500_000] ^= 1
    (tmp_path / "b/c").write_bytes(flipped)
    (tmp_path / "a").unlink()
    (tmp_path / "empty").write_bytes(b"x")
    assert files.damages(tmp_path, recorded) == [
        "a is missing",
        "b/c has other content than was written (checksum differs)",
        "empty must have 0 bytes, got 1",
    ]
    assert list(files.checksums(tmp_path, ["empty"])) == ["empty"]
