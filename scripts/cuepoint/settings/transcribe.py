"""Settings of the transcribe stage."""

from typing import Literal

from pydantic import Field

from cuepoint.settings.base import Section, result


class TranscribeSettings(Section):
    """Speech recognition with faster-whisper."""

    model: str = result("large-v3-turbo", min_length=1)
    """A faster-whisper model name, a Hugging Face repository in CTranslate2 format, or a local directory."""
    revision: str | None = result(None)
    """Commit of the model's repository; without one the newest is taken, and recorded as resolved."""
    language: str = result("auto", pattern=r"^(auto|[a-z]{2,3})$")
    """Language of the speech (`en`, `de`, …), or `auto` to detect it per video."""
    beam_size: int = result(5, ge=1, le=20)
    """Beams of the decoder."""
    word_timestamps: bool = result(False)
    """Also store start, end and probability of each word."""
    compute_type: Literal["auto", "float32", "float16", "bfloat16", "int8", "int8_float16", "int8_float32"] = result(
        "auto"
    )
    """Arithmetic: `auto` is float16 on a GPU and int8 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the model runs; `auto` takes a GPU if there is one."""
    batch_size: int = Field(16, ge=1, le=256)
    """Clips decoded together on a GPU; it halves by itself when memory runs out."""
