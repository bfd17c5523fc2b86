#!/usr/bin/env bash
# qwen3-235b-a22b, 121.87 GiB, 4.453 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-9]+\.attn_(k|v)\.weight$=q8_0
^blk\.[0-9]+\.attn_output\.weight$=iq6_k
^blk\.0\.attn_q\.weight$=iq5_k
^blk\.(1[124-9]|[2-8][0-9]|9[0-3])\.attn_q\.weight$=iq6_k
^blk\.([1-9]|1[03])\.attn_q\.weight$=q6_K

# Routed experts
^blk\.([0-9]|[1-3][0-9]|4[0-6])\.ffn_(gate|up)_exps\.weight$=iq4_kt
^blk\.(4[7-9]|5[0-9]|60)\.ffn_(gate|up)_exps\.weight$=iq4_ks
^blk\.(6[1-9]|7[0-9]|80)\.ffn_(gate|up)_exps\.weight$=iq4_k
^blk\.(8[1-9]|9[0-3])\.ffn_(gate|up)_exps\.weight$=iq5_ks
^blk\.([0-9]|[12][0-9]|3[0-7])\.ffn_down_exps\.weight$=iq4_kt
^blk\.(3[89]|4[0-9])\.ffn_down_exps\.weight$=iq4_ks
^blk\.(7[6-9]|8[0-9]|9[0-2])\.ffn_down_exps\.weight$=iq5_ks
^blk\.([56][0-9]|7[0-5])\.ffn_down_exps\.weight$=iq4_k
^blk\.93\.ffn_down_exps\.weight$=iq5_k

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
  "$SOURCE" "$OUT" IQ4_KT "$THREADS"
