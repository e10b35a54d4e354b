"""The demo's speech model really transcribes: held-out sentences and speeds, through faster-whisper in both modes."""

import pytest

from demo.train import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return evaluate.load()


@pytest.fixture(scope="module")
def recordings():
    return evaluate.held_out_recordings(8, sentences=5, noise=0.001)


@pytest.mark.parametrize("mode", [evaluate.sequential, evaluate.batched])
def test_held_out_speech_is_transcribed_with_its_times(model, recordings, mode):
    score = evaluate.score(recordings, mode(model))
    assert score.words <= 0.10
    assert score.start <= 0.5
    assert score.end <= 0.5


def test_silence_gives_no_text(model):
    import numpy as np

    segments, _ = model.transcribe(np.zeros(16_000 * 5, np.float32), language="en", beam_size=1)
    assert not list(segments)
