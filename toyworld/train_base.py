"""Trains the base model and the held-out scorer from nothing: `python -m inpo.toyworld.train_base`.

    mixed renders -> AutoencoderKL -> latents -> UNet2DConditionModel with CLIPTextModel -> toyworld/base/
    clean renders -> AttributeNet -> toyworld/heldout.safetensors

Seeded; two processes; resumes from toyworld/.training when stopped. The settings, the loss and the time each stage took
are kept in toyworld/base/training.json.
"""

import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from inpo.common.durable import new_folder
from inpo.toyworld import train_heldout
from inpo.toyworld.architecture import (
    MAX_TOKENS,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from inpo.toyworld.heldout import WEIGHTS as HELDOUT_WEIGHTS
from inpo.toyworld.mixed_quality import mixed_renders
from inpo.toyworld.sampling import BASE_FOLDER
from inpo.toyworld.scenes import scenes_by_caption
from inpo.toyworld.stages import WORLD_SIZE, StageReport, StageSettings, train_stage

SEED = 0
NUM_PICTURES = 32_000
CAPTION_DROPOUT = 0.1
VAE = StageSettings(steps=900, batch_size=64, learning_rate=2e-3)
UNET = StageSettings(steps=2200, batch_size=128, learning_rate=1.5e-3)
KL_WEIGHT = 1e-4
"""Weight of the mean KL divergence per latent number, beside a mean absolute error per pixel value of -1 to 1."""
EDGE_WEIGHT = 0.5
"""Weight of the error in differences between neighbouring pixels, which keeps small shapes sharp."""
TRAINING_FOLDER = Path(__file__).parent / ".training"

Pictures = Float[Tensor, "picture 3 32 32"]
Latents = Float[Tensor, "picture 6 8 8"]


class VaeTraining(nn.Module):
    """Absolute error of pixels and of their differences, and a small KL term."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Pictures) -> Tensor:
        posterior = self.vae.encode(pictures).latent_dist
        rebuilt = self.vae.decode(posterior.sample()).sample
        error = rebuilt - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


class UnetTraining(nn.Module):
    """The usual epsilon loss, over UNet and text encoder together."""

    alphas_cumprod: Tensor

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("alphas_cumprod", build_scheduler().alphas_cumprod, persistent=False)

    def forward(
        self, x0: Latents, noise: Latents, timestep: Int[Tensor, " picture"], tokens: Int[Tensor, "picture 16"]
    ) -> Tensor:
        signal = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        prediction = self.unet(x_t, timestep, self.text_encoder(tokens).last_hidden_state).sample
        return functional.mse_loss(prediction, noise)


def as_tensor(pictures: UInt8[Tensor, "picture 32 32 3"]) -> Pictures:
    """Pixels 0..255 to -1..1, channels first."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def load_pictures(folder: Path) -> tuple[UInt8[Tensor, "picture 32 32 3"], Int[Tensor, " picture"]]:
    """The training pictures and their captions' indices, drawn once by the first process."""
    path = folder / "pictures.pt"
    if dist.get_rank() == 0 and not path.exists():
        pictures, captions = mixed_renders(NUM_PICTURES, seed=SEED)
        torch.save((torch.from_numpy(pictures), torch.from_numpy(captions)), path)
    dist.barrier()
    pictures_t, captions_t = torch.load(path, weights_only=True)
    return pictures_t, captions_t


@torch.inference_mode()
def encode_pictures(vae: AutoencoderKL, pictures: UInt8[Tensor, "picture 32 32 3"]) -> Float[Tensor, "picture 6 8 8"]:
    """Unscaled latents (posterior means) of all pictures; each process encodes its share."""
    share = pictures.chunk(WORLD_SIZE)[dist.get_rank()]
    ours = torch.cat([vae.encode(as_tensor(some)).latent_dist.mode() for some in share.split(256)])
    parts = [torch.empty_like(ours) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, ours.contiguous())
    return torch.cat(parts).clone()


def tokenise_captions(tokenizer: CLIPTokenizer) -> Int[Tensor, "caption 16"]:
    """Tokens of every caption of the world, and of the empty prompt in the last row."""
    texts = [*scenes_by_caption(), ""]
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def train(rank: int, folder: Path, rendezvous: str) -> None:
    """What each of the two processes does; the first one saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    reports: dict[str, StageReport] = {}

    torch.manual_seed(SEED)
    heldout = train_heldout.HeldoutTraining()
    reports["heldout"] = train_stage(
        "heldout", heldout, train_heldout.draw_batch, train_heldout.SETTINGS, seed=SEED, folder=folder
    )
    if rank == 0:
        save_file({name: tensor.half() for name, tensor in heldout.net.state_dict().items()}, HELDOUT_WEIGHTS)

    pictures, captions = load_pictures(folder)
    vae_training = VaeTraining(build_vae().to(memory_format=torch.channels_last))

    def draw_pictures(generator: torch.Generator, count: int) -> tuple[Tensor]:
        return (as_tensor(pictures[torch.randint(len(pictures), (count,), generator=generator)]),)

    reports["vae"] = train_stage("vae", vae_training, draw_pictures, VAE, seed=SEED, folder=folder)
    vae = vae_training.vae

    latents = encode_pictures(vae, pictures)
    scaling_factor = round(1 / float(latents.std()), 4)
    latents = latents * scaling_factor
    vae.register_to_config(scaling_factor=scaling_factor)

    if rank == 0:
        build_tokenizer(folder / "tokenizer")
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenise_captions(tokenizer)
    unet_training = UnetTraining(build_unet().to(memory_format=torch.channels_last), build_text_encoder(tokenizer))

    def draw_latents(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = torch.randint(len(latents), (count,), generator=generator)
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)
        timestep = torch.randint(1000, (count,), generator=generator)
        dropped: Bool[Tensor, " picture"] = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        caption = torch.where(dropped, len(tokens) - 1, captions[index])
        return latents[index], noise, timestep, tokens[caption]

    reports["unet"] = train_stage("unet", unet_training, draw_latents, UNET, seed=SEED, folder=folder)
    if rank == 0:
        save_base(vae, unet_training.unet, unet_training.text_encoder, tokenizer, reports)
    dist.barrier()
    dist.destroy_process_group()


def save_base(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    reports: dict[str, StageReport],
) -> None:
    """Writes the pipeline in fp16 and its training record."""
    for module in (vae, unet, text_encoder):
        module.to(torch.float16, memory_format=torch.contiguous_format)
    pipeline = build_pipeline(vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)
    record = {
        "seed": SEED,
        "num_pictures": NUM_PICTURES,
        "caption_dropout": CAPTION_DROPOUT,
        "kl_weight": KL_WEIGHT,
        "edge_weight": EDGE_WEIGHT,
        "scaling_factor": vae.config.scaling_factor,
        "num_parameters": {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder))
        },
        "settings": {"heldout": asdict(train_heldout.SETTINGS), "vae": asdict(VAE), "unet": asdict(UNET)},
        "minutes": {
            name: {"wall": round(report.wall_seconds / 60, 1), "cpu": round(report.cpu_seconds / 60, 1)}
            for name, report in reports.items()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "loss": {name: report.loss for name, report in reports.items()},
    }
    with new_folder(BASE_FOLDER, replace=True) as staged:
        pipeline.save_pretrained(staged, safe_serialization=True)
        (staged / "training.json").write_text(json.dumps(record) + "\n")


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    TRAINING_FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        rendezvous = str(Path(temporary) / "rendezvous")
        spawn(train, args=(TRAINING_FOLDER, rendezvous), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
