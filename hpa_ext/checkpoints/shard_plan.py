"""What will be written, to the byte, before anything is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hpa_ext.checkpoints.dtypes import BITS
from hpa_ext.checkpoints.header import MOST_HEADER_BYTES, Shard, build_header
from hpa_ext.checkpoints.shard_files import is_plain_name


@dataclass(frozen=True)
class ShardPlan:
    """A safetensors file to be written.

    Attributes:
        file_name: a plain name that ends in ``.safetensors``.
        metadata: texts for the header, such as ``{"format": "pt"}``, which transformers asks for.
        tensors: name, type ("BF16", "F32" ...) and shape of each, in the order of their bytes.

    Raises:
        ValueError: a name, a type or a shape that safetensors cannot hold; names the tensor.
    """

    file_name: str
    metadata: Mapping[str, str]
    tensors: Sequence[tuple[str, str, Sequence[int]]]
    _shapes: dict[str, tuple[str, tuple[int, ...]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not is_plain_name(self.file_name) or not self.file_name.endswith(".safetensors"):
            raise ValueError(f"file_name: expected a plain name that ends in .safetensors, got {self.file_name!r}")
        for key, value in self.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"metadata of {self.file_name}: expected texts, got {key!r}: {value!r:.100}")
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, tag, shape in self.tensors:
            where = f"tensor {name!r} of {self.file_name}"
            if not isinstance(name, str) or name == "__metadata__" or name in shapes:
                raise ValueError(f"{where}: expected a text that comes once and is not '__metadata__'")
            if tag not in BITS:
                raise ValueError(f"{where}: expected a type of safetensors ({', '.join(BITS)}), got {tag!r}")
            if any(size < 0 for size in shape) or BITS[tag] * math.prod(shape) % 8:
                raise ValueError(f"{where}: expected sizes that fill whole bytes, got {tag} {list(shape)}")
            shapes[name] = (tag, tuple(shape))
        object.__setattr__(self, "_shapes", shapes)
        if len(self.header) > MOST_HEADER_BYTES:
            raise ValueError(f"{self.file_name}: expected a header of at most {MOST_HEADER_BYTES} bytes")

    @classmethod
    def of_shard(cls, shard: Shard, metadata: Mapping[str, str] | None = None) -> ShardPlan:
        """The plan of a file like `shard`: its tensors in its order; its metadata, or those given."""
        tensors = tuple((entry.name, entry.dtype_tag, entry.shape) for entry in shard.entries)
        return cls(shard.file_name, shard.metadata if metadata is None else metadata, tensors)

    @classmethod
    def sorted(
        cls, file_name: str, metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int]]]
    ) -> ShardPlan:
        """A plan whose tensors are in the order of ``save_file`` of safetensors: by falling size of the elements, so
        that all are aligned, then by name.
        """
        order = {tag: place for place, tag in enumerate(_SAVE_ORDER)}
        return cls(file_name, metadata, tuple(sorted(tensors, key=lambda tensor: (order[tensor[1]], tensor[0]))))

    @property
    def header(self) -> bytes:
        """The bytes before the data."""
        return self._layout[0]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._layout[1][-1]

    @cached_property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """First byte in the file, and the one after the last, by tensor."""
        offsets = self._layout[1]
        return {tensor[0]: (offsets[i], offsets[i + 1]) for i, tensor in enumerate(self.tensors)}

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a tensor."""
        return self._shapes[name]

    @cached_property
    def _layout(self) -> tuple[bytes, list[int]]:
        return build_header(self.tensors, self.metadata)


def index_of(plans: Sequence[ShardPlan], metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The index for these shards, as transformers writes it.

    Args:
        plans: the shards.
        metadata: further entries beside ``total_size``, the bytes of all tensors.
    """
    total = sum(plan.size - len(plan.header) for plan in plans)
    return {
        "metadata": {**(metadata or {}), "total_size": total},
        "weight_map": {name: plan.file_name for plan in plans for name, _, _ in plan.tensors},
    }


def index_text(index: Mapping[str, Any]) -> bytes:
    """The bytes of an index file, as transformers lays them out."""
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def plan_by_tensor(plans: Sequence[ShardPlan]) -> dict[str, ShardPlan]:
    """The plan of each tensor by its name; ValueError if a file or a tensor comes twice."""
    files = [plan.file_name for plan in plans]
    if not files or len(set(files)) != len(files):
        raise ValueError(f"plans: expected one or more files of different names, got {files}")
    by_name: dict[str, ShardPlan] = {}
    for plan in plans:
        for name, _, _ in plan.tensors:
            if name in by_name:
                raise ValueError(
                    f"plans: expected every tensor once, got {name!r} in {by_name[name].file_name} and {plan.file_name}"
                )
            by_name[name] = plan
    return by_name


def check_index(index: Mapping[str, Any], plan_of: Mapping[str, ShardPlan]) -> None:
    """Refuse an index whose map is not that of the plans."""
    expected = {name: plan.file_name for name, plan in plan_of.items()}
    got = index.get("weight_map")
    if got != expected:
        differing = sorted(name for name in {*expected, *(got or {})} if expected.get(name) != (got or {}).get(name))
        raise ValueError(
            f"index: expected the file of every planned tensor under 'weight_map', got {len(differing)} that differ: "
            f"{', '.join(map(repr, differing[:5]))}"
        )


# Of safetensors' own list of types, from the last to the first.
_SAVE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
