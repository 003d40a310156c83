"""Sessions of a tiny random model, for tests that need no download."""

from functools import cache

import numpy as np
import torch

from sinks.models.load import Loaded, Source
from sinks.stream.sampling import Sampling
from sinks.stream.session import Session
from tests.reading.tiny import stream, tiny_model, tiny_tokenizer

SINKS, WINDOW = 3, 9
IDS = stream(80).tolist()
WARM = Sampling(temperature=1.0)
CLOSE = {"rtol": 0, "atol": 1e-9}
"""float64, numbers of order 1 to 10, sums of a few hundred terms."""


@cache
def tiny_loaded(bos: bool = False, dtype: torch.dtype = torch.float64, layers: int = 2) -> Loaded:
    """A random Llama of bytes; the same object every time, since sessions share their model."""
    model = tiny_model(layers, dtype)
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id, settings.pad_token_id = None, 0  # an answer is as long as it was asked to be
    return Loaded(model, tiny_tokenizer(bos), Source("tiny", "folder", "none", "", ""))


def opened(sinks: int = SINKS, window: int = WINDOW, chunk: int = 5, **options: object) -> Session:
    """A session with so small a window that everything is let go soon."""
    return Session(tiny_loaded(), sinks, window, chunk=chunk, **options)  # type: ignore[arg-type]


def fresh(ids: list[int], sinks: int = SINKS, window: int = WINDOW) -> Session:
    """A session that has read these ids in one piece."""
    session = opened(sinks, window, chunk=1000)
    session.feed(ids)
    return session


def ids_of(session: Session) -> list[int]:
    """The visible tokens in order."""
    return [token for span in session.visible.spans for token in span.ids]


def future(session: Session) -> np.ndarray:
    """How surprising a fixed continuation would be; the session is left alone."""
    return session.fork().score([7, 200, 31, 7, 99]).nll
