"""Any network that enlarges a picture in one pass, as a model of this library: GAN and regression upscalers, distilled diffusion.

The chain has one step, from noise straight to the picture, so a reward's whole gradient is one pass of the network. OSEDiff and InvSR
are of this kind: wrap their call in `upscale`.
Source: One-Step Effective Diffusion Network for Real-World Image Super-Resolution, arXiv 2406.08177 (the case that this fits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from tropism import core
from tropism.core import Batch, Draw, Stream, UserError
from tropism.models.low_res import low_res_of
from tropism.models.text import TextCond
from tropism.process.gaussian import Flow


class OneStep:
    """A one-step upscaler: `network(low_res)` -> pictures, (B, 3, h, w) in [0, 1] -> (B, 3, scale h, scale w), differentiable.

    What of the network requires a gradient trains; `base()` runs it with the weights it had when it was wrapped. The states of the chain
    are the pictures themselves. Subclass it and write `upscale` for a network that takes noise or prompts, or another range.
    Raises UserError at the first picture whose size is not scale times low_res's.
    """

    steps = 1
    guidance = 1.0
    prediction = "sample"

    def __init__(self, network: nn.Module, scale: int):
        self.network, self.scale = network, scale
        first = next(network.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.process = Flow(table="even", patch=1, n=1)
        self.calls = {"network": 0, "backward": 0, "decode": 0}
        self._first = {k: p.detach().clone() for k, p in self.trainable().items()}
        self._on = True

    def upscale(self, low_res: Tensor, noise: Tensor, run: Callable[..., Any]) -> Tensor:
        """Pictures (B, 3, H, W) in about [0, 1] of low_res (B, 3, h, w) in [0, 1] and standard normals (B, 3, H, W).

        run: the network; call it in place of `self.network`, so that `base()` can put its first weights there.
        """
        return run(low_res)

    def encode(self, batch: Batch, draw: Draw | None = None) -> TextCond:
        low_res = low_res_of(batch).to(self.device, self.dtype)
        height, width = (n * self.scale for n in low_res.shape[-2:])
        return TextCond({"low_res": low_res}, {}, (3, height, width))

    def start(self, cond: TextCond, draw: Draw, times: Tensor) -> tuple[Tensor, int]:
        """Standard normals (B, 3, H, W). Raises UserError for a chain of more than one step."""
        if len(times) != 2:
            raise UserError(f"This upscaler draws in 1 step, and {len(times) - 1} were asked for. Use --steps 1.")
        return draw(Stream.PRIOR, 0, cond.shape).to(self.device, self.dtype), 0

    def predict(self, x_t: Tensor, t: float | Tensor, cond: TextCond, guidance: float) -> Tensor:
        """The pictures (B, 3, H, W) themselves; guidance has nothing to act on."""
        out = self.upscale(cond.positive["low_res"], x_t, self._run)
        if out.shape != x_t.shape:
            raise UserError(
                f"The network makes {tuple(out.shape)} of {tuple(cond.positive['low_res'].shape)}; at scale {self.scale} it must be "
                f"{tuple(x_t.shape)}. Give the scale that it has."
            )
        core.count_rows(self.calls, out, len(x_t))
        return out

    def _run(self, *inputs: Any) -> Any:
        return self.network(*inputs) if self._on else functional_call(self.network, self._first, inputs)

    def x0(self, x_t: Tensor, out: Tensor, t: float | Tensor) -> Tensor:
        """The network's output: it is the clean state."""
        return out

    kernel = core.kernel

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]; see core.clamp for the gradient at the walls."""
        self.calls["decode"] += len(x0)
        return core.clamp(x0)

    def latents(self, samples: Tensor) -> Tensor:
        """The pictures themselves."""
        return samples

    def rows(self, guidance: float) -> int:
        return 1

    def check_request(self, guidance: float | None, negatives: Any = ()) -> None:
        """Raises UserError for a guidance: there is nothing to guide."""
        if guidance not in (None, 1):
            raise UserError(f"guidance is {guidance:g}, but this upscaler has none. Use --guidance 1.")

    @contextmanager
    def base(self) -> Iterator[None]:
        """The network with its first weights inside; nests."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def trainable(self) -> dict[str, nn.Parameter]:
        """The network's parameters that require a gradient, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}
