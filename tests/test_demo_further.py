"""What the demo's transformers learn from, and that those that are shipped can be trained on."""

import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn

from scripts import train_demo
from scripts.demo import flux, ltx, wan
from scripts.demo.denoise import weights_of_some
from scripts.demo.hints import CELLS, NAMED, Hinted
from scripts.demo.moving import CLIP_HALF, clips_to_learn_from, draw_clip
from scripts.demo.world import ATTRIBUTES, Scene
from server.settings import PROJECT

DEMO = PROJECT / "weights/demo"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_chosen_gain_three_quarters_of_the_whole_however_few_they_are():
    chosen = torch.zeros(2, 40, dtype=torch.bool)
    chosen[0, :2] = chosen[1, :20] = True
    weights = weights_of_some(chosen)
    assert weights.sum(dim=1).tolist() == pytest.approx([70, 70])
    assert weights[~chosen].unique().tolist() == [1]
    assert weights_of_some(chosen & False).unique().tolist() == [1], "none is chosen"


class Told(nn.Module):
    """Tells what it is given: as if a block's states were the answers."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


def hints(wrong: tuple[slice, slice] | None = None) -> float:
    """The loss of one who knows the middle of an 8 x 8 token canvas to be covered, but for some `wrong` tokens."""
    cells = torch.zeros(1, 1, 8 * CELLS, 8 * CELLS)
    cells[..., 10:22, 10:22] = 1
    logits = (cells * 2 - 1) * 20
    if wrong:
        rows, columns = (slice(each.start * CELLS, each.stop * CELLS) for each in wrong)
        logits[..., rows, columns] *= -1
    along = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij"), dim=-1)
    cut = logits.unflatten(3, (-1, CELLS)).unflatten(2, (-1, CELLS)).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(1, 3)
    hinted = Hinted(nn.Identity(), [], 1)
    hinted.asked = nn.ModuleList([Told()])
    return float(hinted.loss([torch.cat([along.flatten(0, 1)[None], cut], dim=-1)], cells))


def test_hints_ask_for_what_is_covered_and_most_of_all_at_edges():
    edge, plain = (slice(2, 3), slice(3, 4)), (slice(0, 1), slice(0, 1))
    assert hints() < 1e-6
    assert hints(edge) > 3 * hints(plain) > 0.1


@pytest.mark.parametrize("known", [0, 1, 17])
def test_clips_from_words_begin_at_the_first_stop_and_those_that_go_on_anywhere(known: int):
    frames = range(0, 17, 8)
    scenes, clips, cells = clips_to_learn_from(6, Random(3), 128, 128, frames, known, known > 1, 4)
    assert (clips.shape, cells.shape) == ((6, 3, 17, 128, 128), (6, 3, 32, 32))
    starts = [draw_clip(scene, 128, 128, 17) for scene in scenes]
    at_first = [torch.equal(clip, start) for clip, start in zip(clips, starts, strict=True)]
    assert all(at_first) if not known else not all(at_first)
    for clip, covered in zip(clips, cells, strict=True):
        away = (clip[:, list(frames)] - clip[:, :1, :1, :1]).abs().amax(dim=0) > 0.1
        assert (away.float().mean() - covered.mean()).abs() < 0.03, f"of a canvas of {2 * CLIP_HALF} pixels"


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scenes to learn from, few in a batch."""
    monkeypatch.setattr(flux, "BATCH", 2)
    monkeypatch.setattr(flux, "SQUARE_POOL", 2)
    monkeypatch.setattr(flux, "POOL", 2)
    for family in (ltx, wan):
        monkeypatch.setattr(family, "POOLS", {})
        monkeypatch.setattr(family, "POOL", family.DRAWN)


def sums(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_a_deeper_flux_does_the_same_until_it_learns():
    begun = FluxTransformer2DModel.from_pretrained(DEMO / "flux/transformer", dtype=torch.float32)
    deeper = flux.deepened(begun, len(begun.transformer_blocks) + 2)
    assert deeper.config.num_layers == begun.config.num_layers + 2
    torch.manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 64, begun.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 16, begun.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, begun.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }
    with torch.no_grad():
        assert torch.equal(deeper(**given).sample, begun(**given).sample)
    deeper(**given).sample.square().mean().backward()
    assert deeper.transformer_blocks[0].ff.net[2].weight.grad.abs().max() > 0


def test_edits_are_learned_from_both_ways_round():
    vae = AutoencoderKL.from_pretrained(DEMO / "flux/vae", dtype=torch.float32)
    pool, random = flux.Pool(vae, (2, 2), 6, Random(0)), Random(1)
    pool.edits[:2] = [
        flux.Edit(Scene(), "size", Scene(size="small")),
        flux.Edit(Scene(), "colour", Scene(colour="blue")),
    ]
    pool.before, pool.after = pool.encoded(pool.edits)
    kept = list(pool.edits)
    seen = set()
    for _ in range(8):
        edits, before, after = pool.some(6, random)
        for picture, scenes in ((before, [each.before for each in edits]), (after, [each.after for each in edits])):
            torch.testing.assert_close(picture, pool.encode(scenes), atol=1e-3, rtol=1e-3)
        seen |= set(edits)
    assert {kept[1], kept[1].turned()} <= seen
    assert kept[0].turned() not in seen, "no words ask for something medium"


def test_words_are_asked_for_the_names_of_what_is_drawn_where_something_is_said():
    block = nn.Identity()
    hinted = Hinted(nn.Sequential(block), [], 39, naming=block)
    nn.init.eye_(hinted.asked_names.weight)
    nn.init.zeros_(hinted.asked_names.bias)
    scenes = [Scene(), Scene(shape="star", colour="blue")]
    places = [sum(len(ATTRIBUTES[each]) for each in NAMED[:n]) for n in range(len(NAMED))]
    told = torch.zeros(2, 3, 39)
    for before, name in zip(places, NAMED, strict=True):
        told[0, :, before + ATTRIBUTES[name].index(getattr(scenes[0], name))] = 30
    assert hinted.naming_loss([told], scenes, torch.tensor([True, False])) < 1e-6
    assert 1.0 < hinted.naming_loss([told], scenes, torch.tensor([True, True])) < 1.5
    assert hinted.naming_loss([told], scenes, torch.tensor([False, False])) == 0
    with hinted.listening_to_words() as words:
        block((told, "of the picture"))
    assert words == [told]


@pytest.mark.parametrize("family", train_demo.FURTHER)
def test_what_is_shipped_is_trained_further(little: None, tmp_path: Path, family: str):
    """Of all its files the transformer's weights change, and no other."""
    shutil.copytree(DEMO / family, tmp_path / "out" / family)
    train_demo.train_further(family, 2, tmp_path / "work", tmp_path / "out")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out" / family, check=True)
    before, after = sums(DEMO / family), sums(tmp_path / "out" / family)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert changed == ["transformer/diffusion_pytorch_model.safetensors"]
    assert not [*(tmp_path / "work").rglob("*further.pt")], "the next one begins with what this one wrote"
