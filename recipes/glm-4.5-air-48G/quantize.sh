#!/usr/bin/env bash
# glm-4.5-air, 43.89 GiB, 3.413 bpw (ik), by quantmix 0.1.0
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
^blk\.46\.attn_(k|output|q|v)\.weight$=q4_0
^blk\.([0-9]|[12][0-9]|3[0-3])\.attn_k\.weight$=iq6_k
^blk\.(3[4-9]|4[0-5])\.attn_k\.weight$=q8_0
^blk\.([0-9]|[12][0-9]|3[01])\.attn_output\.weight$=iq5_ks
^blk\.(3[2-9]|4[0-5])\.attn_output\.weight$=iq5_k
^blk\.[0-7]\.attn_q\.weight$=iq4_k
^blk\.([89]|[1-3][0-9]|4[0-5])\.attn_q\.weight$=iq5_ks
^blk\.([0-9]|1[0-9]|2[0-7])\.attn_v\.weight$=iq6_k
^blk\.(2[89]|3[0-9]|4[0-5])\.attn_v\.weight$=q8_0

# Dense feed-forward
^blk\.[0-9]+\.ffn_(gate|up)\.weight$=iq5_ks
^blk\.[0-9]+\.ffn_down\.weight$=q5_0

# Shared experts
^blk\.46\.ffn_(down|gate|up)_shexp\.weight$=q4_0
^blk\.([1-9]|[1-3][0-9]|4[0-2])\.ffn_(gate|up)_shexp\.weight$=iq6_k
^blk\.4[3-5]\.ffn_(gate|up)_shexp\.weight$=q8_0
^blk\.([1-9]|[12][0-9]|3[0-4])\.ffn_down_shexp\.weight$=q6_0
^blk\.(3[5-9]|4[0-5])\.ffn_down_shexp\.weight$=q8_0

# Routed experts
^blk\.46\.ffn_(down|gate|up)_exps\.weight$=q4_0
^blk\.([1-9]|1[0-9]|2[0-4])\.ffn_(gate|up)_exps\.weight$=iq2_ks
^blk\.(2[5-9]|3[0-4])\.ffn_(gate|up)_exps\.weight$=iq3_kt
^blk\.(3[5-9]|4[01])\.ffn_(gate|up)_exps\.weight$=iq3_k
^blk\.4[2-4]\.ffn_(gate|up)_exps\.weight$=iq4_kt
^blk\.45\.ffn_(gate|up)_exps\.weight$=iq4_ks
^blk\.[1-5]\.ffn_down_exps\.weight$=iq1_m_r4
^blk\.(3[5-9]|4[0-5])\.ffn_down_exps\.weight$=iq4_nl
^blk\.([6-9]|[12][0-9]|3[0-4])\.ffn_down_exps\.weight$=mxfp4

# Multi-token prediction
^blk\.[0-9]+\.(nextn\.eh_proj|nextn\.embed_tokens|nextn\.shared_head_head)\.weight$=q4_0

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
  "$SOURCE" "$OUT" MXFP4 "$THREADS"
