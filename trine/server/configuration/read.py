"""config.pbtxt (protobuf's text format) and JSON to a ModelConfig, with errors that name file, line and remedy."""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format

from trine.core.errors import ConfigurationError
from trine.server.proto import pb, pool

ModelConfig = Any

_NO_FIELD = re.compile(
    r'Message type "(?P<message>[\w.]+)" (?:has no|should not have) field(?:s)? named "(?P<field>\w+)"'
)
_NO_ENUM = re.compile(r'Enum type "(?P<enum>[\w.]+)" has no value named (?P<value>\w+)')
_JSON_FIELD = re.compile(r'Message type "(?P<message>[\w.]+)" has no field named "(?P<field>\w+)"')
# A comma or semicolon that follows another separator, or closes a list: people write them, protobuf refuses them.
_STRAY = re.compile(r"([,;])(\s*)(?=[,;\]])")


def read_config(directory: Path, config_name: str = "") -> ModelConfig:
    """The configuration in a model's directory; an empty message where there is none.

    `config_name` chooses configs/<config_name>.pbtxt where it exists.
    """
    custom = directory / "configs" / f"{config_name}.pbtxt"
    path = custom if config_name and custom.is_file() else directory / "config.pbtxt"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return pb.ModelConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: can't be read: {error}") from error
    return config_from_text(text, str(path))


def config_from_text(text: str, source: str = "config.pbtxt") -> ModelConfig:
    """Parse protobuf's text format. ConfigurationError: "source:line:column: what is wrong, did you mean …"."""
    config = pb.ModelConfig()
    try:
        text_format.Parse(_without_stray_separators(text), config, descriptor_pool=pool)
    except text_format.ParseError as error:
        raise ConfigurationError(_explain(error, source)) from error
    return config


def config_from_json(text: str | dict[str, Any], source: str = "config") -> ModelConfig:
    """Parse protobuf's JSON form, as in the load request's `config` parameter."""
    config = pb.ModelConfig()
    try:
        document = json.loads(text) if isinstance(text, str) else text
        if not isinstance(document, dict):
            raise ConfigurationError(f"{source}: not the JSON form of a model configuration: it must be an object")
        json_format.ParseDict(document, config, descriptor_pool=pool)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{source}: not JSON: {error}") from error
    except json_format.ParseError as error:
        message = str(error).splitlines()[0]
        raise ConfigurationError(f"{source}: {message}{_suggestion(message)}") from error
    except (RecursionError, UnicodeError) as error:
        raise ConfigurationError(f"{source}: not the JSON form of a model configuration: {error}") from error
    return config


def _without_stray_separators(text: str) -> str:
    """`text` with doubled and trailing separators blanked, strings and comments left alone; positions stay."""
    parts = re.split(r"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|\#[^\n]*)""", text)
    for index in range(0, len(parts), 2):
        parts[index] = _STRAY.sub(r" \2", parts[index])
    return "".join(parts)


def _explain(error: text_format.ParseError, source: str) -> str:
    line, column = error.GetLine(), error.GetColumn()
    place = source if line is None else f"{source}:{line}:{column}"
    message = re.sub(r"^\d+:\d+ : ", "", str(error))
    return f"{place}: {message}{_suggestion(message)}"


def _suggestion(message: str) -> str:
    for pattern in (_NO_FIELD, _JSON_FIELD):
        if found := pattern.search(message):
            fields = pool.FindMessageTypeByName(found["message"]).fields_by_name
            return _did_you_mean(found["field"], list(fields))
    if found := _NO_ENUM.search(message):
        values = pool.FindEnumTypeByName(found["enum"]).values_by_name
        return _did_you_mean(found["value"], list(values))
    return ""


def _did_you_mean(given: str, names: list[str]) -> str:
    close = get_close_matches(given, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(names))}."
