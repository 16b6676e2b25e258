"""Finding a model class by its registered name."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.base import InferenceModel, SegmentationModel
from segrpc.service.schemas import ModelDeploymentConfig

ENTRY_POINT_GROUP = "segrpc.models"

M = TypeVar("M", bound=type[InferenceModel])

# The one registry of the process, filled by import: what a decorator is for.
_registered: dict[str, type[InferenceModel]] = {}


def register_model(*names: str) -> Callable[[M], M]:
    """Register a model class under one or more names.

    A class in a package of its own is found if the package declares an entry point of the group ``segrpc.models`` with
    the model's name, which points to the class or to the module that defines it.

    Raises:
        ValueError: If a name is taken by another class.
    """

    def register(model_class: M) -> M:
        for name in names:
            if _registered.setdefault(name, model_class) is not model_class:
                raise ValueError(f"the model name {name!r} is taken by {_registered[name].__qualname__}")
        return model_class

    return register


def model_names() -> list[str]:
    """List all names under which a model can be made, sorted."""
    return sorted(_registered.keys() | {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def create_model(config: ModelDeploymentConfig) -> SegmentationModel:
    """Make the model that a configuration names. It still has to be loaded.

    Raises:
        ModelLoadError: If there is no such model, or its package cannot be imported.
    """
    name = config.registered_name
    model_class = _registered.get(name) or _from_entry_point(name)
    if not issubclass(model_class, SegmentationModel):
        raise ModelLoadError(f"model {name!r} is a {model_class.__qualname__}, which is no SegmentationModel")
    return model_class(config)


def _from_entry_point(name: str) -> type[InferenceModel]:
    found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == name]
    if not found:
        raise ModelLoadError(f"there is no model {name!r}; known are: {', '.join(model_names())}")
    try:
        loaded = found[0].load()
    except Exception as error:  # whatever another package's module raises
        extra = ", or install segrpc[sam2]" if name.startswith("sam2") else ""
        cause = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"model {name!r} cannot be imported: {cause}; install what it needs{extra}") from error
    # Importing the module may have registered it; otherwise the entry point is the class itself.
    model_class = _registered.get(name, loaded)
    if not isinstance(model_class, type) or not issubclass(model_class, InferenceModel):
        raise ModelLoadError(f"the entry point of model {name!r} gives {loaded!r}, which is no model class")
    return model_class
