#!/usr/bin/env bash
# deepseek-r1-0528, 380.50 GiB, 4.871 bpw (ik), by quantmix 0.1.0
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
^blk\.[0-9]+\.attn_(kv_a_mqa|v_b)\.weight$=q8_0
^blk\.([0-9]|[1-5][0-9])\.attn_k_b\.weight$=q8_0
^blk\.60\.attn_k_b\.weight$=q6_0
^blk\.([0-9]|[1-4][0-9]|50)\.attn_output\.weight$=iq6_k
^blk\.5[2-7]\.attn_output\.weight$=iq5_k
^blk\.(5[89]|60)\.attn_output\.weight$=iq5_ks
^blk\.51\.attn_output\.weight$=q6_K
^blk\.([0-9]|[1-4][0-9]|5[0-7])\.attn_q_a\.weight$=q8_0
^blk\.(5[89]|60)\.attn_q_a\.weight$=iq6_k
^blk\.(0|4[5-9]|5[0-7])\.attn_q_b\.weight$=iq6_k
^blk\.([1-9]|[1-3][0-9]|4[0-4])\.attn_q_b\.weight$=q8_0
^blk\.(5[89]|60)\.attn_q_b\.weight$=q6_K

# Dense feed-forward
^blk\.[0-9]+\.ffn_(gate|up)\.weight$=iq6_k
^blk\.[0-9]+\.ffn_down\.weight$=q8_0

# Shared experts
^blk\.([3-9]|1[0-8]|[45][0-9]|60)\.ffn_(gate|up)_shexp\.weight$=q8_0
^blk\.(19|[23][0-9])\.ffn_(gate|up)_shexp\.weight$=iq6_k
^blk\.(2[1-9]|3[0-7])\.ffn_down_shexp\.weight$=iq6_k
^blk\.([3-9]|[145][0-9]|[26]0|3[89])\.ffn_down_shexp\.weight$=q8_0

# Routed experts
^blk\.(1[6-9]|[23][0-9]|40)\.ffn_(gate|up)_exps\.weight$=iq4_k
^blk\.([3-9]|1[0-5])\.ffn_(gate|up)_exps\.weight$=iq4_ks
^blk\.(4[1-9]|5[0-9]|60)\.ffn_(gate|up)_exps\.weight$=iq5_ks
^blk\.(2[3-9]|[3-5][0-9]|60)\.ffn_down_exps\.weight$=iq5_ks
^blk\.([5-9]|1[0-9]|2[0-2])\.ffn_down_exps\.weight$=iq4_k
^blk\.[34]\.ffn_down_exps\.weight$=iq4_ks

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
  "$SOURCE" "$OUT" IQ5_KS "$THREADS"
