#!/usr/bin/env bash
# Pre-train a small RoBERTa with experts on one side of a prepared corpus and, where its pairs have
# domains, fine-tune it to tell them apart (docs/pretraining.md). Started again, it goes on.
#
#   scripts/pretrain.sh CORPUS LANGUAGE RUN [OVERRIDE...]
#   scripts/pretrain.sh data/debian en runs/roberta/switch-seed1 model.router=switch common.seed=1
#
# Overrides are for pre-training; those of model and common are for fine-tuning, too.
#
# OBJECTIVE    pretraining, of masked words (the default), or electra, of replaced ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -ge 3 ] || fail "usage: $0 CORPUS LANGUAGE RUN [OVERRIDE...]"
objective="${OBJECTIVE:-pretraining}"
case "$objective" in
pretraining | electra) ;;
*) fail "OBJECTIVE=$objective is none: give pretraining or electra" ;;
esac
corpus="$(realpath -m "$1")" language="$2" run="$3"
shift 3
python -m fairseq_sparsemixer.corpora.one_side "$corpus" "$language"
data="$corpus/$language"

fairseq-hydra-train --config-dir configs --config-name "$objective" \
    "task.data=$(quoted "$data/input0")" "hydra.run.dir=$(quoted "$run")" "$@"
[ -d "$data/label" ] || exit 0
shared=()
for override in "$@"; do
    case "$(sed 's/^+*//' <<<"$override")" in
    model.generator_*) ;; # of which nothing is fine-tuned
    model.* | common.*) shared+=("$override") ;;
    esac
done
fairseq-hydra-train --config-dir configs --config-name finetuning \
    "task.data=$(quoted "$data")" "task.num_classes=$(wc -l <"$data/label/dict.txt")" \
    "checkpoint.finetune_from_model=$(quoted "$run/checkpoint_best.pt")" \
    "hydra.run.dir=$(quoted "$run/finetuned")" \
    ${shared[@]+"${shared[@]}"}
