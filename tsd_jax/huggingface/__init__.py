"""Checkpoints in Hugging Face format, to and from our parameter trees."""

from tsd_jax.huggingface.added_tokens import ROWS as ROWS
from tsd_jax.huggingface.added_tokens import add_tokens as add_tokens
from tsd_jax.huggingface.added_tokens import grow as grow
from tsd_jax.huggingface.added_tokens import grown_config as grown_config
from tsd_jax.huggingface.config import read_config as read_config
from tsd_jax.huggingface.families.decoders import family_of as family_of
from tsd_jax.huggingface.hub import load_tokenizer as load_tokenizer
from tsd_jax.huggingface.hub import resolve as resolve
from tsd_jax.huggingface.load import absent_head as absent_head
from tsd_jax.huggingface.load import check_checkpoint as check_checkpoint
from tsd_jax.huggingface.load import load_params as load_params
from tsd_jax.huggingface.load import write_checkpoint as write_checkpoint
from tsd_jax.huggingface.names import abstract_params as abstract_params
from tsd_jax.huggingface.names import module_name as module_name
from tsd_jax.huggingface.names import module_paths as module_paths
from tsd_jax.huggingface.names import tensor_paths as tensor_paths
from tsd_jax.huggingface.names import to_huggingface as to_huggingface
