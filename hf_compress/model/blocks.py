"""Decoder blocks, one at a time: from a model in memory, or streamed from its shards.

Above this module nobody can tell the two apart, so a model larger than memory is the
normal case. Both give a *skeleton* (the language model with its blocks taken out:
embedding, final norm, head) and one block after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_compress.errors import ModelError
from hf_compress.formats import stored_layout
from hf_compress.model.conversion import Conversion
from hf_compress.model.families import Family, family_of
from hf_compress.model.memory import return_freed_memory
from hf_compress.model.shards import PackedReader, ShardReader, Shards

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is given beside the hidden states: masks, rotary tables and the like."""


class BlockSource(Protocol):
    """What calibration and pruning need of a model."""

    config: PretrainedConfig
    family: Family
    dtype: torch.dtype
    device: torch.device

    def skeleton(self) -> PreTrainedModel:
        """The language model on `device`, every block replaced by a `Passage`."""
        ...

    def block(self, index: int) -> Any:
        """Context manager that gives decoder block `index` on `device`, in eval mode."""
        ...


class Passage(nn.Module):
    """Stands where a decoder block was: hands on what it gets, and remembers it.

    With `replacement` set, hands on that instead, so that hidden states computed
    elsewhere can enter the final norm and the head through the model's own forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: torch.Tensor | None = None
        self.arguments: Arguments = ((), {})
        self.replacement: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.received, self.arguments = hidden_states, (args, kwargs)
        return hidden_states if self.replacement is None else self.replacement


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A language model without weights (meta device); buffers such as rotary tables are real."""
    # Imported here: accelerate takes a second, and `hf-compress --help` needs none of it.
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        auto_class = family_of(config).auto_class
        return auto_class.from_config(copy.deepcopy(config), dtype=dtype).eval()


def without_blocks(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """A copy in eval mode that shares every parameter of `model` except its blocks'."""
    blocks = model.get_submodule(family.layers)

    def twin(module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        if module is blocks:
            return nn.ModuleList(Passage() for _ in blocks.children())
        copied = _shallow(module)
        copied._modules = {name: twin(child) for name, child in module._modules.items()}
        copied.training = False
        return copied

    return twin(model)  # type: ignore[return-value]


def passages(skeleton: PreTrainedModel, family: Family) -> list[Passage]:
    return list(skeleton.get_submodule(family.layers))  # type: ignore[arg-type]


class Silent(nn.Module):
    """Stands where an attention or MLP module was, and adds nothing to the stream. What it
    would have read is of no account, so the norm before it is left out as well."""

    def __init__(self, gives_weights: bool) -> None:
        super().__init__()
        self._gives_weights = gives_weights

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self._gives_weights else zeros


def attention_half(block: nn.Module, family: Family) -> nn.Module:
    """A block that shares every module of `block` except its MLP, which is silent.

    What it gives is what `mlp_half` takes: one after the other they are the block.
    """
    half = _shallow(block)
    half._modules[family.mlp] = Silent(family.mlp_gives_weights)
    half._modules[family.mlp_norm] = nn.Identity()
    return half


class Replay(nn.Module):
    """Stands where an attention or MLP module was, and runs only its output layer, on inputs
    that were kept; the rest is most of a half's time, and need not be computed twice."""

    def __init__(self, output: nn.Module, gives_weights: bool) -> None:
        super().__init__()
        self.output = output
        self._gives_weights = gives_weights
        self.inputs: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        out = self.output(self.inputs)
        return (out, None) if self._gives_weights else out


def replayed_half(block: nn.Module, family: Family, of: str) -> tuple[nn.Module, Replay]:
    """The `attention` or `mlp` half of `block` from the inputs of its output layer on."""
    half, output = parts(block, family)[of]
    replay = Replay(block.get_submodule(output), of == "attention" or family.mlp_gives_weights)
    module, norm = {
        "attention": (family.attention, family.attention_norm),
        "mlp": (family.mlp, family.mlp_norm),
    }[of]
    half._modules[module] = replay
    half._modules[norm] = nn.Identity()
    return half, replay


class Tap(nn.Module):
    """Stands where an output layer was: keeps what the layer would have read, and gives
    what it makes of zeros, its bias: nobody asks what it would have made of its inputs."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output
        self.inputs: torch.Tensor | None = None

    def forward(self, inputs_BLI: torch.Tensor) -> torch.Tensor:
        self.inputs = inputs_BLI
        bias_O = self.output(inputs_BLI.new_zeros(inputs_BLI.shape[-1]))
        return bias_O.expand(*inputs_BLI.shape[:-1], -1)

    def take(self) -> torch.Tensor:
        """What came last; it is not held on to."""
        inputs, self.inputs = self.inputs, None
        assert inputs is not None
        return inputs


def tapped(half: nn.Module, output: str) -> tuple[nn.Module, Tap]:
    """`half` with its output layer replaced by a `Tap`; everything else is shared."""
    *parents, name = output.split(".")
    root, tap = _shallow(half), Tap(half.get_submodule(output))
    node = root
    for part in parents:
        child = _shallow(node.get_submodule(part))
        node._modules[part] = child
        node = child
    node._modules[name] = tap
    return root, tap


def mlp_half(block: nn.Module, family: Family) -> nn.Module:
    """A block that shares every module of `block` except its attention, which is silent;
    the whole block, where it is not walked by halves."""
    if not family.cuts_heads:
        return block
    half = _shallow(block)
    half._modules[family.attention] = Silent(gives_weights=True)
    half._modules[family.attention_norm] = nn.Identity()
    return half


def parts(block: nn.Module, family: Family) -> dict[str, tuple[nn.Module, str]]:
    """What windows go through one after the other on their way through a block, and the
    output layer in it whose units can go."""
    mlp = mlp_half(block, family), family.mlp_output
    if not family.cuts_heads:
        return {"mlp": mlp}
    return {"attention": (attention_half(block, family), family.attention_output), "mlp": mlp}


class ModelInMemory:
    """Blocks of a live `PreTrainedModel`, which is read and never changed."""

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None) -> None:
        self.model = model
        self.config: PretrainedConfig = model.config
        self.family = family_of(model.config)
        self.dtype = model.dtype
        self.device = device or model.device

    def skeleton(self) -> PreTrainedModel:
        skeleton = without_blocks(self.model, self.family)
        if self.model.device != self.device:
            skeleton = copy.deepcopy(skeleton).to(self.device)
        return skeleton

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        original = self.model.get_submodule(f"{self.family.layers}.{index}")
        was_training = original.training
        original.eval()
        try:
            if self.model.device == self.device:
                yield original
            else:
                yield copy.deepcopy(original).to(self.device)
        finally:
            original.train(was_training)
            return_freed_memory()


class StreamedCheckpoint:
    """Blocks of a checkpoint in a local folder; one block's weights in memory at a time."""

    def __init__(
        self, folder: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.family = family_of(config)
        self.dtype = dtype
        self.device = device
        self._shards: Shards = ShardReader(folder)
        layout = stored_layout(config)
        if layout:
            self._shards = PackedReader(self._shards, layout, self.family.transposed)
        self._model = meta_model(config, dtype)
        self._conversion = Conversion(self._model)
        self._sources = self._conversion.sources(self._shards.names)
        self._skeleton: PreTrainedModel | None = None

    def skeleton(self) -> PreTrainedModel:
        """The same one at every call: embeddings can be most of what is in memory."""
        if self._skeleton is None:
            self._skeleton = self._read_skeleton()
        return self._skeleton

    def _read_skeleton(self) -> PreTrainedModel:
        skeleton = copy.deepcopy(without_blocks(self._model, self.family))
        present = self._read(name for name in skeleton.state_dict() if name in self._sources)
        skeleton.load_state_dict(present, strict=False, assign=True)
        skeleton.tie_weights()
        absent = [name for name, value in skeleton.state_dict().items() if value.is_meta]
        if absent:
            raise ModelError(self._shards.lacks(absent))
        return skeleton.to(self.device)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        prefix = f"{self.family.layers}.{index}."
        block = copy.deepcopy(self._model.get_submodule(prefix.rstrip(".")))
        wanted = list(block.state_dict())
        absent = [prefix + name for name in wanted if prefix + name not in self._sources]
        if absent:
            raise ModelError(self._shards.lacks(absent))
        try:
            tensors = self._read(prefix + name for name in wanted)
            state = {name: tensors[prefix + name] for name in wanted}
            block.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise ModelError(
                f"the weights of block {index} do not fit config.json: {error}"
            ) from error
        yield block.to(self.device).eval()
        return_freed_memory()

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors of the model by name; one may be made of several on disk."""
        tensors = {}
        for name in names:
            source = self._sources[name]
            stored = self._shards.read(source.names, self.dtype)
            tensors[name] = self._conversion.to_memory(source, stored)
        return tensors


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
