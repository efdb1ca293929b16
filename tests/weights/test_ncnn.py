"""ncnn's files to safetensors: names, shapes and both ways of storing; and the real networks, on a photo."""

import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from pipelines.catalog.reader import load_catalog
from pipelines.weights.installed import Installed
from pipelines.weights.ncnn import FP16, FP32, convert, rrdb_names
from pipelines.weights.pull import pull

HERE = Path(__file__).parents[2] / "data" / "weights"
NETWORKS = ["realesrgan-x4plus", "realesrgan-x4plus-anime", "realesr-animevideov3"]


def convolution(outputs: int, inputs: int, kernel: int = 3) -> str:
    weights = outputs * inputs * kernel * kernel
    return f"Convolution c 1 1 in out 0={outputs} 1={kernel} 4=1 5=1 6={weights} 9=2 -23310=1,2.000000e-01"


def stored(weights: np.ndarray, flag: int) -> bytes:
    data = weights.astype("<f4" if flag == FP32 else "<f2").tobytes()
    return struct.pack("<I", flag) + data + bytes(-len(data) % 4)


def graph(*layers: str) -> str:
    return "\n".join(["7767517", f"{len(layers)} 1", *layers])


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 8


@pytest.mark.parametrize("flag", [FP32, FP16])
def test_a_compact_network(flag: int):
    weights, bias, slopes = numbers(1, 3, 3, 3), numbers(1) + 5, numbers(1) - 7  # 27 halves: padded to 56 bytes
    param = graph("Input in 0 1 data", convolution(1, 3), "PReLU p 1 1 a b 0=1", convolution(1, 1, 1))
    last = stored(numbers(1, 1, 1, 1), flag) + numbers(1).tobytes()
    data = stored(weights, flag) + bias.tobytes() + slopes.tobytes() + last
    tensors = load(convert(param, data))
    assert convert(param, data) == convert(param, data)
    assert sorted(tensors) == ["body.0.bias", "body.0.weight", "body.1.weight", "body.2.bias", "body.2.weight"]
    np.testing.assert_array_equal(tensors["body.0.weight"], weights)
    np.testing.assert_array_equal(tensors["body.0.bias"], bias)
    np.testing.assert_array_equal(tensors["body.1.weight"], slopes)


def test_the_names_of_a_network_with_one_block():
    names = list(rrdb_names(15 + 6))
    assert names[:3] == ["conv_first", "body.0.rdb1.conv1", "body.0.rdb1.conv2"]
    assert names[-6:] == ["body.0.rdb3.conv5", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    assert len(names) == len(set(names)) == 21


def test_weights_of_another_graph_are_refused():
    data = stored(numbers(1, 3, 3, 3), FP32) + numbers(1).tobytes()
    with pytest.raises(ValueError, match="end at byte"):
        convert(graph(convolution(1, 3)), data + b"more")
    with pytest.raises(ValueError, match="storage flag"):
        convert(graph(convolution(1, 3)), b"\x01" + data[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_photo_enlarged_and_reduced_again_is_the_photo(name: str, tmp_path: Path):
    """Over 30 dB. Takes the networks that `scripts/serve` has pulled; pulls them where it has not."""
    import torch
    from skimage.data import chelsea
    from spandrel import ModelLoader

    model = load_catalog().find(name)
    root = HERE if Installed(HERE).weights(model) else tmp_path
    pull(model, root)
    network = ModelLoader().load_from_file(root / name / f"{name}.safetensors")
    photo = torch.from_numpy(chelsea()[100:140, 180:220].copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        reduced = torch.nn.functional.avg_pool2d(network(photo), 4)
    assert network.scale == 4
    assert 10 * torch.log10(1 / (reduced - photo).square().mean()) > 30
