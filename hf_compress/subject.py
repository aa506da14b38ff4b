"""The dense model of a run and its tokenizer, from a recipe or from memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.data.masking import masked_tokens
from hf_compress.model.blocks import BlockSource, ModelInMemory, StreamedCheckpoint
from hf_compress.model.divergence import Questions, next_tokens
from hf_compress.model.loading import (
    check_vocabulary,
    load_config,
    load_tokenizer,
    require_full_precision,
    resolve_device,
    resolve_dtype,
    resolve_folder,
)
from hf_compress.recipe import Recipe
from hf_compress.workspace import digest, digest_files, digest_model


@dataclass
class Subject:
    """The dense model of a run, however it came."""

    source: BlockSource
    tokenizer: PreTrainedTokenizerBase
    identity: str
    """Hash of its content."""
    name: str
    folder: Path | None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Subject:
        folder = resolve_folder(recipe.model)
        config = load_config(folder)
        require_full_precision(config)
        device = resolve_device(recipe.device)
        source = StreamedCheckpoint(folder, config, resolve_dtype(recipe.dtype, config), device)
        tokenizer = load_tokenizer(folder, config)
        name = recipe.model if not Path(recipe.model).is_dir() else folder.resolve().name
        return cls(source, tokenizer, digest(digest_files(folder)), name, folder)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str
    ) -> Subject:
        require_full_precision(model.config)
        target = model.device if device == "auto" else resolve_device(device)
        check_vocabulary(tokenizer, model.config)
        name = model.config._name_or_path or model.config.model_type
        return cls(
            ModelInMemory(model, target), tokenizer, digest_model(model), Path(name).name, None
        )

    def whole(self) -> PreTrainedModel:
        """The model in one piece, for sampling text and measuring speed."""
        if isinstance(self.source, ModelInMemory):
            return self.source.model
        auto_class = self.source.family.auto_class
        model = auto_class.from_pretrained(self.folder, dtype=self.source.dtype)
        return model.to(self.source.device).eval()

    def questions(self, ids_NL: torch.Tensor, seed: int) -> Questions:
        """What this kind of model is asked on windows of text, and reads while it is
        calibrated: a masked language model that never saw a mask would lose what it has
        for masks."""
        if self.source.family.masked:
            return masked_tokens(ids_NL, self.tokenizer, seed)
        return next_tokens(ids_NL)

    def save_companions(self, folder: Path) -> None:
        """Tokenizer, chat template and generation config, as the dense model has them."""
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.source, ModelInMemory):
            model = self.source.model
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        elif self.folder and (self.folder / "generation_config.json").is_file():
            shutil.copyfile(
                self.folder / "generation_config.json", folder / "generation_config.json"
            )
