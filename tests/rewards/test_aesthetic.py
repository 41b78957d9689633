from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_clip import photographs, processor

from tropism.core import Batch, UserError
from tropism.rewards import aesthetic
from tropism.rewards.aesthetic import Aesthetic, Head, bradley_terry_loss, laion_aesthetic, linear_head


def test_loss_is_the_likelihood_of_the_votes():
    a, b = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    p = torch.sigmoid(a - b)
    expected = -(p[0].log() + (1 - p[1]).log()) / 2
    torch.testing.assert_close(bradley_terry_loss(a, b, torch.tensor([True, False])), expected)
    torch.testing.assert_close(bradley_terry_loss(b, a, torch.tensor([0.0, 1.0])), expected)


def test_a_head_learns_a_hidden_taste_from_noisy_votes():
    torch.manual_seed(0)
    embeddings, taste = F.normalize(torch.randn(600, 16), dim=1), torch.randn(16)
    gold = embeddings @ taste
    pairs = torch.randint(0, 400, (2, 4000))
    votes = torch.rand(4000) < torch.sigmoid(3 * (gold[pairs[0]] - gold[pairs[1]]))
    head = Head(16)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(60):
        scores = head(embeddings[:400])
        loss = bradley_terry_loss(scores[pairs[0]], scores[pairs[1]], votes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen = torch.corrcoef(torch.stack([head(embeddings[400:]), gold[400:]]))[0, 1]
    assert unseen > 0.85


def test_bundled_weights_are_found_by_their_shapes(clip, tokenizer, tmp_path, monkeypatch, images):
    torch.manual_seed(0)
    head = Head(clip.width, 24)
    (tmp_path / "shapes").mkdir()
    save_file({k: v.half() for k, v in head.state_dict().items()}, tmp_path / "shapes" / "aesthetic.safetensors")
    clip.frozen.module.save_pretrained(tmp_path / "shapes" / "clip")
    tokenizer.save_pretrained(tmp_path / "shapes" / "clip")
    monkeypatch.setattr(aesthetic.weights, "path", lambda name: tmp_path / name)
    loaded = aesthetic.shapes_aesthetic()
    assert loaded.name == "shapes-aesthetic"
    batch = Batch(["a"] * 4)
    torch.testing.assert_close(loaded(images, batch), Aesthetic(clip, head)(images, batch), rtol=1e-2, atol=1e-2)


def test_the_head_is_one_hidden_layer_on_entries_of_unit_size():
    torch.manual_seed(0)
    head, seen = Head(48, 8).double(), F.normalize(torch.randn(5, 48, dtype=torch.float64), dim=1)
    w, b, v, c = (p.detach().numpy() for p in head.parameters())
    entries = seen.numpy() / np.sqrt((seen.numpy() ** 2).mean(1, keepdims=True))  # root mean square 1
    hidden = entries @ w.T + b
    expected = (hidden / (1 + np.exp(-hidden))) @ v[0] + c
    np.testing.assert_allclose(head(seen).detach().numpy(), expected, rtol=1e-12)


def test_prompts_are_not_read(clip, images):
    torch.manual_seed(0)
    reward = Aesthetic(clip, Head(clip.width))
    assert torch.equal(reward(images, Batch(["a"] * 4)), reward(images, Batch(["b"] * 4)))
    assert reward(images, Batch(["a"] * 4)).std() > 0


@pytest.fixture
def laion(clip, tokenizer, tmp_path, monkeypatch):
    """A folder with a CLIP and a head in LAION's layout: dropout takes numbers, layers 768-1024-128-64-16-1 are smaller."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip.frozen.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inside = (clip.width, 32, 24, 16, 8, 1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(inside)]
    dropout = [torch.nn.Dropout(0.2), torch.nn.Dropout(0.2), torch.nn.Dropout(0.1)]
    published = torch.nn.ModuleDict(
        {"layers": torch.nn.Sequential(*(m for pair in zip(layers, dropout, strict=False) for m in pair), *layers[3:])}
    ).eval()
    assert [n for n in published.state_dict() if "weight" in n] == [f"layers.{i}.weight" for i in (0, 2, 4, 6, 7)]
    with torch.no_grad():
        layers[-1].bias.fill_(5.0)
        layers[-1].weight.mul_(30)
    torch.save(published.state_dict(), tmp_path / "aesthetic-model.pth")
    return tmp_path, published


@torch.no_grad()
def test_laions_score_is_that_of_pil_transformers_and_its_own_head(laion, clip):
    """Within 1e-2, the limit for the aesthetic score, on a scale of 1 to 10; PIL rounds to 8 bits, we do not."""
    folder, published = laion
    reward = laion_aesthetic(str(folder), str(folder))
    pictures = photographs(80, 64)
    seen = processor(48)([Image.fromarray(p) for p in pictures], return_tensors="pt")["pixel_values"]
    features = clip.frozen.module.get_image_features(pixel_values=seen).pooler_output
    theirs = published["layers"](features / features.norm(dim=-1, keepdim=True))[:, 0]
    ours = reward(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, Batch(["a"] * 4))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert theirs.std() > 0.1, "the comparison would prove nothing"


def test_laions_head_from_safetensors_and_what_it_says(laion):
    folder, published = laion
    save_file(published.state_dict(), folder / "head.safetensors")
    reward = laion_aesthetic(str(folder / "head.safetensors"), str(folder))
    assert reward.name == f"aesthetic:{folder / 'head.safetensors'}"
    assert (reward.about.size, reward.about.licence) == (48, "not confirmed")


def test_layers_are_taken_by_number_and_not_as_they_lie_in_the_file(laion):
    state = laion[1].state_dict()
    state = {name.replace("layers.7", "layers.10"): x for name, x in reversed(state.items())}
    assert [layer.in_features for layer in linear_head(state, 16, "here").layers] == [16, 32, 24, 16, 8]


@pytest.mark.parametrize("broken", ["layers.0.weight", "layers.7.bias", "layers.4.weight"])
def test_a_head_of_another_network(laion, broken):
    folder, published = laion
    state = published.state_dict()
    del state[broken]
    save_file(state, folder / "head.safetensors")
    with pytest.raises(UserError, match="no head of linear layers from 16 features to 1 score"):
        laion_aesthetic(str(folder / "head.safetensors"), str(folder))
