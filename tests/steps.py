"""One training step of a real network, and the most that it holds."""

import torch

from inpo.common.cache.derive import mean_square
from inpo.common.memory import bytes_of
from inpo.common.models import Model
from inpo.common.tensor_watch import TensorWatch
from inpo.train.optim import build_optimizer, prepare_network
from inpo.train.settings import TrainSettings


def step_peak(
    network: torch.nn.Module,
    model: Model,
    settings: TrainSettings,
    *,
    device: torch.device,
    dtype: str,
    images: int,
    side: int,
) -> int:
    """Bytes, weights and optimiser included, of the second step: the first one makes the optimiser's state."""
    trained = prepare_network(network, model.family, settings, network_dtype=dtype, device=device)
    network.to(device)
    optimizer = build_optimizer(trained, settings, network_dtype=dtype)
    channels = model.config("vae")["latent_channels"]
    blank = model.family.blank(model.config, images, (8 * side, 8 * side)).to(device)

    def step() -> None:
        x = torch.zeros(images, channels, side, side, device=device)
        with torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            output = model.family.call(network, x, torch.zeros(images, device=device), blank)
        mean_square(torch.zeros_like(x) - output.float()).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    resident = bytes_of(network.parameters()) + bytes_of(network.buffers()) + bytes_of(iter(state))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return resident + torch.cuda.max_memory_allocated() - before
    with TensorWatch() as watch:
        step()
    return resident + watch.peak
