"""`AbsentWeight`: stands for a parameter whose numbers are not in memory.

It looks like the real one, so that code which only asks for shape, dtype or device goes on: adapters are put beside it,
state dicts are listed, modules are moved to where they are. Whatever needs its numbers, or changes them, gets the real
one if that can be had, else an error. Knows tensors; not where weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Find = Callable[[], nn.Parameter]
"""The real parameter.

Raises:
    WeightsError: it is not in memory.
"""

_REACH_FOR_MEMORY = frozenset(
    {
        "__array__", "__cuda_array_interface__.__get__", "__dlpack__", "_typed_storage", "data.__set__", "data_ptr",
        "numpy", "pin_memory", "resize_", "set_", "share_memory_", "storage", "tolist", "untyped_storage",
    }
)  # fmt: skip
"""What torch does without an operation that `__torch_dispatch__` would be told of."""


class AbsentWeight(nn.Parameter):
    """A parameter without numbers."""

    _find: Find

    @staticmethod
    def __new__(cls, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device, find: Find) -> Self:
        with torch.inference_mode(False):  # what is made in it may be used in it only
            self: Self = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=device, requires_grad=False
            )
        self._find = find
        return self

    def __init__(self, *_: Any) -> None:
        """All is done by `__new__`, as in any parameter."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(function), kwargs or {}
        if name == "data.__set__" and all(isinstance(value, cls) for value in args):  # a module that is moved nowhere
            return None
        if name in _REACH_FOR_MEMORY:
            args, kwargs = tree_map_only(cls, cls._real, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no class in it
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(weight.shape, weight.dtype, weight.device, weight._find)
        # inference mode hands on operations that are made of others, and perhaps need no numbers, such as `to`
        found = function.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        args, kwargs = tree_map_only(cls, cls._real, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._real().__deepcopy__(memo)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._real().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's stub has no name for the argument
        return f"AbsentWeight({tuple(self.shape)}, {self.dtype}, {self.device}: not in memory)"

    def _real(self) -> Tensor:
        return self._find()


def _name(function: Any) -> str:
    """Of a method, or of an attribute that is read (`data.__get__`) or set."""
    name = getattr(function, "__name__", "")
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    return f"{owner}.{name}" if name in ("__get__", "__set__") else name
