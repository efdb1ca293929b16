"""The training loop of the demo weights: it learns, and goes on where it was broken off as if it had not been."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from scripts.demo.training import learn

STEPS = 260
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A block of kernels and matrices, and layers around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(128, 16))
        self.last = nn.Linear(16, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.last(self.block(self.first(x)))


def mean_of(net: nn.Module, until: int = STEPS) -> Callable[[int], torch.Tensor]:
    """The loss of a net that tells the mean of each channel; it breaks off before step `until`."""

    def loss_of(step: int) -> torch.Tensor:
        if step == until:
            raise KeyboardInterrupt
        x = torch.randn(16, 2, 4, 4)
        return (net(x) - x.mean(dim=(2, 3))).square().mean()

    return loss_of


def trained(folder: Path, muon: bool, breaks: tuple[int, ...] = ()) -> nn.Module:
    for until in (*breaks, STEPS):
        torch.manual_seed(1)
        net = Net()
        try:
            average = learn("net", net, mean_of(net, until), STEPS, 5e-3, folder, torch.float32, muon)
        except KeyboardInterrupt:
            continue
    return average


@pytest.mark.parametrize("muon", [True, False])
def test_it_learns(tmp_path: Path, muon: bool):
    begun = float(mean_of(Net())(0).detach())
    average = trained(tmp_path, muon)
    assert not average.training
    torch.manual_seed(0)
    assert float(mean_of(average)(0)) < begun / 10


@pytest.mark.parametrize("muon", [True, False])
def test_a_run_that_was_broken_off_ends_where_a_whole_one_does(tmp_path: Path, muon: bool):
    whole, broken = trained(tmp_path / "a", muon), trained(tmp_path / "b", muon, breaks=(150, 230, 230))
    for (name, one), (_, other) in zip(whole.state_dict().items(), broken.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_learned_already_is_not_learned_again(tmp_path: Path):
    first = trained(tmp_path, muon=True)
    net = Net()
    again = learn("net", net, mean_of(net, until=0), STEPS, 5e-3, tmp_path, muon=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
