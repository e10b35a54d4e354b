"""From a downloaded file to the `.mka` that the pipeline keeps: the same packets in another container."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import av

from cuepoint.atomic import atomic_path

log = logging.getLogger(__name__)

# Containers of media, and nothing that can name other files: a "video" whose text is a playlist must not make FFmpeg
# open files of this machine or addresses of its network.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,ogg,tta,"
    "w64,wav,wv"
)
_TIMED_CONTAINERS = ("matroska", "mov", "flac")  # their headers state the length; others are guessed from a bit rate


@dataclass(frozen=True)
class Audio:
    """What is in the file that was kept."""

    codec: str
    duration: float  # seconds, counted in decoded samples
    stated_duration: float | None  # seconds, as the downloaded container's own header says, where it can be trusted
    packets: int
    broken_packets: int  # that could not be decoded
    bit_rate: float | None  # kbit/s, of the packets
    audio_hash: str
    sha256: str
    bytes: int


def remux(source: Path, target: Path) -> Audio | None:
    """Copy the audio track of `source` to `target` (Matroska), packet for packet; None when there is no audio track.

    The same packets always give the same file. Raises av.FFmpegError (a ValueError or OSError) when `source` is no
    media file.
    """
    with open_media(source) as media:
        track = media.streams.best("audio")
        if track is None:
            return None
        stated = media.duration / av.time_base if media.duration and _is_timed(media) else None
        with atomic_path(target) as temporary:
            _copy_packets(media, track, temporary)
            return _examine(temporary, stated)


def open_media(path: Path) -> av.container.InputContainer:
    """Open a file as media and nothing else (no playlists, no network)."""
    # A prefix keeps a name like `-x` or `http:x` from being taken for an option or a protocol.
    return av.open(
        f"file:{path}", metadata_errors="replace", options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_timed(media: av.container.InputContainer) -> bool:
    return media.format.name.split(",")[0] in _TIMED_CONTAINERS


def _copy_packets(media: av.container.InputContainer, track: av.AudioStream, target: Path) -> None:
    with av.open(f"file:{target}", "w", format="matroska", options={"fflags": "+bitexact"}) as kept:
        copy = kept.add_stream_from_template(track)
        for packet in media.demux(track):
            if packet.dts is None:  # the empty packet that flushes a decoder
                continue
            packet.stream = copy
            kept.mux(packet)


def _examine(path: Path, stated: float | None) -> Audio:
    """Read back what was kept: hash the packets, and decode them to learn how much audio there really is."""
    digest = hashlib.blake2b(digest_size=16)
    seconds = 0.0
    packets = broken = payload = 0
    with open_media(path) as media:
        track = media.streams.best("audio")
        for packet in media.demux(track):
            digest.update(bytes(packet))
            payload += packet.size
            packets += packet.size > 0
            try:
                seconds += sum(frame.samples / frame.sample_rate for frame in packet.decode())
            except av.FFmpegError:
                broken += 1
        codec = track.codec_context.name
    if broken:
        log.warning("%d of %d audio packets cannot be decoded", broken, packets)
    return Audio(
        codec=codec,
        duration=round(seconds, 3),
        stated_duration=stated,
        packets=packets,
        broken_packets=broken,
        bit_rate=round(payload * 8 / seconds / 1000, 1) if seconds else None,
        audio_hash=digest.hexdigest(),
        sha256=file_hash(path),
        bytes=path.stat().st_size,
    )
