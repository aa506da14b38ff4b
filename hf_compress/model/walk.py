"""Windows of token ids carried through a model, one decoder block at a time.

Legend: N windows, B windows in a batch, L tokens in a window, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import nn

from hf_compress.errors import ModelError
from hf_compress.model.blocks import (
    Arguments,
    BlockSource,
    passages,
    replayed_half,
)
from hf_compress.model.families import require_positions


class Walk:
    """The hidden states of N windows between two decoder blocks.

    The embedding, and later the norm and head, run through the model's own forward, so
    masks, rotary tables and soft-capping are whatever the model makes them.

    Attributes:
        hidden_NLD: hidden states after the last block passed, in the model's dtype, on
            the CPU (in a memory-mapped temporary file when they would fill the memory).
    """

    def __init__(self, source: BlockSource, ids_NL: torch.Tensor, batch_size: int = 8) -> None:
        require_positions(source.config, ids_NL.shape[1])
        self.source = source
        self._ids_NL = ids_NL
        self.skeleton = source.skeleton()
        self._passages = passages(self.skeleton, source.family)
        # At least two batches, where halves of the text are told apart.
        self._batch_size = batch_size = min(batch_size, -(-len(ids_NL) // 2))
        self._arguments: dict[int, list[Arguments]] = {}
        first_BLD = self._embed(ids_NL[:batch_size])
        self.hidden_NLD = _allocate((*ids_NL.shape, first_BLD.shape[-1]), first_BLD.dtype)
        for hidden_BLD, ids_BL in zip(self.batches(), ids_NL.split(batch_size), strict=True):
            hidden_BLD.copy_(self._embed(ids_BL))

    def batches(self) -> Iterator[torch.Tensor]:
        """Views [B, L, D] of the hidden states, to be read or overwritten."""
        return iter(self.hidden_NLD.split(self._batch_size))

    @torch.no_grad()
    def run(self, block: nn.Module, index: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Output [B, L, D] of a block, on its device, for one batch."""
        return self.forward(block, index, hidden_BLD.to(self.source.device))

    def forward(self, block: nn.Module, index: int, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """The same for hidden states on the device, of any batch size, with gradients where
        they are enabled."""
        args, kwargs = self._arguments_for(len(hidden_BLD))[index]
        return block(hidden_BLD, *args, **kwargs)

    def fork(self) -> Walk:
        """Another walk that stands where this one does."""
        twin = copy.copy(self)
        twin.hidden_NLD = _allocate(tuple(self.hidden_NLD.shape), self.hidden_NLD.dtype)
        twin.hidden_NLD.copy_(self.hidden_NLD)
        return twin

    def advance(self, block: nn.Module, index: int) -> None:
        """Carry all windows through `block`, which stands at `index` in the model."""
        for hidden_BLD in self.batches():
            hidden_BLD.copy_(self.run(block, index, hidden_BLD))

    def advance_replayed(
        self,
        block: nn.Module,
        index: int,
        inputs: list[torch.Tensor],
        columns: torch.Tensor | None = None,
        *,
        of: str = "attention",
    ) -> None:
        """Carry all windows through a half of `block`, from the inputs of its output layer on.

        Args:
            inputs: one tensor [B, L, I] a batch, as the layer had them.
            columns: of I, those that `block` has kept; None for all.
            of: `attention` or `mlp`.
        """
        half, replay = replayed_half(block, self.source.family, of)
        for hidden_BLD, inputs_BLI in zip(self.batches(), inputs, strict=True):
            kept = inputs_BLI if columns is None else inputs_BLI[..., columns.cpu()]
            replay.inputs = kept.to(self.source.device)
            hidden_BLD.copy_(self.run(half, index, hidden_BLD))

    @torch.no_grad()
    def logits(self, window: int, positions: slice = slice(None)) -> torch.Tensor:
        """Logits [L, V] of one window, or of some positions of it, by the model's own norm
        and head; no position looks at another there."""
        hidden_1LD = self.hidden_NLD[window : window + 1, positions].to(self.source.device)
        self._passages[-1].replacement = hidden_1LD
        try:
            # The ids only have to be as many: a hidden state is not always as wide as an
            # embedding, so it cannot be handed in as one.
            ids_1L = self._ids_NL[window : window + 1, positions].to(self.source.device)
            return self.skeleton(ids_1L, use_cache=False).logits[0]
        finally:
            self._passages[-1].replacement = None

    def _arguments_for(self, num: int) -> list[Arguments]:
        """What the model hands to each block for a batch of `num` windows."""
        if num not in self._arguments:
            self._embed(self._ids_NL[:1].expand(num, -1))
        return self._arguments[num]

    @torch.no_grad()
    def _embed(self, ids_BL: torch.Tensor) -> torch.Tensor:
        # Not through the head, which is not wanted here.
        self.skeleton.base_model(ids_BL.to(self.source.device), use_cache=False)
        self._arguments.setdefault(len(ids_BL), [stop.arguments for stop in self._passages])
        received = self._passages[0].received
        for stop in self._passages:
            stop.received, stop.arguments = None, ((), {})
        return received.cpu()  # type: ignore[union-attr]


@contextmanager
def captured_input(block: nn.Module, name: str) -> Iterator[list[torch.Tensor]]:
    """While inside, the list holds what the submodule `name` was last called with."""
    captured: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        captured[:] = args

    handle = block.get_submodule(name).register_forward_pre_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


def require_finite(tensor: torch.Tensor, where: str) -> None:
    """Raise ModelError if `tensor` holds NaN or infinity; `where` names the place."""
    # The sum is non-finite exactly when an element is (or when finite ones overflow it,
    # which float32 hidden states that matter do not): one pass and no mask.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise ModelError(
            f"{where} holds NaN or infinity; nothing computed from it can be trusted. Check the "
            "checkpoint's weights, or load it in a wider dtype (dtype: float32)"
        )


def finite_state(block: nn.Module, name: str, what: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a changed block by their names in the checkpoint.

    Args:
        name: of the block.
        what: was done to it, for the message.

    Raises:
        ModelError: one is not finite.
    """
    for key, value in block.state_dict().items():
        require_finite(value, f"the {what} weight {name}.{key}")
        yield f"{name}.{key}", value


def mean_square(stream: torch.Tensor) -> torch.Tensor:
    """Of each token of a residual stream [..., D], [..., 1] float32."""
    norm = torch.linalg.vector_norm(stream, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square() / stream.shape[-1]


def check_weights(block: nn.Module, where: str) -> None:
    """Raise ModelError, naming the parameter, if a weight of `block` is not finite."""
    for name, parameter in block.named_parameters():
        require_finite(parameter.detach(), f"the weight {where}.{name}")


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    elements = int(torch.Size(shape).numel())
    if elements * dtype.itemsize < psutil.virtual_memory().available // 3:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="hf_compress-hidden-") as file:
        # The mapping outlives the name: the space is given back when the tensor dies.
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype).view(shape)
