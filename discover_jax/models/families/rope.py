"""Rotary embedding in config.json, with the defaults of transformers (modeling_rope_utils.py, 5.23)."""

import math
from typing import Any

from discover_jax.exceptions import WeightsError
from discover_jax.models.families.fields import Fields

_TYPE, _LENGTH = "rope_type", "original_max_position_embeddings"


def rope_fields(fields: Fields, default_theta: float) -> Fields | None:
    """The fields of rotary embedding, always with rope_type and rope_theta; None if the file has none but perhaps rope_theta.

    transformers 5 writes rope_parameters, earlier versions write rope_scaling and rope_theta. If both are there, rope_scaling counts.

    Raises:
      WeightsError: a field has a wrong type, layers differ, or only a part of each head is rotated.
    """
    fields.only("partial_rotary_factor", None, 1, 1.0, family="this model")
    given = {name: fields.content.get(name) for name in ("rope_scaling", "rope_parameters")}
    for name, value in given.items():
        if value is not None and not isinstance(value, dict):
            raise fields.error(name, "an object or null")
    name = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    if (rope := given[name]) is None:
        return None
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise WeightsError(f"config.json has {name} for {', '.join(nested[:5])}; only equal positions in all layers are supported.")
    rope = dict(rope)
    rope.setdefault(_TYPE, rope.pop("type", "default"))  # old files write `type`
    rope.setdefault("rope_theta", fields.number("rope_theta", default_theta, above=1))
    found = Fields(rope, f"{name}.")
    found.text(_TYPE)
    found.only("partial_rotary_factor", None, 1, 1.0, family="this model")
    return found


def theta_of(fields: Fields, rope: Fields | None, default: float) -> float:
    """The base of the frequencies."""
    return float((rope or fields).number("rope_theta", default, above=1))


def original_length(fields: Fields, rope: Fields, default: int | None = None) -> int:
    """The context before it was extended. The default is max_position_embeddings, or `default` if the file has neither.

    Raises:
      WeightsError: it is missing, is not a size, or the file has two.
    """
    length = rope.integer(_LENGTH) if _LENGTH in rope.content else fields.integer("max_position_embeddings", default)
    if fields.has(_LENGTH) and fields.integer(_LENGTH) != length:
        raise WeightsError(
            f"config.json has {_LENGTH} twice: {fields.integer(_LENGTH)} at the top, {length} beside rope_type. Keep the published one."
        )
    return length


def yarn_values(fields: Fields, rope: Fields, default_length: int) -> dict[str, Any]:
    """The fields of `ModelConfig` for rope_type "yarn".

    Raises:
      WeightsError: a field is missing or has a wrong type, or cosines and sines have another factor than YaRN's.
    """
    length = original_length(fields, rope, default_length)
    if "factor" in rope.content and not rope.has("factor"):  # then transformers derives it
        factor = fields.integer("max_position_embeddings", default_length) / length
    else:
        factor = rope.number("factor")
    # Zero and null are the defaults, as in transformers.
    fast, slow = (rope.number(name) if rope.content.get(name) else default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if fast < slow:
        raise WeightsError(f"config.json has beta_fast = {fast:g} below beta_slow = {slow:g}. Use the file that was published.")
    _check_temperature(rope, factor)
    return {
        "rope_factor": factor,
        "rope_original_length": length,
        "rope_beta_fast": fast,
        "rope_beta_slow": slow,
        "rope_truncate": rope.flag("truncate", True),
    }


def _check_temperature(rope: Fields, factor: float) -> None:
    """Raises WeightsError unless attention_factor, mscale and mscale_all_dim give the factor that `yarn_frequencies` uses."""
    expected = _temperature(factor, 1.0)
    found, named = expected, ""
    if rope.has("attention_factor"):
        found, named = rope.number("attention_factor"), "attention_factor"
    elif rope.content.get("mscale") and rope.content.get("mscale_all_dim"):
        scales = rope.number("mscale"), rope.number("mscale_all_dim")
        found, named = _temperature(factor, scales[0]) / _temperature(factor, scales[1]), "mscale and mscale_all_dim"
    if not math.isclose(found, expected, rel_tol=1e-6):
        raise WeightsError(
            f"config.json has {named}, which scale attention by {found:.6g}; only YaRN's own factor is supported:"
            f" 0.1 ln(factor) + 1 = {expected:.6g}."
        )


def _temperature(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
