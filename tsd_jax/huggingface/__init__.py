"""Checkpoints in Hugging Face format, to and from parameter trees.

    from tsd_jax import huggingface

    folder = huggingface.resolve("HuggingFaceTB/SmolLM2-135M")
    config = huggingface.read_config(folder)
    tokenizer = huggingface.load_tokenizer(folder)
    params = huggingface.load_params(folder, config, dtype="bfloat16")

    network = huggingface.family_of(config).kind.network
    logits = network(config).apply({"params": params}, tokens)

    huggingface.write_checkpoint("copy", config, params)

`module_name`, `module_paths` and `tensor_paths` translate between the names of torch
and the paths of the tree, as `tsd_jax.to_peft`, `to_merged` and `from_peft` need them.
"""

from tsd_jax.huggingface.added_tokens import (
    add_tokens,
    grow,
    grown_config,
    known_rows,
)
from tsd_jax.huggingface.check import absent_head, check_checkpoint
from tsd_jax.huggingface.config import config_json, read_config
from tsd_jax.huggingface.families.family import Family, ModelConfig
from tsd_jax.huggingface.families.registry import FAMILIES, family_of
from tsd_jax.huggingface.fingerprint import fingerprint
from tsd_jax.huggingface.generation_config import read_eos_ids
from tsd_jax.huggingface.hub import resolve, resolve_adapter
from tsd_jax.huggingface.load import load_params
from tsd_jax.huggingface.names import (
    TOKEN_AXES,
    ModuleName,
    ParamSlot,
    StackIndex,
    abstract_params,
    module_name,
    module_paths,
    tensor_paths,
    to_huggingface,
)
from tsd_jax.huggingface.save import write_checkpoint
from tsd_jax.huggingface.tokenizer import load_tokenizer, save_tokenizer

__all__ = [
    "FAMILIES",
    "TOKEN_AXES",
    "Family",
    "ModelConfig",
    "ModuleName",
    "ParamSlot",
    "StackIndex",
    "absent_head",
    "abstract_params",
    "add_tokens",
    "check_checkpoint",
    "config_json",
    "family_of",
    "fingerprint",
    "grow",
    "grown_config",
    "known_rows",
    "load_params",
    "load_tokenizer",
    "module_name",
    "module_paths",
    "read_config",
    "read_eos_ids",
    "resolve",
    "resolve_adapter",
    "save_tokenizer",
    "tensor_paths",
    "to_huggingface",
    "write_checkpoint",
]
