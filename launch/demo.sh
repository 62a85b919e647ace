#!/usr/bin/env bash
# Separates a song with the model that comes with the package, then scores that model on held-out tracks: about a minute
# after set-up. With --train, the whole job from nothing as well: renders multitrack music, trains a small model in its
# three stages, separates held-out tracks; meant to take 15 minutes at most on two cores, a slow machine trains fewer steps.
# Started again it goes on where it stopped. Results are in demo_out/; without that folder it begins anew.
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
case "$*" in
  '' | --train) ;;
  *) echo "usage: bash launch/demo.sh [--train]" >&2 && exit 2 ;;
esac
out=demo_out
mkdir -p "$out"

render() { # split, tracks, seconds
  [ ! -e "$out/corpus/$1.done" ] || return 0
  python -m data_prep.render "$out/corpus" --split "$1" --tracks "$2" --seconds "$3" --seed 7
  touch "$out/corpus/$1.done"
}
train() { # stage, steps, override…
  local stage=$1 steps=$2
  shift 2
  [ ! -e "$out/$stage.done" ] || return 0
  rm -f "$out/table.json"
  echo "== training: $stage"
  msr train --config "configs/unet_${stage}_small.py" --workdir "$out/$stage" \
    --config.data.train="$out/records" --config.train.steps="$steps" "$@"
  touch "$out/$stage.done"
}

echo "== music rendered here; test pieces and test instruments are not trained on"
render test 3 15
echo "== separating a track of the test split with the bundled model"
cp "$out/corpus/test/Track00002/mix.flac" "$out/song.flac"
msr separate "$out/song.flac" -o "$out/stems"
rm -f "$out/bundled_table.json" # of an earlier start: the model or the code may have changed since
python launch/demo/table.py msr_jax/bundled "$out/corpus/test" "$out/bundled_table.json" 1
echo "stems of $out/song.flac: $out/stems/song/"
[ "$*" = --train ] || exit 0

render train 80 20
[ -e "$out/records/dataset_info.json" ] || python -m data_prep.slakh2100 "$out/corpus" "$out/records" --crop 32768
[ -e "$out/steps" ] || { python launch/demo/plan.py "$SECONDS" > "$out/.steps" && mv "$out/.steps" "$out/steps"; }
read -r det diffusion consistency < "$out/steps"
train det "$det"
train diffusion "$diffusion" --config.init_from.deterministic="$out/det"
train consistency "$consistency" --config.init_from.diffusion="$out/diffusion"

echo "== separating the same track with the trained model"
msr separate "$out/song.flac" -o "$out/trained_stems" --model "$out/consistency"
python launch/demo/table.py "$out/consistency" "$out/corpus/test" "$out/table.json"
echo "stems of $out/song.flac: $out/trained_stems/song/   model: $out/consistency/model"
