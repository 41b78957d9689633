import field_faults
import pytest
import torch
from faults import MODELS, REWARDS, Painter, colour
from health import HEALTHY, MORE, batch_of, reward_of
from tiny_families import Folders

from tropism.core import Batch, clamp
from tropism.doctor import examine as doctor
from tropism.doctor.examine import Finding, examine, report_lines
from tropism.models import lora
from tropism.models.load import load_model
from tropism.rewards.combine import weighted
from tropism.rewards.load import load_reward, load_rewards

BATCH = Batch(["red cat", "a cat on mars", "red"], negative_prompts=["", "bad", ""])
PLAIN = Batch(BATCH.prompts)
SQUARE = {"height": 16, "width": 16}


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Load a tiny pipeline by its name; each folder is written once."""
    folders = Folders(tmp_path_factory.mktemp("doctor"))

    def load(name, **options):
        if name == "shapes":
            return load_model(name, **options)
        return load_model(
            folders[name], **(SQUARE if name in ("flux", "schnell", "auraflow", "chroma") else {}), **options
        )

    return load


def loud(findings, *levels):
    return [(f.level, f.check) for f in findings if f.level in (levels or ("fault", "warning"))]


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", REWARDS)
def test_a_planted_reward_fault_is_named_and_no_other(name):
    check, level, build = REWARDS[name]
    findings = examine(Painter(), build(), PLAIN, guidance=3.0)
    assert (level, check) in loud(findings)
    assert {c for _, c in loud(findings, "fault")} <= {check}


@pytest.mark.parametrize("name", MODELS)
def test_a_planted_model_fault_is_named_and_no_other(name, pipelines):
    check, level, alter = MODELS[name]
    model = pipelines("sd1")
    alter(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=check == "autocast"):
        findings = examine(model, colour, BATCH, guidance=7.5)
    assert loud(findings) == [(level, check)]


@pytest.mark.parametrize("name", field_faults.REWARDS)
def test_a_reward_fault_of_the_field_is_named_and_no_other(name):
    check, level, build, _ = field_faults.REWARDS[name]
    findings = examine(Painter(), build(), PLAIN, guidance=3.0)
    assert loud(findings) == ([(level, check)] if check else [])


@pytest.mark.parametrize("name", field_faults.BLACK_BOX)
def test_a_fault_that_policy_gradients_meet_is_named_and_no_other(name):
    check, level, build, _ = field_faults.BLACK_BOX[name]
    assert loud(examine(Painter(), build(), PLAIN, guidance=3.0, gradient=False)) == [(level, check)]


SLOW_HERE = (
    *("scaling factor forgotten", "channels swapped", "wrong sign", "time in other units"),
    "scaling factor twice",
    "last time for all",
    "adapter on nothing",
    "sampler not synchronised",
    "rounded on the way",
    *(SMALL := ("guidance at the first step only", "decoder draws noise", "the same noise every update")),
)
"""Twins of others, which the recipe plants too, and SMALL, planted here on a small model."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_HERE)) for n in field_faults.MODELS]
)
def test_a_model_fault_of_the_field_is_named_and_no_other(name, pipelines):
    check, level, alter, _ = field_faults.MODELS[name]
    model = pipelines("sd1")
    alter(model)
    assert loud(examine(model, colour, BATCH, guidance=7.5)) == ([(level, check)] if check else [])


@pytest.mark.parametrize("name", SMALL)
def test_a_model_fault_is_named_on_a_small_model(name):
    check, level, alter, _ = field_faults.MODELS[name]
    model = Painter()
    alter(model)
    assert loud(examine(model, colour, PLAIN, guidance=3.0)) == [(level, check)]


def test_pixels_that_may_come_back_are_no_fault(pipelines):
    """As many are clamped as where the clamp is shut, but core.clamp lets the gradient that leads inwards through."""
    model = pipelines("sd1")
    field_faults.open_again(model)
    assert not loud(examine(model, colour, BATCH, guidance=7.5))


def test_rare_successes_are_not_called_constant():
    """A black-box reward that differs on other pictures of the prompt, or on other pictures of one of two prompts, can teach."""
    dark = lambda images, batch: [float(m < 0.1) for m in images.mean((1, 2, 3)).tolist()]
    cats = lambda images, batch: [
        m if "cat" in p else 0.0 for p, m in zip(batch.prompts, images.mean((1, 2, 3)).tolist(), strict=False)
    ]
    for reward, batch in ((dark, PLAIN), (cats, Batch(["a dog", "a large cat"]))):
        assert not loud(examine(Painter(), reward, batch, guidance=3.0, gradient=False))


@pytest.mark.parametrize(("share", "level"), [(0.4, None), (0.7, "warning"), (0.98, "fault")])
def test_the_clamped_share_is_judged_at_its_limits(share, level, pipelines):
    """A decoder of so much contrast that this share of its pixels is clamped."""
    model = pipelines("sd1")
    old, latents = model.decode, []
    examine(model, lambda images, batch: latents.append(images.detach()) or colour(images, batch), BATCH, guidance=1.0)
    far = (latents[0] - 0.5).abs().flatten()
    contrast = 0.5 / far.quantile(1 - share).item()
    model.decode = lambda x0: clamp(contrast * (old(x0) - 0.5) + 0.5)
    findings = [f for f in examine(model, colour, BATCH, guidance=1.0) if f.check == "clamped pixels"]
    assert [f.level for f in findings if f.level != "note"] == ([level] if level else [])


def test_a_reward_that_is_saturated_on_the_models_own_pictures_is_a_warning():
    seen = []
    examine(Painter(), lambda images, batch: seen.append(images.detach()) or colour(images, batch), PLAIN, guidance=3.0)
    four = next(images for images in seen if len(images) == 4).mean((1, 2, 3))  # two of the model's own, two of noise
    side = 1 if four[2:].max() > four[:2].max() else -1
    wall = ((side * four[:2]).max() + (side * four[2:]).max()) / 2
    saturated = lambda images, batch: (side * images.mean((1, 2, 3)) - wall).clamp_min(0)
    assert loud(examine(Painter(), saturated, PLAIN, guidance=3.0)) == [("warning", "reward flat")]


def test_a_guard_that_is_satisfied_does_not_stop_a_run():
    guard = lambda images, batch: -(0.02 - images.mean((1, 2, 3))).clamp_min(0)
    findings = examine(Painter(), weighted([(colour, 1.0), (guard, 5.0)]), PLAIN, guidance=3.0)
    assert loud(findings) == [("warning", "reward flat")]


def test_a_reward_that_scores_some_prompts_only_is_not_dead():
    """Its prompts are not among the two that are looked at, but among the run's."""
    batch = Batch(["a cat", "a truck", "a house", "dogs"])
    dogs = lambda images, batch: colour(images, batch) * images.new_tensor([float("dog" in p) for p in batch.prompts])
    assert loud(examine(Painter(), dogs, batch, guidance=3.0)) == [("warning", "reward flat")]
    far = lambda images, batch: (images.mean((1, 2, 3)) - 0.95).clamp_min(0)
    assert loud(examine(Painter(), far, PLAIN, guidance=3.0)) == [("warning", "reward flat")]


def test_a_dead_part_is_named_and_the_living_one_proved():
    findings = examine(Painter(), REWARDS["a dead part of a sum"][2](), PLAIN, guidance=3.0)
    (fault,) = [f for f in findings if f.level == "fault"]
    assert "'without_graph'" in fault.text


def test_an_exception_says_who_what_and_where():
    (raised,) = examine(Painter(), REWARDS["raises"][2](), PLAIN, guidance=3.0)[:1]
    assert "Reward 'broken' raised KeyError: 'width' (faults.py, line " in raised.text
    texts = [f.text for f in examine(Painter(), REWARDS["refuses"][2](), PLAIN, guidance=3.0)]
    assert "The prompt names no colour. Name one." in texts


def test_memory_that_runs_out_is_no_fault():
    def hungry(images, batch):
        raise torch.OutOfMemoryError("too much")

    assert loud(examine(Painter(), hungry, PLAIN, guidance=3.0)) == [("warning", "reward runs")]


def test_a_broken_encoder_is_no_traceback():
    model = Painter()
    model.encode = lambda batch, draw=None: 1 / 0
    (raised,) = examine(model, colour, PLAIN, guidance=3.0)
    assert (raised.level, raised.check) == ("fault", "model runs")
    assert "ZeroDivisionError" in raised.text


def test_nothing_to_train(pipelines):
    assert loud(examine(pipelines("sd1", lora=None), colour, BATCH, guidance=7.5)) == [("fault", "adapter acts")]


def test_wherever_a_network_hides_it_is_found():
    import functools

    net = torch.nn.Linear(48, 1).double()

    class Judge:
        def __init__(self, inner):
            self.inner = {"nets": [inner]}

        def __call__(self, images, batch):
            return self.inner["nets"][0](images.flatten(1))[:, 0]

    def given(net, images, batch):
        return net(images.flatten(1))[:, 0]

    rewards = [Judge(net), Judge(net).__call__, functools.partial(given, net), lambda i, b, net=net: given(net, i, b)]
    for reward in [*rewards, weighted([(colour, 1), (Judge(net), 1)])]:
        reward_name = getattr(reward, "name", "mine")
        findings = examine(Painter(), reward, PLAIN, guidance=3.0)
        assert loud(findings) == [("warning", "reward frozen")], reward_name


# ---------------------------------------------------------------------------------------------------- health


@pytest.mark.parametrize("name", HEALTHY)
def test_health_raises_no_alarm(name, pipelines):
    source, options, reward, guidance = HEALTHY[name]
    model = pipelines(source, **options)
    findings = examine(model, reward_of(reward), batch_of(source), guidance=guidance)
    assert not loud(findings), report_lines(findings)
    assert report_lines(findings)[-1].startswith("Everything in order: ")
    proved = {f.check: f.error for f in findings if f.error is not None}
    assert proved["reward gradient"] < 1e-3
    assert proved.get("adapter reached", 0) == 0
    if model.dtype != torch.bfloat16:
        assert max(proved["decoder gradient"], proved["chain gradient"]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_health_raises_no_alarm(name, pipelines):
    source, options, reward, guidance, gradient, batch = MORE[name]
    model = Painter() if source == "own" else pipelines(source, **options)
    findings = examine(model, reward_of(reward), batch, guidance=guidance, gradient=gradient)
    assert not loud(findings), report_lines(findings)


def test_a_users_own_model_is_enough():
    findings = examine(Painter(), colour, PLAIN, guidance=3.0)
    assert not loud(findings)
    assert max(f.error for f in findings if f.error is not None) < 1e-5


@pytest.mark.parametrize("prompts", [["red cat"], [""], ["red", "red"]])
def test_one_prompt_is_enough(prompts, pipelines):
    findings = examine(pipelines("sd1"), colour, Batch(prompts), guidance=7.5)
    assert not loud(findings)
    assert "guidance" in {f.check for f in findings if f.error is not None}
    assert "prompts" in {f.check for f in findings if f.error is None}


KINKED = {
    "total variation": lambda images, batch: -(images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3)),
    "brightest": lambda images, batch: images.amax((1, 2, 3)),
    "median": lambda images, batch: images.flatten(1).median(1).values,
    "relu": lambda images, batch: torch.relu(images - 0.5).mean((1, 2, 3)),
    "steep": lambda images, batch: torch.sigmoid(100 * (images - 0.5)).mean((1, 2, 3)),
    "clamped": lambda images, batch: images.mean((1, 2, 3)).clamp(0.2, 0.8),
    "bicubic": lambda images, batch: (
        torch.nn.functional.interpolate(images, (11, 11), mode="bicubic").clamp(0, 1).square().mean((1, 2, 3))
    ),
    "a large offset": lambda images, batch: 1000 + images.mean((1, 2, 3)),
    "small": lambda images, batch: 1e-6 * images.mean((1, 2, 3)),
    "in float32": lambda images, batch: images.float().square().mean((1, 2, 3)),
    "writes into its input": lambda images, batch: images.mul_(2).sub_(1).square().mean((1, 2, 3)),
    "in bfloat16": lambda images, batch: images.bfloat16().square().mean((1, 2, 3)),
}


@pytest.mark.parametrize("name", KINKED)
def test_an_awkward_reward_raises_no_alarm(name):
    assert not loud(examine(Painter(), KINKED[name], PLAIN, guidance=7.5))


def test_eight_bits_straight_through_are_smooth_enough(pipelines):
    def rounded(images, batch):
        return (images + ((255 * images).round() / 255 - images).detach()).square().mean((1, 2, 3))

    assert not loud(examine(pipelines("sd1"), rounded, BATCH, guidance=7.5))


# ---------------------------------------------------------------------------------------------------- manners


def test_everything_is_left_as_it_was_found(pipelines):
    model, reward = pipelines("sd1"), load_rewards(["jpeg"])
    frozen = load_reward("shapes-count")
    seen = frozen.frozen
    mixed = weighted([(reward, 1), (lambda i, b: seen.like(i)(i).sum((1, 2, 3)), 1)])
    lora.scale(model, 0.7)
    for p in model.trainable().values():
        p.grad = torch.full_like(p, 3)
    everything = [*model.network.parameters(), *model.vae.parameters()]
    before = [p.detach().clone() for p in everything]
    model.calls["network"], copies = 5, dict(seen._copies)
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.network.modules()]
    scales = [dict(layer.scaling) for layer in model.network.modules() if isinstance(layer, lora.LoraLayer)]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    assert not loud(examine(model, mixed, BATCH, guidance=7.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, was) for p, was in zip(everything, before, strict=True))
    assert all(bool((p.grad == 3).all()) for p in model.trainable().values())
    assert model.calls == {"network": 5, "backward": 0, "decode": 0}
    assert seen._copies == copies
    assert scales == [dict(m.scaling) for m in model.network.modules() if isinstance(m, lora.LoraLayer)]
    assert flags == [
        (m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model.network.modules()
    ]
    assert torch.is_autocast_cache_enabled()
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["base stays off", "denoiser raises", "denoiser drops out"])
def test_a_fault_too_leaves_everything(name, pipelines):
    model = pipelines("sd1")
    before = [p.detach().clone() for p in model.network.parameters()]
    MODELS[name][2](model)
    state = torch.get_rng_state()
    examine(model, colour, BATCH, guidance=7.5)
    assert lora.is_on(model.network)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, was) for p, was in zip(model.network.parameters(), before, strict=True))


def test_a_network_that_counts_its_calls_is_put_back():
    net = torch.nn.BatchNorm2d(3).double().requires_grad_(False)
    examine(Painter(), lambda images, batch: net(images).square().mean((1, 2, 3)), PLAIN, guidance=3.0)
    assert net.num_batches_tracked == 0
    assert not net.running_mean.any()


def test_the_same_twice_and_under_no_grad(pipelines):
    model = pipelines("sd1")
    first = examine(model, colour, BATCH, guidance=7.5)
    with torch.no_grad():
        assert examine(model, colour, BATCH, guidance=7.5) == first


def test_every_check_is_planted():
    field = (field_faults.REWARDS, field_faults.MODELS, field_faults.BLACK_BOX)
    planted = [plant[0] for table in (REWARDS, MODELS, *field) for plant in table.values()]
    assert {check for check in planted if check} == {*doctor.CHECKS, *doctor.STIRRED}
    assert sum(check is None for check in planted) <= 0.05 * len(planted), "at least 95 % are named"


def test_report_lines():
    lines = report_lines(
        [
            Finding("note", "a", "right to 3e-06", 3e-6),
            Finding("note", "b", "Not measurable."),
            Finding("warning", "c", "Odd."),
            Finding("fault", "d", "Wrong."),
        ]
    )
    assert lines == [
        "Fault, d: Wrong.",
        "Warning, c: Odd.",
        "Note, b: Not measurable.",
        "The rest in order: right to 3e-06.",
    ]
    assert report_lines([Finding("note", "a", "right to 3e-06", 3e-6)]) == ["Everything in order: right to 3e-06."]
    assert report_lines([]) == []
