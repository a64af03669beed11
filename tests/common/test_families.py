"""Families: the rest of the house knows none by name, and each is one file, one row here and one row of the docs."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from inpo.common.errors import UsageError
from inpo.common.families import BY_PIPELINE, FAMILIES, SUPPORTED
from inpo.common.models import open_model
from inpo.common.sizes import check_sides
from inpo.common.testing import save_tiny_pipeline

ROOT = Path(__file__).parents[2]
NAMES = re.compile(
    r"sdxl|pixart|sd15|\bsd3|stable_?diffusion_?3|\bflux|qwen|z_?image|stablediffusion|unet2d|\bpooled\b|time_ids|[\"']unet[\"']|[\"']transformer[\"']",
    re.IGNORECASE,
)
EXCEPTIONS = {
    "common/testing.py": "makes tiny pipelines of every family",
    "train/objectives.py": "says which of the papers' models a default beta is for",
    "precompute/buckets.py": "has a list of sizes, for any model, that is known by one model's name",
    "precompute/settings.py": "names that list",
    "toyworld": "has a base model, which is of one family",
}

ROWS = {
    # name: (network, text encoders, tokenizers, conditions by owner, components of a single file)
    "flux": ("transformer", 2, 2, {"embedding": "prompt", "pooled": "prompt"}, 1),
    "pixart_sigma": ("transformer", 1, 1, {"embedding": "prompt", "length": "prompt"}, 0),
    "qwen_image": ("transformer", 1, 1, {"embedding": "prompt", "length": "prompt"}, 1),
    "sd": ("unet", 1, 1, {"embedding": "prompt"}, 4),
    "sd3": ("transformer", 3, 3, {"embedding": "prompt", "pooled": "prompt"}, 1),
    "sdxl": ("unet", 2, 2, {"embedding": "prompt", "pooled": "prompt", "time_ids": "image"}, 4),
    "z_image": ("transformer", 1, 1, {"embedding": "prompt", "length": "prompt"}, 1),
}


def product() -> list[Path]:
    stages = ("common", "precompute", "train", "inspection", "evaluation", "data", "rounds", "toyworld")
    files = [file for stage in stages for file in (ROOT / stage).rglob("*.py")]
    return [*files, *(ROOT / "inpo").glob("*.py")]


def test_no_file_outside_the_families_knows_one_by_name():
    found = [
        f"{name}:{number}: {line.strip()}"
        for file in product()
        if not (name := str(file.relative_to(ROOT))).startswith(("common/families/", *EXCEPTIONS))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if NAMES.search(line)
    ]
    assert found == []


def test_every_exception_is_still_one():
    for name in EXCEPTIONS:
        files = [ROOT / name] if name.endswith(".py") else list((ROOT / name).rglob("*.py"))
        assert any(NAMES.search(file.read_text()) for file in files), name


def test_every_family_has_its_row():
    assert list(FAMILIES) == list(ROWS)
    assert set(BY_PIPELINE.values()) == set(FAMILIES.values())


@pytest.mark.parametrize("name", ROWS)
def test_a_family_answers(name):
    network, num_encoders, num_tokenizers, owners, in_file = ROWS[name]
    family = FAMILIES[name]
    assert family.name == name
    assert (family.network, len(family.text_encoders), len(family.tokenizers)) == (
        network,
        num_encoders,
        num_tokenizers,
    )
    assert {each: spec.per for each, spec in family.conditions.items()} == owners
    assert len(family.prefixes) == in_file
    assert BY_PIPELINE[family.pipeline.__name__] is family
    assert family.title in SUPPORTED


@pytest.mark.parametrize("kind", ["sd3", "z-image"])
def test_no_size_is_taken_that_the_network_has_no_places_for(kind, tmp_path):
    model = open_model(str(save_tiny_pipeline(tmp_path / "model", kind)))
    most = model.family.longest_side(model.config)
    step = model.family.pixel_step(model.config)
    for over in (0, step):
        size = (step, most + over)
        channels, height, width = model.family.latent_shape(model.config, size)
        latents, condition = torch.zeros(1, channels, height, width), model.family.blank(model.config, 1, size)
        call = partial(model.family.call, model.load_network(), latents, torch.ones(1) / 2, condition)
        if not over:
            assert call().shape == latents.shape
            check_sides(f"{size[0]}x{size[1]}", step, most)
            continue
        with pytest.raises(UsageError, match=f"{most} pixels at most"):
            check_sides(f"{size[0]}x{size[1]}", step, most)
        with pytest.raises((ValueError, IndexError)):
            call()


@pytest.mark.parametrize("name", ROWS)
def test_the_documents_name_every_family(name):
    document = (ROOT / "docs" / "models.md").read_text()
    assert f"| `{name}` |" in document
