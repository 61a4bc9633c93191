"""How many programs of a kernel a multiprocessor holds at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one, from the table of compute capabilities in the CUDA programming guide."""

    warps: int
    programs: int
    shared_bytes: int
    registers: int = 65_536
    partitions: int = 4  # that share registers and warps among them
    granule: int = 256  # registers that a warp gets at a time
    reserved_bytes: int = 1024  # of shared memory, for each program


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(warps=64, programs=32, shared_bytes=164 << 10),
    "sm_90": Multiprocessor(warps=64, programs=32, shared_bytes=228 << 10),
    "sm_100": Multiprocessor(warps=64, programs=32, shared_bytes=228 << 10),
}


def programs_in_flight(target: str, registers: int, warps: int, shared_bytes: int) -> int:
    """Programs that registers (of a thread), warps (of a program) and shared memory leave room for."""
    has = MULTIPROCESSORS[target]
    of_warp = -(-registers * 32 // has.granule) * has.granule
    by_registers = has.registers // has.partitions // of_warp * has.partitions // warps
    by_shared = has.shared_bytes // (shared_bytes + has.reserved_bytes)
    return min(has.programs, has.warps // warps, by_registers, by_shared)
