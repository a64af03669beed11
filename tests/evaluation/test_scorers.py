"""The field's scorers equal their projects' own computing for the same (tiny, random) weights."""

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from inpo.common.errors import InpoError, ModelError
from inpo.common.models import open_model
from inpo.evaluation.scorers.aesthetic import HEAD_FILE, AestheticScorer, load_head
from inpo.evaluation.scorers.clip import ClipScorer
from inpo.evaluation.scorers.hps import HpsV2Scorer, HpsV21Scorer
from inpo.evaluation.scorers.imagereward import ImageRewardScorer
from inpo.evaluation.scorers.pickscore import PickScorer

PROMPTS = ["a red cat", "a photo of the blue dog on the house under the green sky and then very much more of it", ""]
REAL_HEAD = Path(os.environ.get("INPO_PUBLISHED", "published")) / HEAD_FILE


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = ((40, 40), (64, 30), (20, 50))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def clip_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP in transformers' format, with random weights and a tokenizer of 16 tokens."""
    tokenizer = open_model(str(tiny_model)).load_text_pipeline().tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        for weight in model.parameters():
            # The initial weights are so small that all embeddings point the same way.
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.4)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    size = {"shortest_edge": 28}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def features(output: object) -> torch.Tensor:
    """transformers 5 wraps what transformers 4 returned as a tensor."""
    embedding = output if isinstance(output, torch.Tensor) else output.pooler_output
    return embedding / torch.norm(embedding, dim=-1, keepdim=True)


@torch.inference_mode()
def as_on_the_model_card(folder: Path, prompt: str, images: list[Image.Image]) -> np.ndarray:
    """Scores of several images of one prompt as PickScore's model card computes them, logit scale included."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pixels = processor(images=images, return_tensors="pt")
    options = {"padding": True, "truncation": True, "max_length": 16, "return_tensors": "pt"}
    tokens = processor(text=prompt, **options)
    image_features, text_features = (
        features(model.get_image_features(**pixels)),
        features(model.get_text_features(**tokens)),
    )
    return (model.logit_scale.exp() * (text_features @ image_features.T)[0]).numpy()


@pytest.mark.parametrize("kind", [PickScorer, ClipScorer])
def test_cosines_equal_the_model_cards(kind: type, clip_folder: Path, images: list[Image.Image]) -> None:
    upstream = np.array(
        [as_on_the_model_card(clip_folder, prompt, images)[index] for index, prompt in enumerate(PROMPTS)]
    )
    got = kind(model=str(clip_folder), **({"processor": str(clip_folder)} if kind is PickScorer else {})).score(
        images, PROMPTS
    )
    scale = float(CLIPModel.from_pretrained(clip_folder).logit_scale.detach().exp())
    assert got * scale == pytest.approx(upstream, rel=1e-4, abs=1e-5)
    assert np.ptp(got) > 0.05


def test_the_folder_of_weights_is_found(
    clip_folder: Path, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = PickScorer(model=str(clip_folder), processor=str(clip_folder)).score(images, PROMPTS)
    (tmp_path / "pickscore").symlink_to(clip_folder)
    monkeypatch.setenv("INPO_SCORERS", str(tmp_path))
    assert PickScorer().score(images, PROMPTS) == pytest.approx(expected)


def test_a_model_without_all_weights_is_refused(clip_folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip_folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"first text_projection\.weight"):
        ClipScorer(model=str(tmp_path)).score(images, PROMPTS)


def write_head(file: Path, width: int) -> torch.nn.Sequential:
    """The head as its authors' training script defines it, with random weights; saves its state dict."""
    from torch.nn import Dropout, Linear, Sequential

    torch.manual_seed(1)
    layers = Sequential(
        Linear(width, 1024),
        Dropout(0.2),
        Linear(1024, 128),
        Dropout(0.2),
        Linear(128, 64),
        Dropout(0.1),
        Linear(64, 16),
        Linear(16, 1),
    )
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, file)
    return layers.eval()


def test_aesthetic_equals_its_authors_computing(clip_folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    layers = write_head(tmp_path / "head.pth", width=12)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPImageProcessor.from_pretrained(clip_folder)
    with torch.inference_mode():
        embeddings = features(model.get_image_features(**processor(images=images, return_tensors="pt"))).numpy()
        upstream = layers(torch.from_numpy(embeddings)).squeeze(-1).numpy()
    scorer = AestheticScorer(clip=str(clip_folder), head=tmp_path / "head.pth")
    assert scorer.score(images, PROMPTS) == pytest.approx(upstream, rel=1e-4)
    assert scorer.score(images, ["something else"] * 3) == pytest.approx(upstream, rel=1e-4)


def test_a_head_of_another_width_is_refused(clip_folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    write_head(tmp_path / "head.pth", width=20)
    with pytest.raises(ModelError, match="width 20"):
        AestheticScorer(clip=str(clip_folder), head=tmp_path / "head.pth").score(images, PROMPTS)


def test_a_head_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"layers.0.weight": Payload()}, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_head(tmp_path / "head.pth")
    assert not (tmp_path / "touched").exists()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="no aesthetic head"):
        load_head(tmp_path / "other.pth")


@pytest.mark.skipif(not REAL_HEAD.is_file(), reason=f"the published head is not at {REAL_HEAD}")
def test_the_published_head_loads() -> None:
    head = load_head(REAL_HEAD)
    unit = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.inference_mode():
        scores = head(unit)
    assert scores.isfinite().all()
    # It is linear, so its mean over directions lies near its value at the origin; both within a rating's range.
    assert 0 < scores.mean() < 10


@pytest.mark.parametrize(
    ("scorer", "package", "message"),
    [
        (HpsV2Scorer, "open_clip", "pip install open_clip_torch"),
        (HpsV21Scorer, "open_clip", "pip install open_clip_torch"),
        (ImageRewardScorer, "ImageReward", "pip install image-reward"),
    ],
)
def test_a_missing_package_is_named(
    scorer: type, package: str, message: str, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InpoError, match=message):
        scorer().score(images, PROMPTS)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (PickScorer, "PickScore_v1 once while online, or set INPO_SCORERS"),
        (ClipScorer, "laion2B-s32B-b79K once while online"),
        (AestheticScorer, "improved-aesthetic-predictor"),
    ],
)
def test_missing_weights_are_named(
    scorer: type, message: str, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("INPO_SCORERS", str(tmp_path))
    with pytest.raises(ModelError, match=message):
        scorer().score(images, PROMPTS)


def test_imagereward_gets_prompts_and_unchanged_pixels(
    images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself pins old libraries; what it is called with is what can be wrong here."""
    asked = []

    class Reward:
        def score(self, prompt: str, image_path: str) -> float:
            asked.append((prompt, np.asarray(Image.open(image_path).convert("RGB"))))
            return len(asked) - 1.5

    package = types.ModuleType("ImageReward")
    package.load = lambda name, device: Reward()
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert list(ImageRewardScorer().score(images, PROMPTS)) == [-0.5, 0.5, 1.5]
    assert [prompt for prompt, _ in asked] == PROMPTS
    assert all((pixels == np.asarray(image)).all() for (_, pixels), image in zip(asked, images, strict=True))
