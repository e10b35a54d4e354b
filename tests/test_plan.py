"""The plan and the failure log: what a run works on, and what it must never work on again."""

import time

import pytest

from cuepoint import failures
from cuepoint.errors import ConfigError, DataError
from cuepoint.failures import Attempt, attempt_due
from cuepoint.layout import Layout
from cuepoint.plan import RELEASED, draft_run, read_plan, read_run, write_run
from cuepoint.receipts import Receipt
from cuepoint.sources import parse_list
from cuepoint.states import Status


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "results")


def videos(*names):
    return parse_list("\n".join(f"{name}.mp3" for name in names))


def run(layout, entries, shard_size=2, **settings):
    draft = draft_run(entries, layout, shard_size=shard_size, **settings)
    write_run(draft, layout)
    return draft.run


def close(layout, *shards):
    for shard in shards:
        layout.transcripts(shard).parent.mkdir(parents=True, exist_ok=True)
        layout.transcripts(shard).touch()


def shards_of(run, entries):
    return [run.members.get(entry.video_id) for entry in entries]


def fail(layout, entry, number=0, status=Status.TRANSIENT, **values):
    failures.record(layout, entry.video_id, Attempt(number, status, time.time(), **values))


def test_new_videos_go_to_new_shards_and_known_ones_stay(layout):
    first = videos("a", "b", "c")
    assert shards_of(run(layout, first), first) == ["00000", "00000", "00001"]
    reordered = videos("x", "c", "b", "a")
    again = run(layout, reordered)
    assert shards_of(again, reordered) == ["00002", "00001", "00000", "00000"]
    assert list(again.members) == [entry.video_id for entry in reordered]


def test_a_second_look_at_the_same_list_plans_the_same(layout):
    entries = videos("a", "b", "c")
    first = run(layout, entries)
    text = layout.plan.read_text()
    assert run(layout, entries) == first
    assert layout.plan.read_text() == text


def test_a_removed_video_leaves_a_hole_in_a_closed_shard_and_comes_back_into_it(layout):
    a, b = videos("a", "b")
    run(layout, [a, b])
    close(layout, "00000")
    assert run(layout, [a]).members == {a.video_id: "00000"}
    assert run(layout, [a, b]).members == {a.video_id: "00000", b.video_id: "00000"}


def test_a_video_removed_before_its_shard_closed_comes_back_in_a_new_shard(layout):
    a, b = videos("a", "b")
    run(layout, [a, b])
    run(layout, [a])
    assert read_plan(layout.plan.read_text())[b.video_id] == RELEASED
    close(layout, "00000")
    assert run(layout, [a, b]).members == {a.video_id: "00000", b.video_id: "00001"}


def test_a_retry_of_a_closed_shard_moves_to_a_new_one(layout):
    a, b = videos("a", "b")
    run(layout, [a, b])
    fail(layout, b)
    open_still = run(layout, [a, b])
    assert open_still.members[b.video_id] == "00000"
    assert open_still.attempts == {b.video_id: 1}
    close(layout, "00000")
    moved = run(layout, [a, b])
    assert moved.members == {a.video_id: "00000", b.video_id: "00001"}
    assert moved.attempts == {b.video_id: 1}


def test_a_final_failure_stays_where_it_is(layout):
    a, b = videos("a", "b")
    run(layout, [a, b])
    fail(layout, b, status=Status.NEEDS_AUTH, credentials="old")
    close(layout, "00000")
    assert run(layout, [a, b], credentials="old").members[b.video_id] == "00000"
    assert run(layout, [a, b], credentials="new").members[b.video_id] == "00001"


def test_a_local_file_that_appears_is_tried_again(layout, tmp_path):
    (entry,) = parse_list(str(tmp_path / "late.mp3"))
    run(layout, [entry])
    fail(layout, entry, status=Status.UNAVAILABLE)
    assert run(layout, [entry]).attempts == {}
    (tmp_path / "late.mp3").write_bytes(b"here now")
    assert run(layout, [entry]).attempts == {entry.video_id: 1}


def test_audio_that_was_dropped_is_fetched_again_for_another_model_in_its_own_shard(layout):
    (entry,) = videos("a")
    run(layout, [entry], keep_audio=False, transcribe_settings={"model": "one"})
    Receipt(video_id=entry.video_id, url="u", status=Status.OK, sha256="0").write(layout.receipt(entry.video_id))
    close(layout, "00000")
    assert run(layout, [entry], keep_audio=False, transcribe_settings={"model": "one"}).attempts == {}
    changed = run(layout, [entry], keep_audio=False, transcribe_settings={"model": "two"})
    assert (changed.attempts, changed.members) == ({entry.video_id: 1}, {entry.video_id: "00000"})
    resumed = run(layout, [entry], keep_audio=False, transcribe_settings={"model": "two"})
    assert resumed.attempts == changed.attempts


def test_a_limit_takes_open_shards_first_and_leaves_the_rest_for_later(layout):
    entries = videos(*"abcdefg")
    first = run(layout, entries, limit_unprocessed=3)
    assert len(first.members) == 3
    assert len(first.waiting) == 4
    assert run(layout, entries, limit_unprocessed=3).members == first.members
    close(layout, "00000", "00001")
    second = run(layout, entries, limit_unprocessed=3)
    assert len(second.members) == 6
    assert set(second.waiting) == {entries[6].video_id}


def test_jobs_read_the_run_that_was_written(layout):
    written = run(layout, videos("a", "b", "c"))
    assert read_run(layout) == written


def test_a_run_drafted_before_another_wrote_its_plan_is_refused(layout):
    late = draft_run(videos("a", "b"), layout, shard_size=2)
    run(layout, videos("x"))
    with pytest.raises(ConfigError, match="another run has just changed the plan"):
        write_run(late, layout)


def test_a_damaged_plan_and_run_are_told_with_the_mend(layout):
    run(layout, videos("a"))
    layout.run.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_run(layout)
    layout.plan.write_text("half a row")
    with pytest.raises(DataError, match="line 1"):
        draft_run(videos("a"), layout, shard_size=2)


def test_an_empty_list_is_an_error(layout):
    with pytest.raises(ConfigError, match="empty"):
        draft_run([], layout, shard_size=2)


@pytest.mark.parametrize(
    ("log", "settings", "due"),
    [
        ([], {}, 0),
        ([Attempt(0, Status.TRANSIENT, 0)], {}, 1),
        ([Attempt(0, Status.TRANSIENT, 0), Attempt(1, Status.OK, 0)], {}, 1),
        ([Attempt(0, Status.TRANSIENT, 0), Attempt(1, Status.TRANSIENT, 0)], {"max_failed_runs": 2}, 1),
        ([Attempt(0, Status.TRANSIENT, 0), Attempt(1, Status.THROTTLED, 0)], {"max_failed_runs": 1}, 2),
        ([Attempt(0, Status.NOT_YET, 0, retry_after=100)], {"now": 99}, 0),
        ([Attempt(0, Status.NOT_YET, 0, retry_after=100)], {"now": 100}, 1),
        ([Attempt(0, Status.NOT_YET, 1000, retry_after=1100)], {"now": 99}, 1),  # the clock was ahead when it was noted
        ([Attempt(0, Status.UNAVAILABLE, 0)], {}, 0),
        ([Attempt(0, Status.UNAVAILABLE, 0)], {"retry_final": True}, 1),
        ([Attempt(0, Status.UNAVAILABLE, 0), Attempt(1, Status.OK, 0)], {"retry_final": True}, 1),
        ([Attempt(0, Status.NEEDS_AUTH, 0, credentials="a")], {"credentials": "a"}, 0),
        ([Attempt(0, Status.NEEDS_AUTH, 0, credentials="a")], {"credentials": "b"}, 1),
        ([Attempt(0, Status.PENDING, 0)], {}, 1),
    ],
)
def test_an_attempt_is_due_once_and_a_success_is_stable(log, settings, due):
    assert attempt_due(log, **settings) == due


def test_an_ending_counts_once_even_if_its_job_is_repeated(layout):
    (entry,) = videos("a")
    fail(layout, entry)
    fail(layout, entry)
    assert len(failures.read(layout.failures(entry.video_id))) == 1


def test_a_line_that_a_crash_cut_short_is_dropped_and_damage_is_told(layout):
    (entry,) = videos("a")
    fail(layout, entry)
    path = layout.failures(entry.video_id)
    with path.open("a") as file:
        file.write('{"number": 1, "sta')
    assert len(failures.read(path)) == 1
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1"):
        failures.read(path)
