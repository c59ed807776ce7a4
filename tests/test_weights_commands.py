"""`weights_loader.py` as a command: check, convert, and download from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN
from make_release import TOKENIZERS, write_release
from safetensors.torch import load_file, save_file
from test_tokenizer import byte_tokenizer
from tiny_model import save_tiny

import weights_loader as w
from nexus_min import formats
from nexus_min.formats import LazyTensor
from nexus_min.weights import save_empty_prompt

MANIFESTS = GOLDEN.parent / "manifests"
HOME, FLUX = Path(w.AR_FOLDER), Path(w.FLUX_FOLDER)
GENERATION, EDITING = HOME / "generation_decoder.bin", HOME / "edit_decoder.bin"
COMPONENTS = {*w.RELEASED, "empty prompt"}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("released"))


@pytest.fixture
def release(released, tmp_path) -> Path:
    """A release at toy size that a test may spoil."""
    return shutil.copytree(released, tmp_path / "release")


def command(capsys, *argv) -> tuple[int, str, str]:
    """Exit status and both outputs of a command line."""
    status = w.main([str(word) for word in argv])
    told = capsys.readouterr()
    return status, told.out, told.err


def refused(capsys, *argv) -> str:
    """The one line on standard error of a command that ends with status 2."""
    status, out, err = command(capsys, *argv)
    assert (status, out) == (2, "") and err.startswith("weights_loader: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


# ---- check -------------------------------------------------------------------------------------


def checked(capsys, folder: Path) -> tuple[int, dict[str, dict[str, str]], str]:
    """Exit status, component -> its line of the table by heading, and what is told below."""
    status, out, err = command(capsys, "check", folder)
    table, _, below = out.partition("\n\n")
    headings, *lines = (re.split(r"\s{2,}", line) for line in table.splitlines())
    assert tuple(headings) == w.COLUMNS and err == ""
    rows = {line[0]: dict(zip(headings, line, strict=True)) for line in lines}
    assert rows.keys() == COMPONENTS and len(lines) == len(rows)
    return status, rows, below


def states(rows: dict) -> dict[str, str]:
    """Component -> state of those that are not simply there."""
    return {name: row["state"] for name, row in rows.items() if row["state"] != "ok"}


NOT_NEEDED = {"FLUX.1-dev": "missing, not needed", "empty prompt": "missing, not needed"}


def test_check_passes_a_release(capsys, release):
    status, rows, below = checked(capsys, release)
    assert (status, below) == (0, "all that is needed is there\n")
    assert states(rows) == NOT_NEEDED
    found, expected = rows["editing decoder"]["tensors"].split("/")
    assert found == expected == str(len(torch.load(release / EDITING)))
    assert rows["T5"]["dtype"] == "bfloat16" and rows["autoencoder"]["dtype"] == "float32"
    shards = [f.stat().st_size for f in (release / HOME).glob("model-*")]
    assert rows["AR model"]["bytes"] == w.readable(sum(shards)) and len(shards) == 4
    weights = [name for name, (*_, published) in w.RELEASED.items() if published]
    told = {rows[name]["names and shapes"] for name in weights if name != "FLUX.1-dev"}
    assert told == {"none published"}


def test_check_reads_no_tensor(capsys, release, monkeypatch):
    def closed(tensors: dict) -> dict:
        return {k: LazyTensor(t.file, t.shape, t.dtype, lambda: 1 / 0) for k, t in tensors.items()}

    for name in ("open_safetensors", "open_pickle"):
        opened = getattr(formats, name)
        monkeypatch.setattr(formats, name, lambda file, opened=opened: closed(opened(file)))
    assert checked(capsys, release)[0] == 0
    with pytest.raises(ZeroDivisionError):
        w.load_autoencoder(release / FLUX, w.load_config(release))


def write_sparse(file: Path, manifest: str) -> None:
    """A safetensors file of a released one's names and shapes, of its full size, all holes."""
    shapes = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(out.tell() + end)


@pytest.fixture
def full_size(tmp_path) -> Iterator[Path]:
    """What the official manifests say of all files, 98 GB that take no space."""
    for file, manifest in {
        HOME / "model.safetensors": "nexus_genv2_ar",
        HOME / "generation_decoder.safetensors": "generation_decoder",
        HOME / "edit_decoder.safetensors": "edit_decoder",
        FLUX / "ae.safetensors": "flux_ae",
        FLUX / "text_encoder" / "model.safetensors": "clip_text_encoder",
        FLUX / "text_encoder_2" / "model.safetensors": "t5_text_encoder_2",
        FLUX / "flux1-dev.safetensors": "flux1_dev_bfl",
    }.items():
        write_sparse(tmp_path / file, manifest)
    byte_tokenizer(151643).save(str(tmp_path / HOME / "tokenizer.json"))
    for source, name in TOKENIZERS.items():
        file = tmp_path / FLUX / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(lzma.decompress((GOLDEN / "tokenizers" / source).read_bytes()))
    yield tmp_path
    shutil.rmtree(tmp_path)  # before anything copies the holes


def test_check_knows_the_published_files(capsys, full_size):
    status, rows, _ = checked(capsys, full_size)
    assert status == 0 and states(rows) == {"empty prompt": "missing, not needed"}
    told = Counter(row["names and shapes"] for row in rows.values())
    assert told == {"equal": 7, "-": 4}
    assert rows["AR model"]["tensors"] == "731/731" and rows["AR model"]["bytes"] == "16.6GB"

    write_sparse(full_size / HOME / "model.safetensors", "qwen2_5_vl_7b_instruct")
    write_sparse(full_size / FLUX / "ae.safetensors", "clip_text_encoder")
    status, rows, below = checked(capsys, full_size)
    ar, vae = rows["AR model"], rows["autoencoder"]
    assert (ar["tensors"], ar["names and shapes"], ar["state"]) == ("729/729", "equal", "ok")
    assert "AR model: the base model Qwen2.5-VL" in below and "vision_head.weight" in below
    assert (status, vae["names and shapes"], vae["state"]) == (1, "differs", "wrong")
    assert f"from {w.FLUX}, once this is deleted: {w.COMMAND} download {full_size}\n" in below
    assert below.endswith("\nmissing or wrong: autoencoder\n")


def change(file: Path, edit: Callable[[dict], object]) -> None:
    """Let `edit` spoil the tensors of a file."""
    pickled = file.suffix == ".bin"
    state = torch.load(file) if pickled else load_file(file)
    edit(state)
    torch.save(state, file) if pickled else save_file(state, file)


def rename(old: str, new: str) -> Callable[[dict], None]:
    def edit(state: dict) -> None:
        for key in [key for key in state if key.startswith(old)]:
            state[new + key.removeprefix(old)] = state.pop(key)

    return edit


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


class Malicious:
    """Unpickling this would create a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


BIAS = "adapter.0.bias"
AR, AE = HOME / "model-00001-of-00004.safetensors", FLUX / "ae.safetensors"
LORA = {"adapter.lora_A.weight": torch.zeros(1)}
SPOILED = {  # what happens to a file, and what the row of its component says
    "missing": (GENERATION, lambda s: s.pop(BIAS), rf"missing \(1\): {BIAS}"),
    "extra": (EDITING, lambda s: s.update(extra=torch.zeros(1)), r"unexpected \(1\): extra"),
    "shape": (GENERATION, lambda s: s.update({BIAS: torch.ones(3)}), rf"wrong shape .*{BIAS} \(3,"),
    "integer": (GENERATION, lambda s: s.update({BIAS: s[BIAS].long()}), r"wrong dtype .*int64"),
    "float8": (
        FLUX / "text_encoder/model.safetensors",
        lambda s: s.update({k: v.to(torch.float8_e4m3fn) for k, v in s.items()}),
        r"wrong dtype \(20\): .* F8_E4M3",
    ),
    "a LoRA": (GENERATION, lambda s: s.update(LORA), "a LoRA: merge it"),
    "bare": (GENERATION, rename("pipe.dit.", ""), r"DiffSynth names without pipe\.dit\."),
    "diffusers": (AE, rename("encoder.down.", "encoder.down_blocks."), "use ae.safetensors"),
    "code": (GENERATION, lambda s: s.update(bad=Malicious()), "more than plain tensors"),
}
BROKEN = {
    "cut": (FLUX / "text_encoder_2/model-00002-of-00002.safetensors", cut, "download it again"),
    "cut pickle": (EDITING, cut, "truncated or not a torch.save file"),
    "a page": (AE, lambda file: file.write_text("<html>404</html>"), "not safetensors"),
    "shard": (AR, Path.unlink, "absent shards: model-00001-of-00004.safetensors"),
    "index": (HOME / "model.safetensors.index.json", lambda f: f.write_text("{"), "not an index"),
    "tokenizer": (HOME / "tokenizer.json", cut, "cannot be read as a tokenizer"),
    "words": (
        FLUX / "tokenizer/merges.txt",
        Path.unlink,
        r"tokenizer file .*merges.txt is missing",
    ),
}
COMPONENT = {
    GENERATION: "generation decoder",
    EDITING: "editing decoder",
    AE: "autoencoder",
    AR: "AR model",
    HOME / "model.safetensors.index.json": "AR model",
    HOME / "tokenizer.json": "tokenizer",
    FLUX / "tokenizer/merges.txt": "CLIP tokenizer",
    FLUX / "text_encoder/model.safetensors": "CLIP",
    FLUX / "text_encoder_2/model-00002-of-00002.safetensors": "T5",
}


@pytest.mark.parametrize("case", [*SPOILED, *BROKEN])
def test_check_names_the_fault_and_goes_on(capsys, release, monkeypatch, case):
    monkeypatch.chdir(release.parent)
    file, spoil, message = (SPOILED | BROKEN)[case]
    change(release / file, spoil) if case in SPOILED else spoil(release / file)
    status, rows, below = checked(capsys, release)
    wrong = COMPONENT[file]
    assert status == 1 and states(rows) == NOT_NEEDED | {wrong: "wrong"}
    assert re.search(rf"^{wrong}: .*{message}", below)
    assert below.endswith(f"\nmissing or wrong: {wrong}\n") and not Path("executed").exists()


def test_check_reads_the_values_when_asked(capsys, release):
    key = "decoder.conv_out.bias"
    change(release / AE, lambda s: s[key][:1].fill_(float("nan")))
    assert checked(capsys, release)[0] == 0
    status, out, err = command(capsys, "check", release, "--values")
    assert (status, err) == (1, "") and out.endswith("\nmissing or wrong: autoencoder\n")
    assert f"ae.safetensors: holds NaN or infinite values (1): {key}" in out


def test_check_of_a_renamed_export_and_of_a_base_model(capsys, release):
    for shard in (release / HOME).glob("model-*.safetensors"):
        change(shard, lambda s: [s.pop(key, None) for key in w.NEW_IN_NEXUS])
    index = release / HOME / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places = {key: name for key, name in places.items() if key not in w.NEW_IN_NEXUS}
    index.write_text(json.dumps({"weight_map": places}))
    status, rows, below = checked(capsys, release)
    assert (status, rows["AR model"]["tensors"]) == (0, f"{len(places)}/{len(places)}")
    assert below.startswith("AR model: the base model")
    index.unlink()
    whole = {}
    for shard in (release / HOME).glob("model-*.safetensors"):
        whole |= load_file(shard)
    rename("model.layers.", "model.language_model.layers.")(whole)
    save_file(whole, release / HOME / "model.safetensors")
    status, rows, below = checked(capsys, release)
    assert (status, rows["AR model"]["state"]) == (1, "wrong")
    assert "renamed by a newer transformers" in below


def test_check_says_what_is_missing_and_where_to_get_it(capsys, tmp_path):
    status, rows, below = checked(capsys, tmp_path)
    needed = COMPONENTS - NOT_NEEDED.keys()
    assert status == 1 and states(rows) == NOT_NEEDED | dict.fromkeys(needed, "missing")
    assert rows["generation decoder"]["tensors"] == "0/788"
    for name in needed:
        remedy = f"from {w.RELEASED[name][0]}: {w.COMMAND} download {tmp_path}"
        assert re.search(rf"^{name}: .*\n  {remedy}$", below, re.M)
    assert "\nFLUX.1-dev: " not in below


def test_check_needs_text_encoders_or_their_constants(capsys, tmp_path):
    model = save_tiny(tmp_path)
    status, rows, _ = checked(capsys, model)
    absent = dict.fromkeys((*w.TEXT_ENCODERS, "FLUX.1-dev"), "missing, not needed")
    assert (status, states(rows)) == (0, absent)
    prompt = model / "empty_prompt.safetensors"
    good = prompt.read_bytes()
    cut(prompt)
    status, rows, _ = checked(capsys, model)
    assert (status, rows["empty prompt"]["state"], rows["T5"]["state"]) == (1, "wrong", "missing")
    prompt.unlink()
    status, rows, below = checked(capsys, model)
    assert (status, rows["CLIP"]["state"], rows["CLIP tokenizer"]["state"]) == (1, *["missing"] * 2)
    assert "get it from where this folder comes from" in below
    prompt.write_bytes(good)
    (model / FLUX / "text_encoder").mkdir()
    (model / FLUX / "text_encoder/model.safetensors").write_text("not of these constants")
    save_empty_prompt(model, load_file(prompt))  # now they are
    status, rows, _ = checked(capsys, model)
    assert (status, rows["CLIP"]["state"]) == (0, "wrong, not needed")
    (model / FLUX / "text_encoder/model.safetensors").write_text("others")
    status, rows, _ = checked(capsys, model)
    assert (status, rows["empty prompt"]["state"], rows["CLIP"]["state"]) == (1, "stale", "wrong")


def test_check_tolerates_a_broken_file_that_is_not_needed(capsys, release):
    (release / FLUX / "flux1-dev.safetensors").write_text("short")
    status, rows, below = checked(capsys, release)
    assert (status, rows["FLUX.1-dev"]["state"]) == (0, "wrong, not needed")
    assert "flux1-dev.safetensors: truncated" in below


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["check"],
        ["chek", "."],
        ["check", ".", " x"],
        ["check", "nowhere"],
        ["convert", "nowhere"],
    ],
)
def test_bad_usage_is_one_line(capsys, argv):
    refused(capsys, *argv)


def test_help_names_the_verbs_and_options(capsys):
    for argv, words in {
        (): ("check", "convert", "download"),
        ("check",): ("DIR", "exit status 1"),
        ("convert",): ("DIR|FILE", ".safetensors"),
        ("download",): ("--list", "--base", "--endpoint", "hf auth login"),
    }.items():
        with pytest.raises(SystemExit) as done:
            w.main([*argv, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert done.value.code == 0 and all(word in told for word in words)


# ---- convert -----------------------------------------------------------------------------------


def test_convert_keeps_names_types_and_values(capsys, release):
    status, out, _ = command(capsys, "convert", release)
    assert status == 0 and out.count("is written") == 2
    for file in (release / GENERATION, release / EDITING):
        old, new = torch.load(file), load_file(file.with_suffix(".safetensors"))
        assert old.keys() == new.keys() and all(old[k].dtype == new[k].dtype for k in old)
        assert all(torch.equal(old[k], new[k]) for k in old)
        file.unlink()
    assert checked(capsys, release)[0] == 0


def test_convert_of_odd_tensors(capsys, tmp_path):
    file, grid = tmp_path / "odd.bin", torch.randn(6, 4)
    odd = {
        "half of three": torch.randn(3).half(),
        "ünicode": torch.randn(2, 2).bfloat16(),
        "single": torch.tensor(3.5),
        "nothing": torch.zeros(0, 7),
        "turned": grid.T,
        "row": grid[1],
        "again": grid,
    }
    torch.save(odd, file)
    assert command(capsys, "convert", file)[0] == 0
    new = load_file(tmp_path / "odd.safetensors")
    assert new.keys() == odd.keys()
    assert all(torch.equal(new[k], odd[k]) and new[k].dtype == odd[k].dtype for k in odd)
    data = (tmp_path / "odd.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    starts = {k: 8 + length + header[k]["data_offsets"][0] for k in odd}
    assert not [k for k, start in starts.items() if start % odd[k].dtype.itemsize]


def test_convert_twice_does_nothing(capsys, release):
    command(capsys, "convert", release / GENERATION)
    target = (release / GENERATION).with_suffix(".safetensors")
    before = target.stat()
    status, out, _ = command(capsys, "convert", release / GENERATION)
    assert status == 0 and f"{target} is there already" in out
    assert (target.stat().st_mtime_ns, target.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    cut(target)
    assert "not made from this" in refused(capsys, "convert", release / GENERATION)
    save_file({"mine": torch.zeros(1)}, target)
    assert "move it away" in refused(capsys, "convert", release / GENERATION)
    assert list(load_file(target)) == ["mine"]


def test_convert_starts_again_after_ctrl_c(capsys, release, monkeypatch):
    file = release / EDITING
    before = sorted(release.rglob("*"))

    def stopped(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"a beginning")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(formats, "save_file", stopped)
        status, _, err = command(capsys, "convert", file)
    assert status == 130 and "repeat the command" in err and sorted(release.rglob("*")) == before
    killed = file.with_name(".edit_decoder.safetensors.123.partial")
    killed.write_bytes(b"what a process leaves that had no time to clean up")
    assert command(capsys, "convert", file)[0] == 0 and not killed.exists()
    old, new = torch.load(file), load_file(file.with_suffix(".safetensors"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_convert_of_a_changed_source_is_not_taken_for_done(capsys, release):
    file = release / EDITING
    assert command(capsys, "convert", file)[0] == 0
    change(file, lambda s: s.update({key: tensor + 1 for key, tensor in s.items()}))
    assert "not made from this" in refused(capsys, "convert", file)


def little_space(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_convert_refuses(capsys, release, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = release / GENERATION
    before = sorted(release.rglob("*"))
    with monkeypatch.context() as patch:
        little_space(patch, file.stat().st_size // 2)
        assert re.search(
            "needs .*MB on its disk, where .*MB are free", refused(capsys, "convert", file)
        )
    change(file, lambda s: s.update(ids=torch.arange(3)))
    assert "ids torch.int64" in refused(capsys, "convert", release)
    torch.save({"a": torch.zeros(1), "b": Malicious()}, file)
    assert "more than plain tensors" in refused(capsys, "convert", file)
    assert "neither a .bin file" in refused(capsys, "convert", release / AE)
    assert "neither a .bin file" in refused(capsys, "convert", tmp_path)
    assert sorted(release.rglob("*")) == before and not Path("executed").exists()


MEASURE = """
import sys
from pathlib import Path
from threading import Event, Thread
import weights_loader as w
def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) >> 10
def watch():
    while not done.wait(0.005):
        seen.append(anonymous())
file, done, seen = Path(sys.argv[1]), Event(), [anonymous()]
thread = Thread(target=watch)
thread.start()
assert w.convert_file(file)
done.set()
thread.join()
print(max(seen) - seen[0], len(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_convert_copies_nothing_into_memory(tmp_path):
    """The mapped file's pages are the system's to drop; memory of its own is what would run out."""
    file = tmp_path / "big.bin"
    torch.save({f"{i}": torch.full((5 << 20,), i).bfloat16() for i in range(30)}, file)  # 300 MB
    run = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(run, cwd=Path(w.__file__).parent, capture_output=True, text=True)
    file.unlink()
    grown, samples = map(int, done.stdout.split())
    assert grown < 30 and samples > 5, done.stderr


# ---- download ----------------------------------------------------------------------------------

VERSION = "0123456789abcdef" * 2 + "01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as `download` talks to; `server` holds files and misfortunes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        """Send all of it; less than the `length` that was promised is a cut connection."""
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def do_GET(self) -> None:
        server, (path, _, query) = self.server, self.path.partition("?")
        assert " //" not in self.requestline  # `path` has it mended already
        if path.startswith("/api/models/"):
            self.tell_files(path.removeprefix("/api/models/"), query)
            return
        repo, _, name = path[1:].partition(f"/resolve/{VERSION}/")
        if repo in server.gated:
            self.answer(server.gated[repo], b"", X_Error_Code="GatedRepo")
        elif name not in server.files.get(repo, ()):
            self.answer(404, b"", X_Error_Code="EntryNotFound")
        else:
            self.send_file(name, server.files[repo][name])

    def tell_files(self, repo: str, query: str) -> None:
        assert query.lower() == "blobs=true"
        if repo not in self.server.files:
            self.answer(404, b"", X_Error_Code="RepoNotFound")
            return
        files = [self.facts(name, data) for name, data in self.server.files[repo].items()]
        told = {"id": repo, "sha": VERSION, "siblings": files}
        self.answer(200, json.dumps(told).encode(), Content_Type="application/json")

    def facts(self, name: str, data: bytes) -> dict:
        facts = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if not name.endswith((".json", ".txt")):
            sha256 = hashlib.sha256(data).hexdigest()
            facts["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        return facts

    def send_file(self, name: str, data: bytes) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append((name, wanted))
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        rest = (server.damaged if name in server.spoil else data)[start:]
        where = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        if server.cuts.get(name):
            server.cuts[name] -= 1
            self.answer(206 if wanted else 200, rest[: len(rest) // 2], len(rest), **where)
        elif name in server.down and wanted:
            self.answer(503, b"")
        else:
            self.answer(206 if wanted else 200, rest, **where)


@pytest.fixture
def hub(released, monkeypatch):
    """A hub with the toy-size release, on this machine only, whatever the environment says."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        repo: {
            str(file.relative_to(released / below)): file.read_bytes()
            for file in (released / below).rglob("*")
            if file.is_file()
        }
        for repo, below in w.FOLDERS.items()
    }
    server.files[w.FLUX] |= {"flux1-dev.safetensors": b"f" * 5000, "vae/x.safetensors": b"d" * 9}
    server.asked, server.cuts, server.gated, server.spoil, server.down = [], {}, {}, set(), set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    forget = getattr(huggingface_hub, "close_session", lambda: None)  # older ones keep none
    forget()  # a session with the proxies of another environment
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    forget()


def download(hub, folder: Path, *options: str) -> list[str]:
    """The command line, with a slash too many."""
    return ["download", str(folder), "--endpoint", f"{hub.url}/", *options]


def names(hub) -> list[str]:
    """The files that have been asked for since the last call."""
    asked = [name for name, _ in hub.asked]
    hub.asked.clear()
    return asked


def test_download_gets_what_a_model_is_read_from(capsys, hub, tmp_path, released):
    model = tmp_path / "new folder"
    status, out, _ = command(capsys, *download(hub, model))
    assert status == 0
    assert out.endswith(f"complete; next: {w.COMMAND} check '{model}'\n")
    asked = names(hub)
    assert sorted(asked) == sorted(sum(w.DOWNLOADS.values(), [])) and asked[0] == "ae.safetensors"
    assert not [f for f in model.rglob(".*")] and not list(model.rglob("flux1-dev*"))
    shutil.copy(released / "nexus_min.json", model)
    assert checked(capsys, model)[0] == 0
    status, out, _ = command(capsys, *download(hub, model))
    assert (status, names(hub)) == (0, []) and out.count(" there ") == len(asked)
    assert re.search(r"^0\.00B of [\d.]+MB to download; ", out, re.M)


def test_download_list_only_tells(capsys, hub, tmp_path, monkeypatch):
    little_space(monkeypatch, 10)
    status, out, _ = command(capsys, *download(hub, tmp_path / "x", "--list", "--base"))
    assert (status, names(hub)) == (0, []) and not (tmp_path / "x").exists()
    assert re.search(r"^ *5\.00kB +.*/FLUX/FLUX\.1-dev/flux1-dev\.safetensors$", out, re.M)
    sizes = [len(hub.files[repo][name]) for repo in w.FOLDERS for name in w.DOWNLOADS[repo]]
    total = w.readable(sum(sizes) + 5000)
    assert out.endswith(f"\n{total} of {total} to download; 10.0B free on the disk\n")


def test_download_of_the_base_model_and_of_what_lacks(capsys, hub, released, tmp_path):
    model = shutil.copytree(released, tmp_path / "model")
    assert command(capsys, *download(hub, model, "--base"))[0] == 0
    assert names(hub) == ["flux1-dev.safetensors"]
    cut(model / EDITING)
    (model / GENERATION).rename((model / GENERATION).with_suffix(".safetensors"))  # as converted
    assert command(capsys, *download(hub, model))[0] == 0
    assert names(hub) == ["edit_decoder.bin"] and not (model / GENERATION).exists()
    assert (model / EDITING).read_bytes() == (released / EDITING).read_bytes()


def test_download_goes_on_after_a_cut_connection(capsys, hub, tmp_path, released):
    hub.cuts[GENERATION.name] = 2
    tries = [command(capsys, *download(hub, tmp_path))[0] for _ in range(3)]
    assert tries[-1] == 0  # and so was the first, where huggingface_hub itself tries again
    ranges = [wanted for name, wanted in hub.asked if name == GENERATION.name]
    starts = [int(wanted[6:-1]) for wanted in ranges[1:]]
    assert ranges[0] is None and 0 < starts[0] < starts[1]
    assert (tmp_path / GENERATION).read_bytes() == (released / GENERATION).read_bytes()


def test_download_goes_on_in_the_next_run(capsys, hub, tmp_path, released):
    hub.cuts[GENERATION.name], hub.down = 1, {GENERATION.name}
    status, _, err = command(capsys, *download(hub, tmp_path))
    assert status == 2 and "repeat the command to resume" in err.splitlines()[-1]
    (begun,) = (tmp_path / HOME).glob(".generation_decoder.bin.*.partial")
    done = begun.stat().st_size
    assert done > 10**6 and not (tmp_path / GENERATION).exists()
    hub.down = set()
    names(hub)
    status, out, _ = command(capsys, *download(hub, tmp_path))
    assert status == 0 and re.search(r" begun +.*generation_decoder\.bin", out)
    assert hub.asked == [(GENERATION.name, f"bytes={done}-"), (EDITING.name, None)]
    assert (tmp_path / GENERATION).read_bytes() == (released / GENERATION).read_bytes()
    assert not begun.exists()


def test_download_forgets_the_beginning_of_another_version(capsys, hub, tmp_path):
    hub.cuts["ae.safetensors"], hub.down = 1, {"ae.safetensors"}
    assert command(capsys, *download(hub, tmp_path))[0] == 2
    hub.files[w.FLUX]["ae.safetensors"] = b"new" * 10**6
    names(hub)
    assert command(capsys, *download(hub, tmp_path))[0] == 0
    assert hub.asked[0] == ("ae.safetensors", None)
    assert (tmp_path / AE).read_bytes() == b"new" * 10**6


def test_download_removes_what_arrives_damaged(capsys, hub, tmp_path):
    good = hub.files[w.FLUX]["ae.safetensors"]
    hub.spoil, hub.damaged = {"ae.safetensors"}, good[:-1] + bytes([good[-1] ^ 1])
    assert "checksum mismatch; deleted" in command(capsys, *download(hub, tmp_path))[2]
    assert not list((tmp_path / FLUX).iterdir())


@pytest.mark.parametrize("status", [401, 403])
def test_download_tells_of_the_license(capsys, hub, tmp_path, status):
    hub.gated[w.FLUX] = status
    ended, _, err = command(capsys, *download(hub, tmp_path))
    assert ended == 2 and err.count("\n") == 1
    words = ("accept the FLUX.1-dev non-commercial license", f"https://huggingface.co/{w.FLUX}")
    assert all(word in err for word in (*words, "`hf auth login`", "both decoders", w.NEXUS))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_download_refuses(capsys, hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        little_space(patch, 10**6)
        line = command(capsys, *download(hub, tmp_path))[2]
        assert re.fullmatch(r"weights_loader: .*: needs .*MB on its disk, where 1.00MB.*\n", line)
    del hub.files[w.NEXUS]["edit_decoder.bin"]
    line = refused(capsys, *download(hub, tmp_path))
    assert f"{w.NEXUS}: the hub has no edit_decoder.bin" in line
    del hub.files[w.NEXUS]
    assert "not on the hub, or not for you" in refused(capsys, *download(hub, tmp_path))
    hub.url = "http://127.0.0.1:1"  # nobody listens there
    assert "check network" in refused(capsys, *download(hub, tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, *download(hub, tmp_path))
    assert not list(tmp_path.iterdir())
