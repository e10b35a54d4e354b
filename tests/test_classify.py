"""The table of states against the words that yt-dlp and the sites behind it really use."""

import errno
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from yt_dlp.networking.common import Response
from yt_dlp.networking.exceptions import HTTPError, IncompleteRead, TransportError
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, UnavailableVideoError, UserNotLive

from cuepoint.download import classify as classify_module
from cuepoint.download.classify import classify, classify_text
from cuepoint.errors import EnvironmentFault
from cuepoint.states import Status

CURLY = "\N{RIGHT SINGLE QUOTATION MARK}"  # YouTube writes both kinds of apostrophes

MESSAGES = {
    Status.THROTTLED: [
        "Video unavailable. This content isn't available, try again later. The current session has been rate-limited "
        "by YouTube for up to an hour. It is recommended to use `-t sleep` to add a delay between video requests",
        "This content is not available, please try again later",
        "Sign in to confirm you're not a bot. Use --cookies-from-browser or --cookies for the authentication.",
        "YouTube is requiring a captcha challenge before playback",
        "Unable to download API page: HTTP Error 429: Too Many Requests (caused by <HTTPError 429: Too Many Requests>)",
        "Your IP is being rate-limited",
        "Our systems have detected unusual traffic from your computer network",
    ],
    Status.GEO_BLOCKED: [
        "Video unavailable. The uploader has not made this video available in your country",
        "The uploader has not made this video available in your country",
        "This video is not available from your location due to geo restriction",
        "This video is not available in your region",
        "Video unavailable. This video contains content from UMG, who has blocked it in your country on "
        "copyright grounds",
        "This video contains content from SME, who has blocked it in your country",
        "This content is geo-restricted",
        "Sorry, this video is only available in the United States",
    ],
    Status.NOT_YET: [
        "Premieres in 3 hours",
        "Premiere will begin shortly",
        "This live event will begin in 5 days.",
        "This live event will begin in a few moments.",
        "This live stream has not started yet",
        "The channel is not currently live",
        "This livestream is offline",
        "This video has not been released yet",
        "We're processing this video. Check back later.",
    ],
    Status.NEEDS_AUTH: [
        "Sign in to confirm your age. This video may be inappropriate for some users. Use --cookies-from-browser or "
        "--cookies for the authentication.",
        "Sign in to confirm your age",
        "This video is age-restricted and only available on YouTube",
        "This video may be inappropriate for some users.",
        "Join this channel to get access to members-only content like this video, and other exclusive perks.",
        "This video is available to this channel's members on level: Supporter (or any higher level).",
        "This video is only available for registered users. Use --username and --password or --netrc",
        "You need to log in to access this content",
        "Login required",
    ],
    Status.UNAVAILABLE: [
        "Private video. Sign in if you've been granted access to this video. Use --cookies-from-browser or --cookies",
        "This video is private",
        "Video unavailable. This video is private",
        "This video has been removed by the uploader",
        "Video unavailable. This video has been removed by the uploader",
        "This video has been removed for violating YouTube's Terms of Service",
        "This video is no longer available because the YouTube account associated with this video has been terminated.",
        "This video is no longer available due to a copyright claim by Toei Animation",
        "Video unavailable. This video is no longer available because the uploader has closed their YouTube account.",
        "This video isn't available anymore",
        "This video is DRM protected",
        "This video requires payment to watch.",
        "This movie requires payment to watch",
        "This video does not exist.",
        "The page could not be found",
    ],
    Status.TRANSIENT: [
        "Unable to download webpage: The read operation timed out",
        "Unable to download webpage: [Errno 104] Connection reset by peer",
        "unable to download video data: HTTP Error 403: Forbidden",
        "unable to download video data: HTTP Error 503: Service Unavailable",
        "Failed to extract any player response",
        "Unable to extract initial data",
        "Something nobody has ever seen",
        "fragment 3 not found, unable to continue",
        "Requested format is not available. Use --list-formats for a list of available formats",
    ],
}


@pytest.mark.parametrize(
    ("expected", "message"), [(expected, message) for expected, messages in MESSAGES.items() for message in messages]
)
def test_known_words_mean_what_they_mean(expected, message):
    curly = message.replace("'", CURLY)
    for decorated in (message, curly, f"[youtube] dQw4w9WgXcQ: {message}", message.upper()):
        verdict = classify_text(decorated)
        assert verdict.status is expected
        assert not verdict.bare


@pytest.mark.parametrize(
    "message",
    ["Video unavailable", "This video is unavailable", "This video is not available", "This video isn't available"],
)
def test_an_unavailable_without_a_reason_has_to_be_confirmed(message):
    verdict = classify_text(f"[youtube] dQw4w9WgXcQ: {message}")
    assert (verdict.status, verdict.bare) == (Status.UNAVAILABLE, True)
    assert classify_text(message.replace("'", CURLY)).bare


@pytest.mark.parametrize("name", ["private-login", "removed", "geo-restricted", "captcha"])
def test_the_words_in_an_id_or_url_decide_nothing(name):
    message = f"[generic] {name}: Unable to download webpage (http://example.org/{name}/not-found?x=drm): timed out"
    assert classify_text(message).status is Status.TRANSIENT


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Premieres in 3 hours", 3 * 3600),
        ("This live event will begin in 5 days.", 5 * 86400),
        ("This live event will begin in a few moments.", 60),
        ("Premieres in 20 minutes", 1200),
        ("This livestream is offline", 3600),
    ],
)
def test_a_coming_video_is_tried_again_when_it_is_due(message, seconds):
    assert classify_text(message).retry_after == seconds


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as an except block sees it."""
    try:
        try:
            if cause is not None:
                raise cause
        finally:
            raise error
    except BaseException as caught:
        return caught


def as_yt_dlp_reports(error: Exception) -> DownloadError:
    """What yt-dlp's API raises for an error inside of it: the original is in `exc_info` alone."""
    raised(error)
    return DownloadError(f"ERROR: \x1b[0;31m{error}\x1b[0m", (type(error), error, error.__traceback__))


def http_error(status: int, url: str = "http://example.org/watch", **headers: str) -> HTTPError:
    return HTTPError(Response(None, url, headers, status=status))


def test_error_classes_decide_before_words():
    verdict = classify(as_yt_dlp_reports(GeoRestrictedError("Nothing to see", countries=["DE", "FR"])))
    assert verdict.status is Status.GEO_BLOCKED
    assert "DE, FR" in verdict.message
    assert classify(as_yt_dlp_reports(UserNotLive())).status is Status.NOT_YET


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, Status.NEEDS_AUTH),
        (403, Status.TRANSIENT),
        (404, Status.UNAVAILABLE),
        (410, Status.UNAVAILABLE),
        (429, Status.THROTTLED),
        (451, Status.GEO_BLOCKED),
        (500, Status.TRANSIENT),
        (503, Status.TRANSIENT),
    ],
)
def test_http_statuses_decide_where_words_say_nothing(status, expected):
    error = ExtractorError("Unable to download webpage", cause=http_error(status))
    verdict = classify(as_yt_dlp_reports(error), "http://example.org/watch")
    assert (verdict.status, verdict.bare) == (expected, False)


def test_an_extractors_words_say_more_than_the_status_that_it_met():
    error = raised(ExtractorError("This video is private", expected=True), http_error(404))
    assert not classify(as_yt_dlp_reports(error)).bare
    error = raised(ExtractorError("Sign in to confirm your age", expected=True), http_error(403))
    assert classify(as_yt_dlp_reports(error)).status is Status.NEEDS_AUTH


def test_a_missing_file_behind_a_page_that_exists_is_confirmed():
    assert classify(
        as_yt_dlp_reports(http_error(404, "http://cdn.example.org/a.webm")), "http://example.org/watch"
    ).bare


def test_retry_after_is_read_as_seconds_and_as_a_date():
    assert classify(http_error(429, **{"Retry-After": "17"})).retry_after == 17
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert classify(http_error(503, **{"Retry-After": date})).retry_after == pytest.approx(100, abs=30)
    assert classify(http_error(429, **{"Retry-After": "soon"})).retry_after is None


@pytest.mark.parametrize("error", [TransportError("timed out"), IncompleteRead(3, 5), TimeoutError(), KeyError("x")])
def test_what_the_network_does_passes(error):
    assert classify(as_yt_dlp_reports(error)).status is Status.TRANSIENT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG])
def test_a_fault_of_this_machine_blames_no_video(number):
    local = OSError(number, "no", "/results/x")
    for error in (local, as_yt_dlp_reports(local), raised(UnavailableVideoError(local), local)):
        with pytest.raises(EnvironmentFault, match="cuepoint doctor"):
            classify(error)


def test_youtube_without_a_javascript_runtime_is_a_fault_of_this_machine(monkeypatch):
    """The list of runtimes is replaced: whether this machine has one is not the test's to decide."""
    words = "ERROR: [youtube] dQw4w9WgXcQ: Requested format is not available. Use --list-formats"
    monkeypatch.setattr(classify_module, "javascript_runtimes", lambda: [])
    with pytest.raises(EnvironmentFault, match="deno"):
        classify(DownloadError(words))
    assert classify(DownloadError(words.replace("[youtube]", "[vimeo]"))).status is Status.TRANSIENT
    monkeypatch.setattr(classify_module, "javascript_runtimes", lambda: ["deno 2.5.0"])
    assert classify(DownloadError(words)).status is Status.TRANSIENT


def test_messages_are_one_clean_line():
    error = ExtractorError("Something\nstrange; please report this issue on  https://github.com/yt-dlp", expected=True)
    assert classify(as_yt_dlp_reports(error)).message == "Something strange"
