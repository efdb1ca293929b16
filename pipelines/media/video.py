"""Videos from anywhere, made plain: a few known formats in; upright RGB frames with their times out. PyAV, no torch."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation

from pipelines.base import InvalidInput

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm"  # one file is one video: a playlist would name others
DECODERS = (
    "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,mpeg4,mjpeg,prores,aac,mp3,mp3float,opus,libopus,vorbis,flac,"
    "alac,pcm_s16le,pcm_s16be,pcm_s24le,pcm_f32le"
)
READABLE = "MP4, MOV, MKV and WebM"
READING = {"format_whitelist": DEMUXERS, "codec_whitelist": DECODERS, "protocol_whitelist": "file"}
SUFFIXES = {"mov": ".mp4", "matroska": ".webm"}

Size = tuple[int, int]
Frame = np.ndarray
"""(height, width, 3), RGB, 8 bits."""


@dataclass(frozen=True)
class VideoLimits:
    """What is taken of an input video. `seconds` and `frames` bound the time that reading takes."""

    seconds: float = 120.0
    frames: int = 7_200
    pixels: int = 4096 * 2304
    shortest_side: int = 16

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.pixels:
            raise InvalidInput(f"The video is {width} x {height}: more than the {self.pixels:,} pixels that are taken.")
        if min(width, height) < self.shortest_side:
            raise InvalidInput(f"The video is {width} x {height}: a side needs {self.shortest_side} pixels.")

    def check_length(self, frames: int, duration_s: float) -> None:
        if frames > self.frames:
            raise InvalidInput(f"The video has more than the {self.frames:,} frames that are taken.")
        if duration_s > self.seconds:
            raise InvalidInput(f"The video is longer than the {self.seconds:g} seconds that are taken.")


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds. `width` and `height` are the upright picture's; `fps` is the average."""

    suffix: str
    width: int
    height: int
    frames: int
    duration_s: float
    fps: float
    has_audio: bool


LIMITS = VideoLimits()


def check_video_decodes(path: Path, limits: VideoLimits = LIMITS) -> VideoInfo:
    """Decode every frame and throw it away. Raises `InvalidInput` if it is no video, truncated, or over a limit."""
    with open_video(path) as container:
        limits.check_length(0, (container.duration or 0) / av.time_base)
        stream = container.streams.video[0]
        limits.check_size(stream.codec_context.width, stream.codec_context.height)
        size, count, last_s, end_s = (0, 0), 0, 0.0, 0.0
        for at_s, frame in timed_frames(container):
            size = size if count else upright_size(frame)
            limits.check_size(frame.width, frame.height)
            limits.check_length(count := count + 1, at_s)
            last_s, end_s = at_s, at_s + frame_s(frame)
        if not count:
            raise InvalidInput("The video has no frames.")
        fps = (count - 1) / last_s if last_s else float(stream.average_rate or 1)
        suffix = SUFFIXES.get(container.format.name.partition(",")[0], ".mp4")
        end_s = end_s if end_s > last_s else last_s + 1 / fps
        return VideoInfo(suffix, *size, count, end_s, fps, bool(container.streams.audio))


def first_frames(path: Path, size: Size, count: int, fps: float) -> list[Frame]:
    """Up to `count` frames of the video's start, `fps` of them a second, covering `size`. Reads no further."""
    frames: list[Frame] = []
    previous: Frame | None = None
    with open_video(path) as container:
        for at_s, frame in timed_frames(container):
            while previous is not None and len(frames) < count and len(frames) / fps < at_s - EPSILON_S:
                frames.append(previous)
            if len(frames) == count:
                return frames
            previous = cover_crop(frame, size)
        if previous is not None and len(frames) / fps < at_s + EPSILON_S:
            frames.append(previous)
    return frames


def last_frames(path: Path, size: Size, count: int, fps: float) -> list[Frame]:
    """Up to `count` frames of the video's end, its very last one included, `fps` of them a second, covering `size`."""
    tail: deque[tuple[float, av.VideoFrame]] = deque()
    with open_video(path) as container:
        for at_s, frame in timed_frames(container):
            tail.append((at_s, frame))
            while len(tail) > 1 and tail[1][0] <= at_s - (count - 1) / fps:
                tail.popleft()
    if not tail:
        raise InvalidInput("The video has no frames.")
    start_s, end_s = tail[0][0], tail[-1][0]
    times = [end_s - n / fps for n in reversed(range(count)) if end_s - n / fps > start_s - EPSILON_S]
    return [cover_crop(min(tail, key=lambda each: abs(each[0] - wanted_s))[1], size) for wanted_s in times]


# Frames

EPSILON_S = 1e-3
"""Times in a file are rounded to its time base, often a millisecond."""


@contextmanager
def open_video(path: Path) -> Iterator[InputContainer]:
    """The file, if it is a video. Whatever FFmpeg raises on a bad one, inside the block too, is the caller's fault."""
    try:
        with av.open(str(path), options=READING) as container:
            if not container.streams.video:
                raise InvalidInput("The file has no video in it.")
            yield container
    except FileNotFoundError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise InvalidInput(f"This is not a video that can be read ({READABLE} are), or it is damaged.") from error


def timed_frames(container: InputContainer) -> Iterator[tuple[float, av.VideoFrame]]:
    """Each frame with its time in seconds from the first one's; a frame that is not later than the last is left out."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    clock = FrameClock()
    for frame in container.decode(stream):
        if (at_s := clock.tell(frame)) is not None:
            yield at_s, frame


class FrameClock:
    """Times from the first frame's on; None for a frame without a time, or no later than the one before."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s = -1.0

    def tell(self, frame: av.VideoFrame) -> float | None:
        if frame.time is None:
            return None
        self.first_s = frame.time if self.first_s is None else self.first_s
        at_s = frame.time - self.first_s
        if at_s <= self.last_s:
            return None
        self.last_s = at_s
        return at_s


def frame_s(frame: av.VideoFrame) -> float:
    """How long the file says the frame is shown; 0 where it does not say."""
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def upright_size(frame: av.VideoFrame) -> Size:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def cover_crop(frame: av.VideoFrame, size: Size) -> Frame:
    """The frame upright, scaled to cover `size`, its overhang cropped evenly. Untouched where it has that size."""
    width, height = size[::-1] if frame.rotation % 180 else size
    scale = max(width / frame.width, height / frame.height)
    wide, high = max(width, ceil(frame.width * scale - 0.5)), max(height, ceil(frame.height * scale - 0.5))
    filter_ = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    scaled = frame.reformat(wide, high, "rgb24", interpolation=filter_).to_ndarray()
    top, left = (high - height) // 2, (wide - width) // 2
    cropped = scaled[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(cropped, round(frame.rotation / 90)))
