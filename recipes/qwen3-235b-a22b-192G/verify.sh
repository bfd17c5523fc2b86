#!/usr/bin/env bash
# qwen3-235b-a22b, 185.86 GiB, 6.791 bpw (ik), by quantmix 0.1.0
# Usage: verify.sh MODEL.gguf [wiki.test.raw]     (`quantmix fetch-corpus` gets the text)
set -euo pipefail
MODEL=${1:-${MODEL:?the quantized GGUF is the first argument}}
CORPUS=${2:-wiki.test.raw}
exec "${PERPLEXITY:-llama-perplexity}" -m "$MODEL" -f "$CORPUS" \
  -c 512 \
  --no-escape \
  -ngl 999 \
  -fa on
