"""`cuepoint list`: what channels and playlists name is appended to the pinned list, and nothing else changes in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Loopback, body, status
from typer.testing import CliRunner

from cuepoint.cli import app
from cuepoint.download.listing import Filters, Listed, append
from cuepoint.sources import read_list

FEED = "http://demo.example/watch/feed"
PINNED = "# mine\nhttp://demo.example/watch/b\told title\n\nhttp://demo.example/watch/z"


def feed(*items: tuple[str, str]) -> bytes:
    """A podcast feed, which yt-dlp's generic extractor reads as a playlist."""
    rows = "".join(f"<item><title>{title}</title><link>{link}</link></item>" for link, title in items)
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>f</title>{rows}</channel></rss>'.encode()


def link(name: str) -> str:
    return f"http://demo.example/watch/{name}"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Loopback]:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text('download: {request_interval: {"*": 0}}\n')
    Path("videos.txt").write_text(PINNED)
    with Loopback(tmp_path, []) as loopback:
        monkeypatch.setenv("CUEPOINT_PROXY", loopback.proxy_url)
        items = [(link("a"), "The a\tand  tabs"), (link("b"), "The b"), (link("c"), "The c"), (link("a"), "again")]
        loopback.always["watch/feed"] = body(feed(*items), "application/rss+xml")
        yield loopback


def run(*arguments: str):
    return CliRunner().invoke(app, ["list", *arguments])


def test_new_videos_are_appended_and_the_rest_of_the_list_stays_as_it_is(site):
    assert run(FEED).exit_code == 0
    text = Path("videos.txt").read_text()
    assert text == f"{PINNED}\n{link('a')}\tThe a and tabs\n{link('c')}\tThe c\n"
    assert run(FEED).exit_code == 0
    assert Path("videos.txt").read_text() == text
    assert len(read_list(Path("videos.txt"))) == 4


def test_a_dry_run_shows_the_lines_and_changes_nothing(site):
    result = run(FEED, "--dry-run", "--newest", "1")
    assert result.stdout.splitlines() == [f"{link('a')}\tThe a and tabs"]
    assert Path("videos.txt").read_text() == PINNED


def test_filters_are_applied_before_the_newest_are_counted(site):
    assert run(FEED, "--title", "THE [BC]", "--newest", "2").exit_code == 0
    assert Path("videos.txt").read_text() == f"{PINNED}\n{link('c')}\tThe c\n"


def test_sources_come_from_the_settings_and_one_that_fails_does_not_lose_the_others(site):
    site.always["watch/gone"] = status(404)
    Path("config.yaml").write_text(
        f'sources: ["{link("gone")}", "{FEED}"]\ndownload: {{request_interval: {{"*": 0}}}}\n'
    )
    result = run()
    assert result.exit_code == 1
    assert link("gone") in result.output
    assert link("c") in Path("videos.txt").read_text()


def test_a_list_that_names_local_files_or_scripts_adds_none_of_them(site, tmp_path):
    (tmp_path / "secret.mp3").write_text("x")
    items = [("secret.mp3", "1"), ("file:///etc/passwd", "2"), ("javascript:x", "3"), (link("c"), "The c")]
    site.always["watch/feed"] = body(feed(*items), "application/rss+xml")
    assert run(FEED).exit_code == 0
    assert Path("videos.txt").read_text() == f"{PINNED}\n{link('c')}\tThe c\n"


def test_without_a_source_the_command_says_what_is_missing(site):
    result = run()
    assert result.exit_code == 1
    assert "sources:" in result.output


def test_youtube_videos_are_listed_by_their_id(tmp_path):
    path = tmp_path / "videos.txt"
    url = "https://www.youtube.com/watch?v=-wQw4w9WgXc"
    append(path, [Listed("-wQw4w9WgXc", url, "# odd", 61.6), Listed("aQw4w9WgXcQ", url[:-11] + "aQw4w9WgXcQ")])
    assert path.read_text() == "-wQw4w9WgXc\t# odd\t62\naQw4w9WgXcQ\n"
    assert [entry.video_id for entry in read_list(path)] == ["-wQw4w9WgXc", "aQw4w9WgXcQ"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), ["short", "long", "unknown"]),
        (Filters(after="20240101"), ["long", "unknown"]),
        (Filters(before="20231231"), ["short", "unknown"]),
        (Filters(min_duration=60), ["long", "unknown"]),
        (Filters(max_duration=60), ["short", "unknown"]),
        (Filters(title="^S"), ["short"]),
    ],
)
def test_a_filter_drops_only_what_is_known_to_be_outside(filters, expected):
    videos = [
        Listed("short", "u", title="short", duration=30, date="20231231"),
        Listed("long", "u", title="long", duration=3000, date="20240101"),
        Listed("unknown", "u"),
    ]
    assert [video.video_id for video in videos if filters.wants(video)] == expected
