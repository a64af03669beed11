"""Images that follow given ones: a ControlNet's control images, or images of which a mask is painted anew.

    FOLDER/images.jsonl    {"prompt", "file"} a line, for inpainting {"prompt", "file", "mask"}; files below FOLDER

The pipelines are diffusers' own, over the same components: whether training carries over to them is what is measured.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inpo.common import fingerprint, weight_files
from inpo.common.errors import DataError, ModelError, UsageError
from inpo.common.families import FAMILIES, Family
from inpo.common.families.base import read_json
from inpo.common.model_folder import folder_of
from inpo.common.models import Model
from inpo.common.pairs import ImageError, decode_image
from inpo.common.pairs.images import prepare_image
from inpo.common.recipe import option_name
from inpo.evaluation.image_folder import LISTING, read_lines
from inpo.evaluation.settings import EvaluateSettings

_SHARED = ("in_channels", "cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
"""Settings that a ControlNet has from the network that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Given images by prompt, and what is done with them."""

    files: Mapping[str, tuple[Path, ...]]
    """{prompt: image, for inpainting also its mask}"""
    weight: float
    """The ControlNet's scale, or the strength of inpainting."""
    kind: Any
    """diffusers' pipeline for it."""
    controlnet: Path | None = None
    """The ControlNet's folder; None: inpainting."""

    @property
    def prompts(self) -> list[str]:
        return list(self.files)

    def identity(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What images of these prompts depend on. Raises DataError for a prompt without an image, and for an image that
        cannot be read, or whose mask is cut otherwise: one that is replaced after the first image was made is another
        setting."""
        lacking = [prompt for prompt in prompts if prompt not in self.files]
        if lacking:
            raise DataError(
                "A prompt has no given image.",
                where=lacking[0][:200],
                expected="each prompt of --prompts in the folder's images.jsonl",
                got=f"{len(lacking)} of {len(prompts)} are not there",
                fix="list an image for each, or leave --prompts out: those of the folder are taken",
            )
        digest = hashlib.blake2b(digest_size=16)
        for prompt in prompts:
            file, *masks = self.files[prompt]
            data, image = _read(file)
            digest.update(hashlib.blake2b(data).digest())
            for mask in masks:
                data, levels = _read(mask, behind=0)
                digest.update(hashlib.blake2b(data).digest())
                _check_proportions(mask, levels, image)
        controlnet = None
        if self.controlnet is not None:
            weights = weight_files.loaded_files(self.controlnet, "diffusers", None)
            controlnet = fingerprint.of_weights(weights, config=read_json(self.controlnet / "config.json"))
        return {"images": digest.hexdigest(), "controlnet": controlnet, "weight": self.weight}

    def pipeline(self, pipeline: Any, model: Model) -> Any:
        """diffusers' pipeline for it, of the components of `pipeline`. Raises ModelError for a ControlNet that does not
        fit the model, or is not whole."""
        added = {} if self.controlnet is None else {"controlnet": _load_controlnet(self.controlnet, model)}
        return self.kind.from_pipe(pipeline, **added)

    def check_masks(self, prompts: Sequence[str], size: tuple[int, int], factor: int) -> None:
        """Raise DataError for a mask of these prompts that marks nothing in images of `size`, (height, width), whose
        latents are smaller by `factor`: diffusers takes every factor-th pixel of what is left of it."""
        for file in (mask for prompt in prompts for mask in self.files[prompt][1:]):
            brightest = int(np.asarray(_opened_mask(file, size))[::factor, ::factor].max())
            if brightest < 128:  # where diffusers cuts
                raise DataError(
                    "A mask marks nothing.",
                    where=file,
                    expected=f"white where the image is to be painted anew, at least {factor} pixels wide, in the "
                    f"middle that is left of it at {size[1]} x {size[0]}",
                    got=f"at most {brightest} of 255 in the latents' mask; what is transparent counts as black",
                    fix="paint a larger area white, or one nearer to the middle",
                )

    def arguments(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """What that pipeline is called with for these prompts, beside what every pipeline is: the images cover `size`,
        (height, width), with their middle."""
        files = [self.files[prompt] for prompt in prompts]
        images = [_opened(each[0], size) for each in files]
        if self.controlnet is not None:
            return {"image": images, "controlnet_conditioning_scale": self.weight}
        masks = [_opened_mask(each[1], size) for each in files]
        return {"image": images, "mask_image": masks, "strength": self.weight}


def open_transfer(settings: EvaluateSettings, family: Family) -> Transfer | None:
    """What the settings ask for; None if nothing. Raises UsageError for options that do not go together and a family
    that diffusers has no such pipeline of, ModelError and DataError for what is not there.
    """
    given = [name for name in _OPTIONS if getattr(settings, name) is not None]
    if not given:
        return None
    inpaint = settings.inpaint is not None
    wanted = {"inpaint", "inpaint_strength"} if inpaint else {"controlnet", "control_images", "control_scale"}
    needed = ("inpaint",) if inpaint else ("controlnet", "control_images")
    lacking = [name for name in needed if name not in given]
    if lacking or not wanted.issuperset(given):
        raise UsageError(
            "These options do not go together, or one is missing.",
            where=", ".join(option_name(name) for name in given),
            expected="--controlnet and --control-images, or --inpaint",
            got=f"without {option_name(lacking[0])}" if lacking else "both",
            fix="pass those of one of the two",
        )
    kind = family.inpainted if inpaint else family.controlled
    if kind is None:
        with_it = [each.title for each in FAMILIES.values() if (each.inpainted if inpaint else each.controlled)]
        raise UsageError(
            f"Models of this family make no such images here: {family.title}.",
            where=option_name(needed[0]),
            expected="; ".join(with_it),
            got=family.no_transfer,
            fix="leave the option out, or take a model of such a family",
        )
    if inpaint:
        strength = 1.0 if settings.inpaint_strength is None else settings.inpaint_strength
        if int(settings.inference_steps * strength) < 1:
            raise UsageError(
                "No step is left at this strength.",
                where="--inpaint-strength",
                expected=f"at least {1 / settings.inference_steps:.3g} with {settings.inference_steps} steps",
                got=strength,
                fix="take a larger strength, or more --inference-steps",
            )
        return Transfer(files=_listed(Path(str(settings.inpaint)), masks=True), weight=strength, kind=kind)
    folder = folder_of(str(settings.controlnet), variant=None, stems=("diffusion_pytorch_model",))
    scale = 1.0 if settings.control_scale is None else settings.control_scale
    files = _listed(Path(str(settings.control_images)), masks=False)
    return Transfer(files=files, weight=scale, kind=kind, controlnet=folder)


_OPTIONS = ("controlnet", "control_images", "control_scale", "inpaint", "inpaint_strength")


def _listed(folder: Path, *, masks: bool) -> dict[str, tuple[Path, ...]]:
    listing, names = folder / LISTING, ("file", "mask") if masks else ("file",)
    expected = '{"prompt": "...", "file": "..."' + (', "mask": "..."}' if masks else "}") + " a line"
    fix = "write it (docs/evaluation.md); files are paths below the folder"
    if not listing.is_file():
        raise DataError(
            "There is no list of images here.", where=listing, expected=expected, got="no such file", fix=fix
        )
    found: dict[str, tuple[Path, ...]] = {}
    for number, row in enumerate(read_lines(listing), start=1):
        texts = [row.get(name) for name in ("prompt", *names)]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                "A line names no image of a prompt.",
                where=f"{listing}, line {number}",
                expected=expected,
                got=str(row)[:200],
                fix=fix,
            )
        prompt, *places = (str(text) for text in texts)
        files = tuple(folder / place for place in places)
        missing = [file for file in files if not file.is_file()]
        outside = [file for file in files if not missing and not file.resolve().is_relative_to(folder.resolve())]
        if missing or outside:
            raise DataError(
                "An image is missing." if missing else "An image lies outside its folder.",
                where=f"{listing}, line {number}",
                expected="a file below the folder",
                got=(missing or outside)[0],
                fix=fix,
            )
        if found.setdefault(prompt.strip(), files) is not files:
            raise DataError(
                "A prompt has two images.",
                where=f"{listing}, line {number}",
                expected="each prompt once",
                got=prompt[:200],
                fix="leave one out, or put it into a folder of its own",
            )
    if not found:
        raise DataError("The list names no image.", where=listing, expected=expected, fix=fix)
    return found


def _read(file: Path, behind: int = 255) -> tuple[bytes, Image.Image]:
    """A given image: its file, and what that shows, over the grey `behind`."""
    try:
        data = file.read_bytes()
        return data, decode_image(data, behind=behind)
    except (OSError, ImageError) as error:
        raise DataError(
            "A given image cannot be read.", where=file, expected="a whole image file", got=str(error), fix="replace it"
        ) from None


def _check_proportions(file: Path, mask: Image.Image, image: Image.Image) -> None:
    if mask.width * image.height != mask.height * image.width:
        raise DataError(
            "A mask has another shape than its image.",
            where=file,
            expected=f"the proportions of the image's {image.width} x {image.height} pixels",
            got=f"{mask.width} x {mask.height}",
            fix="make the mask as large as its image",
        )


def _opened(file: Path, size: tuple[int, int], behind: int = 255) -> Image.Image:
    levels = prepare_image(_read(file, behind)[1], resolution=size, crop="center", flip=False).levels
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(levels, 0, -1)))


def _opened_mask(file: Path, size: tuple[int, int]) -> Image.Image:
    return _opened(file, size, behind=0).convert("L")  # what is transparent is not marked: black


def _load_controlnet(folder: Path, model: Model) -> Any:
    """A ControlNet in float32 on the CPU."""
    network = model.config(model.family.network)
    own = read_json(folder / "config.json")
    kind = model.family.controlnet_class
    different = {name: (network.get(name), own.get(name)) for name in _SHARED if network.get(name) != own.get(name)}
    if own.get("_class_name") != kind.__name__ or different:
        raise ModelError(
            "The ControlNet does not fit the model.",
            where=folder,
            expected=f"a {kind.__name__} for {model.name}"
            + "".join(f"; {name} {wanted}" for name, (wanted, _) in different.items()),
            got="; ".join([str(own.get("_class_name")), *(f"{name} {got}" for name, (_, got) in different.items())]),
            fix="take one that was trained for this model's family and version",
        )
    with weight_files.loading("ControlNet", folder):
        weight_files.check_parts(folder, None)
        loaded, information = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if information["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(information['missing_keys'][:3])}")
    return loaded
