"""A release as users download it, at toy size: every file is read, all three tasks run from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from make_release import write_release
from PIL import Image
from safetensors import safe_open

from nexus_min.__main__ import main
from nexus_min.pipeline import NexusGen

HOME, FLUX = "Nexus-GenV2", "FLUX/FLUX.1-dev"
AR_SHARDS = [f"{HOME}/model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
T5_SHARDS = [f"{FLUX}/text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
FILES = {  # manifest of a released model -> its files here
    "nexus_genv2_ar": AR_SHARDS,
    "generation_decoder": [f"{HOME}/generation_decoder.bin"],
    "edit_decoder": [f"{HOME}/edit_decoder.bin"],
    "flux_ae": [f"{FLUX}/ae.safetensors"],
    "clip_text_encoder": [f"{FLUX}/text_encoder/model.safetensors"],
    "t5_text_encoder_2": T5_SHARDS,
}
DRAWING = {"num_steps": 2, "seed": 3, "fast_preamble": True}
FAST = ["--steps", "2", "--seed", "3", "--fast-preamble", "--device", "cpu"]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def model(release) -> NexusGen:
    return NexusGen.load(release)


@pytest.fixture
def photo(tmp_path, monkeypatch) -> str:
    """An image in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((90, 70)).convert("RGB").save("photo.png")
    return "photo.png"


def drawn(release: Path, *argv: str) -> bytes:
    """Pixels of the image that a command line draws."""
    main([*argv, "--model", str(release), *FAST, "-o", "drawn.png"])
    with Image.open("drawn.png") as image:
        return image.tobytes()


def tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        return torch.load(file, weights_only=True)
    with safe_open(file, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}


def without_numbers(names) -> set[str]:
    """Names of tensors with every block called #: the toy has fewer."""
    return {re.sub(r"\d+", "#", name) for name in names}


@pytest.mark.parametrize("name", FILES)
def test_files_hold_the_released_names(release, name):
    official = json.loads((GOLDEN.parent / "manifests" / f"{name}.json").read_text())["tensors"]
    parts = [tensors(release / file) for file in FILES[name]]
    names = [key for part in parts for key in part]
    assert len(names) == len(set(names)) and all(parts)
    assert without_numbers(names) == without_numbers(official)
    stored = torch.float32 if name == "flux_ae" else torch.bfloat16
    assert {t.dtype for part in parts for t in part.values()} == {stored}


@pytest.mark.parametrize("shards", [AR_SHARDS, T5_SHARDS], ids=["ar", "t5"])
def test_an_index_tells_each_tensors_shard(release, shards):
    index = json.loads((release / shards[0]).with_name("model.safetensors.index.json").read_text())
    held = {Path(file).name: tensors(release / file) for file in shards}
    assert index["weight_map"] == {key: name for name, part in held.items() for key in part}
    sizes = [t.nbytes for part in held.values() for t in part.values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_generate(release, model, photo):
    want = model.generate("a red circle", **DRAWING)
    assert drawn(release, "generate", "a red circle") == want.tobytes()


@pytest.mark.parametrize("decoder", ["editing", "generation"])
def test_edit(release, model, photo, decoder):
    want = model.edit(photo, "make it red", decoder=decoder, **DRAWING)
    argv = ["edit", photo, "make it red", "--decoder", decoder]
    assert drawn(release, *argv) == want.tobytes()


def test_understand_in_a_process_of_its_own(release, model, photo):
    argv = ["understand", photo, "what is it?", "--model", str(release), "--device", "cpu"]
    command = [sys.executable, "-m", "nexus_min", *argv, "--max_new_tokens", "12"]
    result = subprocess.run(command, capture_output=True)
    want = model.understand(photo, "what is it?", max_new_tokens=12)
    assert (result.returncode, result.stderr) == (0, b"")
    assert want and result.stdout.decode() == want + "\n"


@pytest.mark.parametrize("memory", ["staged", "stream"])
def test_text_encoders_travel(release, model, memory):
    placed = NexusGen.load(release, memory=memory, parts=["autoencoder"])
    for text in ("", "blurry"):
        got, want = placed.encode_text(text), model.encode_text(text)
        torch.testing.assert_close(list(got), list(want), atol=1e-5, rtol=0)


def test_memory_auto_tells_what_it_chose(release, photo, capsys):
    argv = ["understand", photo, "what is it?", "--model", str(release), "--device", "cpu"]
    for asked, told in (([], ""), (["--memory", "auto"], r".*: memory resident: 0\.01 GB of .*\n")):
        main([*argv, "--max_new_tokens", "1", *asked])
        assert re.fullmatch(told, capsys.readouterr().err)


def test_a_negative_prompt_reads_both_text_encoders(release, model, photo):
    argv = ["generate", "a red circle", "--cfg", "3"]
    options = DRAWING | {"cfg_scale": 3.0}
    empty, blurry = (
        model.generate("a red circle", negative_prompt=text, **options) for text in ("", "blurry")
    )
    assert drawn(release, *argv, "--negative_prompt", "blurry") == blurry.tobytes()
    assert drawn(release, *argv) == empty.tobytes() != blurry.tobytes()
