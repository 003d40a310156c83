"""A model shared between two processes streams as the whole one does."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from sinks.errors import InvalidInput
from sinks.models.parallel.line import line
from sinks.models.parallel.share import share_of
from tests.models import sharing
from tests.reading.tiny import tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of PyTorch has no gloo"),
]

CLOSE = {"float64": 1e-12, "float32": 1e-5}
"""Of the largest logit: sums of a few hundred terms in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared")
    tiny_folder(made / "model")
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What either process found; they run once for all tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    return sharing.run(folder, port)


@pytest.mark.parametrize("case", sharing.CASES)
def test_a_shared_model_streams_as_the_whole_one(case: str, found: list[dict[str, Any]]):
    whole, cache = sharing.streamed(sharing.made(case))
    band = CLOSE[case.rpartition(" ")[2]] * float(whole.abs().max())
    for each in found:
        assert float((each["logits"][case] - whole).abs().max()) < band
        assert each["bytes"][case] * sharing.PROCESSES == cache.nbytes


@pytest.mark.parametrize("case", sharing.CASES)
def test_both_see_the_same_bits(case: str, found: list[dict[str, Any]]):
    """Or they might one day choose different tokens."""
    assert torch.equal(found[0]["logits"][case], found[1]["logits"][case])


@pytest.mark.parametrize("case", sharing.LEARNING)
def test_gradients_of_plain_attention_are_those_of_the_whole_model(case: str, found: list[dict[str, Any]]):
    expected = sharing.gradients(sharing.made(case))
    largest = max(float(each.abs().max()) for each in expected.values())
    for each in found:
        assert each["gradients"][case].keys() == expected.keys()
        for name, gradient in each["gradients"][case].items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12 * largest)


def test_both_write_what_the_whole_model_writes(found: list[dict[str, Any]], folder: Path):
    whole = sharing.written(folder / "model", dtype="float64")
    assert [each["written"] for each in found] == [whole, whole]
    assert all("shared between 2 processes" in each["note"] for each in found)


def test_each_holds_about_half_the_weights(found: list[dict[str, Any]]):
    model = sharing.made([*sharing.CASES][-1])
    assert share_of(model) is None
    whole = sum(each.numel() for each in model.parameters())
    norms = sum(each.numel() for each in model.parameters() if each.ndim == 1)
    assert sum(each["parameters"] for each in found) == whole + norms
    assert all(each["held"] == each["parameters"] for each in found), "a share keeps the whole alive behind a view"


@pytest.mark.parametrize(
    ("tried", "says"),
    [
        ("heads", "InvalidInput: 2 processes do not divide num_attention_heads = 3 of this llama"),
        ("width", "InvalidInput: 2 processes do not divide intermediate_size = 33 of this llama"),
        ("family", "UnsupportedModel: gemma2 cannot be shared: only llama"),
        ("twice", "InvalidInput: this model is shared already"),
        ("hastened", "UnsupportedOption: this model is hastened"),
        ("quantised", "UnsupportedOption: this model's self_attn.q_proj is quantised"),
        ("quant", "InvalidInput: quant='int8' and parallel=: weights are shared as they are"),
        ("device", "InvalidInput: device='cpu:0' and a mesh of cpu: a shared model goes where its processes are"),
        ("snapshot", "UnsupportedOption: a snapshot takes a whole model, and this process holds share"),
        ("observation", "UnsupportedOption: observation takes a whole model"),
        ("hasten", "UnsupportedModel: this model has no lean decode step: it is shared between processes"),
        ("steps", "ordinary decode steps, since it is shared between processes"),
    ],
)
def test_what_cannot_be_is_refused_everywhere(tried: str, says: str, found: list[dict[str, Any]]):
    for each in found:
        assert each["refusals"][tried].startswith(says)


def test_alone_it_says_how_to_start_the_others(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidInput, match="start it with torchrun"), line("cpu"):
        pass
    with pytest.raises(InvalidInput, match="device='tpu': processes share a model on cuda or cpu"), line("tpu"):
        pass
