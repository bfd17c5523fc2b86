#!/usr/bin/env bash
# deepseek-r1-0528, 188.50 GiB, 2.413 bpw (ik), by quantmix 0.1.0
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
^blk\.([0-9]|59|60)\.attn_k_b\.weight$=q5_0
^blk\.([1-4][0-9]|5[0-8])\.attn_k_b\.weight$=q6_0
^blk\.[0-4]\.attn_kv_a_mqa\.weight$=iq5_k
^blk\.([5-9]|[1-5][0-9]|60)\.attn_kv_a_mqa\.weight$=iq6_k
^blk\.[01]\.attn_output\.weight$=iq3_kt
^blk\.(1[5-9]|2[0-7]|39|4[0-9]|5[0-2])\.attn_output\.weight$=iq4_ks
^blk\.(2[89]|3[0-8])\.attn_output\.weight$=iq4_k
^blk\.([4-9]|1[0-4]|5[3-9]|60)\.attn_output\.weight$=iq4_kt
^blk\.[23]\.attn_output\.weight$=iq3_k
^blk\.[01]\.attn_q_a\.weight$=iq4_k
^blk\.(1[5-9]|[2-4][0-9]|5[01])\.attn_q_a\.weight$=iq5_k
^blk\.([2-9]|1[0-4]|5[2-9]|60)\.attn_q_a\.weight$=iq5_ks
^blk\.[0-5]\.attn_q_b\.weight$=iq4_kt
^blk\.(1[1-9]|2[01]|4[5-9]|5[0-4])\.attn_q_b\.weight$=iq4_k
^blk\.(2[2-9]|3[0-9]|4[0-4])\.attn_q_b\.weight$=iq5_ks
^blk\.([6-9]|[16]0|5[5-9])\.attn_q_b\.weight$=iq4_ks
^blk\.[0-4]\.attn_v_b\.weight$=iq5_ks
^blk\.(2[5-9]|3[0-9]|4[01])\.attn_v_b\.weight$=iq6_k
^blk\.(2[24]|4[245])\.attn_v_b\.weight$=q6_K
^blk\.([5-9]|[15][0-9]|2[013]|4[36-9]|60)\.attn_v_b\.weight$=iq5_k

# Dense feed-forward
^blk\.[0-9]+\.ffn_(down|gate|up)\.weight$=iq3_kt

# Shared experts
^blk\.60\.ffn_(down|gate|up)_shexp\.weight$=q8_0
^blk\.(1[89]|[2-5][0-9])\.ffn_(gate|up)_shexp\.weight$=iq5_k
^blk\.([3-9]|1[0-7])\.ffn_(gate|up)_shexp\.weight$=iq5_ks
^blk\.(1[3-9]|[2-5][0-9])\.ffn_down_shexp\.weight$=iq5_k
^blk\.([3-9]|1[0-2])\.ffn_down_shexp\.weight$=iq5_ks

# Routed experts
^blk\.(1[89]|2[0-9]|3[0-7])\.ffn_(gate|up)_exps\.weight$=iq2_kt
^blk\.([3-9]|1[0-7])\.ffn_(gate|up)_exps\.weight$=iq1_kt
^blk\.(3[89]|[45][0-9]|60)\.ffn_(gate|up)_exps\.weight$=iq2_kl
^blk\.(1[5-9]|2[0-9]|30)\.ffn_down_exps\.weight$=iq2_kt
^blk\.([3-9]|1[0-4])\.ffn_down_exps\.weight$=iq1_kt
^blk\.(3[1-7]|60)\.ffn_down_exps\.weight$=iq2_kl
^blk\.(3[89]|[45][0-9])\.ffn_down_exps\.weight$=iq3_kt

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
  "$SOURCE" "$OUT" IQ2_KL "$THREADS"
