"""Input audio: a few known formats, decoded once to its end before anyone relies on it. PyAV, no torch."""

from dataclasses import dataclass
from pathlib import Path

import av

from pipelines.base import InvalidInput

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,mp3,wav,flac,ogg"
DECODERS = "aac,mp3,mp3float,opus,libopus,vorbis,flac,alac,pcm_s16le,pcm_s24le,pcm_s32le,pcm_u8,pcm_f32le"
READABLE = "MP3, WAV, M4A, FLAC and Ogg"
READING = {"format_whitelist": DEMUXERS, "codec_whitelist": DECODERS, "protocol_whitelist": "file"}
SUFFIXES = {"mp3": ".mp3", "wav": ".wav", "flac": ".flac", "ogg": ".ogg", "mov": ".m4a"}
MAX_S = 600.0


@dataclass(frozen=True)
class AudioInfo:
    suffix: str
    duration_s: float


def check_audio_decodes(path: Path) -> AudioInfo:
    """Decode it all and throw it away. Raises `InvalidInput` if it is no audio, broken, or over ten minutes."""
    try:
        with av.open(str(path), options=READING) as container:
            if not container.streams.audio:
                raise InvalidInput("The file has no sound.")
            suffix = SUFFIXES[container.format.name.partition(",")[0]]
            duration_s = 0.0
            for frame in container.decode(audio=0):
                duration_s += frame.samples / frame.sample_rate
                if duration_s > MAX_S:
                    raise InvalidInput(f"The audio is longer than the {MAX_S:g} seconds that are taken.")
    except (av.FFmpegError, ValueError, KeyError) as error:
        raise InvalidInput(f"This is no audio that can be read: {READABLE} are.") from error
    if not duration_s:
        raise InvalidInput("The audio is empty.")
    return AudioInfo(suffix, duration_s)
