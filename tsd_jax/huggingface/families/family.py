"""What tells one `model_type` of config.json from another."""

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
    """What all decoders, or all encoders of one network, share.

    Attributes:
      config: class of the model's config.
      network: class of the Flax module.
      rules: sharding rules of its parameters.
      read: fields -> values of the config that every family of the kind has.
      write: config -> entries of config.json that every family of the kind has.
      linear: regular expression for the kernels that quantization applies to.
      peft_task: PEFT's name for what the models do.
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
    """One `model_type`.

    Attributes:
      architecture: class of transformers.
      defaults: of the fields of config.json.
      read: fields -> values of the config beyond those of the kind.
      write: config -> entries of config.json beyond those of the kind.
      renamed: {name of a module here: its name in files}, where they differ.
      kind: what it shares with other families.
      headless: class without a head, whose tensors have no prefix; "" where its files
        are not read.
      also: further classes whose files are read.
      prefix: of the names of tensors.
      layers: name of the stack of layers, after the prefix.
      bare: modules without the prefix.
      head: regular expression for the parameters that may be initialized afresh.
      readout: module whose outputs are the labels.
      unused: regular expression for tensors that are ignored where the model has none
        of that name.
      buffers: regular expression for tensors that are not weights, of any dtype.
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

    def architecture_of(self, config: ModelConfig) -> str:
        """Return the class of transformers that a config describes."""
        bare = self.headless and not getattr(config, "num_labels", 0)
        return self.headless if bare else self.architecture
