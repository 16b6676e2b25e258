"""The registry, with classes of this file and with packages that tests install on the import path."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segrpc.service.errors import ModelLoadError
from segrpc.service.models.base import InferenceModel, SegmentationModel
from segrpc.service.models.grabcut import GrabCut
from segrpc.service.models.registry import create_model, model_names, register_model
from segrpc.service.models.sam2.catalog import VARIANTS
from segrpc.service.schemas import (
    CompressedRLE,
    ModelDeploymentConfig,
    NDArrayFloat,
    SegmentationInput,
    SegmentationOutput,
)


@register_model("registry-test-everything", "registry-test-all")
class Everything(SegmentationModel):
    """Answers with a mask of one pixel."""

    def load_model(self) -> None:
        pass

    def predict(self, input: SegmentationInput) -> SegmentationOutput:  # noqa: A002
        row = [CompressedRLE.from_mask(np.ones((1, 1)))]
        return SegmentationOutput(masks=[row], scores=NDArrayFloat.from_numpy(np.ones((1, 1))))


@register_model("registry-test-doubling")
class Doubling(InferenceModel):
    """Segments nothing."""

    def load_model(self) -> None:
        pass

    def predict(self, input: Any) -> Any:  # noqa: A002
        return 2 * input


CLASS = """
from segrpc.service.models.base import SegmentationModel
from segrpc.service.models.registry import register_model

{decorator}
class Found(SegmentationModel):
    def load_model(self): pass
    def predict(self, input): pass
"""


def install(folder: Path, module: str, code: str, entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module and the metadata of its package where Python looks for them."""
    (folder / f"{module}.py").write_text(code)
    metadata = folder / f"{module}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[segrpc.models]\n{entries}\n")
    monkeypatch.syspath_prepend(folder)


def create(name: str, model: str = "") -> SegmentationModel:
    return create_model(ModelDeploymentConfig(name=name, model=model))


def test_a_registered_class_is_made_under_each_of_its_names() -> None:
    for name in ("registry-test-everything", "registry-test-all"):
        made = create(name)
        assert type(made) is Everything
        assert made.config.name == name
    assert type(create("mine", model="registry-test-all")) is Everything
    assert create("registry-test-all") is not create("registry-test-all")


def test_the_decorator_gives_the_class_back_and_may_be_repeated() -> None:
    assert register_model("registry-test-all")(Everything) is Everything
    assert type(create("registry-test-all")) is Everything


def test_a_name_belongs_to_one_class() -> None:
    class Other(Everything):
        pass

    with pytest.raises(ValueError, match="'registry-test-all' is taken by Everything"):
        register_model("registry-test-all")(Other)
    assert type(create("registry-test-all")) is Everything


def test_a_model_of_this_package_is_found_by_its_entry_point() -> None:
    made = create_model(ModelDeploymentConfig(name="cut", model="grabcut", model_params={"iterations": 2}))
    assert type(made) is GrabCut


def test_all_names_are_listed_in_order() -> None:
    names = model_names()
    assert names == sorted(set(names))
    assert {"grabcut", "sam2", *VARIANTS, "registry-test-all", "registry-test-doubling"} <= set(names)


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ModelLoadError) as caught:
        create("mine", model="grab-cut")
    assert caught.value.message == f"there is no model 'grab-cut'; known are: {', '.join(model_names())}"


def test_a_model_that_segments_nothing_is_not_served() -> None:
    with pytest.raises(ModelLoadError, match="'registry-test-doubling' is a Doubling, which is no SegmentationModel"):
        create("registry-test-doubling")


def test_an_entry_point_may_name_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "registry-test-found = registry_test_class:Found"
    install(tmp_path, "registry_test_class", CLASS.format(decorator=""), entries, monkeypatch)
    assert "registry-test-found" in model_names()
    assert type(create("registry-test-found")).__module__ == "registry_test_class"


def test_an_entry_point_may_name_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = CLASS.format(decorator="@register_model('registry-test-module')")
    install(tmp_path, "registry_test_module", code, "registry-test-module = registry_test_module", monkeypatch)
    assert type(create("registry-test-module")).__module__ == "registry_test_module"


@pytest.mark.parametrize(
    ("module", "code", "target", "said"),
    [
        (
            "registry_test_import",
            "import not_installed_at_all",
            ":Found",
            "'not_installed_at_all'; install what it needs",
        ),
        ("registry_test_name", "", ":Missing", "cannot be imported: .*Missing"),
        ("registry_test_value", "Found = 3", ":Found", "gives 3, which is no model class"),
        ("registry_test_alien", "class Found: pass", ":Found", "which is no model class"),
        ("registry_test_silent", "", "", "which is no model class"),
    ],
)
def test_an_entry_point_that_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, target: str, said: str
) -> None:
    install(tmp_path, module, code, f"{module} = {module}{target}", monkeypatch)
    with pytest.raises(ModelLoadError, match=said) as caught:
        create("mine", model=module)
    assert repr(module) in caught.value.message
