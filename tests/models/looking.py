"""Tiny random encoders and vision transformers, as folders and as an ONNX file."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
EDGE, PATCH = 28, 14


def tiny_bert() -> BertModel:
    """A random BERT of two layers."""
    return made(BertModel, BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **tiny()))


def tiny_vit() -> ViTModel:
    """A random ViT of two layers that looks at four patches."""
    return made(ViTModel, ViTConfig(image_size=EDGE, patch_size=PATCH, **tiny()))


def tiny_dinov2() -> Dinov2Model:
    """A random DINOv2 of two layers, two heads of the usual 64 dimensions, that looks at four patches."""
    model = made(
        Dinov2Model,
        Dinov2Config(
            image_size=EDGE, patch_size=PATCH, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2
        ),
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "embeddings.mask_token":
                weight.normal_(0, 0.2)  # its own start leaves biases at 0 and scales at 1, which would hide a mistake
    return model


def tiny() -> dict[str, int]:
    """The shape that BERT and ViT share."""
    return {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def made(kind: type, config: PreTrainedConfig) -> PreTrainedModel:
    """A random model in eval mode, always the same."""
    torch.manual_seed(0)
    return kind(config).eval()


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of the words in `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def tiny_onnx(path: Path, model: Dinov2Model, folder: Path, leave_out: str = "") -> None:
    """Write `model` as exporters do: matrices transposed and nameless, positions cut in two, a decoder behind it.

    The nodes are in order but the graph does not run: what is read are names and weights. `folder` is for scratch.
    """
    model.save_pretrained(folder)
    values, nodes = {}, []
    for name, weight in load_file(folder / "model.safetensors").items():
        if name in ("embeddings.mask_token", leave_out):
            continue
        module, _, kind = name.rpartition(".")
        trace = "/backbone/" + module.replace(".", "/")
        if name == "embeddings.position_embeddings":
            for index, part in enumerate((weight[:, 1:], weight[:, :1])):
                values[f"onnx::Reshape_{index}"] = part
                nodes.append(helper.make_node("Concat", [f"onnx::Reshape_{index}"], [str(index)], trace + "/Concat"))
        elif kind == "weight" and weight.ndim == 2:
            anonymous = f"onnx::MatMul_{len(values)}"
            values[anonymous] = weight.T
            nodes.append(helper.make_node("MatMul", ["input", anonymous], [name], trace + "/MatMul"))
        else:
            values["backbone." + name] = weight
    values["decoder.weight"] = torch.ones(2, 2)
    values["onnx::MatMul_last"] = torch.ones(2, 2)
    nodes.append(helper.make_node("MatMul", ["input", "onnx::MatMul_last"], ["out"], "/decoder/MatMul"))
    nodes.append(helper.make_node("MatMul", ["q", "k"], ["scores"], "/backbone/encoder/layer.0/attention/MatMul"))
    tensors = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "tiny", [], [output], tensors)), path)
