"""The report says what happened, to people with a browser and no network."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import browser
from made import AUDIO, MODEL, START, make_results
from pytest import approx

from cuepoint.ledger import LEDGER
from cuepoint.report import write_report
from cuepoint.report.gather import gather
from cuepoint.settings import load_settings
from cuepoint.tables import embeddings_schema, write_table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("made") / "results")


@pytest.fixture(scope="module")
def page():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with browser(program) as page:
        yield page


def test_the_report_tells_what_the_files_hold(results):
    layout, settings, run = results
    report = gather(layout, settings, run)
    assert dict(report.statuses) == {"ok": 10, "unavailable": 1, "empty": 1}
    assert report.audio == 10 * AUDIO
    assert (report.segments, dict(report.flags)) == (60, {"repetition": 10})
    (model,) = report.models
    assert (model.chunks, model.longest, model.limit, model.truncated) == (20, 101, 256, 0)
    assert model.texts_per_second == approx(512 / 592)
    assert report.stretch == (START + 2, approx(START + 80 + 3 * 660 + 30))


def test_tokens_that_a_model_did_not_read_are_counted(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    for path in layout.results.glob("embeddings/*/*.parquet"):
        write_table(path, pq.read_table(path), embeddings_schema(2), settings={}, max_tokens=100)
    assert gather(layout, settings, run).models[0].truncated == 10  # a token of each second chunk, of 101


def test_stages_are_measured_over_the_time_in_which_they_worked(results):
    layout, settings, run = results
    rows = {row.stage: row for row in gather(layout, settings, run).stages}
    assert rows["transcribe"].measure.active == approx(3 * 60)
    assert rows["embed"].compute == approx(3 * 592)
    assert rows["embed"].waiting == approx(3 * 8)
    assert rows["embed"].cores == approx(1800 / 1920)
    assert rows["download"].waiting == approx(12 * 2)
    assert rows["embed"].measure.gpu.mean == approx(0.12)
    assert gather(layout, settings, run).verdict.stage == "embed"


def test_the_curves_hold_the_busy_seconds_and_the_queues(results):
    layout, settings, run = results
    report = gather(layout, settings, run)
    curves = {curve.name: curve for curve in [*report.use, *report.queues]}
    length = report.stretch[1] - report.stretch[0]
    assert curves["GPU busy"].values.mean() * length == approx(0.93 * 180 + 0.12 * 1800, rel=0.01)
    assert curves["cores busy"].values.mean() * length == approx(180 + 1800 + 30, rel=0.01)
    assert curves["before transcribe"].values.max() == 8  # the second and third shard, while the first is embedded
    assert curves["before embed"].values.max() == 0
    assert min(curve.values.min() for curve in curves.values()) >= 0


def test_prices_and_hours_are_those_of_1000_hours_of_audio(results):
    layout, _, run = results
    settings = load_settings({"results": str(layout.results), "report": {"gpu_hour_price": 2.0}})
    costs = gather(layout, settings, run).costs
    audio = 10 * AUDIO
    assert costs.gpu_hours == approx(1000 * (180 + 1800) / audio)
    assert costs.price == approx(2 * costs.gpu_hours)


def test_a_report_of_a_run_that_has_done_nothing_can_be_written(tmp_path):
    layout, settings, run = make_results(tmp_path / "results", videos=3)
    for folder in ("audio", "transcripts", "videos", "embeddings", "telemetry", "report"):
        shutil.rmtree(layout.results / folder)
    write_report(layout, settings, run)
    assert "Nothing has been measured yet" in (layout.report / "report.html").read_text()


def test_a_damaged_file_of_the_run_does_not_take_the_report_with_it(tmp_path):
    layout, settings, run = make_results(tmp_path / "results")
    layout.transcripts("00001").write_bytes(b"PAR1 no table")
    next((layout.telemetry / "transcribe").iterdir()).write_bytes(b"")
    next(layout.results.glob("audio/*/*.json")).write_text("{")
    assert gather(layout, settings, run).segments == 36


def hostile_results(folder):
    """Results with a video whose title tries to be a script."""
    layout, settings, run = make_results(folder)
    title = "</script><script>document.title='stolen'</script><img src=https://example.org/x onerror=alert(1)> 標題"
    rows = pq.read_table(layout.report / "ledger.parquet").to_pylist()
    rows[0]["title"] = title
    pq.write_table(pa.Table.from_pylist(rows, schema=LEDGER), layout.report / "ledger.parquet")
    write_report(layout, settings, run)
    return layout, title


@pytest.mark.browser
def test_the_page_renders_and_sorts_without_errors_and_without_a_network(tmp_path, page):
    layout, title = hostile_results(tmp_path / "results")
    page.open(layout.report / "report.html")
    assert page.evaluate("document.title") == "Cuepoint report"
    assert "embed is the bottleneck" in page.evaluate("document.getElementById('verdict').textContent")
    assert page.evaluate("document.querySelectorAll('svg path.curve').length") == 5
    column = "[...document.querySelectorAll('#ledger tbody tr')].map(row => row.cells[{}].textContent)"
    assert title in page.evaluate(column.format(1))
    for i, name in enumerate(("video", "title", "status")):
        click = f"document.querySelectorAll('#ledger th button')[{i}].click()"
        page.evaluate(click)
        up = page.evaluate(column.format(i))
        page.evaluate(click)
        assert page.evaluate(column.format(i)) == up[::-1] or name == "status"
        assert up == page.evaluate(f"{up!r}.sort((a, b) => a.localeCompare(b))")
    flagged = "document.querySelectorAll('#ledger th button')[8].click()"
    page.evaluate(flagged)
    numbers = [int(text or 0) for text in page.evaluate(column.format(8))]
    assert numbers == sorted(numbers)
    assert page.messages == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone(tmp_path, page, scheme):
    layout, _ = hostile_results(tmp_path / "results")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.command("Emulation.setEmulatedMedia", features=features)
    page.open(layout.report / "report.html", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    cut = "[...document.querySelectorAll('#ledger td, p')].filter(cell => cell.scrollWidth > cell.clientWidth + 1)"
    assert page.evaluate(f"{cut}.length") == 0
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == {
            "light": "rgb(255, 255, 255)",
            "dark": "rgb(20, 24, 29)",
        }[scheme]
    )


@pytest.mark.browser
def test_a_ledger_of_twelve_thousand_videos_is_cut_with_the_problems_first(tmp_path, page):
    layout, settings, run = make_results(tmp_path / "results")
    rows = pq.read_table(layout.report / "ledger.parquet").to_pylist()
    many = [row | {"video_id": f"{row['video_id']}-{i}"} for i in range(1000) for row in rows]
    pq.write_table(pa.Table.from_pylist(many, schema=LEDGER), layout.report / "ledger.parquet")
    write_report(layout, settings, run)
    path = layout.report / "report.html"
    assert path.stat().st_size < 2_000_000
    page.open(path)
    assert page.evaluate("document.querySelectorAll('#ledger tbody tr').length") == settings.report.ledger_rows
    assert page.evaluate("document.querySelector('#ledger tbody tr').cells[2].textContent") == "unavailable"
    assert "2,000 of 12,000 videos" in page.evaluate("document.body.textContent")


def test_the_model_that_embedded_is_named(results):
    layout, settings, run = results
    assert f"embed is the bottleneck with {MODEL}" in gather(layout, settings, run).verdict.sentence
