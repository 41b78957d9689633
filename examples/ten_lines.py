"""Your own reward on the bundled model, a few updates: about a minute on a laptop."""

from tropism.commands import align


def redness(images, batch):  # images (B, 3, H, W) in [0, 1] -> (B,), higher is better
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


run = align("alignprop", model="shapes", reward=redness, out="runs/redness", updates=12, overwrite=True)
print(
    f"redness {run.before.columns['redness'].mean():.3f} -> {run.after.columns['redness'].mean():.3f}, see {run.out}/report.html"
)
