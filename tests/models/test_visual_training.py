"""Training an image adapter: a beginning that changes nothing, the loss against its formula, what is dropped, what trains, its files."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_families import SIZE
from tiny_visual import SIDE, WIDTH, tiny_text_pixel

from tropism.core import Batch, Draw, UserError
from tropism.models import visual
from tropism.models.load import load_model
from tropism.models.lora import LoraSettings
from tropism.models.visual_encoder import PictureEncoder
from tropism.models.visual_training import adapter_loss, begin, dropped, fresh, save

COUNT = 4
BATCH = Batch(["red cat", "a cat on mars", "red", "cat"])
DRAW = Draw(3, 7, BATCH.index)
GENERATOR = torch.Generator().manual_seed(0)
PICTURES, OTHERS = (torch.rand(COUNT, 3, SIZE, SIZE, generator=GENERATOR) for _ in range(2))
WHOLE = {"drop_image": 0.0, "drop_text": 0.0, "drop_both": 0.0}


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PictureEncoder(SIDE, WIDTH, (8, 8))


@pytest.fixture
def load(folders, read_once, tmp_path_factory):
    def build(base="pixel", **options):
        if base == "epsilon" and base not in folders:
            folders[base] = tiny_text_pixel(tmp_path_factory.mktemp(base), base)
        return load_model(folders[base], **{"lora": None, **options})

    return build


def begun(model, stir=0.0):
    for i, p in enumerate(begin(model, encoder()).values()):
        p.data += stir * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
    return model


@torch.no_grad()
def said(model, scale):
    batch = replace(BATCH, visual=PICTURES, visual_scale=torch.full((COUNT,), scale))
    return model.predict(DRAW(0, 0, model.shape).to(model.dtype), 401.0, model.encode(batch), 3.0)


@pytest.mark.parametrize("base", ["sd1", "sdxl", "pixel"])
def test_a_fresh_adapter_changes_nothing(load, base):
    model, plain = begun(load(base)), load(base)
    expected = plain.predict(DRAW(0, 0, plain.shape), 401.0, plain.encode(BATCH), 3.0)
    for scale in (0.5, 30.0):
        assert torch.equal(said(model, scale), expected)
    assert model.visual.of(PICTURES).std(0).min() > 0


@pytest.mark.parametrize("base", ["pixel", "epsilon", "sd1"])
def test_the_loss_is_0_where_the_network_is_right(load, base, monkeypatch):
    """And elsewhere the mean square of what it says too much. What is right is diffusers' own."""
    model = begun(load(base))
    x0 = model.latents(PICTURES).double()
    bars = torch.tensor(model.process.alpha_bars).double()
    seen = []

    def right(x_t, t, text):
        alpha, sigma = (bars[t] ** 0.5)[:, None, None, None], ((1 - bars[t]) ** 0.5)[:, None, None, None]
        eps = (x_t - alpha * x0) / sigma
        seen.append(t)
        target = eps if model.prediction == "epsilon" else alpha * eps - sigma * x0
        return (target + 0.1 * torch.arange(COUNT)[:, None, None, None]).float()

    monkeypatch.setattr(model, "counted", right)
    loss = adapter_loss(model, PICTURES, BATCH, DRAW)
    torch.testing.assert_close(loss, 0.01 * torch.arange(COUNT).float() ** 2, rtol=1e-3, atol=1e-5)
    assert len(set(seen[0].tolist())) == COUNT


def test_a_row_is_the_same_in_any_batch(load):
    model = begun(load(dtype=torch.float64), 0.3)
    whole = adapter_loss(model, PICTURES, BATCH, DRAW, others=OTHERS)
    for rows in ([2, 0], [3]):
        part = adapter_loss(model, PICTURES[rows], BATCH[rows], DRAW[rows], others=OTHERS[rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-9, atol=1e-12)
    again = adapter_loss(model, PICTURES, BATCH, Draw(3, 8, BATCH.index), others=OTHERS)
    assert (again - whole).abs().min() > 1e-6


def test_what_is_dropped(load):
    """In exactly the asked shares, and replaced by what stands for its absence."""
    model = begun(load(), 0.3)
    cond = model.encode(replace(BATCH, visual=PICTURES))[[0] * 100]
    chance = torch.arange(100) / 100 + 0.005
    text = dropped(cond, chance, (0.05, 0.10, 0.15))
    absent = lambda k: (text[k] == cond.negative[k]).flatten(1).all(1)
    image, words = absent("image"), absent("text")
    assert (image & ~words).sum() == 5
    assert (words & ~image).sum() == 10
    assert (words & image).sum() == 15
    for kept, k in ((~image, "image"), (~words, "text")):
        assert torch.equal(text[k][kept], cond.positive[k][kept])
    assert bool((text["image_scale"] == 1).all())


def test_an_exact_mean_stands_for_the_drawn_picture(load):
    """That is the drawn one it changes nothing; another changes every row; it is told what each row is shown."""
    model = begun(load(dtype=torch.float64), 0.3)
    x0, told = model.latents(PICTURES.double()), []
    how = {"drop_image": 0.25, "drop_text": 0.25, "drop_both": 0.25}
    loss = lambda mean: adapter_loss(
        model, PICTURES, BATCH, DRAW, exact=lambda x_t, t, *seen: told.append(seen) or mean, **how
    )
    whole = adapter_loss(model, PICTURES, BATCH, DRAW, **how)
    torch.testing.assert_close(loss(x0), whole, rtol=1e-6, atol=1e-9)
    assert ((loss(x0 - 0.5) - whole).abs() > 1e-3).all()
    cond, chance = model.encode(replace(BATCH, visual=PICTURES)), torch.tensor([0.1, 0.4, 0.6, 0.9])
    for shares, (words, picture) in (
        ((1.0, 0, 0), (1, 0)),
        ((0, 1.0, 0), (0, 1)),
        ((0, 0, 1.0), (0, 0)),
        ((0, 0, 0), (1, 1)),
    ):
        named = dict(zip(how, shares, strict=True))
        adapter_loss(model, PICTURES, BATCH, DRAW, exact=lambda x_t, t, *seen: told.append(seen) or x0, **named)
        assert [bool(each.all()) and bool(each.any()) for each in told[-1]] == [bool(words), bool(picture)]
        text = dropped(cond, chance, shares)
        assert torch.equal(text["text"], (cond.positive if words else cond.negative)["text"])


def test_half_of_the_prompts_are_another_view(load, monkeypatch):
    model, shown = begun(load()), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda batch, draw=None: shown.append(batch.visual) or encode(batch, draw))
    n = 60
    batch, draw = Batch(["red"] * n), Draw(0, 0, tuple(range(n)))
    light, dark = torch.ones(n, 3, SIZE, SIZE), torch.zeros(n, 3, SIZE, SIZE)
    for share in (0.0, 0.5, 1.0):
        adapter_loss(model, light, batch, draw, others=dark, other_view=share)
    adapter_loss(model, light, batch, draw)
    counts = [(each[:, 0, 0, 0] == 0).sum().item() for each in shown]
    assert counts[0] == 0 and counts[2] == n and counts[3] == 0
    assert 18 < counts[1] < 42


def test_only_the_adapter_trains(load):
    model = begun(load(), 0.3)
    adapter_loss(model, PICTURES, BATCH, DRAW, **WHOLE).sum().backward()
    trained = model.trainable()
    assert len(trained) == 4 + 2 * 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    others = [p for n, p in model.network.named_parameters() if n not in trained]
    frozen = [*others, *model.visual.encoder.parameters(), *model.texts.encoders.text_encoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_training_lowers_the_loss_and_the_picture_is_used(load):
    model = begun(load())
    optimiser = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=1e-2)
    plain = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    batch, held = Batch(["cat"] * COUNT), Draw(9, 0, BATCH.index)
    loss = lambda pictures, draw, **how: adapter_loss(model, pictures, batch, draw, **WHOLE, **how).mean()
    before = loss(plain, held).item()
    for update in range(40):
        optimiser.zero_grad()
        loss(plain, Draw(3, update, BATCH.index)).backward()
        optimiser.step()
    after, swapped = loss(plain, held).item(), loss(plain, held, others=plain.roll(1, 0), other_view=1.0).item()
    assert after < 0.9 * before
    assert after < swapped


def test_a_trained_adapter_is_saved_and_read_again(load, folders, tmp_path):
    model = begun(load("sd1"), 0.3)
    file = save(model, tmp_path / "adapter")
    again = load("sd1", visual=file.parent)
    assert torch.equal(said(again, 0.7), said(model, 0.7))
    assert not any(p.requires_grad for p in again.network.parameters())
    pipe = StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipe.load_ip_adapter(str(file.parent), "", file.name, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    cond = model.encode(replace(BATCH, visual=PICTURES, visual_scale=torch.full((COUNT,), 0.7)))
    added = {"image_embeds": [cond.positive["image"][:, None]]}
    x = DRAW(0, 0, model.shape)
    theirs = pipe.unet(x, 401, cond.positive["text"], added_cond_kwargs=added).sample
    torch.testing.assert_close(model.predict(x, 401.0, cond, 1.0), theirs, rtol=1e-5, atol=1e-5)


def test_the_beginning_is_keyed(load):
    network = load().network
    before = torch.random.get_rng_state()
    one, same, other = (fresh(network, WIDTH, seed)["image_proj"]["proj.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.std().item() == pytest.approx(WIDTH**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"drop_image": -0.1}, "must be at least 0"),
        ({"drop_text": 0.6, "drop_both": 0.5}, "sum of the shares at most 1"),
        ({"other_view": 1.5}, "other_view is 1.5"),
    ],
)
def test_shares_that_cannot_be(load, how, says):
    with pytest.raises(UserError, match=says):
        adapter_loss(begun(load()), PICTURES, BATCH, DRAW, **how)


def test_models_that_cannot_be_given_an_adapter(load):
    with pytest.raises(UserError, match="has an image adapter already"):
        begin(begun(load()), encoder())
    with pytest.raises(UserError, match=r"must be frozen.*lora=None"):
        begin(load(lora=LoraSettings()), encoder())
    with pytest.raises(UserError, match=r"at least float32.*torch.bfloat16"):
        begin(load(dtype=torch.bfloat16), encoder())
    with pytest.raises(UserError, match="reads no visual prompts"):
        begin(load("sd3"), encoder())
    with pytest.raises(UserError, match=r"no image adapter.*Your own"):
        adapter_loss(load(), PICTURES, BATCH, DRAW)
    assert visual.FILE in visual.PUBLIC
