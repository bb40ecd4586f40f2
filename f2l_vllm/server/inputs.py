"""What a server and its workers are made of: settings, base model and hypernetwork, checked without loading them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from f2l_vllm import models
from f2l_vllm.base_models.shapes import BaseShapes
from f2l_vllm.catalog.database import check_url as check_database
from f2l_vllm.catalog.listener import check_url as check_listening
from f2l_vllm.engine.defaults import EngineLimits, check_limits
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import read_config
from f2l_vllm.hypernetwork.fit import check_shapes
from f2l_vllm.hypernetwork.ranks import RANKS, most_chunks, smallest_rank
from f2l_vllm.pool.messages import WorkerSpec
from f2l_vllm.settings import Settings
from f2l_vllm.store.address import Revisions
from f2l_vllm.store.object_store import check_url as check_store


@dataclass(frozen=True)
class Inputs:
    """`model` and `hypernetwork` are paths of two that fit together; `config` is the hypernetwork's."""

    settings: Settings
    model: Path
    hypernetwork: Path
    config: HypernetworkConfig

    @classmethod
    def read(cls, model: str, given: Mapping[str, str] | None = None) -> Inputs:
        """Read the settings and find the models that they name.

        Args:
            given: the values of flags, as environment variables.

        Raises:
            ValueError: a setting cannot work, there is no such model or hypernetwork, or the two do not fit together.
        """
        settings = Settings.read(given)
        check_database(settings.catalog_url)
        check_listening(settings.listen_url, settings.catalog_url)
        if settings.store is not None:
            check_store(settings.store)
        directory = models.resolve(model)
        shapes = BaseShapes.read(directory)  # refuses a directory that is not a base model
        weights = models.resolve_hypernetwork(model, settings.hypernetwork)
        config = read_config(weights)
        check_shapes(shapes, config)
        return cls(settings, directory, weights, config)

    @property
    def revision(self) -> str:
        """Identifies models and sampling."""
        return Revisions.of(self.model, self.hypernetwork, self.settings.reading).name("")

    def workers(self, flags: Namespace, home: Path | None = None) -> WorkerSpec:
        """Workers on this data folder, None: the settings', for an engine with these flags of vLLM's.

        Raises:
            ValueError: as `engine_rank` does.
        """
        rank = self.engine_rank(flags)
        max_rank = int(getattr(flags, "max_lora_rank", None) or rank)
        paths = {"model": self.model, "hypernetwork": self.hypernetwork}
        spec = WorkerSpec.of(self.settings, **paths, rank=self.config.rank, max_rank=max_rank)
        return spec if home is None else replace(spec, home=home)

    def engine_rank(self, flags: Namespace) -> int:
        """The engine's rank: room for the chunks of one long video, or for several videos in one question.

        A default number of chunks is lowered to what vLLM's largest rank allows.

        Args:
            flags: vLLM's that were given.

        Raises:
            ValueError: a given number of chunks is too large, or the flags leave no room for adapters.
        """
        most = most_chunks(self.config.rank)
        if most < 1:
            limit = f"vLLM's largest is {RANKS[-1]}, which is two of rank {RANKS[-1] // 2}: the video's and the bias"
            raise ValueError(f"this hypernetwork makes adapters of rank {2 * self.config.rank}; {limit}")
        chunks = self.settings.max_chunks
        if not (self.settings.reading.is_chunked or "max_chunks" in self.settings.model_fields_set):
            chunks = min(chunks, most)
        rank = smallest_rank((chunks + 1) * self.config.rank)  # the bias takes the rank of one chunk
        if rank is None:
            raise ValueError(
                f"{chunks} chunks would need rank {(chunks + 1) * self.config.rank}, above vLLM's largest {RANKS[-1]}: "
                f"lower --max-chunks to {most} or less"
            )
        asked = int(getattr(flags, "max_lora_rank", None) or rank)
        modules = getattr(flags, "lora_target_modules", None)
        limits = EngineLimits(asked, 0, frozenset(modules) if modules else None)
        check_limits(limits, rank=2 * self.config.rank, modules=self.config.modules)
        return rank
