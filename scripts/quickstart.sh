#!/usr/bin/env bash
# The main job from nothing, on real text: environment, data, tokenizer and model, training, evaluation, export.
#   bash scripts/quickstart.sh
# Everything lies below output/quickstart. A second run reuses what is there; delete a folder to make it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

config=examples/configs/ERNIE-4.5-tiny/sft/run_sft.yaml
work=output/quickstart
trained=$work/sft # output_dir of the config

heading() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

# kept FILE COMMAND...: run COMMAND and keep what it prints in FILE; if FILE is there, show it instead.
kept() {
    local file=$1
    shift
    if [ -f "$file" ]; then
        echo "reusing $file"
        cat "$file"
        return
    fi
    "$@" | tee "$file.partial"
    mv "$file.partial" "$file"
}

loss_in() {
    sed -nE 's/.*loss[^0-9]*([0-9]+\.[0-9]+).*/\1/p' "$1" | head -n 1
}

heading environment
prepare_environment cpu quickstart
PATH=$PWD/.venv/bin:$PATH

heading data
python scripts/quickstart_data.py "$work/data"

heading "tokenizer and model"
if [ -d "$work/base" ]; then
    echo "reusing $work/base"
else
    erniekit init --family tiny-moe --train-tokenizer "$work/data/train.jsonl" --out "$work/base"
fi

heading "evaluation before training"
kept "$work/eval-before.txt" erniekit eval "$config"

heading training
erniekit train "$config"

heading "evaluation after training"
kept "$trained/eval-after.txt" erniekit eval "$config" "model_name_or_path=$trained"

heading export
if [ -d "$trained/export" ]; then
    echo "reusing $trained/export"
else
    erniekit export "$config"
fi
erniekit verify "$trained/export"

heading summary
speed='import json, statistics, sys; rows = map(json.loads, open(sys.argv[1]))
print(round(statistics.median(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)))'
cat <<EOF
eval loss   $(loss_in "$work/eval-before.txt") before, $(loss_in "$trained/eval-after.txt") after
speed       $(python -c "$speed" "$trained/train_log.jsonl") tokens/s (median of all steps)
model       $trained (checkpoints and train_log.jsonl beside it)
export      $trained/export (PT layout, for transformers)
chat        .venv/bin/erniekit chat $trained
EOF
