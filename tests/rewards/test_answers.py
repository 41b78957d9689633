"""What rewards return: taken where it can mean one thing, else an error that names the reward, what was wanted and what came."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tropism.answers import place_of
from tropism.core import Batch, RewardFailed, UserError, scored
from tropism.rewards.combine import weighted

PICTURES, TWO = torch.rand(2, 3, 4, 4), Batch(["a cat", "a dog"])


def returning(value):
    def mine(samples, batch):
        return value

    return mine


def one(value, samples=PICTURES, batch=TWO):
    return scored(returning(value), samples, batch)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2]),
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1),
        [1, 2],
        (1.0, 2.0),
        [[1.0], [2.0]],
        [True, 2],
        np.array([1, 2]),
        np.array([[1.0], [2.0]], dtype=np.float16),
        np.array([1, 2.0], dtype=object),
        [torch.tensor(1.0), torch.tensor([2])],
        [np.float64(1), np.int64(2)],
    ],
)
def test_what_can_mean_one_thing(value):
    found = one(value)
    assert found.shape == (2,) and found.dtype in (torch.float32, torch.float64) and found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, r"NoneType; is a return missing\?"),
        ("12", "str, not numbers"),
        (["1", "2"], "list, not numbers"),
        ({"a": 1}, "dict, not numbers"),
        (3.0, r"shape \(\)"),
        (torch.tensor(3.0), r"shape \(\)"),
        (torch.ones(3), r"shape \(3,\)"),
        ([1.0], r"shape \(1,\)"),
        ([], r"shape \(0,\)"),
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        (torch.ones(2, 3, 4, 4), r"shape \(2, 3, 4, 4\)"),
        (torch.ones(2, dtype=torch.complex64), "complex numbers"),
        ([1j, 2], "list, not numbers"),
        ([torch.ones(2), torch.ones(2)], "list, not numbers"),
        ((torch.ones(2), {"info": 1}), "tuple, not numbers"),
        (np.array(["a", "b"]), "ndarray, not numbers"),
        ([[1, 2], [3]], "list, not numbers"),
        (iter([1, 2]), "list_iterator, not numbers"),
    ],
)
def test_what_cannot(value, says):
    with pytest.raises(UserError, match=rf"Reward 'mine' returned {says}.*for 2 samples.*shape \(2,\)") as error:
        one(value)
    assert "\n" not in str(error.value)


def test_none_among_numbers_cannot_be_scored():
    assert one([None, 2.0]).isnan().tolist() == [True, False]
    assert one([torch.tensor(1.0), None]).isnan().tolist() == [False, True]
    assert one(np.array([None, 1.5], dtype=object)).isnan().tolist() == [True, False]


def test_precision():
    tokens = torch.ones(2, 5, dtype=torch.long)
    for value in ([0.5, 1.5], np.array([0.5, 1.5]), [torch.tensor(0.5), torch.tensor(1.5)]):
        found = one(value, tokens)
        assert found.tolist() == [0.5, 1.5] and found.dtype == torch.float64, (
            "tokens are whole numbers, rewards are not"
        )
    assert one(torch.tensor([1, 257]), PICTURES.bfloat16()).tolist() == [1, 257]
    assert one([0.1, 0.2], PICTURES.double()).tolist() == [0.1, 0.2]
    assert one(torch.ones(2, dtype=torch.float64)).dtype == torch.float64, "what has a precision keeps it"


def test_one_sample_may_be_a_plain_number():
    assert one(0.5, PICTURES[:1], TWO[:1]).tolist() == [0.5]
    assert one(torch.tensor(0.5), PICTURES[:1], TWO[:1]).shape == (1,)


def test_gradients_pass():
    pictures = PICTURES.clone().requires_grad_()
    for function in (lambda x, _: x.mean((2, 3))[:, :1], lambda x, _: [x[0].mean(), x[1].mean()]):
        found = scored(function, pictures, TWO)
        assert torch.autograd.grad(found.sum(), pictures)[0].abs().sum() > 0


@given(
    st.lists(st.one_of(st.none(), st.floats(width=32), st.booleans(), st.integers(-1000, 1000)), min_size=2, max_size=2)
)
def test_any_list_of_numbers(values):
    expected = torch.tensor([float("nan") if v is None else float(v) for v in values])
    torch.testing.assert_close(one(values), expected, equal_nan=True)


@given(st.recursive(st.one_of(st.none(), st.integers(0, 3), st.text(max_size=2)), lambda s: st.lists(s, max_size=3)))
def test_anything_is_numbers_or_one_line(value):
    try:
        found = one(value)
    except UserError as error:
        found = str(error)
    assert found.startswith("Reward 'mine' returned") if isinstance(found, str) else found.shape == (2,)


# ---------------------------------------------------------------------------------------------------- exceptions


def fussy(samples, batch):
    if "a dog" in batch.prompts:
        raise KeyError("tail\nand more")
    return samples.mean((1, 2, 3))


def crowded(samples, batch):
    if len(samples) > 1:
        raise IndexError("one at a time")
    return samples.mean((1, 2, 3))


def deep(samples, batch):
    return torch.cat([samples[0], samples[1, :2]], dim=7)


def test_an_exception_names_reward_place_and_prompt():
    with pytest.raises(
        RewardFailed, match=r"^Reward 'fussy' raised KeyError: .*test_answers.py, line \d+.*'a dog'\. Corr"
    ) as e:
        scored(fussy, PICTURES, TWO)
    assert torch.equal(e.value.samples, PICTURES) and e.value.batch is TWO
    assert isinstance(e.value.__cause__, KeyError) and "\n" not in str(e.value)
    with pytest.raises(RewardFailed, match="2 samples together, the first of the prompt 'a cat'"):
        scored(crowded, PICTURES, TWO)
    with pytest.raises(RewardFailed, match="Reward 'fussy' raised KeyError"):
        weighted([(fussy, 1), (crowded, 2)])(PICTURES, TWO)


def test_the_place_is_in_their_own_file():
    with pytest.raises(RewardFailed, match=r"raised \w+: .* \(test_answers.py, line \d+\)"):
        scored(deep, PICTURES, TWO)
    assert place_of(ValueError("never raised")) == "somewhere"


@pytest.mark.parametrize("kind", [UserError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_not_the_rewards_fault_passes(kind):
    def mine(samples, batch):
        raise kind("as it is")

    with pytest.raises(kind) as error:
        scored(mine, PICTURES, TWO)
    assert str(error.value) == "as it is" and type(error.value) is kind
