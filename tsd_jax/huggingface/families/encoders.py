"""Encoders: how each family's config.json is read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tsd_jax.huggingface.families.common import Values, same_names
from tsd_jax.huggingface.families.family import Family, ModelKind
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.deberta import Deberta
from tsd_jax.models.encoder import ENCODER_RULES, Encoder
from tsd_jax.models.encoder_config import (
    CLASSIFICATION,
    REGRESSION,
    ConvConfig,
    DisentangledConfig,
    EncoderConfig,
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
)
_CLASSIFIER = "ForSequenceClassification"


def _read_encoder(fields: Fields) -> Values:
    """Read the values that every encoder has."""
    facts = {"is_decoder": False, "add_cross_attention": False}
    for name, only in facts.items():
        if fields.get(name, bool, only) != only:
            raise fields.refuse(name, fields.get(name, bool), only)
    kind = fields.get("position_embedding_type", str, "absolute")
    if kind != "absolute":
        raise fields.refuse("position_embedding_type", kind, "'absolute'")
    return {
        **{name: fields.get(name, int) for name in _SIZES},
        "layer_norm_eps": fields.get("layer_norm_eps", float),
        "initializer_range": fields.get("initializer_range", float),
        "hidden_act": fields.get("hidden_act", str, "gelu"),
        **_read_labels(fields),
    }


def _read_labels(fields: Fields) -> Values:
    """Read the labels of the head, which only classes for classification have."""
    architectures = fields.get("architectures", list, [])
    if not any(str(each).endswith(_CLASSIFIER) for each in architectures):
        return {}
    names = fields.values.get("id2label")
    number = fields.get("num_labels", int, None)
    if isinstance(names, dict):
        try:
            ordered = tuple(str(names[str(each)]) for each in range(len(names)))
        except KeyError:
            raise fields.refuse("id2label", names, "numbers from 0 on") from None
    else:
        ordered = ()
    count = len(ordered) or (2 if number is None else number)
    problem = fields.get("problem_type", str, None)
    if problem is None:  # as in transformers
        problem = REGRESSION if count == 1 else CLASSIFICATION
    if problem not in (CLASSIFICATION, REGRESSION):
        raise fields.refuse("problem_type", problem, f"{CLASSIFICATION}, {REGRESSION}")
    return {"num_labels": count, "label_names": ordered, "problem_type": problem}


def _write_encoder(config: EncoderConfig) -> Values:
    """Return the entries of config.json that every encoder has."""
    names = (*_SIZES, "layer_norm_eps", "initializer_range", "hidden_act")
    entries = same_names(*names)(config)
    if not config.num_labels:
        return entries
    return entries | _label_entries(config)


def default_names(number: int) -> tuple[str, ...]:
    """Return the names that transformers gives to labels without any."""
    return tuple(f"LABEL_{label}" for label in range(number))


def _label_entries(config: EncoderConfig) -> Values:
    """Return the entries of config.json about the head."""
    labels = config.label_names or default_names(config.num_labels)
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": config.problem_type,
    }


def _read_bert(fields: Fields) -> Values:
    del fields
    return {}


def _read_roberta(fields: Fields) -> Values:
    del fields
    return {"counted_positions": True, "head": "dense"}


def _write_nothing(config: EncoderConfig) -> Values:
    del config
    return {}


def _read_deberta(fields: Fields) -> Values:
    if not fields.get("relative_attention", bool):
        raise fields.refuse("relative_attention", False, True)
    hidden = fields.get("hidden_size", int)
    heads = fields.get("num_attention_heads", int)
    for name, only in (
        ("pooler_hidden_size", hidden),
        ("attention_head_size", hidden // max(heads, 1)),
    ):
        if fields.get(name, int, only) != only:
            raise fields.refuse(name, fields.get(name, int), only)
    embedding = fields.get("embedding_size", int, hidden)
    return {
        "pooler_act": fields.get("pooler_hidden_act", str),
        "absolute_positions": fields.get("position_biased_input", bool),
        "embedding_size": None if embedding == hidden else embedding,
        "disentangled": _read_disentangled(fields),
        "convolution": _read_convolution(fields),
    }


def _read_disentangled(fields: Fields) -> DisentangledConfig:
    kinds = fields.values.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    kinds = [each.strip() if isinstance(each, str) else each for each in kinds]
    if not kinds or not {*kinds} <= {"c2p", "p2c"}:
        raise fields.refuse("pos_att_type", kinds, "c2p, p2c or both")
    longest = fields.get("max_relative_positions", int)
    if longest < 1:
        longest = fields.get("max_position_embeddings", int)
    buckets = fields.get("position_buckets", int, -1)
    norm = fields.get("norm_rel_ebd", str, "none").lower().split("|")
    return DisentangledConfig(
        max_relative_positions=longest,
        position_buckets=buckets if buckets > 0 else None,
        content_to_position="c2p" in kinds,
        position_to_content="p2c" in kinds,
        share_att_key=fields.get("share_att_key", bool, False),
        norm_embeddings="layer_norm" in [each.strip() for each in norm],
    )


def _read_convolution(fields: Fields) -> ConvConfig | None:
    width = fields.get("conv_kernel_size", int, 0)
    if width <= 0:
        return None
    groups = fields.get("conv_groups", int, 1)
    return ConvConfig(width, groups, fields.get("conv_act", str, "tanh"))


def _write_deberta(config: EncoderConfig) -> Values:
    numbers, conv = config.disentangled, config.convolution
    assert numbers is not None
    kinds = {"c2p": numbers.content_to_position, "p2c": numbers.position_to_content}
    entries: dict[str, Any] = {
        "pooler_hidden_act": config.pooler_act,
        "pooler_hidden_size": config.hidden_size,
        "position_biased_input": config.absolute_positions,
        "relative_attention": True,
        "max_relative_positions": numbers.max_relative_positions,
        "position_buckets": numbers.position_buckets or -1,
        "pos_att_type": [kind for kind, used in kinds.items() if used],
        "share_att_key": numbers.share_att_key,
        "norm_rel_ebd": "layer_norm" if numbers.norm_embeddings else "none",
    }
    if config.embedding_size is not None:
        entries["embedding_size"] = config.embedding_size
    if conv is not None:
        entries |= {"conv_kernel_size": conv.width, "conv_groups": conv.groups}
        entries["conv_act"] = conv.activation
    return entries


def _defaults(**more: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        **more,
    }


def _kind(network: type[Any]) -> ModelKind:
    return ModelKind(
        config=EncoderConfig,
        network=network,
        rules=ENCODER_RULES,
        read=_read_encoder,
        write=_write_encoder,
        linear=r"layers[^/]*/.+/kernel",
        peft_task="SEQ_CLS",
    )


_ENCODER, _DEBERTA = _kind(Encoder), _kind(Deberta)
# Heads of pretraining, and ours where the model has no labels.
_UNUSED = r"cls\..*|lm_head\..*|classifier\..*|(.*\.)?pooler\..*"
# Left behind by ELECTRA-like pretraining; and a table of embeddings that is not used.
_UNUSED_DEBERTA = (
    r"(lm|mask)_predictions\..*|deberta\.embeddings\.position_embeddings\..*"
)


def _family(
    name: str,
    prefix: str,
    defaults: Mapping[str, Any],
    read: Callable[[Fields], Values],
    write: Callable[[Any], Values],
    **more: Any,
) -> Family:
    """Return a family of encoders.

    Args:
      name: of its classes, before what they are for.
      prefix: of its tensors.
      defaults: of the fields of config.json.
      read: its reader.
      write: its writer.
      **more: what it has other than a BERT; see `Family`.
    """
    return Family(
        f"{name}{_CLASSIFIER}",
        defaults,
        read,
        write,
        headless=f"{name}Model",
        prefix=prefix,
        layers="encoder.layer",
        buffers=r".*embeddings\.(position|token_type)_ids",
        **{
            "kind": _ENCODER,
            "also": (f"{name}ForMaskedLM",),
            "bare": ("classifier",),
            "head": r"(pooler|classifier)/.*",
            "readout": "classifier",
            "unused": _UNUSED,
            **more,
        },
    )


ENCODERS: Mapping[str, Family] = {
    "bert": _family(
        "Bert",
        "bert",
        _defaults(),
        _read_bert,
        _write_nothing,
        also=("BertForMaskedLM", "BertForPreTraining"),
    ),
    "roberta": _family(
        "Roberta",
        "roberta",
        _defaults(pad_token_id=1),
        _read_roberta,
        _write_nothing,
        head=r"classifier/.*",
        readout="classifier.out_proj",
    ),
    "deberta-v2": _family(
        "DebertaV2",
        "deberta",
        _defaults(layer_norm_eps=1e-7, type_vocab_size=0, pooler_hidden_act="gelu")
        | {"relative_attention": False, "max_relative_positions": -1}
        | {"position_biased_input": True},
        _read_deberta,
        _write_deberta,
        kind=_DEBERTA,
        bare=("classifier", "pooler"),
        unused=f"{_UNUSED}|{_UNUSED_DEBERTA}",
    ),
}
