"""What one `model_type` of config.json is: its network, its fields, its names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from tsd_jax.huggingface.families.common import Values, read_common, write_common
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import DECODER_RULES, LINEAR_KERNELS, Decoder
from tsd_jax.models.encoder_config import EncoderConfig

ModelConfig = DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """Describe what several families share.

    Attributes:
      config, network: the classes here. rules: of shardings of its parameters.
      read: fields -> values of the config that every family of the kind has.
      write: config -> entries of config.json that every family has.
      linear: expression for kernels that are worth quantizing.
      peft_task: PEFT's name of what they do.
    """

    config: type[Any]
    network: type[Any]
    rules: Sequence[tuple[str, PartitionSpec]]
    read: Callable[[Fields], Values]
    write: Callable[[Any], Values]
    linear: str
    peft_task: str = "CAUSAL_LM"


DECODER = ModelKind(
    DecoderConfig, Decoder, DECODER_RULES, read_common, write_common, LINEAR_KERNELS
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Describe one `model_type`.

    Attributes:
      architecture: the class of transformers. defaults: of its config.json.
      read: fields -> values of the config beyond the common ones.
      write: config -> entries of config.json beyond the common ones.
      renamed: {a module's name here: there}, where they differ.
      kind: what it shares with others.
      headless: the class without a head, whose tensors have no prefix; "" where its
        files are not read. also: further classes whose files are read.
      prefix: of the names of tensors. layers: what the stack is called after it.
      bare: modules without the prefix.
      head: expression for the parameters that may be started fresh. readout: module
        whose shape is that of the labels.
      unused: expression for tensors that are passed over where nothing asks for them.
      buffers: expression for tensors that are no weights, of whatever type.
    """

    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], Values]
    write: Callable[[Any], Values]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: ModelKind = DECODER
    headless: str = ""
    also: tuple[str, ...] = ()
    prefix: str = "model"
    layers: str = "layers"
    bare: tuple[str, ...] = ("lm_head",)
    head: str = ""
    readout: str = ""
    # Buffers of old checkpoints, and the copy that some keep of a tied head.
    unused: str = r".*\.rotary_emb\.inv_freq|lm_head\.weight"
    buffers: str = ""

    @property
    def accepted(self) -> list[str]:
        """The classes of transformers whose files are read."""
        return [self.architecture, *filter(None, [self.headless]), *self.also]

    def written(self, config: ModelConfig) -> str:
        """Name the class that a config describes."""
        bare = self.headless and not getattr(config, "num_labels", 0)
        return self.headless if bare else self.architecture
