#!/usr/bin/env bash
# deepseek-r1-0528, 124.50 GiB, 1.594 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-2]\.attn_k_b\.weight$=mxfp4
^blk\.([3-9]|[1-5][0-9]|60)\.attn_k_b\.weight$=iq4_nl
^blk\.[01]\.attn_kv_a_mqa\.weight$=iq4_ks
^blk\.([2-6]|60)\.attn_kv_a_mqa\.weight$=iq4_k
^blk\.3[1-6]\.attn_kv_a_mqa\.weight$=iq5_k
^blk\.([7-9]|[1245][0-9]|3[07-9])\.attn_kv_a_mqa\.weight$=iq5_ks
^blk\.[0-9]+\.attn_output\.weight$=iq3_kt
^blk\.[01]\.attn_q_a\.weight$=iq3_kt
^blk\.(1[5-9]|2[0-6]|4[0-9]|5[0-2])\.attn_q_a\.weight$=iq4_ks
^blk\.(2[7-9]|3[0-9])\.attn_q_a\.weight$=iq4_k
^blk\.([4-9]|1[0-4]|5[3-9]|60)\.attn_q_a\.weight$=iq4_kt
^blk\.[23]\.attn_q_a\.weight$=iq3_k
^blk\.([0-9]|[15][0-9]|4[7-9]|60)\.attn_q_b\.weight$=iq3_kt
^blk\.(2[0-9]|3[07-9]|4[0-6])\.attn_q_b\.weight$=iq3_k
^blk\.3[1-6]\.attn_q_b\.weight$=iq4_kt
^blk\.0\.attn_v_b\.weight$=iq3_k
^blk\.(1[2-9]|[2-4][0-9]|5[0-5])\.attn_v_b\.weight$=iq4_k
^blk\.([1-8]|59|60)\.attn_v_b\.weight$=iq4_kt
^blk\.(9|1[01]|5[6-8])\.attn_v_b\.weight$=iq4_ks

# Dense feed-forward
^blk\.[0-9]+\.ffn_(down|gate|up)\.weight$=iq3_kt

# Shared experts
^blk\.60\.ffn_(down|gate|up)_shexp\.weight$=iq6_k
^blk\.(1[6-9]|[2-5][0-9])\.ffn_(gate|up)_shexp\.weight$=iq4_ks
^blk\.([3-9]|1[0-5])\.ffn_(gate|up)_shexp\.weight$=iq4_kt
^blk\.(1[5-9]|[2-5][0-9])\.ffn_down_shexp\.weight$=iq4_ks
^blk\.([3-9]|1[0-4])\.ffn_down_shexp\.weight$=iq4_kt

# Routed experts
^blk\.[0-9]+\.ffn_(gate|up)_exps\.weight$=iq1_s_r4
^blk\.([3-9]|[1-3][0-9]|[46]0|5[89])\.ffn_down_exps\.weight$=iq1_s_r4
^blk\.(4[1-9]|5[0-7])\.ffn_down_exps\.weight$=iq1_kt

# Token embedding and output
^output\.weight$=iq5_ks
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
  "$SOURCE" "$OUT" IQ1_KT "$THREADS"
