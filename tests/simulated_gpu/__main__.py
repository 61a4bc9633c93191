"""``python -m tests.simulated_gpu [ARGUMENTS]``: the gpu lane on a GPU that is not there; arguments are pytest's.

``python -m tests.simulated_gpu -- COMMAND`` runs another command there, ``-- python -m tests.gpu`` for example.
"""

import os
import subprocess
import sys

from .build import FOLDER, HERE, RUNTIME, build

ROOT = HERE.parents[1]


def environment():
    """What a process needs to find the GPU, and those that it starts."""
    folder = build()
    paths = [str(HERE / "children"), str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SIMULATED_GPU_LOG": str(FOLDER / "log.txt"),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        # Kernels are compiled in the process that launches them, by Triton's own launcher.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",
        "OMP_NUM_THREADS": "1",
    }


def main(arguments):
    if arguments[:1] == ["--"]:
        command = arguments[1:]
    else:
        command = [sys.executable, "-m", "pytest", "--lane", "gpu", "--out", str(FOLDER), *arguments]
    (FOLDER / "log.txt").unlink(missing_ok=True)
    return subprocess.run(command, cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
