#!/bin/sh
# Measures x controls on real photos: SAEs of three seeds, the same trained as controls, and what is made on the fly.
#
#   MODEL=hf:vit_tiny IMAGES=tiny_imagenet_val TAXONOMY=paths.json EMBEDDINGS=lite0.npy,wordnet.npy \
#     sh bench/scoring/real_photos.sh OUT
#
# EMBEDDINGS: row i of image i, from encoders that did not make the activations. STEPS: of a training, 300 by default.
# A run that was cut is continued: what is there is kept.
set -eu
out=$1
run="${PYTHON:-python} -m saevlm_fast.cli"
[ -e "$out/cls/harvest.json" ] || $run harvest --model "$MODEL" --images "$IMAGES" --layer 8 --tokens cls --output "$out/cls"
[ -e "$out/random/harvest.json" ] ||
  $run harvest --model "$MODEL" --images "$IMAGES" --layer 8 --tokens cls --random-weights blocks --output "$out/random"
train() {
  name=$1 rows=$2 seed=$3
  shift 3
  [ -e "$out/$name-$seed/sae_weights.safetensors" ] || $run train --activations "$out/$rows" --architecture matryoshka \
    --d-sae 1536 --k 20 --steps "${STEPS:-300}" --batch-size 512 --lr 2e-3 --dead-after 100000 --seed "$seed" \
    --output "$out/$name-$seed" "$@"
}
saes=
for seed in 0 1 2; do
  train trained cls "$seed"
  train random random "$seed"
  for control in soft-frozen frozen-decoder frozen-encoder shuffled; do train $control cls "$seed" --control $control; done
  for name in trained random soft-frozen frozen-decoder frozen-encoder shuffled; do saes="$saes --sae $out/$name-$seed"; done
done
# shellcheck disable=SC2086
$run evaluate $saes --activations "$out/cls" --random-activations "$out/random" --embeddings "$EMBEDDINGS" \
  --taxonomy "$TAXONOMY" --controls all --output "$out/evaluation" --resume
