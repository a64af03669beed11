"""The released loop as training: inversion by the network in training, at every step, on the released grid."""

import hashlib
from pathlib import Path

import torch

from benchmarks.evidence.conditions import HOUR
from benchmarks.online import OnlineLoop
from inpo.common.models import open_model
from inpo.common.pairs import Pair, decode_image, open_source, prepare_image
from inpo.precompute.encode import ImageEncoder, TextEncoder


def train_online(
    output: Path, *, source: str, learning_rate: float, beta: float, steps: int, batch: int, seed: int
) -> None:
    """Train the base with online inversion and write a pipeline folder. Win and lose as the labels say."""
    model = open_model(HOUR.base)
    device = torch.device("cpu")
    network = model.load_network().train()
    loop = OnlineLoop(
        trained=model.denoiser(network),
        reference=model.denoiser(model.load_network().requires_grad_(False).eval()),
        images=ImageEncoder(model.load_vae(), model.family, vae_dtype="float32", sample=False, seed=0, device=device),
        text=TextEncoder(model.load_text_pipeline(), model.family, device=device),
        optimizer=torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2),
        beta=beta,
    )
    pairs = _training_pairs(source)
    torch.manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(pairs)).tolist()
        chosen, order = [pairs[row] for row in order[:batch]], order[batch:]
        pixels = torch.stack([torch.stack([_levels(pair.win), _levels(pair.lose)]) for pair in chosen])
        loop.inpo_step(pixels, [pair.prompt for pair in chosen])
        if step % 10 == 0:
            print(f"online: step {step} of {steps}", flush=True)
    pipeline = model.load_pipeline()
    pipeline.unet.load_state_dict(network.state_dict())
    pipeline.save_pretrained(output)


def _training_pairs(source: str) -> list[Pair]:
    """All pairs but a twentieth, by a hash of the prompt, as many as the cached runs train on."""
    found = []
    for shard in open_source(source).input_shards():
        for item in shard.rows(0, shard.num_rows):
            if isinstance(item, Pair) and hashlib.blake2b(item.prompt.encode()).digest()[0] >= 256 / 20:
                found.append(item)
    return found


def _levels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(prepare_image(decode_image(data), resolution=(32, 32), crop="center", flip=False).levels)
