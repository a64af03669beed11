"""Training without a cache: inversion by the network in training on the released grid, or noise drawn at every step."""

import hashlib

import torch

from benchmarks.evidence import conditions as c
from benchmarks.online import OnlineLoop
from inpo.common.cache import open_cache
from inpo.common.models import open_model
from inpo.common.pairs import Pair, decode_image, open_source, prepare_image
from inpo.common.seeding import uniform
from inpo.precompute.encode import ImageEncoder, TextEncoder
from inpo.toyworld.backdrops import SIZE


def train_online(run: c.Run, kind: c.Online, beta: float) -> None:
    """Train the base and write a pipeline folder. Win and lose as the labels say, those turned that caches turn."""
    model = open_model(c.length.base)
    device = torch.device("cpu")
    network = model.load_network().train()
    # Levels, and what a prompt is cut to, are those of the method's cache.
    manifest = open_cache(str(run.method.cache.folder(run.pairs))).manifest
    loop = OnlineLoop(
        trained=model.denoiser(network, manifest),
        reference=model.denoiser(model.load_network().requires_grad_(False).eval(), manifest),
        images=ImageEncoder(model.load_vae(), model.family, vae_dtype="float32", sample=False, seed=0, device=device),
        text=TextEncoder(model.load_text_pipeline(), model.family, device=device, max_tokens=manifest.max_tokens),
        optimizer=torch.optim.AdamW(network.parameters(), lr=run.learning_rate, weight_decay=1e-2),
        beta=beta,
    )
    pairs = _training_pairs(run.pairs.source)
    torch.manual_seed(run.seed)
    order: list[int] = []
    for step in range(run.steps):
        while len(order) < c.length.batch:
            order += torch.randperm(len(pairs)).tolist()
        chosen, order = [pairs[row] for row in order[: c.length.batch]], order[c.length.batch :]
        pixels = torch.stack([torch.stack([_levels(data) for data in _sides(pair, run.flips)]) for pair in chosen])
        prompts = [pair.prompt for pair in chosen]
        if kind.method is c.DPO:
            loop.dpo_step(pixels, prompts, shared=kind.shares_noise)
        else:
            loop.inpo_step(pixels, prompts)
        if step % 10 == 0:
            print(f"online: step {step} of {run.steps}", flush=True)
    pipeline = model.load_pipeline()
    getattr(pipeline, model.family.network).load_state_dict(network.state_dict())
    pipeline.save_pretrained(run.pipeline)


def _training_pairs(source: str) -> list[Pair]:
    """All pairs but a twentieth, by a hash of the prompt, as many as the cached runs train on."""
    found = []
    for shard in open_source(source).shards:
        for item in shard.rows(0, shard.num_rows):
            if isinstance(item, Pair) and hashlib.blake2b(item.prompt.encode()).digest()[0] >= 256 / 20:
                found.append(item)
    return found


def _sides(pair: Pair, flips: int) -> tuple[bytes, bytes]:
    turned = uniform("turned label", pair.pair_id) < flips / 100
    return (pair.lose, pair.win) if turned else (pair.win, pair.lose)


def _levels(data: bytes) -> torch.Tensor:
    return torch.from_numpy(
        prepare_image(decode_image(data), resolution=(SIZE, SIZE), crop="center", flip=False).levels
    )
