"""Config files of diffusers: read strictly, old keys mapped, every value checked when it is read.

diffusers ignores keys that it does not know. A config of an old version therefore loads today with
another meaning than it was written with, so unknown keys are refused here.
"""

from __future__ import annotations

import codecs
import difflib
import inspect
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.errors.messages import shown

from ...errors import ExportError
from .rules import (
    CONDITIONAL_RULES,
    HARMLESS_FOR_NETWORKS,
    HARMLESS_FOR_SCHEDULERS,
    NETWORK_RULES,
    NEUTRAL,
    PLAIN_SETTINGS,
    RENAMED,
    SCHEDULER_RULES,
    Rule,
)

BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Config:
    """A config file with the defaults of its class filled in.

    Attributes:
        path: The file, for messages.
        kind: The class.
        values: Every setting.
        defaults: The defaults of the class.
        rules: What the settings must be. `get` checks a setting when it is read.
        mapped: The changes from an old format, in words.
    """

    path: Path
    kind: str
    values: Mapping[str, object]
    defaults: Mapping[str, object]
    rules: Mapping[str, Rule]
    mapped: tuple[str, ...] = ()

    def get(self, key: str) -> Any:
        """Return a setting. Raises ExportError unless it follows its rule."""
        value = self.values[key]
        rule = self.rules[key]
        if rule.fits(value):
            return value
        raise ExportError(
            f"{self.path}: {key} must be {rule.words}, got {in_json(value)}. "
            + self._remedy(key, value, rule)
        )

    def _remedy(self, key: str, value: object, rule: Rule) -> str:
        if isinstance(value, str):
            try:
                meant = json.loads(value)
            except (ValueError, RecursionError):
                near = difflib.get_close_matches(value, rule.words.replace(",", "").split(), n=1)
                return f"Did you mean {near[0]!r}?" if near else "Correct it in this file."
            if rule.fits(meant):
                return f"Write {in_json(meant)} without quotes."
        # A default that follows the rule is a value that works.
        default = self.defaults.get(key)
        if default is not None and rule.fits(default):
            return f"Correct it, or remove the key to get diffusers' default, {in_json(default)}."
        return "Correct it in this file."

    def refused(self, key: str, why: str) -> ExportError:
        """Return the error for a setting that is valid in diffusers but unsupported here."""
        return ExportError(f"{self.path}: {key}={self.values[key]!r} cannot be exported: {why}.")

    def public(self) -> dict[str, object]:
        """Return what a bundle says of the config.

        Private entries are left out: one of them is a path of the machine that wrote the file.
        """
        kept = ("_class_name", "_diffusers_version")
        entries = {k: v for k, v in self.values.items() if not k.startswith("_") or k in kept}
        return {key: _finite(value) for key, value in entries.items()}


def _finite(value: object) -> object:
    """Return a JSON value with NaN and infinities as strings: a bundle's JSON is strict."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def in_json(value: object) -> str:
    """Return a value as the file has it, shortened."""
    try:
        found = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        return shown(value)
    return found if len(found) <= 100 else found[:99] + "…"


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. NaN and infinities are allowed, because diffusers writes them.

    Raises ExportError if the file cannot be read, is not plain UTF-8 or not JSON, gives a key
    twice, or does not hold an object.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"{path} cannot be read ({reason}).") from error
    if data.startswith(BOMS):
        raise ExportError(
            f"{path} must be UTF-8 without a byte order mark, got one that starts with a mark. "
            "Save it again as plain UTF-8; diffusers cannot read it either."
        )

    # json keeps the last of two equal keys, so that a reader of the file may believe the other.
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise ExportError(f"{path} must give each key once, got {key!r} twice. Remove one.")
            found[key] = value
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} cannot be read as JSON ({error}). Save it again from diffusers."
        ) from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} must be a JSON object, got {in_json(value)}.")
    return value


def diffusers_module() -> ModuleType:
    """Import diffusers. Raises ExportError, with the command to install it, if it is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise ExportError(
            f"diffusers cannot be imported ({error}). Install it: pip install 'unnoise[diffusers]'."
        ) from error
    return diffusers


def defaults_of(kind: str) -> dict[str, object]:
    """Return the settings of a diffusers class that have a default, {} for an unknown class."""
    found = getattr(diffusers_module(), kind, None)
    if not inspect.isclass(found):
        return {}
    parameters = inspect.signature(found.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def class_name(path: Path, found: Mapping[str, object], indexed: str | None) -> object:
    """Return the class that a config names, else the one that model_index.json names for it.

    Raises ExportError if neither names one, or if they name two.
    """
    if "_class_name" not in found and indexed is None:
        raise ExportError(
            f"{path}: _class_name must name the class of diffusers, and it is missing. "
            "Save the folder again with save_pretrained, or write the class into the file."
        )
    name = found.get("_class_name", indexed)
    if indexed is not None and name != indexed:
        raise ExportError(
            f"{path}: _class_name must be {indexed!r}, as in model_index.json, got "
            f"{in_json(name)}. "
            "diffusers follows model_index.json: write the same class into both files."
        )
    return name


def make_config(
    path: Path,
    found: Mapping[str, object],
    kind: str,
    rules: Mapping[str, Rule],
    also: Collection[str],
    mapped: tuple[str, ...] = (),
) -> Config:
    """Fill in the defaults of class `kind`.

    Args:
        path: The file, for messages.
        found: What the file says.
        kind: The class.
        rules: What the settings must be.
        also: Keys that are allowed though the class does not read them.
        mapped: The changes so far, in words.

    Raises:
        ExportError: A key is unknown. Keys that start with an underscore are diffusers' notes
            about the file, not settings.
    """
    defaults = defaults_of(kind)
    # diffusers takes its default for a key that is listed here, and ignores the value in the file.
    skipped = found.get("_use_default_values", ())
    skipped = skipped if isinstance(skipped, list) else ()
    stated = {key: value for key, value in found.items() if key not in skipped}
    known = {*defaults, *also}
    for key, value in stated.items():
        if not key.startswith("_") and key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ExportError(
                f"{path}: every key must be one that {kind} reads, got the unknown key "
                f"{key!r}={in_json(value)}. {hint}Remove it if it does not change the result."
            )
    return Config(path, kind, {**defaults, **stated, "_class_name": kind}, defaults, rules, mapped)


def conditional_config(path: Path, found: Mapping[str, object]) -> Config:
    """Return a UNet2DConditionModel's config. Raises ExportError for conditions besides texts."""
    rules = CONDITIONAL_RULES
    config = make_config(path, found, "UNet2DConditionModel", rules, HARMLESS_FOR_NETWORKS)
    for key, plain in PLAIN_SETTINGS.items():
        if config.values[key] != plain:
            raise config.refused(key, f"only texts condition it: it must be {in_json(plain)}")
    for key in set(rules) - {"sample_size"}:
        config.get(key)
    return config


def network_config(path: Path, found: Mapping[str, object]) -> Config:
    """Return a UNet2DModel's config, every setting checked. Raises ExportError."""
    config = make_config(path, found, "UNet2DModel", NETWORK_RULES, HARMLESS_FOR_NETWORKS)
    # Now, because diffusers itself takes most wrong values and fails later without naming them.
    for key in NETWORK_RULES:
        if key not in ("sample_size", "num_class_embeds"):
            config.get(key)
    return config


def scheduler_config(path: Path, found: Mapping[str, object], kind: str) -> Config:
    """Return the config of a DDPMScheduler or a DDIMScheduler, in today's keys.

    Raises ExportError for an unknown key, and for old keys that contradict today's.
    """
    found, mapped = _todays(path, found)
    # Each class keeps the other's keys when it converts a config, and reads its own only.
    both = {*defaults_of("DDPMScheduler"), *defaults_of("DDIMScheduler")}
    also = {*both, *HARMLESS_FOR_SCHEDULERS, *NEUTRAL}
    config = make_config(path, found, kind, SCHEDULER_RULES, also, mapped)
    for key, (neutral, why) in NEUTRAL.items():
        value = config.values.get(key, neutral)
        if type(value) is not type(neutral) or value != neutral:
            raise config.refused(key, why)
    return config


def _todays(path: Path, found: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """Return a scheduler's config with old keys mapped to today's, and the changes."""
    values = dict(found)
    mapped = []

    def put(old: str, key: str, value: object) -> None:
        stated = found.get(key, value)
        if type(stated) is not type(value) or stated != value:
            raise ExportError(
                f"{path}: {old} and {key} must agree, got {old}={in_json(found[old])} and "
                f"{key}={in_json(stated)}. {old} is the older key: remove the wrong one."
            )
        values[key] = value
        mapped.append(f"{old}={in_json(found[old])} is {key}={in_json(value)}")

    for old, key in RENAMED.items():
        if old in values:
            put(old, key, values.pop(old))
    if "predict_epsilon" in values:
        # diffusers 0.4 to 0.12; later versions ignore it and take the network's x_0 for eps.
        flag = values.pop("predict_epsilon")
        if not isinstance(flag, bool):
            raise ExportError(
                f"{path}: predict_epsilon must be true or false, got {in_json(flag)}. "
                "Replace it by prediction_type, epsilon or sample."
            )
        put("predict_epsilon", "prediction_type", "epsilon" if flag else "sample")
    return values, tuple(mapped)
