"""Flags win over the recipe, the recipe over defaults; mistakes are named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inpo.common.errors import UsageError
from inpo.common.recipe import DataSection, ModelSection, Section, read_recipe, resolve, to_toml
from inpo.evaluation.settings import EvaluateSettings
from inpo.precompute.settings import PrecomputeSettings
from inpo.rounds.settings import SampleSettings
from inpo.train.settings import TrainSettings


class Numbers(Section):
    """A section with every kind of value."""

    steps: int = 10
    rate: float = 1e-5
    name: str = "inpo"
    on: bool = False
    kept: tuple[int, ...] = ()
    maybe: str | None = None


def recipe(tmp_path, text: str):
    file = tmp_path / "r.toml"
    file.write_text(text)
    return read_recipe(file)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    sections = recipe(tmp_path, '[train]\nsteps = 3\nname = "dpo"\n')
    settings = resolve(Numbers, "train", sections, {"steps": 7, "name": None, "on": None})
    assert (settings.steps, settings.name, settings.rate, settings.on) == (7, "dpo", 1e-5, False)
    assert resolve(Numbers, "train", sections, {"on": False}).on is False
    assert resolve(Numbers, "train", {}, {}) == Numbers()
    assert read_recipe(None) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstpes = 3\n", ("stpes", "[train] of", "r.toml", "did you mean steps?")),
        ('[train]\nsteps = "many"\n', ("steps", "many", "expected: a valid integer", "[train] of", "r.toml")),
        ("[train]\nsteps = 1.5\n", ("steps", "1.5", "r.toml")),
    ],
)
def test_a_bad_setting_is_named(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        resolve(Numbers, "train", recipe(tmp_path, text), {})
    assert all(word in str(caught.value) for word in words)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train\nsteps = 3\n", ("not valid TOML", "line 1")),
        ("[trian]\nsteps = 3\n", ("Unknown section [trian]", "precompute", "did you mean [train]?")),
        ("steps = 3\n", ("'steps' stands outside", "[precompute]", "steps = 3")),
        ('model = "x"\n', ("'model' stands outside", "[model]")),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, words):
    with pytest.raises(UsageError) as caught:
        recipe(tmp_path, text)
    assert all(word in str(caught.value) for word in (*words, "r.toml"))


def test_a_message_names_the_option_or_the_file_that_the_value_came_from(tmp_path):
    sections = recipe(tmp_path, "[train]\nsteps = 3\n")
    with pytest.raises(UsageError) as caught:
        resolve(Numbers, "train", sections, {"steps": "many"})
    assert caught.value.where == "--steps"
    with pytest.raises(UsageError) as caught:
        resolve(ModelSection, "model", {}, {"model_config_dir": 1})
    assert caught.value.where == "--model-config"


def test_a_revision_is_of_the_model_beside_it(tmp_path):
    sections = recipe(tmp_path, '[model]\nmodel = "owner/name"\nrevision = "v1"\nvae = "other/vae"\n')

    def told(**flags: str) -> tuple[str | None, str | None]:
        found = resolve(ModelSection, "model", sections, flags)
        assert found.vae == "other/vae"
        return found.model, found.revision

    assert told() == told(model="owner/name") == ("owner/name", "v1")
    assert told(model="round-1/run/pipeline") == ("round-1/run/pipeline", None)
    assert told(model="owner/other", revision="v2") == ("owner/other", "v2")
    assert told(revision="v2") == ("owner/name", "v2")


@pytest.mark.parametrize("section", [PrecomputeSettings, TrainSettings, EvaluateSettings])
def test_true_is_no_number(section):
    """TOML's true would be the number 1: a learning rate, a noised start that inverts nothing."""
    for name, field in section.model_fields.items():
        if "bool" not in str(field.annotation):
            for value in (True, [True, False]):
                with pytest.raises(UsageError, match="Bad value"):
                    resolve(section, "section", {"section": {field.alias or name: value}}, {}, may_idle=True)
    with pytest.raises(UsageError, match="not true or false"):
        resolve(Numbers, "section", {"section": {"steps": True}}, {})


def test_a_folder_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rounds").mkdir()
    assert "round" in read_recipe(Path("rounds"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "rounds")


def test_a_recipe_in_another_encoding(tmp_path):
    file = tmp_path / "r.toml"
    file.write_bytes('[data]\npairs = "Bücher"\n'.encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_recipe(file)
    file.write_text('[data]\npairs = "Bücher"\n', encoding="utf-8")
    assert read_recipe(file) == {"data": {"pairs": "Bücher"}}


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_what_is_missing_is_asked_for_by_name():
    with pytest.raises(UsageError, match="--cache"):
        DataSection().need("cache")
    with pytest.raises(UsageError, match="--model"):
        ModelSection().open()
    assert DataSection(cache="c").need("cache") == "c"


@settings(max_examples=50)
@given(
    steps=st.integers(-(2**53), 2**53),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(),
    on=st.booleans(),
    kept=st.lists(st.integers(0, 999)).map(tuple),
    maybe=st.none() | st.text(),
)
def test_a_written_configuration_is_a_recipe_that_gives_it_again(tmp_path_factory, **values):
    resolved = Numbers(**values)
    file = tmp_path_factory.getbasetemp() / "resolved.toml"
    file.write_bytes(to_toml({"train": resolved}).encode())
    assert resolve(Numbers, "train", read_recipe(file), {}) == resolved


def test_a_shipped_recipe_has_a_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    from inpo.common.recipe import shipped_recipes

    monkeypatch.chdir(tmp_path)
    assert read_recipe(Path("sd15"))["train"]["objective"]
    assert {"demo", "sd15", "sdxl"} <= shipped_recipes().keys()
    (tmp_path / "sd15").write_text("[train]\nseed = 7\n")
    assert read_recipe(Path("sd15")) == {"train": {"seed": 7}}
    with pytest.raises(UsageError, match="cannot be read") as caught:
        read_recipe(Path("sd16"))
    assert f"({', '.join(shipped_recipes())})" in str(caught.value)
    shipped = sorted(file.stem for file in (Path(__file__).parents[2] / "recipes").glob("*.toml"))
    assert sorted(shipped_recipes()) == shipped


def test_on_the_screen_stands_what_is_not_the_default() -> None:
    section = DataSection(pairs="pairs/")
    assert to_toml({"data": section}, differing=True) == '[data]\npairs = "pairs/"\n'
    assert "allow_remote = false" in to_toml({"data": section})


WITHOUT_EFFECT = (
    (PrecomputeSettings, {"iterations": 9}, "--inverter fixed_point", {"inverter": "fixed_point"}),
    (PrecomputeSettings, {"tolerance": 0.1}, "--inverter fixed_point", {"inverter": "fixed_point"}),
    (PrecomputeSettings, {"like": "cache", "decode_workers": 7}, "--pairs", {"like": None}),
    (PrecomputeSettings, {"noised_start": 1.0, "refine_start": 5}, "below 1", {"noised_start": 0.5}),
    (PrecomputeSettings, {"inverter": "noise", "noised_start": 0.3}, "ddim, ab2", {"inverter": "ab2"}),
    (PrecomputeSettings, {"inverter": "tracked", "refine_start": 2}, "ddim, ab2", {"inverter": "ddim"}),
    (TrainSettings, {"lora_alpha": 8.0}, "--lora-rank above 0", {"lora_rank": 4}),
    (TrainSettings, {"lora_targets": ["to_q"]}, "--lora-rank above 0", {"lora_rank": 4}),
    (TrainSettings, {"sample_prompts": ["a cat"]}, "--sample-every above 0", {"sample_every": 10}),
    (TrainSettings, {"sample_steps": 5}, "--sample-every above 0", {"sample_every": 10}),
    (TrainSettings, {"held_out": 0.0, "overfitting": "stop"}, "--held-out above 0", {"held_out": 0.1}),
    (TrainSettings, {"optimizer": "adafactor", "adam_betas": [0.8, 0.9]}, "adamw", {"optimizer": "adamw"}),
    (TrainSettings, {"schedule": "constant", "warmup_steps": 2}, "warms up", {"schedule": "linear"}),
    (TrainSettings, {"tracker": "none", "project": "mine"}, "a --tracker", {"tracker": "tensorboard"}),
    (TrainSettings, {"push_private": True}, "--push-to-hub", {"push_to_hub": "me/mine"}),
    (SampleSettings, {"pairs_from": "adjacent"}, "--per-prompt above 2", {"per_prompt": 3}),
    (TrainSettings, {"labels": "red", "score_temperature": 2.0}, "no --labels", {"labels": None}),
)


@pytest.mark.parametrize(("kind", "values", "needed", "mends"), WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused(tmp_path, kind, values, needed, mends):
    name = list(values)[-1]
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError) as caught:
        resolve(kind, "train", {}, values)
    assert all(word in str(caught.value) for word in (f"{option} does nothing here", f"where:    {option}", needed))
    # A recipe may have it: other flags give it its use, or take it away.
    file = tmp_path / "r.toml"
    file.write_text(to_toml({"train": kind.model_validate(values)}, differing=True))
    recipe = read_recipe(file)
    assert getattr(resolve(kind, "train", recipe, {}), name) == getattr(kind.model_validate(values), name)
    resolve(kind, "train", {}, {name: value for name, value in {**values, **mends}.items() if value is not None})
    assert getattr(kind.model_validate(values).effective(), name) == kind.model_fields[name].default
    # A default that is said is none of these.
    resolve(kind, "train", {}, {**values, name: kind.model_fields[name].default})
