"""The alternatives we measure against: one step of online InPO as released, and of Diffusion-DPO, both complete.

Everything that such a loop does for a micro-batch of pairs is done here: VAE, text encoder, inversion by the network in
training up to each pair's timestep with the released loop's own numbers (common/inversion/released.py), the frozen
reference's call, and the trained network's forward and backward. Pairs of a batch stop at their own level, so that the
alternative makes no call that it does not need.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from inpo.common.cache.derive import mean_square
from inpo.common.conditions import Condition
from inpo.common.denoiser import Denoiser
from inpo.common.inversion import ReleasedLoop
from inpo.precompute.encode import ImageEncoder, TextEncoder
from inpo.train.objectives import OBJECTIVES


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
    sizes: Sequence[int] | None = None
    """Numbers of images that the trained network is compiled for, ascending; None: any."""
    graphs: bool = False
    """Gradients are added to memory of their own, which stays."""

    def encode(
        self, pixels: UInt8[Tensor, "pair side 3 h w"], prompts: list[str]
    ) -> tuple[Float16[Tensor, "image c lh lw"], Condition]:
        """x0 (float16) and the condition, one row per image."""
        images = list(pixels.flatten(0, 1).numpy())
        x0 = self.images(images, [str(number) for number in range(len(images))])
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts]).repeat_interleave(2)
        side = pixels.shape[-1]
        own = self.text.family.of_image((side, side), (0, 0), (side, side))
        told = {name: torch.tensor([values]).expand(len(rows), -1) for name, values in own.items()}
        condition = Condition.build(self.text(distinct), rows, told)
        return x0.to(self.trained.device), condition.to(self.trained.device)

    def inpo_step(self, pixels: UInt8[Tensor, "pair side 3 h w"], prompts: list[str]) -> None:
        """One micro-batch of the released method, and the optimiser's step."""
        x0, condition = self.encode(pixels, prompts)
        total = self.trained.levels.num_train_timesteps
        timestep = torch.randint(0, total, (len(prompts),)).repeat_interleave(2)
        with torch.no_grad():
            x_t, target = self.invert(x0, timestep, condition)
        self._update(x_t, target, timestep.to(x0.device), condition)

    def dpo_step(self, pixels: UInt8[Tensor, "pair side 3 h w"], prompts: list[str], *, shared: bool = True) -> None:
        """One micro-batch of Diffusion-DPO: noise instead of inversion, everything else alike. `shared`: both sides of
        a pair have one noise, as in the published method."""
        x0, condition = self.encode(pixels, prompts)
        x0 = x0.float()
        total = self.trained.levels.num_train_timesteps
        timestep = torch.randint(0, total, (len(prompts),)).repeat_interleave(2).to(x0.device)
        noise = torch.randn_like(x0[::2]).repeat_interleave(2, dim=0) if shared else torch.randn_like(x0)
        a, s, *_ = self.trained.at(timestep)
        target = noise if self.trained.levels.space == "noise" else noise - x0
        self._update(a * x0 + s * noise, target, timestep, condition)

    def invert(
        self, x0: Float16[Tensor, "image c h w"], timestep: Int[Tensor, " image"], condition: Condition
    ) -> tuple[Float[Tensor, "image c h w"], Float[Tensor, "image c h w"]]:
        """(what the network is trained on, its target), float32; `timestep` is on the CPU."""
        loop = ReleasedLoop(self.trained.levels, self.steps)
        stop = torch.tensor([loop.level_of(int(t)) for t in timestep])
        x = x0.float()
        for level in loop.levels:
            active = torch.nonzero(stop >= level).flatten().to(x0.device)
            if not len(active):
                break
            label = torch.full((len(active),), loop.label(level), device=x0.device)
            if self.sizes is not None:
                self.trained.rows = next(size for size in self.sizes if size >= len(active))
            eps = self.trained(x[active], label, condition.rows(active))
            moved = loop.step(x[active], eps, level)
            x[active] = moved + loop.noise(torch.randn_like(moved), level)
        return x.half().float(), loop.target(x, x0, timestep)

    def _update(
        self,
        x_t: Float[Tensor, "image c h w"],
        target: Float[Tensor, "image c h w"],
        timestep: Int[Tensor, " image"],
        condition: Condition,
    ) -> None:
        if self.sizes is not None:
            self.trained.rows = self.sizes[-1]
        with torch.no_grad():
            reference_error = mean_square(target - self.reference(x_t, timestep, condition))
        error = mean_square(target - self.trained(x_t, timestep, condition))
        pairs = len(x_t) // 2
        result = OBJECTIVES["inpo"].function(
            error.unflatten(0, (pairs, 2)),
            reference_error.unflatten(0, (pairs, 2)),
            torch.ones(pairs, device=x_t.device),
            self.beta,
        )
        result.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.trained.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.graphs)
