"""Scores and ratings from files, and every message of files that are wrong."""

import pytest

from tropism.core import UserError
from tropism.restore.agreement import agreement
from tropism.restore.ratings import Ratings, Scores, read_ratings, read_scores, write_ratings

JUDGED = """name,score,per_repeat,sd,omissions,items,mode,judge,prompt_version,higher_is_worse,swap_difference,error
a.png,2.5,"[2, 3]",0.7,0.0,"[{""kind"": ""text, more""}]",full,stub,hs-v1,true,,
"b,1.png",1.0,"[1, 1]",0.0,0.0,[],full,stub,hs-v1,true,,
c.png,,,,,,,,,,,no verdict
d.png,5.0,"[5, 5]",0.0,0.0,[],full,stub,hs-v1,true,,
"""


@pytest.fixture
def file(tmp_path):
    def written(text, name="table.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return written


def test_scores_of_a_judge(file):
    found = read_scores(file(JUDGED))
    assert found.values == {"a.png": 2.5, "b,1.png": 1.0, "d.png": 5.0}
    assert found.higher_is_worse and found.levels and found.left_out == ("c.png",) and found.source == "'table.csv'"


def test_scores_of_a_proxy_and_another_column(file):
    table = file("\ufeffname,psnr,dist\r\na,30.5,0\r\nb,20,.5\r\n")
    found = read_scores(table, column="psnr", higher_is_worse=False)
    assert found.values == {"a": 30.5, "b": 20.0} and not found.higher_is_worse and not found.levels
    assert read_scores(table, column="dist", higher_is_worse=True, levels=False).values == {"a": 0.0, "b": 0.5}
    both = file("name,score,psnr,higher_is_worse\na,1,30,true\nb,2,20,true\n")  # of the score, not of psnr
    with pytest.raises(UserError, match="of which its higher_is_worse speaks, and not of psnr"):
        read_scores(both, column="psnr")
    assert not read_scores(both, column="psnr", higher_is_worse=False).higher_is_worse


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("name,score\na,1\n", {}, "does not say whether a higher number is worse.*higher_is_worse=True or False"),
        ("name,score,higher_is_worse\na,1,yes\n", {}, "higher_is_worse is 'yes'. Write true or false"),
        ("name,score,higher_is_worse\na,1,true\nb,2,false\n", {}, "both true and false"),
        ("name,score,higher_is_worse\na,1,true\n", {"higher_is_worse": False}, "where False was asked for"),
        ("name,score\na,1\na,2\n", {"higher_is_worse": True}, "has 'a' twice, again in line 3"),
        ("name,score\na,good\n", {"higher_is_worse": True}, r"Line 2 of .* \('a'\) has 'good' where a number"),
        ("name,score\na,nan\n", {"higher_is_worse": True}, "'a' has nan, which is no finite number"),
        ("name,score\na,inf\nb,inf\n", {"higher_is_worse": True}, "'a' has inf.*and 1 more"),
        ("name,score\na,7\n", {"higher_is_worse": True, "levels": True}, "'a' has 7, and levels are from 1 to 5"),
        ("file,score\na,1\n", {}, "has no column 'name'; it has: file, score"),
        ("name,psnr\na,1\n", {}, "has no column 'score'; it has: name, psnr"),
        ("name;score\na;1\n", {}, "with commas between"),
        ("", {}, "has no column 'name'; it has: none"),
        ("name,score\n", {}, "has no row below its first line"),
        ("name,score\n ,1\n", {}, "Line 2 of .* has no name"),
        ('name,score\n"a,1\n', {}, "no CSV table"),
        (b"name,score\n\xff,1\n", {}, "not UTF-8 text"),
    ],
)
def test_scores_that_cannot_be_read(file, text, more, said):
    with pytest.raises(UserError, match=said):
        read_scores(file(text), **more)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_scores(tmp_path / "none.csv")


def test_people_of_several_files(file):
    one = file("name,rater,level\na,ann,1\nb,ann,3\nc,ann,\n", "ann.csv")
    two = file("name,rater,level\na,bob,2.0\nc,bob,5\n", "bob.csv")
    found = read_ratings(one, two, higher_is_worse=True)
    assert found.levels == {"a": {"ann": 1, "bob": 2}, "b": {"ann": 3}, "c": {"bob": 5}}
    assert found.raters == ("ann", "bob") and found.source == "'ann.csv', 'bob.csv'"
    assert found.means.values == {"a": 1.5, "b": 3.0, "c": 5.0} and found.means.levels


def test_ratings_come_back_as_they_were_written(tmp_path):
    ratings = Ratings({'a, "b"\n': {"ann": 1, "bob, jr": 5}, "ü": {"ann": 2}}, False)
    write_ratings(tmp_path / "r.csv", ratings)
    found = read_ratings(tmp_path / "r.csv")
    assert (found.levels, found.higher_is_worse) == (ratings.levels, False)
    with pytest.raises(UserError, match="cannot be written"):
        write_ratings(tmp_path / "none" / "r.csv", ratings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,ann,1\na,ann,2\n", "Line 3 of .* is a second rating of 'a' by 'ann'"),
        ("a,ann,0\n", "Line 2 of .* gives the level '0', and a level is one of 1, 2, 3, 4, 5"),
        ("a,ann,6\n", "the level '6'"),
        ("a,ann,2.5\n", "the level '2.5'"),
        ("a,ann,nan\n", "the level 'nan'"),
        ("a,ann,two\n", "the level 'two'"),
        ("a,,2\n", "Line 2 of .* names no rater"),
    ],
)
def test_ratings_that_cannot_be_read(file, text, said):
    with pytest.raises(UserError, match=said):
        read_ratings(file("name,rater,level\n" + text), higher_is_worse=True)


def test_files_of_two_directions(file):
    head = "name,rater,level,higher_is_worse\n"
    with pytest.raises(UserError, match="in others 1"):
        read_ratings(file(head + "a,ann,1,true\n", "a.csv"), file(head + "a,bob,1,false\n", "b.csv"))


def test_levels_of_ones_own_are_checked_too():
    with pytest.raises(UserError, match="'ann' rates 'a' with '6'"):
        Ratings({"a": {"ann": 6}})
    with pytest.raises(UserError, match="'ann' rates 'a' with 'True'"):
        Ratings({"a": {"ann": True}})


def test_from_files_to_agreement(file):
    people = "name,rater,level\n" + "".join(
        f'"{n}",{r},{v}\n'
        for n, v in (("a.png", 3), ("b,1.png", 1), ("c.png", 2), ("d.png", 5))
        for r in ("ann", "bob")
    )
    found = agreement(read_scores(file(JUDGED)), read_ratings(file(people, "p.csv"), higher_is_worse=True))
    assert found.pictures == 3 and found.spearman.value == pytest.approx(1) and "the first 'c.png'" in found.notes[0]
    assert found.kappa.value == pytest.approx(1)  # 2.5 counts as 3


def test_turned_levels_and_numbers():
    assert Scores({"a": 1.5, "b": 5.0}, False, True).worse_up.values == {"a": 4.5, "b": 1.0}
    assert Scores({"a": 30.0}, False).worse_up.values == {"a": -30.0}
    assert Scores({"a": 30.0}, True).worse_up.values == {"a": 30.0}
