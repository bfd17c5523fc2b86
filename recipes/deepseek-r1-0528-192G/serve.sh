#!/usr/bin/env bash
# deepseek-r1-0528, 188.50 GiB, 2.413 bpw (ik), by quantmix 0.1.0
# Usage: serve.sh MODEL.gguf [more llama-server options]
set -euo pipefail
MODEL=${1:-${MODEL:?the quantized GGUF is the first argument}}
[[ $# -gt 0 ]] && shift
exec "${SERVER:-llama-server}" -m "$MODEL" \
  -ngl 999 \
  -c 32768 \
  -b 2048 \
  -ub 512 \
  -fa on \
  -ctk f16 \
  -ctv f16 \
  -mla 3 \
  -amb 256 \
  -np 1 \
  -cram 0 \
  "$@"
