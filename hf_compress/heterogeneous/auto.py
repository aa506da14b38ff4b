"""Transformers' Auto classes know the families of `modeling_hfc_*.py`, once they are imported.

`import hf_compress` calls `register`, which must cost nothing: neither transformers nor torch is
imported for it. It waits for the module that holds `AutoConfig`, and the classes of a family are
imported when its `model_type` is first looked up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hf_compress.model.layers import PREFIX

STEMS = {
    "gemma3_text": "Gemma3Text",
    "llama": "Llama",
    "mistral": "Mistral",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
"""How the classes of a family are named, by the `model_type` of its dense models."""
AUTO_CLASSES = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
CONFIGURATIONS = "transformers.models.auto.configuration_auto"


def auto_map(kind: str) -> dict[str, str]:
    """What config.json says of where the classes of a family are."""
    return {
        auto: f"modeling_{PREFIX}{kind}.HFC{STEMS[kind]}{end}" for auto, end in AUTO_CLASSES.items()
    }


def classes(kind: str) -> dict[str, Any]:
    """The classes of a family, by the Auto class that is to find them."""
    module = import_module(f"hf_compress.heterogeneous.modeling_{PREFIX}{kind}")
    return {auto: getattr(module, f"HFC{STEMS[kind]}{end}") for auto, end in AUTO_CLASSES.items()}


def register() -> None:
    """Make the Auto classes of transformers know the families, now or when they are imported."""
    if CONFIGURATIONS in sys.modules:
        _extend(sys.modules[CONFIGURATIONS])
    else:
        sys.meta_path.insert(0, _WhenImported())


class _Configurations(dict[str, Any]):
    """Configuration classes by `model_type`, as registered by others, and ours on demand."""

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or model_type in _MODEL_TYPES

    def __missing__(self, model_type: str) -> Any:
        if model_type not in _MODEL_TYPES:
            raise KeyError(model_type)
        import transformers

        found = classes(model_type.removeprefix(PREFIX))
        config_class = found.pop("AutoConfig")
        for name, model_class in found.items():
            getattr(transformers, name).register(config_class, model_class, exist_ok=True)
        self[model_type] = config_class
        return config_class


_MODEL_TYPES = frozenset(PREFIX + kind for kind in STEMS)


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _Configurations(mapping._extra_content)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself; extends the module with `AutoConfig` as soon as it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec
