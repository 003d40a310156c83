"""Every error that `sinks` raises on purpose, as one tree.

    SinksError
    ├── InvalidInput            a value that the caller gave is wrong
    │   ├── CapacityError       sinks + window do not fit the model
    │   └── TextTooShort        the text ends before anything is evicted
    ├── InputLost               standard input broke while it was read
    ├── OutputLost              standard output takes no more
    ├── UnsupportedModel        this model cannot stream, with the reason
    ├── UnsupportedOption       the model can stream, but not with this option
    ├── CacheError              a cache is used where it does not belong
    │   ├── NotAttached         `attach(model)` was not called
    │   ├── BrokenCache         an earlier forward failed half-way
    │   └── SnapshotError       a saved stream cannot be written or taken up again
    │       ├── DamagedSnapshot     the file is not what was written
    │       ├── OtherVersion        it was written in another format
    │       └── OtherModel          it belongs to another model
    ├── EngineError             an engine cannot serve a request
    │   ├── QueueFull               as many requests wait as may wait
    │   ├── RequestFailed           a step failed under this request
    │   └── EngineClosed            the engine was closed
    └── AssetError              a model or text could not be had
        ├── UnknownName         no such model or text
        ├── NoModel             a file or folder of that name, and no model in it
        ├── FetchError          the download failed
        ├── ChecksumError       the file is not the one that was asked for
        └── UnsafeCheckpoint    loading it would run code

A message says what was given, what is wrong with it, and what to do, in one line.
"""


class SinksError(Exception):
    """Base of every error raised on purpose by `sinks`."""


class InvalidInput(SinksError, ValueError):
    """A value that the caller gave is wrong."""


class CapacityError(InvalidInput):
    """Sinks and window do not fit the model, or do not fit each other."""


class TextTooShort(InvalidInput):
    """The text ends before anything would be evicted, so there is nothing to show."""


class InputLost(SinksError):
    """Standard input broke while it was read: its terminal was closed, say. Its end is no error."""


class OutputLost(SinksError):
    """Standard output takes no more: its disk is full, say. A reader that merely left is no error."""


class UnsupportedModel(SinksError):
    """This model cannot be streamed; the message gives the reason."""


class UnsupportedOption(SinksError):
    """The model streams, but not with this option; nothing is silently ignored."""


class CacheError(SinksError):
    """A cache is used where it does not belong."""


class NotAttached(CacheError):
    """A `SinkCache` reached a model on which `attach` was not called."""


class BrokenCache(CacheError):
    """An earlier forward pass failed half-way, so this cache no longer holds one moment of the stream."""


class SnapshotError(CacheError):
    """A saved stream cannot be written, found or taken up again."""


class DamagedSnapshot(SnapshotError):
    """The file is not what was written: cut short, too long, changed, or never a snapshot."""


class OtherVersion(SnapshotError):
    """The snapshot was written in a format that this version of `sinks` does not read."""


class OtherModel(SnapshotError):
    """The snapshot holds keys of another model, or of the same one with other weights or another data type."""


class EngineError(SinksError):
    """An engine cannot serve a request."""


class QueueFull(EngineError):
    """As many requests wait as may wait, or every slot is taken; try again when one is over."""


class RequestFailed(EngineError):
    """A step failed under this request; `__cause__` says why. Other requests go on."""


class EngineClosed(EngineError):
    """The engine was closed, and its requests with it."""


class AssetError(SinksError):
    """A model or a text could not be had."""


class UnknownName(AssetError):
    """No model or text has this name, and no file or folder either."""


class NoModel(AssetError):
    """There is a file or folder of this name, and it was never a model."""


class FetchError(AssetError):
    """The download failed; the message says what to do without a network."""


class ChecksumError(AssetError):
    """The file that arrived is not the file that was asked for."""


class UnsafeCheckpoint(AssetError):
    """Loading this checkpoint would execute code that it contains."""
