"""For each model and workflow that fal runs: what a caller sends, and what must reach fal, where. A line to each.

In `sent`, IMAGE, VIDEO and AUDIO stand for the input files; in `reaches`, `data:` and `upload:` say how they travel.
"""

from dataclasses import dataclass
from typing import Any

IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<audio>"
DATA, UPLOADED, UPLOADED_VIDEO, UPLOADED_AUDIO = "data:png", "upload:png", "upload:mp4", "upload:wav"

SQUARE, WIDE, TALL = {"aspectRatio": "1:1"}, {"aspectRatio": "16:9"}, {"aspectRatio": "9:16"}
STEPS = {"numInferenceSteps": 12, "guidanceScale": 2.5}
STEPS_THERE = {"num_inference_steps": 12, "guidance_scale": 2.5}
NOT = {"negativePrompt": "fog"}
NOT_THERE = {"negative_prompt": "fog"}
LIPS = {"videoUrl": VIDEO, "audioUrl": AUDIO}
LIPS_THERE = {"video_url": UPLOADED_VIDEO, "audio_url": UPLOADED_AUDIO}
TWO = {"imageUrls": [IMAGE, IMAGE]}


@dataclass(frozen=True)
class Case:
    model: str
    workflow: str
    sent: dict[str, Any]
    endpoint: str
    reaches: dict[str, Any]
    prompt: bool = True
    """Whether the prompt reaches fal as well."""
    ignored: str = ""


def size(width: int, height: int) -> dict[str, int]:
    return {"width": width, "height": height}


SEEDREAM = "fal-ai/bytedance/seedream"
SEEDANCE = "fal-ai/bytedance/seedance/v1.5/pro"
KLING = "fal-ai/kling-video/v1.6/pro"

CASES = [
    # Flux
    Case("flux-schnell", "text-to-image", {**WIDE, **STEPS, "seed": 7, "outputFormat": "jpeg"},
         "fal-ai/flux/schnell", {"image_size": "landscape_16_9", **STEPS_THERE, "seed": 7, "output_format": "jpeg"}),
    Case("flux-dev", "text-to-image", {"aspectRatio": "3:2", **STEPS, "seed": 7},
         "fal-ai/flux/dev", {"image_size": size(1248, 832), **STEPS_THERE, "seed": 7}),
    Case("flux-dev", "image-to-image", {"imageUrl": IMAGE, "strength": 0.6, **STEPS, "seed": 7},
         "fal-ai/flux/dev/image-to-image", {"image_url": DATA, "strength": 0.6, **STEPS_THERE, "seed": 7}),
    Case("flux-dev", "image-to-image", {"imageUrl": IMAGE, **WIDE},
         "fal-ai/flux/dev/image-to-image", {"image_url": DATA}, ignored="aspectRatio"),
    Case("flux-kontext", "text-to-image", {"aspectRatio": "21:9", "guidanceScale": 2.5, "seed": 7},
         "fal-ai/flux-pro/kontext/text-to-image", {"aspect_ratio": "21:9", "guidance_scale": 2.5, "seed": 7}),
    Case("flux-kontext", "image-to-image", {"imageUrl": IMAGE, "aspectRatio": "4:5", **STEPS, "seed": 7},
         "fal-ai/flux-kontext/dev", {"image_url": DATA, "resolution_mode": "4:5", **STEPS_THERE, "seed": 7}),
    Case("flux-kontext", "style-transfer", {"imageUrl": IMAGE, "workflow": "style-transfer"},
         "fal-ai/flux-kontext/dev", {"image_url": DATA}),
    Case("flux-kontext", "style-transfer", {**TWO, **TALL, "workflow": "style-transfer"},
         "fal-ai/flux-pro/kontext/multi", {"image_urls": [DATA, DATA], "aspect_ratio": "9:16"}),
    Case("flux-pro", "text-to-image", {**SQUARE, "seed": 7, "outputFormat": "png"},
         "fal-ai/flux-pro/v1.1", {"image_size": "square_hd", "seed": 7, "output_format": "png"}),
    Case("flux-pro", "text-to-image", {**STEPS, **NOT},
         "fal-ai/flux-pro/v1.1", {}, ignored="guidanceScale, negativePrompt, numInferenceSteps"),
    Case("flux-pro", "image-to-image", {"imageUrl": IMAGE, **TALL, "seed": 7},
         "fal-ai/flux-pro/v1.1/redux", {"image_url": DATA, "image_size": "portrait_16_9", "seed": 7}),
    # Seedream
    Case("seedream-4.0", "text-to-image", {**WIDE, "seed": 7},
         f"{SEEDREAM}/v4/text-to-image", {"image_size": size(2560, 1440), "seed": 7}),
    Case("seedream-4.0", "image-to-image", {**TWO, "seed": 7},
         f"{SEEDREAM}/v4/edit", {"image_urls": [DATA, DATA], "seed": 7}),
    Case("seedream-4.0", "style-transfer", {"imageUrl": IMAGE, "workflow": "style-transfer", **TALL},
         f"{SEEDREAM}/v4/edit", {"image_urls": [DATA], "image_size": size(1440, 2560)}),
    Case("seedream-4.5", "text-to-image", {**SQUARE, "seed": 7},
         f"{SEEDREAM}/v4.5/text-to-image", {"image_size": size(2048, 2048), "seed": 7}),
    Case("seedream-4.5", "image-to-image", {"imageUrl": IMAGE, "seed": 7},
         f"{SEEDREAM}/v4.5/edit", {"image_urls": [DATA], "seed": 7}),
    Case("seedream-4.5", "style-transfer", {**TWO, "workflow": "style-transfer", "seed": 7},
         f"{SEEDREAM}/v4.5/edit", {"image_urls": [DATA, DATA], "seed": 7}),
    # GPT Image, Recraft, Ideogram
    Case("gpt-image-1.5", "text-to-image", {**WIDE, "outputFormat": "webp"},
         "fal-ai/gpt-image-1.5", {"image_size": "1536x1024", "output_format": "webp"}),
    Case("gpt-image-1.5", "image-to-image", {"imageUrl": IMAGE, **TALL, "seed": 7},
         "fal-ai/gpt-image-1.5/edit", {"image_urls": [UPLOADED], "image_size": "1024x1536"}, ignored="seed"),
    Case("gpt-image-1.5", "style-transfer", {**TWO, "workflow": "style-transfer"},
         "fal-ai/gpt-image-1.5/edit", {"image_urls": [UPLOADED, UPLOADED]}),
    Case("recraft-v3", "text-to-image", {"aspectRatio": "4:3"},
         "fal-ai/recraft/v3/text-to-image", {"image_size": "landscape_4_3"}),
    Case("recraft-v3", "image-to-image", {"imageUrl": IMAGE, "strength": 0.3, **NOT},
         "fal-ai/recraft/v3/image-to-image", {"image_url": UPLOADED, "strength": 0.3, **NOT_THERE}),
    Case("ideogram-v3", "text-to-image", {"aspectRatio": "3:4", **NOT, "seed": 7},
         "fal-ai/ideogram/v3", {"image_size": "portrait_4_3", **NOT_THERE, "seed": 7}),
    Case("ideogram-v3", "image-to-image", {"imageUrl": IMAGE, "strength": 0.4},
         "fal-ai/ideogram/v3/remix", {"image_url": UPLOADED}, ignored="strength"),
    Case("ideogram-v3", "style-transfer", {**TWO, "workflow": "style-transfer", **SQUARE},
         "fal-ai/ideogram/v3", {"image_urls": [UPLOADED, UPLOADED], "image_size": "square_hd"}),
    # Wan, LTX
    Case("wan-2.1", "text-to-video", {**TALL, "duration": 5, "resolution": "720p", **NOT, "seed": 7},
         "fal-ai/wan-t2v", {"aspect_ratio": "9:16", "num_frames": 81, "resolution": "720p", **NOT_THERE, "seed": 7}),
    Case("wan-2.1", "image-to-video", {"imageUrl": IMAGE, **SQUARE, "duration": 6, **STEPS},
         "fal-ai/wan-i2v", {"image_url": DATA, "aspect_ratio": "1:1", "num_frames": 97, "num_inference_steps": 12,
                            "guide_scale": 2.5}),
    Case("wan-2.1", "image-to-video", {**TWO, "fps": 24},
         "fal-ai/wan-flf2v", {"start_image_url": DATA, "end_image_url": DATA}, ignored="fps"),
    Case("wan-2.1", "reference-to-video", {**TWO, "workflow": "reference-to-video", "duration": 5, "seed": 7},
         "fal-ai/wan-vace-14b", {"ref_image_urls": [DATA, DATA], "num_frames": 81, "seed": 7}),
    Case("wan-2.1", "reference-to-video", {"videoUrl": VIDEO, "workflow": "reference-to-video"},
         "fal-ai/wan-vace-14b", {"video_url": UPLOADED_VIDEO}),
    Case("wan-2.1", "lip-sync", LIPS, "fal-ai/latentsync", LIPS_THERE, prompt=False, ignored="prompt"),
    Case("ltx-video", "text-to-video", {**NOT, **STEPS, "seed": 7, "duration": 5},
         "fal-ai/ltx-video", {**NOT_THERE, **STEPS_THERE, "seed": 7}, ignored="duration"),
    Case("ltx-video", "image-to-video", {"imageUrl": IMAGE, "seed": 7},
         "fal-ai/ltx-video/image-to-video", {"image_url": DATA, "seed": 7}),
    Case("ltx-video", "extend", {"videoUrl": VIDEO, "duration": 4, "seed": 7, "resolution": "480p"},
         "fal-ai/ltxv-13b-098-distilled/extend",
         {"video": {"video_url": UPLOADED_VIDEO}, "num_frames": 97, "seed": 7, "resolution": "480p"}),
    Case("ltx-video", "lip-sync", {**LIPS, "seed": 7, "guidanceScale": 1.5},
         "fal-ai/latentsync", {**LIPS_THERE, "seed": 7, "guidance_scale": 1.5}, prompt=False, ignored="prompt"),
    # Kling, MiniMax
    Case("kling-1.6", "text-to-video", {**WIDE, "duration": 10, **NOT, "seed": 7},
         f"{KLING}/text-to-video", {"aspect_ratio": "16:9", "duration": "10", **NOT_THERE}, ignored="seed"),
    Case("kling-1.6", "image-to-video", {"imageUrl": IMAGE, "duration": 5},
         f"{KLING}/image-to-video", {"image_url": UPLOADED, "duration": "5"}),
    Case("kling-1.6", "image-to-video", {**TWO},
         f"{KLING}/image-to-video", {"image_url": UPLOADED, "tail_image_url": UPLOADED}),
    Case("kling-1.6", "reference-to-video", {**TWO, "workflow": "reference-to-video", **SQUARE, "duration": 5},
         f"{KLING}/elements", {"input_image_urls": [UPLOADED, UPLOADED], "aspect_ratio": "1:1", "duration": "5"}),
    Case("kling-1.6", "lip-sync", LIPS,
         "fal-ai/kling-video/lipsync/audio-to-video", LIPS_THERE, prompt=False, ignored="prompt"),
    Case("minimax-video", "text-to-video", {"duration": 6, **WIDE},
         "fal-ai/minimax/video-01", {}, ignored="aspectRatio, duration"),
    Case("minimax-video", "image-to-video", {"imageUrl": IMAGE},
         "fal-ai/minimax/video-01/image-to-video", {"image_url": UPLOADED}),
    Case("minimax-video", "reference-to-video", {"imageUrl": IMAGE, "workflow": "reference-to-video"},
         "fal-ai/minimax/video-01-subject-reference", {"subject_reference_image_url": UPLOADED}),
    Case("minimax-video", "lip-sync", LIPS, "fal-ai/sync-lipsync/v2", LIPS_THERE, prompt=False, ignored="prompt"),
    # Sora, Veo, Seedance
    Case("sora-2", "text-to-video", {**TALL, "duration": 8, "resolution": "720p"},
         "fal-ai/sora-2/text-to-video", {"aspect_ratio": "9:16", "duration": "8", "resolution": "720p"}),
    Case("sora-2", "image-to-video", {"imageUrl": IMAGE, "duration": 4},
         "fal-ai/sora-2/image-to-video", {"image_url": UPLOADED, "duration": "4"}),
    Case("sora-2", "lip-sync", LIPS, "fal-ai/sync-lipsync/v2", LIPS_THERE, prompt=False, ignored="prompt"),
    Case("veo-3.1", "text-to-video", {**WIDE, "duration": 8, "resolution": "1080p", **NOT, "seed": 7},
         "fal-ai/veo3.1", {"aspect_ratio": "16:9", "duration": "8s", "resolution": "1080p", **NOT_THERE, "seed": 7}),
    Case("veo-3.1", "image-to-video", {"imageUrl": IMAGE, "duration": 6},
         "fal-ai/veo3.1/image-to-video", {"image_url": UPLOADED, "duration": "6s"}),
    Case("veo-3.1", "image-to-video", {**TWO, "duration": 4},
         "fal-ai/veo3.1/first-last-frame-to-video",
         {"first_frame_url": UPLOADED, "last_frame_url": UPLOADED, "duration": "4s"}),
    Case("veo-3.1", "reference-to-video", {**TWO, "workflow": "reference-to-video", "seed": 7, "duration": 8},
         "fal-ai/veo3.1/reference-to-video", {"image_urls": [UPLOADED, UPLOADED], "duration": "8s"}, ignored="seed"),
    Case("veo-3.1", "extend", {"videoUrl": VIDEO, "duration": 7, "resolution": "720p"},
         "fal-ai/veo3.1/extend-video", {"video_url": UPLOADED_VIDEO, "duration": "7s", "resolution": "720p"}),
    Case("veo-3.1", "lip-sync", LIPS, "fal-ai/sync-lipsync/v2", LIPS_THERE, prompt=False, ignored="prompt"),
    Case("seedance-1.5", "text-to-video", {"aspectRatio": "21:9", "duration": 12, "resolution": "480p", "seed": 7},
         f"{SEEDANCE}/text-to-video", {"aspect_ratio": "21:9", "duration": "12", "resolution": "480p", "seed": 7}),
    Case("seedance-1.5", "image-to-video", {**TWO, "duration": 4},
         f"{SEEDANCE}/image-to-video", {"image_url": UPLOADED, "end_image_url": UPLOADED, "duration": "4"}),
    Case("seedance-1.5", "lip-sync", LIPS, "fal-ai/sync-lipsync/v2", LIPS_THERE, prompt=False, ignored="prompt"),
    # Upscaling and backgrounds
    Case("realesrgan-x4plus", "upscale", {"imageUrl": IMAGE, "scale": 4, "outputFormat": "jpeg"},
         "fal-ai/esrgan", {"image_url": DATA, "scale": 4, "output_format": "jpeg"}, prompt=False),
    Case("u2netp", "remove-bg", {"imageUrl": IMAGE}, "fal-ai/imageutils/rembg", {"image_url": DATA}, prompt=False),
    Case("birefnet-general", "remove-bg", {"imageUrl": IMAGE}, "fal-ai/birefnet", {"image_url": DATA}, prompt=False),
]  # fmt: skip
