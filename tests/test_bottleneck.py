"""What holds a run back is named as someone who reads the figures would name it."""

import pytest

from cuepoint.bottleneck import Kind, Share, StageMeasure, name_bottleneck

HOUR = 3600.0


def stage(name, active, videos=100, **figures):
    return StageMeasure(name, active, videos, audio=1800.0 * videos, **figures)


def well_fed(**changed):
    """An hour in which no stage stands out, but for the ones that a test changes."""
    usual = {
        "download": stage("download", 1000, paced=0.1),
        "transcribe": stage("transcribe", 1200, gpu=Share(0.7, 0.85, 0.95)),
        "embed": stage("embed", 300, gpu=Share(0.5, 0.8, 0.9), model="all-MiniLM-L6-v2", texts=6000, encoding=250),
        "load": stage("load", 60),
    }
    return list((usual | changed).values())


def test_the_old_scripts_log_is_read_as_its_analysis_read_it():
    """The figures of DESIGN.md, "Why it exists": 8 videos/h, 0.8 texts/s, 37 s a batch, GPU idle 75-99 %.

    The log does not say how many batches a video has: eight videos an hour leave room for twelve. 24 downloads waited,
    one video was in ASR, none in the database.
    """
    batches = 8 * 12
    verdict = name_bottleneck(
        [
            stage("download", HOUR, videos=33),
            stage("transcribe", HOUR - 37 * batches, videos=9, gpu=Share(0.01, 0.08, 0.26), queue=24.0),
            stage(
                "embed",
                active=37.0 * batches,
                videos=8,
                gpu=Share(0.01, 0.08, 0.26),
                model="gte-Qwen2-1.5B-instruct",
                texts=32 * batches,
                encoding=37.0 * batches,
            ),
        ]
    )
    assert (verdict.kind, verdict.stage) == (Kind.EMBEDDING, "embed")
    assert "embed is the bottleneck with gte-Qwen2-1.5B-instruct" in verdict.sentence
    assert "37 s a batch of 32 (0.86 texts/s)" in verdict.sentence
    assert "GPU 1-26 % busy" in verdict.sentence
    assert "24 videos waited" in verdict.sentence
    assert "embedding.use: [all-MiniLM-L6-v2] would take 0.3 s to 7.9 s a batch here" in verdict.sentence


def test_shards_too_small_for_their_model_are_named_as_such():
    verdict = name_bottleneck(well_fed(embed=stage("embed", 3000, model="bge-small-en-v1.5", loading=0.8)))
    assert verdict.kind is Kind.EMBEDDING
    assert "80 % of its time went into loading the model; raise shard_size" in verdict.sentence


@pytest.mark.parametrize(
    ("kind", "measures", "setting"),
    [
        (Kind.DOWNLOAD, {"download": stage("download", 3000, paced=0.1)}, "download.parallel"),
        (Kind.PACED, {"download": stage("download", 3000, paced=0.8)}, "download.video_interval"),
        (Kind.THROTTLED, {"download": stage("download", 3000, paced=0.4, throttled=0.4)}, "download.video_interval"),
        (Kind.ASR, {"transcribe": stage("transcribe", 3000, gpu=Share(0.8, 0.95, 1.0))}, "gpu=N"),
        (Kind.ASR, {"transcribe": stage("transcribe", 3000, gpu=Share(0.1, 0.3, 0.5))}, "transcribe.batch_size"),
        (Kind.ASR, {"transcribe": stage("transcribe", 3000)}, "transcribe.model"),
        (
            Kind.CPU_STARVED,
            {"transcribe": stage("transcribe", 3000, gpu=Share(0.1, 0.3, 0.5), starved=0.6)},
            "--cores",
        ),
        (
            Kind.EMBEDDING,
            {"embed": stage("embed", 3000, model="all-MiniLM-L6-v2", texts=6000, encoding=2900)},
            "dtype int8",
        ),
        (Kind.LOAD, {"load": stage("load", 3000)}, "qdrant.batch_size"),
    ],
)
def test_each_bottleneck_is_named_with_the_setting_that_mends_it(kind, measures, setting):
    verdict = name_bottleneck(well_fed(**measures))
    assert verdict.kind is kind
    assert setting in verdict.sentence
    assert verdict.gain > 1.25


def test_a_balanced_run_has_no_bottleneck():
    verdict = name_bottleneck(well_fed(download=stage("download", 1400)))
    assert (verdict.kind, verdict.stage) == (Kind.BALANCED, None)


def test_transcribe_and_embed_take_turns_so_their_times_add_up():
    """Each alone costs less than the download; the device that they share costs more."""
    verdict = name_bottleneck(
        [
            stage("download", 2000),
            stage("transcribe", 1500, gpu=Share(0.9, 0.9, 0.9)),
            stage("embed", 1400, gpu=Share(0.9, 0.9, 0.9), model="all-MiniLM-L6-v2", texts=1, encoding=1),
        ]
    )
    assert verdict.stage == "transcribe"


def test_stages_are_compared_by_what_came_out_of_them_not_by_how_long_they_ran():
    """The downloads ran longest, and are far ahead: 400 videos against 20."""
    measures = [
        stage("download", 3600, videos=400),
        stage("transcribe", 2000, videos=20, gpu=Share(0.9, 0.9, 0.9)),
    ]
    assert name_bottleneck(measures).stage == "transcribe"


def test_a_stage_from_which_nothing_came_out_yet_can_be_the_bottleneck():
    measures = [stage("download", 600, videos=60), stage("transcribe", 500, videos=0, queue=59)]
    assert name_bottleneck(measures).stage == "transcribe"


def test_nothing_measured_is_said_as_such():
    assert name_bottleneck([]).kind is Kind.UNKNOWN
