"""The engine without the loop: the gradient of a reward in the adapter, and how much of it each denoising step carries."""

import torch

from tropism.align.rollout import Chain, sweep
from tropism.core import Batch, Draw
from tropism.models.load import load_model
from tropism.rewards.jpeg import compressibility

model = load_model("shapes")
batch = Batch(["three red circles on sand", "one blue star on mint"])
draw = Draw(seed=0, update=0, index=batch.index)
cond = model.encode(batch, draw)
times = model.process.times(10, cond.shape)
x_T, first = model.start(cond, draw, times)
chain = Chain(
    model, compressibility(), batch, cond, draw, tuple(times.tolist()), guidance=2.0, active=(True,) * 10, first=first
)
swept = sweep(chain, x_T, lambda r: -r, list(model.trainable().values()))
print("kilobytes:", -swept.rewards, " gradient norm:", torch.stack([g.norm() for g in swept.gradient]).norm().item())
for step, norm in sorted(swept.step_norms.items()):
    print(f"  step {step}: {norm:.4f}")
