#!/usr/bin/env bash
# qwen3-235b-a22b, 89.87 GiB, 3.284 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-9]+\.attn_k\.weight$=iq6_k
^blk\.([0-9]|[1-8][0-9]|9[0-2])\.attn_output\.weight$=iq5_ks
^blk\.93\.attn_output\.weight$=iq5_k
^blk\.([0-9]|1[0-6]|22)\.attn_q\.weight$=iq4_k
^blk\.(1[7-9]|2[013-9]|[3-8][0-9]|9[0-3])\.attn_q\.weight$=iq5_ks
^blk\.([0-9]|[1-8][0-9]|9[0-2])\.attn_v\.weight$=iq6_k
^blk\.93\.attn_v\.weight$=q8_0

# Routed experts
^blk\.[02-7]\.ffn_(gate|up)_exps\.weight$=iq2_kt
^blk\.8\.ffn_(gate|up)_exps\.weight$=iq2_kl
^blk\.8[2-4]\.ffn_(gate|up)_exps\.weight$=iq3_k
^blk\.(8[5-9]|9[0-3])\.ffn_(gate|up)_exps\.weight$=iq4_kt
^blk\.([19]|[1-7][0-9]|8[01])\.ffn_(gate|up)_exps\.weight$=iq3_kt
^blk\.([0-9]|[1-6][0-9]|7[0-5])\.ffn_down_exps\.weight$=iq3_kt
^blk\.7[6-9]\.ffn_down_exps\.weight$=iq3_k
^blk\.(8[0-9]|9[0-2])\.ffn_down_exps\.weight$=iq4_kt
^blk\.93\.ffn_down_exps\.weight$=iq4_ks

# Token embedding and output
^output\.weight$=iq6_k
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
  "$SOURCE" "$OUT" IQ3_KT "$THREADS"
