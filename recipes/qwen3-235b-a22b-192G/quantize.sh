#!/usr/bin/env bash
# qwen3-235b-a22b, 185.84 GiB, 6.790 bpw (ik), by quantmix 0.1.0
# Usage: quantize.sh [--dry-run] SOURCE.gguf OUT.gguf [IMATRIX]     (or SOURCE, OUT, IMATRIX in the
# environment; QUANTIZE names the program, THREADS the number of threads)
set -euo pipefail

options=()
while [[ ${1:-} == --* ]]; do options+=("$1"); shift; done
SOURCE=${1:-${SOURCE:?the source GGUF (bf16) is the first argument}}
OUT=${2:-${OUT:?the GGUF to write is the second argument}}
IMATRIX=${3:-${IMATRIX:-}}
QUANTIZE=${QUANTIZE:-llama-quantize}
THREADS=${THREADS:-$(nproc)}

custom=$(cat <<'RULES'
# Attention
^blk\.[0-9]+\.attn_(k|output|q|v)\.weight$=q8_0

# Routed experts
^blk\.([0-9]|[1-8][0-9]|9[01])\.ffn_(gate|up)_exps\.weight$=iq6_k
^blk\.9[23]\.ffn_(gate|up)_exps\.weight$=q8_0
^blk\.([0-9]|[1-7][0-9]|8[0-2])\.ffn_down_exps\.weight$=iq6_k
^blk\.(8[3-9]|9[0-3])\.ffn_down_exps\.weight$=q8_0

# Token embedding and output
^output\.weight$=q8_0
^token_embd\.weight$=q8_0
RULES
)
custom=$(grep -v '^#' <<<"$custom" | sed '/^$/d' | paste -sd, -)

# ik_llama.cpp reads the old imatrix format only; a GGUF imatrix is converted first.
if [[ -n $IMATRIX && $(head -c 4 -- "$IMATRIX") == GGUF ]]; then
  quantmix imatrix --convert "$IMATRIX" --out "${IMATRIX%.gguf}.dat" || exit
  IMATRIX="${IMATRIX%.gguf}.dat"
fi

[[ -n $IMATRIX ]] && options+=(--imatrix "$IMATRIX")
"$QUANTIZE" "${options[@]}" --custom-q "$custom" \
  "$SOURCE" "$OUT" IQ6_K "$THREADS"
