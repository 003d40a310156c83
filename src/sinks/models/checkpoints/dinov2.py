"""DINOv2 out of an ONNX file, as a folder for `from_pretrained`.

An exporter to ONNX keeps the names of most weights, but not those of matrices that it transposed and not those of
values that it folded. Their names are those of the nodes that use them:

| in the file | in the model |
|---|---|
| `backbone.NAME` | `NAME` |
| anonymous, second input of the MatMul `/backbone/a/b/MatMul` | `a.b.weight`, transposed |
| anonymous, of 1 and of `patches` rows, used in `/backbone/embeddings/` | position embeddings, the class first |

The token that masks patches in training is not in the file, since nothing uses it; it becomes zero. What does not
belong to the backbone is left out. Names are those of the published checkpoints, which transformers of any release maps
to its own.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config

from sinks.errors import AssetError
from sinks.models.checkpoints.convert import Header
from sinks.models.checkpoints.folder import PREPROCESSOR, WEIGHTS, write_json
from sinks.models.checkpoints.quiet import quiet

if TYPE_CHECKING:
    from onnx import NodeProto

_BACKBONE = "backbone."
_POSITIONS = "embeddings.position_embeddings"
_HEAD_DIM = 64
"""In every DINOv2, and not to be seen in the weights."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in ImageNet, by which DINOv2 was trained to see."""


def write_dinov2(onnx_file: Path, folder: Path) -> Header:
    """Write the DINOv2 backbone of an ONNX file into `folder`: configuration, weights, and how to prepare pictures.

    Raises:
        AssetError: the package `onnx` is not installed, or the file holds no such backbone.
        OSError: the folder cannot be written.
    """
    weights = _backbone(onnx_file)
    try:
        config = _config(weights)
    except KeyError as error:
        raise AssetError(f"{onnx_file} holds no whole DINOv2, it lacks {error}: give another file") from error
    with quiet():
        config.save_pretrained(folder)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    edge = {"height": config.image_size, "width": config.image_size}
    write_json(folder / PREPROCESSOR, {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "size": edge})
    return Header("F32", "not stated")


def _backbone(onnx_file: Path) -> dict[str, Tensor]:
    """The weights of the backbone under the names of the published checkpoints."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.numpy_helper import to_array
    except ImportError as error:
        raise AssetError(
            f"{onnx_file.name} is read with the package onnx, which is not installed: "
            f'install it with pip install "sinks[vision]" (only the first load needs it)'
        ) from error
    try:
        graph = onnx.load(onnx_file).graph
    except (OSError, DecodeError, ValueError) as error:
        raise AssetError(f"{onnx_file} cannot be read as an ONNX file ({error}): give another file") from error
    held: dict[str, Tensor] = {entry.name: torch.tensor(to_array(entry)) for entry in graph.initializer}
    weights = {name.removeprefix(_BACKBONE): held[name] for name in held if name.startswith(_BACKBONE)}
    positions: list[Tensor] = []
    for node in graph.node:
        for name in set(node.input) & held.keys() - {_BACKBONE + known for known in weights}:
            module = _module(node)
            if node.op_type == "MatMul" and module:
                weights[f"{module}.weight"] = held[name].T
            elif module == "embeddings" and held[name].ndim == 3:
                positions.append(held[name])
    weights["embeddings.mask_token"] = torch.zeros(1, weights.get("layernorm.bias", torch.empty(0)).numel())
    if len(positions) == 2:
        weights[_POSITIONS] = torch.cat(sorted(positions, key=lambda rows: rows.shape[1]), dim=1)
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def _module(node: "NodeProto") -> str:
    """The module of the backbone that a node is the trace of; empty for any other node."""
    path, _, _ = node.name.lstrip("/").replace("/", ".").rpartition(".")
    return path.removeprefix(_BACKBONE) if path.startswith(_BACKBONE) else ""


def _config(weights: dict[str, Tensor]) -> Dinov2Config:
    """The shape of the model, from the shapes of its weights.

    Raises:
        KeyError: one of these weights is not there.
    """
    width, channels, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    rows = weights[_POSITIONS].shape[1] - 1
    shape: dict[str, Any] = {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(rows),
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")),
        "num_attention_heads": width // _HEAD_DIM,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.bias"].numel() // width,
    }
    return Dinov2Config(**shape, architectures=["Dinov2Model"])
