"""What stands in the place of another module: all that it had, but a table where it had an ``nn.Embedding``.

Submodules, parameters, buffers, hooks and attributes are the old module's own, under their old names. So optimizers,
ties, freezing, adapters around its projections and state dicts go on; the rows alone are no parameter any more.
"""

import numpy as np
import torch
from torch import nn

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.launching.tokens import ID_DTYPES
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES
from engram_kernels.ops.hash_rows import hash_lookup
from engram_kernels.ops.rows import lookup
from engram_kernels.tables.engram import EngramTable


class TableRows(nn.Module):
    """In the place of an ``nn.Embedding [rows, R]``: the table that its rows are in. Nothing calls it.

    In state dicts the rows are ``weight``, as they were. in_state_dict: False leaves them out of those that are made;
    one that is loaded must have them in any case, or they are reported as missing.
    """

    def __init__(self, table: EngramTable, in_state_dict: bool):
        super().__init__()
        self.table, self.in_state_dict = table, in_state_dict

    def extra_repr(self) -> str:
        return repr(self.table)

    def values(self) -> torch.Tensor:
        """``[rows, R]``: the table's own memory where its format is dense, else values in bfloat16."""
        self.table.wait_for_steps()
        if not self.table.format.scaled:
            return self.table.weight
        return lookup(self.table, torch.arange(self.table.rows, device=self.table.weight.device)[:, None])[:, 0]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_state_dict:
            destination[prefix + "weight"] = self.values()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        name = prefix + "weight"
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key != name]
        if name not in state_dict:
            missing_keys.append(name)
            return
        given, own = state_dict[name], self.values()
        if given.shape != own.shape:
            error_msgs.append(f"{name} must have shape {list(own.shape)}, got {list(given.shape)}")
        elif self.table.mapped or self.table.attached or self.table.format.scaled:
            if not torch.equal(given.to(own), own):
                error_msgs.append(f"{name} holds other rows than {self.table!r}, which is not written to: load a table")
        else:
            with torch.no_grad():
                own.copy_(given)


class DropIn(nn.Module):
    """Base of what modules of one family of models become. The class attributes say how the family is recognised."""

    looked_for: str  #: what its modules are, for errors
    embedding: str  #: path of the nn.Embedding within a module
    layer_number: str  #: attribute with the number of the model's layer
    called: tuple[str, ...]  #: submodules that forward calls as they are, with their hooks; of others it reads weights

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of this family, or looks so much like it that it must not be passed over in silence."""
        raise NotImplementedError

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        """ValueError, whose text starts with ``name``, where ours would compute something else than ``module``."""
        raise NotImplementedError

    def __init__(self, module: nn.Module, table: EngramTable, in_state_dict: bool):
        super().__init__()
        _adopt(self, module)
        *path, last = self.embedding.split(".")
        holder = self
        for name in path:
            old = holder._modules[name]
            holder._modules[name] = _adopt(type(old).__new__(type(old)), old)
            holder = holder._modules[name]
        holder._modules[last] = TableRows(table, in_state_dict)
        self.table = table
        self._plans: dict[torch.device, HashPlan] = {}

    def _make_plan(self) -> HashPlan:
        """The plan of this layer alone, from what the module knows of its hash."""
        raise NotImplementedError

    def _plan(self, device: torch.device) -> HashPlan:
        if device not in self._plans:
            plan = next(iter(self._plans.values()), None)
            self._plans[device] = (self._make_plan() if plan is None else plan).to(device)
        return self._plans[device]

    def _rows(self, ids, history, projection: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, S, C * R]`` in the dtype that ``projection`` takes: its own, or hidden's where it is quantised."""
        dtype = getattr(getattr(projection, "weight", hidden), "dtype", hidden.dtype)
        dtype = dtype if dtype in FLOAT_DTYPES else hidden.dtype
        out_dtype = None if dtype == torch.float64 else dtype
        rows = hash_lookup(ids, self._plan(ids.device), (self.table,), history=history, out_dtype=out_dtype)[0]
        return rows.flatten(-2).to(dtype)


def _adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """``new`` with all that ``old`` has, parameters and hooks shared, but a list of submodules of its own."""
    new.__dict__.update(vars(old))
    new.__dict__["_modules"] = dict(old._modules)
    return new


def as_token_ids(ids, device: torch.device) -> torch.Tensor:
    """Integers ``[B, S]`` of any kind (a slice, NumPy's, lists) as the ops take them. Ids are few: they are copied."""
    if not isinstance(ids, torch.Tensor):
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"replace_engram: token ids must be integers, got {ids.dtype}")
        ids = torch.from_numpy(np.array(ids, np.int64, order="C"))
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"replace_engram: token ids must be integers, got {ids.dtype}")
    return ids.to(device, ids.dtype if ids.dtype in ID_DTYPES else torch.int64).contiguous()


def own_class(module: nn.Module, base: type) -> bool:
    """Whether ``module`` is a ``base`` none of whose methods a subclass has overridden."""
    if not isinstance(module, base):
        return False
    lower = type(module).__mro__[: type(module).__mro__.index(base)]
    methods = {key for key, value in vars(base).items() if callable(value) and not key.startswith("__")}
    return not any(methods & set(vars(each)) for each in lower)


def check_common(family: type[DropIn], name: str, module: nn.Module) -> None:
    """ValueError where something would be lost with ``module``, or its embedding cannot be a table."""
    for path, each in module.named_modules():
        where = f"{name}.{path}" if path else name
        if any(path == called or path.startswith(called + ".") for called in family.called):
            continue
        if "forward" in vars(each) or each._compiled_call_impl is not None:
            raise ValueError(f"{where} has a forward of its own (of a hook, or compiled), which would not be called")
        hooks = (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks)
        if path and any(hooks):
            raise ValueError(f"{where} has hooks, which would not be called any more: remove them first")
    where, embedding = f"{name}.{family.embedding}", module.get_submodule(family.embedding)
    if not own_class(embedding, nn.Embedding) or set(dict(embedding.named_parameters())) != {"weight"}:
        raise ValueError(f"{where} must be an nn.Embedding with a weight alone, got {type(embedding).__name__}")
    if type(embedding.weight.detach()) is not torch.Tensor:
        raise ValueError(f"{where}.weight must be a whole tensor, got {type(embedding.weight.detach()).__name__}")
    for option, expected in (("max_norm", None), ("padding_idx", None), ("scale_grad_by_freq", False)):
        if getattr(embedding, option) != expected:
            raise ValueError(f"{where}.{option} must be {expected}, got {getattr(embedding, option)}")
