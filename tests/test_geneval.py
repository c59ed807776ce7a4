"""GenEval's files: toy prompts in its format, its verdicts on scenes, its folders of images."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_model import make_tiny

from nexus_min.__main__ import main
from nexus_min.toy import geneval
from nexus_min.toy.prompts import CATEGORIES, canonical_scene, satisfies
from nexus_min.toy.tasks import sample_example
from nexus_min.toy.world import Object, Scene, render


def line(tag: str, include: list, exclude: tuple = (), prompt: str = "a") -> dict:
    return {"tag": tag, "include": include, "exclude": list(exclude), "prompt": prompt}


def scene(*objects: tuple) -> Scene:
    return Scene(tuple(Object(shape, color, "large", cell) for shape, color, cell in objects))


@pytest.mark.parametrize("kind", CATEGORIES)
def test_toy_prompts_mean_the_same_in_the_format_of_geneval(kind):
    rng = np.random.default_rng(1)
    for _ in range(40):
        ex = sample_example(rng, "generate", kind, False)
        meta = geneval.metadata(ex)
        assert geneval.problem(meta) == ""
        assert geneval.verdict(render(ex.scenes[0]), meta)["correct"]
        assert meta["tag"] == dict(zip(CATEGORIES, geneval.TAGS, strict=True))[kind]
        want = canonical_scene(ex.spec)
        assert geneval.judge(want, meta) == "" and satisfies(want, ex.spec)
        fewer = replace(want, objects=want.objects[1:])
        assert geneval.judge(fewer, meta) and not satisfies(fewer, ex.spec)
        if kind == "position":
            cells = [o.cell for o in want.objects][::-1]
            swapped = [replace(o, cell=c) for o, c in zip(want.objects, cells, strict=True)]
            assert "expected" in geneval.judge(replace(want, objects=tuple(swapped)), meta)


def test_verdicts():
    two_red = line("counting", [{"class": "star", "color": "red", "count": 2}])
    only_two = two_red | {"exclude": [{"class": "star", "count": 3}]}
    stars = [("star", "red", 0), ("star", "red", 4), ("star", "blue", 8)]
    assert geneval.judge(scene(*stars[:2]), only_two) == ""
    assert geneval.judge(scene(*stars), two_red) == ""
    assert geneval.judge(scene(*stars), only_two) == "expected star < 3, found 3"
    assert geneval.judge(scene(stars[0], stars[2]), two_red) == "expected red star >= 2, found 1"
    left = [{"class": "star", "count": 1}]
    left.append({"class": "circle", "count": 1, "position": ["left of", 0]})
    pair = [("circle", "red", 3), ("star", "red", 5)]
    assert geneval.judge(scene(*pair), line("position", left)) == ""
    assert "left of star" in geneval.judge(
        scene(("circle", "red", 5), ("star", "red", 3)), line("position", left)
    )


def test_images_are_read_or_left_to_others():
    star = line("colors", [{"class": "star", "color": "red", "count": 1}])
    image = render(scene(("star", "red", 4)))
    assert geneval.verdict(image, star) == {"correct": True, "reason": ""}
    blue = line("colors", [{"class": "star", "color": "blue", "count": 1}])
    assert geneval.verdict(image, blue)["correct"] is False
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert geneval.verdict(noise, star)["correct"] is False
    bench = line("single_object", [{"class": "bench", "count": 1}])
    assert geneval.verdict(image, bench)["correct"] is None
    large = np.repeat(np.repeat(image, 2, 0), 2, 1)  # as a model of another size draws it
    assert geneval.verdict(large, star)["correct"] is None


def test_the_overall_score_is_the_mean_over_categories():
    rows = [("a", True)] * 3 + [("a", False), ("b", True), ("c", None)]
    found = geneval.summary([{"tag": t, "correct": c} for t, c in rows])
    scores = {tag: row["score"] for tag, row in found["categories"].items()}
    assert scores == {"a": 0.75, "b": 1.0, "c": None} and found["overall"] == 0.875
    assert found["categories"]["c"] == {"score": None, "judged": 0, "pictures": 1}
    assert geneval.summary([{"tag": "c", "correct": None}])["overall"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object, not list"),
        ('{"tag": 3, "prompt": "a", "include": [{"class": "a", "count": 1}]}', "`tag` must be"),
        ('{"tag": "a", "prompt": " ", "include": [{"class": "a", "count": 1}]}', "`prompt` must"),
        ('{"tag": "a", "prompt": "a"}', "`include` must be a list that is not empty"),
        (
            '{"tag": "a", "prompt": "a", "include": [{"count": 1}]}',
            r"`include\[0\]` needs a `class",
        ),
        (
            '{"tag": "a", "prompt": "a", "include": [{"class": "a"}]}',
            r"`include\[0\]` needs a `coun",
        ),
        (
            '{"tag": "a", "prompt": "a", "include": '
            '[{"class": "a", "count": 1, "position": ["left of", 1]}]}',
            "`position` must be",
        ),
        (
            '{"tag": "a", "prompt": "a", "include": '
            '[{"class": "a", "count": 1, "position": [["left of"], 0]}]}',
            "`position` must be",
        ),
        (
            '{"tag": "a", "prompt": "a", "include": [{"class": "a", "count": 1, "color": []}]}',
            "`color` must be a text",
        ),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(line("a", [{"class": "a", "count": 1}])) + "\n\n" + row)
    with pytest.raises(ValueError, match=rf"p\.jsonl:3: .*{message}"):
        geneval.read_prompts(path)


def test_folders_are_those_of_geneval(tmp_path):
    lines = [
        line("single_object", [{"class": "star", "count": 1}], prompt="a star"),
        line("colors", [{"class": "bench", "color": "red", "count": 1}], prompt="a red bench"),
    ]
    options = {"num_steps": 1, "fast_preamble": True}
    found = geneval.evaluate(make_tiny(), lines, tmp_path / "out", 2, 7, False, **options)
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("*.*"))
    assert names == [
        f"0000{k}/{n}"
        for k in (0, 1)
        for n in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    meta = (tmp_path / "out/00001/metadata.jsonl").read_text()
    assert json.loads(meta) == lines[1] and meta.count("\n") == 1
    rows = found["results"]
    assert [row["seed"] for row in rows] == [7, 8, 7, 8]
    assert [row["correct"] is None for row in rows] == [False, False, True, True]
    assert list(found["categories"]) == ["single_object", "colors"]
    for row in rows:
        with Image.open(row["filename"]) as image:
            assert image.size == (64, 64)
    assert json.loads(json.dumps(found)) == found


def test_prompts_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["eval", "--write_prompts", "p.jsonl", "--cases", "2", "--languages", "en"])
    lines = geneval.read_prompts(tmp_path / "p.jsonl")
    assert [x["tag"] for x in lines] == [tag for tag in geneval.TAGS for _ in range(2)]
    drawn = []

    def evaluate(model, lines, folder, samples, seed, progress):
        drawn.append((len(lines), str(folder), samples, seed))
        return geneval.summary([{"tag": "counting", "correct": True}]) | {"results": []}

    monkeypatch.setattr(geneval, "evaluate", evaluate)
    options = ["--samples", "3", "--save", "pictures", "--json", "r.json", "--seed", "5"]
    main(["eval", "--prompts", "p.jsonl", *options])
    assert drawn == [(12, "pictures", 3, 5)]
    out = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in out] == [["counting", "1.000"], ["overall", "1.000"]]
    assert json.loads((tmp_path / "r.json").read_text())["overall"] == 1.0
