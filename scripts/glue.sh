#!/usr/bin/env bash
# Fine-tune a pre-trained model on the tasks of GLUE, and score it on their development sets
# (docs/pretraining.md). Downloads them once. Started again, it goes on.
#
#   scripts/glue.sh CORPUS CHECKPOINT RUN [OVERRIDE...]
#   scripts/glue.sh data/debian runs/electra/switch-seed1/checkpoint_best.pt runs/glue/switch-seed1 \
#       model.router=switch
#
# CORPUS is what the model was pre-trained on, and OVERRIDEs are those of configs/finetuning.yaml
# by which the model is as large and routed as the checkpoint's.
#
# TASKS        those to do (default: "CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE")
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -ge 3 ] || fail "usage: $0 CORPUS CHECKPOINT RUN [OVERRIDE...]"
corpus="$1" checkpoint="$2" run="$3"
shift 3
[ -f "$checkpoint" ] || fail "there is no checkpoint $checkpoint: pre-train one with scripts/pretrain.sh"
read -ra tasks <<<"${TASKS:-CoLA SST-2 MRPC STS-B QQP MNLI QNLI RTE}"

fairseq-sparsemixer prepare glue --vocabulary "$corpus" --output "$corpus/glue" \
    --tasks "$(IFS=, && echo "${tasks[*]}")"
for task in "${tasks[@]}"; do
    fairseq-hydra-train --config-dir configs --config-name finetuning "+glue=${task,,}" \
        "task.data=$(quoted "$corpus/glue/bin/$task")" \
        "checkpoint.finetune_from_model=$(quoted "$checkpoint")" \
        "hydra.run.dir=$(quoted "$run/$task")" "$@"
done
python scripts/glue_scores.py "$run"
