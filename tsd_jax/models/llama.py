"""The Llama family: the decoder as it is where its config says nothing more."""

from __future__ import annotations

from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import DECODER_RULES, Decoder

Llama = Decoder
LlamaConfig = DecoderConfig
LLAMA_RULES = DECODER_RULES
