"""Compile the stand-ins for CUDA's runtime and driver against the headers that come with torch and Triton."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE / "libraries"
FOLDER = HERE.parents[1] / "build" / "simulated_gpu"
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"


def build():
    """The folder that holds both libraries, made anew where a source is newer."""
    sources = [*SOURCES.iterdir(), Path(__file__)]
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    made = FOLDER / "made_for"  # last, so that it says that all was made
    if made.exists() and made.read_text() == str(packages):
        if made.stat().st_mtime > max(source.stat().st_mtime for source in sources):
            return FOLDER
    headers = packages / "nvidia" / "cu13" / "include"
    if not headers.exists():
        raise SystemExit(f"a simulated GPU needs torch's build for CUDA 13, whose headers would be in {headers}")
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            raise SystemExit(f"a simulated GPU is compiled with {tool}, which is not here (Debian: apt install g++)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Triton's folder for what nvidia's leaves out: crt/.
    include = [f"-I{headers}", f"-I{packages / 'triton' / 'backends' / 'nvidia' / 'include'}"]

    def compile_library(name, *parts):
        options = ("-O1", "-g", "-fPIC", "-shared", "-std=c++17", "-Wall", f"-Wl,-soname,{name}")
        subprocess.run(["g++", *options, *include, *map(str, parts), "-o", str(FOLDER / name)], check=True)

    parts = [SOURCES / f"{name}.cpp" for name in ("host", "device", "memory", "streams")]
    runtime = (*parts, f"-Wl,--version-script={SOURCES / 'exports.map'}", "-ldl")
    compile_library(RUNTIME, *runtime)
    refused = FOLDER / "refused.cpp"
    refused.write_text(refusals(packages))
    compile_library(RUNTIME, refused, *runtime)
    compile_library(DRIVER, SOURCES / "driver.cpp", f"-L{FOLDER}", f"-l:{RUNTIME}")
    link = FOLDER / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(DRIVER)
    made.write_text(str(packages))
    return FOLDER


def refusals(packages):
    """C++: each function that torch's libraries ask of the runtime and the stand-in has not, which says so."""
    wanted = set()
    for library in sorted((packages / "torch" / "lib").glob("*.so")):
        wanted |= {name for name in symbols("--undefined-only", library) if name.endswith(f"@{RUNTIME}")}
    names = {name.split("@")[0] for name in wanted} - {
        name.split("@")[0] for name in symbols("--defined-only", FOLDER / RUNTIME)
    }
    lines = ['extern "C" int simulated_refuse(const char* name);']
    lines += [f'extern "C" int {name}() {{ return simulated_refuse("{name}"); }}' for name in sorted(names)]
    return "\n".join(lines) + "\n"


def symbols(option, library):
    listed = subprocess.run(["nm", "-D", option, str(library)], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in listed.splitlines() if line.strip()]
