"""One stage of the base model's training: it may stop at any time, and learns with either optimizer."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from inpo.toyworld import stages
from inpo.toyworld.stages import StageSettings, train_stage


class Regression(nn.Module):
    """Two convolutions that are to give back what one fixed convolution makes of a picture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
        self.net.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        return (self.net(pictures) - pictures[:, :1, 1:-1, 1:-1]).square().mean()


def draw(generator: torch.Generator, count: int) -> tuple[Tensor]:
    return (torch.randn(count, 3, 8, 8, generator=generator),)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(folder: Path, draw_batch=draw, **settings) -> tuple[Regression, list[float]]:
    folder.mkdir(exist_ok=True)
    module = Regression()
    wanted = StageSettings(**{"steps": 60, "batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 5} | settings)
    report = train_stage("test", module, draw_batch, wanted, seed=0, folder=folder)
    return module, [loss for _, loss in report.loss]


@pytest.mark.parametrize("matrix_rate", [None, 0.05])
def test_a_stopped_stage_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, matrix_rate):
    monkeypatch.setattr(stages, "CHECKPOINT_EVERY", 25)
    whole, losses = trained(tmp_path / "whole", matrix_rate=matrix_rate)
    assert losses[-1] < losses[0] / 2

    drawn = []

    def until_it_breaks(generator: torch.Generator, count: int) -> tuple[Tensor]:
        drawn.append(count)
        if len(drawn) == 40:
            raise KeyboardInterrupt
        return draw(generator, count)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", until_it_breaks, matrix_rate=matrix_rate)
    on, losses_on = trained(tmp_path / "stopped", until_it_breaks, matrix_rate=matrix_rate)
    assert len(drawn) == 40 + 35  # from step 25 to step 60
    assert losses_on == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), on.parameters(), strict=True))


def test_muon_turns_a_matrix_by_its_rate_whatever_the_gradients_size(tmp_path):
    """Its step has about the same length in all of a matrix's directions: near one times the rate."""
    before = Regression()
    after, _ = trained(tmp_path, steps=1, warmup_steps=1, matrix_rate=0.03, weight_decay=0.0)
    step = (after.net[0].weight - before.net[0].weight).detach().flatten(1)
    lengths = torch.linalg.svdvals(step) / 0.03
    assert lengths.min() > 0.4
    assert lengths.max() < 1.4
