#!/usr/bin/env bash
# deepseek-r1, 186.43 GiB, 2.387 bpw (ik), by quantmix 0.1.0
# Usage: verify.sh MODEL.gguf [wiki.test.raw]     (`quantmix fetch-corpus` gets the text)
set -euo pipefail
MODEL=${1:-${MODEL:?the quantized GGUF is the first argument}}
CORPUS=${2:-wiki.test.raw}
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export CUDA_VISIBLE_DEVICES=0,1
exec "${PERPLEXITY:-llama-perplexity}" -m "$MODEL" -f "$CORPUS" \
  -c 512 \
  --no-escape \
  -ngl 999 \
  -sm layer \
  -ts 50,50 \
  -fa on \
  -mla 3 \
  -amb 256
