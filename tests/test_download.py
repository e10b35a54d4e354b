"""The download stage against a site that misbehaves: every video ends in a state that is true."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loopback import (
    Loopback,
    body,
    cut,
    endless,
    hang_up,
    make_clip,
    make_mute_video,
    packet_hash,
    redirect,
    stall,
    status,
    trickle,
    video,
    watch,
    without_ranges,
    wrong_length,
)

from cuepoint.download import download, tries
from cuepoint.download.classify import Ended, Verdict
from cuepoint.download.fetch import Fetcher
from cuepoint.download.limiter import Limiter
from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import DownloadSettings
from cuepoint.states import Status

EAGER = DownloadSettings(
    video_interval={"*": 0},
    request_interval={"*": 0},
    backoff=0,
    cool_down=0.05,
    socket_timeout=1,
    stall_seconds=1,
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "long.opus", 30, seed=1)
    make_clip(folder / "other.opus", 3, seed=2)
    make_clip(folder / "aac.m4a", 3, seed=3, codec="aac")
    make_clip(folder / "short.opus", 20, seed=1)
    make_mute_video(folder / "mute.mp4")
    (folder / "liar.opus").write_bytes((folder / "aac.m4a").read_bytes())
    (folder / "list.opus").write_text(f"ffconcat version 1.0\nfile '{folder / 'other.opus'}'\n")
    (folder / "playlist.opus").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{folder / 'other.opus'}\n")
    return folder


VIDEOS = [
    video("long", "long.opus", 30.0),
    video("other", "other.opus", 3.0),
    video("unknown-length", "other.opus", None),
    video("aac", "aac.m4a", 3.0),
    video("cut-short", "short.opus", 30.0),
    video("mute", "mute.mp4", 1.0),
    video("liar", "liar.opus", 3.0),
    video("list", "list.opus", None),
    video("playlist", "playlist.opus", None),
    video("odd", "other.opus", 3.0, title="a\x00b\x1b[31m \ud800 <script>\n日本語 " + "x" * 5000, channel="../../etc"),
]


@pytest.fixture
def site(clips, monkeypatch) -> Iterator[Loopback]:
    with Loopback(clips, VIDEOS) as loopback:
        monkeypatch.setenv("CUEPOINT_PROXY", loopback.proxy_url)
        yield loopback


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout(tmp_path / "results")


def get(name: str, layout: Layout, settings: DownloadSettings = EAGER, attempt: int = 0) -> Receipt:
    return download(name, watch(name), layout, settings, attempt)


@pytest.mark.parametrize(("name", "file", "codec"), [("other", "other.opus", "opus"), ("aac", "aac.m4a", "aac")])
def test_the_audio_is_the_source_stream_packet_for_packet(site, clips, layout, name, file, codec):
    receipt = get(name, layout)
    assert receipt.status is Status.OK
    assert packet_hash(layout.audio(name)) == receipt.audio_hash == packet_hash(clips / file)
    assert receipt.title == f"The video {name}"
    assert (receipt.channel, receipt.upload_date, receipt.codec) == ("Loopback", "20240229", codec)
    assert receipt.duration == pytest.approx(3.0, abs=0.1)
    assert receipt.bytes == layout.audio(name).stat().st_size
    assert not layout.partial(name).exists()


def test_the_same_stream_gives_the_same_file(site, layout, tmp_path):
    again = Layout(tmp_path / "again")
    assert get("other", layout).sha256 == get("other", again).sha256


HEALING = {
    "429": ("watch/long", [status(429, Retry_After="0")]),
    "429 on the file": ("clips/long.opus", [status(429)]),
    "503 with a date": ("watch/long", [status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")]),
    "500": ("watch/long", [status(500), status(502)]),
    "500 on the file": ("clips/long.opus", [status(500)]),
    "403 on the file": ("clips/long.opus", [status(403)]),
    "403 in mid-file": ("clips/long.opus", [cut(0.5), status(403)]),
    "404 on the file, once": ("clips/long.opus", [status(404)]),
    "reset": ("clips/long.opus", [cut(0.5, rudely=True)]),
    "reset before the page": ("watch/long", [hang_up]),
    "early end": ("clips/long.opus", [cut(0.3), cut(0.6)]),
    "stall": ("clips/long.opus", [stall(0.5)]),
    "trickle": ("clips/long.opus", [trickle]),
    "length too large": ("clips/long.opus", [wrong_length(500)]),
    "length too small": ("clips/long.opus", [wrong_length(-60_000)]),
    "range ignored": ("clips/long.opus", [cut(0.5), without_ranges]),
    "range refused": ("clips/long.opus", [cut(0.5), status(416)]),
    "HTML in place of audio": ("clips/long.opus", [body(b"<html>come back later</html>")]),
    "zero bytes": ("clips/long.opus", [body(b"", "audio/ogg")]),
    "redirect loop": ("clips/long.opus", [redirect("http://demo.example/clips/long.opus")] * 30),
    "a page without a video, once": ("watch/long", [body(b"<html><body>hello</body></html>")]),
}


@pytest.mark.parametrize("fault", HEALING)
def test_a_fault_that_passes_costs_nothing_but_time(site, clips, layout, fault):
    thing, faults = HEALING[fault]
    site.queue(thing, *faults)
    receipt = get("long", layout)
    assert receipt.status is Status.OK, receipt.error
    assert receipt.audio_hash == packet_hash(clips / "long.opus")
    assert receipt.attempts == (1 if "429" in fault or "503" in fault else receipt.attempts)
    assert len(site.requests(thing)) > 1


LASTING = {
    "404": ("long", "watch/long", status(404), Status.UNAVAILABLE),
    "410": ("long", "watch/long", status(410), Status.UNAVAILABLE),
    "401": ("long", "watch/long", status(401), Status.NEEDS_AUTH),
    "451": ("long", "watch/long", status(451), Status.GEO_BLOCKED),
    "403": ("long", "watch/long", status(403), Status.TRANSIENT),
    "500": ("long", "watch/long", status(500), Status.TRANSIENT),
    "no video": ("long", "watch/long", body(b"<html><body>hello</body></html>"), Status.UNAVAILABLE),
    "endless page": ("long", "watch/long", endless("text/html"), Status.UNAVAILABLE),
    "endless file": ("long", "clips/long.opus", endless("audio/ogg"), Status.UNAVAILABLE),
    "HTML in place of audio": ("long", "clips/long.opus", body(b"<html>hello</html>"), Status.TRANSIENT),
    "damaged media": ("long", "clips/long.opus", body(b"OggS\0\xff" * 99, "audio/ogg"), Status.UNAVAILABLE),
    "zero bytes": ("long", "clips/long.opus", body(b"", "audio/ogg"), Status.TRANSIENT),
    "to a local file": ("long", "clips/long.opus", redirect("file:///etc/passwd"), Status.TRANSIENT),
    "page to a local file": ("long", "watch/long", redirect("file:///etc/passwd"), Status.TRANSIENT),
    "shorter than it says": ("cut-short", None, None, Status.TRANSIENT),
    "pictures only": ("mute", None, None, Status.EMPTY),
    "a list that names a local file": ("list", None, None, Status.TRANSIENT),
    "a playlist that names a local file": ("playlist", None, None, Status.TRANSIENT),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_ends_in_the_state_that_is_true(site, layout, fault):
    name, thing, answer, expected = LASTING[fault]
    if thing:
        site.always[thing] = answer
    receipt = get(name, layout, EAGER.model_copy(update={"max_bytes": 2_000_000}))
    assert receipt.status is expected, receipt.error
    assert receipt.error
    assert receipt.sha256 is None
    assert not layout.audio(name).exists()
    assert "root:" not in receipt.model_dump_json()
    if expected.final:
        assert not layout.partial(name).exists()


def test_a_bare_unavailable_is_confirmed_and_a_reason_is_not(site, layout):
    site.always["watch/long"] = body(b"<html><body>hello</body></html>")
    site.always["watch/other"] = status(404)
    assert get("long", layout).attempts == 2
    assert get("other", layout).attempts == 1


def test_a_container_that_lies_about_itself_is_read_for_what_it_is(site, clips, layout):
    receipt = get("liar", layout)
    assert (receipt.status, receipt.codec) == (Status.OK, "aac")
    assert receipt.audio_hash == packet_hash(clips / "aac.m4a")


def test_titles_and_names_are_data(site, layout):
    receipt = get("odd", layout)
    assert receipt.status is Status.OK
    assert receipt.title.startswith("a b [31m <script> 日本語 xxx")
    assert len(receipt.title) == 1000
    assert receipt.channel == "../../etc"
    files = {path for path in layout.results.rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".mka", ".json", ".lock"}


def test_a_playlist_that_contains_itself_is_no_video_and_no_loop(site, layout):
    feed = (
        '<?xml version="1.0"?><rss version="2.0"><channel><title>round</title>'
        + f"<item><title>x</title><link>{watch('long')}</link></item>" * 50
        + "</channel></rss>"
    )
    site.always["watch/long"] = body(feed.encode(), "application/rss+xml")
    receipt = get("long", layout)
    assert receipt.status is Status.UNAVAILABLE
    assert "cuepoint list" in receipt.error
    assert len(site.asked) < 5


def test_a_partial_file_is_continued_and_not_fetched_again(site, clips, layout):
    site.queue("clips/long.opus", cut(0.6))
    receipt = get("long", layout)
    first, second = site.requests("clips/long.opus")
    assert "Range" not in first.headers
    assert int(second.headers["Range"].removeprefix("bytes=").rstrip("-")) > 16_000
    assert receipt.audio_hash == packet_hash(clips / "long.opus")


ONE_DOWNLOAD = """
import sys
from pathlib import Path
from cuepoint.download import download
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings
name, url, results, settings = sys.argv[1:5]
receipt = download(name, url, Layout(Path(results)), DownloadSettings.model_validate_json(settings))
print(receipt.model_dump_json())
print(sorted({"yt_dlp", "av"} & set(sys.modules)), file=sys.stderr)
"""


def start(name: str, layout: Layout, settings: DownloadSettings = EAGER, **kwargs) -> subprocess.Popen:
    """A download in a process of its own."""
    arguments = [name, watch(name), str(layout.results), settings.model_dump_json()]
    return subprocess.Popen(
        [sys.executable, "-c", ONE_DOWNLOAD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_after_kill_9_the_next_run_goes_on_where_the_file_ends(site, clips, layout):
    patient = EAGER.model_copy(update={"socket_timeout": 60, "stall_seconds": 60})
    site.queue("clips/long.opus", stall(0.6))
    process = start("long", layout, patient)
    while not any(path.stat().st_size > 16_000 for path in layout.partial("long").glob("*.part")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    receipt = get("long", layout, patient)
    assert "Range" in site.requests("clips/long.opus")[-1].headers
    assert receipt.audio_hash == packet_hash(clips / "long.opus")


def test_a_kill_between_the_last_byte_and_the_file_s_name_costs_no_video(site, clips, layout):
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        get("long", layout)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = layout.partial("long").glob("*.part")
    assert left.stat().st_size == (clips / "long.opus").stat().st_size
    receipt = get("long", layout)
    assert (receipt.status, receipt.attempts) == (Status.OK, 1)
    assert receipt.audio_hash == packet_hash(clips / "long.opus")


def test_a_repeated_job_restores_its_receipt_without_the_network_and_without_yt_dlp(site, layout):
    first = get("other", layout)
    failed = download("gone", watch("gone"), layout, EAGER)
    asked = len(site.asked)
    assert get("other", layout) == first
    assert download("gone", watch("gone"), layout, EAGER) == failed
    process = start("gone", layout)
    out, err = process.communicate()
    assert Receipt.model_validate_json(out) == failed
    assert err.strip() == "[]"
    assert len(site.asked) == asked


def test_a_lost_or_damaged_audio_file_or_cache_entry_is_downloaded_again(site, layout):
    first = get("other", layout)
    audio = layout.audio("other")
    audio.write_bytes(b"damaged")
    assert get("other", layout).sha256 == first.sha256
    audio.unlink()
    assert get("other", layout).sha256 == first.sha256
    (entry,) = layout.cache("receipt", "other", "x", "").parent.glob("*.json")
    entry.write_text("{")
    assert get("other", layout).sha256 == first.sha256
    assert len(site.requests("clips/other.opus")) == 4


def test_another_attempt_or_a_changed_setting_asks_again_and_politeness_does_not(site, layout):
    get("gone", layout)
    get("gone", layout, EAGER.model_copy(update={"parallel": 9, "cool_down": 9.0}))
    assert len(site.asked) == 1
    get("gone", layout, attempt=1)
    get("gone", layout, EAGER.model_copy(update={"max_bytes": 10**6}))
    assert len(site.asked) == 3


def test_a_throttled_session_never_loses_a_video(site, clips, layout):
    """20 refusals in a row, met by six downloads at once: all end well and no attempt is charged."""
    names = ["long", "other", "unknown-length", "aac", "liar", "odd"]
    refusals = iter(range(20))

    def refuse_for_a_while(handler, thing):
        if next(refusals, None) is None:
            type(handler).__mro__[1].answer(handler, *thing.split("/"))
        else:
            status(429)(handler, thing)

    for name in names:
        site.always[f"watch/{name}"] = refuse_for_a_while
    settings = EAGER.model_copy(update={"cool_down": 0.001, "max_cool_down": 0.01})
    with ThreadPoolExecutor(len(names)) as pool:
        receipts = list(pool.map(lambda name: get(name, layout, settings), names))
    assert [receipt.status for receipt in receipts] == [Status.OK] * len(names)
    assert [receipt.attempts for receipt in receipts] == [1] * len(names)


def test_when_the_budget_is_spent_the_rest_waits_for_the_next_run_and_asks_nothing(site, layout):
    for name in ("long", "other", "aac"):
        site.always[f"watch/{name}"] = status(429)
    settings = EAGER.model_copy(update={"throttle_budget": 0.5, "cool_down": 0.1})
    receipt = get("long", layout, settings)
    assert (receipt.status, receipt.attempts) == (Status.THROTTLED, 0)
    asked = len(site.asked)
    assert get("other", layout, settings).status is Status.THROTTLED
    assert get("aac", layout, settings).status is Status.THROTTLED
    assert len(site.asked) == asked

    site.always.clear()
    layout.run.write_text("{}")  # what the start of a run writes
    assert get("other", layout, settings, attempt=1).status is Status.OK
    assert get("aac", layout, settings, attempt=1).status is Status.OK


def test_one_video_that_is_refused_while_others_are_answered_ends_as_throttled(site, layout):
    site.always["watch/long"] = status(429)
    settings = EAGER.model_copy(update={"throttle_budget": 3600, "max_cool_down": 0.05})
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(get, "long", layout, settings)
        for number in range(100):  # of other videos, answered meanwhile
            if refused.done():
                break
            assert get("other", layout, settings, attempt=number).status is Status.OK
    assert refused.result().status is Status.THROTTLED
    assert refused.result().attempts == 0


def test_local_files_are_taken_as_they_are(clips, layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-x.opus").write_bytes((clips / "other.opus").read_bytes())
    receipt = download("x", "-x.opus", layout, EAGER)
    assert (receipt.status, receipt.title) == (Status.OK, "-x")
    assert receipt.audio_hash == packet_hash(clips / "other.opus")
    Path("-x.opus").write_bytes((clips / "short.opus").read_bytes())
    assert download("x", "-x.opus", layout, EAGER).audio_hash == packet_hash(clips / "short.opus")


@pytest.mark.parametrize(
    ("file", "expected", "words"),
    [
        ("nowhere.opus", Status.UNAVAILABLE, "nowhere.opus"),
        ("list.opus", Status.UNAVAILABLE, "no media file"),
        ("mute.mp4", Status.EMPTY, "no audio track"),
    ],
)
def test_a_local_file_that_gives_no_audio_says_why(clips, layout, file, expected, words):
    receipt = download("x", str(clips / file), layout, EAGER)
    assert receipt.status is expected
    assert words in receipt.error
    assert not layout.audio("x").exists()


def test_a_full_disk_blames_the_machine_and_no_video(site, clips, layout):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same way."""
    process = start("long", layout, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)))
    _, err = process.communicate()
    assert process.returncode == 1
    assert "EnvironmentFault" in err
    assert "cuepoint doctor" in err
    assert not layout.audio("long").parent.exists()


def test_a_proxy_that_is_not_there_blames_the_machine(layout, monkeypatch):
    monkeypatch.setenv("CUEPOINT_PROXY", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="CUEPOINT_PROXY") as caught:
        get("long", layout)
    assert "hunter2" not in str(caught.value)


def test_a_cookie_file_that_is_not_there_blames_the_machine(site, layout, tmp_path):
    with pytest.raises(EnvironmentFault, match=r"nothing\.txt"):
        get("other", layout, EAGER.model_copy(update={"cookies": tmp_path / "nothing.txt"}))


def test_secrets_are_used_and_never_written(site, layout, tmp_path, monkeypatch, caplog):
    cookies = tmp_path / "cookies.txt"
    jar = "# Netscape HTTP Cookie File\n.demo.example\tTRUE\t/\tFALSE\t4102444800\tsession\tpl4nted-c00kie\n"
    cookies.write_text(jar)
    monkeypatch.setenv("CUEPOINT_COOKIES", str(cookies))
    monkeypatch.setenv("CUEPOINT_PROXY", site.proxy_url.replace("//", "//user:pl4nted-pr0xy@"))
    caplog.set_level("DEBUG")
    site.always["watch/aac"] = status(500)
    site.queue("watch/other", status(429))
    get("other", layout)
    get("aac", layout)
    assert "pl4nted-c00kie" in site.requests("watch/other")[0].headers["Cookie"]
    assert cookies.read_text() == jar
    written = [path.read_bytes() for path in layout.results.rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not any(b"pl4nted" in content for content in written)
    assert "pl4nted" not in caplog.text


def track(format_id: str, abr: float | None, rank: int | None = None, **facts) -> dict:
    return {
        **{"format_id": format_id, "url": f"http://demo.example/{format_id}", "ext": "webm", "abr": abr},
        **{"vcodec": "none", "acodec": "opus", "language_preference": rank, **facts},
    }


CHOICES = {
    "the smallest at or above 48 kbit/s": ([track("a", 130), track("b", 70), track("c", 50)], "c"),
    "not a tiny one, though it is nearer": ([track("tiny", 32), track("b", 70)], "b"),
    "the best of tiny ones": ([track("a", 16), track("b", 32)], "b"),
    "the original before a smaller dub": ([track("dub", 48, -1), track("original", 130, 10)], "original"),
    "a tiny original before a dub": ([track("dub", 48, -1), track("original", 32, 10)], "original"),
    "sound alone before pictures": ([track("film", 50, vcodec="vp9"), track("sound", 130)], "sound"),
    "pictures with sound if need be": ([track("film", 50, vcodec="vp9"), track("mute", None, acodec="none")], "film"),
    "a track that says nothing": ([track("a", None)], "a"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice_of_audio(layout, case):
    """By yt-dlp's own selection; nothing is asked of the network."""
    tracks, expected = CHOICES[case]
    info = {"id": "x", "title": "x", "extractor": "test", "extractor_key": "Test", "formats": tracks}
    fetcher = Fetcher(layout.partial("x"), layout, EAGER, Limiter(layout, EAGER))
    chosen = fetcher.process_ie_result({**info, "webpage_url": watch("x")}, download=False)
    assert chosen["format_id"] == expected


@pytest.mark.parametrize(
    ("facts", "wait"),
    [
        ({"live_status": "is_upcoming", "release_timestamp": 4_000_000_000}, 10**8),
        ({"live_status": "is_upcoming"}, 3000),
        ({"live_status": "is_live"}, 3000),
        ({"is_live": True}, 3000),
        ({"live_status": "post_live"}, 3000),
    ],
)
def test_what_is_not_over_yet_waits_for_its_time(layout, facts, wait):
    info = {"id": "x", "title": "x", "extractor": "test", "extractor_key": "Test", "formats": [track("a", 50)]}
    fetcher = Fetcher(layout.partial("x"), layout, EAGER, Limiter(layout, EAGER))
    with pytest.raises(Ended) as ended:
        fetcher.process_ie_result({**info, **facts, "webpage_url": watch("x")}, download=False)
    assert ended.value.verdict.status is Status.NOT_YET
    assert ended.value.verdict.retry_after > wait


@pytest.mark.parametrize("wait", [1e9, 1e18, 1e300])
def test_no_page_puts_a_video_off_for_longer_than_a_year(wait):
    end = tries._end(tries.Try(Verdict(Status.NOT_YET, "it has not started yet", wait)), tries=1)
    assert 365 * 86_400 < end["retry_after"] - time.time() < 367 * 86_400
