"""What the bundled base model can do before any alignment: parser accuracy on the held-out prompts, by steps and guidance.

Hardware: 2 CPU cores, about 5 minutes. Expected: the table of docs/shapes.md.
Run: python recipes/base_model.py
"""

import torch
from study import HELD_OUT, entropy, options

from tropism.models.load import load_model
from tropism.rewards.jpeg import bytes_above_flat, compressibility
from tropism.run.evaluate import evaluate
from tropism.worlds import shapes

SETTINGS = [(8, 2.0), (8, 1.0), (8, 3.0), (12, 2.0), (20, 2.0)]


def flattened(image: torch.Tensor, scene: shapes.Scene) -> torch.Tensor:
    """The picture with its background set to the flat colour that the parser read."""
    ground = torch.tensor(shapes.BACKGROUNDS[scene.background]).reshape(3, 1, 1) / 255
    return torch.where((image - ground).norm(dim=0, keepdim=True) > 0.24, image, ground)


def main():
    run = options()
    torch.set_num_threads(run.threads)
    model = load_model("shapes", lora=None)
    print("| steps | guidance | count | shape | colour | background | all | bytes above flat |\n" + "|---:" * 8 + "|")
    for steps, guidance in SETTINGS:
        rows = []
        for seed in run.seeds:
            found = evaluate(
                model, compressibility(), HELD_OUT, steps=steps, guidance=guidance, seed=seed, batch_size=32
            )
            right = shapes.accuracy(found.images, found.prompts)
            rows.append(
                [right[k].mean().item() for k in ("count", "shape", "colour", "background", "all")]
                + [bytes_above_flat(found.images).double().mean().item()]
            )
        mean, spread = torch.tensor(rows).mean(0), torch.tensor(rows).std(0)
        cells = [f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in zip(mean[:5], spread[:5], strict=True)]
        print(f"| {steps} | {guidance:g} | " + " | ".join(cells) + f" | {mean[5]:.0f} ± {spread[5]:.0f} |", flush=True)
    found = evaluate(model, compressibility(), HELD_OUT, steps=8, guidance=2.0, seed=0, batch_size=32)
    read = shapes.read(found.images)
    known = [i for i, scene in enumerate(read) if scene.background]
    bare = torch.stack([flattened(found.images[i], read[i]) for i in known])
    above = bytes_above_flat(found.images[known]).double().mean().item()
    print(
        f"share of a base picture's bytes above flat that is background texture: "
        f"{1 - (bytes_above_flat(bare).double().mean().item()) / above:.2f}"
    )
    print(
        f"entropy over prompts: background {entropy([s.background for s in read]):.2f} bits, "
        f"colour {entropy([s.colour for s in read]):.2f} bits"
    )


if __name__ == "__main__":
    main()
