"""What the conditions of the circle's benchmark have in common, by the commands and recipes that it gives."""

import tomllib
from pathlib import Path

from benchmarks.circle import BASE, jobs_of


def test_all_conditions_train_on_as_many_images_from_as_many_samples(tmp_path: Path) -> None:
    """A condition that costs more would be ahead for that alone. By ddim there are fewer samples, for its own calls."""
    trained, sampled, begins = {}, {}, {}
    for job in jobs_of(tmp_path, seed=1, pairs=90, steps=12):
        commands = [step for step in job.steps if isinstance(step, list)]
        (tmp_path / "train.txt").write_text("".join(f"prompt {number}\n" for number in range(90)))
        for step in job.steps:
            if not isinstance(step, list):
                job.folder.mkdir(parents=True)
                step()
        if commands[0][0] == "round":
            recipe = tomllib.loads((job.folder / "recipe.toml").read_text())
            per_prompt, told, rounds = recipe["sample"]["per_prompt"], recipe["train"], 3
            sampled[job.name] = rounds * recipe["round"]["prompts_per_round"] * per_prompt
            trained[job.name] = rounds * told["steps"] * told["batch_size"] * 2
            begins[job.name] = (told["learning_rate"], told["beta"], recipe["model"]["model"])
            continue
        by_name = {words[0]: dict(zip(words[1::2], words[2::2], strict=True)) for words in commands[:-2]}
        sample, train = by_name["sample"], by_name["train"]
        prompts = len((job.folder / "prompts.txt").read_text().splitlines())
        sampled[job.name] = prompts * int(sample["--per-prompt"])
        a_record = int(sample["--per-prompt"]) if train["--objective"] == "listwise" else 2
        trained[job.name] = int(train["--steps"]) * int(train["--batch-size"]) * a_record
        begins[job.name] = (float(train["--learning-rate"]), float(train["--beta"]), train["--model"])
    assert set(trained.values()) == {12 * 64}
    assert set(begins.values()) == {(2e-5, 1000.0, BASE)}
    assert sampled.pop("inverted") < 180
    assert set(sampled.values()) == {180}
