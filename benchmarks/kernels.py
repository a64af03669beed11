"""One network call, made in every way that could be faster: `python -m benchmarks.kernels`.

The frozen network as precompute has it (convolutions and linear layers in the network's dtype, autocast, channels_last
on a GPU) against contiguous memory, against all weights and activations in the dtype without autocast, and against
compiled blocks, the whole network compiled, and that with CUDA graphs. Nothing is read from a disk.
"""

import argparse
import copy
from collections.abc import Callable

import torch

from benchmarks.measure import Matmul, interleaved, machine, record, setting_up
from benchmarks.roofline import count_flops
from benchmarks.setting import setting
from inpo.common.choices import CompileName
from inpo.common.compiled import compile_network, uses_graphs
from inpo.common.denoiser import DTYPES, Denoiser, prepare_for_inference


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["toyworld", "sd15-narrow", "sd15", "sdxl"])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[2, 16], help="pairs; one table each")
    parser.add_argument("--ways", nargs="+", choices=list(_WAYS), default=list(_WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    here = setting(options.arch)
    matmul = Matmul.on(here.device, here.dtype)
    with setting_up():
        network = here.model.load_network()
        prepare_for_inference(network, network_dtype=here.dtype, device=here.device)
    shape = here.model.family.latent_shape(here.model.config, (here.resolution,) * 2)
    for batch_size in options.batch_size:
        images = 2 * batch_size
        blank = here.model.family.blank(here.model.config, images, (here.resolution,) * 2).to(here.device)
        x = torch.randn(images, *shape, device=here.device)
        timestep = torch.zeros(images, dtype=torch.int64, device=here.device)
        calls: dict[str, Callable[[], object]] = {}
        for way in options.ways:
            with setting_up(way):
                denoiser = here.model.denoiser(copy.deepcopy(network), network_dtype=here.dtype)
                call = _call(denoiser, x, timestep, blank)
                if _WAYS[way](denoiser, call, here.model.family.blocks, images):
                    call()
                    calls[way] = call
        flops = count_flops(
            _call(here.model.denoiser(network, network_dtype=here.dtype), x, timestep, blank), here.device
        )
        timings = interleaved({matmul.name: matmul, **calls}, rounds=options.rounds)
        full = matmul.flops / timings[matmul.name].median
        print(f"one call, {here.architecture}, {images} images, {here.dtype}, {machine()}\n")
        print("| | ms | share of the matmul rate |\n|---|---|---|")
        shares = {way: flops / timings[way].median / full for way in calls}
        for way, share in shares.items():
            print(f"| {way} | {1e3 * timings[way].median:.4g} | {share:.0%} |")
        print(flush=True)
        record(
            "kernels",
            {
                "architecture": here.architecture,
                "images": images,
                "dtype": here.dtype,
                "median_seconds": {way: timings[way].median for way in calls},
                "share": shares,
            },
        )


def _call(denoiser: Denoiser, x: torch.Tensor, timestep: torch.Tensor, condition: object) -> Callable[[], object]:
    @torch.inference_mode()
    def call() -> object:
        return denoiser.predict(x, timestep, condition)  # type: ignore[arg-type]

    return call


Way = Callable[[Denoiser, Callable[[], object], tuple[str, ...], int], bool]
"""Changes a denoiser; whether it could be done."""


def _as_it_is(denoiser: Denoiser, call: Callable[[], object], blocks: tuple[str, ...], images: int) -> bool:
    return True


def _contiguous(denoiser: Denoiser, call: Callable[[], object], blocks: tuple[str, ...], images: int) -> bool:
    denoiser.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return True


def _pure(denoiser: Denoiser, call: Callable[[], object], blocks: tuple[str, ...], images: int) -> bool:
    """Norms and activations too: other numbers than autocast's, so that a cache of its own would be needed."""
    dtype = DTYPES[denoiser.network_dtype]
    denoiser.network.to(dtype)

    class Cast(type(denoiser.network)):  # type: ignore[misc]
        def forward(self, *given: object, **told: object) -> object:
            def cast(value: object) -> object:
                return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

            return super().forward(*map(cast, given), **{name: cast(value) for name, value in told.items()})

    denoiser.network.__class__ = Cast
    denoiser.network_dtype = "float32"  # no autocast
    return True


def _compiled(how: CompileName, graphs: bool = False) -> Way:
    def compiled(denoiser: Denoiser, call: Callable[[], object], blocks: tuple[str, ...], images: int) -> bool:
        if graphs and not uses_graphs(how, denoiser.device, images):
            return False
        denoiser.rows = images
        return compile_network(denoiser.network, how, call, blocks=blocks, device=denoiser.device, graphs=graphs)

    return compiled


_WAYS: dict[str, Way] = {
    "as it is": _as_it_is,
    "contiguous": _contiguous,
    "all in the dtype": _pure,
    "blocks": _compiled("blocks"),
    "whole": _compiled("whole"),
    "whole, CUDA graph": _compiled("whole", graphs=True),
}


if __name__ == "__main__":
    main()
