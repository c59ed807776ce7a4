"""The loader: released names and hashes, round trips, the one table, and every kind of bad file."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nexus_min import formats
from nexus_min import weights as w
from nexus_min.config import ARConfig, CLIPConfig, MMDiTConfig, NexusGenConfig, T5Config
from nexus_min.model.autoencoder import AutoEncoder
from nexus_min.model.autoregressive import NexusGenAR
from nexus_min.model.mmdit import MMDiT, image_ids, patchify, unpatchify
from nexus_min.model.text_encoders import CLIPTextModel, T5Encoder
from weights_loader import names_hash

TINY, V2 = NexusGenConfig.tiny(), NexusGenConfig.v2()
MANIFESTS = GOLDEN.parent / "manifests"
AE = "FLUX/FLUX.1-dev/ae.safetensors"
GENERATION = "Nexus-GenV2/generation_decoder.safetensors"
EDITING = "Nexus-GenV2/edit_decoder.safetensors"
AR = "Nexus-GenV2/model.safetensors"


def manifest(name: str) -> dict:
    return json.loads((MANIFESTS / f"{name}.json").read_text())


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two models hold exactly the same tensors."""
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tiny_components() -> dict:
    """Every component `save_checkpoint` takes, at tiny size with random weights."""
    torch.manual_seed(0)
    return {
        "ar": NexusGenAR(TINY.ar),
        "generation": (MMDiT(TINY.mmdit), w.make_adapter(TINY)),
        "editing": (MMDiT(TINY.mmdit), w.make_merger(TINY)),
        "autoencoder": AutoEncoder(TINY.autoencoder),
        "empty_prompt": {
            "pooled": torch.randn(1, TINY.mmdit.vec_in_dim),
            "context": torch.randn(1, 5, TINY.mmdit.context_in_dim),
        },
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict]:
    """A tiny checkpoint in fp32, and the components it was written from."""
    folder, components = tmp_path_factory.mktemp("checkpoint"), tiny_components()
    w.save_checkpoint(folder, TINY, **components, dtype=None, metadata={"steps": "7"})
    return folder, components


# ------------------------------------------------------------------------- names, hashes, table


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that the project's own full-size models give a released file."""
    part = {
        "nexus_genv2_ar": lambda: shapes(lambda: NexusGenAR(V2.ar)),
        "flux1_dev_bfl": lambda: shapes(lambda: MMDiT(V2.mmdit)),
        "flux_ae": lambda: shapes(lambda: AutoEncoder(V2.autoencoder)),
        "clip_text_encoder": lambda: shapes(lambda: CLIPTextModel(V2.clip)),
        "t5_text_encoder_2": lambda: shapes(lambda: T5Encoder(V2.t5)),
        "qwen2_5_vl_7b_instruct": lambda: {
            k: v for k, v in full_size("nexus_genv2_ar").items() if k not in w.NEW_IN_NEXUS
        },
        "flux_dit_diffsynth_internal": lambda: {
            w.diffsynth_name(k): v for k, v in full_size("flux1_dev_bfl").items()
        },
        "generation_decoder": lambda: decoder_shapes() | shapes(lambda: w.make_adapter(V2)),
        "edit_decoder": lambda: (
            decoder_shapes()
            | {w.MERGER_PREFIX + k: v for k, v in shapes(lambda: w.make_merger(V2)).items()}
        ),
    }
    return part[name]()


def shapes(make) -> dict[str, tuple[int, ...]]:
    return {k: tuple(p.shape) for k, p in w.on_meta(make).state_dict().items()}


def decoder_shapes() -> dict[str, tuple[int, ...]]:
    internal = full_size("flux_dit_diffsynth_internal")
    return {w.DIT_PREFIX + k: v for k, v in internal.items()}


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in MANIFESTS.glob("*.json") if "key_map" not in p.stem)
)
def test_names_and_published_hash(name):
    official, own = manifest(name), full_size(name)
    assert {k: list(v) for k, v in own.items()} == official["tensors"]
    assert len(own) == official["n_tensors"]
    assert names_hash(own) == (official["official_hash"] or official["computed_hash"])


def test_names_hash_sees_names_and_shapes():
    own = full_size("flux_ae")
    wider = own | {"encoder.conv_in.bias": (129,)}
    assert len({names_hash(s) for s in (own, wider, {"x": (1,)}, {})}) == 4


def test_names_table_is_the_official_one():
    official = manifest("dit_key_map")["map"]
    own = {
        w.diffsynth_name(bfl): {"bfl": bfl, "op": op}
        for bfl in full_size("flux1_dev_bfl")
        for op in ["swap_halves_dim0" if w.is_swapped(bfl) else "copy"]
    }
    assert own == official
    with pytest.raises(KeyError):
        w.diffsynth_name("img_in.nonsense.weight")


# ------------------------------------------------------------------------------- the final norm


def micro_mmdit() -> tuple[dict, MMDiTConfig]:
    """Fixture 09 and its sizes."""
    tensors, meta = golden("09")
    c = meta["config"]
    config = MMDiTConfig(
        c["in_dim"], c["pooled"], c["ctx"], c["dim"], c["mlp_ratio"], c["heads"], c["joint"],
        c["single"], tuple(c["axes"]), c["theta"], c["time_proj_dim"],
    )  # fmt: skip
    return tensors, config


@torch.inference_mode()
def velocity(model: MMDiT, tensors: dict) -> torch.Tensor:
    """Velocity [B, C, h, w] of fixture 09's inputs at t = 0.64025 with the editing ids."""
    latents = tensors["in/latents"]
    tokens = model(
        patchify(latents),
        image_ids(*latents.shape[-2:]),
        tensors["in/prompt_emb"],
        tensors["in/text_ids_edit"],
        torch.tensor([0.64025]),
        tensors["in/pooled_prompt_emb"],
        tensors["in/guidance"],
    )
    return unpatchify(tokens, *latents.shape[-2:])


def test_parity_final_norm_halves_from_both_kinds_of_file(tmp_path, assert_parity):
    tensors, config = micro_mmdit()
    want = tensors["out/velocity_edit_t640.25"]
    decoder = {
        k.removeprefix("weights/"): v
        for k, v in tensors.items()
        if k.startswith("weights/pipe.dit.")
    }
    decoder["adapter.0.weight"] = torch.zeros(1)  # belongs to the file, not to the MMDiT
    torch.save(decoder, tmp_path / "generation_decoder.bin")
    from_decoder = w.load_mmdit(tmp_path / "generation_decoder.bin", config)
    assert_parity("loader", "09 decoder file", velocity(from_decoder, tensors), want)

    for kind in ("weight", "bias"):  # the fixture holds the black-forest-labs order, too
        own = from_decoder.state_dict()[f"final_layer.adaLN_modulation.1.{kind}"]
        assert torch.equal(own, tensors[f"weights/BFL:final_layer.adaLN_modulation.1.{kind}"])

    state = from_decoder.state_dict()
    save_file(state, tmp_path / "flux1-dev.safetensors")
    from_bfl = w.load_mmdit(tmp_path / "flux1-dev.safetensors", config)
    assert_parity("loader", "09 flux1-dev file", velocity(from_bfl, tensors), want)
    back = w.decoder_state(state, {})
    assert all(torch.equal(back[k], decoder[k]) for k in back)

    unswapped = {k: w.swap_halves(v) if w.is_swapped(k) else v for k, v in state.items()}
    from_bfl.load_state_dict(unswapped)
    assert (velocity(from_bfl, tensors) - want).abs().max() > 1.0  # loads strictly, wrong by far


# ---------------------------------------------------------------------------------- round trips


def test_loader_round_trip(saved):
    folder, components = saved
    (mmdit, adapter), (edit_mmdit, merger) = components["generation"], components["editing"]
    assert same(w.load_ar(folder / "Nexus-GenV2", TINY.ar), components["ar"])
    assert same(w.load_mmdit(folder / GENERATION, TINY.mmdit), mmdit)
    assert same(w.load_generation_adapter(folder / "Nexus-GenV2", TINY), adapter)
    assert same(w.load_mmdit(folder / EDITING, TINY), edit_mmdit)
    assert same(w.load_embedding_merger(folder / EDITING, TINY), merger)
    assert same(w.load_autoencoder(folder / AE, TINY.autoencoder), components["autoencoder"])
    assert w.load_config(folder) == TINY
    loaded = w.load_empty_prompt(folder, TINY)
    assert all(torch.equal(loaded[k], v) for k, v in components["empty_prompt"].items())


def test_loader_round_trip_text_encoders(tmp_path):
    clip_config = CLIPConfig(20, 16, 32, 2, 2)
    t5_config = T5Config(20, 16, 8, 32, 2, 2)
    for name, model in (("clip", CLIPTextModel(clip_config)), ("t5", T5Encoder(t5_config))):
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
        load, config = {"clip": (w.load_clip, clip_config), "t5": (w.load_t5, t5_config)}[name]
        assert same(load(tmp_path / name, config), model)


def test_saved_files_have_official_names_and_metadata(saved):
    folder, _ = saved
    with safe_open(folder / EDITING, "pt") as file:
        keys = set(file.keys())
        assert file.metadata()["steps"] == "7"
    full = {k for k in full_size("edit_decoder") if ".blocks." not in k and "single_" not in k}
    assert full <= keys
    config = json.loads((folder / "Nexus-GenV2/config.json").read_text())
    assert ARConfig.from_dict(config) == TINY.ar
    assert config["rope_scaling"]["mrope_section"] == list(TINY.ar.text.mrope_section)
    assert not list(folder.rglob(".*"))


def test_saved_files_are_as_readable_as_any(saved):
    folder, _ = saved
    (folder.parent / "plain").touch()
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert modes == {(folder.parent / "plain").stat().st_mode}


def test_saving_full_size_needs_no_file_of_sizes():
    assert [f.name for f in w.config_files(Path("x"), V2)] == ["config.json"]


def test_saving_casts_and_adds_to_what_is_there(tmp_path):
    components = tiny_components()
    w.save_checkpoint(tmp_path, TINY, autoencoder=components["autoencoder"])
    vocabulary = tmp_path / "any.json"
    vocabulary.write_text("{}")
    written = w.save_checkpoint(
        tmp_path, TINY, generation=components["generation"], tokenizer_file=vocabulary
    )
    assert tmp_path / "Nexus-GenV2/tokenizer.json" in written and all(f.is_file() for f in written)
    vae = w.load_autoencoder(tmp_path / AE, TINY)
    weight = components["autoencoder"].encoder.conv_in.weight
    assert torch.equal(vae.encoder.conv_in.weight, weight.bfloat16())
    vae = w.load_autoencoder(tmp_path / AE, TINY, dtype=torch.float32)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    for p in w.load_mmdit(tmp_path / GENERATION, TINY, dtype=torch.float16).parameters():
        assert p.dtype == torch.float16 and p.requires_grad


def test_saving_refuses_a_component_of_another_size(tmp_path):
    other = AutoEncoder(TINY.autoencoder).state_dict()
    other["encoder.conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"wrong shape \(1\): encoder.conv_in.bias \(3,\) instead"):
        w.save_checkpoint(tmp_path, TINY, autoencoder=other)
    assert not list(tmp_path.iterdir())


def test_saving_over_a_loaded_file_leaves_its_model_alone(tmp_path):
    first, second = tiny_components()["autoencoder"], AutoEncoder(TINY.autoencoder)
    w.save_checkpoint(tmp_path, TINY, autoencoder=first, dtype=None)
    loaded = w.load_autoencoder(tmp_path / AE, TINY)
    w.save_checkpoint(tmp_path, TINY, autoencoder=second, dtype=None)
    assert same(loaded, first) and same(w.load_autoencoder(tmp_path / AE, TINY), second)


def test_a_failed_save_keeps_the_old_file(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        w.replace_file(file, fail)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_sizes_are_there_before_weights(tmp_path, monkeypatch):
    """A save that is killed leaves no tiny weights that would be taken for full-size ones."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        w.save_checkpoint(tmp_path, TINY, autoencoder=tiny_components()["autoencoder"])
    assert w.load_config(tmp_path) == TINY and not list(tmp_path.rglob("*.safetensors"))


def test_loader_maps_instead_of_copying(tmp_path, saved):
    folder, components = saved
    file = tmp_path / "generation_decoder.bin"
    torch.save(load_file(folder / GENERATION), file)
    mmdit = w.load_mmdit(file, TINY)
    before = (folder / AE).read_bytes()
    vae = w.load_autoencoder(folder / AE, TINY)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder / AE) in maps.read_text() and str(file) in maps.read_text()
    assert same(mmdit, components["generation"][0])
    with torch.no_grad():
        vae.encoder.conv_in.weight.add_(1)  # trainable: a private copy of the page, not the file
    assert (folder / AE).read_bytes() == before
    assert same(w.load_autoencoder(folder / AE, TINY), components["autoencoder"])


def resident(file: Path) -> int:
    """kB of the file's pages that are mapped into this process and were touched."""
    parts = Path("/proc/self/smaps").read_text().split(str(file))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_no_weight_is_read_before_it_is_used(tmp_path):
    file = tmp_path / "many.safetensors"
    save_file({f"{k}": torch.full((1024, 512), float(k)) for k in range(8)}, file)
    tensors = {key: entry.read() for key, entry in w.open_weights(file).items()}
    assert resident(file) <= 8 * 64  # of each tensor the first pages, 3 % of the file
    for key, tensor in tensors.items():
        assert tensor.shape == (1024, 512) and (tensor == float(key)).all()
    assert resident(file) >= 8 * 2048


def test_nothing_is_read_before_the_check(saved, monkeypatch):
    folder, _ = saved
    read = []
    original = formats.open_safetensors

    def watched(file):
        def watch(key, e):
            return w.LazyTensor(e.file, e.shape, e.dtype, lambda: read.append(key) or e.read())

        return {k: watch(k, e) for k, e in original(file).items()}

    monkeypatch.setattr(formats, "open_safetensors", watched)
    with pytest.raises(ValueError, match="does not fit AutoEncoder"):
        w.load_autoencoder(folder / AE)
    assert read == []
    w.load_autoencoder(folder / AE, TINY)
    assert len(read) == len(AutoEncoder(TINY.autoencoder).state_dict())


# ------------------------------------------------------------------- shards, pickles, base model


def shard(folder: Path, state: dict) -> Path:
    """Write `state` as two shards and an index, as Hugging Face does."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i in (0, 1):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        piece = {k: state[k] for k in sorted(state)[i::2]}
        save_file(piece, folder / name)
        weight_map |= dict.fromkeys(piece, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_loader_reads_shards(tmp_path, saved):
    model = saved[1]["ar"]
    index = shard(tmp_path, model.state_dict())
    assert same(w.load_ar(tmp_path, TINY), model) and same(w.load_ar(index, TINY), model)


def test_bad_index(tmp_path, saved):
    index = shard(tmp_path, saved[1]["ar"].state_dict())
    content = json.loads(index.read_text())
    second = tmp_path / "model-00002-of-00002.safetensors"
    aside = second.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"index.json: names absent shards: model-00002-of-00002"):
        w.load_ar(tmp_path, TINY)
    aside.rename(second)
    state = {k: v.half() for k, v in load_file(second).items()}
    save_file(state, second)
    mixed = r"mixes torch.float16, torch.float32 \(torch.float16: .*\); choose one"
    with pytest.raises(ValueError, match=mixed):
        w.load_ar(tmp_path, TINY)
    moved = dict(content["weight_map"], **{"lm_head.weight": second.name, "ghost": second.name})
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match=r"do not hold what it says: ghost"):
        w.load_ar(tmp_path, TINY)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(ValueError, match="names files that are no shards beside it: model.safe"):
        w.load_ar(tmp_path, TINY)
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"no shards beside it: \.\./other"):
        w.load_ar(tmp_path, TINY)
    for broken in (
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
    ):
        index.write_text(broken)
        with pytest.raises(ValueError, match="not an index with a weight_map"):
            w.load_ar(tmp_path, TINY)


def test_loader_reads_pickled_decoders(tmp_path, saved):
    folder, components = saved
    torch.save(load_file(folder / GENERATION), tmp_path / "generation_decoder.bin")
    assert same(w.load_mmdit(tmp_path, TINY), components["generation"][0])
    assert same(w.load_generation_adapter(tmp_path, TINY), components["generation"][1])


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("modern", [True, False])
def test_pickled_code_is_refused(tmp_path, modern):
    bad, proof = tmp_path / "generation_decoder.bin", tmp_path / "executed"
    content = {"a": torch.zeros(1), "b": Malicious(proof)}
    torch.save(content, bad, _use_new_zipfile_serialization=modern)
    with pytest.raises(ValueError, match=r"generation_decoder.bin: (refused|.*not a torch.save)"):
        w.load_mmdit(bad, TINY)
    assert not proof.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", ["torch.save", "zip", "pickle"])
def test_pickled_code_is_refused_in_every_wrapping(tmp_path, protocol, wrap):
    bad, proof = tmp_path / "generation_decoder.bin", tmp_path / "executed"
    content = pickle.dumps({"a": Malicious(proof)}, protocol)
    bad.write_bytes(content)
    if wrap == "torch.save":
        torch.save({"a": Malicious(proof)}, bad, pickle_protocol=protocol)
    elif wrap == "zip":
        with zipfile.ZipFile(bad, "w") as archive:
            for name, data in (("data.pkl", content), ("version", b"3"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", data)
    with pytest.raises(ValueError, match="generation_decoder.bin: (refused|truncated or not)"):
        w.load_mmdit(bad, TINY)
    assert not proof.exists()


def test_tensors_without_plain_data_are_refused(tmp_path):
    file = tmp_path / "edit_decoder.bin"
    odd = [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")]
    for tensor in odd:
        torch.save({"a": torch.zeros(3), "odd": tensor}, file)
        with pytest.raises(ValueError, match="edit_decoder.bin: not plain tensors: odd; use"):
            w.open_weights(file)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_file_that_changes_between_check_and_load(tmp_path, saved, kind):
    """Cut short, a mapped file would kill the process; replaced, it is another one."""
    file, state = tmp_path / f"x.{kind}", load_file(saved[0] / AE)

    def write():
        save_file(state, file) if kind == "safetensors" else torch.save(state, file)

    def cut():
        os.truncate(file, 100)

    def replaced():
        os.replace(shutil.copy(file, tmp_path / "copy"), file)

    def overwritten():
        with open(file, "r+b") as data:
            data.seek(-4, 2)
            data.write(b"\1\2\3\4")
        os.utime(file, ns=(0, 7))  # a clock may be too coarse to show it

    for change in (cut, replaced, overwritten, file.unlink):
        write()
        model = w.on_meta(lambda: AutoEncoder(TINY.autoencoder))
        entries = w.open_weights(file)
        change()
        with pytest.raises(ValueError, match=f"x.{kind}: changed while it was being read"):
            w.check_and_assign(model, file, entries)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "more than there is": {"a": F32 | {"shape": [10], "data_offsets": [0, 40]}},
    "shape and bytes differ": {"a": F32 | {"shape": [9]}},
    "overlap": {"a": F32, "b": F32 | {"data_offsets": [4, 12]}},
    "a gap": {"a": F32 | {"data_offsets": [4, 12]}},
    "backwards": {"a": F32 | {"data_offsets": [8, 0]}},
    "negative": {"a": F32 | {"shape": [-2]}},
    "product overflows": {"a": F32 | {"shape": [1 << 40, 1 << 40]}},
    "unknown type": {"a": F32 | {"dtype": "X9"}},
    "no entry": {"a": 3},
    "metadata of numbers": {"__metadata__": {"a": 3}, "a": F32},
}


@pytest.mark.parametrize(
    "lie", [*LIES, "longer than the file", "too long for any file", "too deep"]
)
def test_a_header_that_lies(tmp_path, lie):
    text = json.dumps(LIES[lie]).encode() if lie in LIES else b"[" * 100_000
    length = {"longer than the file": 1 << 20, "too long for any file": 1 << 62}.get(lie, len(text))
    file = tmp_path / "ae.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="ae.safetensors: truncated or not safetensors") as error:
        w.load_autoencoder(tmp_path, TINY)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    components = tiny_components()
    w.save_checkpoint(tmp_path, TINY, autoencoder=components["autoencoder"], dtype=torch.float16)
    before = (tmp_path / AE).read_bytes()
    limits, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*ae.safetensors: .*too large") as error:
            w.save_checkpoint(tmp_path, TINY, autoencoder=components["autoencoder"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert "\n" not in str(error.value)
    assert (tmp_path / AE).read_bytes() == before and not list(tmp_path.rglob(".*"))


def test_old_torch_opens_no_pickle(tmp_path, monkeypatch):
    file = tmp_path / "generation_decoder.bin"
    torch.save({"a": torch.zeros(1)}, file)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2.5.1\+cpu cannot open it safely; need >= 2.6"):
        w.load_mmdit(file, TINY)


def test_pickle_of_something_else(tmp_path):
    file = tmp_path / "edit_decoder.bin"
    for content in ([torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}, {3: torch.ones(1)}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="not a flat dict of tensors"):
            w.load_mmdit(file, TINY)


def test_loader_completes_the_base_model_aloud(tmp_path, saved, caplog):
    state = {k: v for k, v in saved[1]["ar"].state_dict().items() if k not in w.NEW_IN_NEXUS}
    shard(tmp_path, state)
    model, again = w.load_ar(tmp_path, TINY), w.load_ar(tmp_path, TINY)
    assert "vision_head.weight" in caplog.text and "base model" in caplog.text
    assert same(model, again)
    for name in w.NEW_IN_NEXUS:
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    shard(tmp_path, state | {"vision_head.weight": saved[1]["ar"].vision_head.weight.detach()})
    with pytest.raises(ValueError, match=r"missing \(1\): image_prefill_embeds.weight"):
        w.load_ar(tmp_path, TINY)


# ------------------------------------------------------------------------------------ bad input


def changed(saved, tmp_path: Path, change) -> Path:
    """A copy of the saved VAE whose tensors went through `change`."""
    state = load_file(saved[0] / AE)
    change(state)
    save_file(state, tmp_path / "ae.safetensors")
    return tmp_path / "ae.safetensors"


KEY = "decoder.conv_out.bias"
BAD_TENSORS = [
    (lambda s: s.pop(KEY), rf"missing \(1\): {KEY}\."),
    (lambda s: s.update(extra=torch.zeros(2)), r"unexpected \(1\): extra\."),
    (lambda s: s.update({KEY: torch.zeros(4)}), rf"wrong shape \(1\): {KEY} \(4,\) instead of \(3"),
    (lambda s: s.update({KEY: torch.zeros(3).long()}), rf"wrong dtype \(1\): {KEY} I64"),
    (lambda s: s.update({KEY: torch.zeros(3).to(torch.float8_e4m3fn)}), r"wrong dtype .*F8_E4M3"),
    (
        lambda s: s.update({KEY: torch.zeros(3).half()}),
        rf"mixes .*float32 \(torch.float16: {KEY}\)",
    ),
    (lambda s: s.update({"a.lora_A.weight": torch.zeros(1)}), r"LoRA: merge it"),
    (lambda s: s.update({"a.lora.up.weight": torch.zeros(1)}), r"LoRA: merge it"),
    (lambda s: s.update({"encoder.down_blocks.0.x": torch.zeros(1)}), r"diffusers' names"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_bad_tensors_are_named(tmp_path, saved, change, message):
    file = changed(saved, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        w.load_autoencoder(file, TINY)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_mixed_dtypes_load_when_one_is_chosen(tmp_path, saved):
    file = changed(saved, tmp_path, lambda s: s.update({KEY: s[KEY].half()}))
    vae = w.load_autoencoder(file, TINY, dtype=torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}


def test_several_faults_are_one_error(tmp_path, saved):
    def change(state):
        del state[KEY], state["encoder.conv_in.bias"]
        state["extra"] = torch.zeros(2)

    with pytest.raises(ValueError, match=rf"missing \(2\): {KEY}, encoder.conv.*unexpected \(1\)"):
        w.load_autoencoder(changed(saved, tmp_path, change), TINY)


def test_renamed_and_foreign_exports(tmp_path, saved):
    state = saved[1]["ar"].state_dict()
    renamed = {
        k.replace("model.layers", "model.language_model.layers"): v for k, v in state.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="renamed by a newer transformers"):
        w.load_ar(tmp_path, TINY)
    bare = w.decoder_state(saved[1]["generation"][0], {})
    bare = {k.removeprefix(w.DIT_PREFIX): v for k, v in bare.items()}
    save_file(bare, tmp_path / "generation_decoder.safetensors")
    with pytest.raises(ValueError, match="DiffSynth names without pipe.dit."):
        w.load_mmdit(tmp_path / "generation_decoder.safetensors", TINY)


def test_decoder_files_are_checked_under_their_own_names(tmp_path, saved):
    state = load_file(saved[0] / GENERATION)
    del state["pipe.dit.final_norm_out.linear.bias"]
    state |= {"pipe.dit.img_in.bias": torch.zeros(1), "adapter.5.bias": torch.zeros(1)}
    save_file(state, tmp_path / "generation_decoder.safetensors")
    with pytest.raises(
        ValueError, match=r"missing \(1\): pipe.dit.final_norm_out.linear.bias; une"
    ):
        w.load_mmdit(tmp_path, TINY)
    with pytest.raises(ValueError, match=r"GenerationAdapter: unexpected \(1\): adapter.5.bias"):
        w.load_generation_adapter(tmp_path, TINY)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_files(tmp_path, saved, suffix, keep):
    file, state = tmp_path / f"generation_decoder.{suffix}", load_file(saved[0] / GENERATION)
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match="generation_decoder.*download it again") as error:
        w.load_mmdit(file, TINY)
    assert "\n" not in str(error.value)


def test_garbage_files(tmp_path):
    for suffix in ("safetensors", "bin"):
        file = tmp_path / f"edit_decoder.{suffix}"
        file.write_bytes(b"<html>404: not found</html>" * 9)
        with pytest.raises(ValueError, match=f"edit_decoder.{suffix}: "):
            w.load_embedding_merger(file, TINY)


def test_missing_and_ambiguous_files(tmp_path, saved):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        w.load_ar(tmp_path / "nowhere", TINY)
    with pytest.raises(ValueError, match="has no ae.safetensors"):
        w.load_autoencoder(tmp_path, TINY)
    with pytest.raises(
        ValueError, match="holds generation_decoder and edit_decoder; give the path"
    ):
        w.load_mmdit(saved[0] / "Nexus-GenV2", TINY)


def test_wrong_size_says_so(saved):
    with pytest.raises(ValueError, match="give the config of its size"):
        w.load_embedding_merger(saved[0] / EDITING)


def test_bad_config_and_empty_prompt(tmp_path):
    assert w.load_config(tmp_path) == V2
    sizes = TINY.to_dict()
    for wrong in (
        {"image_size": "64"},
        {"image_size": 64.5},
        {"cfg_scale": None},
        {"num_steps": True},
        {"mmdit": sizes["mmdit"] | {"theta": []}},
        {"mmdit": 3},
        {"autoencoder": sizes["autoencoder"] | {"ch_mult": []}},
        {"autoencoder": sizes["autoencoder"] | {"scale_factor": float("inf")}},
        {"ar": sizes["ar"] | {"text": sizes["ar"]["text"] | {"rope_theta": "x"}}},
    ):
        (tmp_path / "nexus_min.json").write_text(json.dumps(sizes | wrong))
        with pytest.raises(ValueError, match="nexus_min.json: not a configuration"):
            w.load_config(tmp_path)
    (tmp_path / "nexus_min.json").write_text("{")
    with pytest.raises(ValueError, match="nexus_min.json: not a configuration"):
        w.load_config(tmp_path)
    for tokens in (0, 513):
        long = {"pooled": torch.zeros(1, 32), "context": torch.zeros(1, tokens, 96)}
        save_file(long, tmp_path / "empty_prompt.safetensors")
        with pytest.raises(ValueError, match=f"a context of {tokens} tokens; T5 gives 1 to 512"):
            w.load_empty_prompt(tmp_path, TINY)
    save_file({"pooled": torch.zeros(1, 32)}, tmp_path / "empty_prompt.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\): context"):
        w.load_empty_prompt(tmp_path, TINY)


@pytest.mark.parametrize("size", [0, -128, "x"])
def test_sizes_of_no_model(saved, size):
    wrong = replace(TINY.ar.text, num_attention_heads=size)
    with pytest.raises(ValueError, match="make no model|mrope_section .* must add up"):
        w.load_ar(saved[0] / w.AR_FOLDER, replace(TINY.ar, text=wrong))


def test_the_configuration_of_another_part(saved):
    with pytest.raises(ValueError, match="sizes of the configuration make no model"):
        w.load_generation_adapter(
            saved[0] / w.AR_FOLDER / "generation_decoder.safetensors", TINY.ar.text
        )
