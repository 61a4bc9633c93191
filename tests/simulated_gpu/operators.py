"""torch's operators of CUDA tensors, run on the CPU over the same memory when their stream comes to them."""

import contextlib
import ctypes
import functools
import warnings

import torch
import torch._tensor_str
from torch.utils._pytree import tree_leaves, tree_map_only

from . import library, timeline

LINK = 25_000  # bytes that cross between host and device in a unit of time
#: They make or describe memory, and torch's own kernels for CUDA start nothing.
NATIVE = set(
    """empty.memory_format empty_strided empty_like new_empty new_empty_strided record_stream _pin_memory is_pinned
    set_ set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor detach alias lift_fresh
    _unsafe_view resize_ _has_compatible_shallow_copy_type""".split()
)
#: Of libraries that are not there; torch chooses others where they are switched off.
ABSENT = set(
    """_fused_sdp_choice _scaled_dot_product_efficient_attention _efficient_attention_forward
    _cudnn_init_dropout_state""".split()
)
#: Their result, or its shape, is the host's to know: they wait for the stream.
WAITING = set(
    """_local_scalar_dense nonzero is_nonzero equal masked_select _unique2 unique_consecutive unique_dim bincount item
    allclose histc""".split()
)
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}  # with masks they wait too

_on_device = functools.partial(tree_map_only, torch.Tensor)


def on_cpu(tensor):
    """The CPU's view of a tensor's memory."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    view = torch.empty(0, dtype=tensor.dtype)
    base = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    view.set_(base, tensor.storage_offset(), tensor.shape, tensor.stride())
    return view.conj() if tensor.is_conj() else view


def without_memory(tensor):
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.conj() if tensor.is_conj() else made


def on_device(tensor):
    """Memory of the device for a result like ``tensor``."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def arriving(result):
    """What the host knows, on the device once its stream has come to it."""

    def arrive(tensor):
        made = on_device(tensor)
        target = on_cpu(made)
        timeline.submit(lambda: target.copy_(tensor))
        return made

    return _on_device(arrive, result)


_generators = {}  # id of one of CUDA's -> (its seed, one of the CPU's that draws in its place)


def drawing_as(generator):
    """The CPU's generator in the place of one of CUDA's, from the same seed on; it draws other numbers."""
    seed, other = _generators.get(id(generator), (None, None))
    if seed != generator.initial_seed():
        other = torch.Generator().manual_seed(generator.initial_seed())
        _generators[id(generator)] = generator.initial_seed(), other
    return other


class Call:
    """One call of an operator for tensors of the device."""

    def __init__(self, op, args, kwargs):
        schema = op._schema
        self.op, self.args, self.kwargs, self.schema = op, args, kwargs, schema
        self.name = schema.name.removeprefix("aten::")
        self.function = op
        for given, argument in zip(args, schema.arguments, strict=False):
            if isinstance(given, bool | int | float) and str(argument.type) in ("Tensor", "Optional[Tensor]"):
                self.function = op.overloadpacket  # a number that was made a tensor on the way is one again here
        self.capturing = torch.cuda.is_current_stream_capturing()
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.written = [
            argument for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write
        ]
        self.device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if isinstance(kwargs.get("generator"), torch.Generator) and kwargs["generator"].device.type == "cuda":
            self.kwargs = kwargs | {"generator": drawing_as(kwargs["generator"])}

    def __str__(self):
        return f"{self.schema.name} on a simulated GPU"

    def __call__(self):
        error = library.last_error()
        if error:
            raise RuntimeError(f"error {error} of CUDA's was left behind, which {self.schema.name} met")
        self._grow_outputs()
        if self._waits():
            return self._at_once()
        if self.written:
            return self._in_place()
        if self.random or not any(each.is_cuda for each in self._tensors()):
            return arriving(self._run(lambda tensor: tensor))
        return self._into_new()

    def _tensors(self):
        return [each for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, torch.Tensor)]

    def _outputs(self):
        places = {argument.name: place for place, argument in enumerate(self.schema.arguments)}
        found = []
        for argument in self.written:
            place = places[argument.name]
            value = self.args[place] if place < len(self.args) else self.kwargs.get(argument.name)
            found += [value] if value is not None else []
        return found

    def _returned(self, outputs):
        count = len(self.schema.returns)
        return None if not count else outputs[0] if count == 1 else tuple(outputs)

    def _arguments(self, change, device="cpu"):
        args, kwargs = _on_device(change, (self.args, self.kwargs))
        if self.device is not None:
            kwargs["device"] = torch.device(device)
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = None
        return args, kwargs

    def _run(self, change, device="cpu"):
        args, kwargs = self._arguments(change, device)
        return self.function(*args, **kwargs)

    def _grow_outputs(self):
        """Outputs that come by name may have to grow."""
        named = [argument.name for argument in self.written if argument.kwarg_only]
        if any(isinstance(self.kwargs.get(name), torch.Tensor) for name in named):
            args, kwargs = self._arguments(without_memory, "meta")
            with contextlib.suppress(NotImplementedError):
                self.function(*args, **kwargs)
                for name in named:
                    if self.kwargs[name].shape != kwargs[name].shape:
                        self.kwargs[name].resize_(kwargs[name].shape)

    # ------------------------------------------------------------------------------------------------ waits
    def _copy(self):
        """(whether host memory of a copy is pageable, whether the host waits for it); None where this is no copy."""
        if self.name != "copy_" or self.args[0].device == self.args[1].device:
            return None
        asynchronous = self.kwargs.get("non_blocking") or (len(self.args) > 2 and self.args[2])
        host = self.args[0] if self.args[1].is_cuda else self.args[1]
        pageable = library.kind(host.data_ptr()) == 0 and host.numel() > 0
        if not host.is_cuda and host.dim() == 0 and host is self.args[1]:
            return False, False  # comes with the launch of a fill
        return pageable, not asynchronous or (pageable and host is self.args[0])

    def _waits(self):
        masks = self.name in INDEXING and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in self.args[1] or ()
        )
        to_host = self.device is not None and self.device.type == "cpu"
        copy = self._copy()
        to_device = self.name == "_to_copy" and not self.args[0].is_cuda and not self.kwargs.get("non_blocking")
        waits = self.name in WAITING or masks or to_host or to_device or (copy is not None and copy[1])
        if waits and torch.cuda.get_sync_debug_mode() == 2:
            raise RuntimeError(f"{self}: called a synchronizing CUDA operation")
        pageable = copy is not None and copy[0]
        if self.capturing and (pageable or (waits and not (copy and not copy[0]) and not to_device)):
            raise RuntimeError(f"{self}: waits for the GPU, or copies pageable memory, in a capture")
        return waits and not self.capturing

    def _at_once(self):
        timeline.submit(lambda: None)
        self._check_registrations()
        timeline.wait_for_stream()
        result = self._run(on_cpu)
        if self.written:
            return self._returned(self._outputs())
        if self.device is not None and self.device.type == "cpu":
            return _on_device(torch.clone, result)
        return arriving(result)

    # ------------------------------------------------------------------------------------------------ streams
    def _seen(self, tensor):
        """The memory of a tensor of the device, and of pinned memory in a copy; of all else what is there now."""
        if tensor.is_cuda:
            return on_cpu(tensor)
        copy = self._copy()
        return tensor if copy is not None and not copy[0] else tensor.clone()

    def _in_place(self):
        outputs, function = self._outputs(), self.function  # work must hold no tensor: it may be freed before it runs
        if self.schema.returns and not all(each.alias_info for each in self.schema.returns):
            raise NotImplementedError(f"{self}: it writes and returns")
        args, kwargs = self._arguments(self._seen)
        cost = 1.0
        if self._copy() is not None:
            self._check_registrations()
            cost += outputs[0].nbytes / LINK
        if self.random:
            drawn = self._run(lambda tensor: torch.empty_like(tensor, device="cpu"))
            timeline.submit(lambda: args[0].copy_(drawn))
        else:
            timeline.submit(lambda: function(*args, **kwargs), cost)
        return self._returned(outputs)

    def _check_registrations(self):
        for tensor in self._tensors():
            if not tensor.is_cuda and tensor.is_contiguous():
                if library.leaves_registration(tensor.data_ptr(), tensor.nbytes):
                    raise RuntimeError(f"{self}: invalid argument: host memory of a copy leaves its registration")

    def _into_new(self):
        args, kwargs, function = *self._arguments(self._seen), self.function
        try:
            shapes = self._run(without_memory, "meta")
        except Exception:  # no shape without a result
            if not self.capturing:
                library.wait(library.now(torch.cuda.current_stream().cuda_stream))
            shapes = function(*args, **kwargs)
        result = _on_device(on_device, shapes)
        targets = [on_cpu(each) for each in tree_leaves(result) if isinstance(each, torch.Tensor)]

        def work():
            found = [each for each in tree_leaves(function(*args, **kwargs)) if isinstance(each, torch.Tensor)]
            for target, each in zip(targets, found, strict=True):
                target.copy_(each)

        timeline.submit(work)
        return result


def sparse_call(op, *args, **kwargs):
    """An operator of sparse tensors, at once."""

    def to_cpu(tensor):
        if not tensor.is_sparse:
            return tensor.cpu()
        parts = tensor._indices().cpu(), tensor._values().cpu()
        return torch.sparse_coo_tensor(*parts, tensor.shape, is_coalesced=tensor.is_coalesced())

    def to_device(tensor):
        if not tensor.is_sparse:
            return tensor.cuda()
        parts = tensor._indices().cuda(), tensor._values().cuda()
        return torch.sparse_coo_tensor(*parts, tensor.shape, is_coalesced=tensor.is_coalesced())

    args, kwargs = _on_device(to_cpu, (args, kwargs))
    return _on_device(to_device, op(*args, **kwargs))


_installed = torch.library.Library("aten", "IMPL")


def install():
    for switch in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are replaced, which is what is wanted
        for name in torch._C._dispatch_get_all_op_names():
            namespace, _, name = name.partition("::")
            if namespace == "aten" and name not in NATIVE | ABSENT and not _is_view(name):
                if name == "copy_" or torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
                    _installed.impl(name, _caller(_overload(name)), "CUDA", allow_override=True)
        for name in ("_coalesce", "_to_dense"):
            _installed.impl(name, functools.partial(sparse_call, _overload(name)), "SparseCUDA", allow_override=True)
        _installed.impl("_fused_sdp_choice", lambda *args, **kwargs: 0, "CUDA", allow_override=True)
    text = torch._tensor_str._str
    torch._tensor_str._str = lambda self, *, tensor_contents=None: (
        f"<{self.dtype} {list(self.shape)} of the device>"
        if self.is_cuda
        else text(self, tensor_contents=tensor_contents)
    )


def _caller(op):
    return lambda *args, **kwargs: Call(op, args, kwargs)()


def _overload(name):
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _is_view(name):
    try:
        returns = _overload(name)._schema.returns
    except (AttributeError, RuntimeError):  # nothing that Python can call
        return True
    return bool(returns) and all(each.alias_info and not each.alias_info.is_write for each in returns)
