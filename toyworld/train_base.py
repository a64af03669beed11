"""Trains a base model from nothing, and with the first the held-out scorer: `python -m inpo.toyworld.train_base MODEL`.

    base    mixed renders -> AutoencoderKL -> latents -> UNet2DConditionModel with CLIPTextModel -> toyworld/base/
            clean renders -> AttributeNet -> toyworld/heldout.safetensors
    flow    mixed renders -> base's AutoencoderKL -> latents -> SD3Transformer2DModel with CLIP and T5 -> toyworld/flow/

Seeded; two processes on the CPU, one on a GPU; resumes from toyworld/.training when stopped. The settings, the loss and
the time each stage took are kept in training.json beside the weights.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from inpo.common.durable import new_file, new_folder
from inpo.toyworld import train_heldout
from inpo.toyworld.architecture import (
    build_flow_pipeline,
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from inpo.toyworld.backdrops import SIZE
from inpo.toyworld.heldout import WEIGHTS as HELDOUT_WEIGHTS
from inpo.toyworld.mixed_quality import mixed_renders
from inpo.toyworld.sampling import MAX_TOKENS, MODELS
from inpo.toyworld.stages import DEVICE, WORLD_SIZE, StageReport, StageSettings, train_stage

SEED = 0
NUM_PICTURES = 32_000
CAPTION_DROPOUT = 0.1
CROP = 32
"""Width and height in pixels of what the VAE learns from first, at a quarter of a picture's cost."""
VAE_CROPS = StageSettings(steps=2000, batch_size=64, learning_rate=2e-3, matrix_rate=0.02)
VAE = StageSettings(steps=1200, batch_size=32, learning_rate=2e-3, matrix_rate=0.02)
UNET = StageSettings(steps=3000, batch_size=128, learning_rate=1.5e-3, matrix_rate=0.02)
FLOW = StageSettings(steps=2000, batch_size=128, learning_rate=1e-3, matrix_rate=0.02)
KL_WEIGHT = {"vae-crops": 3e-4, "vae": 3e-5}
"""By stage, weight of the mean KL divergence per latent number, beside a mean absolute error per pixel of -1 to 1."""
EDGE_WEIGHT = 0.5
"""Weight of the error in differences between neighbouring pixels, which keeps small shapes sharp."""
TRAINING_FOLDER = Path(__file__).parent / ".training"

Pictures = Float[Tensor, "picture 3 64 64"]
Latents = Float[Tensor, "picture channel 8 8"]


class VaeTraining(nn.Module):
    """Absolute error of pixels and of their differences, and a small KL term; in bfloat16, for speed."""

    def __init__(self, vae: AutoencoderKL, stage: str) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, KL_WEIGHT[stage]

    def forward(self, pictures: Pictures) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = self.vae.encode(pictures).latent_dist
            rebuilt = self.vae.decode(posterior.sample()).sample
        error = rebuilt.float() - pictures
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss: Tensor = error.abs().mean() + EDGE_WEIGHT * edges + self.kl_weight * kl
        return loss


class UnetTraining(nn.Module):
    """The usual epsilon loss, over UNet and text encoder together."""

    alphas_cumprod: Tensor
    tokens: Tensor

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokens: Int[Tensor, "caption token"]
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.register_buffer("alphas_cumprod", build_scheduler().alphas_cumprod, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)

    @staticmethod
    def times(generator: torch.Generator, count: int) -> Int[Tensor, " picture"]:
        """Uniform timesteps."""
        return torch.randint(1000, (count,), generator=generator)

    def forward(
        self, x0: Latents, noise: Latents, timestep: Int[Tensor, " picture"], caption: Int[Tensor, " picture"]
    ) -> Tensor:
        signal = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        prediction = self.unet(x_t, timestep, self.text_encoder(self.tokens[caption]).last_hidden_state).sample
        return functional.mse_loss(prediction, noise)


class FlowTraining(nn.Module):
    """The velocity's loss at logit-normal times, over transformer and text encoders together."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, texts: list[str]) -> None:
        super().__init__()
        self.pipeline, self.texts = pipeline, texts
        self.networks = nn.ModuleList(
            [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        )

    @staticmethod
    def times(generator: torch.Generator, count: int) -> Float[Tensor, " picture"]:
        """In (0, 1), most in the middle."""
        return torch.randn(count, generator=generator).sigmoid()

    def forward(
        self, x0: Latents, noise: Latents, time: Float[Tensor, " picture"], caption: Int[Tensor, " picture"]
    ) -> Tensor:
        embedding, _, pooled, _ = self.pipeline.encode_prompt(
            [self.texts[index] for index in caption.tolist()],
            None,
            None,
            device=x0.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        t = time.view(-1, 1, 1, 1)
        velocity = self.pipeline.transformer(
            hidden_states=(1 - t) * x0 + t * noise,
            timestep=1000 * time,
            encoder_hidden_states=embedding,
            pooled_projections=pooled,
        ).sample
        return functional.mse_loss(velocity, noise - x0)


def as_tensor(pictures: UInt8[Tensor, "picture 64 64 3"]) -> Pictures:
    """Pixels 0..255 to -1..1, channels first."""
    return (pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def load_pictures(
    folder: Path, count: int
) -> tuple[UInt8[Tensor, "picture 64 64 3"], list[str], Int[Tensor, " picture"]]:
    """The training pictures, drawn once by the first process, their captions and last the empty prompt, and the index
    of each picture's caption among these."""
    path = folder / "pictures.pt"
    if dist.get_rank() == 0 and not path.exists():
        pictures, captions = mixed_renders(count, seed=SEED)
        with new_file(path) as staged:
            torch.save((torch.from_numpy(pictures), captions), staged)
    dist.barrier()
    loaded, captions = torch.load(path, mmap=True, weights_only=True)
    texts = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    return loaded, [*texts, ""], torch.tensor([texts[caption] for caption in captions])


@torch.inference_mode()
def encode_pictures(
    vae: AutoencoderKL, pictures: UInt8[Tensor, "picture 64 64 3"]
) -> Float[Tensor, "picture channel 8 8"]:
    """Unscaled latents (posterior means) of all pictures; each process encodes its share."""
    share = pictures.chunk(WORLD_SIZE)[dist.get_rank()]
    ours = torch.cat([vae.encode(as_tensor(some).to(DEVICE)).latent_dist.mode().cpu() for some in share.split(256)])
    parts = [torch.empty_like(ours) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, ours.contiguous())
    return torch.cat(parts).clone()


def train(rank: int, chosen: argparse.Namespace, rendezvous: str) -> None:
    """What each process does; the first one saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    folder, reports = chosen.work, {}
    settings: dict[str, StageSettings] = {}

    def stage(name: str, module: nn.Module, draw: Any, wanted: StageSettings) -> None:
        settings[name] = wanted if chosen.steps is None else replace(wanted, steps=chosen.steps)
        reports[name] = train_stage(name, module, draw, settings[name], seed=SEED, folder=folder)

    torch.manual_seed(SEED)
    is_flow = chosen.model == "flow"
    pictures, texts, captions = load_pictures(folder, chosen.pictures)
    if is_flow:
        vae = AutoencoderKL.from_pretrained(MODELS["base"], subfolder="vae", dtype=torch.float32).to(DEVICE)
    else:
        vae = build_vae()

        def draw_pictures(generator: torch.Generator, count: int) -> tuple[Tensor]:
            return (as_tensor(pictures[torch.randint(len(pictures), (count,), generator=generator)]),)

        def draw_crops(generator: torch.Generator, count: int) -> tuple[Tensor]:
            (whole,) = draw_pictures(generator, count)
            corners = torch.randint(SIZE - CROP + 1, (count, 2), generator=generator).tolist()
            crops = [picture[:, y : y + CROP, x : x + CROP] for picture, (y, x) in zip(whole, corners, strict=True)]
            return (torch.stack(crops),)

        stage("vae-crops", VaeTraining(vae, "vae-crops"), draw_crops, VAE_CROPS)
        stage("vae", VaeTraining(vae, "vae"), draw_pictures, VAE)

    latents = encode_pictures(vae, pictures)
    if not is_flow:
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    latents = latents * vae.config.scaling_factor

    if rank == 0:
        build_tokenizer(folder / "tokenizer")
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def draw_latents(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        index = torch.randint(len(latents), (count,), generator=generator)
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)
        times = training.times(generator, count)
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        return latents[index], noise, times, torch.where(dropped, len(texts) - 1, captions[index])

    training: UnetTraining | FlowTraining
    pipeline: DiffusionPipeline
    if is_flow:
        pipeline = build_flow_pipeline(vae=vae, tokenizer=tokenizer)
        training = FlowTraining(pipeline, texts)
        stage("transformer", training, draw_latents, FLOW)
    else:
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        training = UnetTraining(
            build_unet().to(memory_format=torch.channels_last), build_text_encoder(tokenizer), tokens
        )
        stage("unet", training, draw_latents, UNET)
        pipeline = build_pipeline(vae=vae, unet=training.unet, text_encoder=training.text_encoder, tokenizer=tokenizer)
        heldout = train_heldout.HeldoutTraining()
        stage("heldout", heldout, train_heldout.draw_batch, train_heldout.SETTINGS)
        if rank == 0:
            weights = HELDOUT_WEIGHTS if chosen.out is None else folder / HELDOUT_WEIGHTS.name
            half = {name: tensor.half().cpu() for name, tensor in heldout.net.state_dict().items()}
            save_file(half, weights)
    if rank == 0:
        save(pipeline, chosen, settings, reports)
    dist.barrier()
    dist.destroy_process_group()


def save(
    pipeline: DiffusionPipeline,
    chosen: argparse.Namespace,
    settings: dict[str, StageSettings],
    reports: dict[str, StageReport],
) -> None:
    """Writes the pipeline in fp16 and its training record."""
    networks: dict[str, Any] = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    for module in networks.values():
        module.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    record = {
        "seed": SEED,
        "num_pictures": chosen.pictures,
        "caption_dropout": CAPTION_DROPOUT,
        **({} if "vae" not in settings else {"kl_weight": KL_WEIGHT, "edge_weight": EDGE_WEIGHT}),
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "num_parameters": {
            name: sum(parameter.numel() for parameter in module.parameters()) for name, module in networks.items()
        },
        "settings": {name: asdict(each) for name, each in settings.items()},
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
    with new_folder(chosen.out or MODELS[chosen.model], replace=True) as staged:
        pipeline.save_pretrained(staged, safe_serialization=True)
        (staged / "training.json").write_text(json.dumps(record) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the pipeline, in place of the repository's own; the held-out scorer is then left in --work",
    )
    parser.add_argument("--work", type=Path, default=TRAINING_FOLDER, help="folder for what a stopped run goes on from")
    parser.add_argument("--steps", type=int, help="of every stage, to try the script")
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="that are trained on")
    chosen = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        rendezvous = str(Path(temporary) / "rendezvous")
        spawn(train, args=(chosen, rendezvous), nprocs=WORLD_SIZE)


if __name__ == "__main__":
    main()
