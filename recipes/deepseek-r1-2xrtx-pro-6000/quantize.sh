#!/usr/bin/env bash
# deepseek-r1, 186.43 GiB, 2.387 bpw (ik), by quantmix 0.1.0
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
^blk\.([0-5]|60)\.attn_k_b\.weight$=q5_0
^blk\.([6-9]|[1-5][0-9])\.attn_k_b\.weight$=q6_0
^blk\.[0-2]\.attn_kv_a_mqa\.weight$=iq5_k
^blk\.([3-9]|[1-5][0-9]|60)\.attn_kv_a_mqa\.weight$=iq6_k
^blk\.([0-8]|5[6-9]|60)\.attn_output\.weight$=iq4_kt
^blk\.(1[5-9]|[2-4][0-9])\.attn_output\.weight$=iq4_k
^blk\.(9|1[0-4]|5[0-5])\.attn_output\.weight$=iq4_ks
^blk\.([0-9]|[16]0|5[3-9])\.attn_q_a\.weight$=iq5_ks
^blk\.(1[1-9]|[24][0-9]|3[05-9]|5[0-2])\.attn_q_a\.weight$=iq5_k
^blk\.3[1-4]\.attn_q_a\.weight$=q6_K
^blk\.[01]\.attn_q_b\.weight$=iq4_kt
^blk\.(1[5-9]|[2-4][0-9])\.attn_q_b\.weight$=iq5_ks
^blk\.([2-4]|60)\.attn_q_b\.weight$=iq4_ks
^blk\.([5-9]|1[0-4]|5[0-9])\.attn_q_b\.weight$=iq4_k
^blk\.[01]\.attn_v_b\.weight$=iq5_ks
^blk\.(1[7-9]|[23][0-9])\.attn_v_b\.weight$=iq6_k
^blk\.([2-9]|1[0-6]|4[7-9]|5[0-9]|60)\.attn_v_b\.weight$=iq5_k
^blk\.4[0-6]\.attn_v_b\.weight$=q6_K

# Dense feed-forward
^blk\.[0-9]+\.ffn_(gate|up)\.weight$=iq3_k
^blk\.[01]\.ffn_down\.weight$=iq3_kt
^blk\.2\.ffn_down\.weight$=iq3_k

# Shared experts
^blk\.60\.ffn_(down|gate|up)_shexp\.weight$=q8_0
^blk\.(1[7-9]|2[0-9]|3[0-47-9]|4[0-2])\.ffn_(gate|up)_shexp\.weight$=iq5_k
^blk\.([3-9]|1[0-6]|3[56]|4[3-9]|5[0-9])\.ffn_(gate|up)_shexp\.weight$=iq5_ks
^blk\.(1[4-9]|[2-4][0-9]|5[0-6])\.ffn_down_shexp\.weight$=iq5_k
^blk\.([3-9]|1[0-3]|5[7-9])\.ffn_down_shexp\.weight$=iq5_ks

# Routed experts
^blk\.(1[1-9]|[23][0-9]|4[0-2]|5[3-9]|60)\.ffn_(gate|up)_exps\.weight$=iq2_kt
^blk\.([3-9]|10)\.ffn_(gate|up)_exps\.weight$=iq1_kt
^blk\.(4[3-9]|5[0-2])\.ffn_(gate|up)_exps\.weight$=iq2_kl
^blk\.[3-8]\.ffn_down_exps\.weight$=iq1_kt
^blk\.(3[125]|60)\.ffn_down_exps\.weight$=iq2_kl
^blk\.(3[346-9]|[45][0-9])\.ffn_down_exps\.weight$=iq3_kt
^blk\.(9|[12][0-9]|30)\.ffn_down_exps\.weight$=iq2_kt

# Token embedding and output
^output\.weight$=q6_K
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
  "$SOURCE" "$OUT" IQ2_KT "$THREADS"
