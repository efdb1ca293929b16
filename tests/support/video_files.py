"""Videos to read in tests, drawn frame by frame, and what FFmpeg says of those that were made."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@dataclass(frozen=True)
class Seen:
    codec: str
    pixels: str
    size: tuple[int, int]
    frames: int
    fps: float
    duration_s: float
    times: list[float]
    audio: str | None


def probe(path: Path) -> Seen:
    """Every frame is decoded and counted; nothing is taken from the header alone but the length."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        duration_s = float(stream.duration * stream.time_base)
        times = [frame.time for frame in container.decode(stream)]
        context, audio = stream.codec_context, container.streams.audio
        fps = float(stream.average_rate)
        name = audio[0].codec_context.name if audio else None
        return Seen(
            context.name, context.pix_fmt, (context.width, context.height), len(times), fps, duration_s, times, name
        )


def moov_is_first(path: Path) -> bool:
    """A browser can play what has come so far."""
    content = path.read_bytes()
    return content.index(b"moov") < content.index(b"mdat")


def boxes(count: int, width: int, height: int) -> np.ndarray:
    """Frames (count, height, width, 3): on blue, a white box that goes right by three pixels each."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, :, :, 2] = 120
    for n in range(count):
        frames[n, 8:24, 3 * n : 3 * n + 12] = 255
    return frames


def write(
    path: Path, frames: np.ndarray, fps: int, codec: str = "libx264", sound_s: float = 0, sound: str = "aac"
) -> Path:
    """By another way than the code under test: plain PyAV."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "12"} if "x26" in codec else {})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = container.add_stream(sound, rate=48_000, layout="stereo") if sound_s else None
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        if audio:
            for start in range(0, int(sound_s * 48_000), 960):
                container.mux(audio.encode(tone(start, 960)))
            container.mux(audio.encode(None))
    return path


def tone(start: int, count: int) -> av.AudioFrame:
    wave = (np.sin(np.arange(start, start + count) * 2 * np.pi * 440 / 48_000) * 8_000).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
    return frame
