"""Names of modules, which are keys of files."""

from __future__ import annotations

import pytest

from ziplm_deploy.models.shape import MODULE_KINDS, ModuleId


@pytest.mark.parametrize("kind", MODULE_KINDS)
@pytest.mark.parametrize("layer", [0, 11])
def test_a_module_id_is_read_back_from_its_text(layer: int, kind: str) -> None:
    name = f"{layer}.{kind}"
    assert str(ModuleId.parse(name)) == f"{ModuleId.parse(name)}" == name
    assert ModuleId.parse(name) == (layer, kind)


@pytest.mark.parametrize("name", ["", "0", "attention", "0.1.ffn", "x.ffn", "0.mlp"])
def test_other_text_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a module such as"):
        ModuleId.parse(name)
