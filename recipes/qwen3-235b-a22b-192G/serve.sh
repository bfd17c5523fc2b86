#!/usr/bin/env bash
# qwen3-235b-a22b, 185.86 GiB, 6.791 bpw (ik), by quantmix 0.1.0
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
  -np 1 \
  -cram 0 \
  "$@"
