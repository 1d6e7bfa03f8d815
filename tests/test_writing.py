"""Files are whole or not there, over files alone, and one process at a time writes them."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecore import locks, writing
from sparsecore.locks import held
from sparsecore.streams import append
from sparsecore.writing import FileError, put

fcntl = pytest.importorskip("fcntl")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o007], indirect=True)
def test_a_new_file_has_the_users_umask_and_an_old_one_its_own(umask: int, tmp_path: Path) -> None:
    put(tmp_path / "new", b"1")
    assert mode(tmp_path / "new") == 0o666 & ~umask
    (tmp_path / "new").chmod(0o640)
    put(tmp_path / "new", b"2")
    assert mode(tmp_path / "new") == 0o640 and (tmp_path / "new").read_bytes() == b"2"


def test_where_a_link_leads_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for data in (b"1", b"2"):  # to nothing yet, and to a file
        put(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_bytes() == data
    assert len(list((tmp_path / "there").iterdir())) == 1


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def protected(path: Path) -> Path:
    path.write_text("kept")
    path.chmod(0o444)
    return path


def to_a_device(path: Path) -> Path:
    path.symlink_to("/dev/null")
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (folder, "got a folder"),
        (pipe, "got a pipe or device"),
        (to_a_device, "got a pipe or device"),
        (protected, "got a protected one"),
        (lambda path: Path("/dev/null"), "got a pipe or device"),
        (lambda path: path / "x" / "y", "No such file"),
        (lambda path: path.with_name("n" * 300), "name too long"),
    ],
    ids=["folder", "pipe", "link", "protected", "device", "nowhere", "long"],
)
def test_nothing_but_a_file_is_written_over(
    make: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "x")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FileError, match=f"(?i){said}"):
        put(path, b"data")
    assert sorted(tmp_path.iterdir()) == before and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(
    name: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    put(path, b"old")

    def fails(*_: object, **__: object) -> None:
        raise error

    if name == "write":

        class Full:
            def __init__(self, descriptor: int, _: str) -> None:
                self.descriptor = descriptor

            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                os.close(self.descriptor)

            write = fails

        monkeypatch.setattr(os, "fdopen", Full)
    else:
        monkeypatch.setattr(os if name == "fsync" else Path, name, fails)
    with pytest.raises(FileError if isinstance(error, OSError) else KeyboardInterrupt):
        put(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_that_lies_there_already_is_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever guesses the name of what is being written gains nothing."""
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "00")
    part, victim = tmp_path / ".file.00.sparsecore-part", tmp_path / "victim"
    victim.write_text("mine")
    for plant in (lambda: part.symlink_to(victim), lambda: part.hardlink_to(victim)):
        monkeypatch.setattr(writing, "sweep", lambda _, plant=plant: plant())
        with pytest.raises(FileError, match="could not be written"):
            put(tmp_path / "file", b"data")
        part.unlink()
    assert victim.read_text() == "mine" and not (tmp_path / "file").exists()


def test_leftovers_of_killed_writes_go_at_the_next_one_and_others_stay(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from sparsecore import writing\n"
        "os.fsync = lambda d: os.kill(os.getpid(), 9)\n"
        "writing.put(Path(sys.argv[1]), b'half')"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "file"], check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].read_bytes() == b"half"
    (tmp_path / ".notes.sparsecore-part").mkdir()
    own, descriptor = writing._new_part(tmp_path / "other")  # what somebody still writes
    put(tmp_path / "another", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [own.name, "another", ".notes.sparsecore-part"]
    )
    os.close(descriptor)
    put(tmp_path / "another", b"")
    assert not own.exists()


def test_a_text_is_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    append(path, "one\n")
    append(path, "two\n")
    assert path.read_text() == "one\ntwo\n"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="lines could not be written: No space left"):
        append(path, "three\n")
    assert path.read_text() == "one\ntwo\n"
    append(Path("/dev/null"), "four\n")


HOLDING = (
    "import sys; from pathlib import Path; from sparsecore.locks import held\n"
    "with held(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
)


def test_one_process_at_a_time_and_the_line_says_which(tmp_path: Path) -> None:
    path = tmp_path / "results"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(FileError, match=rf"in use by process {other.pid} on .* since "), held(path):
        pass
    other.kill()  # a lock ends with its process
    other.wait()
    with held(path), held(path):
        assert len(list(tmp_path.iterdir())) == 1
        found: list[str] = []

        def another() -> None:
            try:
                with held(path):
                    found.append("held")
            except FileError as error:
                found.append(str(error))

        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        assert "in use by another thread" in found[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("note", [b"", b"\x1b[2J", b"[1]", b'["x", 1, 2, 3]', b"[" * 2000])
def test_who_holds_a_lock_may_say_anything(note: bytes) -> None:
    assert locks._told(note) == "another process"


def test_where_no_lock_can_be_files_are_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path / "x"):
        put(tmp_path / "x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"
    with held(None), held(Path("/dev/null")):
        pass


def test_of_what_this_process_has_open_nobody_need_read_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    read, write = os.pipe()
    os.close(read)
    try:
        append(Path(f"/dev/fd/{write}"), "more\n")
        with open(write, "w", closefd=False) as printed:
            printed.write("held")
            monkeypatch.setattr(sys, "stdout", printed)  # which cannot be flushed any more
            kept = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
            append(Path(f"/dev/fd/{kept}"), "all\n")
            os.close(kept)
            monkeypatch.undo()
            os.dup2(os.open(os.devnull, os.O_WRONLY), write)
    finally:
        os.close(write)
    assert (tmp_path / "log").read_text() == "all\n"


def test_what_this_process_has_open_is_written_where_it_has_come_to(tmp_path: Path) -> None:
    """Behind /dev/stdout may lie a log that has lines already, and gets more."""
    log, link = tmp_path / "log", tmp_path / "link"
    log.write_text("old\n")
    link.symlink_to("/dev/stdout")
    script = (
        "import sys; from pathlib import Path\n"
        "from sparsecore import metrics_file, streams, writing\n"
        "for path in map(Path, ['/dev/stdout', '/dev/fd/1', sys.argv[1]]):\n"
        "    assert streams.is_stream(path)\n"
        "    metrics_file.catch_up(path, [{'epoch': 1}])\n"
        "    streams.append(path, 'new\\n'); print('said')\n"
        "    try: writing.put(path, b'')\n"
        "    except writing.FileError: print('refused')\n"
    )
    for mode in ("a", "w"):
        with log.open(mode) as out:
            subprocess.run([sys.executable, "-c", script, link], stdout=out, check=True)
        lines = (["old"] if mode == "a" else []) + ['{"epoch": 1}', "new", "said", "refused"] * 3
        assert log.read_text().splitlines() == lines


def test_a_reader_of_a_named_pipe_gets_all_lines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        code = (
            "import sys\nfrom pathlib import Path\nfrom sparsecore.streams import append\n"
            "for i in range(3):\n    append(Path(sys.argv[1]), f'{i}\\n')\n"
        )
        subprocess.run([sys.executable, "-c", code, tmp_path / "pipe"], check=True, timeout=60)
        assert reader.stdout is not None and reader.stdout.read() == "0\n1\n2\n"
