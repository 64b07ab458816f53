"""Model configurations: read, checked, completed."""

from __future__ import annotations

from trine.server.configuration.check import check_config
from trine.server.configuration.complete import complete_config
from trine.server.configuration.read import config_from_json, config_from_text, read_config
from trine.server.configuration.types import datatype_name, datatype_number

__all__ = [
    "check_config",
    "complete_config",
    "config_from_json",
    "config_from_text",
    "datatype_name",
    "datatype_number",
    "read_config",
]
