"""The list of videos: what a line may say, and what happens to one that means nothing."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuepoint.errors import ConfigError
from cuepoint.sources import identify, parse_list, read_list

ID = "dQw4w9WgXcQ"


@pytest.mark.parametrize(
    "written",
    [
        ID,
        f"https://youtu.be/{ID}?t=30",
        f"https://www.youtube.com/watch?v={ID}&list=PL0123456789",
        f"https://www.youtube.com/watch?list=PL0123456789&v={ID}",
        f"http://m.youtube.com/watch?v={ID}#t=3",
        f"https://music.youtube.com/watch?v={ID}",
        f"https://www.youtube.com/shorts/{ID}",
        f"https://www.youtube-nocookie.com/embed/{ID}?rel=0",
        f"HTTPS://YOUTU.BE/{ID}",
    ],
)
def test_a_url_and_its_id_are_the_same_video(written):
    assert identify(written) == (ID, f"https://www.youtube.com/watch?v={ID}")


def test_other_sources_get_readable_ids_that_never_look_like_youtube_ids():
    url_id, url = identify("https://media.example/talks/Opening%20Talk.mp4?x=1#t=3")
    assert url_id.startswith("opening-20talk-")
    assert url == "https://media.example/talks/Opening%20Talk.mp4?x=1"
    file_id, path = identify("clips/Ünïcode Name.opus")
    assert file_id.startswith("n-code-name-")
    assert path == "clips/Ünïcode Name.opus"
    assert identify("clips/a.opus") != identify("other/a.opus")


def test_an_id_may_start_with_a_dash():
    assert identify("-QW4w9WgXcQ")[0] == "-QW4w9WgXcQ"


def test_a_video_listed_twice_is_reported_and_kept_once(caplog):
    with caplog.at_level(logging.WARNING):
        entries = parse_list(f"# comment\n{ID}\ttitle\t61\n\nhttps://youtu.be/{ID} # again\na.mp3\n")
    assert [(entry.video_id == ID, entry.line) for entry in entries] == [(True, 2), (False, 5)]
    assert "line 4" in caplog.text
    assert "line 2" in caplog.text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("no-such-thing", "neither a YouTube video ID"),
        ("ftp://x.example/a.mp4", "kind that is not supported"),
        ("file:///etc/passwd", "kind that is not supported"),
        ("https://www.youtube.com/playlist?list=PL0123456789", "cuepoint list"),
        ("https://www.youtube.com/@channel", "cuepoint list"),
        ("http://[::1", "no valid URL"),
        ("http://a b.example/", "no valid URL"),
        ("a\x01b.mp3", "control characters"),
        ("x" * 5000 + ".mp3", "longer than"),
    ],
)
def test_a_line_that_is_no_video_is_named_with_what_would_be(line, told):
    with pytest.raises(ConfigError, match=r"videos\.txt, line 2: ") as error:
        parse_list(f"{ID}\n{line}\n")
    assert told in str(error.value)


def test_all_wrong_lines_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        parse_list("one\ntwo\n" + ID)
    assert "line 1" in str(error.value)
    assert "line 2" in str(error.value)


def test_an_unreadable_list_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_list(tmp_path / "missing.txt")
    (tmp_path / "latin1.txt").write_bytes("Käse.mp3".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_list(tmp_path / "latin1.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_list(tmp_path)


@given(st.text(max_size=300))
def test_any_text_gives_safe_ids_or_one_clear_error(text):
    try:
        entries = parse_list(text)
    except ConfigError:
        return
    for entry in entries:
        assert entry.video_id.isascii()
        assert not set(entry.video_id) & set("/\\. \t\n")
        assert 0 < len(entry.video_id) <= 60
