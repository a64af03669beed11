"""The trained parameters, their optimiser and its schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from peft import LoraConfig, inject_adapter_in_model
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from inpo.common.denoiser import prepare_for_inference
from inpo.common.errors import UsageError
from inpo.common.families import Family
from inpo.train.settings import TrainSettings


def prepare_network(
    network: ModelMixin,
    family: Family,
    settings: TrainSettings,
    *,
    network_dtype: str,
    device: torch.device,
    sharded: bool = False,
) -> list[torch.nn.Parameter]:
    """Make the network trainable: whole, or through LoRA layers that start as zero (theta = reference).

    Trained weights are float32. Under LoRA the frozen ones are stored in the network's dtype, to which autocast would
    cast them at every call anyway. Training runs in eval mode, as inversion did: without dropout. `sharded`: FSDP will
    split the weights, which it takes in plain order alone. What the family calls unread is not trained. Returns the
    trained parameters.
    """
    # It gets no gradient: the optimiser would have no state of it to go on from, and processes would wait for others'.
    last = [f"transformer_blocks.{len(network.transformer_blocks) - 1}.{name}." for name in family.unread]
    unread = [name for name, _ in network.named_modules() if f"{name}.".startswith(tuple(last))]
    if settings.lora_rank:
        prepare_for_inference(network, network_dtype=network_dtype, device=device)
        targets = settings.lora_targets or family.lora_targets
        layers = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha or settings.lora_rank,
            init_lora_weights="gaussian",
            target_modules=list(targets),
            exclude_modules=unread or None,
        )
        names = [f".{name}" for name, _ in network.named_modules()]
        try:
            for target in settings.lora_targets:  # peft asks that one of them is there
                if not any(name.endswith(f".{target}") for name in names):
                    raise ValueError(f"no module's name ends in {target}")
            inject_adapter_in_model(layers, network)
        except ValueError as error:
            raise UsageError(
                "LoRA layers cannot be added to these modules.",
                where="--lora-targets",
                expected="ends of names of linear or convolution layers of the network, such as to_q or ff.net.2",
                got=f"{', '.join(targets)}: {str(error).splitlines()[0]}",
                fix="correct the names, or leave --lora-targets out for the attention's projections",
            ) from None
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
    else:
        network.requires_grad_(True)
        for name in unread:
            network.get_submodule(name).requires_grad_(False)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if device.type == "cuda" and not sharded:
        network.to(memory_format=torch.channels_last)
    # Never in training mode: E_ref is the error of the whole network, and dropout would make noise of every margin.
    network.eval()
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def build_optimizer(
    parameters: list[torch.nn.Parameter], settings: TrainSettings, *, network_dtype: str
) -> torch.optim.Optimizer:
    """AdamW, Adafactor with the paper's settings for its large model, or bitsandbytes' 8-bit AdamW."""
    adam: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.adam_betas,
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adafactor":
        optimizer = Adafactor(
            parameters,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            clip_threshold=1.0,
            scale_parameter=False,
            relative_step=False,
        )
    elif settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, **adam)
    else:
        # A fused update skips itself where float16's gradients overflow, and does not say so.
        fused = network_dtype != "float16" and parameters[0].device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(parameters, fused=fused, **adam)
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> LRScheduler:
    """diffusers' learning-rate schedules, in optimiser steps."""
    schedule: LRScheduler = get_scheduler(
        settings.schedule, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps
    )
    return schedule


def rates(settings: TrainSettings) -> Iterator[float]:
    """The learning rate of each of the run's updates in turn."""
    schedule: Any = build_schedule(torch.optim.SGD([torch.zeros(())], lr=settings.learning_rate), settings)
    (factor,) = schedule.lr_lambdas
    return (settings.learning_rate * factor(update) for update in range(settings.steps))
