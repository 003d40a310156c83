"""Who writes: one small class each, the same three verbs, the same model file. Greedy, one stream, the same prompt."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from sinks.cache.plan import Plan
from sinks.errors import UnsupportedOption
from sinks.models.load import Loaded
from sinks.reading.provenance import version_of
from sinks.stream.opening import ends_of
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session

KEPT = 4
"""Tokens that llama.cpp keeps at the beginning when it shifts its context, as we keep sinks."""


@runtime_checkable
class Writer(Protocol):
    """One way to write a stream."""

    @property
    def name(self) -> str:
        """Who, and with which weights."""
        ...

    @property
    def version(self) -> str:
        """Of the package that does the work."""
        ...

    @property
    def keeps(self) -> str:
        """What stays visible."""
        ...

    def read(self, ids: Sequence[int]) -> None:
        """Take these tokens into the stream."""
        ...

    def write(self, tokens: int) -> float:
        """Write so many tokens; milliseconds, wall clock."""
        ...


class Ours:
    """`Session`: sinks and window, with its own loop, sampler and detokenizer."""

    def __init__(self, name: str, loaded: Loaded, plan: Plan) -> None:
        self.name = name
        self.version = f"sinks {version_of('sinks')}"
        self.keeps = f"{plan.sinks} + {plan.window}"
        self._session = Session(loaded, plan.sinks, plan.window)
        self._sampling = Sampling(logit_bias=dict.fromkeys(ends_of(loaded), -math.inf))

    def read(self, ids: Sequence[int]) -> None:
        """Take these tokens into the stream."""
        self._session.feed(ids)

    def write(self, tokens: int) -> float:
        """Write so many tokens; milliseconds, wall clock."""
        began = time.perf_counter()
        for _ in self._session.generate(tokens, sampling=self._sampling):
            pass
        return 1e3 * (time.perf_counter() - began)


class Transformers:
    """Plain `generate()` with transformers' own cache, which keeps everything."""

    name = "transformers generate(), float32"
    keeps = "all"

    def __init__(self, model: PreTrainedModel) -> None:
        self.version = f"transformers {version_of('transformers')}"
        self._model, self._ids = model, torch.empty(1, 0, dtype=torch.int64)
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Take these tokens into the stream, all but the last: `generate` reads that one."""
        whole = torch.cat((self._ids, torch.tensor([ids])), dim=1)
        unread = whole[:, self._cache.get_seq_length() : -1]
        for part in unread.split(256, dim=1):
            self._model.base_model(input_ids=part, past_key_values=self._cache, use_cache=True)
        self._ids = whole

    def write(self, tokens: int) -> float:
        """Write so many tokens; milliseconds, wall clock."""
        settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        mask = torch.ones_like(self._ids)
        began = time.perf_counter()
        generate: Any = self._model.generate
        self._ids = generate(self._ids, attention_mask=mask, past_key_values=self._cache, generation_config=settings)
        return 1e3 * (time.perf_counter() - began)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, with endless generation as its own programs do it.

    When the context of `size` tokens is full, half of what stands behind the first `KEPT` is thrown away and the rest
    is moved back (context shift), so it sees between half and all of `size`.
    """

    def __init__(self, gguf: Path, size: int, threads: int) -> None:
        library = llama_cpp()
        self.name = "llama.cpp, the file's own weights"
        self.version = f"llama-cpp-python {library.__version__}"
        self.keeps = f"{KEPT} + {(size - KEPT) // 2} to {size - KEPT}"
        self._library, self._size = library, size
        self._llama = library.Llama(
            str(gguf), n_ctx=size, n_batch=256, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._next = 0

    def read(self, ids: Sequence[int]) -> None:
        """Take these tokens into the stream."""
        for begin in range(0, len(ids), 256):
            self._eval(ids[begin : begin + 256])

    def write(self, tokens: int) -> float:
        """Write so many tokens; milliseconds, wall clock."""
        began = time.perf_counter()
        for _ in range(tokens):
            self._eval([self._next])
        return 1e3 * (time.perf_counter() - began)

    def _eval(self, ids: Sequence[int]) -> None:
        llama, library = self._llama, self._library
        if llama.n_tokens + len(ids) > self._size:
            memory = library.llama_get_memory(llama.ctx)
            dropped = (llama.n_tokens - KEPT) // 2
            library.llama_memory_seq_rm(memory, 0, KEPT, KEPT + dropped)
            library.llama_memory_seq_add(memory, 0, KEPT + dropped, llama.n_tokens, -dropped)
            llama.n_tokens -= dropped
        llama.eval(ids)
        logits = np.ctypeslib.as_array(library.llama_get_logits(llama.ctx), shape=(llama.n_vocab(),))
        self._next = int(logits.argmax())


def llama_cpp() -> Any:
    """The module of llama-cpp-python. Raises UnsupportedOption, saying so, where it is not installed."""
    try:
        import llama_cpp as library  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnsupportedOption(f"llama.cpp: not installed ({error}); pip install llama-cpp-python") from error
    return library
