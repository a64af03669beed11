"""The alternatives we measure against: one step of online InPO as released, and of Diffusion-DPO, both complete.

Everything that such a loop does for a micro-batch of pairs is done here: VAE, text encoder, inversion by the network in
training up to each pair's timestep on the released grid (levels 1, 1 + T/n, ...; the extra noise), the frozen
reference's call, and the trained network's forward and backward. Pairs of a batch stop at their own level, so that the
alternative makes no call that it does not need.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inpo.common.cache.derive import mean_square
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.levels import Levels
from inpo.precompute.encode import ImageEncoder, TextEncoder
from inpo.train.objectives import inpo

EXTRA_NOISE = 0.1


@dataclass(kw_only=True, eq=False)
class OnlineLoop:
    """Three networks and two encoders in memory, as in the released loop."""

    trained: Denoiser
    reference: Denoiser
    images: ImageEncoder
    text: TextEncoder
    optimizer: torch.optim.Optimizer
    steps: int = 10
    beta: float = 2000.0

    def encode(
        self, pixels: Float[Tensor, "pair side 3 h w"], prompts: list[str]
    ) -> tuple[Float[Tensor, "image c lh lw"], Condition]:
        """x0 and the condition, one row per image."""
        x0 = self.images(list(pixels), [str(number) for number in range(len(prompts))]).flatten(0, 1).float()
        table = self.text(prompts)
        rows = torch.tensor([table.row(prompt) for prompt in prompts]).repeat_interleave(2)
        side = pixels.shape[-1]
        own = self.text.family.of_image((side, side), (0, 0), (side, side))
        images = {name: torch.tensor([values]).expand(len(rows), -1) for name, values in own.items()}
        condition = Condition.build(table.conditions, rows, images)
        return x0.to(self.trained.device), condition.to(self.trained.device)

    def inpo_step(self, pixels: Float[Tensor, "pair side 3 h w"], prompts: list[str]) -> None:
        """One micro-batch of the released method, and the optimiser's step."""
        x0, condition = self.encode(pixels, prompts)
        total = self.trained.levels.num_train_timesteps
        timestep = torch.randint(0, total, (len(prompts),)).repeat_interleave(2)
        with torch.no_grad():
            x_t = self._invert(x0, timestep, condition)
        a, s, *_ = self.trained.at(timestep.to(x0.device))
        self._update(x_t, (x_t - a * x0) / s, timestep.to(x0.device), condition)

    def dpo_step(self, pixels: Float[Tensor, "pair side 3 h w"], prompts: list[str]) -> None:
        """One micro-batch of Diffusion-DPO: noise instead of inversion, everything else alike."""
        x0, condition = self.encode(pixels, prompts)
        total = self.trained.levels.num_train_timesteps
        timestep = torch.randint(0, total, (len(prompts),)).repeat_interleave(2).to(x0.device)
        noise = torch.randn_like(x0[::2]).repeat_interleave(2, dim=0)
        a, s, *_ = self.trained.at(timestep)
        self._update(a * x0 + s * noise, noise, timestep, condition)

    def _invert(
        self, x0: Float[Tensor, "image c h w"], timestep: Int[Tensor, "image"], condition: Condition
    ) -> Float[Tensor, "image c h w"]:
        """DDIM inversion to each image's own level: the first one at or above its timestep."""
        schedule = self.trained.levels
        total = schedule.num_train_timesteps
        levels = [1 + index * total // self.steps for index in range(self.steps)]
        last = torch.bucketize(timestep, torch.tensor(levels)).clamp(max=self.steps - 1)
        clean, current = x0.clone(), x0.clone()
        for index, level in enumerate(levels):
            active = torch.nonzero(last >= index).flatten().to(x0.device)
            if not len(active):
                break
            before = levels[index - 1] if index else None
            label = torch.full((len(active),), before or 0, device=x0.device)
            eps = self.trained(current[active], label, condition.rows(active))
            if before is not None:
                clean[active] = (current[active] - float(schedule.noise[before]) * eps) / float(schedule.signal[before])
            moved = float(schedule.signal[level]) * clean[active] + float(schedule.noise[level]) * eps
            current[active] = moved + _noise_scale(schedule, before, level) * torch.randn_like(moved)
        return current

    def _update(
        self,
        x_t: Float[Tensor, "image c h w"],
        target: Float[Tensor, "image c h w"],
        timestep: Int[Tensor, "image"],
        condition: Condition,
    ) -> None:
        with torch.no_grad():
            reference_error = mean_square(target - self.reference(x_t, timestep, condition))
        error = mean_square(target - self.trained(x_t, timestep, condition))
        pairs = len(x_t) // 2
        result = inpo(
            error.unflatten(0, (pairs, 2)),
            reference_error.unflatten(0, (pairs, 2)),
            torch.ones(pairs, device=x_t.device),
            self.beta,
        )
        result.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _noise_scale(schedule: Levels, before: int | None, level: int) -> float:
    """0.1 * sqrt(DDIM variance) of the step."""
    abar = float(schedule.signal[level]) ** 2
    abar_before = 1.0 if before is None else float(schedule.signal[before]) ** 2
    return EXTRA_NOISE * ((1 - abar_before) / (1 - abar) * (1 - abar / abar_before)) ** 0.5
