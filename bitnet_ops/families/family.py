"""What the page of a family says, and how its settings are read and written.

Settings are the fields of config.json, in the form of transformers 4 (``rope_theta``, ``rope_scaling``) or of
transformers 5 (``rope_parameters``). They are written in the older form, which both read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..decoder.config import DecoderConfig, RopeScaling

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
"""Fields without which a model has no shape. transformers would fall back to the sizes of the family's first
model, and the first tensor would then not fit: naming the field helps more."""

SAME_NAMES = (*SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id",
              "pad_token_id", "initializer_range")  # fmt: skip
"""Fields that every family and `DecoderConfig` have under the same name."""


class SettingError(ValueError):
    """A field of config.json is missing, wrong, or asks for something that is not supported.

    Attributes:
        field: its name, with dots into objects.
        expected: what a good file has there.
        given: what this one has.
    """

    def __init__(self, field: str, expected: str, given: str) -> None:
        super().__init__(f"{field}: expected {expected}, got {given}")
        self.field, self.expected, self.given = field, expected, given


RopeReader = Callable[[str, dict[str, Any], dict[str, Any]], RopeScaling]


@dataclass(frozen=True)
class Family:
    """The page of a family.

    Attributes:
        model_type: its name in config.json.
        architecture: of the class in transformers.
        config: class of its configurations.
        activations: by their names in the field ``activation_field``; the first where it is absent.
        defaults: of absent fields, where that of transformers is not that of ``config``.
        same: fields that ``config`` has under the same name.
        only: (field, value where it is absent, values that are supported) of fields that have to be so.
        optional: fields of `SIZES` that may be absent.
        rope_kinds: kinds of `RopeScaling` that it knows.
        rope_readers: how other kinds are read, by their names: a function of the name of the field, its
            content, and that of config.json; may raise `SettingError` or ValueError.
        projection_norms: whether "use_rms_norm" of "quantization_config" is known.
        all_ternary: whether float weights are masters though no "quantization_config" says it.
        published: (our ending of a module's name, that of the checkpoint), for those that differ.
        norm_offset: what a norm adds to its stored weight; Gemma stores w of (1 + w). Norms in projections
            are not the family's own and add nothing.
        activation_field: the name of the activation's field.
        normalize: makes of the content of config.json what the tables above understand; may raise
            `SettingError`.
        recognises: whether the content of config.json is of this family; None for
            ``model_type``, or ``architecture`` where that is absent.
        read: fields of ``config`` that no table above can say, from the content of config.json; may raise
            `SettingError`. They win over those of the tables.
        write_more: the fields of config.json that ``read`` needs.
    """

    model_type: str
    architecture: str
    config: type[DecoderConfig]
    activations: dict[str, str]
    defaults: dict[str, Any] = field(default_factory=dict)
    same: tuple[str, ...] = SAME_NAMES
    only: tuple[tuple[str, Any, tuple[Any, ...]], ...] = ()
    optional: tuple[str, ...] = ()
    rope_kinds: tuple[str, ...] = ()
    rope_readers: dict[str, RopeReader] = field(default_factory=dict)
    projection_norms: bool = False
    all_ternary: bool = False
    published: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    activation_field: str = "hidden_act"
    normalize: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data
    recognises: Callable[[dict[str, Any]], bool] | None = None
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: {}
    write_more: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}

    def is_named_in(self, data: dict[str, Any]) -> bool:
        """Whether the content of config.json is of this family."""
        if self.recognises is not None:
            return self.recognises(data)
        if "model_type" in data:
            return bool(data["model_type"] == self.model_type)
        architectures = data.get("architectures")
        return isinstance(architectures, list) and self.architecture in architectures

    def stored_name(self, module: str) -> str:
        """The name that a module of ours has in a published checkpoint."""
        for ours, theirs in self.published:
            if module.endswith(ours):
                return module.removesuffix(ours) + theirs
        return module

    def settings(self, data: dict[str, Any]) -> dict[str, Any]:
        """Fields of ``config`` from the content of config.json; ``config`` checks their values.

        Raises:
            SettingError: a field is missing, or asks for something that is not supported.
        """
        data = self.normalize(data)
        for name, default, supported in self.only:
            value = data.get(name, default)
            # `in` would take 0 for False.
            if not any(value == one and type(value) is type(one) for one in supported):
                raise SettingError(name, " or ".join(map(repr, supported)), f"{value!r:.200}")
        act = data.get(self.activation_field, next(iter(self.activations)))
        if not isinstance(act, str) or act not in self.activations:
            raise SettingError(
                self.activation_field, " or ".join(map(repr, self.activations)), f"{act!r:.200}"
            )
        for name in SIZES:
            if name not in data and name not in self.optional:
                raise SettingError(name, "this field", "nothing")
        absent = {name for name in _NULL_IS_ABSENT if data.get(name) is None}
        fields = self.defaults | {
            name: data[name] for name in self.same if name in data and name not in absent
        }
        if fields.get("num_key_value_heads") is None:  # as transformers reads it: as many as query heads
            fields["num_key_value_heads"] = data["num_attention_heads"]
        return fields | {"activation": self.activations[act]} | self._rope(data) | self.read(data)

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The fields of config.json; what the family has no field for is left out."""
        names = {ours: theirs for theirs, ours in self.activations.items()}
        data = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            self.activation_field: names.get(config.activation, next(iter(self.activations))),
            **{name: default for name, default, _ in self.only if default is not None},
            **{name: getattr(config, name) for name in self.same},
        }
        data |= self.write_more(config)
        scaling = config.rope_scaling
        if scaling is not None and scaling.kind in self.rope_kinds:
            kind, usual = scaling.kind, RopeScaling(scaling.kind, scaling.factor)
            kept = [
                name for name in _OPTIONAL.get(kind, ()) if getattr(scaling, name) != getattr(usual, name)
            ]
            written = {name: getattr(scaling, name) for name in (*_FACTORS[kind], *kept)}
            data["rope_scaling"] = {"rope_type": kind, **written}
        return data

    def _rope(self, data: dict[str, Any]) -> dict[str, Any]:
        """``rope_theta`` and ``rope_scaling`` from either style, which have to agree where both are there."""
        found: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            for field_, value in self._rope_object(data, name).items():
                if found.setdefault(field_, value) != value:
                    raise SettingError(name, "what rope_scaling says", f"{data[name]!r:.200}")
        theta = found.get("rope_theta")
        if theta is not None and data.get("rope_theta") not in (None, theta):
            raise SettingError(
                "rope_theta", f"rope_parameters.rope_theta = {theta!r:.200}", f"{data['rope_theta']!r:.200}"
            )
        return found

    def _rope_object(self, data: dict[str, Any], name: str) -> dict[str, Any]:
        given = data.get(name)
        if given is None or given == {}:
            return {}
        if not isinstance(given, dict):
            raise SettingError(name, "an object", f"{given!r:.200}")
        key = "rope_type" if "rope_type" in given else "type"
        kind = given.get(key, "default")
        kinds = ("default", *self.rope_kinds, *self.rope_readers)
        if kind not in kinds:
            raise SettingError(f"{name}.{key}", " or ".join(map(repr, kinds)), f"{kind!r:.200}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise SettingError(
                f"{name}.partial_rotary_factor", "1.0", f"{given['partial_rotary_factor']!r:.200}"
            )
        found = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else {}
        if kind in self.rope_readers:
            try:
                return found | {"rope_scaling": self.rope_readers[kind](name, given, data)}
            except SettingError:
                raise
            except ValueError as error:
                raise SettingError(name, "factors of a scaling", f"{given!r:.200} ({error})") from None
        factors, optional = _FACTORS[kind], _OPTIONAL.get(kind, ())
        known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *factors, *optional}
        unknown = given.keys() - known
        if unknown:
            expected = " and ".join(("rope_theta", "rope_type", *factors, *optional))
            raise SettingError(name, expected, f"also {sorted(unknown)!r:.200}")
        if kind == "default":
            return found | {"rope_scaling": None} if key in given else found
        values = {factor: given[factor] for factor in factors if factor in given}
        if "original_max_position_embeddings" in factors:  # the order of transformers
            outside = data.get("original_max_position_embeddings")
            within = values.get("original_max_position_embeddings", data["max_position_embeddings"])
            values["original_max_position_embeddings"] = within if outside is None else outside
        for factor in factors:
            if factor not in values:
                raise SettingError(f"{name}.{factor}", "a number", "nothing")
        values |= {name: given[name] for name in optional if given.get(name) is not None}
        try:
            return found | {"rope_scaling": RopeScaling(kind, **values)}
        except ValueError as error:
            raise SettingError(name, "factors of a scaling", f"{given!r:.200} ({error})") from None


_NULL_IS_ABSENT = ("num_key_value_heads", "attention_bias", "mlp_bias")

_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""What belongs to a kind of scaling, named as in `RopeScaling`."""

_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
"""What may be absent or null, and then means what it means to `RopeScaling`."""
