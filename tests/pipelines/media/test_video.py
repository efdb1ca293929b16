"""Video files: what is written plays, what is read is what is there, and what cannot be read is refused."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.base import InvalidInput, InvalidOutput, JobCancelled
from pipelines.media.images import open_covering
from pipelines.media.video import VideoLimits, check_video_decodes, first_frames, last_frames
from pipelines.media.video_writer import VideoOutput, poster_path, to_frames
from tests.support.video_files import boxes, moov_is_first, probe, tone, write

Steps = list[tuple[str, int, int]]


def ignore(phase: str, step: int, steps: int) -> None: ...


def box_at(frame: np.ndarray) -> int:
    """The frame's number, by where the box is."""
    row = frame[16, :, 0] > 128
    return round(int(np.argmax(row)) / 3)


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# Writing


@pytest.mark.parametrize(("count", "fps"), [(1, 24), (9, 16), (33, 30), (25, 24), (50, 60)])
def test_a_clip_becomes_a_file_that_plays_in_a_browser(tmp_path: Path, count: int, fps: int):
    saved = VideoOutput(boxes(count, 192, 64), fps).save(tmp_path / "a.mp4", ignore)
    seen = probe(tmp_path / "a.mp4")
    assert (seen.codec, seen.pixels, seen.size, seen.frames, seen.fps) == ("h264", "yuv420p", (192, 64), count, fps)
    assert saved.duration_s == pytest.approx(count / fps, abs=1e-4)
    assert seen.duration_s == pytest.approx(saved.duration_s, abs=1e-4)
    assert (saved.width, saved.height) == (192, 64)
    assert moov_is_first(tmp_path / "a.mp4")
    assert [box_at(frame) for frame in decoded(tmp_path / "a.mp4")] == list(range(count))


def test_colours_survive(tmp_path: Path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    frames = np.array(colours, np.uint8)[:, None, None, :].repeat(32, 1).repeat(32, 2)
    VideoOutput(frames, 8).save(tmp_path / "a.mp4", ignore)
    for frame, colour in zip(decoded(tmp_path / "a.mp4"), colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_the_first_frame_lies_beside_it_as_a_poster(tmp_path: Path):
    frames = boxes(5, 64, 48)
    VideoOutput(frames, 16).save(tmp_path / "a.mp4", ignore)
    with Image.open(tmp_path / "a.jpg") as poster:
        assert np.abs(np.asarray(poster).astype(int) - frames[0]).mean() < 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.mp4"]


def test_the_same_frames_are_the_same_file(tmp_path: Path):
    one, two = (tmp_path / name for name in ("1.mp4", "2.mp4"))
    for path in (one, two):
        VideoOutput(boxes(40, 128, 64), 16).save(path, ignore)
    assert one.read_bytes() == two.read_bytes()


def test_writing_is_told_and_may_be_stopped_and_leaves_nothing(tmp_path: Path):
    told: Steps = []
    VideoOutput(boxes(40, 32, 32), 16).save(tmp_path / "a.mp4", lambda *step: told.append(step))
    assert told == [("write", 16, 40), ("write", 32, 40), ("write", 40, 40)]

    def stop(phase: str, step: int, steps: int) -> None:
        raise JobCancelled

    with pytest.raises(JobCancelled):
        VideoOutput(boxes(40, 32, 32), 16).save(tmp_path / "b.mp4", stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.mp4"]


def test_pixels_that_are_no_numbers_are_no_video():
    import torch

    pixels = torch.zeros(3, 2, 4, 6)
    assert to_frames(pixels).shape == (2, 4, 6, 3)
    assert set(to_frames(pixels).ravel().tolist()) == {128}
    pixels[0, 1, 2, 3] = float("nan")
    with pytest.raises(InvalidOutput):
        to_frames(pixels)


# Extending


@pytest.mark.parametrize("fps", [8, 16, 24, 30])
def test_a_video_goes_on_without_a_repeated_frame(tmp_path: Path, fps: int):
    """The box moves on by one step a frame through the join; the earlier frames keep their times."""
    frames = boxes(24, 96, 64)
    earlier = write(tmp_path / "in.mp4", frames[:16], 16)
    saved = VideoOutput(frames[16:], fps, after=earlier).save(tmp_path / "out.mp4", ignore)
    seen = probe(tmp_path / "out.mp4")
    assert [box_at(frame) for frame in decoded(tmp_path / "out.mp4")] == list(range(24))
    times = [n / 16 for n in range(16)] + [15 / 16 + (n + 1) / fps for n in range(8)]
    assert seen.times == pytest.approx(times, abs=1e-4)
    assert saved.duration_s == pytest.approx(times[-1] + 1 / fps, abs=1e-4)
    assert seen.duration_s == pytest.approx(saved.duration_s, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [("in.mp4", "libx264", "aac"), ("in.mp4", "libx264", "libmp3lame"), ("in.webm", "libvpx-vp9", "libopus")],
)
def test_the_sound_survives(tmp_path: Path, name: str, codec: str, sound: str):
    earlier = write(tmp_path / name, boxes(32, 96, 64), 16, codec, sound_s=2.0, sound=sound)
    VideoOutput(boxes(8, 96, 64), 16, after=earlier).save(tmp_path / "out.mp4", ignore)
    assert probe(tmp_path / "out.mp4").audio == {"libopus": "aac", "aac": "aac", "libmp3lame": "mp3float"}[sound]
    before, after = loudness(earlier), loudness(tmp_path / "out.mp4")
    assert after.size / 48_000 == pytest.approx(before.size / 48_000, abs=0.1)
    shift = int(np.argmax(after > 1_000)) - int(np.argmax(before > 1_000))
    assert abs(shift) / 48_000 < 0.05, "in step with the picture"
    assert np.median(after) == pytest.approx(np.median(before), rel=0.1)


def loudness(path: Path) -> np.ndarray:
    """Of each sample at 48 kHz, from the video's start on."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("s16", "mono", 48_000)
        frames = [made for frame in container.decode(audio=0) for made in resampler.resample(frame)]
    return np.abs(np.concatenate([frame.to_ndarray()[0] for frame in frames]).astype(int))


def test_another_size_is_scaled_to_cover(tmp_path: Path):
    earlier = write(tmp_path / "in.mp4", boxes(16, 192, 192), 16)
    VideoOutput(boxes(8, 96, 64), 16, after=earlier).save(tmp_path / "out.mp4", ignore)
    assert (probe(tmp_path / "out.mp4").size, probe(tmp_path / "out.mp4").frames) == ((96, 64), 24)


def test_a_video_that_cannot_be_read_leaves_nothing(tmp_path: Path):
    (tmp_path / "in.mp4").write_bytes(b"no video")
    with pytest.raises(InvalidInput):
        VideoOutput(boxes(8, 96, 64), 16, after=tmp_path / "in.mp4").save(tmp_path / "out.mp4", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


# Reading


def test_what_a_video_holds(tmp_path: Path):
    info = check_video_decodes(write(tmp_path / "a.mp4", boxes(32, 96, 64), 16, sound_s=2))
    assert (info.suffix, info.width, info.height, info.frames, info.has_audio) == (".mp4", 96, 64, 32, True)
    assert (info.duration_s, info.fps) == (pytest.approx(2.0, abs=0.01), pytest.approx(16, abs=0.01))
    webm = check_video_decodes(write(tmp_path / "a.webm", boxes(10, 96, 64), 25, "libvpx-vp9"))
    assert (webm.suffix, webm.frames, webm.has_audio) == (".webm", 10, False)


def test_the_first_frames_at_another_rate(tmp_path: Path):
    path = write(tmp_path / "a.mp4", boxes(30, 96, 64), 30)
    assert [box_at(frame) for frame in first_frames(path, (96, 64), 5, 15)] == [0, 2, 4, 6, 8]
    assert [box_at(frame) for frame in first_frames(path, (96, 64), 4, 60)] == [0, 0, 1, 1]
    assert len(first_frames(path, (96, 64), 99, 10)) == 10


def test_the_last_frames_end_with_the_very_last(tmp_path: Path):
    path = write(tmp_path / "a.mp4", boxes(30, 96, 64), 30)
    assert [box_at(frame) for frame in last_frames(path, (96, 64), 1, 16)] == [29]
    assert [box_at(frame) for frame in last_frames(path, (96, 64), 4, 15)] == [23, 25, 27, 29]
    assert [box_at(frame) for frame in last_frames(path, (96, 64), 99, 30)] == list(range(30))


def test_frames_cover_a_size_and_are_cropped_evenly(tmp_path: Path):
    frames = np.zeros((3, 64, 192, 3), np.uint8)
    frames[:, :, 64:128] = (0, 255, 0)
    path = write(tmp_path / "a.mp4", frames, 8)
    for size in ((64, 64), (32, 32), (128, 128)):
        (frame,) = last_frames(path, size, 1, 8)
        assert frame.shape == (size[1], size[0], 3)
        assert frame[4:-4, 4:-4, 1].min() > 230


@pytest.mark.parametrize(("turn", "size"), [(90, (64, 96)), (180, (96, 64)), (270, (64, 96))])
def test_a_phones_video_stands_upright(tmp_path: Path, turn: int, size: tuple[int, int]):
    """Taken from a file whose header is given a rotation as phones write it."""
    upright = boxes(4, *size)
    lying = np.ascontiguousarray(np.rot90(upright, -turn // 90, axes=(1, 2)))
    path = rotated(write(tmp_path / "a.mp4", lying, 8), turn)
    info = check_video_decodes(path)
    assert (info.width, info.height) == size
    (frame,) = first_frames(path, size, 1, 8)
    assert np.abs(frame.astype(int) - upright[0]).mean() < 6


def rotated(path: Path, turn: int) -> Path:
    """With the display matrix in the track's header set to `turn` degrees counterclockwise (ISO 14496-12, 8.3.2)."""
    one = 0x10000
    matrix = {90: (0, -one, one, 0), 180: (-one, 0, 0, -one), 270: (0, one, -one, 0)}[turn]
    plain, turned = (one, 0, 0, one), matrix
    parts = [b"".join(n.to_bytes(4, "big", signed=True) for n in (*m[:2], 0, *m[2:], 0)) for m in (plain, turned)]
    content = path.read_bytes()
    at = content.index(parts[0], content.index(b"tkhd"))
    path.write_bytes(content[:at] + parts[1] + content[at + len(parts[1]) :])
    return path


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (VideoLimits(seconds=0.5), "longer than the 0.5 seconds"),
        (VideoLimits(frames=10), "more than the 10 frames"),
        (VideoLimits(pixels=1_000), "96 x 64: more than the 1,000 pixels"),
        (VideoLimits(shortest_side=65), "a side needs 65 pixels"),
    ],
)
def test_limits(tmp_path: Path, limits: VideoLimits, words: str):
    path = write(tmp_path / "a.mp4", boxes(20, 96, 64), 16)
    with pytest.raises(InvalidInput, match=words):
        check_video_decodes(path, limits)


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 5_000, b"RIFF\0\0\0\0AVI LIST"])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(InvalidInput):
        check_video_decodes(tmp_path / "a.mp4")


def test_a_playlist_reads_no_other_file(tmp_path: Path):
    secret = write(tmp_path / "secret.mp4", boxes(4, 96, 64), 8)
    playlists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "a.mp4": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInput):
            check_video_decodes(tmp_path / name)


def test_a_sound_file_and_a_picture_are_no_videos(tmp_path: Path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="stereo")
        container.mux(stream.encode(tone(0, 4_800)))
        container.mux(stream.encode(None))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name in ("a.mp4", "a.png"):
        with pytest.raises(InvalidInput):
            check_video_decodes(tmp_path / name)


def test_a_truncated_video_is_refused_or_read_as_far_as_it_goes(tmp_path: Path):
    path = write(tmp_path / "a.mp4", boxes(40, 96, 64), 16)  # moov at the end
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidInput):
        check_video_decodes(path)


def test_reading_a_long_video_takes_little_memory(tmp_path: Path):
    """600 frames of 640 x 480 are 553 MB; the last 17 at a small size, and extending it, take a tenth of that."""
    still = np.zeros((1, 480, 640, 3), np.uint8).repeat(8, 0)
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for n in range(600):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still[n % 8], format="rgb24")))
        container.mux(stream.encode(None))
    code = f"""
import resource
from pathlib import Path
import numpy as np
from pipelines.media.video_writer import VideoOutput
from pipelines.media.video import last_frames
path = Path({str(path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frames = last_frames(path, (160, 120), 17, 16)
VideoOutput(np.stack(frames), 16, after=path).save(path.with_name("out.mp4"), lambda *step: None)
print(len(frames), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 17
    assert grown_mib < 150


def test_pictures_cover_a_size_and_what_is_transparent_is_white(tmp_path: Path):
    picture = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (50, 0, 150, 50))
    picture.save(tmp_path / "a.png")
    covering = open_covering(tmp_path / "a.png", (64, 64))
    assert (covering.size, covering.getpixel((32, 10)), covering.getpixel((32, 50))) == (
        (64, 64),
        (255, 0, 0),
        (255, 255, 255),
    )


def test_a_poster_is_named_as_its_video(tmp_path: Path):
    assert poster_path(tmp_path / "a1.mp4").name == "a1.jpg"
