#!/usr/bin/env bash
# Make .venv with lichen in it, once for each state of pyproject.toml and constraints.txt.
# Usage: install.sh [dev]      LICHEN_PREBUILT=1: take llama.cpp ready-built, no compiler needed
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
venv=.venv
state=$(cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
stamp="$venv/.installed-${extra:-base}-$state"
[ -e "$stamp" ] && exit 0

python=
for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    command -v python3 >/dev/null || { echo "lichen: Python 3.11 or newer is needed: install the package python3" >&2; exit 1; }
    python=python3
fi
"$python" scripts/preflight.py ${LICHEN_PREBUILT:+--prebuilt}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
log=$venv/install.log
target=.
[ -z "$extra" ] || target=".[$extra]"
arguments=(install -c constraints.txt -e "$target")
[ -z "${LICHEN_PREBUILT:-}" ] || arguments+=(--prefer-binary --extra-index-url https://abetlen.github.io/llama-cpp-python/whl/cpu)
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
echo "Installing lichen into $venv (the first time llama.cpp is built: about $((12 / cores + 1)) minutes on $cores cores; log: $log)"
CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$cores} "$venv/bin/python" -m pip "${arguments[@]}" >"$log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null' INT TERM
started=$SECONDS
while kill -0 $pid 2>/dev/null; do
    sleep 1
    elapsed=$((SECONDS - started))
    [ $((elapsed % 15)) -ne 0 ] || [ $elapsed -eq 0 ] || echo "  ... ${elapsed} s: $(grep -E '^ *(Collecting|Building|Installing|Downloading)' "$log" | tail -n 1 | cut -c 1-70)"
done
if ! wait $pid; then
    tail -n 15 "$log" >&2
    echo "lichen: the installation failed; the lines above say why, the whole log is $log" >&2
    exit 1
fi
rm -f "$venv"/.installed-"${extra:-base}"-*
touch "$stamp"
