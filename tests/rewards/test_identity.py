"""By what a resumed run and a server's clients notice another reward: its text without folders, its files, the servers it asks."""

import pytest
import reward_stub

from tropism.rewards.identity import identity_of, served
from tropism.rewards.load import load_rewards


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def a(images, batch):\n    return images.mean((1, 2, 3))\n")
    return file


@pytest.mark.parametrize(
    "texts", [["jpeg"], ["shapes-count", "jpeg=0.3"], ["pickscore"], ["hps:v2.1=2"], ["minimum(a,b)"]]
)
def test_plain_names_are_themselves(texts):
    """Runs that were begun and results that were kept hold them so."""
    assert identity_of(texts) == " ".join(texts)


@pytest.mark.parametrize(
    "text", ["{}:a", "{}:a=0.5", "old:{}:a", "hinge({}:a,0.3)", "product(jpeg=2,minimum(clip:x,{}:a=3))"]
)
def test_the_content_of_a_file_counts_wherever_it_stands(mine, text, tmp_path, monkeypatch):
    asked = text.format(mine)
    before = identity_of([asked])
    monkeypatch.chdir(tmp_path)
    assert identity_of([text.format("mine.py")]) == before, "the folder may be written in another way"
    assert str(tmp_path) not in before
    mine.write_text(mine.read_text().replace("mean", "amax"))
    assert identity_of([asked]) != before


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("http://one:8000/judge", "http://two:8000/judge"),
        ("http://one:8000/judge=2", "http://one:8001/judge=2"),
        ("product(a/x.py:f,b.py:g)", "product(a/z.py:f,b.py:g)"),
        ("hinge(http://one/judge,1)", "hinge(http://two/judge,1)"),
        ("clip:some/model", "clip:other/model"),
        ("clip:some/model", "vqa:some/model"),
        ("old:a/x.py:f", "old-uint8:a/x.py:f"),
        ("old:a/x.py:f", "a/x.py:f"),
        ("dock:/a/dock", "dock:/b/dock"),
    ],
)
def test_what_differs_differs(one, two):
    assert identity_of([one]) != identity_of([two])


def test_a_folder_of_weights_may_be_written_in_another_way(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert identity_of(["clip:model"]) == identity_of([f"clip:{tmp_path}/model/"]) == "clip:model"


@pytest.mark.parametrize("text", ["{}", "{}=0.5", "hinge({},1)"])
def test_the_hash_of_a_server_counts(text):
    with reward_stub.running() as stub:
        asked, found = [text.format(stub.url), "jpeg"], []
        for stub.health["hash"] in ("a1", "b2", "a1"):
            found.append(identity_of(asked, load_rewards(asked)))
        assert found[0] == found[2] != found[1]
        assert served(load_rewards(asked)) == ["a1"] and served(None) == []
