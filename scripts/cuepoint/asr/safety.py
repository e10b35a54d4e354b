"""Which text cannot be trusted, and why: the flags of a segment.

Nothing is deleted: flagged text stays in the table, and `embed` leaves it out. Text without flags can be trusted.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from cuepoint.asr.engine import Decoded, Segment
from cuepoint.settings import TranscribeSettings


class Flag(StrEnum):
    """Why a segment is suspect; REDECODED stands beside the others where decoding it again did not help."""

    REPETITION = "repetition"
    LOW_CONFIDENCE = "low_confidence"
    NO_SPEECH = "no_speech"
    HALLUCINATION_PHRASE = "hallucination_phrase"
    REDECODED = "redecoded"


# What Whisper writes over music and noise, from its training data's subtitles: the most frequent outputs on non-speech
# in Koenecke et al. 2024 (arXiv:2402.08021) and Barański et al. 2025 (arXiv:2501.11378), and the credits of subtitle
# communities that users report in openai/whisper's discussions. Whole segments only: a talk may contain the words.
PHRASES: dict[str, tuple[str, ...]] = {
    "de": (
        "Untertitel der Amara.org-Community",
        "Untertitel im Auftrag des ZDF für funk, 2017",
        "Untertitelung des ZDF, 2020",
        "Vielen Dank fürs Zuschauen!",
    ),
    "en": (
        "Thank you for watching.",
        "Thanks for watching!",
        "Thank you so much for watching.",
        "Please subscribe.",
        "Please subscribe to my channel.",
        "Like and subscribe!",
        "Subtitles by the Amara.org community",
    ),
    "es": ("Subtítulos realizados por la comunidad de Amara.org", "¡Gracias por ver el video!"),
    "fr": (
        "Sous-titres réalisés par la communauté d'Amara.org",
        "Sous-titrage Société Radio-Canada",
        "Merci d'avoir regardé cette vidéo.",
    ),
    "it": ("Sottotitoli creati dalla comunità Amara.org", "Sottotitoli e revisione a cura di QTSS"),
    "ja": ("ご視聴ありがとうございました",),
    "pt": ("Legendas pela comunidade Amara.org", "Obrigado por assistir."),
    "ru": ("Субтитры сделал DimaTorzok", "Продолжение следует..."),
    "zh": ("字幕由Amara.org社区提供", "请不吝点赞 订阅 转发 打赏支持明镜与点点栏目"),
}

# Four words said four times in one segment are a loop, not a refrain: long enough that "no, no, no, no" is none.
LOOP_WORDS = 4
LOOP_LETTERS = 8  # instead, in languages that are written without spaces
LOOP_TIMES = 4
WITHOUT_SPACES = frozenset({"ja", "lo", "my", "th", "yue", "zh"})  # openai/whisper's tokenizer has the same ones
# This many equal segments one after the other in a clip (30 s) are a loop, too.
EQUAL_SEGMENTS = 3
# Text that is spread so thin was written over music or noise that the VAD took for speech: the slowest speakers say
# several letters a second. Short segments are left alone, a long vowel or a pause may fill them.
SPARSE_SECONDS = 10.0
SPARSE_LETTERS = 1.0  # a second


def suspicions(decoded: Decoded, settings: TranscribeSettings) -> list[set[Flag]]:
    """Flags of each segment of a clip."""
    of_clip = _of_clip(decoded, settings)
    normal = [_normal(segment.text) for segment in decoded.segments]
    phrases = {_normal(phrase) for phrase in PHRASES.get(decoded.language, ())}
    flags = []
    for place, (segment, text) in enumerate(zip(decoded.segments, normal, strict=True)):
        found = set(of_clip)
        if _sparse(segment, text):
            found.add(Flag.NO_SPEECH)
        if text in phrases:
            found.add(Flag.HALLUCINATION_PHRASE)
        if _loops(text, decoded.language) or _repeats(normal, place):
            found.add(Flag.REPETITION)
        flags.append(found)
    return flags


def _of_clip(decoded: Decoded, settings: TranscribeSettings) -> set[Flag]:
    """Whisper's own three criteria, which are about the clip as a whole."""
    found = set()
    if decoded.compression_ratio > settings.compression_ratio_threshold:
        found.add(Flag.REPETITION)
    if decoded.avg_logprob < settings.log_prob_threshold:
        found.add(Flag.LOW_CONFIDENCE)
        if decoded.no_speech_prob > settings.no_speech_threshold:
            found.add(Flag.NO_SPEECH)
    return found


def _normal(text: str) -> str:
    """Lower case, without accents and punctuation."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFC", plain).casefold()))


def _sparse(segment: Segment, text: str) -> bool:
    """Whether a long segment says hardly anything."""
    seconds = segment.end - segment.start
    return seconds > SPARSE_SECONDS and len(text.replace(" ", "")) < SPARSE_LETTERS * seconds


def _loops(text: str, language: str) -> bool:
    """Whether the same few words come again and again."""
    units, length = text.split(), LOOP_WORDS
    if language in WITHOUT_SPACES:
        units, length = list(text.replace(" ", "")), LOOP_LETTERS
    runs = Counter(tuple(units[at : at + length]) for at in range(len(units) - length + 1))
    return max(runs.values(), default=0) >= LOOP_TIMES


def _repeats(texts: Sequence[str], place: int) -> bool:
    """Whether the text is one of EQUAL_SEGMENTS equal ones in a row."""
    first = last = place
    while first > 0 and texts[first - 1] == texts[place]:
        first -= 1
    while last + 1 < len(texts) and texts[last + 1] == texts[place]:
        last += 1
    return last - first + 1 >= EQUAL_SEGMENTS
