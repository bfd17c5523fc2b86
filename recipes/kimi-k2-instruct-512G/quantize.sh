#!/usr/bin/env bash
# kimi-k2-instruct, 509.30 GiB, 4.262 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-9]+\.attn_(k_b|kv_a_mqa|v_b)\.weight$=q8_0
^blk\.([0-9]|1[0-6]|5[1-9]|60)\.attn_output\.weight$=iq6_k
^blk\.(1[7-9]|[2-4][0-9]|50)\.attn_output\.weight$=q8_0
^blk\.1\.attn_q_a\.weight$=iq6_k
^blk\.([02-9]|[1-5][0-9]|60)\.attn_q_a\.weight$=q8_0
^blk\.([0-8]|59|60)\.attn_q_b\.weight$=iq6_k
^blk\.(9|[1-4][0-9]|5[0-8])\.attn_q_b\.weight$=q8_0

# Dense feed-forward
^blk\.[0-9]+\.ffn_(down|gate|up)\.weight$=iq5_k

# Shared experts
^blk\.[0-9]+\.ffn_(down|gate|up)_shexp\.weight$=q8_0

# Routed experts
^blk\.[1-3]\.ffn_(gate|up)_exps\.weight$=iq3_kt
^blk\.(2[1-9]|3[0-7]|5[5-9]|60)\.ffn_(gate|up)_exps\.weight$=iq4_ks
^blk\.(3[89]|4[0-9]|5[0-4])\.ffn_(gate|up)_exps\.weight$=iq4_k
^blk\.([6-9]|1[0-9]|20)\.ffn_(gate|up)_exps\.weight$=iq4_kt
^blk\.[45]\.ffn_(gate|up)_exps\.weight$=iq3_k
^blk\.1\.ffn_down_exps\.weight$=iq3_kt
^blk\.(1[89]|2[0-8])\.ffn_down_exps\.weight$=iq4_ks
^blk\.([4-9]|1[0-7])\.ffn_down_exps\.weight$=iq4_kt
^blk\.[23]\.ffn_down_exps\.weight$=iq3_k
^blk\.(29|[3-5][0-9]|60)\.ffn_down_exps\.weight$=iq4_k

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
  "$SOURCE" "$OUT" IQ4_K "$THREADS"
