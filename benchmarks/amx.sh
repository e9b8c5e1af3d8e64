#!/usr/bin/env bash
# The figures of docs/data/speed.md for processors with AMX, in about ten minutes on one core: ./benchmarks/amx.sh [FOLDER]
# Writes a JSON report for each run to FOLDER (default: amx). Each run is interleaved; compare within a run only.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-amx}
mkdir -p "$folder"
cadsurgery --version | tee "$folder/version.txt"
grep -q 'kernels amx' "$folder/version.txt" || { echo "this processor has no AMX, or it is capped" >&2; exit 1; }
common=(--fill linear --fractions 1,0.34,0 --threads 1 --set processor_time=true)
for network in resnet50 mobilenet_v2; do
  echo "== $network, bfloat16, beside OpenVINO"
  cadsurgery bench -m "$network" --dtype bfloat16 --against openvino "${common[@]}" --rounds 4 --json \
    > "$folder/$network-bfloat16.json"
  echo "== $network, bfloat16, without tiles"
  CADSURGERY_ISA=avx512bf16 cadsurgery bench -m "$network" --dtype bfloat16 "${common[@]}" --rounds 3 --json \
    > "$folder/$network-bfloat16-avx512bf16.json"
  echo "== $network, int8, in OpenVINO with kernels"
  cadsurgery bench -m "$network" --dtype int8 --runtime openvino-kernels "${common[@]}" --rounds 4 --json \
    > "$folder/$network-int8-openvino-kernels.json"
done
for engine in onnx-kernels openvino-kernels; do
  echo "== mobilenet_v2, float32, in $engine"
  cadsurgery bench -m mobilenet_v2 --runtime "$engine" "${common[@]}" --rounds 6 --json \
    > "$folder/mobilenet_v2-float32-$engine.json"
done
