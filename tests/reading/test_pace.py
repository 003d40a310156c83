"""How many tokens go into one pass where nobody says."""

from types import SimpleNamespace

import pytest
import torch

from sinks.reading.pace import CHUNK, DEVICE_CHUNK, LOGIT_BYTES, TURN_CHUNK, natural_chunk, turn_chunk


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("device", "vocabulary", "dtype", "chunk"), [
    ("cpu", 49_152, torch.float32, CHUNK),
    ("cuda", 49_152, torch.bfloat16, DEVICE_CHUNK),
    ("cuda", 128_256, torch.bfloat16, 8192),
    ("cuda", 262_144, torch.float32, 2048),
    ("cuda", 10**9, torch.float32, CHUNK),
])  # fmt: skip
def test_logits_of_a_chunk_are_bounded(device: str, vocabulary: int, dtype: torch.dtype, chunk: int) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
    model = SimpleNamespace(device=torch.device(device), dtype=dtype, config=config)
    assert natural_chunk(model) == chunk  # type: ignore[arg-type]
    assert chunk == CHUNK or chunk * vocabulary * dtype.itemsize <= LOGIT_BYTES


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("device", "chunk"), [("cpu", CHUNK), ("cuda", TURN_CHUNK)])
def test_a_turn_reads_what_others_can_wait_for(device: str, chunk: int) -> None:
    assert turn_chunk(SimpleNamespace(device=torch.device(device))) == chunk  # type: ignore[arg-type]
