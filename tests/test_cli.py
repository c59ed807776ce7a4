"""The command line: images and answers for good input, one line and status 2 for bad input."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_model import save_tiny

from nexus_min.__main__ import COMMANDS, main, parse
from nexus_min.cli import HelpFormatter, Parser
from nexus_min.toy.evaluate import add_arguments as add_eval_arguments

FAST = ["--steps", "1", "--fast_preamble"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory but for an image."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((50, 30)).convert("RGBA").save("photo.png")
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line."""
    status = 0
    try:
        main(list(argv))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


# ---- good input --------------------------------------------------------------------------------


def test_generate_saves_and_names_the_image(here, capsys, folder):
    status, out, err = run(capsys, "generate", "a red circle", "--model", folder, *FAST)
    assert (status, out) == (0, "generated.png\n")
    assert re.fullmatch(r'nexus_min: 64x64, 1 steps, \d+\.\d s; reply: "Here is .*"\n', err)
    assert sorted(p.name for p in here.iterdir()) == ["generated.png", "photo.png"]
    with Image.open("generated.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        assert image.text["prompt"] == "a red circle" and image.text["seed"] == "0"
        assert image.text["num_steps"] == "1" and image.text["model"] == folder


def test_generate_takes_the_official_options(here, capsys, folder):
    options = ["--prompt", "一个红色的圆", "--language", "zh", "--height", "60", "--width", "33"]
    options += ["--num_inference_steps", "2", "--cfg_scale", "2", "--embedded_guidance", "3"]
    options += ["--seed", "7", "--device", "cpu", "--dtype", "bf16", "--output", "圆.png"]
    status, out, err = run(capsys, "generate", *options, "--model", folder, "--fast_preamble")
    assert (status, out, err.count("\n")) == (0, "圆.png\n", 1) and "48x64, 2 steps" in err
    with Image.open("圆.png") as image:
        assert image.size == (48, 64)
        assert image.text["prompt"] == "一个红色的圆" and image.text["seed"] == "7"
        assert image.text["cfg_scale"] == "2.0" and image.text["guidance"] == "3.0"


def test_settings_reach_the_image(here, capsys, folder):
    images = set()
    for option in ([], ["--seed", "1"], ["--steps", "2"], ["--cfg", "3"], ["--guidance", "9"]):
        argv = ["generate", "a circle", "--model", folder, *FAST, *option]
        assert run(capsys, *argv)[0] == 0
        images.add(Image.open("generated.png").tobytes())
    assert len(images) == 5


@pytest.mark.parametrize(
    "words",
    [
        ["photo.png", "make it red", *FAST],
        [*FAST, "photo.png", "make it red"],
        ["photo.png", *FAST, "make it red"],
        ["--input_image", "photo.png", "--instruction", "make it red", *FAST],
        ["--input_image", "photo.png", "make it red", *FAST],
    ],
)
def test_edit_takes_words_or_options(here, capsys, folder, words):
    status, out, err = run(capsys, "edit", "--model", folder, *words)
    assert (status, out, err.count("\n")) == (0, "edited.png\n", 1)
    with Image.open("edited.png") as image:
        assert image.text["prompt"] == "make it red" and image.text["decoder"] == "editing"


def test_edit_with_either_decoder(here, capsys, folder):
    argv = ["edit", "photo.png", "make it red", "--model", folder, *FAST]
    for name, option in (
        ("a", []),
        ("b", ["--use_generation_decoder"]),
        ("c", ["--decoder", "generation"]),
    ):
        assert run(capsys, *argv, *option, "-o", f"{name}.png")[0] == 0
    a, b, c = (Image.open(f"{name}.png").tobytes() for name in "abc")
    assert a != b == c


def test_understand_prints_an_answer(here, capsys, folder):
    argv = ["understand", "photo.png", "what is it?", "--model", folder, "--max_new_tokens", "4"]
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, "") and out.endswith("\n")


def test_jpeg_output(here, capsys, folder):
    status, out, _ = run(capsys, "generate", "a", "--model", folder, *FAST, "--output", "a.JPG")
    assert (status, out) == (0, "a.JPG\n")
    with Image.open("a.JPG") as image:
        assert image.format == "JPEG"


def test_a_negative_prompt_without_guidance_is_only_a_warning(here, capsys, folder):
    argv = ["generate", "a", "--model", folder, *FAST, "--negative_prompt", "bad"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (0, "generated.png\n")
    assert err.startswith("nexus_min: warning: a negative prompt has no effect at cfg scale 1\n")


def test_eval_hands_over_to_the_toy_world(capsys, monkeypatch):
    seen = []
    module = types.ModuleType("nexus_min.toy.evaluate")
    module.add_arguments = add_eval_arguments
    module.main = lambda args, load: seen.append((args.cases, args.model, args.seed))
    monkeypatch.setitem(sys.modules, "nexus_min.toy.evaluate", module)
    assert run(capsys, "eval", "--cases", "3")[0] == 0 and seen == [(3, "tiny", 0)]
    assert run(capsys, "eval", "--cases", "3", "--model", "m", "--seed", "4")[0] == 0
    assert seen[1:] == [(3, "m", 4)]
    status, _, err = run(capsys, "eval", "--case", "x")
    assert status == 2 and err.count("\n") == 1


# ---- enlarged -------------------------------------------------------------------------------


def test_scale_enlarges_the_saved_image_for_the_eye(here, capsys, folder):
    argv = ["generate", "a circle", "--model", folder, *FAST]
    for name, more in (("a.png", []), ("b.png", ["--scale", "3"]), ("c.jpg", ["--scale", "16"])):
        status, out, err = run(capsys, *argv, *more, "-o", name)
        assert (status, out) == (0, name + "\n") and "64x64" in err
    with Image.open("a.png") as plain, Image.open("b.png") as large, Image.open("c.jpg") as jpeg:
        assert large.tobytes() == plain.resize((192, 192), Image.Resampling.NEAREST).tobytes()
        assert large.text == plain.text | {"scale": "3"} and "scale" not in plain.text
        assert jpeg.size == (1024, 1024) and jpeg.format == "JPEG"


def test_like_of_an_enlarged_image(here, capsys, folder):
    argv = ["edit", "photo.png", "red", "--model", folder, *FAST, "--scale", "2", "-o", "a.png"]
    assert run(capsys, *argv)[0] == 0
    again = ["edit", "photo.png", "--like", "a.png", "--model", folder, "-o", "b.png"]
    assert run(capsys, *again)[0] == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert run(capsys, *again, "--scale", "1")[0] == 0
    assert Image.open("b.png").size == (64, 64)


# ---- as an image was drawn ----------------------------------------------------------------------


def pixels(name: str) -> bytes:
    with Image.open(name) as image:
        return image.tobytes()


def test_like_draws_the_same_again(here, capsys, folder):
    options = [
        "--seed",
        "7",
        "--steps",
        "2",
        "--cfg",
        "2.5",
        "--guidance",
        "3.25",
        "--height",
        "40",
    ]
    options += ["--language", "zh", "--dtype", "bf16", "--max_new_tokens", "9", "--fast_preamble"]
    text = 'a "red" circle, 红色 = --seed 3\nnext line'
    argv = ["generate", text, "--model", folder, *options, "-o", "a.png"]
    assert run(capsys, *argv)[:2] == (0, "a.png\n")
    argv = ["generate", "--like", "a.png", "--model", folder, "-o", "b.png"]
    assert run(capsys, *argv)[:2] == (0, "b.png\n")
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    with Image.open("b.png") as image:
        assert image.text["prompt"] == text and image.text["dtype"] == "bf16"
        assert image.text["device"] in ("cpu", "cuda", "mps")
        assert image.text["versions"].startswith("nexus_min ") and "torch" in image.text["versions"]


def test_what_is_given_beside_like_comes_first(here, capsys, folder):
    argv = ["generate", "a circle", "--model", folder, *FAST, "--seed", "7", "-o", "a.png"]
    assert run(capsys, *argv)[0] == 0
    argv = [
        "generate",
        "--like",
        "a.png",
        "a star",
        "--seed",
        "8",
        "--model",
        folder,
        "-o",
        "b.png",
    ]
    assert run(capsys, *argv)[0] == 0
    plain = ["generate", "a star", "--seed", "8", "--model", folder, *FAST, "-o", "c.png"]
    assert run(capsys, *plain)[0] == 0
    assert pixels("b.png") == pixels("c.png") != pixels("a.png")


@pytest.mark.parametrize("decoder", ["editing", "generation"])
def test_like_for_an_edit_takes_the_image_again(here, capsys, folder, decoder):
    drawn = ["edit", "photo.png", "make it red", "--decoder", decoder, "--seed", "3"]
    assert run(capsys, *drawn, "--model", folder, *FAST, "-o", "a.png")[0] == 0
    for words in (["photo.png"], ["--input_image", "photo.png"], ["photo.png", "make it red"]):
        argv = ["edit", "--like", "a.png", *words, "--model", folder, "-o", "b.png"]
        assert run(capsys, *argv)[:2] == (0, "b.png\n")
        assert pixels("a.png") == pixels("b.png")
    status, _, err = run(capsys, "edit", "--like", "a.png", "--model", folder)
    assert status == 2 and "edit needs --image" in err


def test_like_remembers_eight_bits(here, capsys, folder):
    argv = ["generate", "a circle", "--model", folder, *FAST, "--fp8", "-o", "a.png"]
    assert run(capsys, *argv)[0] == 0
    assert run(capsys, "generate", "--like", "a.png", "--model", folder, "-o", "b.png")[0] == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


@pytest.mark.parametrize("words", ["{", "[1, 2]", "3", "[" * 100_000], ids=range(4))
def test_a_list_of_words_that_is_none(here, capsys, folder, words):
    other = shutil.copytree(folder, here / "other")
    (other / "toy_words.json").write_text(words)
    argv = ["generate", "a circle", "--model", str(other), *FAST, "-o", "a.png"]
    status, _, err = run(capsys, *argv)
    assert status == 2 and "toy_words.json: not a list of words" in err and err.count("\n") == 1


def forged(name: str, **texts: str) -> str:
    """An image that tells what it likes."""
    drawn_so = {"prompt": "a", "seed": "0", "num_steps": "1", "fast_preamble": "True"}
    info = PngInfo()
    for key, text in (drawn_so | texts).items():
        info.add_text(key, text)
    Image.new("RGB", (9, 9)).save(name, pnginfo=info)
    return name


def test_an_image_from_outside_chooses_neither_model_nor_files(here, capsys, folder):
    forged("x.png", prompt="a", model="/etc", output="photo.png", versions="older", device="abacus")
    before = (here / "photo.png").read_bytes()
    status, out, err = run(capsys, "generate", "--like", "x.png", "--model", folder)
    assert (status, out) == (0, "generated.png\n") and (here / "photo.png").read_bytes() == before
    told = [
        "x.png: made with model '/etc', now it is",
        "x.png: made with device 'abacus', now it is",
        "x.png: made with versions 'older', now it",
    ]
    assert err.count("\n") == 4 and all(line in err for line in told)


LIKE = {
    "seed": ({"seed": "abc"}, "invalid int value: 'abc'"),
    "steps": ({"num_steps": "99999999"}, "num_steps must be a whole number from 1 to"),
    "dtype": ({"dtype": "int8"}, "invalid choice"),
    "no text": ({"prompt": ""}, "prompt is empty"),
    "guidance": ({"guidance": "1e39"}, "guidance must be a number from"),
    "size": ({"prompt": "a", "height": "1e9"}, "invalid int value"),
}


@pytest.mark.parametrize("case", LIKE)
def test_a_forged_image_is_one_clear_line(here, capsys, folder, case):
    texts, says = LIKE[case]
    forged("x.png", **texts)
    status, out, err = run(capsys, "generate", "--like", "x.png", "--model", folder)
    assert status == 2 and out == "" and says in err.splitlines()[-1]
    assert sorted(p.name for p in here.iterdir()) == ["photo.png", "x.png"]


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["paint", "x"], "invalid choice"),
    "unknown option": (["generate", "a", "--color", "red"], "--color"),
    "no prompt": (["generate"], "generate needs --prompt"),
    "like nothing": (["generate", "--like", "missing.png"], "missing.png': no such file"),
    "like a folder": (["generate", "--like", "folder.png"], "folder.png': it is not a file"),
    "like no image": (["generate", "--like", "broken.png"], "broken.png"),
    "like a photo": (["generate", "a", "--like", "photo.png"], "records no settings"),
    "large image": (
        ["edit", "photo.png", "red", "--max_image_pixels", "1499"],
        "50 x 30 is not within 1..1499",
    ),
    "empty prompt": (["generate", "  "], "prompt is empty"),
    "overlong prompt": (["generate", "red " * 3000], "tokens long"),
    "long name": (["generate", "a", "-o", "n" * 245 + ".png"], "is longer than 220 bytes"),
    "undecodable prompt": (["generate", "a \udcff"], "not valid Unicode"),
    "unknown short option": (["generate", "-v"], "unknown arguments: -v"),
    "eval without cases": (["eval", "--cases", "0"], "--cases must be at least 1"),
    "eval without a model": (["eval", "--model", "no_model"], "no model folder 'no_model'"),
    "eval seed": (["eval", "--seed", "-1"], "--seed must be at least 0, not -1"),
    "eval json": (["eval", "--json", "no/such/a.json"], "cannot write 'no/such/a.json'"),
    "eval grids": (["eval", "--save", "photo.png"], "cannot write grids to 'photo.png'"),
    "scale 0": (["generate", "a", "--scale", "0"], "--scale must be 1 to 16, got 0"),
    "scale 17": (["edit", "photo.png", "a", "--scale", "17"], "--scale must be 1 to 16, got 17"),
    "unquoted prompt": (["generate", "red", "circle"], "quotes"),
    "placeholder": (["generate", "a <image>"], "1 <image> placeholders for 0 images"),
    "steps 0": (["generate", "a", "--steps", "0"], "num_steps must be a whole number from 1 to"),
    "guidance": (["generate", "a", "--guidance", "1e39"], "guidance must be a number from"),
    "negative bytes": (["generate", "a", "--negative_prompt", "\udc80"], "is not valid Unicode"),
    "steps x": (["generate", "a", "--steps", "x"], "invalid int value: 'x'"),
    "height 0": (["generate", "a", "--height", "0"], "height must be a whole number from 1 to"),
    "height -8": (["generate", "a", "--height", "-8"], "got -8"),
    "huge width": (["generate", "a", "--width", "100000000"], "got 100000000"),
    "seed": (["generate", "a", "--seed", "-1"], "seed"),
    "cfg": (["generate", "a", "--cfg", "nan"], "cfg_scale must be a number"),
    "language": (["generate", "a", "--language", "fr"], "invalid choice"),
    "device": (["generate", "a", "--device", "abacus"], "abacus"),
    "absent device": (["generate", "a", "--device", "cuda:99"], "cuda:99"),
    "dtype": (["generate", "a", "--dtype", "int8"], "invalid choice"),
    "negative": (["generate", "a", "--cfg", "2", "--negative_prompt", "b"], "CLIP and T5"),
    "no folder": (["generate", "a", "--output", "no/such/a.png"], "cannot write 'no/such/a.png'"),
    "output folder": (["generate", "a", "--output", "folder.png"], "cannot write 'folder.png'"),
    "output type": (["generate", "a", "--output", "a.txt"], "must end in .png"),
    "no model": (["generate", "a", "--model", "no_model"], "no model folder 'no_model'"),
    "empty model": (["generate", "a", "--model", "folder.png"], "no such file"),
    "no image": (["edit"], "edit needs --image and --instruction"),
    "no instruction": (["edit", "photo.png"], "edit needs --instruction"),
    "empty instruction": (["edit", "photo.png", ""], "instruction is empty"),
    "missing image": (["edit", "missing.png", "red"], "missing.png"),
    "broken image": (["edit", "broken.png", "red"], "broken.png"),
    "directory": (["understand", "folder.png", "what?"], "folder.png"),
    "empty question": (["understand", "photo.png", " "], "question is empty"),
    "tokens": (["understand", "photo.png", "what?", "--max_new_tokens", "0"], "max_new_tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(here, capsys, folder, case):
    argv, says = BAD[case]
    (here / "folder.png").mkdir()
    (here / "broken.png").write_bytes((here / "photo.png").read_bytes()[:60])
    before = sorted(here.rglob("*"))
    if argv and argv[0] in ("generate", "edit", "understand") and "--model" not in argv:
        argv = [*argv, "--model", folder]
    if argv and argv[0] in ("generate", "edit"):
        argv = [*argv, "--fast_preamble"]
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith("nexus_min: error: ") and says in err and len(err) < 800
    assert sorted(here.rglob("*")) == before


def test_a_checkpoint_of_another_config(here, capsys, folder, tmp_path_factory):
    other = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "model")
    sizes = json.loads((other / "nexus_min.json").read_text())
    sizes["mmdit"]["depth"] += 1
    (other / "nexus_min.json").write_text(json.dumps(sizes))
    status, out, err = run(capsys, "generate", "a", "--model", str(other))
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "generation_decoder.safetensors: does not fit MMDiT" in err and "blocks.1" in err


def test_a_truncated_checkpoint(here, capsys, folder, tmp_path_factory):
    other = shutil.copytree(folder, tmp_path_factory.mktemp("cut") / "model")
    file = other / "Nexus-GenV2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, _, err = run(capsys, "generate", "a", "--model", str(other))
    assert status == 2 and err.count("\n") == 1 and "model.safetensors: truncated" in err


def test_a_failed_save_leaves_nothing(here, capsys, folder, monkeypatch):
    (here / "old.png").write_bytes(b"old")

    def full_disk(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    argv = ["generate", "a", "--model", folder, *FAST, "--output", "old.png"]
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "") and "No space left" in err and err.count("\n") == 1
    assert (here / "old.png").read_bytes() == b"old" and len(list(here.iterdir())) == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_a_machine_that_is_too_small(here, capsys, monkeypatch, error):
    def full(args):
        raise error

    monkeypatch.setitem(COMMANDS, "generate", (full, *COMMANDS["generate"][1:]))
    status, out, err = run(capsys, "generate", "a")
    assert (status, out, err.count("\n")) == (2, "", 1) and "error: out of memory" in err


# ---- options ---------------------------------------------------------------------------------

SPELLINGS = [
    (["generate", "a"], "--num_steps --num-steps --steps --num_inference_steps", "num_steps", "3"),
    (["generate", "a"], "--cfg_scale --cfg-scale --cfg", "cfg_scale", "2.0"),
    (["edit", "a", "b"], "--guidance --embedded_guidance --embedded-guidance", "guidance", "3.0"),
    (["edit", "a", "b"], "--negative_prompt --negative-prompt", "negative_prompt", "x-y_z"),
    (["edit", "b"], "--image --input_image --input-image", "image", "my-file_1.png"),
    (["edit", "b"], "--instruction --question", "instruction", "c"),
    (["understand", "b"], "--question --instruction", "question", "c"),
    (["batch", "b"], "--batch_size --batch-size", "batch_size", "3"),
]


@pytest.mark.parametrize(("words", "spellings", "name", "value"), SPELLINGS)
def test_old_and_official_spellings(words, spellings, name, value):
    for spelling in spellings.split():
        for argv in ([*words, spelling, value], [*words[:1], f"{spelling}={value}", *words[1:]]):
            if name in ("image", "instruction", "question"):
                assert getattr(parse(argv), name) == value
            else:
                assert str(getattr(parse(argv), name)) == value


def parsers_below(parser: argparse.ArgumentParser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers_below(child)


ENTRY_POINTS = {
    "nexus_min.__main__": "main",
    "weights_loader": "main",
    "train_tiny": "main",
    "nexus_min.scale.train": "main",
    "nexus_min.scale.estimate": "estimate",
}


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_every_option_has_a_help_text_with_its_default(module, monkeypatch):
    found = []

    class Found(Exception):
        pass

    def record(self, *_):
        found.append(self)
        raise Found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", record)
    with pytest.raises(Found):
        getattr(importlib.import_module(module), ENTRY_POINTS[module])(["eval"])
    parsers = list(parsers_below(found[0]))
    assert all(isinstance(parser, Parser) for parser in parsers)
    for action in (action for parser in parsers for action in parser._actions):
        if isinstance(action, argparse._SubParsersAction):
            continue
        name = "/".join(action.option_strings) or action.dest
        assert action.help, f"{name} has no help"
        if action.option_strings and action.default not in (None, False, "", argparse.SUPPRESS):
            shown = HelpFormatter("x")._get_help_string(action)
            assert "%(default)s" in shown or "default: " in shown, f"{name}: {shown}"


# ---- the process -------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom nexus_min.__main__ import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as end:\n"
        "    assert not end.code\n"
        "assert not {'torch', 'PIL', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--num_inference_steps" in done.stdout and "--output" in done.stdout


def test_as_a_module_in_a_plain_c_locale(here, folder):
    command = [sys.executable, "-m", "nexus_min", "generate", "圆", "--model", folder, *FAST]
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (0, "generated.png\n")
    assert done.stderr.count("\n") == 1 and "\\u8fd9" in done.stderr  # the reply is Chinese
    command[4] = "a \udcff"
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not valid Unicode" in done.stderr
