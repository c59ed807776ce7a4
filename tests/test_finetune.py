"""One's own data: every mistake named at once, caches that go on, and a model that has learned."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import BAD, OFFICIAL, REPLY, USER, save_official, write  # noqa: F401
from tiny_model import make_tiny, save_tiny

import train_tiny
from nexus_min.pipeline import NexusGen
from nexus_min.toy.stages import toy_line
from nexus_min.toy.tasks import sample_example
from nexus_min.train import finetune
from nexus_min.train.checkpoint import Checkpoint
from nexus_min.train.data import MessageDataset, Shards, cache_embeddings, check_file, collate
from nexus_min.train.stage import Run, mixed_precision
from nexus_min.train.trainer import fit


@pytest.fixture(scope="module")
def tiny() -> NexusGen:
    return make_tiny()


def toy_file(folder, tasks) -> tuple:
    """A JSONL file of toy examples beside its images; its path, and the examples."""
    rng, rows, found = np.random.default_rng(3), [], []
    for i, task in enumerate(tasks):
        found.append(sample_example(rng, task))
        line = toy_line(found[-1])
        names = [f"{i}_{k}.png" for k in range(len(line["images"]))]
        for name, image in zip(names, line["images"], strict=True):
            Image.fromarray(image).save(folder / name)
        rows.append(json.dumps(line | {"id": i, "images": names}))
    path = folder / "own.jsonl"
    path.write_text("\n".join(rows))
    return path, found


# ---- the validator -------------------------------------------------------------------------------


def test_all_mistakes_of_all_lines_are_named(tmp_path, write, tiny):  # noqa: F811
    save_official(tmp_path)
    Image.new("RGB", (2, 900)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("no image")
    more = {
        "`id` must be a text or a number, not list": {"id": [], "messages": [USER, REPLY]},
        "`images[0]`: cannot read image": {
            "images": ["none.png"],
            "messages": [USER, REPLY | {"content": "<image>"}],
        },
        "`images[1]`: cannot read image": {
            "images": ["b.jpg", "text.png"],
            "messages": [USER | {"content": "<image><image>"}, REPLY],
        },
        "`images[0]`: the sides of an image may differ by a factor of 200": {
            "images": ["thin.png"],
            "messages": [USER | {"content": "<image>"}, REPLY],
        },
        "`messages` are": {"messages": [USER, REPLY | {"content": "long " * 900}]},
    }
    found = check_file(
        write(OFFICIAL, *(BAD | more).values(), OFFICIAL), tiny.config, tiny.tokenizer
    )
    assert len(found) == len(BAD | more)
    for n, (message, text) in enumerate(zip(BAD | more, found, strict=True), 2):
        assert text.startswith(f"{tmp_path}/data.jsonl:{n}: ")
        pattern = message if message in BAD else re.escape(message)
        assert re.search(pattern.strip(), text) and "\n" not in text


def test_several_mistakes_of_one_line(write, tiny):  # noqa: F811
    line = {"id": 1.5, "images": "a", "messages": ["x", {"role": "user", "content": 3}]}
    found = check_file(write(line), tiny.config, tiny.tokenizer)
    fields = ["`id`", "`images`", "`messages[0]`", "`messages[1]`"]
    assert [text.split(": ")[1].split(" ")[0] for text in found] == fields
    with pytest.raises(ValueError, match=r"data.jsonl:1: `id` .* \(and 3 more mistakes\)"):
        MessageDataset(write(line))


def test_official_lines_as_they_are_from_any_folder(tmp_path, monkeypatch, tiny):
    """The official files name images from the root of their repository, and have a `source`."""
    home = tmp_path / "assets" / "example_datasets"
    (home / "images").mkdir(parents=True)
    for name in ("und_0.png", "gen_0.png", "edit_0_0.png", "edit_0_1.png"):
        Image.linear_gradient("L").save(home / "images" / name)
    prefix = "assets/example_datasets/images/"
    ask = [{"role": "user", "content": "<image>\nWhat does it say?"}, REPLY]
    draw = [USER, {"role": "assistant", "content": "这是根据您的描述生成的图像：<image>"}]
    edit = [
        {"role": "user", "content": "<image> Add a hat."},
        {"role": "assistant", "content": "Here is the image: <image>"},
    ]
    lines = [
        {"id": "1", "source": "a", "images": [prefix + "und_0.png"], "messages": ask},
        {"id": "zh_2", "source": "b", "images": [prefix + "gen_0.png"], "messages": draw},
        {
            "id": "3",
            "source": "c",
            "images": [prefix + "edit_0_0.png", prefix + "edit_0_1.png"],
            "messages": edit,
        },
    ]
    (home / "llm_dataset.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for place, path in ((tmp_path, "assets/example_datasets/llm_dataset.jsonl"), (home, "")):
        monkeypatch.chdir(place)
        data = MessageDataset(path or "llm_dataset.jsonl")
        assert check_file(data.path, tiny.config, tiny.tokenizer) == []
        batch = collate([data[i] for i in range(3)], tiny.tokenizer, tiny.config)
        assert len(batch.image_grid_thw) == 4
        assert [finetune.task_of(line) for line in data.lines] == list(finetune.TASKS)


def test_check_from_the_command_line(tmp_path, capsys):
    path, _ = toy_file(tmp_path, ["understand", "edit", "edit"])
    assert train_tiny.main(["--data", str(path), "--check"]) == 0
    assert capsys.readouterr().out == f"{path}: good; 1 understand, 0 generate, 2 edit\n"
    path.write_text('{"messages": 3}\n[]\n')
    assert train_tiny.main(["--data", str(path), "--check"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{path}:1: `messages` must be a list that is not empty",
        f"{path}:2: must be an object, not list",
    ]
    assert err == f"train_tiny: {path}: 2 mistakes, see above\n"


# ---- the mixture ---------------------------------------------------------------------------------


def lines_of(*kinds: str) -> list[dict]:
    contents = {"understand": ("<image>", "a"), "generate": ("a", "<image>")}
    contents["edit"] = ("<image>", "<image>")
    roles = ("user", "assistant")
    return [
        {"kind": k, "messages": [{"role": r, "content": c} for r, c in zip(roles, contents[k])]}  # noqa: B905
        for k in kinds
    ]


def test_kinds_are_mixed_in_the_ratio():
    lines = lines_of(*["understand"] * 7, "generate", *["edit"] * 2)

    def shares(lines, ratio):
        drawn = finetune.TaskMixture(lines, ratio).draw(np.random.default_rng(0), 4000)
        return [sum(line["kind"] == k for line in drawn) / 4000 for k in finetune.TASKS]

    assert shares(lines, (1, 2, 1)) == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert shares(lines, (3, 0, 1)) == pytest.approx([0.75, 0, 0.25], abs=0.03)
    assert shares(lines[:8], (1, 2, 1)) == pytest.approx([1 / 3, 2 / 3, 0], abs=0.03)
    with pytest.raises(ValueError, match="no line of a kind that the ratio"):
        finetune.TaskMixture(lines[:7], (0, 1, 1))


def test_stages_follow_the_kinds():
    assert finetune.stages(lines_of("understand")) == ("ar",)
    assert finetune.stages(lines_of("generate")) == ("generation", "ar")
    assert finetune.stages(lines_of("edit", "understand")) == ("generation", "ar", "editing")
    assert finetune.stages(lines_of("edit"), "editing") == ("editing",)
    with pytest.raises(ValueError, match="no lines that the stage editing learns from"):
        finetune.stages(lines_of("generate"), "editing")


# ---- embeddings computed ahead -------------------------------------------------------------------


def test_a_cache_goes_on_where_it_stopped(tmp_path):
    made, fail = [], {7}

    def make(i):
        if i in fail:
            raise KeyboardInterrupt
        made.append(i)
        return {"x": torch.full((2, 3), i), "y": torch.tensor([i / 2])}

    def run(stamp="a", n=10, share=(0, 1)):
        made.clear()
        return cache_embeddings(tmp_path / "c", list(range(n)), make, stamp, 4, share)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert made == list(range(7)) and len(list((tmp_path / "c").iterdir())) == 1
    fail.clear()
    files = run()
    assert made == list(range(4, 10)) and len(files) == 3
    run()
    assert made == []
    shards = Shards(files)
    with mixed_precision(True):  # as on a CPU with bf16 units
        rows = shards.rows([9, 0, 4])
    assert len(shards) == 10 and rows["x"].shape == (3, 2, 3)
    assert rows["x"][:, 0, 0].tolist() == [9, 0, 4] and rows["y"].flatten().tolist() == [4.5, 0, 2]
    files[1].write_bytes(files[1].read_bytes()[:-3])
    run()
    assert made == [4, 5, 6, 7]
    run(share=(1, 2), stamp="b")
    assert made == [4, 5, 6, 7]  # the second process makes the second file
    run(stamp="b")
    assert made == [0, 1, 2, 3, 8, 9]
    run(stamp="b", n=9)
    assert made == list(range(9))


def test_samples_of_the_decoders(tmp_path, tiny):
    path, found = toy_file(tmp_path, ["edit"])
    line, config = MessageDataset(path)[0], tiny.config
    sample = finetune.editing_sample(tiny.ar, tiny.autoencoder, tiny.tokenizer, config, line)
    source, target = map(Image.open, line["images"])
    said = found[0].messages[1]["content"].removesuffix("<image>")
    with torch.no_grad():
        want = tiny.prefill(tiny.editing_inputs(source, found[0].text), said)[0]
    torch.testing.assert_close(sample["embeds"], want, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample["refs"], tiny.reference_embeds(source)[0])
    own = finetune.generation_sample(tiny.ar, tiny.autoencoder, config, line["images"][1])
    torch.testing.assert_close(own["latents"], sample["latents"])
    assert own["latents"].shape == (16, 8, 8) and own["embeds"].shape == (16, 128)
    view = target.convert("RGB").resize((config.target_size,) * 2, Image.Resampling.BICUBIC)
    with torch.no_grad():
        torch.testing.assert_close(own["embeds"], tiny.embed_images([view])[0])


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(train_tiny, "BATCH", dict.fromkeys(train_tiny.BATCH, 2))


def test_fine_tuning_from_the_command_line(tmp_path, small_batches, capsys):
    start, out = save_tiny(tmp_path), tmp_path / "out"
    path, _ = toy_file(tmp_path, ["understand", "generate", "edit"])
    command = ["--data", str(path), "--model", str(start), "--out", str(out), "--steps", "2"]
    command += ["--workers", "1", "--quiet", "--shard", "1"]
    assert train_tiny.main(command) == 0, capsys.readouterr().err
    names = sorted(p.relative_to(out / "cache").as_posix() for p in out.glob("cache/*/*"))
    assert names == [
        f"{n}.safetensors" for n in ("editing/00000", "generation/00000", "generation/00001")
    ]
    before, after = NexusGen.load(start), NexusGen.load(out / "model")
    for name in ("ar", "generation", "editing"):
        pair = [getattr(m, name) for m in (before, after)]
        if name != "ar":
            pair = [decoder.mmdit for decoder in pair]
        changed = [
            not torch.equal(a, b) for a, b in zip(*(p.parameters() for p in pair), strict=True)
        ]
        assert any(changed)
    for a, b in zip(before.ar.visual.parameters(), after.ar.visual.parameters(), strict=True):
        assert torch.equal(a, b)  # frozen
    after.generate("a circle", num_steps=1, fast_preamble=True)

    stamps = {p: p.stat().st_mtime_ns for p in out.glob("cache/generation/*")}
    metrics = (out / "metrics.jsonl").read_text()
    assert train_tiny.main(command) == 0  # finished: nothing is trained or computed again
    assert (out / "metrics.jsonl").read_text() == metrics
    path.write_text(path.read_text() + "\n")
    capsys.readouterr()
    assert train_tiny.main(command) == 2
    assert (
        capsys.readouterr().err == f"train_tiny: {out} is a run on other data; give another --out\n"
    )
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("cache/generation/*")}


@pytest.mark.parametrize(
    ("stage", "spied", "picked"),
    [
        ("ar", (finetune.TaskMixture, "draw"), lambda lines: [line["id"] + 1 for line in lines]),
        ("generation", (Shards, "rows"), lambda rows: [1 + i for i in rows["latents"][:, 0, 0, 0]]),
    ],
)
def test_a_loss_that_is_not_finite_names_the_lines(
    tmp_path, small_batches, monkeypatch, capsys, stage, spied, picked
):
    """Line, number and id of those in the batch, and of no others; the second shows no image."""
    path, _ = toy_file(tmp_path, ["generate", "understand", "generate", "generate"])
    seen, plain = [], getattr(*spied)

    def spy(*args):
        seen.append(plain(*args))
        return seen[-1]

    def latents_tell(ar, vae, config, image):  # from which line they are
        n = int(image.name[0])
        return {"embeds": torch.zeros(16, 128), "latents": torch.full((16, 8, 8), n)}

    monkeypatch.setattr(*spied, spy)
    monkeypatch.setattr(finetune, "generation_sample", latents_tell)
    nan, packed_ar_loss, rf_loss = float("nan"), finetune.packed_ar_loss, finetune.rf_loss

    def broken(out):
        return out._replace(loss=nan * out.loss)

    monkeypatch.setattr(finetune, "packed_ar_loss", lambda *a: broken(packed_ar_loss(*a)))
    monkeypatch.setattr(finetune, "rf_loss", lambda *a: nan * rf_loss(*a))
    out = tmp_path / "out"
    command = ["--data", str(path), "--model", str(save_tiny(tmp_path)), "--out", str(out)]
    command += ["--stage", stage, "--steps", "3", "--workers", "1", "--quiet"]
    assert train_tiny.main(command) == 2
    told = capsys.readouterr().err
    lines = [f"{path}:{int(n)} (id {int(n) - 1})" for n in sorted(set(picked(seen[-1])))]
    assert f"(0, '{stage}', 0, 0), of {', '.join(lines)}); there is no checkpoint yet" in told
    assert told.count("\n") == 1 and told.count("own.jsonl") == len(lines)
    dump = Checkpoint(out / f"{stage}.nonfinite-0.ckpt").load()
    assert dump["nonfinite"]["lines"] == lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--check"], "--check needs --data"),
        (["--data", "own.jsonl", "--ship", "x"], "--ship is for whole runs"),
        (["--data", "own.jsonl", "--ratio", "1:2"], "--ratio"),
        (["--data", "own.jsonl", "--ratio", "0:0:0"], "--ratio"),
        (["--data", "own.jsonl", "--stage", "vae"], "no lines that the stage vae learns from"),
        (["--data", "none.jsonl"], "No such file"),
        (["--data", "own.jsonl", "--model", "none"], "no model folder 'none'"),
        (["--data", "own.jsonl", "--shard", "0"], "--shard must be at least 1"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    toy_file(tmp_path, ["generate"])
    assert train_tiny.main([*options, "--steps", "1", "--workers", "1", "--quiet"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rank, steps", [(0, 60), (8, 60)])
def test_the_loss_falls_on_the_own_lines(tmp_path, rank, steps):
    model = make_tiny()
    path, _ = toy_file(tmp_path, ["understand", "generate", "edit", "generate"])
    data = MessageDataset(path)
    mixture = finetune.TaskMixture([data[i] for i in range(4)])
    stage = finetune.autoregressive_stage(model.ar, model.tokenizer, model.config, mixture, 4, rank)
    run = Run(tmp_path, steps=steps, quiet=True)
    before = [float(stage.loss(np.random.default_rng(i), 0.0)[0].detach()) for i in range(2)]
    fit(replace(stage, ema=0.0), run)
    after = [float(stage.loss(np.random.default_rng(i), 0.0)[0].detach()) for i in range(2)]
    assert sum(after) < 0.9 * sum(before)


def test_a_batch_has_one_official_noise_level():
    torch.manual_seed(0)
    drawn = [finetune.official_times(4) for _ in range(20)]
    assert all(len(x) == 4 and (x == x[0]).all() for pair in drawn for x in pair)
    assert len({float(t[0]) for t, _ in drawn}) > 10
