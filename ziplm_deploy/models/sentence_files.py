"""JSON files of a sentence-transformers model: read from a folder or hub id, and checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ziplm_deploy.documents import read_json, shortened, shown
from ziplm_deploy.errors import CorruptArtifactError, UnsupportedModelError
from ziplm_deploy.models.location import CONFIG_FILE, find_file

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
SETTINGS_FILE = "config_sentence_transformers.json"
# One name a family of models in old releases; all have the same fields.
LENGTH_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# How sentence-transformers loads a model in torch, in one of those files; the ONNX back end takes no such arguments.
TORCH_ARGUMENTS = ("model_args", "model_kwargs")
_HARMLESS_ARGUMENTS = {"attn_implementation", "torch_dtype", "dtype", "trust_remote_code", "device_map"}


class Fields(BaseModel):
    """Fields of a JSON file; those that are not read here may be anything."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


_Read = TypeVar("_Read", bound=Fields)


@dataclass(frozen=True)
class SentenceFiles:
    """JSON files of a folder or hub id."""

    path: str
    revision: str | None = None

    def read(self, name: str, *, must_know: bool = False) -> Any:
        """Content of a file; None if there is none. ``must_know``: see :func:`find_file`.

        Raises:
            CorruptArtifactError: it is no JSON, or null.  UnsupportedModelError: see :func:`find_file`.
        """
        file = find_file(self.path, name, self.revision, must_know=must_know)
        if file is None:
            return None
        try:
            found = read_json(file)
        except (OSError, ValueError) as error:
            raise damaged(f"{self.path}/{name}", error) from error
        if found is None:
            raise damaged(f"{self.path}/{name}", "null")
        return found

    def mapping(self, *names: str) -> tuple[str, dict[str, Any]]:
        """The first of these files that there is, and its fields; the first name and no fields if there is none.

        Raises:
            CorruptArtifactError, UnsupportedModelError: as :meth:`read`, and a file holds something else.
        """
        for name in names:
            found = self.read(name)
            if isinstance(found, dict):
                return name, found
            if found is not None:
                raise damaged(f"{self.path}/{name}", f"a {type(found).__name__} where fields should be")
        return names[0], {}

    def config(self) -> dict[str, Any]:
        """Configuration of a model; nothing where it is damaged, which is refused when the model is loaded."""
        try:
            return self.mapping(CONFIG_FILE)[1]
        except CorruptArtifactError:
            return {}


def length_files(transformer: str) -> list[str]:
    """Files with the settings of texts, beside a transformers model in this sub-folder."""
    return [f"{transformer}/{name}" if transformer else name for name in LENGTH_FILES]


def check_neutral(fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    """Refuse settings that change answers in a way that is not known here."""
    for name in TORCH_ARGUMENTS:
        arguments = fields.get(name)
        unknown = set(arguments) - _HARMLESS_ARGUMENTS if isinstance(arguments, dict) else set()
        if unknown:
            raise UnsupportedModelError(
                f"expected {where} without {name} that change the model, found {shown(min(unknown))}, which is not "
                "supported; choose another model"
            )
    for name, values in neutral.items():
        if fields.get(name) is not None and fields[name] not in values:
            found = shortened(json.dumps(fields[name]))
            raise UnsupportedModelError(
                f"expected {where} without {name}: {found}, which is not supported; choose another model"
            )


def checked(kind: type[_Read], fields: Any, where: str) -> _Read:
    """Fields as an object of this kind; raises :class:`CorruptArtifactError` for values of other types."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise damaged(where, error) from error


def damaged(where: str, found: object) -> CorruptArtifactError:
    """The error for a file that does not hold what it should."""
    return CorruptArtifactError(
        f"expected settings of sentence-transformers in {where}, found {shortened(str(found))}; get it anew"
    )
