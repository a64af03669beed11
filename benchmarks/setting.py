"""One measuring set-up: a model, a source of random pictures, a cache made from it, and all contestants on it."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.architectures import RESOLUTION, Architecture, model_for
from benchmarks.online import OnlineLoop
from inpo.common.cache import Cache, CacheWriter, open_cache
from inpo.common.cache.store import digest
from inpo.common.choices import CompileName
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import Denoiser, prepare_for_inference
from inpo.common.models import Model
from inpo.common.pairs import open_source
from inpo.common.pairs.decode import DecodePool
from inpo.precompute.components import compile_denoiser, load_components
from inpo.precompute.configuration import build_manifest
from inpo.precompute.encode import ImageEncoder, TextEncoder
from inpo.precompute.settings import PrecomputeSettings
from inpo.precompute.tasks import ShardTask, list_tasks
from inpo.precompute.texts import TextTable, TextTask, TextWorker
from inpo.precompute.worker import ShardWorker
from inpo.train.index import Index, build_index
from inpo.train.objectives import OBJECTIVES
from inpo.train.proof import record_errors
from inpo.train.records import Needs
from inpo.train.stream import RecordStream

PROMPTS = [
    f"a {size} {colour} ball in the middle over a meadow" for size in ("small", "big") for colour in ("red", "pink")
]


@dataclass(kw_only=True, eq=False)
class Setting:
    """Everything that the benchmarks share."""

    architecture: Architecture
    folder: Path
    device: torch.device
    dtype: str
    compile: CompileName = "off"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model: Model = model_for(self.architecture, self.folder)
        self.resolution = RESOLUTION[self.architecture]

    def source(self, num_pairs: int) -> str:
        """A folder of random pictures, made once."""
        folder = self.folder / f"pairs-{self.resolution}-{num_pairs}"
        if not (folder / "pairs.jsonl").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(0)
            lines = []
            for number in range(num_pairs):
                names = {side: f"{number}.{side}.jpg" for side in ("win", "lose")}
                for name in names.values():
                    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(coarse).resize((self.resolution, self.resolution)).save(folder / name)
                prompt = PROMPTS[number % len(PROMPTS)]
                lines.append(json.dumps(names | {"prompt": prompt, "id": f"pair-{number}"}))
            (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
        return str(folder)

    def settings(self, *, steps: int, kept: int, batch_size: int) -> PrecomputeSettings:
        return PrecomputeSettings(
            grid_points=steps,
            timesteps_per_pair=kept,
            resolution=self.resolution,
            batch_size=batch_size,
            dtype=self.dtype,
            measure_inversion=0.0,
        )

    def worker(
        self, cache: Path, settings: PrecomputeSettings, like: ShardWorker | None = None, *, compiled: bool = True
    ) -> ShardWorker:
        """Of the phase of images, on texts that are committed; with the models of another one, whose batches are as
        large."""
        manifest = build_manifest(settings, self.model, device_type=self.device.type)
        writer = CacheWriter.open(str(cache), manifest)
        if not TextTable(writer).names:
            texts = TextWorker(encoder=self.text_encoder(), writer=writer)
            for task in (TextTask(prompts=("",)), TextTask(prompts=tuple(PROMPTS))):
                texts.write(task, texts.compute(task))
        components = like.components if like is not None else load_components(self.model, manifest, self.device)
        if like is None and compiled:
            compile_denoiser(components.denoiser, self.model, manifest, self.compile, settings.batch_size)
        return ShardWorker(
            components=components,
            writer=writer,
            table=TextTable(writer),
            pairs_per_batch=settings.batch_size,
            decode=DecodePool(4),
        )

    def text_encoder(self) -> TextEncoder:
        return TextEncoder(self.model.load_text_pipeline(), self.model.family, device=self.device)

    def tasks(self, num_pairs: int) -> list[ShardTask]:
        return list_tasks(open_source(self.source(num_pairs)))[0]

    def cache(self, *, num_pairs: int, steps: int, kept: int, batch_size: int) -> Cache:
        """A committed cache, made once, by the network as it is: compiling it would take longer. Another architecture,
        or another model of this one, has a cache of its own."""
        settings = self.settings(steps=steps, kept=kept, batch_size=batch_size)
        manifest = build_manifest(settings, self.model, device_type=self.device.type)
        location = self.folder / f"cache-{num_pairs}-{digest(manifest.to_json())[:8]}"
        worker = self.worker(location, settings, compiled=False)
        for task in self.tasks(num_pairs):
            if not worker.writer.is_committed(task.name):
                worker.write(task, worker.compute(worker.read(task)))
        worker.close()
        return open_cache(str(location))

    def index(self, cache: Cache) -> Index:
        return build_index([cache], soft=False, held_out=0.0)

    def trained(self) -> tuple[Denoiser, torch.optim.Optimizer]:
        """A trainable network and its optimiser."""
        network = self.model.load_network().to(self.device).train()
        if self.device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-8, fused=True)
        return self.model.denoiser(network, network_dtype=self.dtype), optimizer

    def cached(self, cache: Cache, *, batch_size: int) -> "CachedLoop":
        """Ours: the real record stream of a cache, and one network."""
        denoiser, optimizer = self.trained()
        stream = RecordStream(
            self.index(cache), Needs(), batch_size=batch_size, window_shards=4, seed=0, pin=self.device.type == "cuda"
        )
        self.compiled(denoiser, trained=2 * batch_size)
        return CachedLoop(
            denoiser=denoiser,
            optimizer=optimizer,
            stream=stream,
            device=self.device,
            graphs=self.graphs(2 * batch_size),
        )

    def graphs(self, images: int) -> bool:
        """Whether networks in training run as CUDA graphs, as the trainer's does."""
        return uses_graphs(self.compile, self.device, images)

    def compiled(self, denoiser: Denoiser, sizes: Sequence[int] = (), *, trained: int = 0) -> bool:
        """Compile a network as the stages do, for calls of these numbers of images, and of `trained` with gradients."""
        if self.compile == "off":
            return False
        shape = self.model.family.latent_shape(self.model.config, (self.resolution,) * 2)
        graphs = self.graphs(trained or sizes[-1])
        for each in denoiser.network.parameters() if graphs and trained else ():
            each.grad = torch.zeros_like(each)

        def call(images: int) -> torch.Tensor:
            denoiser.rows = images
            blank = self.model.family.blank(self.model.config, images, (self.resolution,) * 2).to(self.device)
            x = torch.zeros(images, *shape, device=self.device)
            return denoiser(x, torch.zeros(images, dtype=torch.int64, device=self.device), blank)

        def first() -> None:
            with torch.no_grad():
                for images in sizes:
                    call(images)
            if trained:
                call(trained).square().mean().backward()
                denoiser.network.zero_grad(set_to_none=not graphs)

        blocks = self.model.family.blocks
        if not compile_network(denoiser.network, self.compile, first, blocks=blocks, device=self.device, graphs=graphs):
            denoiser.rows = None
        return denoiser.rows is not None

    def online(self, batch_size: int, *, inverts: bool = True) -> OnlineLoop:
        """The alternative, complete; compiled, if at all, as ours is, and where it inverts for calls of fewer images as
        well: a pair leaves the inversion at its own timestep."""
        trained, optimizer = self.trained()
        frozen = self.model.load_network()
        prepare_for_inference(frozen, network_dtype=self.dtype, device=self.device)
        reference = self.model.denoiser(frozen, network_dtype=self.dtype)
        images = 2 * batch_size
        fewer = [1 << power for power in range(1, images.bit_length()) if 1 << power < images] if inverts else []
        sizes = [*fewer, images]
        compiled = self.compiled(trained, sizes if inverts else (), trained=images)
        self.compiled(reference, [images])
        return OnlineLoop(
            trained=trained,
            optimizer=optimizer,
            reference=reference,
            sizes=sizes if compiled else None,
            graphs=self.graphs(images),
            images=ImageEncoder(
                self.model.load_vae(), self.model.family, vae_dtype="float32", sample=True, seed=0, device=self.device
            ),
            text=self.text_encoder(),
        )

    def pixels(self, num_pairs: int) -> torch.Tensor:
        """Random images, 8 bits."""
        return torch.randint(0, 256, (num_pairs, 2, 3, self.resolution, self.resolution), dtype=torch.uint8)


@dataclass(kw_only=True, eq=False)
class CachedLoop:
    """What the trainer does for a micro-batch, without its logging."""

    denoiser: Denoiser
    optimizer: torch.optim.Optimizer
    stream: RecordStream
    device: torch.device
    graphs: bool
    """Gradients are added to memory of their own, which stays."""

    def step(self) -> None:
        """One micro-batch from the cache, and the optimiser's step."""
        batch = next(iter(self.stream)).to(self.device)
        error = record_errors(self.denoiser, batch)
        inpo = OBJECTIVES["inpo"]
        inpo.function(error, batch.by_side(batch.reference_error), batch.label, inpo.beta).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphs)


def setting(
    architecture: Architecture | None, folder: Path = Path("runs/bench"), compile: CompileName = "off"
) -> Setting:
    """The set-up for this machine: on a GPU bf16 SD1.5, on a CPU float32 toyworld unless told otherwise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(ImportError):
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return Setting(
        architecture=architecture or ("sd15" if device.type == "cuda" else "toyworld"),
        folder=folder,
        device=device,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        compile=("blocks" if device.type == "cuda" else "off") if compile == "auto" else compile,
    )
