"""One rank of a job of any size, on one process: fake process groups, tensors without memory.

Inside `fake_world` this process is some rank of a world, and every collective returns at once. In
`Shapes` operators compute shapes, dtypes and the bytes that are alive, and nothing else:
Megatron-Core builds, runs its schedule and steps as ever. This is the only file that uses PyTorch's
fake backend, which is not public; `TORCH` has the versions for which tests have held it.

A number that a program reads out of such a tensor is 1.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dattn_mcore.parallel import on_cpu
from dattn_mcore.parallel.collectives import NAMESPACE, Collective, records

TORCH = ("2.13",)
_BACKEND = "rehearsal"
_aten, _c10d = torch.ops.aten, torch.ops.c10d


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[torch.device]:
    """Makes this process a rank of a world whose other ranks do not exist.

    Args:
        rank: of the world.
        world_size: ranks of it.

    Yields:
        The device on which tensors have no memory.
    """
    if not dist.is_backend_available(_BACKEND):
        # PyTorch's own registration of its fake backend leaves these devices out.
        dist.Backend.register_backend(
            _BACKEND, _create_fake_pg, extended_api=True, devices=["cpu", "meta"]
        )
    with on_cpu.without_memory() as device:
        dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield device
        finally:
            dist.destroy_process_group()


class FusedKernels(TorchFunctionMode):
    """Inside, an RMS norm and an attention keep what PyTorch's kernels on a GPU keep.

    A norm keeps its input and a number a row, an attention what enters it, its output and a number
    a row. Without these kernels PyTorch composes both of operators, which keep more.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See PyTorch's class."""
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            scale = (kwargs or {}).get("scale")
            return _aten._scaled_dot_product_flash_attention(*args[:3], scale=scale)[0]
        if func is torch.nn.functional.rms_norm and args[0].is_meta:
            named = dict(zip(("input", "normalized_shape", "weight"), args, strict=False))
            return _Norm.apply(args[0], (named | (kwargs or {}))["weight"])
        return func(*args, **(kwargs or {}))


class _Norm(torch.autograd.Function):
    """Shapes of a norm of the last dimension."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x[..., :1] * 1.0)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Shapes(TorchDispatchMode):
    """Inside, what touches a tensor without memory computes its shape; collectives are recorded.

    Attributes:
        collectives: of this rank, in their order.
        live: bytes of the tensors that are alive and would be on the device.
        peak: most of them since the last `start`.
        wide_live, wide_peak: the same of those alone whose last dimension is `width`.

    Args:
        names: of process groups, see `collectives.group_names`.
        width: see there.
    """

    def __init__(self, names: Mapping[str, str], width: int = 0) -> None:
        super().__init__()
        self.names, self.width = names, width
        self.collectives: list[Collective] = []
        self.live = self.peak = self.wide_live = self.wide_peak = 0
        self._storages: dict[int, Any] = {}

    def start(self) -> int:
        """Starts a new measurement of the peaks; returns what is alive."""
        self.peak, self.wide_peak = self.live, self.wide_live
        return self.live

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's memory as long as it is alive, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        nbytes = storage.nbytes()
        wide = nbytes if tensor.dim() > 1 and tensor.shape[-1] == self.width else 0
        self._storages[key] = weakref.finalize(storage, self._let_go, key, nbytes, wide)
        self.live += nbytes
        self.wide_live += wide
        self.peak = max(self.peak, self.live)
        self.wide_peak = max(self.wide_peak, self.wide_live)

    def _let_go(self, key: int, nbytes: int, wide: int) -> None:
        del self._storages[key]
        self.live -= nbytes
        self.wide_live -= wide

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See PyTorch's class."""
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            self.collectives += records(func, args, self.names)
            return _exchange(func, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        given = [value for value in flat if isinstance(value, torch.Tensor)]
        if any(tensor.is_meta for tensor in given):
            if func is _aten._local_scalar_dense.default:
                return _one(args[0].dtype)
            device = kwargs.get("device")
            if func is _aten._to_copy.default and device is not None and device.type != "meta":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not all(tensor.is_meta for tensor in given):
                if func._schema.is_mutable and not args[0].is_meta:
                    return args[0].fill_(_one(args[0].dtype))
                args, kwargs = tree_map_only(torch.Tensor, _without_memory, (args, kwargs))
        result = func(*args, **kwargs)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and value.is_meta:
                self.hold(value)
        return result


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _one(dtype: torch.dtype) -> Any:
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _exchange(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls an operator that exchanges, with empty tensors for those without memory."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor  # what other ranks would send is what this one sends
        return torch.empty(0, dtype=tensor.dtype, device="cpu")

    given = tree_map_only(torch.Tensor, empty, args)
    if func is _c10d.alltoall_base_.default and args[0].is_meta:
        # Shares of no rows at all, as what is empty cannot be divided unevenly.
        given = (*given[:3], [], [], *given[5:])
    result = func(*given, **kwargs)
    if func is _c10d.allreduce_.default:  # a sum over others, of whom nothing is known
        for tensor in args[0]:
            tensor.fill_(_one(tensor.dtype))
    return (args[0], *result[1:]) if isinstance(result, tuple) else result
