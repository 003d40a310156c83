"""Streams any Hugging Face causal language model for ever at constant memory, by keeping its attention sinks.

    from sinks import SinkCache, attach, load

    loaded = load()                                             # the built-in model; or a Hub id, a folder, a GGUF file
    attach(loaded.model)                                        # public hooks only; `detach` undoes it
    cache = SinkCache.for_model(loaded.model, sinks=4, window=1020)
    loaded.model.generate(**inputs, past_key_values=cache)      # ordinary transformers from here on

The names below are the public interface, and each is imported when it is first used: `import sinks` reads no other
module, so it takes milliseconds, does not import torch, and has no effect on anything.

Source: Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*, arXiv:2309.17453.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinks.cache.cache import SinkCache
    from sinks.errors import SinksError
    from sinks.models.attach import attach, detach
    from sinks.models.load import load
    from sinks.report.survey import survey
    from sinks.stream.engine.engine import Engine
    from sinks.stream.session import Session

__version__ = "0.1.0"

__all__ = ["Engine", "Session", "SinkCache", "SinksError", "__version__", "attach", "detach", "load", "survey"]

_HOMES = {
    "Engine": "sinks.stream.engine.engine",
    "Session": "sinks.stream.session",
    "SinkCache": "sinks.cache.cache",
    "SinksError": "sinks.errors",
    "attach": "sinks.models.attach",
    "detach": "sinks.models.attach",
    "load": "sinks.models.load",
    "survey": "sinks.report.survey",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562); afterwards it is an ordinary attribute."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sinks' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether or not they have been used yet."""
    return sorted({*globals(), *__all__})
