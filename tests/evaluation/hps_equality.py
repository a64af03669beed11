"""Run by test_hps.py in its own process: HPSv2 scores, ours and as its project's script computes them, as JSON.

    python hps_equality.py FOLDER

A build of torch for the CPU has no torchvision operators for boxes, and torchvision refuses to be imported without
them. open_clip needs only its image transforms, so the operators' names are declared here where they are missing.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

if not hasattr(torch.ops.torchvision, "nms"):
    text = (Path(importlib.util.find_spec("torchvision").origin).parent / "_meta_registrations.py").read_text()
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for found in sorted(set(re.findall(r'register_meta\("(\w+)"|register_fake\("torchvision::(\w+)"', text))):
        declared.define(f"{found[0] or found[1]}(Tensor input) -> Tensor")

import open_clip
from PIL import Image

from inpo.evaluation.scorers.hps import HpsV2Scorer

PROMPTS = ["a red cat", "a photo of a very blue dog, trending", ""]


@torch.no_grad()
def upstream(checkpoint: Path, images: list[Image.Image]) -> list[float]:
    """hpsv2's img_score.py, step by step: one image and one prompt at a time, diagonal of image @ text."""
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", output_dict=True)
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    model.eval()
    tokenizer = open_clip.get_tokenizer("tiny")
    scores = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        outputs = model(preprocess(image).unsqueeze(0), tokenizer([prompt]))
        scores.append(float(torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)[0]))
    return scores


def main(folder: Path) -> None:
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 16, "patch_size": 7, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.4)
    checkpoint = folder / "HPS_tiny.pt"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    rng = np.random.default_rng(0)
    sizes = ((40, 40), (64, 30), (20, 50))
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    ours = HpsV2Scorer(checkpoint=checkpoint, architecture="tiny").score(images, PROMPTS)
    print(json.dumps({"ours": list(ours), "upstream": upstream(checkpoint, images)}))


main(Path(sys.argv[1]))
