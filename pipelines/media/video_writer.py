"""What a video pipeline made, and how it becomes a file: H.264 in MP4 that plays in a browser while it loads."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from pipelines.base import InvalidOutput, OnStep
from pipelines.media.images import save_image
from pipelines.media.video import LIMITS, Frame, FrameClock, Size, check_video_decodes, cover_crop, open_video

TICKS = 90_000
"""A second in the file's time base: whole for every frame rate from 1 to 60 but those of NTSC."""
GROUP = 16
"""Frames between two progress reports."""
MP4 = {"movflags": "+faststart", "movie_timescale": str(TICKS)}
X264 = {"crf": "17", "preset": "medium", "profile": "high", "bf": "0"}
"""No B-frames: with them the MP4's length is wrong where the rate changes, since it is counted in decoding order."""
BT709 = 1  # primaries, transfer and matrix have one number: ITU-T H.273
COPIED_AUDIO = frozenset({"aac", "mp3", "mp3float"})
"""By the decoder's name, what every browser plays in MP4; all else becomes AAC."""


@dataclass(frozen=True)
class SavedVideo:
    """What the file really holds."""

    width: int
    height: int
    duration_s: float


@dataclass(frozen=True)
class VideoOutput:
    """`frames` are (count, height, width, 3), RGB, 8 bits, `fps` of them a second.

    `after` is a video whose end they go on from: the file then begins with it, scaled to cover, its sound kept.
    """

    frames: np.ndarray
    fps: int
    after: Path | None = None

    def save(self, path: Path, on_step: OnStep) -> SavedVideo:
        """Write the video, and its first frame as a JPEG beside it: both whole, safely on disk, or neither.

        Raises `InvalidInput` for an `after` that cannot be read, and whatever `on_step` raises.
        """
        part = path.with_name(f".{path.name}.part")
        try:
            duration_s = self._write(part, poster_path(path), on_step)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            poster_path(path).unlink(missing_ok=True)
            raise
        finally:
            part.unlink(missing_ok=True)
        return SavedVideo(self.frames.shape[2], self.frames.shape[1], duration_s)

    def _write(self, part: Path, poster: Path, on_step: OnStep) -> float:
        with av.open(str(part), "w", format="mp4", options=MP4) as container:
            film = VideoTrack(container, self.size, self.fps)
            total = len(self.frames) + (check_video_decodes(self.after, LIMITS).frames if self.after else 0)
            for count, frame in enumerate(self._all(film), 1):
                if count == 1:
                    save_image(Image.fromarray(frame), poster, "jpeg")
                if count % GROUP == 0 or count == total:
                    on_step("write", count, total)
            film.end()
            return film.end_ticks / TICKS

    def _all(self, film: "VideoTrack") -> Iterator[Frame]:
        """Every frame, once it is in the film."""
        if self.after:
            with open_video(self.after) as earlier:
                yield from copy_video(earlier, film)
        for frame in self.frames:
            film.add(frame, film.last_ticks + film.step_ticks if film.count else 0)
            yield frame

    @property
    def size(self) -> Size:
        return self.frames.shape[2], self.frames.shape[1]


def to_frames(pixels: Any) -> np.ndarray:
    """A decoder's tensor (3, count, height, width), -1 to 1, as frames, rounded as by diffusers. Raises `BadOutput`."""
    if not pixels.isfinite().all():
        raise InvalidOutput("The model made a video with NaN or infinite pixels.")
    return (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def poster_path(path: Path) -> Path:
    return path.with_suffix(".jpg")


class VideoTrack:
    """The file's picture track. Sizes must be even: yuv420p has one colour for four pixels."""

    def __init__(self, container: OutputContainer, size: Size, fps: int) -> None:
        self.container, self.size = container, size
        self.step_ticks = round(TICKS / fps)
        self.count, self.last_ticks = 0, -1
        self.stream = container.add_stream("libx264", rate=fps, options=X264 | {"g": str(2 * fps)})
        context = self.stream.codec_context
        context.width, context.height = size
        context.pix_fmt = "yuv420p"
        context.time_base = self.stream.time_base = Fraction(1, TICKS)
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = ColorRange.MPEG

    def add(self, pixels: Frame, at_ticks: int) -> None:
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
        )
        frame.pts, frame.time_base, frame.duration = at_ticks, Fraction(1, TICKS), self.step_ticks
        self._mux(self.stream.encode(frame))
        self.count, self.last_ticks = self.count + 1, at_ticks

    def end(self) -> None:
        self._mux(self.stream.encode(None))

    @property
    def end_ticks(self) -> int:
        return self.last_ticks + self.step_ticks

    def _mux(self, packets: list[Packet]) -> None:
        for packet in packets:
            packet.duration = packet.duration or self.step_ticks
            self.container.mux(packet)


def copy_video(earlier: InputContainer, film: VideoTrack) -> Iterator[Frame]:
    """Put all of a video at the film's start, each frame at its own time, and its sound beside it."""
    video = earlier.streams.video[0]
    audio = earlier.streams.audio[0] if earlier.streams.audio else None
    start_s = float((video.start_time or 0) * (video.time_base or 0))
    sound = AudioTrack(audio, film.container, start_s) if audio else None
    clock = FrameClock()
    for packet in earlier.demux([video, audio] if audio else [video]):
        if sound and packet.stream is not video:
            sound.add(packet)
            continue
        for frame in packet.decode():
            if isinstance(frame, av.VideoFrame) and (at_s := clock.tell(frame)) is not None:
                film.add(pixels := cover_crop(frame, film.size), round(at_s * TICKS))
                yield pixels
    if sound:
        sound.end()


class AudioTrack:
    """The file's sound track: packets as they are where a browser plays them, else AAC."""

    def __init__(self, source: AudioStream, container: OutputContainer, start_s: float) -> None:
        self.container = container
        self.offset = round(start_s / (source.time_base or 1))
        self.copies = source.codec_context.name in COPIED_AUDIO
        if self.copies:
            self.stream = container.add_stream_from_template(source)  # as it is, with its codec's own header
        else:
            rate = min(source.rate or 48_000, 48_000)
            self.stream = container.add_stream("aac", rate=rate, layout="stereo")

    def add(self, packet: Packet) -> None:
        if not self.copies:
            for frame in packet.decode():
                if isinstance(frame, av.AudioFrame) and frame.pts is not None:
                    frame.pts -= self.offset
                    self.container.mux(self.stream.encode(frame))
        elif packet.pts is not None and packet.dts is not None and packet.dts >= self.offset:
            packet.pts, packet.dts = packet.pts - self.offset, packet.dts - self.offset
            packet.stream = self.stream
            self.container.mux(packet)

    def end(self) -> None:
        if not self.copies:
            self.container.mux(self.stream.encode(None))
