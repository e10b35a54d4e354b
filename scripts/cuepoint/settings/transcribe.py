"""Settings of the transcribe stage."""

from typing import Literal

from pydantic import Field

from cuepoint.settings.base import Section, result


class TranscribeSettings(Section):
    """Speech recognition with faster-whisper."""

    model: str = result("large-v3-turbo", min_length=1)
    """A faster-whisper model name, a Hugging Face repository in CTranslate2 format, or a local directory."""
    revision: str | None = result(None)
    """Commit of the model's repository; without one that of faster-whisper's own models which is pinned here, of any
    other what the cache holds, else the newest, recorded as resolved."""
    language: str = result("auto", pattern=r"^(auto|each|[a-z]{2,3})$")
    """Language of the speech (`en`, `de`, …); `auto` detects it per video, `each` per clip, for mixed videos."""
    beam_size: int = result(5, ge=1, le=20)
    """Beams of the decoder."""
    word_timestamps: bool = result(False)
    """Also store start, end and probability of each word."""
    compute_type: Literal["auto", "float32", "float16", "bfloat16", "int8", "int8_float16", "int8_float32"] = result(
        "auto"
    )
    """Arithmetic: `auto` is float16 on a GPU (int8_float16 where the model would fill half of it), int8 on a CPU."""
    compression_ratio_threshold: float = result(2.4, gt=0)
    """Text that zlib shrinks by more than this factor repeats itself: decoded again, else flagged (Whisper's own)."""
    log_prob_threshold: float = result(-1.0, le=0)
    """Text with a lower mean log-probability is decoded again, else flagged (Whisper's own value)."""
    no_speech_threshold: float = result(0.6, ge=0, le=1)
    """Text of low probability with a higher probability of silence than this is flagged (Whisper's own value)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes a GPU if there is one."""
    batch_size: int = Field(16, ge=1, le=256)
    """Clips decoded together on a GPU; it halves by itself when memory runs out."""
