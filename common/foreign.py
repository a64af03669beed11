"""Options of other trainers, answered with ours: people's fingers know diffusers', sd-scripts' and trl's command lines.

They are not aliases: one thing has one word here.
"""

from typing import Any

from typer.core import TyperCommand

from inpo.common.errors import UsageError

_ANSWERS = {
    "pretrained_model_name_or_path": "--model",
    "model_name_or_path": "--model",
    "pretrained_vae_model_name_or_path": "--vae",
    "dataset_name": "--pairs",
    "train_data_dir": "--pairs",
    "output_dir": "--output of train, --cache of precompute",
    "train_batch_size": "--batch-size",
    "per_device_train_batch_size": "--batch-size",
    "max_train_steps": "--steps",
    "max_steps": "--steps",
    "num_train_epochs": "--steps: records of an epoch / effective batch, which train prints at its start",
    "max_train_epochs": "--steps: records of an epoch / effective batch, which train prints at its start",
    "gradient_accumulation_steps": "--accumulate",
    "max_grad_norm": "--clip",
    "lr": "--learning-rate",
    "scale_lr": "nothing: the rate that is given is the one that is used",
    "lr_scheduler": "--schedule",
    "lr_scheduler_type": "--schedule",
    "lr_warmup_steps": "--warmup-steps",
    "optimizer_type": "--optimizer",
    "use_8bit_adam": "--optimizer adamw8bit",
    "use_adafactor": "--optimizer adafactor",
    "adam_beta1": "--adam-betas, both at once",
    "adam_beta2": "--adam-betas, both at once",
    "adam_weight_decay": "--weight-decay",
    "adam_epsilon": "--adam-eps",
    "use_ema": "--ema DECAY",
    "mixed_precision": "--dtype",
    "rank": "--lora-rank",
    "network_dim": "--lora-rank",
    "network_alpha": "--lora-alpha",
    "beta_dpo": "--beta",
    "loss_type": "--objective",
    "checkpointing_steps": "--save-every",
    "save_every_n_steps": "--save-every",
    "checkpoints_total_limit": "--keep-last",
    "resume_from_checkpoint": "--resume, which is on by default",
    "resume": "nothing: the same command again goes on where it was",
    "validation_prompt": "--sample-prompts",
    "validation_prompts": "--sample-prompts",
    "validation_steps": "--sample-every",
    "sample_every_n_steps": "--sample-every",
    "report_to": "--tracker",
    "log_with": "--tracker",
    "hub_model_id": "--push-to-hub OWNER/NAME",
    "num_inference_steps": "--grid-points of precompute, --inference-steps of evaluate generate",
    "guidance_scale": "--guidance",
    "enable_xformers_memory_efficient_attention": "nothing: torch's own attention is used",
    "allow_tf32": "nothing: --dtype decides the precision",
    "dataloader_num_workers": "--decode-workers of precompute",
}
"""{another trainer's option, with underscores: ours}."""


class Command(TyperCommand):
    """A command that knows what others call its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {option for each in self.params for option in (*each.opts, *each.secondary_opts)}
        for word in args:
            name = word.partition("=")[0]
            answer = _ANSWERS.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
            if answer is not None and name not in own:
                ours = answer.split()[0].rstrip(",:")
                if ours.startswith("--") and ours not in own and " of " not in answer:
                    answer += f", of another command: see `{_command_with(ours, ctx)} --help`"
                raise UsageError(
                    f"{name} is another trainer's option.",
                    where=ctx.command_path,
                    expected=answer,
                    fix=f"`{ctx.command_path} --help` lists all",
                )
            if word == "--":
                break
        return super().parse_args(ctx, args)


def _command_with(option: str, ctx: Any) -> str:
    """`inpo` and the first of its commands that has an option; train if none has."""
    commands = getattr(ctx.find_root().command, "commands", {})
    having = (name for name, each in commands.items() if any(option in known.opts for known in each.params))
    return f"inpo {next(having, 'train')}"
