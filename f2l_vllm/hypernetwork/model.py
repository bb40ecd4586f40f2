"""The hypernetwork: features of a video at every text layer in, LoRA factors for every text layer out.

Shape suffixes: B batch, K chunks, L text layers, T tokens, D hidden size, d latent size, M target modules, R rank,
I/O in/out features of a target linear, X entries the head writes per rank row, N = B * L rows.

Source: Frames2LoRA (arXiv 2606.04351), section 3; tensor names are those of the released checkpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from f2l_vllm.files import atomic_directory
from f2l_vllm.hypernetwork.adapter import Adapter, Factors
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import CONFIG_FILE, FORMAT, WEIGHTS_FILE, damaged, read_directory_config
from f2l_vllm.hypernetwork.perceiver import EXPANSION, LayerReader, Perceiver
from f2l_vllm.hypernetwork.weights import digest, write_weights


class ResidualMLP(nn.Module):
    """x + LN(W2 silu(W1 LN(x))); the indices in `mlp` are those of the released checkpoints (1 and 4 are dropout)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(size),
            nn.Identity(),
            nn.Linear(size, EXPANSION * size),
            nn.SiLU(),
            nn.Identity(),
            nn.Linear(EXPANSION * size, size),
            nn.LayerNorm(size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Head(nn.Module):
    """One linear map per text layer (and per module, when there are several) from a latent to a row of A and of B."""

    def __init__(self, num_layers: int, num_modules: int, size: int, size_out: int) -> None:
        super().__init__()
        modules = () if num_modules == 1 else (num_modules,)
        self.weight = nn.Parameter(torch.empty(num_layers, *modules, size, size_out))

    def forward(self, latents_BLMRd: Tensor) -> Tensor:
        """[B, L, M, R, d] -> [B, L, M, R, X]."""
        num_layers, num_modules = latents_BLMRd.shape[1:3]
        weight_LMdX = self.weight.reshape(num_layers, num_modules, *self.weight.shape[-2:])
        return latents_BLMRd @ weight_LMdX


class Hypernetwork(nn.Module):
    """Perceiver, head and learned video-independent bias factors for one base model."""

    def __init__(self, config: HypernetworkConfig) -> None:
        """Initialise as in the paper: scaler_B is zero, so that an untrained hypernetwork changes nothing."""
        super().__init__()
        self.config = config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        perceiver = Perceiver(
            config.feature_size,
            config.latent_size,
            config.num_latents,
            len(config.modules) * config.rank,
            config.num_blocks,
            config.num_self_attn_per_block,
            heads,
        )
        self.aggregator = nn.ModuleDict({"perceiver": perceiver})
        self.layers = nn.Sequential(*(ResidualMLP(config.latent_size) for _ in range(config.num_pre_head_layers)))
        self.head = Head(config.num_layers, len(config.modules), config.latent_size, config.head_size)
        layers, rank = config.num_layers, config.rank
        sizes = config.modules.items()
        self.bias_A = nn.ParameterDict({m: nn.Parameter(torch.empty(layers, rank, d_in)) for m, (d_in, _) in sizes})
        self.bias_B = nn.ParameterDict({m: nn.Parameter(torch.empty(layers, rank, d_out)) for m, (_, d_out) in sizes})
        self.scaler_A = nn.ParameterDict({m: nn.Parameter(torch.empty(1, layers, rank, 1)) for m in config.modules})
        self.scaler_B = nn.ParameterDict({m: nn.Parameter(torch.empty(1, layers, rank, 1)) for m in config.modules})
        self._revision: tuple[tuple[tuple[int, int], ...], str] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator. Source: section 3 and the training appendix."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for resampler in (self.perceiver.encoder, self.perceiver.decoder):
            nn.init.normal_(resampler.latents_q)
        nn.init.normal_(self.head.weight, std=0.5 / math.sqrt(config.latent_size + config.head_size * config.rank))
        for name, (d_in, _) in config.modules.items():
            nn.init.normal_(self.bias_A[name], std=0.2 / math.sqrt(d_in * config.rank))
            nn.init.zeros_(self.bias_B[name])
            nn.init.ones_(self.scaler_A[name])
            nn.init.zeros_(self.scaler_B[name])

    @property
    def perceiver(self) -> Perceiver:
        perceiver = self.aggregator["perceiver"]
        assert isinstance(perceiver, Perceiver)
        return perceiver

    @property
    def scale(self) -> float:
        """Factor s on an adapter's output."""
        assert self.config.scale is not None
        return self.config.scale

    @property
    def revision(self) -> str:
        """16 hex digits that change with any weight or size, but not with the device or the base model's name."""
        key = tuple((tensor.data_ptr(), tensor._version) for tensor in self.parameters())
        if self._revision is None or self._revision[0] != key:
            shape = {name: value for name, value in self.config.to_dict().items() if name != "base_model"}
            self._revision = (key, digest(self.state_dict(), json.dumps(shape, sort_keys=True).encode()))
        return self._revision[1]

    def forward(self, features_BLTD: Tensor, mask_BT: Tensor | None = None) -> Factors:
        """Factors of B chunks before the bias, differentiable.

        Args:
            features_BLTD: the inputs of each text layer while the base model reads the video.
            mask_BT: True (or 1) where a token is real; None when all are.

        Returns:
            module -> (A [B, L, R, I], B [B, L, R, O]); the scale s is not folded in.

        Raises:
            ValueError: the shapes do not fit this hypernetwork.
        """
        self._check(features_BLTD, mask_BT)
        mask_NT = None if mask_BT is None else mask_BT.bool().repeat_interleave(self.config.num_layers, dim=0)
        latents_NQd = self.perceive(features_BLTD.flatten(0, 1), mask_NT)
        return self.project(latents_NQd.unflatten(0, (-1, self.config.num_layers)))

    def perceive(self, features_NTD: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """Features of N (video, text layer) rows -> latents [N, M * R, d]. Rows do not see each other."""
        return self.perceiver(features_NTD, mask_NT)

    def reader(self, mask_BT: Tensor | None = None) -> LayerReader:
        """A reader that takes the text layers' inputs, a layer at a time; its `latents` are the input of `project`."""
        return LayerReader(self.perceiver, mask_BT)

    def project(self, latents_BLQd: Tensor) -> Factors:
        """Latents of all L text layers [B, L, M * R, d] -> factors, as `forward` returns them."""
        latents = F.normalize(self.layers(latents_BLQd), dim=-1)
        rows_BLMRX = self.head(latents.unflatten(2, (len(self.config.modules), self.config.rank)))
        factors = {}
        for index, (name, (d_in, d_out)) in enumerate(self.config.modules.items()):
            a_BLRI, b_BLRO = rows_BLMRX[:, :, index, :, : d_in + d_out].split((d_in, d_out), dim=-1)
            factors[name] = (a_BLRI * self.scaler_A[name], b_BLRO * self.scaler_B[name])
        return factors

    @torch.no_grad()
    def generate(self, features_LTD: Tensor, mask_T: Tensor | None = None) -> Factors:
        """Factors of one chunk, without gradients and in bounded memory: module -> (A [L, R, I], B [L, R, O])."""
        mask_1T = None if mask_T is None else mask_T[None]
        self._check(features_LTD[None], mask_1T)
        device = self.head.weight.device
        reader = self.reader(None if mask_1T is None else mask_1T.to(device).bool())
        for features_TD in features_LTD:
            reader.add(features_TD[None].to(device))
        factors = self.project(reader.latents())
        return {name: (a[0], b[0]) for name, (a, b) in factors.items()}

    def combine(self, factors_list: Sequence[Factors]) -> Factors:
        """Concatenate K chunks along the rank and append the learned bias once; differentiable.

        Args:
            factors_list: K factors as `forward` ([B, L, R, *]) or `generate` ([L, R, *]) return them.

        Returns:
            module -> (A, B) of rank (K + 1) R, with a batch axis if the chunks have one.

        Raises:
            ValueError: there is no chunk, or chunks are of another hypernetwork.
        """
        if not factors_list:
            raise ValueError("There is nothing to compose: pass the factors of at least one chunk.")
        for factors in factors_list:
            if list(factors) != list(self.config.modules):
                raise ValueError(
                    f"Factors for {list(factors)} cannot be composed by a hypernetwork for {list(self.config.modules)}."
                )
        return {
            name: (
                _append([factors[name][0] for factors in factors_list], self.bias_A[name]),
                _append([factors[name][1] for factors in factors_list], self.bias_B[name]),
            )
            for name in self.config.modules
        }

    @torch.no_grad()
    def compose(self, factors_list: Sequence[Factors]) -> Adapter:
        """One adapter of rank (K + 1) R from K chunks of factors without a batch axis. Raises like `combine`."""
        return Adapter(factors=self.combine(factors_list), scale=self.scale)

    def save(self, directory: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`, both or neither.

        Args:
            dtype: the weights are rounded to it; None writes them as they are.
            overwrite: replace an existing hypernetwork.

        Raises:
            FileExistsError: the directory is not empty and `overwrite` is False.
            ValueError: a weight is not finite.
        """
        tensors = {
            name: tensor.detach().to("cpu", dtype).contiguous().clone() for name, tensor in self.state_dict().items()
        }
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"The hypernetwork's weights are not finite and were not saved: {broken[:5]}.")
        with atomic_directory(directory, overwrite=overwrite) as staging:
            text = json.dumps({"format": FORMAT, **self.config.to_dict()}, indent=2)
            (staging / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            write_weights(staging / WEIGHTS_FILE, tensors)

    @classmethod
    def load(
        cls, ref: str | Path, base_model: str | None = None, dtype: torch.dtype | None = torch.float32
    ) -> Hypernetwork:
        """Read a released `.pt` file, a directory written by `save`, or a Hugging Face repository holding either.

        Args:
            ref: path, `owner/repository`, or `owner/repository/file.pt`.
            base_model: the model to use it with; chooses among several `.pt` files of a repository by the model size in
                their names.
            dtype: dtype to compute in; the file's own may be narrower. None keeps the file's own.

        Raises:
            ValueError: nothing readable at `ref`, or not a hypernetwork; the message says what is wrong.
        """
        from f2l_vllm.hypernetwork.locate import locate

        path = locate(ref, base_model)
        if path.is_dir():
            config, tensors = read_directory_config(path), _read_weights(path / WEIGHTS_FILE)
        else:
            from f2l_vllm.hypernetwork.checkpoint import read_checkpoint

            config, tensors = read_checkpoint(path)
        return cls.from_tensors(config, tensors, dtype=dtype, source=str(path))

    @classmethod
    def from_tensors(
        cls,
        config: HypernetworkConfig,
        tensors: dict[str, Tensor],
        dtype: torch.dtype | None = torch.float32,
        source: str = "the checkpoint",
    ) -> Hypernetwork:
        """Build from named tensors; every one must be used and none may be missing or have another shape."""
        with torch.device("meta"):
            hyper = cls(config)
        expected = {name: tensor.shape for name, tensor in hyper.state_dict().items()}
        problems = [f"{name} is missing" for name in expected if name not in tensors]
        problems += [f"{name} is not part of a hypernetwork" for name in tensors if name not in expected]
        problems += [
            f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"{source} does not hold the hypernetwork its config describes: {problems[:5]}{more}.")
        hyper.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, assign=True)
        return hyper

    def _check(self, features_BLTD: Tensor, mask_BT: Tensor | None) -> None:
        config = self.config
        shape = tuple(features_BLTD.shape)
        if len(shape) != 4 or shape[1] != config.num_layers or shape[3] != config.feature_size:
            raise ValueError(
                f"Features of shape {list(shape)} do not fit the hypernetwork for {config.base_model!r}: "
                f"expected [batch, {config.num_layers} layers, tokens, {config.feature_size}]."
            )
        if mask_BT is not None and tuple(mask_BT.shape) != (shape[0], shape[2]):
            raise ValueError(f"The mask has shape {list(mask_BT.shape)}; expected {[shape[0], shape[2]]}.")


def _append(chunks: list[Tensor], bias_LRX: Tensor) -> Tensor:
    bias = bias_LRX.to(chunks[0].dtype)
    return torch.cat([*chunks, bias.expand(*chunks[0].shape[:-3], -1, -1, -1)], dim=-2)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise damaged(path, error) from error
