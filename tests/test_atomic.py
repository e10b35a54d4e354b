"""Files that are whole or not there, and what a killed writer leaves."""

import os

import pytest

from cuepoint.atomic import atomic_path, write_text


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    target = tmp_path / "file.json"
    pid = os.fork()
    if pid == 0:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert not target.exists()
    write_text(target, "whole")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "whole"


def test_a_writer_that_lives_keeps_its_file_when_another_one_comes(tmp_path):
    target = tmp_path / "file.json"
    with atomic_path(target) as slow:
        slow.write_text("slow")
        write_text(target, "quick")
        assert slow.exists()
    assert target.read_text() == "slow"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file.json"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_files_follow_the_umask(tmp_path):
    write_text(tmp_path / "file.json", "text")
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "file.json").stat().st_mode & 0o777 == 0o666 & ~umask
