#!/usr/bin/env bash
# The bundled model and the study of the method, from nothing to the tables: arranged and written music through four
# sets of sounds, the stages of one small network, the paper's control, two seeds of the refinement, scores on pieces and a
# SoundFont that were never trained on. First in short, every stage on one set of tracks: `bash launch/study/study.sh OUT short` ends
# there, after four to five hours on two cores; the rest takes many more. Started again it goes on where it stopped (in a new OUT
# after the corpus below has changed).
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/../setup.sh"
out=${1:-study_out}
case "${2:-}" in
  '' | short) ;;
  *) echo "usage: bash launch/study/study.sh [OUT [short]]" >&2 && exit 2 ;;
esac
command -v timidity >/dev/null || { echo "study.sh needs timidity: apt-get install timidity freepats" >&2 && exit 1; }
mkdir -p "$out/fonts"

font() { # Debian package, file: the path of a SoundFont, of this system or fetched without installing it
  local path=/usr/share/sounds/sf2/$2
  if [ ! -f "$path" ]; then
    path=$out/fonts/usr/share/sounds/sf2/$2
    [ -f "$path" ] || (cd "$out/fonts" && apt-get download "$1" >&2 && dpkg -x "$1"_*.deb .)
  fi
  echo "$path"
}
render() { # mark, corpus, split, tracks, options…
  local mark=$1 corpus=$out/$2 split=$3 tracks=$4
  shift 4
  [ ! -e "$corpus/$mark.done" ] || return 0
  python -m data_prep.render "$corpus" --split "$split" --tracks "$tracks" --seconds 30 --seed 11 "$@"
  touch "$corpus/$mark.done"
}
pieces() { # Debian packages: their pieces as MIDI files in $out/pieces
  [ ! -e "$out/pieces.done" ] || return 0
  mkdir -p "$out/packages"
  (cd "$out/packages" && apt-get download "$@" >&2 && for file in *.deb; do dpkg -x "$file" .; done)
  python launch/study/scores.py "$out/packages" "$out/pieces"
  touch "$out/pieces.done"
}
train() { # config, run, override…
  local config=$1 run=$2
  shift 2
  [ ! -e "$out/$run.done" ] || return 0
  # A core works on its own examples: faster than both on all.
  XLA_FLAGS="--xla_force_host_platform_device_count=2 ${XLA_FLAGS:-}" msr train --config "configs/$config.py" --workdir "$out/$run" \
    --config.data.train="$out/records" --config.data.validation="$out/records" "$@"
  touch "$out/$run.done"
}
score() { # name, run, refinement, options…
  local name=$1 run=$2 refine=$3
  shift 3
  msr evaluate --data "$out/corpus" --model "$out/$run" --refine "$refine" --no-det --out "$out/scores/$name" "$@"
}

tim=$(python -c 'from data_prep.timbre import default_soundfont as path; print(path())')
fluid=$(font fluid-soundfont-gm FluidR3_GM.sf2)
opl=$(font opl3-soundfont OPL-3_FM_128M.sf2)
unseen=$(font csound-soundfont sf_GMbank.sf2)
fonts=(--soundfont "$tim" --soundfont "$tim" --soundfont "$fluid" --soundfont "$fluid" --soundfont "$fluid" --soundfont "$opl")
render validation corpus validation 16 --soundfont "$unseen"
render test corpus test 40 --soundfont "$unseen"
pieces openttd-openmsx freedoom mma simutrans-data planetblupi-music-midi liquidwar-data kobodeluxe-data
renders() { # corpus, first track, step to the next kind's first, tracks of the arranger, of games, of bands and of all written pieces
  local corpus=$1 first=$2 step=$3 counts=("${@:4:4}")
  shift 7
  render "arranged_$first" "$corpus" train "${counts[0]}" --first "$first" "$@"
  render "games_$first" "$corpus" train "${counts[1]}" --first $((first + step)) "$@" --scores "$out/pieces/games" --moved 0.3 --doubled 0.25
  render "bands_$first" "$corpus" train "${counts[2]}" --first $((first + 2 * step)) "$@" --scores "$out/pieces/written/bands" --moved 0.3 --doubled 0.25
  render "written_$first" "$corpus" train "${counts[3]}" --first $((first + 3 * step)) "$@" --scores "$out/pieces/written" --moved 0.5 --doubled 0.5
}
# All 700 are the short study's. The bundled model refines on the first 300, for what a separator estimates of tracks that it has
# heard is nearer to the stems than what it will meet.
patches=(--soundfont launch/study/freepats.cfg --soundfont launch/study/freepats.cfg --soundfont launch/study/freepats.cfg)
many=(--every-program --synthesised 0.2 --soundfont "$tim" --soundfont "$fluid" --soundfont "$fluid" --soundfont "$opl" "${patches[@]}")
renders fresh 8000 200 130 70 50 50 --every-program --synthesised 0.25 --soundfont "$tim" --soundfont "$fluid" --soundfont "$fluid" \
  --soundfont "$opl" "${patches[@]:0:4}"
renders last 9000 200 130 90 90 90 "${many[@]}"
mkdir -p "$out/short/train"
for track in "$out"/{fresh,last}/train/Track*; do ln -sfn "$(realpath "$track")" "$out/short/train/"; done
prepare() { # corpus, records
  [ -e "$out/$2/dataset_info.json" ] || python -m data_prep.slakh2100 "$out/$1" "$out/$2" --crop 65024
}
prepare short short_records

# The short study: a separator, and its refinements on the same tracks.
same=(--config.data.train="$out/short_records" --config.data.validation=)
train short_det short_det "${same[@]}"
from=("${same[@]}" --config.init_from.deterministic="$out/short_det")
for seed in 0 1; do
  train short_diffusion "short_diffusion_$seed" "${from[@]}" --config.seed="$seed"
  train short_consistency "short_consistency_$seed" "${same[@]}" --config.init_from.diffusion="$out/short_diffusion_$seed" --config.seed="$seed"
done
train short_det_x2 short_det_x2 "${from[@]}"
# The separator itself, trained on for as many mixtures as a refinement.
train short_det short_det_on "${from[@]}" --config.train.steps=380
score short_det short_det none
score short_det_on short_det_on none
score short_det_x2 short_det_x2 det_x2
for seed in 0 1; do
  score "short_diffusion_$seed" "short_diffusion_$seed" diffusion
  score "short_consistency_${seed}_1" "short_consistency_$seed" consistency --steps 1
done
score short_consistency_0_2 short_consistency_0 consistency --steps 2
score short_consistency_0_4 short_consistency_0 consistency --steps 4
python launch/study/table.py "$out/scores" short_{det,det_on,det_x2,diffusion_{0,1},consistency_{0,1}_1,consistency_0_{2,4}} | tee "$out/short_table.md"
msr compare "$out/scores/short_det_x2" "$out"/scores/short_diffusion_{0,1}
for seed in 0 1; do msr compare "$out/scores/short_diffusion_$seed" "$out/scores/short_consistency_${seed}_1"; done
[ "${2:-}" != short ] || exit 0

# The bundled model: its corpus.
render train corpus train 600 --every-program --synthesised 0.25 "${fonts[@]}"
written=(--scores "$out/pieces/written" --every-program --synthesised 0.25 "${fonts[@]}")
render written corpus train 600 --first 600 "${written[@]}"
render moved corpus train 300 --first 1200 --moved 0.5 "${written[@]}"
render doubled corpus train 500 --first 1500 --moved 0.5 --doubled 0.5 "${written[@]}"
render bands corpus train 350 --first 2000 --moved 0.3 --doubled 0.25 "${written[@]}" --scores "$out/pieces/written/bands"
render more_bands corpus train 300 --first 3000 --moved 0.3 --doubled 0.25 "${written[@]}" --scores "$out/pieces/written/bands"
render games corpus train 450 --first 4000 --moved 0.3 --doubled 0.25 "${written[@]}" --scores "$out/pieces/games"
render games games validation 24 --every-program --soundfont "$unseen" --scores "$out/pieces/games_validation"
# For the last separator: new tracks, in most of which FreePats plays, and a third of the old ones.
renders wider 5000 100 80 70 50 60 --every-program --synthesised 0.25 "${fonts[@]}"
renders wider 6000 200 200 150 120 130 "${many[@]}"
for track in "$out"/corpus/train/Track*[147]; do ln -sfn "$(realpath "$track")" "$out/wider/train/"; done
prepare corpus records
prepare wider wider_records
prepare fresh fresh_records

# Three runs of the separator, each from the one before: the refinement begins with the second, and refines what the last estimates.
train bundled_det first
train bundled_det start --config.init_from.deterministic="$out/first" --config.train.steps=5000 --config.optim.decay_steps=0 --config.seed=4
train bundled_det det --config.init_from.deterministic="$out/start" --config.train.steps=4000 --config.optim.decay_steps=0 --config.seed=6 \
  --config.data.train="$out/wider_records"
fresh=--config.data.train="$out/fresh_records"
from=("$fresh" --config.init_from.deterministic="$out/det" --config.init_from.start="$out/start")
train bundled_det_x2 det_x2 "${from[@]}"
for seed in 0 1; do
  train bundled_diffusion "diffusion_$seed" "${from[@]}" --config.seed="$seed"
  train bundled_consistency "consistency_$seed" "$fresh" --config.init_from.diffusion="$out/diffusion_$seed" --config.seed="$seed"
done
# What ships with it: half of the way from what diffusion began with.
[ -e "$out/ships" ] || python launch/study/blend.py "$out/diffusion_0" "$out/consistency_0" "$out/ships"

score det det none
score start start none
score det_consistent det none --mixture-consistent
score det_x2 det_x2 det_x2
for seed in 0 1; do
  score "diffusion_$seed" "diffusion_$seed" diffusion
  for steps in 1 2 4; do
    score "consistency_${seed}_$steps" "consistency_$seed" consistency --steps "$steps"
  done
done
score consistency_0_1_consistent consistency_0 consistency --steps 1 --mixture-consistent
games=(--data "$out/games" --split validation) # pieces that people wrote, for bands
score games_det det none "${games[@]}"
score games_consistency_0_1 consistency_0 consistency --steps 1 "${games[@]}"
score ships ships consistency --steps 1
score games_ships ships consistency --steps 1 "${games[@]}"
names=(det start det_consistent det_x2 diffusion_{0,1} consistency_{0,1}_{1,2,4} consistency_0_1_consistent ships)
python launch/study/table.py "$out/scores" "${names[@]}" | tee "$out/table.md"
python launch/study/table.py "$out/scores" games_det games_consistency_0_1 games_ships | tee "$out/games_table.md"
msr compare "$out/scores/det_x2" "$out"/scores/diffusion_{0,1}
msr compare "$out/scores/diffusion_0" "$out"/scores/consistency_0_{1,2,4}
python launch/study/mean.py "$out/start" "$out/det" "$out/corpus" --split test # what the two are worth together
tune() { # name, lists…
  [ -e "$out/$1/sweep.md" ] || msr sweep --data "$out/corpus" --model "$out/diffusion_0" --refine diffusion --tracks 8 --out "$out/$1" "${@:2}"
  cat "$out/$1/sweep.md"
}
tune sweep_levels --steps 1 --sigma-max 0.25,0.5,1
tune sweep_steps --steps 2 --sigma-max 0.5,1 --resamples 1,2 --s-churn 0,0.8
for sigma in 0.25 0.5 1; do
  table=$out/inputs_$sigma.md
  [ -e "$table" ] || { python launch/study/inputs.py "$out/diffusion_0" "$out/corpus" --sigma "$sigma" > "$table.part" && mv "$table.part" "$table"; }
  cat "$table"
done
