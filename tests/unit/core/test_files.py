import errno
import hashlib
import json
import multiprocessing
import os
import socket
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest

from nnssl_ext.core import files
from nnssl_ext.core.errors import UserError
from nnssl_ext.core.files import FolderLock, atomic_path, read_json, sha256_file, sha256_json, write_json, write_text


def content_of(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_and_its_missing_folders_are_written(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "ünïcode\n")
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == "ünïcode\n".encode()
    assert content_of(tmp_path / "a" / "b") == ["file.txt"]


def test_an_existing_file_is_replaced(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "old")
    write_text(file, "new")
    assert file.read_text() == "new"


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_an_error_in_the_body_keeps_the_old_file_and_leaves_nothing(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(file) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert file.read_text() == "old"
    assert content_of(tmp_path) == ["file.txt"]


def test_while_it_is_written_the_old_file_stays_readable(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "old")
    with atomic_path(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
        assert temporary.parent == file.parent
    assert file.read_text() == "new"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_is_a_user_error_and_keeps_the_old_file(tmp_path, monkeypatch, code, call):
    file = tmp_path / "file.txt"
    write_text(file, "old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(UserError, match="could not write: the disk") as caught:
        write_text(file, "new")
    assert caught.value.where == str(file)
    assert file.read_text() == "old"
    assert content_of(tmp_path) == ["file.txt"]


def test_a_disk_that_fills_up_during_the_write_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), atomic_path(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert content_of(tmp_path) == []


def test_other_operating_system_errors_are_passed_on(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "denied")
    assert content_of(tmp_path) == []


def test_json_comes_back_as_it_was_written(tmp_path):
    content = {"b": [1, 2.5, None, True], "a": "ü"}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_numbers_that_are_not_finite_and_keeps_the_old_file(tmp_path, value):
    file = tmp_path / "x.json"
    write_json(file, 1)
    with pytest.raises(ValueError):
        write_json(file, {"loss": value})
    assert read_json(file) == 1


def test_a_missing_json_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="file not found") as caught:
        read_json(tmp_path / "none.json")
    assert caught.value.where == str(tmp_path / "none.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{}", b"{'a': 1}"])
def test_a_broken_json_file_is_a_user_error(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_the_hash_of_a_file_is_sha256_of_its_bytes_on_every_python_version(tmp_path):
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with open(tmp_path / "x", "rb") as file:
        assert files._sha256_stream(file) == hashlib.sha256(data).hexdigest()


def test_the_hash_of_json_ignores_the_order_of_keys_but_not_of_lists():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])


def test_a_lock_holds_while_it_is_used_and_is_gone_afterwards(tmp_path):
    with FolderLock(tmp_path / "run") as lock:
        owner = json.loads(lock.path.read_text())
        assert owner == {"pid": os.getpid(), "host": socket.gethostname()}
    assert content_of(tmp_path / "run") == []


def test_a_lock_is_released_when_its_body_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
        _ = 1 / 0
    with FolderLock(tmp_path):
        pass


def test_a_second_user_of_a_folder_is_refused_with_pid_and_host(tmp_path):
    with FolderLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"), FolderLock(tmp_path):
        pass


def test_a_refused_second_user_does_not_remove_the_lock(tmp_path):
    with FolderLock(tmp_path) as lock:
        with pytest.raises(UserError), FolderLock(tmp_path):
            pass
        assert lock.path.exists()


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    (tmp_path / ".lock").write_text(json.dumps({"pid": finished.pid, "host": socket.gethostname()}))
    with FolderLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()


def test_the_lock_of_another_live_process_is_respected(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / ".lock").write_text(json.dumps({"pid": other.pid, "host": socket.gethostname()}))
        with pytest.raises(UserError, match=f"process {other.pid}"), FolderLock(tmp_path):
            pass
        other.communicate(b"\n")


def test_the_lock_of_another_host_is_respected_and_the_fix_names_the_file(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "another-host"}))
    with pytest.raises(UserError, match="on another-host") as caught, FolderLock(tmp_path):
        pass
    assert str(tmp_path / ".lock") in caught.value.fix


def test_a_slurm_job_that_was_requeued_takes_its_own_lock_over_from_another_host_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with FolderLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["job"] == ["123", 1]
    for job, free in ((["123", 0], True), (["123", 1], False), (["122", 0], False), (None, False), ("123", False)):
        (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "another-host", "job": job}))
        with nullcontext() if free else pytest.raises(UserError, match="in use by process 1 on another-host"), FolderLock(tmp_path):
            pass


@pytest.mark.parametrize("raw", ["", "{", "[]", "null", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_readable_is_respected(tmp_path, raw):
    (tmp_path / ".lock").write_text(raw)
    with pytest.raises(UserError, match=r"in use|locked"), FolderLock(tmp_path):
        pass


def test_a_process_that_ended_but_was_not_waited_for_counts_as_gone():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays as a zombie
    assert not files._alive(pid)
    os.waitpid(pid, 0)
    assert not files._alive(pid) and files._alive(os.getpid())


def test_a_process_of_another_user_counts_as_alive(monkeypatch):
    def denied(*_):
        raise PermissionError

    monkeypatch.setattr(files.os, "kill", denied)
    assert files._alive(1)


def _take(folder, start, release, outcomes) -> None:
    start.wait()
    try:
        with FolderLock(folder):
            outcomes.put("taken")
            release.wait()
    except UserError:
        outcomes.put("refused")


def test_of_many_processes_that_find_a_stale_lock_only_one_gets_the_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    gone = fork.Process(target=int)
    gone.start()
    gone.join()
    for _ in range(10):
        (tmp_path / ".lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
        start, release, outcomes = fork.Event(), fork.Event(), fork.SimpleQueue()
        processes = [fork.Process(target=_take, args=(tmp_path, start, release, outcomes)) for _ in range(6)]
        for process in processes:
            process.start()
        start.set()
        assert sorted(outcomes.get() for _ in processes) == ["refused"] * 5 + ["taken"]
        release.set()
        for process in processes:
            process.join()
