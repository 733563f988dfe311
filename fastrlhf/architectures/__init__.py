"""The numbers of common models, so that a plan needs neither their weights nor a network.

Each `NAME.json` is what the hub's config.json says of a model's shape, and is read as one. A name
matches with or without its organisation and with or without the words of its tuning: all of
`Qwen/Qwen2.5-0.5B-Instruct`, `Qwen2.5-0.5B` and `qwen2.5-0.5b` are one shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["architecture", "shipped"]

FOLDER = Path(__file__).parent
# What makers add to a model's name without changing its shape.
TUNINGS = ("-instruct", "-it", "-base", "-pt", "-chat", "-unsloth", "-bnb-4bit", "-2507")


def shipped() -> list[str]:
    """The names of the models whose shapes ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def bare(name: str) -> str:
    """``Qwen/Qwen2.5-0.5B-Instruct`` -> ``qwen2.5-0.5b``."""
    name = name.rpartition("/")[2].lower().removeprefix("meta-")
    while ending := next((word for word in TUNINGS if name.endswith(word)), None):
        name = name.removesuffix(ending)
    return name


def architecture(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model, read from a folder or a config.json, or as shipped.

    A hub name that is neither shipped nor a path is looked up where transformers keeps what it
    fetched before; nothing is fetched.

    Raises:
        UserError: an unknown name, or a file that describes no model.
    """
    from transformers import AutoConfig

    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    named = {bare(stem): FOLDER / f"{stem}.json" for stem in shipped()}
    if not path.is_file():
        path = named.get(bare(name_or_path), path)
    if path.is_file():
        try:
            settings = json.loads(path.read_text())
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} is not a model's config.json ({reason})") from error
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the shape of {name_or_path!r} is not known here; give the path of its config.json, "
            f"or a model whose shape ships: {nearest(name_or_path, shipped())}"
        ) from error
