"""Run the gpu lane, or another command, on a GPU that is not there.

python -m tests.simulated_gpu [ARGUMENTS]      pytest's, such as files of tests; without files all of the lane
python -m tests.simulated_gpu faults           faults in the order of streams, which tests have to notice
python -m tests.simulated_gpu -- COMMAND       -- python -m tests.gpu --out DIR tests, for example
"""

import os
import subprocess
import sys

from .build import FOLDER, HERE, RUNTIME, build
from .faults import check

ROOT = HERE.parents[1]
PATIENCE = 600  # seconds of a test
#: Tests that are left out, and why.
BEYOND = {
    "tests/gpu/test_gradients.py::test_the_same_bits_again_and_for_a_part[5000]": "minutes in the executor",
    "tests/ranks/test_kernels.py": "NCCL",
}


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
    if arguments[:1] == ["faults"]:
        return min(1, check(ROOT, environment()))
    if arguments[:1] == ["--"]:
        command = arguments[1:]
    else:
        left_out = [word for name in BEYOND for word in ("--deselect", name)]
        words = ["--lane", "gpu", "--out", str(FOLDER), "--patience", str(PATIENCE), *left_out]
        command = [sys.executable, "-m", "pytest", *words, *arguments]
    (FOLDER / "log.txt").unlink(missing_ok=True)
    return subprocess.run(command, cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
