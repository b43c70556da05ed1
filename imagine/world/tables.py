"""A frozen dataclass of tensors of equal length, whose rows can be selected, repeated and joined as in a table."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Table")


@dataclass(frozen=True)
class Table:
    """Tensors of equal length, one row per item; `table[2:5]`, `table[index_tensor]` and `table[mask]` select rows."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self: Self, rows: "slice | Tensor | Sequence[int]") -> Self:
        index = rows if isinstance(rows, (slice, Tensor)) else torch.as_tensor(rows)
        return self._map(lambda column: column[index])

    def repeat(self: Self, times: int) -> Self:
        """Repeat each row `times` times: a, a, b, b ..."""
        return self._map(lambda column: column.repeat_interleave(times, dim=0))

    def to(self: Self, device: "torch.device | str") -> Self:
        return self._map(lambda column: column.to(device))

    def replace(self: Self, **columns: "Tensor | int | float") -> Self:
        """Return a copy with some columns replaced; a number fills its whole column."""
        full = {
            name: value if isinstance(value, Tensor) else torch.full_like(getattr(self, name), value)
            for name, value in columns.items()
        }
        return dataclasses.replace(self, **full)

    def _map(self: Self, change: Any) -> Self:
        return type(self)(**{spec.name: change(getattr(self, spec.name)) for spec in fields(self)})


def join(tables: Sequence[Self]) -> Self:
    """Concatenate the rows of tables, in order."""
    first = tables[0]
    return type(first)(**{s.name: torch.cat([getattr(t, s.name) for t in tables]) for s in fields(first)})
