"""Swap the Engram modules of a model for ours. ``FAMILIES`` lists whose: what each looks for, and what comes of it."""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from engram_kernels.geometry.choices import Placement
from engram_kernels.geometry.kinds import AnyOf, Instance, Keyed, Many, OneOf, Optional, Whole, takes
from engram_kernels.geometry.row_format import format_of
from engram_kernels.tables.engram import EngramTable
from engram_kernels.tables.placement import PLACEMENTS

from .demo import DemoEngram
from .drop_in import DropIn, TableRows, check_common
from .qwen import QwenEngram

#: What modules become, by family. The first that a module resembles is its own.
FAMILIES: tuple[type[DropIn], ...] = (QwenEngram, DemoEngram)


class Replaced(dict):
    """{name: the module that was replaced}. tables: {name: the table that its rows are in now}."""

    def __init__(self, model: nn.Module, found: Mapping[str, nn.Module], drop_ins: Mapping[str, DropIn]):
        super().__init__(found)
        self.tables = {name: drop_in.table for name, drop_in in drop_ins.items()}
        self._model, self._drop_ins = model, dict(drop_ins)
        self._versions = {name: table.version for name, table in self.tables.items()}

    def undo(self) -> None:
        """Put the old modules back, with what was trained since: rows too, unless their tables were given.

        Their embeddings are on the device and in the dtype that they had: undo before the model is moved or cast.
        ValueError, and nothing is changed, where the model has something else in their places by now.
        """
        for name, drop_in in self._drop_ins.items():
            if self._model.get_submodule(name) is not drop_in:
                raise ValueError(f"Replaced.undo: {name} is no longer the module that replace_engram put there")
        for name, drop_in in self._drop_ins.items():
            _put(self._model, name, self[name].train(drop_in.training))
            rows, table = drop_in.get_submodule(drop_in.embedding), drop_in.table
            weight = self[name].get_submodule(drop_in.embedding).weight
            if rows.in_state_dict and not table.closed and table.version != self._versions[name]:
                values = rows.values()
                if values.data_ptr() != weight.data_ptr():
                    with torch.no_grad():
                        weight.copy_(values)


@takes(
    model=Instance(nn.Module),
    placement=Optional(OneOf(*PLACEMENTS)),
    tables=Optional(Keyed(Whole(0), Instance(EngramTable))),
    optimizer=Optional(AnyOf(Instance(torch.optim.Optimizer), Many())),
)
def replace_engram(
    model: nn.Module,
    *,
    placement: Placement | None = None,
    tables: Mapping[int, EngramTable] | None = None,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> Replaced:
    """Replace every Engram module of ``model`` by ours; returns {name: the module that was replaced}, with ``undo()``.

    Modules of transformers' Qwen PLE (``Qwen4ExpTextPLELayer``) and of the DeepSeek demo's shape. Calls, results,
    parameters and names in state dicts stay; rows go from an ``nn.Embedding`` to an :class:`EngramTable`, which is no
    parameter. It is trainable (``requires_row_grad_``) where the embedding was. Embeddings that were one stay one.
    placement: of the tables, as for :class:`EngramTable`; "cpu" shares the embedding's memory, "device" does where it
    is on that device already, "host" copies it.
    tables: in its place, {number of the model's layer: its table}, for a model whose embeddings were never loaded (on
    the meta device). Such rows are not in state dicts that ``model`` makes, but in those of :func:`export_state`.
    optimizer: one or several made before, to be told which of their parameters they do not train any more.

    UserWarning where an embedding had a gradient, or is an optimizer's.
    ValueError, and nothing is replaced, where there is no such module, or one that looks like it differs in what it
    computes, or would lose something: its hooks, a tie of its embedding, a gradient that the placement cannot have.
    """
    if (placement is None) == (tables is None):
        raise ValueError("replace_engram: expected either placement or tables, got both or neither")
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    optimizers = [] if optimizers is None else list(optimizers)
    for place, each in enumerate(optimizers):
        Instance(torch.optim.Optimizer).check("replace_engram", f"optimizer[{place}]", each)
    found = _found(model)
    by_module: dict[nn.Module, tuple[str, type[DropIn]]] = {}
    for name, (module, family) in found.items():
        by_module.setdefault(module, (name, family))
    _check(model, found, by_module)
    _warn(by_module, optimizers)
    made = _made_tables(by_module, placement) if tables is None else _given_tables(by_module, tables)
    drop_ins = {module: family(module, made[module], tables is None) for module, (_, family) in by_module.items()}
    for name, (module, _) in found.items():
        _put(model, name, drop_ins[module])
    modules = {name: module for name, (module, _) in found.items()}
    return Replaced(model, modules, {name: drop_ins[module] for name, module in modules.items()})


@takes(model=Instance(nn.Module))
def export_state(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    """``model.state_dict(**options)`` with the rows of all tables, under the names that their embeddings had.

    Rows of dense formats are the tables' own memory, others are dequantised to bfloat16. ValueError where a table was
    closed.
    """
    left_out = [module for module in model.modules() if isinstance(module, TableRows) and not module.in_state_dict]
    try:
        for rows in left_out:
            rows.in_state_dict = True
        return model.state_dict(**options)
    finally:
        for rows in left_out:
            rows.in_state_dict = False


def _found(model: nn.Module) -> dict[str, tuple[nn.Module, type[DropIn]]]:
    """Modules that resemble a family's, under every name that they have."""
    found, done = {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        family = next((family for family in FAMILIES if family.resembles(module)), None)
        if isinstance(module, DropIn):
            done.append(name)
        elif family is not None:
            found[name] = module, family
    if "" in found:
        raise ValueError("replace_engram: model is itself an Engram module; expected a model that contains some")
    if not found:
        looked_for = "; ".join(family.looked_for for family in FAMILIES)
        already = f" ({', '.join(done)}: replaced already)" if done else ""
        raise ValueError(f"replace_engram: {type(model).__name__} has no module of these kinds{already}: {looked_for}")
    return found


def _check(model: nn.Module, found: dict, by_module: dict) -> None:
    """ValueError that names every module that cannot be replaced, and those that could."""
    right, wrong = [], []
    for module, (name, family) in by_module.items():
        try:
            family.check(name, module)
            check_common(family, name, module)
            _check_ties(model, name, module, family, by_module)
            right.append(name)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        others = f" (of the right kind: {', '.join(right)})" if right else ""
        raise ValueError(f"replace_engram: {'; '.join(wrong)}. Nothing was replaced{others}")


def _check_ties(model: nn.Module, name: str, module: nn.Module, family: type[DropIn], by_module: dict) -> None:
    """ValueError where something else than another embedding to be replaced has the embedding's weight as well."""
    weight = _embedding(module, family).weight
    embeddings = {_embedding(other, kind) for other, (_, kind) in by_module.items()}
    for path, owner in model.named_modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter is weight and owner not in embeddings:
                raise ValueError(f"{name}.{family.embedding}.weight is {path}.{key} too, and cannot be a table")


def _made_tables(by_module: dict, placement: str) -> dict[nn.Module, EngramTable]:
    """A table of each module's rows; one for those that share an embedding's weight. All or none."""
    by_weight: dict[int, EngramTable] = {}
    made = {}
    try:
        for module, (name, family) in by_module.items():
            weight = _embedding(module, family).weight
            if id(weight) not in by_weight:
                by_weight[id(weight)] = _table(f"{name}.{family.embedding}", weight, placement, module)
            made[module] = by_weight[id(weight)]
    except BaseException:
        for table in by_weight.values():
            table.close()
        raise
    return made


def _table(name: str, weight: nn.Parameter, placement: str, module: nn.Module) -> EngramTable:
    if weight.is_meta:
        raise ValueError(f"replace_engram: {name}.weight is on the meta device and has no rows: pass tables=")
    device = None
    if placement == "device":  # the GPU that the rest of the module is on
        device = next((p.device for p in (weight, *module.parameters()) if p.is_cuda), None)
    try:
        format_of(weight, None, "EngramTable").format.check_width(weight.shape[1], "EngramTable")
        table = EngramTable.from_tensors(weight.detach(), placement=placement, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"replace_engram: {name}.weight cannot be a table: {error}") from None
    if weight.requires_grad:
        try:
            table.requires_row_grad_()
        except ValueError as error:
            table.close()
            text = f"{name}.weight requires a gradient (freeze it with requires_grad_(False), or place it elsewhere)"
            raise ValueError(f"replace_engram: {text}: {error}") from None
    return table


def _given_tables(by_module: dict, tables: Mapping[int, EngramTable]) -> dict[nn.Module, EngramTable]:
    """The tables given, by module. Each must have the rows of its module's embedding."""
    layers = {module: getattr(module, family.layer_number) for module, (_, family) in by_module.items()}
    if set(tables) != set(layers.values()):
        wanted = sorted(set(layers.values()))
        raise ValueError(f"replace_engram: tables must be of layers {wanted}, got {sorted(tables)}")
    for module, (name, family) in by_module.items():
        table, shape = tables[layers[module]], tuple(_embedding(module, family).weight.shape)
        if (table.rows, table.width) != shape:
            wanted = f"{shape[0]} rows of {shape[1]} elements"
            raise ValueError(f"replace_engram: {name} needs a table of {wanted}, got {table!r}")
    return {module: tables[layer] for module, layer in layers.items()}


def _warn(by_module: dict, optimizers: list[torch.optim.Optimizer]) -> None:
    held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    for module, (name, family) in by_module.items():
        weight = _embedding(module, family).weight
        if weight.grad is not None or id(weight) in held:
            why = "is a parameter of the optimizer" if id(weight) in held else "had a gradient"
            warnings.warn(
                f"replace_engram: {name}.{family.embedding}.weight {why}, and no optimizer made before trains its rows "
                "any more: they are in a table, for RowAdagrad or RowAdam",
                stacklevel=4,
            )


def _embedding(module: nn.Module, family: type[DropIn]) -> nn.Embedding:
    return module.get_submodule(family.embedding)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
