"""Which kernels can show the order of their warps, read from the machine code.

Warps that share memory, and warps that load what another stores back: a value smaller than a tile is replicated, so
that each warp loads it and one stores it.
"""

import re

_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*);", re.M)
_REGISTER = re.compile(r"%\w+")
# Operands of these that may be pointers; the result is one then. All other results are numbers.
_POINTERS = {"add": (1, 2), "sub": (1,), "mov": (1,), "selp": (1, 2), "mad": (3,), "cvta": (1,), "or": (1, 2)}


def takes_orders(text):
    """Whether the order of warps could show in what a kernel leaves."""
    return warps(text) > 1 and (".shared" in re.sub(r"\.extern \.shared.*", "", text) or bool(modified(text)))


def warps(text):
    return -(-int(re.search(r"\.reqntid (\d+)", text)[1]) // 32)


def modified(text):
    """What a kernel both loads from and stores to: parameters, ``*parameter`` for an address that it loaded."""
    origins, moves, accesses = {}, [], {"load": [], "store": []}
    for operation, operands in _INSTRUCTION.findall(text):
        parts = _split(operands)
        base = operation.split(".")[0]
        if operation.startswith("ld.param"):
            origins[parts[0]] = {parts[1].strip("[] ").split("+")[0].strip()}
        elif operation.startswith(("ld.global", "cp.async")) and "[" in operands:
            source = _REGISTER.findall(parts[-1] if base == "ld" else parts[1])[:1]
            accesses["load"].append(source)
            if ".b64" in operation or ".u64" in operation:
                moves += [(target, source, "*") for target in _REGISTER.findall(parts[0])]
        elif operation.startswith(("st.global", "atom.global", "red.global")):
            address = _REGISTER.findall(next(part for part in parts if part.startswith("[")))[:1]
            accesses["store"].append(address)
            if base != "st":
                accesses["load"].append(address)
        elif base in _POINTERS and ("64" in operation or "wide" in operation):
            sources = [name for place in _POINTERS[base] for name in _REGISTER.findall(parts[place])]
            moves.append((parts[0], sources, ""))
    grown = True
    while grown:
        grown = False
        for target, sources, mark in moves:
            found = {mark + origin for source in sources for origin in origins.get(source, ())}
            found = {origin for origin in found if not origin.startswith("**")}
            if not found <= origins.get(target, set()):
                origins.setdefault(target, set()).update(found)
                grown = True
    loaded, stored = (
        {origin for registers in accesses[kind] for register in registers for origin in origins.get(register, ())}
        for kind in ("load", "store")
    )
    return loaded & stored


def _split(operands):
    """At the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", operands)]
