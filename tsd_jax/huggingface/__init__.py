"""Checkpoints in Hugging Face format, to and from our parameter trees."""

from tsd_jax.models.huggingface.config import read_config as read_config
from tsd_jax.models.huggingface.families import family_of as family_of
from tsd_jax.models.huggingface.names import abstract_params as abstract_params
from tsd_jax.models.huggingface.names import module_name as module_name
from tsd_jax.models.huggingface.names import module_places as module_places
from tsd_jax.models.huggingface.names import tensor_places as tensor_places
from tsd_jax.models.huggingface.names import to_huggingface as to_huggingface
from tsd_jax.models.huggingface.source import load_tokenizer as load_tokenizer
from tsd_jax.models.huggingface.source import resolve as resolve
from tsd_jax.models.huggingface.vocabulary import ROWS as ROWS
from tsd_jax.models.huggingface.vocabulary import add_tokens as add_tokens
from tsd_jax.models.huggingface.vocabulary import grow as grow
from tsd_jax.models.huggingface.vocabulary import grown_config as grown_config
from tsd_jax.models.huggingface.weights import absent_head as absent_head
from tsd_jax.models.huggingface.weights import check_checkpoint as check_checkpoint
from tsd_jax.models.huggingface.weights import load_params as load_params
from tsd_jax.models.huggingface.weights import write_checkpoint as write_checkpoint
