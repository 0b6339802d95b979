"""A transformers cache of latents, in FP8 or bfloat16, for the latent attention of DeepSeek-V2, -V3 and -V3.2.

A cached token is one row: the latent that keys and values of all heads are made from, and the rotary part of the
keys. In FP8 a row is bytes,

    latent, float8_e4m3fn, kv_lora_rank of them  |  scales, float32, one for 128 columns  |  rotary part, bfloat16

which is 656 bytes for DeepSeek-V3: 512 + 4 * 4 + 2 * 64. The rotary part is never quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from dsopt.fp8 import FP8Group, scale_shape
from dsopt.fp8.arithmetic import quantize_matrix

GROUP = FP8Group()
DTYPES = ("fp8", "bf16")


@dataclass(frozen=True)
class WideRows:
    """Rows in bfloat16: latent, then rotary part."""

    rank: int
    rope: int

    @property
    def width(self) -> int:
        """Elements of a row, of `dtype`."""
        return self.rank + self.rope

    dtype = torch.bfloat16

    def pack(self, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, rank) and (batch, tokens, rope) -> (batch, tokens, width)."""
        return torch.cat([latent, k_rope], -1).to(self.dtype)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What `pack` was given, in dtype."""
        return rows[..., : self.rank].to(dtype), rows[..., self.rank :].to(dtype)


@dataclass(frozen=True)
class FP8Rows:
    """Rows of bytes: latent in e4m3, scales of 128 columns each in float32, rotary part in bfloat16."""

    rank: int
    rope: int

    dtype = torch.uint8

    @property
    def scales(self) -> tuple[int, int]:
        """Where the scales begin and end: at a multiple of their size."""
        start = self.rank + -self.rank % 4
        return start, start + 4 * scale_shape((1, self.rank), (1, GROUP.columns))[1]

    @property
    def width(self) -> int:
        """Bytes of a row: a multiple of 4, so that the scales of every row are where float32 may be."""
        end = self.scales[1] + 2 * self.rope
        return end + -end % 4

    def pack(self, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, rank) and (batch, tokens, rope) -> (batch, tokens, width)."""
        batch, tokens, rank = latent.shape
        codes, scale = quantize_matrix(latent.reshape(-1, rank).float(), GROUP)
        start, end = self.scales
        tail = k_rope.reshape(-1, self.rope).to(torch.bfloat16).contiguous()
        parts = [codes.view(torch.uint8), scale.view(torch.uint8), tail.view(torch.uint8)]
        if start > rank:
            parts[0] = F.pad(parts[0], (0, start - rank))
        if self.rope % 2:
            parts[2] = F.pad(parts[2], (0, self.width - end - 2 * self.rope))
        return torch.cat(parts, -1).view(batch, tokens, self.width)

    def unpack(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What `pack` was given as FP8 keeps it, in dtype; the latent is dequantized by `dsopt::dequantize`."""
        start, end = self.scales
        codes = rows[..., : self.rank].view(torch.float8_e4m3fn)
        scale = rows[..., start:end].view(torch.float32)
        k_rope = rows[..., end : end + 2 * self.rope].view(torch.bfloat16)
        return torch.ops.dsopt.dequantize(codes, scale, dtype, [1, GROUP.columns]), k_rope.to(dtype)


class GrowingRows:
    """Rows of all tokens so far, in a buffer that is made anew, a quarter larger, where it is full."""

    def __init__(self):
        self.data: torch.Tensor | None = None
        self.length = 0

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Writes rows (batch, tokens, width) behind those that are there; returns all, a view of the buffer."""
        end = self.length + new.shape[1]
        if self.data is None or end > self.data.shape[1]:
            capacity = (end + end // 4 + 255) // 256 * 256
            data = new.new_empty((new.shape[0], capacity, new.shape[2]))
            if self.data is not None:
                data[:, : self.length].copy_(self.data[:, : self.length])
            self.data = data
        self.data[:, self.length : end].copy_(new)
        self.length = end
        return self.data[:, :end]

    def crop(self, tokens: int) -> None:
        self.length = max(0, self.length - tokens)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these sequences of the batch, in this order."""
        if self.data is not None:
            self.data = self.data.index_select(0, rows.to(self.data.device))

    def reset(self) -> None:
        self.data, self.length = None, 0


class StaticRows:
    """Rows of all tokens so far in a buffer that keeps its size and place; its length is a tensor, for graphs."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.data: torch.Tensor | None = None
        self.length = torch.tensor(0)

    def reserve(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the buffer, of zeros: attention reads rows that a mask hides, and NaN would get through."""
        self.data = torch.zeros((batch, self.capacity, width), dtype=dtype, device=device)
        self.length = self.length.to(device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.data)
            torch._dynamo.mark_static_address(self.length)

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Writes rows (batch, tokens, width) behind those that are there; returns the whole buffer."""
        batch, tokens, width = new.shape
        if self.data is None:
            self.reserve(batch, width, new.dtype, new.device)
        if batch != self.data.shape[0]:
            raise ValueError(
                f"the cache holds {self.data.shape[0]} sequences, got {batch}; reset() keeps that number"
            )
        self.data.index_copy_(1, self.length + torch.arange(tokens, device=new.device), new)
        self.length.add_(tokens)
        return self.data

    def crop(self, tokens: int) -> None:
        self.length.sub_(tokens).clamp_(min=0)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these sequences of the batch, in this order; in place where their number stays."""
        if self.data is None:
            return
        chosen = self.data.index_select(0, rows.to(self.data.device))
        if chosen.shape == self.data.shape:
            self.data.copy_(chosen)
        else:
            self.data = chosen

    def reset(self) -> None:
        if self.data is not None:
            self.data.zero_()
        self.length.zero_()


class LatentLayer(CacheLayerMixin):
    """The latents of one layer, and the keys of its indexer where it has one."""

    is_sliding = False
    is_croppable = True

    def __init__(self, form: FP8Rows | WideRows, max_cache_len: int | None):
        super().__init__()
        self.form, self.max_cache_len = form, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.rows, self.indexer = (
            GrowingRows() if max_cache_len is None else StaticRows(max_cache_len) for _ in range(2)
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if isinstance(self.rows, StaticRows):
            self.rows.reserve(key_states.shape[0], self.form.width, self.form.dtype, key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes latents (batch, 1, tokens, rank) and rotary parts (batch, 1, tokens, rope); returns all so far.

        A static cache returns all it has room for, in the dtype given, as transformers' own does. Raises ValueError for
        other shapes: those of a model, or a version of transformers, that caches keys and values of every head.
        """
        batch, _, tokens, _ = key_states.shape
        for name, x, width in (
            ("latent", key_states, self.form.rank),
            ("k_rope", value_states, self.form.rope),
        ):
            if x.shape != (batch, 1, tokens, width):
                raise ValueError(
                    f"{name} must be {[batch, 1, tokens, width]} to be cached, got {list(x.shape)}"
                )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.rows.append(self.form.pack(key_states[:, 0], value_states[:, 0]))
        latent, k_rope = self.form.unpack(rows, key_states.dtype)
        return latent.unsqueeze(1), k_rope.unsqueeze(1)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Writes the indexer's keys (batch, tokens, index_head_dim), in their dtype; returns all so far."""
        return self.indexer.append(indexer_key_states)

    @property
    def batch_size(self) -> int:
        if self.rows.data is None:
            raise AttributeError("a cache that holds nothing has no batch size")
        return self.rows.data.shape[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len or self.rows.length + query_length, 0

    def get_seq_length(self) -> int | torch.Tensor:
        return self.rows.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        self.rows.reset()
        self.indexer.reset()
        self.is_initialized = self.rows.data is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens. Raises ValueError for a number above 0."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be 0 or less: -n forgets n tokens, got {tokens_to_remove}"
            )
        self.rows.crop(-tokens_to_remove)
        self.indexer.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rows.select(indices)
        self.indexer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows.data is not None:
            rows = torch.arange(self.batch_size, device=self.rows.data.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class LatentCache(Cache):
    """A cache of latents for `generate(past_key_values=...)` and for calls of the model.

    config: of a model with latent attention: it has kv_lora_rank, qk_rope_head_dim and num_hidden_layers.
    dtype: "fp8": latents in float8_e4m3fn with a float32 scale for 128 columns, quantized as `dsopt.fp8` says;
        "bf16": as they are in a bfloat16 model. The rotary part is bfloat16 in both.
    max_cache_len: room for so many tokens, whose buffers keep their place, so that a compiled step stays as it is;
        None for a cache that grows.

    Attention gets latents in the model's dtype. Of an FP8 cache they come from `dsopt::dequantize`, which dsopt folds
    into the attention, so that a compiled step reads the bytes as they are. All tokens are read as they are cached,
    those of the same call too, so that a prompt gives the same whether it comes at once or in parts.

    Raises TypeError or ValueError, naming the argument.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; groups of 128: DeepSeek-V3, arXiv 2412.19437, section 3.3.2.
    """

    def __init__(self, config: PreTrainedConfig, dtype: str = "fp8", max_cache_len: int | None = None):
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a transformers config, got {type(config).__name__}")
        config = config.get_text_config(decoder=True)
        if missing := [n for n in ("kv_lora_rank", "qk_rope_head_dim") if not getattr(config, n, None)]:
            raise ValueError(
                f"config must be of latent attention; {config.model_type} has no {', '.join(missing)}"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise ValueError(f"max_cache_len must be None or a whole number above 0, got {max_cache_len!r}")
        self.dtype = dtype
        self.form = (FP8Rows if dtype == "fp8" else WideRows)(config.kv_lora_rank, config.qk_rope_head_dim)
        # what keys and values of every head would take in bfloat16
        head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        self.expanded_bytes_per_token: int = 2 * config.num_attention_heads * head
        super().__init__(
            layers=[LatentLayer(self.form, max_cache_len) for _ in range(config.num_hidden_layers)]
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in one layer, V3.2's indexer aside."""
        return self.form.width * self.form.dtype.itemsize

    def __repr__(self) -> str:
        share = self.bytes_per_token / self.expanded_bytes_per_token
        return (
            f"LatentCache({self.dtype}, {len(self)} layers, {int(self.get_seq_length())} tokens of "
            f"{self.bytes_per_token} bytes a layer, {share:.1%} of expanded keys and values in bfloat16)"
        )
