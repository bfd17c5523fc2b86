#!/usr/bin/env bash
# qwen3-235b-a22b, 185.86 GiB, 6.791 bpw (ik), by quantmix 0.1.0
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
^blk\.([1-46-9]|1[0-9]|2[0-2])\.ffn_(gate|up)_exps\.weight$=q6_K
^blk\.(2[3-9]|[3-7][0-9]|8[0-8])\.ffn_(gate|up)_exps\.weight$=iq6_k
^blk\.[05]\.ffn_(gate|up)_exps\.weight$=iq5_k
^blk\.(89|9[0-3])\.ffn_(gate|up)_exps\.weight$=q8_0
^blk\.0\.ffn_down_exps\.weight$=q6_K
^blk\.([1-9]|[1-7][0-9]|8[0-4])\.ffn_down_exps\.weight$=iq6_k
^blk\.(8[5-9]|9[0-3])\.ffn_down_exps\.weight$=q8_0

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
