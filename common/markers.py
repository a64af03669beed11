"""What a single file says of its own weights, beside them: whether they predict noise or v, and on which schedule.

Two customs are in use. ComfyUI, Forge and A1111 read empty tensors (v_pred, ztsnr, edm_...), and many trainers write
header fields: modelspec.* (the Stability AI model metadata standard) and ss_* (kohya's sd-scripts).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from inpo.common.errors import ModelError
from inpo.common.sizes import latent_sides

_WORDS: dict[str, str] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "noise": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "velocity": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
_MODELSPEC = "modelspec.prediction_type"
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant", ".absmax", ".quant_state")
"""Parts of names of what quantised weights must be multiplied with; readers that know of none leave it out."""


def check_markers(file: Path, configured: str, *, scheduler_file: str) -> None:
    """Raise ModelError, naming both, if the file says of itself another prediction type than is configured, or a
    schedule that is not supported, or if it holds quantised weights. A file that says nothing does not contradict.
    """
    with safe_open(file, framework="pt") as weights:
        names, header = set(weights.keys()), weights.metadata() or {}
    scales = sorted(name for name in names if any(part in name for part in _SCALES))
    if scales:
        raise ModelError(
            "The file's weights are quantised, with scales of their own.",
            where=file,
            expected="weights as they are: float32, bfloat16 or float16",
            got=", ".join(scales[:3]),
            fix="use the file that they were made from",
        )
    said: list[tuple[str, str]] = []
    if "v_pred" in names:
        said.append(("the tensor v_pred", "v_prediction"))
    if header.get(_MODELSPEC):
        word = header[_MODELSPEC]
        said.append((f"the header's {_MODELSPEC} {word!r}", _WORDS.get(word.strip().lower(), word)))
    if _is_true(header.get("ss_v_parameterization")):
        said.append(("the header's ss_v_parameterization", "v_prediction"))
    for marker, prediction_type in said:
        if prediction_type != configured:
            raise ModelError(
                "The file and its configuration say that it predicts different things.",
                where=file,
                expected=f"{prediction_type}, by {marker}",
                got=f"prediction_type {configured} in {scheduler_file}",
                fix="--model-config DIR, a pipeline folder whose scheduler has the prediction_type that the weights "
                "were trained for; if the file is wrong about itself, write it again without the marker",
            )
    edm = sorted(name for name in names if name.startswith(("edm_mean", "edm_std", "edm_vpred")))
    zero_snr = ["the tensor ztsnr"] if "ztsnr" in names else []
    if _is_true(header.get("ss_zero_terminal_snr")):
        zero_snr.append("the header's ss_zero_terminal_snr")
    if edm or zero_snr:
        raise ModelError(
            "A zero-terminal-SNR schedule is not supported." if zero_snr else "An EDM schedule is not supported.",
            where=file,
            expected="a discrete schedule that keeps a little of the image at its end",
            got=", ".join(zero_snr or edm),
            fix="use another model",
        )


def markers_for(model: Any, *, title: str, lora: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header fields) that say of a file what its weights are: all of a model's (common/models.py), or LoRA
    layers for it, beside which no reader looks for tensors.
    """
    family, is_v = model.family, model.prediction == "v_prediction"
    size = latent_sides(model.config(family.network).get("sample_size", 128))
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.architecture(model.config, model.prediction) + ("/lora" if lora else ""),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        _MODELSPEC: "v" if is_v else model.prediction,
    }
    if size is not None:
        height, width = (each * family.vae_factor(model.config) for each in size)
        header["modelspec.resolution"] = f"{width}x{height}"
    if lora:
        header |= {"ss_network_module": "networks.lora", "ss_v_parameterization": str(is_v)}
        header |= family.base_version(model.config, model.prediction)
    return ({"v_pred": torch.zeros(0)} if is_v and not lora else {}), header


def _is_true(value: str | None) -> bool:
    return value is not None and value.strip().lower() in ("true", "1")
