#!/usr/bin/env bash
# Collects in wheels/ what a GPU machine without a network lacks: Linux on x86-64 with Python 3.12, where torch,
# tokenizers, opencv, pandas, scikit-learn, tensorboard and pytest are installed, and the rest is not, or is another
# version than the tested one (transformers, peft).
#
#   tests/gpu/wheels.sh [FOLDER]        PYTHON=.venv/bin/python   builds DeepSpeed: needs torch, setuptools and wheel
#
# Versions are those of constraints.txt. Without the decoders of DICOM files that only packing needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-.venv/bin/python}
folder=${1:-wheels}
packages=(
    xformers transformers peft
    nvidia-cuda-runtime-cu12                                       # xformers' own, beside a torch for CUDA 13
    hjson pydantic pydantic-core annotated-types typing-inspection # DeepSpeed's own
    submitit gguf webdataset braceexpand openpyxl et-xmlfile
    pytest-timeout                                                 # whose limit pyproject.toml sets
    pydicom pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle python-gdcm # imported with the readers
)

pinned() { # the constraint of one package: constraints.txt may write its name with _ or -
    local line
    line=$(grep -iE "^${1//-/[-_]}==" constraints.txt) || { echo "constraints.txt: has no version of $1" >&2 && exit 1; }
    echo "$line"
}

mkdir -p "$folder"
rm -f "$folder"/*.whl
for package in "${packages[@]}"; do
    requirements+=("$(pinned "$package")")
done
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --dest "$folder" --only-binary :all: \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
    "${requirements[@]}"
# As in the Makefile: nothing is compiled, and the wheel serves any Python and any torch.
DS_IGNORE_CUDA_DETECTION=1 "$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$folder" "$(pinned deepspeed)"
if ! ls "$folder"/deepspeed-*-py3-none-any.whl > /dev/null; then
    echo "DeepSpeed was built with compiled kernels, which fit only this Python and this torch" >&2
    exit 1
fi
du -ch "$folder"/*.whl
