"""A small table of published speed rows, and plans that the speed tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

HEADER = (
    "case_id,group_id,author_date,engine,mode,model,quant_label,cpu,cpu_cores,ram_channels,ram_mts,"
    "gpus,ot,ts,rtr,ub,threads,n_kv,tg_tokens,pp_tps,tg_tps,usable_for_fit,est_cpu_active_gb,"
    "est_gpu_active_gb,est_kv_kib_per_tok"
)
# ik_llama.cpp discussions 258, 357, 532 and 492: what the authors measured.
ROWS = (
    "ani,ani,2025-04-11,ik_llama.cpp,hybrid,DeepSeek-V3/R1 671B,UD-Q2_K_XL,"
    "AMD Threadripper PRO 7975WX (32c),32,8,5600,1x RTX 5090 32G,exps=CPU,,1,512,32,0,128,140.54,"
    "17.95,1,6.77,9.56,68.62",
    "kir,kir,2025-06-24,ik_llama.cpp,hybrid,DeepSeek-V3/R1 671B,UD-Q4_K_XL (R1-0528),"
    "Intel Xeon 8480-class ES QYFS (56c),56,8,4800,1x RTX PRO 6000 96G,exps=CPU,,1,1024,52,0,256,"
    "152.71,15.62,1,8.93,12.31,36.46",
    "eous,eous,2025-07-10,ik_llama.cpp,gpu,DeepSeek-V3/R1 671B,IQ1_S,,,,,2x RTX PRO 6000 96G,,,,"
    "4096,1,0,1024,820.25,42.13,1,0.0,12.77,68.62",
    "l8,l8,2025-06-12,ik_llama.cpp,cpu,Llama-3.1-8B,Q4_K,AMD Ryzen 9 9950X (16c),16,2,6400,,,,,512,"
    "16,0,128,269.0,13.17,1,4.37,0,68.0",
    "two,two,2025-05-07,ik_llama.cpp,cpu,Llama-3.1-8B,Q8_0,2x Intel Xeon Gold 6226R (32c),32,6,"
    "2933,,,,,512,32,0,128,53.2,2.68,0,8.5,0,68.0",
    "nobw,nobw,2025-05-07,ik_llama.cpp,gpu,Llama-3.1-8B,Q8_0,,,,,1x Frobnicator 9000 12G,,,,512,1,"
    "0,128,53.2,22.68,1,0,8.5,68.0",
    "nomodel,nomodel,2025-05-07,ik_llama.cpp,gpu,Frobozz-9B,Q8_0,,,,,1x RTX 4090 24G,,,,512,1,0,"
    "128,53.2,22.68,1,0,8.5,68.0",
)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A CSV of a few published rows, two of which cannot be judged."""
    file = tmp_path / "speed_logs.csv"
    file.write_text("\n".join([HEADER, *ROWS]) + "\n", encoding="utf-8")
    return file
