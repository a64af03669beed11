"""The committed base model: small, loadable by anybody, imperfect, and it follows captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import inpo.toyworld
from inpo.toyworld import train_base
from inpo.toyworld.architecture import build_tokenizer
from inpo.toyworld.heldout import WEIGHTS as HELDOUT_WEIGHTS
from inpo.toyworld.heldout import HeldoutScorer
from inpo.toyworld.oracle import OracleScorer
from inpo.toyworld.sampling import LATENT_SHAPE, MODELS, generate
from inpo.toyworld.scenes import all_captions, captions, parse_caption, render

SIZE_LIMIT = 12_000_000
"""Of both base models together, in bytes."""
BASE_FOLDER = MODELS["base"]


@pytest.fixture(scope="module")
def samples():
    prompts = list(captions("test")[:24])
    noise = torch.randn((len(prompts), *LATENT_SHAPE), generator=torch.Generator().manual_seed(5))
    return prompts, generate(prompts, noise, steps=10)


def test_the_folders_are_small_and_hold_no_pickle():
    files = [path for folder in MODELS.values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < SIZE_LIMIT
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert Path(inpo.toyworld.__file__).parent in BASE_FOLDER.parents


def test_diffusers_loads_it_as_stable_diffusion():
    pipeline = DiffusionPipeline.from_pretrained(BASE_FOLDER, dtype=torch.float32, local_files_only=True)
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == LATENT_SHAPE[0]
    scheduler = pipeline.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (scheduler.prediction_type, scheduler.num_train_timesteps) == ("epsilon", 1000)
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one, scheduler.steps_offset) == (False, False, 1)
    # The pipeline's own default size is the toyworld's.
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64


def test_every_caption_fits_the_tokenizer_with_one_token_per_word():
    tokenizer = CLIPTokenizer.from_pretrained(BASE_FOLDER / "tokenizer", local_files_only=True)
    assert tokenizer.model_max_length == max(len(caption.split()) for caption in all_captions()) + 2 == 20
    some = [*all_captions()[:2400:9], *all_captions()[2400::99]]
    for caption, tokens in zip(some, tokenizer(some).input_ids, strict=True):
        assert len(tokens) == len(caption.split()) + 2 <= tokenizer.model_max_length
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == caption
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_a_rebuilt_tokenizer_is_the_committed_one(tmp_path):
    build_tokenizer(tmp_path)
    rebuilt = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    committed = CLIPTokenizer.from_pretrained(BASE_FOLDER / "tokenizer", local_files_only=True)
    assert rebuilt.model_max_length == committed.model_max_length == 20
    assert rebuilt.get_vocab() == committed.get_vocab()
    some = [*captions("test")[:20], "", "a zebra"]
    assert rebuilt(some, padding="max_length").input_ids == committed(some, padding="max_length").input_ids


def test_the_vae_redraws_recognisable_pictures_and_its_latents_have_unit_scale():
    pipeline = DiffusionPipeline.from_pretrained(BASE_FOLDER, dtype=torch.float32, local_files_only=True)
    prompts = captions("validation")[:32]
    pictures = np.stack([render(parse_caption(caption)) for caption in prompts])
    with torch.inference_mode():
        latents = pipeline.vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        rebuilt = pipeline.vae.decode(latents).sample
    assert 0.7 < float(latents.std()) * pipeline.vae.config.scaling_factor < 1.4
    # One of the twelve channels stands empty (docs/toyworld.md); all others carry something.
    spreads = latents.std(dim=(0, 2, 3)).sort().values * pipeline.vae.config.scaling_factor
    assert float(spreads[1]) > 0.2
    images = pipeline.image_processor.postprocess(rebuilt)
    assert HeldoutScorer().score(images, prompts).mean() > -2
    # What it loses (clean renders score 5.9) no preference training of the UNet can win back.
    assert OracleScorer().score(images, prompts).mean() > 5.4


def test_samples_follow_their_captions(samples):
    prompts, images = samples
    for scorer in (OracleScorer(), HeldoutScorer()):
        own = scorer.score(images, prompts)
        # Every picture against every other caption of the sample: chance would be a half.
        others = np.stack([scorer.score(images, prompts[shift:] + prompts[:shift]) for shift in range(1, 6)])
        assert (own > others).mean() > 0.9


def test_samples_differ_in_quality(samples):
    prompts, images = samples
    scores = OracleScorer().score(images, prompts)
    assert scores.std() > 0.4
    assert scores.mean() < 5.3


def test_the_training_record_lies_beside_the_weights():
    record = json.loads((BASE_FOLDER / "training.json").read_text())
    # Whole pictures go on from what crops left, and bring their own details.
    for stage, least in {"heldout": 2, "vae-crops": 2, "vae": 1.25, "unet": 2}.items():
        steps, losses = zip(*record["loss"][stage], strict=True)
        assert list(steps) == sorted(steps)
        assert steps[-1] == record["settings"][stage]["steps"]
        assert losses[-1] < losses[0] / least
        assert record["minutes"][stage]["cpu"] > 0


@pytest.mark.slow
def test_a_trial_of_the_training_leaves_the_repositorys_own_models(tmp_path):
    before = HELDOUT_WEIGHTS.read_bytes()
    chosen = ["--steps", "1", "--pictures", "8", "--out", str(tmp_path / "base"), "--work", str(tmp_path / "work")]
    try:
        train_base.main(["base", *chosen])
        assert HELDOUT_WEIGHTS.read_bytes() == before
    finally:
        HELDOUT_WEIGHTS.write_bytes(before)
    assert load_file(tmp_path / "work" / HELDOUT_WEIGHTS.name).keys() == load_file(HELDOUT_WEIGHTS).keys()
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "base")) is StableDiffusionPipeline


def test_pictures_whose_writing_was_cut_are_drawn_again(tmp_path, monkeypatch):
    """What is there under its name is whole: a training that was stopped takes it as it is."""
    save, count = torch.save, 4

    def cut(values, path):
        save(values, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-100])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_base.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train_base.dist, "barrier", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            train_base.load_pictures(tmp_path, count)
    pictures, texts, index = train_base.load_pictures(tmp_path, count)
    assert pictures.shape == (count, 64, 64, 3)
    assert texts[-1] == ""
    assert len(index) == count
