"""Models that are looked at: what `load_encoder` lets in, what it says about it, and what it refuses."""

import builtins
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    ViTForImageClassification,
)

from sinks.assets import catalogue
from sinks.errors import AssetError, InvalidInput, UnknownName, UnsafeCheckpoint, UnsupportedModel
from sinks.models import encoders
from sinks.models.encoders import is_encoder, load_encoder, picture_inputs, prepare_encoder
from sinks.models.load import Source, load, prepare
from tests.assets import packaging
from tests.models.checkpoints import tiny_folder, tiny_gguf
from tests.models.looking import EDGE, save_tokenizer, tiny_bert, tiny_dinov2, tiny_onnx, tiny_vit

IDS = torch.tensor([[2, 4, 5, 6, 3]])
PIXELS = torch.linspace(-1, 1, 3 * EDGE * EDGE).view(1, 3, EDGE, EDGE)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of one's own, and no network."""
    monkeypatch.setenv("SINKS_CACHE", str(tmp_path / "cache"))

    def connect(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    tiny_vit().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def read(model: PreTrainedModel, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(given).last_hidden_state


def edit(file: Path, **changes: Any) -> None:
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(told | changes))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_an_encoder_of_text_loads_as_it_was_saved(bert: Path, capfd: pytest.CaptureFixture[str]):
    found = load_encoder(bert)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(read(found.model, IDS), read(tiny_bert(), IDS)) and not found.model.training
    assert found.source == Source(str(bert), "folder", "not stated", "", "")
    assert found.tokenizer is not None and found.tokenizer("a b d").input_ids == [4, 5, 1]
    assert (found.image_size, found.mean, found.std) == (None, None, None)


@pytest.mark.parametrize("make", [tiny_vit, tiny_dinov2])
def test_a_vision_transformer_loads_as_it_was_saved(make: Callable[[], PreTrainedModel], tmp_path: Path):
    make().save_pretrained(tmp_path / "model")
    found = load_encoder(str(tmp_path / "model"))
    assert torch.equal(read(found.model, PIXELS), read(make(), PIXELS)) and not found.model.training
    assert found.tokenizer is None and found.image_size == EDGE
    assert (found.mean, found.std) == (None, None), "nobody said how to normalise"


@pytest.mark.parametrize(
    ("told", "size"),
    [
        ({"size": 20}, 20),
        ({"size": {"height": 21, "width": 21}}, 21),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": False}, 32),
        ({}, EDGE),
    ],
)
def test_how_pictures_are_prepared_is_read(told: dict[str, Any], size: int, vit: Path):
    edit(vit / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.3], image_std=[0.1, 0.2, 1], **told)
    found = load_encoder(vit)
    assert (found.image_size, found.mean, found.std) == (size, (0.5, 0.4, 0.3), (0.1, 0.2, 1.0))
    edit(vit / "preprocessor_config.json", do_normalize=False)
    assert load_encoder(vit).mean is None
    edit(vit / "preprocessor_config.json", do_normalize=True, image_std=[0.1])
    with pytest.raises(AssetError, match=r"gives \[0.1\] as image_std"):
        load_encoder(vit)


@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16])
def test_weights_come_in_the_asked_dtype(dtype: Any, bert: Path):
    assert str(load_encoder(bert, dtype=dtype).model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    with pytest.raises(InvalidInput, match="'int8'"):
        load_encoder(bert, dtype="int8")
    with pytest.raises(InvalidInput, match="'nowhere'"):
        load_encoder(bert, device="nowhere")


@pytest.mark.parametrize("kind", [BertForMaskedLM, ViTForImageClassification])
def test_without_its_pooler_a_model_has_none(kind: Any, tmp_path: Path):
    base = tiny_bert() if kind is BertForMaskedLM else tiny_vit()
    kind(base.config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    found = load_encoder(tmp_path / "model")
    given = IDS if kind is BertForMaskedLM else PIXELS
    assert found.source.note == "without its pooler" and found.model(given).pooler_output is None


def test_any_other_missing_weight_is_refused(bert: Path):
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.attention.self.key.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match="lack 1 tensors .encoder.layer.1.attention.self.key.weight"):
        load_encoder(bert)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_causal_models_are_sent_to_load(tmp_path: Path, bert: Path):
    tiny_folder(tmp_path / "llama")
    with pytest.raises(UnsupportedModel, match=r"is a llama model, neither.*sinks.load"):
        load_encoder(tmp_path / "llama")
    edit(bert / "config.json", is_decoder=True)
    with pytest.raises(UnsupportedModel, match="is a bert model, neither"):
        load_encoder(bert)
    with pytest.raises(
        UnsupportedModel, match=r"SmolLM2.* is a causal language model.*load\('smollm2-135m-instruct'\)"
    ):
        load_encoder("smollm2")


@pytest.mark.parametrize("name", ["minilm", "dinov2-small"])
def test_load_sends_the_others_here(name: str):
    for refuse in (lambda: load(name), lambda: prepare(name)):
        with pytest.raises(UnsupportedModel, match=r"no causal language model: load it with .*load_encoder\('"):
            refuse()


@pytest.mark.parametrize("config", [SwinConfig(), ResNetConfig()])
def test_pyramids_and_convolutions_are_refused(config: Any, vit: Path):
    config.save_pretrained(vit)
    with pytest.raises(UnsupportedModel, match="nor a plain vision transformer"):
        load_encoder(vit)


def test_code_never_runs(bert: Path):
    edit(bert / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    with pytest.raises(UnsafeCheckpoint, match="load_encoder runs none"):
        load_encoder(bert)
    (bert / "model.safetensors").unlink()
    torch.save({}, bert / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match="pytorch_model.bin"):
        load_encoder(bert)


def test_what_is_no_such_folder_is_told(bert: Path, tmp_path: Path):
    with pytest.raises(UnknownName, match="did you mean 'minilm'.*minilm-l6, dinov2-small"):
        load_encoder("minilmm")
    with pytest.raises(UnknownName):
        load_encoder("")
    with pytest.raises(InvalidInput, match="give the folder"):
        load_encoder(bert / "model.safetensors")
    (tmp_path / "gguf").mkdir()
    tiny_gguf(tmp_path / "gguf" / "tiny.gguf")
    with pytest.raises(UnsupportedModel, match="tiny.gguf is a GGUF"):
        load_encoder(tmp_path / "gguf")
    edit(bert / "config.json", model_type="none_such")
    with pytest.raises(UnsupportedModel, match="does not know"):
        load_encoder(bert)


def test_damage_is_told(bert: Path):
    (bert / "tokenizer.json").unlink()
    (bert / "tokenizer_config.json").unlink()
    with pytest.raises(AssetError, match="no vocabulary .*tokenizer.json"):
        load_encoder(bert)
    edit(bert / "config.json", hidden_size="wide")
    with pytest.raises(AssetError, match="a configuration could not be read"):
        load_encoder(bert)


# --- built-in ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    tiny_onnx(tmp_path / "tiny.onnx", tiny_dinov2(), tmp_path / "scratch")
    return tmp_path / "tiny.onnx"


def serve(monkeypatch: pytest.MonkeyPatch, file: Path) -> catalogue.ModelAsset:
    """Let the vision model of the catalogue be `file`, already fetched."""
    monkeypatch.setattr(encoders, "fetch_model", lambda asset, **_: file)
    return catalogue.MODELS["dinov2-small"]


def test_the_vision_model_is_converted_once_and_exactly(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    asset = serve(monkeypatch, onnx_file)
    found = load_encoder("DINOv2")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(read(found.model, PIXELS), read(tiny_dinov2(), PIXELS))
    assert found.model.config.num_attention_heads == 2 and found.model.config.mlp_ratio == 2
    assert found.image_size == EDGE and found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)
    assert (found.source.kind, found.source.revision) == ("built-in", asset.payload.sha256)
    assert "ONNX" in found.source.note
    onnx_file.unlink()
    assert prepare_encoder("dinov2-small").name == asset.payload.sha256
    assert load_encoder("dinov2-small", dtype="bfloat16").source.note.endswith("then rounded to bfloat16")


def test_without_onnx_the_extra_is_named(onnx_file: Path, monkeypatch: pytest.MonkeyPatch):
    serve(monkeypatch, onnx_file)
    usual = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "onnx":
            raise ImportError("No module named 'onnx'")
        return usual(name, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(AssetError, match=r'pip install "sinks\[vision\]"'):
            load_encoder("dinov2")
    load_encoder("dinov2")
    monkeypatch.setattr(builtins, "__import__", without)
    load_encoder("dinov2")  # what is converted needs no onnx


@pytest.mark.parametrize(
    "left_out", ["embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"]
)
def test_an_export_of_something_else_is_told(left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_onnx(tmp_path / "odd.onnx", tiny_dinov2(), tmp_path / "scratch", leave_out=left_out)
    serve(monkeypatch, tmp_path / "odd.onnx")
    with pytest.raises(AssetError, match=f"odd.onnx holds no whole DINOv2, it lacks '{left_out}'"):
        load_encoder("dinov2")
    (tmp_path / "odd.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(AssetError, match="cannot be read as an ONNX file"):
        load_encoder("dinov2")
    assert not (tmp_path / "cache" / "models" / catalogue.MODELS["dinov2-small"].payload.sha256).exists()


def test_the_encoder_of_text_loads_from_its_package(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    contents = {path.name: path.read_bytes() for path in bert.iterdir()}
    payload, archives = packaging.bundle("model.safetensors", contents)
    packaging.use_client(monkeypatch, tmp_path, archives, packaging.GOOD)
    asset = replace(catalogue.MODELS["minilm-l6"], payload=payload)
    monkeypatch.setattr(encoders, "find_model", lambda name: asset if name == "minilm" else None)
    shutil.rmtree(bert)
    found = load_encoder("minilm")
    assert isinstance(found.model, BertModel) and torch.equal(read(found.model, IDS), read(tiny_bert(), IDS))
    assert found.source == Source("minilm-l6", "built-in", asset.licence, payload.sha256, "")


def test_pictures_are_normalised_as_the_model_was_prepared(vit: Path):
    encoder = replace(load_encoder(vit, dtype="float64"), mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 2.0))
    picture = np.full((3, 4, 4), 0.75, dtype=np.float32)
    values = picture_inputs(encoder, [picture, picture])["pixel_values"]
    assert values.shape == (2, 3, 4, 4) and values.dtype == torch.float64
    assert values[1, :, 0, 0].tolist() == [0.5, 0.75, 0.25]
    plain = replace(encoder, mean=None, std=None)
    assert (picture_inputs(plain, [picture])["pixel_values"] == 0.75).all()


def test_pictures_are_nothing_to_an_encoder_of_text(bert: Path):
    with pytest.raises(InvalidInput, match="reads text"):
        picture_inputs(load_encoder(bert), [np.zeros((3, 4, 4), np.float32)])


def test_which_door_a_name_goes_through(bert: Path, vit: Path, tmp_path: Path):
    tiny_folder(tmp_path / "llama")
    assert [is_encoder(name) for name in (bert, vit, "minilm-l6", "dinov2-small")] == [True] * 4
    assert [is_encoder(name) for name in (tmp_path / "llama", tmp_path, "smollm2", "owner/name")] == [False] * 4
