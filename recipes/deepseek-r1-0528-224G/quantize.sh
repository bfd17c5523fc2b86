#!/usr/bin/env bash
# deepseek-r1-0528, 220.50 GiB, 2.823 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-2]\.attn_k_b\.weight$=q5_0
^blk\.([3-9]|[1-5][0-9]|60)\.attn_k_b\.weight$=q6_0
^blk\.([0-9]|1[0-9]|[26]0|4[7-9]|5[1-9])\.attn_kv_a_mqa\.weight$=iq6_k
^blk\.(2[1-9]|3[0-9]|4[0-6]|50)\.attn_kv_a_mqa\.weight$=q8_0
^blk\.[0-5]\.attn_output\.weight$=iq4_kt
^blk\.(2[3-9]|3[0-9]|4[0-3])\.attn_output\.weight$=iq5_ks
^blk\.([6-9]|1[0-3]|5[4-9]|60)\.attn_output\.weight$=iq4_ks
^blk\.([14][4-9]|2[0-2]|5[0-3])\.attn_output\.weight$=iq4_k
^blk\.([0-7]|60)\.attn_q_a\.weight$=iq5_ks
^blk\.(2[1-9]|3[0-9]|4[0-5])\.attn_q_a\.weight$=iq6_k
^blk\.(19|20|4[6-8])\.attn_q_a\.weight$=q6_K
^blk\.([89]|1[0-8]|49|5[0-9])\.attn_q_a\.weight$=iq5_k
^blk\.[0-3]\.attn_q_b\.weight$=iq4_ks
^blk\.(1[1-9]|[2-4][0-9]|5[0-5])\.attn_q_b\.weight$=iq5_ks
^blk\.([4-9]|[16]0|5[6-9])\.attn_q_b\.weight$=iq4_k
^blk\.([0-9]|1[01]|5[6-9]|60)\.attn_v_b\.weight$=iq5_k
^blk\.(1[3-9]|[2-4][0-9]|5[0-3])\.attn_v_b\.weight$=iq6_k
^blk\.(12|5[45])\.attn_v_b\.weight$=q6_K

# Dense feed-forward
^blk\.[0-9]+\.ffn_(down|gate|up)\.weight$=iq4_kt

# Shared experts
^blk\.60\.ffn_(down|gate|up)_shexp\.weight$=q8_0
^blk\.([3-9]|[1-5][0-9])\.ffn_(gate|up)_shexp\.weight$=iq5_k
^blk\.([3-9]|[125][0-9]|3[01]|4[1-9])\.ffn_down_shexp\.weight$=iq5_k
^blk\.(3[2-9]|40)\.ffn_down_shexp\.weight$=q6_K

# Routed experts
^blk\.(1[0-9]|2[01])\.ffn_(gate|up)_exps\.weight$=iq2_kt
^blk\.2[2-5]\.ffn_(gate|up)_exps\.weight$=iq2_kl
^blk\.(2[6-9]|[3-5][0-9]|60)\.ffn_(gate|up)_exps\.weight$=iq3_kt
^blk\.[3-9]\.ffn_(gate|up)_exps\.weight$=iq1_kt
^blk\.2[01]\.ffn_down_exps\.weight$=iq2_kl
^blk\.(2[2-9]|[3-5][0-9]|60)\.ffn_down_exps\.weight$=iq3_kt
^blk\.[3-6]\.ffn_down_exps\.weight$=iq1_kt
^blk\.([7-9]|1[0-9])\.ffn_down_exps\.weight$=iq2_kt

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
