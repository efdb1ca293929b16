"""What the demo's transformers learn from, and that those that are shipped can be trained on."""

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, LTXVideoTransformer3DModel
from torch import nn

from scripts.demo import flux, train
from scripts.demo import ltx as demo_ltx
from scripts.demo import wan as demo_wan
from scripts.demo.auxiliary_losses import CELLS, NAME_WEIGHT, NAMED, Hinted
from scripts.demo.grow import deepened
from scripts.demo.losses import weights_of_some
from scripts.demo.motion import CLIP_HALF, clips_to_learn_from, draw_clip
from scripts.demo.scenes import ATTRIBUTES, COLOURS, FAR, Scene, nameless_colour, rgb
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
    """Few scenes to learn from, few in a batch, pictures of 64 x 64 pixels and clips of 9 frames."""
    monkeypatch.setattr(flux, "BATCH", 2)
    monkeypatch.setattr(flux, "SQUARE_POOL", 6)
    monkeypatch.setattr(flux, "POOL", 6)
    monkeypatch.setattr(flux, "SQUARE", (2, 2))
    monkeypatch.setattr(flux, "GRIDS", ((2, 2),))
    for family, clip in ((demo_ltx, (2, 8, 8)), (demo_wan, (3, 16, 16))):
        monkeypatch.setattr(family, "CLIP", clip)
        monkeypatch.setattr(family, "SHAPES", (clip,))
        monkeypatch.setattr(family, "POOLS", {})
        monkeypatch.setattr(family, "POOL", family.DRAWN)


def sums(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


FLUX_INPUTS = {
    "hidden_states": torch.randn(1, 64, 64), "encoder_hidden_states": torch.randn(1, 16, 64),
    "pooled_projections": torch.randn(1, 64), "timestep": torch.tensor([0.5]),
    "img_ids": torch.rand(64, 3), "txt_ids": torch.zeros(16, 3),
}  # fmt: skip
LTX_INPUTS = {
    "hidden_states": torch.randn(1, 64, 48), "encoder_hidden_states": torch.randn(1, 16, 64),
    "encoder_attention_mask": torch.ones(1, 16), "timestep": torch.tensor([500.0]),
    "video_coords": torch.rand(1, 3, 64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family", "at", "given"),
    [
        (FluxTransformer2DModel, "flux", 0, FLUX_INPUTS),
        (FluxTransformer2DModel, "flux", 2, FLUX_INPUTS),
        (LTXVideoTransformer3DModel, "ltx", 4, LTX_INPUTS),
    ],
)
def test_a_deeper_transformer_does_the_same_until_it_learns(
    kind: Any, family: str, at: int, given: dict[str, torch.Tensor]
):
    begun = kind.from_pretrained(DEMO / family / "transformer", dtype=torch.float32)
    deeper = deepened(begun, "num_layers", at, len(begun.transformer_blocks) + 2)
    assert deeper.config.num_layers == begun.config.num_layers + 2
    with torch.no_grad():
        assert torch.equal(deeper(**given).sample, begun(**given).sample)
    deeper(**given).sample.square().mean().backward()
    for new in (at, at + 1):
        assert deeper.transformer_blocks[new].ff.net[2].weight.grad.abs().max() > 0


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


def test_nameless_colours_are_far_from_all_that_have_a_name():
    random = Random(2)
    for _ in range(50):
        colour = nameless_colour(random)
        other = nameless_colour(random, unlike=(colour,))
        assert min((rgb(colour) - rgb(each)).norm() for each in (*COLOURS, other)) > FAR


def test_edits_of_nameless_pictures_ask_only_for_what_has_a_name():
    edits = [flux.random_edit(Random(seed)) for seed in range(400)]
    nameless = [each for each in edits if not each.named]
    assert 0.15 < len(nameless) / len(edits) < 0.35
    assert {each.name for each in nameless} == {"shape", "colour", "size", "place", "background"}
    for edit in nameless:
        both = edit, *([edit.turned()] if edit.can_turn else [])
        assert all(getattr(each.after, each.name) in ATTRIBUTES[each.name] for each in both)
        differ = {name for name in ATTRIBUTES if getattr(edit.before, name) != getattr(edit.after, name)}
        assert differ == {edit.name}


def test_only_pictures_in_named_colours_are_described():
    vae = AutoencoderKL.from_pretrained(DEMO / "flux/vae", dtype=torch.float32)
    pool, random = flux.Pool(vae, (2, 2), 12, Random(0)), Random(1)
    assert not all(each.named for each in pool.edits)
    for _ in range(5):
        assert all(each.named for each in pool.some(3, random, named=True)[0])


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
    in_no_colour = [scenes[0], replace(scenes[0], colour="#807060", background="#408080")]
    of_its_shape = [told[:1], torch.where(torch.arange(39) < 7, told[:1], 0)]
    known, guessed = (
        hinted.naming_loss([torch.cat(both)], in_no_colour, torch.tensor([True, True])).item()
        for both in (told[[0, 0]].split(1), of_its_shape)
    )
    size_and_place = math.log(len(ATTRIBUTES["size"])) + math.log(len(ATTRIBUTES["place"]))
    assert known < 1e-6 and guessed == pytest.approx(NAME_WEIGHT * size_and_place / 2, rel=1e-3)
    assert hinted.naming_loss([told], scenes, torch.tensor([False, False])) == 0
    with hinted.listening_to_words() as words:
        block((told, "of the picture"))
    assert words == [told]


@pytest.mark.parametrize("family", train.FURTHER)
def test_what_is_shipped_is_trained_further(little: None, tmp_path: Path, family: str):
    """Of all its files the transformer's weights change, and no other."""
    shutil.copytree(DEMO / family, tmp_path / "out" / family)
    train.train_further(family, 2, tmp_path / "work", tmp_path / "out")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out" / family, check=True)
    before, after = sums(DEMO / family), sums(tmp_path / "out" / family)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert changed == ["transformer/diffusion_pytorch_model.safetensors"]
    assert not [*(tmp_path / "work").rglob("*further.pt")], "the next one begins with what this one wrote"
