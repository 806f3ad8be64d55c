#!/usr/bin/env bash
# Draws docs/rate-distortion.svg and prints the table of the README: all-MiniLM-L6-v2 compressed, beside every baseline.
# Text to calibrate on: paragraphs of the Python reference, which every Python carries. Text to judge on: the 64
# sentences of benchmarks/. Run: docs/rate-distortion.sh FOLDER, in the environment of `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${1:?a folder for the compressed models}
PYTHON=${PYTHON:-.venv/bin/python}
surgery() { "$PYTHON" -m spectral_surgery "$@"; }
compressed() { [ -e "$2" ] || surgery compress "$MODEL" "$2" --bits "$1" "${@:3}" --resume --quiet >&2; }

MODEL=$("$PYTHON" -c 'from benchmarks.weights import checkpoint_folder; print(checkpoint_folder())')
TRAIN=$WORK/reference.txt
"$PYTHON" -c "
from pathlib import Path
from benchmarks.reference_text import write_passages
write_passages(Path('$TRAIN'), 192)"

for BITS in 2 3 4 6; do compressed "$BITS" "$WORK/$BITS-bit"; done
for BITS in 2 3 4; do compressed "$BITS" "$WORK/$BITS-bit-calibrated" --calibrate "$TRAIN"; done
surgery eval "$MODEL" "$WORK"/?-bit "$WORK"/?-bit-calibrated --text benchmarks/sentences.txt \
  --baseline all --bits 4 --calibrate "$TRAIN" --plot docs/rate-distortion.svg
sed -i '/<!-- model -->/,/<\/g>/d' docs/rate-distortion.svg # the title, which is the name of the folder
