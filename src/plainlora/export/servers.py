"""What servers take of an adapter, checked offline, and the commands that serve it."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig

from plainlora.lora.delta import Delta
from plainlora.lora.errors import some

# https://docs.vllm.ai/en/latest/api/vllm/config/lora/ (MaxLoRARanks)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Models with `SupportsLoRA` (vllm/model_executor/models), and with the attention and MLP layers that TGI looks for.
ADAPTED_BY_SERVERS = ("llama", "mistral", "qwen2")
# https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/utils/adapter.py
TGI_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass(frozen=True)
class Served:
    """An adapter as servers see it.

    Attributes:
        adapter: Its folder.
        base: The base's name or folder.
        revision: Its branch, tag or commit; `None` for a folder and for the main branch.
        model_type: The base's family.
        layers: The base's number of layers.
        config: Its config.
        deltas: Its deltas by the modules' names; `None` if it is of a variant whose delta is no `s B A`.
        others: What was trained beside them.
    """

    adapter: Path
    base: str
    model_type: str
    layers: int
    config: LoraConfig
    deltas: Mapping[str, Delta] | None
    others: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        ranks = [each.r for each in (self.deltas or {}).values()]
        return max(ranks, default=int(self.config.r))

    @property
    def name(self) -> str:
        """A name by which requests ask for it."""
        return self.adapter.resolve().name

    def _shared_faults(self) -> Iterator[str]:
        """What neither vLLM nor TGI takes."""
        if self.model_type not in ADAPTED_BY_SERVERS:
            yield f"it adapts no {self.model_type} models"
        if self.config.use_dora:
            yield "use_dora=True"
        elif self.deltas is None:
            yield "it is of a variant of LoRA that PEFT alone implements"
        if self.config.modules_to_save:
            yield f"modules_to_save={sorted(self.config.modules_to_save)}"
        if self.config.bias != "none":
            yield f"bias={self.config.bias!r}"
        if self.others and not self.config.modules_to_save and self.config.bias == "none":
            yield f"the file also holds {some(list(self.others))}"
        for pattern in ("rank_pattern", "alpha_pattern"):
            if getattr(self.config, pattern):
                yield f"{pattern}, which is not read: modules would be scaled wrongly"

    def vllm_faults(self) -> list[str]:
        """Why vLLM would refuse the adapter, or compute something else."""
        faults = list(self._shared_faults())
        if self.rank > VLLM_RANKS[-1]:
            faults.append(f"rank {self.rank}, above the {VLLM_RANKS[-1]} that --max-lora-rank allows")
        return faults

    def tgi_faults(self) -> list[str]:
        """Why Text Generation Inference would refuse the adapter, or compute something else."""
        faults = list(self._shared_faults())
        by_kind: dict[str, int] = {}
        for module in self.deltas or {}:
            kind = module.rpartition(".")[2]
            by_kind[kind] = by_kind.get(kind, 0) + 1
        unknown = sorted(by_kind.keys() - set(TGI_TARGETS))
        partly = sorted(kind for kind, number in by_kind.items() if kind != "lm_head" and number < self.layers)
        if unknown and self.model_type in ADAPTED_BY_SERVERS:
            faults.append(f"it adapts {', '.join(unknown)}, which is left out")
        if partly and not unknown:
            faults.append(f"{', '.join(partly)} of some layers only, and then of none")
        if self.rank != 8 and self.rank % 16:
            faults.append(
                f"rank {self.rank}, which is padded to one of 8 or a multiple of 16 and then scaled by the padded rank"
            )
        return faults


def describe_servers(served: Served, template: bool) -> str:
    """The commands for vLLM and TGI, each with what was checked, as a text file.

    Args:
        served: The adapter.
        template: Whether the adapter's folder holds a chat template.
    """
    merged = f"{served.adapter}-merged"
    merge = f"plainlora merge --adapter {shlex.quote(str(served.adapter))} --output {shlex.quote(merged)}"
    shape = f"{served.name}: rank {served.rank}" + (f" in {len(served.deltas)} modules" if served.deltas else "")
    place = shlex.quote(str(served.adapter.resolve()))
    base = shlex.quote(served.base)
    revision = f" --revision {shlex.quote(served.revision)}" if served.revision else ""
    rank = next((allowed for allowed in VLLM_RANKS if allowed >= served.rank), VLLM_RANKS[-1])
    jinja = f" --chat-template {place}/chat_template.jinja" if template else ""
    name = shlex.quote(served.name)
    vllm = f"vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}{jinja}"
    tgi = f"LORA_ADAPTERS={name}={place} text-generation-launcher --model-id {base}{revision}"
    sections = (
        ("vLLM", vllm, served.vllm_faults(), f"vllm serve {shlex.quote(merged)}"),
        (
            "Text Generation Inference",
            tgi,
            served.tgi_faults(),
            f"text-generation-launcher --model-id {shlex.quote(merged)}",
        ),
    )
    lines = [shape, ""]
    for server, command, faults, otherwise in sections:
        if faults:
            lines += [
                f"# {server} cannot serve this adapter on its base: {'; '.join(faults)}. Merged:",
                merge,
                otherwise,
            ]
        else:
            lines += [f"# {server}, the adapter on its base; requests name the model {served.name}:", command]
        lines.append("")
    return "\n".join([*lines, ""])
