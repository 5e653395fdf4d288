"""Model configurations: what the graphs need from a ``config.json``, checked, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelConfigError

_MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-shaped decoder (``LlamaConfig`` of transformers), with grouped-query attention and attention biases."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_base: float
    norm_eps: float
    attention_bias: bool
    tied_head: bool

    @classmethod
    def read(cls, path: Path) -> LlamaConfig:
        """From the ``config.json`` of a Hugging Face model folder."""
        fields = _Fields(path)
        # Other families use the same tensor names and compute something else with them (Granite, Mistral).
        fields.require("model_type", "llama", default="llama")
        fields.require("hidden_act", "silu", default="silu")
        fields.require("mlp_bias", False, default=False)
        fields.require("rope_scaling", None, default=None)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        config = cls(
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            layers=fields.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", default=heads),
            head_size=fields.integer("head_dim", default=hidden // heads),
            vocabulary=fields.integer("vocab_size"),
            context=fields.integer("max_position_embeddings"),
            rope_base=fields.rope_base(),
            norm_eps=fields.number("rms_norm_eps"),
            attention_bias=fields.boolean("attention_bias", default=False),
            tied_head=fields.boolean("tie_word_embeddings", default=False),
        )
        if config.hidden_size % config.heads or config.heads % config.kv_heads or config.head_size % 16:
            raise ModelConfigError(
                f"{path} has hidden size {config.hidden_size}, {config.heads} heads, {config.kv_heads} KV heads and "
                f"head size {config.head_size}.",
                remedy="The hidden size must be a multiple of the heads, these of the KV heads, the head size of 16.",
            )
        return config


@dataclass(frozen=True)
class EsmConfig:
    """An ESM-2 encoder (``EsmConfig`` of transformers)."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    rope_base: float
    norm_eps: float
    token_dropout: bool

    # Both fair-esm and transformers scale by the share of tokens that training left unmasked: 1 - 0.15 * 0.8.
    TOKEN_DROPOUT_SCALE = 0.88

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def read(cls, path: Path) -> EsmConfig:
        """From the ``config.json`` of a Hugging Face model folder."""
        fields = _Fields(path)
        fields.require("model_type", "esm", default="esm")
        fields.require("is_folding_model", False, default=False)
        fields.require("position_embedding_type", "rotary")
        fields.require("hidden_act", "gelu")
        fields.require("emb_layer_norm_before", False, default=False)
        fields.require("rope_scaling", None, default=None)
        config = cls(
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            layers=fields.integer("num_hidden_layers"),
            heads=fields.integer("num_attention_heads"),
            vocabulary=fields.integer("vocab_size"),
            context=fields.integer("max_position_embeddings"),
            rope_base=fields.rope_base(),
            norm_eps=fields.number("layer_norm_eps"),
            token_dropout=fields.boolean("token_dropout"),
        )
        if config.hidden_size % config.heads or config.head_size % 8:
            raise ModelConfigError(
                f"{path} has hidden size {config.hidden_size} and {config.heads} heads.",
                remedy="The hidden size must be a multiple of 8 times the heads.",
            )
        return config


@dataclass(frozen=True)
class GinConfig:
    """GraphMVP's GIN; it has no configuration file, its sizes are those of its tensors."""

    layers: int
    width: int

    # Rows of the embedding tables (GraphMVP): 118 elements, "misc" and a mask; three chirality tags.
    ATOM_TYPES = 120
    CHIRALITY_TAGS = 3
    # torch.nn.BatchNorm1d's default, which GraphMVP leaves as it is.
    BATCH_NORM_EPS = 1e-5


class _Fields:
    """Typed access to a JSON object with errors that name the file and the field."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if path.stat().st_size > _MAX_CONFIG_BYTES:
                raise ModelConfigError(f"{path} is larger than any configuration.", limit=_MAX_CONFIG_BYTES)
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelConfigError(f"{path} cannot be read: {error}.") from error
        if not isinstance(values, dict):
            raise ModelConfigError(f"{path} is not a JSON object.")
        self._values: Mapping[str, Any] = values

    def integer(self, name: str, *, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self._wrong(name, "a positive number", value)
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise self._wrong(name, "a positive number", value)
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def rope_base(self) -> float:
        """``rope_theta``, which transformers 5 moved into ``rope_parameters``."""
        parameters = self._values.get("rope_parameters")
        if parameters is None:
            return self.number("rope_theta", default=10000.0)
        if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
            raise self._wrong("rope_parameters", "plain RoPE", parameters)
        if "rope_theta" not in parameters:
            return self.number("rope_theta", default=10000.0)
        value = parameters["rope_theta"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise self._wrong("rope_parameters.rope_theta", "a positive number", value)
        return float(value)

    def require(self, name: str, expected: object, **default: object) -> None:
        """Refuses a model whose ``name`` is anything but what the graphs express."""
        value = self._values.get(name)
        if value is None:
            value = default["default"] if default else self._value(name, None)
        if value != expected:
            raise self._wrong(name, repr(expected), value)

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        value = default if value is None else value
        if value is None:
            raise ModelConfigError(f"{self._path} lacks '{name}'.", remedy="Use the config.json of the release.")
        return value

    def _wrong(self, name: str, expected: str, value: object) -> ModelConfigError:
        return ModelConfigError(
            f"'{name}' in {self._path} is {str(value)[:60]!r}; the exported graph needs {expected}.",
            seen=str(value)[:60],
        )
