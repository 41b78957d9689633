"""The page, the pictures and the model card of a run: self-contained, and nothing from data becomes markup."""

import re
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image

from tropism.run import card, pictures, report
from tropism.run.evaluate import Evaluation

EVIL = "<script>alert(1)</script> | `x` [link](http://evil) ![i](javascript:1) **b**\n# head \x1b[31m"


def evaluation(value: float, prompts: list[str], size: int = 16) -> Evaluation:
    images = torch.rand(len(prompts), 3, size, size, generator=torch.Generator().manual_seed(0))
    columns = {
        "reward": torch.linspace(0, 1, len(prompts)) + value,
        "jpeg & <b>": torch.ones(len(prompts)) * value,
        "drift": torch.full((len(prompts),), value),
    }
    return Evaluation(images * (1 - value), columns, prompts, 0.5 - value / 10)


def finished(prompts=("three red circles on sand", EVIL, "word " * 200, "x" * 500, ""), **changes) -> report.Finished:
    prompts = list(prompts)
    lines = [{"update": 0, "held_out/reward": 0.1, "diversity": 0.5, "drift": 0.0}]
    lines += [
        {"update": u, "reward": u / 9, "reward_std": 0.1, "gradient_norm": 1 / u, "calls": {"network": 3}}
        for u in range(1, 9)
    ]
    lines += [
        {"update": 9, "reward": 1.0, "held_out/reward": 0.9, "held_out/<i>$x_1": 2.0, "diversity": 0.4, "drift": 0.2}
    ]
    values = {
        "method": "alignprop",
        "base": "shapes <img src=x>",
        "load": "'folder'",
        "rewards": {"jpeg": 0.3, "<u>": 1.0},
        "prompts": prompts,
        "seed": 4,
        "command": "tropism align alignprop --prompts 'a ``` <b>'",
        "config": {"prompt": EVIL},
        "environment": {"versions": {"torch": "2"}},
        "before": evaluation(0.0, prompts),
        "after": evaluation(0.3, prompts),
        "lines": lines,
        "limits": ["one seed <script>"],
    }
    return report.Finished(**(values | changes))


def test_the_card_of_full_weights_names_the_denoiser():
    text = card.card(finished(adapter=False, part="transformer"))
    assert 'pipe.transformer.load_state_dict(load_file("weights/trained.safetensors"))' in text


def test_the_card_tells_what_each_strength_gives():
    text = card.card(finished(strengths={0.0: {"reward": 1.0, "a|b": 2.0}, 0.5: {"reward": 1.5, "a|b": 2.25}}))
    table = [line for line in text.splitlines() if line.startswith(("| strength", "| 0"))]
    assert table == ["| strength | reward | a\\|b |", "| 0 | 1 | 2 |", "| 0.5 | 1.5 | 2.25 |"]
    assert 'load_lora_weights("lora", adapter_name="tropism")' in text
    assert "## Strength" not in card.card(finished())


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def test_page_is_self_contained_and_escaped(tmp_path):
    page = report.write(tmp_path, finished()).read_text()
    seen = Tags()
    seen.feed(page)
    assert not {"script", "iframe", "link", "b", "u", "i", "object", "form"} & set(seen.tags)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in seen.attributes
    assert all(v.startswith("data:image/png;base64,") for k, v in seen.attributes if k in ("src", "href"))
    assert not [k for k, _ in seen.attributes if k.startswith("on")]
    assert page.index("Content-Security-Policy") < page.index("<style")
    for text in ("+0.3", "Limits", "Repeat it", "9 updates", "seed 4"):
        assert text in page


def test_pictures_are_written_and_readable(tmp_path):
    report.write(tmp_path, finished())
    sizes = {n: Image.open(tmp_path / f"{n}.png").size for n in ("before", "after", "before_after", "reward")}
    assert sizes["before"] == sizes["after"]
    assert min(min(s) for s in sizes.values()) > 150
    assert max(max(s) for s in sizes.values()) < 2000


def test_a_cell_is_crisp_and_a_large_picture_is_reduced():
    image = torch.rand(3, 64, 64)
    drawn = pictures.picture(image)
    assert drawn.size == (128, 128)
    expected = (image * 255).round().byte()
    assert drawn.getpixel((7, 4)) == tuple(expected[:, 2, 3].tolist()) == drawn.getpixel((6, 5))
    assert pictures.picture(torch.rand(3, 512, 256)).size == (64, 128)


@pytest.mark.parametrize(
    "text", ["", "short", "three red circles on the long sand", "x" * 5000, "word " * 999, EVIL, "🌱字" * 99]
)
def test_captions_fit(text):
    font = pictures.font(11)
    lines = pictures.wrapped(text, 128, font)
    assert 1 <= len(lines) <= 2
    assert all(font.getlength(line) <= 128 for line in lines)
    assert "\n" not in "".join(lines)
    if font.getlength(pictures.plain(text)) <= 128:
        assert lines == [pictures.plain(text)]


def test_rows_are_paired():
    run = finished()
    reward, jpeg, diverse, drift = report.rows(run.before, run.after)
    assert reward.change == pytest.approx(0.3, abs=1e-6)
    assert reward.error == pytest.approx(0, abs=1e-6)
    assert (jpeg.before, diverse.error) == (0, None)
    assert diverse.change == pytest.approx(-0.03)
    assert drift.after == pytest.approx(0.3, abs=1e-6)


def test_curves_have_a_panel_for_each_measure(tmp_path):
    assert pictures.panels(finished().lines) == [
        ("reward", ["reward", "held_out/reward"]),
        ("<i>$x_1", ["held_out/<i>$x_1"]),
        ("diversity", ["diversity"]),
        ("drift", ["drift"]),
        ("gradient_norm", ["gradient_norm"]),
    ]
    pictures.curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert report.html(tmp_path, finished()).count('<img class="curve"') == 0


def test_card(tmp_path):
    run = finished()
    text = card.write(tmp_path, run).read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    tags = {"library_name": "diffusers", "tags": ["lora", "text-to-image", "diffusers", "tropism", "alignprop"]}
    assert yaml.safe_load(head) == tags  # a base that is no hub id is not named: the hub refuses such a card
    of_hub = card.card(finished(base="org/a-model")).split("---")[1]
    assert yaml.safe_load(of_hub) == {**tags, "base_model": "org/a-model"}
    prose = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in prose
    assert "](http" not in prose
    assert "\\[link\\]" in prose
    assert "````sh\n" in body
    assert card.prompts_hash(run.prompts) in body
    assert "- jpeg, weight 0.3" in body
    compile(re.search(r"```python\n(.*?)```", body, re.DOTALL)[1], "card", "exec")


def test_a_prompt_cannot_leave_its_string_in_the_card():
    text = card.card(finished(prompts=['"); import os #', "b"]))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "import os" not in [line.strip() for line in code.splitlines()]
    compile(code, "card", "exec")


def test_how_the_parts_agree_is_told():
    measured = lambda update, cosine: {"update": update, "part_norm/a": 2.0, "part_norm/b": 1.0, "cosine/a|b": cosine}
    found = report.agreement([{"update": 0}, measured(1, 0.5), {"update": 2}, measured(11, -0.3)])
    assert (found["first"], found["last"]) == (1, 11)
    assert found["rows"][-1] == ("cosine of a and b", 0.5, -0.3)
    assert report.agreement([{"update": 1}]) is None
