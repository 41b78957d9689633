import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tropism.core import Batch
from tropism.rewards import aesthetic
from tropism.rewards.aesthetic import Aesthetic, Head, bradley_terry_loss


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
